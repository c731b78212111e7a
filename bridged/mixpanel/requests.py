"""What a request to Mixpanel looks like: address, query and credential. Pure.

Facts: Mixpanel's import-events and authentication references. `strict=1` always: without it Mixpanel answers "1" to events that
it then drops.
"""

import base64
from typing import Any, Final, Literal

from msgspec import Struct

Region = Literal["us", "eu", "in"]
HOSTS: Final[dict[Region, str]] = {
    "us": "https://api.mixpanel.com",
    "eu": "https://api-eu.mixpanel.com",
    "in": "https://api-in.mixpanel.com",
}
API_SECRET_RETIRED: Final = "2027-03-03"  # noqa: S105  # a date


class Credentials(Struct, frozen=True, kw_only=True):
    """Who we are at Mixpanel. The first that is set counts: service account, API secret, project token."""

    token: str = ""
    api_secret: str = ""
    service_account: str = ""
    service_secret: str = ""
    project_id: str = ""

    @property
    def given(self) -> bool:
        """Whether there is one at all."""
        return bool(self.service_account or self.api_secret or self.token)

    @property
    def kind(self) -> Literal["service account", "API secret", "project token"]:
        """Which credential is used."""
        if self.service_account:
            return "service account"
        return "API secret" if self.api_secret else "project token"

    def authorization(self) -> str:
        """The Authorization header."""
        user = (
            f"{self.service_account}:{self.service_secret}"
            if self.service_account
            else f"{self.api_secret or self.token}:"
        )
        return "Basic " + base64.b64encode(user.encode()).decode()

    def __repr__(self) -> str:
        return f"<Credentials {self.kind}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For `rich`, which would list the fields otherwise."""
        return [("kind", self.kind)]


class Target(Struct, frozen=True, kw_only=True):
    """Where requests go, and as whom."""

    url: str = ""
    region: Region = "us"
    credentials: Credentials

    @property
    def import_url(self) -> str:
        """The address of /import. project_id belongs to service accounts only: other credentials name the project."""
        base = self.url.rstrip("/") or HOSTS[self.region]
        project = f"&project_id={self.credentials.project_id}" if self.credentials.service_account else ""
        return f"{base}/import?strict=1{project}"

    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {
            "Authorization": self.credentials.authorization(),
            "Content-Type": "application/x-ndjson",
            "Content-Encoding": "gzip",
            "Accept": "application/json",
        }
