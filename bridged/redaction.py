"""The secrets that this process knows, taken out of whatever it says: logs, errors, tracebacks, answers of the admin side.

A configuration that is loaded makes its secrets known here, once and for the life of the process: an old one that was
replaced is still one. What says something asks `redacted`. It is the last line; the first is not to say them.
"""

import base64
import json
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

MASK: Final = "********"
# A shorter one would take half of the words along, and hides nothing: it can be guessed.
MIN_CHARACTERS: Final = 8

# How names of secrets end. Where a value has such a name, its length doesn't matter.
SECRET_KEYS: Final = ("token", "secret", "password", "authorization", "webhook_url")

_forms: set[str] = set()
_pattern: re.Pattern[str] | None = None


def hide(secrets: Iterable[str]) -> None:
    """From now on `redacted` masks these, as they are and as JSON, Python, URLs and Basic authentication write them."""
    global _pattern  # noqa: PLW0603  # a process has one standard error, and one set of secrets
    for secret in secrets:
        if len(secret) >= MIN_CHARACTERS:
            encoded = secret.encode("utf-8", "surrogateescape")
            forms = {secret, repr(secret)[1:-1], repr(encoded)[2:-1], quote(encoded), quote(encoded, safe="")}
            forms.add(base64.b64encode(encoded).decode().rstrip("="))
            # Twice: a log line is JSON, and what it tells may have quoted JSON, or Python.
            for _ in range(2):
                forms |= {json.dumps(form, ensure_ascii=ascii_)[1:-1] for form in forms for ascii_ in (True, False)}
            _forms.update(forms)
    if _forms:
        # The longest first: one may be the beginning of another.
        _pattern = re.compile("|".join(map(re.escape, sorted(_forms, key=lambda form: (-len(form), form)))))


def redacted(text: str) -> str:
    """The text without secrets."""
    return text if _pattern is None else _pattern.sub(MASK, text)


def redacted_bytes(data: bytes) -> bytes:
    """The same, of UTF-8."""
    if _pattern is None:
        return data
    return redacted(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
