"""The cohorts' part of the HTTP door: Mixpanel's custom webhook posts pages of members here.

What Mixpanel does with an answer:

    200  the page is on disk. Mixpanel goes on, and after the last page takes the snapshot as delivered
    400  it is not the webhook's body; says what is wrong. The sync is paused, and whoever set it up gets a mail
    401  no user name and password, or wrong ones. The same
    413  larger than max_body
    503  it can't be taken now (no room, the file is closed, cohorts are off). Tried again for a minute, then at the next sync
"""

import base64
import binascii
import hmac
import math
import time
from typing import Final

import structlog
from msgspec import Struct

from bridged.cohorts import webhook
from bridged.cohorts.membership import Membership
from bridged.cohorts.records import PageRefused
from bridged.errors import BridgedError, MembershipError, Unauthorized
from bridged.redaction import redacted

log = structlog.get_logger()

PATH: Final = "/v1/cohorts/mixpanel"
_LOG_S: Final = 60.0  # a storm of them is a line a minute


class CohortOptions(Struct, frozen=True, kw_only=True):
    """For whom, and which property of a member is its id."""

    username: str = "mixpanel"
    password: str = ""  # empty: anybody
    user_id: str = "distinct_id"


class CohortSource:
    """Takes one body at a time, up to its commit. `membership` None: cohorts are off, or have a `problem`."""

    def __init__(self, options: CohortOptions, membership: Membership | None, problem: str = "") -> None:
        self.pages = 0
        self.failures: dict[int, int] = {}  # by status
        self.last_refusal: PageRefused | None = None  # that Mixpanel takes for an answer
        self._logged_s: dict[int, float] = {}  # by status
        self._membership = membership
        self._problem = problem
        self.use(options)

    def use(self, options: CohortOptions) -> None:
        """Other options, from the next request on."""
        self._credential = f"{options.username}:{options.password}".encode() if options.password else None
        self._reader = webhook.Reader(options.user_id)

    def authorize(self, header: str) -> None:
        """Looks at an Authorization header. Raises Unauthorized, and MembershipError while cohorts are off."""
        if self._credential is not None:
            self._demand_credential(header, self._credential)
        if self._membership is None:
            problem = f"no cohorts are imported for now: {self._problem}"
            raise MembershipError(
                problem if self._problem else "no cohorts are imported here: cohorts.enabled is false"
            )

    def _demand_credential(self, header: str, wanted: bytes) -> None:
        scheme, _, given = header.partition(" ")
        try:
            pair = base64.b64decode(given.strip(), validate=True)
        except (binascii.Error, ValueError):
            pair = b""
        if not hmac.compare_digest(pair, wanted) or scheme.lower() != "basic":
            raise Unauthorized("wrong or missing user name and password", "they are [cohorts] username and password")

    async def take(self, body: bytes) -> bytes:
        """Takes a page up to its commit; gives the answer's body. Raises BadRequest, MembershipError."""
        assert self._membership is not None
        page = self._reader.read(body)
        del body
        written, action = self._membership.receive(page), page.action
        del page
        await written
        self.pages += 1
        return webhook.success(action)

    def refusal(self, error: BridgedError, body: bytes) -> bytes:
        """The answer's body for an error; `body` as far as it came."""
        said = f"{error.args[0]}: {error.hint}" if error.hint else str(error.args[0])
        return self.refused(error.http_status, said, body)

    def refused(self, status: int, said: str, body: bytes) -> bytes:
        """The same for a status and why."""
        self.failures[status] = self.failures.get(status, 0) + 1
        said = redacted(said)
        if status < 500:  # those are of ours, said where they belong, and Mixpanel comes again by itself
            self.last_refusal = PageRefused(at=time.time(), status=status, reason=said)
            now_s = time.monotonic()
            if now_s - self._logged_s.get(status, -math.inf) >= _LOG_S:
                self._logged_s[status] = now_s
                log.warning("cohort_page_refused", status=status, reason=said)
        return webhook.failure(webhook.action_of(body) if body else "", said, status)
