"""Made-up Currents events, as Braze's Custom HTTP connector would send them: for the demo, the tests and the benchmark.

Nothing here is anybody's data: the people live at example.com, their phones in the number range kept for fiction, the
servers in the address blocks kept for documentation. What recurs in real data (campaigns, Canvases, devices, people)
recurs here too, so that the events compress like real ones. The same `rng` yields the same events.
"""

import random
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec

from bridged.currents.table import AD, EVENT_TYPES, EventType

T = TypeVar("T")

DAY_S: Final = 86_400
PEOPLE: Final = 20_000

# How often each type occurs on a day of a shop that mails and pushes a lot; the types not named here, RARE times.
RARE: Final = 2
REAL_MIX: Final[dict[str, int]] = {row.event_type: RARE for row in EVENT_TYPES} | {
    "users.behaviors.CustomEvent": 1_500,
    "users.behaviors.Purchase": 60,
    "users.behaviors.app.FirstSession": 50,
    "users.behaviors.app.SessionStart": 1_000,
    "users.behaviors.app.SessionEnd": 900,
    "users.behaviors.Location": 40,
    "users.behaviors.InstallAttribution": 15,
    "users.behaviors.Uninstall": 15,
    "users.behaviors.subscription.GlobalStateChange": 15,
    "users.behaviors.subscriptiongroup.StateChange": 20,
    "users.behaviors.pushnotification.TokenStateChange": 40,
    "users.campaigns.Conversion": 50,
    "users.campaigns.EnrollInControl": 40,
    "users.canvas.Conversion": 40,
    "users.canvas.Entry": 250,
    "users.canvasstep.Progression": 300,
    "users.messages.email.Send": 1_250,
    "users.messages.email.Delivery": 1_200,
    "users.messages.email.Open": 500,
    "users.messages.email.Click": 60,
    "users.messages.email.Bounce": 10,
    "users.messages.email.SoftBounce": 15,
    "users.messages.email.Unsubscribe": 10,
    "users.messages.pushnotification.Send": 1_400,
    "users.messages.pushnotification.Open": 60,
    "users.messages.pushnotification.IosForeground": 60,
    "users.messages.pushnotification.Bounce": 20,
    "users.messages.inappmessage.Impression": 300,
    "users.messages.inappmessage.Click": 60,
    "users.messages.contentcard.Send": 120,
    "users.messages.contentcard.Impression": 200,
    "users.messages.contentcard.Click": 15,
    "users.messages.contentcard.Dismiss": 10,
    "users.messages.banner.Impression": 80,
    "users.messages.banner.Click": 10,
    "users.messages.featureflag.Impression": 40,
    "users.messages.sms.Send": 60,
    "users.messages.sms.CarrierSend": 55,
    "users.messages.sms.Delivery": 50,
    "users.messages.webhook.Send": 60,
    "users.messages.whatsapp.Send": 20,
    "users.messages.whatsapp.Delivery": 20,
    "users.messages.whatsapp.Read": 15,
}

_ROWS: Final = {row.event_type: row for row in EVENT_TYPES}


