"""The secrets that this process knows, taken out of whatever it says: logs, errors, tracebacks, answers of the admin side.

A configuration that is loaded makes its secrets known here: an old one that was replaced is still one, until many others
have been. What says something asks `redacted`. It is the last line; the first is not to say them.
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

# So many are remembered, those in force and the newest: each makes all that is said a little slower.
MOST: Final = 200

_forms: dict[str, set[str]] = {}  # by secret, the oldest first
_in_force: set[str] = set()
_words = ""  # that aren't masked
_pattern: re.Pattern[str] | None = None


def hide(secrets: Iterable[str], *, in_force: bool = False) -> None:
    """From now on `redacted` masks these, as they are and as JSON, Python, URLs and Basic authentication write them.

    Those `in_force`, until others are, for as long as they are; others until so many newer ones have come.
    """
    secrets = list(secrets)
    if in_force:
        _in_force.clear()
        _in_force.update(secrets)
    is_new = False
    for secret in secrets:
        if known := _forms.pop(secret, None):
            _forms[secret] = known  # it is in use: the newest
        elif len(secret) >= MIN_CHARACTERS:
            is_new = True
            encoded = secret.encode("utf-8", "surrogateescape")
            forms = {secret, repr(secret)[1:-1], repr(encoded)[2:-1], quote(encoded), quote(encoded, safe="")}
            forms.add(base64.b64encode(encoded).decode().rstrip("="))
            # Twice: a log line is JSON, and what it tells may have quoted JSON, or Python.
            for _ in range(2):
                forms |= {json.dumps(form, ensure_ascii=ascii_)[1:-1] for form in forms for ascii_ in (True, False)}
            _forms[secret] = forms
    if is_new:
        for oldest in [secret for secret in _forms if secret not in _in_force][: max(0, len(_forms) - MOST)]:
            del _forms[oldest]
        _compile()


def spare(words: str) -> None:
    """What stands in this text isn't masked: a secret that is a word of ours hides nothing, and would take our words along."""
    global _words  # noqa: PLW0603  # as the pattern
    _words = words
    _compile()


def _compile() -> None:
    global _pattern  # noqa: PLW0603  # a process has one standard error, and one set of secrets
    forms = [form for form in set().union(*_forms.values()) if form not in _words]
    # The longest first: one may be the beginning of another.
    longest = sorted(forms, key=lambda form: (-len(form), form))
    _pattern = re.compile("|".join(map(re.escape, longest))) if longest else None


def redacted(text: str) -> str:
    """The text without secrets."""
    return text if _pattern is None else _pattern.sub(MASK, text)


def redacted_bytes(data: bytes) -> bytes:
    """The same, of UTF-8."""
    if _pattern is None:
        return data
    return redacted(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
