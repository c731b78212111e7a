"""What [cohorts] may say: which property and which attribute, and which file, since others are taken.

A slip there would be silent, or worse: with a property that no member has the next full copy empties every cohort.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bridged.settings import Config

# Of an object of /users/track: who is written, and how; and fields of the profile that are Braze's own, and no arrays.
# The letters' case counts: Email is a custom attribute.
_CONTROL: Final = (
    *("external_id", "braze_id", "user_alias"),
    *("_update_existing_only", "_merge_objects", "push_token_import"),
)
_PROFILE: Final = (
    *("bio", "country", "current_location", "date_of_first_session", "date_of_last_session", "dob", "email"),
    *("email_click_tracking_disabled", "email_open_tracking_disabled", "email_subscribe", "facebook", "first_name"),
    *("gender", "home_city", "image_url", "language", "last_name", "marked_email_as_spam_at", "phone"),
    *("push_subscribe", "push_tokens", "subscription_groups", "time_zone", "twitter"),
)
# What lies beside a file of SQLite's, and what else lies beside the spool's.
_BESIDE: Final = ("", "-wal", "-shm", ".lock")
_BESIDE_SPOOL: Final = (*_BESIDE, ".reserve", ".settings.toml", ".settings.toml.part")


def problems(config: Config) -> Iterator[str]:
    """What is wrong, each with its key."""
    cohorts = config.cohorts
    if not cohorts.user_id.strip() or re.search(r'["\\\x00-\x1f\ud800-\udfff]', cohorts.user_id):
        yield "cohorts.user_id: expected distinct_id or the name of a property, without quotes and backslashes"
    elif cohorts.user_id != cohorts.user_id.strip():
        yield "cohorts.user_id: it has blanks around it, and no property of Mixpanel's is meant by that"
    if not re.fullmatch(r"[^\s$.][^$.]{0,254}", cohorts.attribute):
        yield "cohorts.attribute: expected the name of an attribute, without $ and dots"
    elif cohorts.attribute != cohorts.attribute.strip():
        yield "cohorts.attribute: it has blanks around it"
    elif cohorts.attribute in _CONTROL:
        yield f"cohorts.attribute: {cohorts.attribute} is who is written, or how, to Braze: choose another name"
    elif cohorts.attribute in _PROFILE:
        yield f"cohorts.attribute: {cohorts.attribute} is a field of Braze's own profile: choose another name"
    if cohorts.max_bytes < 16 * 2**20:
        yield "cohorts.max_bytes: at least 16MiB"
    if not any("\0" in path for path in (cohorts.path, config.spool.path, config.retention.archive_path)):
        yield from _path_problems(config)


def _path_problems(config: Config) -> Iterator[str]:
    ours, spool, archive = map(
        os.path.realpath, (config.cohorts.path, config.spool.path, config.retention.archive_path)
    )
    # The saved settings lie beside the name, not beside what it links to.
    place = Path(config.spool.path)
    named = str(Path(os.path.realpath(place.parent), place.name))
    theirs = {f"{path}{suffix}" for path in (spool, named) for suffix in _BESIDE_SPOOL}
    if ours in (spool, named):
        yield "cohorts.path and spool.path are the same file: give each its own"
    elif ours in theirs:
        yield f"cohorts.path: {ours} is one of the files that lie beside the spool: choose another name"
    elif ours == archive:
        yield f"cohorts.path: {ours} is the folder of the archive, retention.archive_path: choose another name"
    elif taken := {f"{ours}{suffix}" for suffix in _BESIDE} & {*theirs, archive}:
        yield f"cohorts.path: {min(taken)} would be its file, and is the spool's or the archive's: choose another name"