def example_day(rng: random.Random, count: int, start_s: int) -> Iterator[dict[str, Any]]:
    """Yield `count` events of `REAL_MIX`, spread over the day that begins at `start_s`, nearly in order of time."""
    kinds = list(REAL_MIX)
    weights = list(REAL_MIX.values())
    for index, kind in enumerate(rng.choices(kinds, weights, k=count)):
        second = min(index * DAY_S // count + rng.randrange(60), DAY_S - 1)
        yield example_event(_ROWS[kind], rng, start_s + second)


def example_event(
    event_type: EventType, rng: random.Random, time_s: int, *, every_property: bool = False
) -> dict[str, Any]:
    """Return one event; with `every_property` it carries all that Braze documents for its type, and no null."""
    scene = _Scene(rng, time_s, rng.randrange(PEOPLE))
    known = _message(event_type, rng, every_property=every_property) | scene.device()
    properties: dict[str, Any] = {}
    for name in event_type.properties:
        if name in known:
            properties[name] = known[name]
        elif every_property or scene.has(name):
            properties[name] = _VALUES[name](scene)
    if "machine_open" in properties and not every_property and rng.random() < 0.6:
        properties["machine_open"] = None  # how Braze says "no"
    if event_type.custom == "event":
        properties |= _custom_event(rng, every_property=every_property)
    elif event_type.custom == "purchase":
        properties |= _purchase(rng, every_property=every_property)
    user = {"user_id": f"{_scatter(scene.person, 96):024x}", "external_user_id": f"customer-{scene.person:05d}"}
    if every_property or "app_id" in properties or scene.person % 3 == 0:
        user["device_id"] = str(uuid.UUID(int=_scatter(PEOPLE + scene.person, 128), version=4)).upper()
    if every_property or scene.person % 4:
        user["timezone"] = _TIMEZONES[scene.person % len(_TIMEZONES)]
    return {
        "event_type": event_type.event_type,
        "id": _uuid(rng),
        "time": time_s,
        "user": user,
        "properties": properties,
    }


class _Scene(msgspec.Struct, frozen=True):
    """What the value of a property may depend on."""

    rng: random.Random
    time_s: int
    person: int

    def device(self) -> dict[str, str]:
        return _DEVICES[self.person % len(_DEVICES)]

    def has(self, name: str) -> bool:
        """Whether this event carries a property that it need not carry."""
        if name in AD:
            return self.person % 3 == 0
        return name not in _MESSAGE_NAMES and (name not in _SELDOM or self.rng.random() < _SELDOM[name])


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _scatter(number: int, bits: int) -> int:
    """Return a random-looking number of so many bits, always the same for the same `number`."""
    return ((number + 1) * _SCATTERER >> 64) & ((1 << bits) - 1)


# The pools: what a workspace has only a few of.
_POOL: Final = random.Random("a made-up workspace")
_SCATTERER: Final = _POOL.getrandbits(256) | 1
_APP_GROUP_ID: Final = _uuid(_POOL)
_TIMEZONES: Final = ("America/New_York", "America/Chicago", "America/Los_Angeles", "Europe/Paris", "Asia/Tokyo")
_CANVAS_STEPS: Final = ("Welcome Message", "Two Day Reminder", "Last Call")

_CAMPAIGNS: Final[list[dict[str, str]]] = [
    {"campaign_id": campaign_id, "campaign_name": name, "message_variation_id": _uuid(_POOL)}
    | {"message_variation_name": variation}
    for name in (
        "Spring Sale Launch",
        "Weekly Digest",
        "Abandoned Cart",
        "Back In Stock",
        "Loyalty Points Expiring",
        "Birthday Voucher",
        "App Update Available",
        "Order Shipped",
    )
    for campaign_id in (_uuid(_POOL),)
    for variation in ("Variant 1", "Variant 2")
]
_CANVASES: Final[list[dict[str, str]]] = [
    {
        "canvas_id": canvas_id,
        "canvas_name": name,
        "canvas_variation_id": variation_id,
        "canvas_variation_name": variation,
    }
    | {"canvas_step_id": step_id, "canvas_step_name": step, "canvas_step_message_variation_api_id": _uuid(_POOL)}
    for name in ("Onboarding Journey", "Win-Back Journey", "Trial To Paid", "Post-Purchase Care", "VIP Programme")
    for canvas_id in (_uuid(_POOL),)
    for steps in ([(step, _uuid(_POOL)) for step in _CANVAS_STEPS],)
    for variation in ("Variant A", "Variant B")
    for variation_id in (_uuid(_POOL),)
    for step, step_id in steps
]
_MESSAGE_NAMES: Final = frozenset(_CAMPAIGNS[0]) | frozenset(_CANVASES[0])

_APPS: Final = {platform: _uuid(_POOL) for platform in ("ios", "android", "web")}
_DEVICES: Final[list[dict[str, str]]] = [
    {"app_group_id": _APP_GROUP_ID, "app_id": _APPS[platform]}
    | {"platform": platform, "os_version": os_version, "device_model": device_model}
    for platform, os_version, device_model in (
        ("ios", "18.5", "iPhone 15"),
        ("ios", "18.6", "iPhone 16 Pro"),
        ("ios", "17.7", "iPhone 12 mini"),
        ("android", "15", "Pixel 8"),
        ("android", "14", "SM-S911B"),
        ("android", "13", "moto g54"),
        ("web", "Windows 11", "Chrome"),
    )
]

_AD_ID_TYPES: Final = {"ios": "ios_idfa", "android": "google_ad_id", "web": "none"}
_USER_AGENTS: Final = (
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
    "Mozilla/5.0 (Linux; Android 15; Pixel 8) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/139.0.0.0 Mobile",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/139.0.0.0 Safari/537.36",
)
_PRODUCTS: Final = (
    ("SKU-10021", "Trail Running Shoes", 89.9),
    ("SKU-10440", "Rain Jacket", 129.0),
    ("SKU-20007", "Water Bottle", 14.5),
    ("SKU-20318", "Merino Socks", 12.99),
    ("SKU-31502", "Head Torch", 39.95),
)
_SUBSCRIPTION_GROUPS: Final = tuple(_uuid(_POOL) for _ in range(3))
_FLOWS: Final = ("1180234455667788", "1180234455669900")


def _message(event_type: EventType, rng: random.Random, *, every_property: bool) -> dict[str, str]:
    """Return where the event comes from: a campaign or a Canvas, both only when all properties are asked for."""
    names = event_type.properties
    if every_property:
        return rng.choice(_CAMPAIGNS) | rng.choice(_CANVASES)
    if "campaign_id" in names and ("canvas_step_id" not in names or rng.random() < 0.6):
        return rng.choice(_CAMPAIGNS)
    return rng.choice(_CANVASES)


def _custom_event(rng: random.Random, *, every_property: bool) -> dict[str, Any]:
    chosen = _CUSTOM_NAMES if every_property else rng.sample(_CUSTOM_NAMES, rng.randint(2, 6))
    properties = {name: _CUSTOM_VALUES[name](rng) for name in chosen}
    if every_property or rng.random() < 0.1:
        sku, title, price = rng.choice(_PRODUCTS)
        properties["cart"] = {"items": [{"sku": sku, "title": title, "quantity": rng.randint(1, 4)}], "total": price}
    return {"name": rng.choice(_CUSTOM_EVENTS), "custom_properties": properties}


def _purchase(rng: random.Random, *, every_property: bool) -> dict[str, Any]:
    sku, title, price = rng.choice(_PRODUCTS)
    properties: dict[str, Any] = {"title": title, "quantity": rng.randint(1, 3), "gift": rng.random() < 0.1}
    if every_property or rng.random() < 0.3:
        properties["discounts"] = [{"code": "SPRING10", "percent": 10}]
    return {"product_id": sku, "price": price, "currency": "USD", "purchase_properties": properties}


_CUSTOM_EVENTS: Final = (
    "viewed_product",
    "added_to_cart",
    "searched",
    "completed_onboarding",
    "watched_video",
    "shared_article",
    "started_trial",
)
_CUSTOM_VALUES: Final[dict[str, Callable[[random.Random], Any]]] = {
    "category": lambda rng: rng.choice(("shoes", "jackets", "accessories")),
    "product": lambda rng: rng.choice(_PRODUCTS)[1],
    "price": lambda rng: rng.choice(_PRODUCTS)[2],
    "quantity": lambda rng: rng.randint(1, 5),
    "is_member": lambda rng: rng.random() < 0.4,
    "search_term": lambda rng: rng.choice(("rain jacket", "waterproof shoes", "socks")),
    "seconds_watched": lambda rng: rng.randint(3, 600),
    "screen": lambda rng: rng.choice(("home", "search", "product", "checkout")),
    "tags": lambda rng: rng.sample(("new", "sale", "outdoor", "winter"), 2),
    "store": lambda rng: {"city": rng.choice(("Lyon", "Boston", "Osaka")), "floor": rng.randint(0, 3)},
    "experiment": lambda rng: rng.choice(("control", "treatment")),
}
_CUSTOM_NAMES: Final = tuple(_CUSTOM_VALUES)

# How often a property is there that isn't always: a share of the events of its type.
_SELDOM: Final[dict[str, float]] = {
    "browser": 0.5,
    "button_action_type": 0.2,
    "button_string": 0.2,
    "email_address": 0.97,
    "has_url_parameters": 0.1,
    "is_unique": 0.1,
    "link_alias": 0.5,
    "link_aliasing_enabled": 0.1,
    "link_id": 0.5,
    "locale_key": 0.2,
    "message_extras": 0.2,
    "send_id": 0.5,
    "send_time": 0.1,
    "suspected_bot_click_reason": 0.05,
}


def _one_of(*values: T) -> Callable[[_Scene], T]:
    return lambda scene: scene.rng.choice(values)


def _within(low: int, high: int) -> Callable[[_Scene], int]:
    return lambda scene: scene.rng.randint(low, high)


def _likely(share: float) -> Callable[[_Scene], bool]:
    return lambda scene: scene.rng.random() < share


def _around(middle: float, width: float) -> Callable[[_Scene], float]:
    return lambda scene: round(scene.rng.uniform(middle - width, middle + width), 5)


def _digits(prefix: str, count: int) -> Callable[[_Scene], str]:
    return lambda scene: f"{prefix}{scene.rng.randrange(10**count):0{count}d}"


def _hex(digits: int) -> Callable[[_Scene], str]:
    return lambda scene: f"{scene.rng.getrandbits(4 * digits):0{digits}x}"


def _new_uuid(scene: _Scene) -> str:
    return _uuid(scene.rng)


def _ago(seconds: int) -> Callable[[_Scene], int]:
    return lambda scene: scene.time_s - scene.rng.randrange(seconds)


def _email(scene: _Scene) -> str:
    return f"customer-{scene.person:05d}@example.com"


def _phone(scene: _Scene) -> str:
    return f"+1{(202, 303, 415, 512, 617)[scene.person % 5]}55501{scene.person % 100:02d}"


def _link(scene: _Scene) -> str:
    return f"https://shop.example.com/p/{scene.rng.choice(_PRODUCTS)[0].lower()}?utm_source=braze&utm_medium=message"


def _short_link(scene: _Scene) -> str:
    return f"https://go.example.com/{scene.rng.getrandbits(32):08x}"


_VALUES: Final[dict[str, Callable[[_Scene], Any]]] = {
    # campaign, Canvas, send
    "canvas_entry_id": _new_uuid,
    "canvas_step_message_variation_id": _new_uuid,
    "next_step_id": _new_uuid,
    "exit_reason": _one_of("no_next_step", "exit_criteria_met"),
    "progression_type": _one_of("advance", "exit"),
    "experiment_step_id": _one_of(_uuid(_POOL), _uuid(_POOL)),
    "experiment_split_id": _one_of(_uuid(_POOL), _uuid(_POOL)),
    "experiment_split_name": _one_of("Path 1", "Path 2", "Control"),
    "combination_token": _hex(16),
    "content_optimizer_step_id": _one_of(_uuid(_POOL), _uuid(_POOL)),
    "conversion_behavior": _one_of(
        '{"type":"Makes Any Purchase","window":259200}', '{"type":"Starts Session","window":86400}'
    ),
    "conversion_behavior_index": _within(0, 3),
    "in_control_group": _likely(0.1),
    "is_canvas_entry": _likely(0.3),
    "feature_flag_id_name": _one_of("new_checkout", "quick_reorder"),
    "send_id": _one_of(*(f"{_POOL.getrandbits(96):024x}" for _ in range(20))),
    "dispatch_id": _hex(32),
    "message_extras": _one_of('{"segment":"gold"}', '{"segment":"silver","offer":"free-shipping"}'),
    "locale_key": _one_of("en", "fr", "ja"),
    "abort_type": _one_of("quiet_hours", "rate_limit", "liquid_abort_message"),
    "abort_log": _one_of("Quiet hours are in effect", "The item is out of stock"),
    "retry_type": _one_of("timeout", "provider_unavailable"),
    "retry_log": _one_of("No answer within 30 seconds", "The provider is unavailable, trying again"),
    # app, device, session, purchase
    "ad_id": _new_uuid,
    "ad_id_type": lambda scene: _AD_ID_TYPES[scene.device()["platform"]],
    "ad_tracking_enabled": _likely(0.5),
    "session_id": _new_uuid,
    "duration": _around(120, 115),
    "source": _one_of("Organic", "Partner Network", "Search Ads"),
    "browser": _one_of("Chrome", "Safari", "Firefox"),
    "carrier": _one_of("Carrier One", "Carrier Two"),
    "country": _one_of("US", "FR", "JP"),
    "gender": _one_of("F", "M", "O"),
    "language": _one_of("en", "fr", "ja"),
    "resolution": _one_of("1170x2532", "1080x2400"),
    "sdk_version": _one_of("12.0.1", "33.1.0"),
    "currency": _one_of("USD", "EUR"),
    "price": _around(60, 55),
    "product_id": _one_of(*(sku for sku, _, _ in _PRODUCTS)),
    "latitude": _around(45.76, 0.4),
    "longitude": _around(4.84, 0.4),
    "ll_accuracy": _around(20, 15),
    "altitude": _around(170, 40),
    "alt_accuracy": _around(6, 5),
    # on screen
    "banner_placement_id": _one_of("home_top", "cart_bottom"),
    "button_action_type": _one_of("URI", "DEEP_LINK", "CLOSE"),
    "button_id": _one_of("0", "1"),
    "button_string": _one_of("accept", "later"),
    "card_id": _one_of(*(_uuid(_POOL) for _ in range(6))),
    "content_card_id": _one_of(*(_uuid(_POOL) for _ in range(6))),
    "is_unique": _likely(0.7),
    # push and Live Activity
    "push_token": _hex(64),
    "push_token_device_id": _new_uuid,
    "push_token_created_at": _ago(90 * DAY_S),
    "push_token_updated_at": _ago(DAY_S),
    "push_token_foreground_push_disabled": _likely(0.1),
    "push_token_provisionally_opted_in": _likely(0.1),
    "push_token_state_change_type": _one_of("add", "update", "remove"),
    "time_ms": lambda scene: scene.time_s * 1000 + scene.rng.randrange(1000),
    "ios_push_token_apns_gateway": _within(1, 2),
    "push_to_start_token": _hex(64),
    "update_token": _hex(64),
    "web_push_token_public_key": _hex(64),
    "web_push_token_user_auth": _hex(32),
    "web_push_token_vapid_public_key": _hex(64),
    "activity_id": _one_of("delivery-tracker", "match-score"),
    "activity_attributes_type": _one_of("DeliveryAttributes", "MatchAttributes"),
    "live_activity_event_outcome": _one_of("success", "failure"),
    "live_activity_event_type": _one_of("start", "update", "end"),
    # email
    "email_address": _email,
    "esp": _one_of("sendgrid", "sparkpost", "amazon_ses"),
    "from_domain": _one_of("mail.example.com", "news.example.com"),
    "ip_pool": _one_of("main_pool", "transactional_pool"),
    "sending_ip": lambda scene: f"192.0.2.{scene.rng.randrange(1, 255)}",
    "recipient_domain": _one_of("example.com", "example.org"),
    "bounce_reason": _one_of("550 5.1.1 mailbox not found", "452 4.2.2 mailbox full"),
    "is_drop": _likely(0.2),
    "deferral_reason": _one_of("421 4.7.0 try again later", "451 4.3.0 temporarily unavailable"),
    "attempt_count": _within(1, 6),
    "send_time": _ago(3 * DAY_S),
    "user_agent": _one_of(*_USER_AGENTS),
    "device_class": _one_of("phone", "desktop", "tablet"),
    "device_os": _one_of("iOS", "Android", "Windows"),
    "mailbox_provider": _one_of("Provider A", "Provider B"),
    "is_amp": _likely(0.05),
    "machine_open": _one_of("true"),
    "url": _link,
    "link_id": _hex(12),
    "link_alias": _one_of("header-logo", "main-button", "footer"),
    "link_aliasing_enabled": _likely(0.5),
    "has_url_parameters": _likely(0.8),
    "is_suspected_bot_click": _likely(0.05),
    "suspected_bot_click_reason": _one_of(["user_agent"], ["user_agent", "click_speed"]),
    # subscriptions
    "subscription_group_id": _one_of(*_SUBSCRIPTION_GROUPS),
    "subscription_status": _one_of("Subscribed", "Unsubscribed"),
    "state_change_source": _one_of("REST API", "Preference Center", "SDK"),
    "channel": _one_of("email", "sms"),
    "channel_identifier": _email,
    # SMS, RCS, WhatsApp, LINE
    "phone_number": _phone,
    "from_phone_number": _one_of("+12025550100", "+12025550101"),
    "to_phone_number": _phone,
    "inbound_phone_number": _one_of("+12025550100", "+12025550101"),
    "user_phone_number": _phone,
    "from_rcs_sender": _one_of("example_shop_agent"),
    "to_rcs_sender": _one_of("example_shop_agent"),
    "bsuid": _digits("US.", 16),
    "native_line_id": lambda scene: f"U{_scatter(scene.person, 128):032x}",
    "line_channel_id": _one_of("2000000001", "2000000002"),
    "line_channel_name": _one_of("Example Shop", "Example Shop Support"),
    "message_body": _one_of("STOP", "Yes please", "Where is my order?", "Merci, à bientôt \N{WAVING HAND SIGN}"),
    "message_id": _hex(32),
    "media_id": _digits("", 18),
    "media_urls": _one_of(["https://media.example.com/photo-1.jpg"], ["https://media.example.com/photo-2.jpg"]),
    "action": _one_of("Subscribed", "Unsubscribed", "None"),
    "category": _one_of("promotional", "transactional"),
    "short_url": _short_link,
    "is_sms_fallback": _likely(0.1),
    "error": _one_of("Unreachable destination handset", "Carrier violation"),
    "provider_error_code": _one_of("30003", "30007"),
    "provider_error_title": _one_of("Message undeliverable", "Rate limit hit"),
    "element_label": _one_of("Shop now", "Call us"),
    "element_type": _one_of("button", "card"),
    "interaction_type": _one_of("open_url", "dial"),
    "quick_reply_text": _one_of("Yes", "No"),
    "in_reply_to": _hex(32),
    "template_name": _one_of("order_update", "spring_sale"),
    "flow_id": _one_of(*_FLOWS),
    "flow_response_json": _one_of('{"size":"M","colour":"blue"}', '{"rating":5}'),
    "catalog_id": _one_of("740011223344", "740011223355"),
    # webhook
    "endpoint_url": _one_of("https://hooks.example.com/braze/orders"),
    "host": _one_of("hooks.example.com"),
    "url_path": _one_of("/braze/orders"),
    "http_status_code": _one_of(500, 502, 503, 504),
    "content_length": _within(120, 4_000),
    "raw_response": _one_of('{"error":"temporarily unavailable"}', "upstream timed out"),
    "webhook_failure_source": _one_of("endpoint", "network"),
    "webhook_duration": _within(40, 30_000),
    "retry_count": _within(0, 5),
    "is_terminal": _likely(0.2),
}
