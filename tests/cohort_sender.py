"""Mixpanel's side of a cohort sync, for tests: pages in its shape, and a sender that tries again as it does."""

import asyncio
import base64
import uuid
from typing import Any

import aiohttp

PATH = "/v1/cohorts/mixpanel"
USERNAME, PASSWORD = "mixpanel", "example-password"
ATTRIBUTE = "mixpanel_cohorts"


def member(user: str) -> dict[str, Any]:
    """As the documented body has it."""
    return {"email": f"{user}@example.com", "mixpanel_distinct_id": user, "first_name": "Ada", "last_name": "Example"}


def session(
    action: str, members: list[str], cohort: str = "777", *, name: str = "", size: int = 1000, id_: str = ""
) -> list[dict[str, Any]]:
    """The pages of one session, of `size` members each."""
    parts = [members[at : at + size] for at in range(0, len(members), size)] or [[]]
    id_ = id_ or str(uuid.uuid4())
    return [
        {
            "action": action,
            "parameters": {
                "mixpanel_project_id": "117",
                "mixpanel_cohort_id": cohort,
                "mixpanel_cohort_name": name or f"Cohort {cohort}",
                "mixpanel_cohort_description": "description",
                "mixpanel_session_id": id_,
                "page_info": {"total_pages": len(parts), "page_count": number},
                "members": [member(user) for user in part],
            },
        }
        for number, part in enumerate(parts, start=1)
    ]


class Sender:
    """Posts pages to a webhook."""

    def __init__(self, client: aiohttp.ClientSession, url: str, password: str = PASSWORD) -> None:
        self.client = client
        self.url = url
        basic = base64.b64encode(f"{USERNAME}:{password}".encode()).decode()
        self.headers = {"Authorization": f"Basic {basic}", "Content-Type": "application/json"}

    async def post(self, page: Any) -> tuple[int, dict[str, Any]]:
        """One page: the status and what is said."""
        sent: Any = {"data": page} if isinstance(page, bytes) else {"json": page}
        async with self.client.post(self.url + PATH, headers=self.headers, **sent) as answer:
            return answer.status, await answer.json()

    async def take(self, pages: list[dict[str, Any]]) -> None:
        """Pages that must all be taken."""
        for page in pages:
            assert await self.post(page) == (200, {"action": page["action"], "status": "success"})

    async def insist(self, pages: list[dict[str, Any]], seconds: float = 60) -> None:
        """A sync as Mixpanel does it: whatever fails, it comes again from the top until all of it was taken."""
        async with asyncio.timeout(seconds):
            while True:
                try:
                    for page in pages:
                        async with asyncio.timeout(20):
                            status, said = await self.post(page)
                        assert status in {200, 503}, said
                        if status == 503:
                            break
                    else:
                        return
                except (aiohttp.ClientError, TimeoutError, OSError):
                    pass
                await asyncio.sleep(0.05)
