"""The page's own files, as they lie in bridged/page: read when the daemon starts, nothing made, nothing listed.

They hold no data: whoever may not ask the API sees an empty page with a login.
"""

import hashlib
from pathlib import Path
from typing import Final, NamedTuple

from aiohttp import web

from bridged.admin.answers import Verbatim

FOLDER: Final = Path(__file__).parent.parent / "page"
INDEX: Final = "index.html"
# Everything from here, nothing inline; nobody may frame it, and no form goes elsewhere.
POLICY: Final = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".map": "application/json",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


class _File(NamedTuple):
    body: bytes
    content_type: str
    etag: str


class Page:
    """The files, by their path below the folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files: dict[str, _File] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in _TYPES:
                body = path.read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
                self._files[path.relative_to(folder).as_posix()] = _File(body, _TYPES[path.suffix], etag)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Declares both addresses."""
        router.add_get("/", self._index)
        router.add_get("/page/{file:.+}", self._file)

    async def _index(self, request: web.Request) -> web.Response:
        return self._answer(request, INDEX)

    async def _file(self, request: web.Request) -> web.Response:
        return self._answer(request, request.match_info["file"])

    def _answer(self, request: web.Request, name: str) -> web.Response:
        file = self._files.get(name)
        if file is None:
            raise web.HTTPNotFound(text="there is no such file")
        headers = {
            "ETag": file.etag,
            "Cache-Control": "no-cache",  # kept, and asked for again each time: an upgrade is seen at once
            "Content-Security-Policy": POLICY,
        }
        if file.etag in request.headers.get("If-None-Match", ""):
            return Verbatim(status=304, headers=headers)
        return Verbatim(body=file.body, headers=headers | {"Content-Type": file.content_type})
