"""The mapping that a user would write: what the Python peers share. Standard library only, and no checks.

`names.json` beside the running program holds what the user would have typed from the documentation: the Mixpanel name
of each event type.
"""

import json
from pathlib import Path
from typing import Any

NAMES: dict[str, str] = json.loads(Path("names.json").read_text(encoding="utf-8"))
RENAMED = {"content_card_id": "card_id", "product_id": "productId"}
PREFIXES = {"custom_properties": "[Custom event property] ", "purchase_properties": "[Purchase property] "}


def mixpanel_event(event: dict[str, Any], token: str) -> dict[str, Any]:
    """A Currents event as Mixpanel's /import wants it."""
    user = event["user"]
    kind = event["event_type"]
    given = event["properties"]
    name = NAMES.get(kind, kind)
    properties = {
        "token": token,
        "distinct_id": user["external_user_id"],
        "time": event["time"],
        "$insert_id": event["id"],
        "$partner_id": "braze",
        "ip": 0,
    }
    if "device_id" in user:
        properties["device_id"] = user["device_id"]
    for key, value in given.items():
        if key in PREFIXES:
            prefix = PREFIXES[key]
            for custom, its in value.items():
                properties[prefix + custom] = its
        elif value is not None:
            properties[RENAMED.get(key, key)] = value
    if kind == "users.behaviors.CustomEvent":
        name = "[Braze Custom Event] " + properties.pop("name")
    return {"event": name, "properties": properties}
