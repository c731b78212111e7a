"""Who may ask the admin listener: its names, the token, the login of the page, and what a browser may be made to send.

What a request has to pass, in this order:

1. Its Host is one of ours: localhost, any IP address, the host of [admin] listen, or one of [admin] hosts; else 421. A page whose
   own name is made to point at this machine (DNS rebinding) comes under that name, and cannot come under an address.
2. With [admin] token set, it comes with it, as `Authorization: Bearer ...`, or with the cookie of a login; else 401. /healthz
   needs neither name nor token; the page's own files, which hold nothing, and the login need no token.
3. What changes something (anything but GET and HEAD) is JSON, declared as such, and if a browser sent it, it comes from
   our own origin: Sec-Fetch-Site and Origin say so, or it is answered 403. A form can't send JSON, and a script elsewhere
   would have to ask first (a CORS preflight), which nobody answers. The stream of /api/live, of which there are only so many,
   comes from our own origin, too.
4. What changes something and comes with a cookie, or from any browser while there is no token, brings the CSRF token of
   /api/session in a header: another origin can neither read nor send it. A page at another port of this machine is "the same
   site" to a cookie. Programs that send the bearer token, or, without one, neither Origin nor Sec-Fetch-Site, need none.

Guesses at the login are slowed down per address. Those at the bearer token are not: whoever guesses must not be able to
lock Prometheus out; the token's length is what protects it.
"""

import hmac
import ipaddress
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from msgspec import Struct

from bridged import __version__
from bridged.addresses import split_address
from bridged.admin.answers import body, json
from bridged.admin.sessions import LIFE_S, Guesses, Session, Sessions

if TYPE_CHECKING:
    from bridged.app import App

log = structlog.get_logger()

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CSRF_HEADER: Final = "X-CSRF-Token"
_SAFE_METHODS: Final = ("GET", "HEAD")
_OPEN_PATHS: Final = ("/", "/api/session", "/api/login")
_OPEN_PREFIX: Final = "/page/"
_LIVE_PATH: Final = "/api/live"
_PORTS: Final = {"http": 80, "https": 443}
_SESSION: Final = web.RequestKey("session", Session)
_BEARER: Final = web.RequestKey("bearer", bool)


class Standing(Struct):
    """What the page has to know before anything else."""

    login_needed: bool
    logged_in: bool
    csrf: str  # empty: log in first
    expires_at: float | None  # wall clock seconds
    version: str = __version__


class Login(Struct, forbid_unknown_fields=True):
    """The body of a login."""

    token: str


class Access:
    """The three gates in front of every request, and the login. Owns the sessions."""

    def __init__(self, app: "App") -> None:
        admin = app.config.admin
        self.port = 0  # known once it listens
        self._credential = admin.token.encode() or None
        self._csrf = secrets.token_urlsafe(32)  # while there is no token, and so no session
        self._sessions = Sessions()
        self._guesses = Guesses()
        self._hosts = {"localhost", *(host.lower().removesuffix(".") for host in admin.hosts)}
        if admin.listen:
            self._hosts.add(split_address(admin.listen)[0].lower())

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Declares every endpoint."""
        router.add_get("/api/session", self._session)
        router.add_post("/api/login", self._login)
        router.add_post("/api/logout", self._logout)

    def lasts(self, request: web.Request) -> bool:
        """Whether whoever asked once may go on listening to a long answer."""
        session = request.get(_SESSION)
        return session is None or session.lasts(time.monotonic())

    def is_stranger(self, request: web.Request) -> bool:
        """Whether somebody has come through the gates only because what is asked for is open to everybody."""
        return self._credential is not None and not request.get(_BEARER) and _SESSION not in request

    # -- the gates ----------------------------------------------------------------------------------------------------

    @web.middleware
    async def host(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """The first."""
        if request.path != "/healthz":
            for given in request.headers.getall("Host", []):
                host = _host_of(f"//{given}")
                if host not in self._hosts and not _is_address(host):
                    raise web.HTTPMisdirectedRequest(
                        text=f"this is not {host[:80]!r}: ask for it by its address, or add the name to [admin] hosts"
                    )
        return await handler(request)

    @web.middleware
    async def authentication(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """The second. A wrong bearer token is refused even beside a good cookie."""
        if self._credential is not None and request.path != "/healthz":
            given = request.headers.get("Authorization", "")
            # Another scheme is that of a proxy in front, to which the browser shows a password with each request.
            to_us = given.lower().startswith("bearer")
            if self._is_bearer(given):
                request[_BEARER] = True
            elif not to_us and (session := self._sessions.find(self._cookie(request), time.monotonic())):
                request[_SESSION] = session
            elif not (request.path in _OPEN_PATHS or request.path.startswith(_OPEN_PREFIX)):
                raise web.HTTPUnauthorized(
                    text="wrong or missing token: send [admin] token as `Authorization: Bearer ...`, or log in on the page",
                    headers={"WWW-Authenticate": 'Bearer realm="bridged"'},
                )
        return await handler(request)

    @web.middleware
    async def origin(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """The third and the fourth."""
        changes = request.method not in _SAFE_METHODS
        if changes or request.path == _LIVE_PATH:
            site = request.headers.get("Sec-Fetch-Site", "same-origin")
            origin = request.headers.get("Origin", f"://{request.host}")[:200]
            if site not in ("same-origin", "none") or not _is_of(origin, request.host):
                told = {"error": "a page of another origin may not change anything here", "hint": ""}
                if site in ("same-origin", "none"):
                    told["hint"] = (
                        f"if it is {origin}'s own: the proxy has to pass the Host on, which is {request.host} here"
                    )
                return json(told, 403)
        if changes and request.match_info.http_exception is None:  # else there is nothing to change: 404 or 405
            if request.content_type != "application/json":
                raise web.HTTPUnsupportedMediaType(text="the body must be JSON, with Content-Type: application/json")
            if request.path != "/api/login" and not self._is_meant(request):
                answer = {
                    "error": f"the header {CSRF_HEADER} is missing or outdated",
                    "hint": "it is the csrf of GET /api/session",
                    "csrf": True,
                }
                return json(answer, 403)
        return await handler(request)

    def _is_meant(self, request: web.Request) -> bool:
        """Whether it was our own page that a browser sent this for, or no browser at all."""
        if request.get(_BEARER):
            return True
        session = request.get(_SESSION)
        if session is None and not {"Origin", "Sec-Fetch-Site"} & set(request.headers):
            return True
        given = request.headers.get(CSRF_HEADER, "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, (session.csrf if session else self._csrf).encode())

    def _is_bearer(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        return self._is_token(given.strip()) and scheme.lower() == "bearer"

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._credential or b"")

    # -- the login ----------------------------------------------------------------------------------------------------

    @property
    def _cookie_name(self) -> str:
        """Cookies don't know ports: two daemons on one machine must not take each other's."""
        return f"bridged_session_{self.port}"

    def _cookie(self, request: web.Request) -> str:
        return request.cookies.get(self._cookie_name, "")

    def _standing(self, session: Session | None) -> Standing:
        if self._credential is None:
            return Standing(login_needed=False, logged_in=False, csrf=self._csrf, expires_at=None)
        if session is None:
            return Standing(login_needed=True, logged_in=False, csrf="", expires_at=None)
        expires_at = math.floor(time.time() + session.expires_at - time.monotonic())
        return Standing(login_needed=True, logged_in=True, csrf=session.csrf, expires_at=expires_at)

    async def _session(self, request: web.Request) -> web.Response:
        return json(self._standing(request.get(_SESSION)))

    async def _login(self, request: web.Request) -> web.Response:
        given = await body(request, Login)
        if self._credential is None:
            return json(self._standing(None))
        address, now = request.remote or "", time.monotonic()
        if wait_s := self._guesses.wait_s(address, now):
            answer = json({"error": "too many wrong tokens came from there", "hint": f"wait for {wait_s:.0f} s"}, 429)
            answer.headers["Retry-After"] = str(math.ceil(wait_s))
            return answer
        if not self._is_token(given.token.strip()):
            self._guesses.wrong(address, now)
            log.warning("login_refused", address=address)
            return json({"error": "this is not the token", "hint": "it is [admin] token of the configuration"}, 401)
        self._sessions.end(self._cookie(request))
        key, session = self._sessions.begin(now)
        answer = json(self._standing(session))
        answer.set_cookie(
            self._cookie_name,
            key,
            max_age=int(LIFE_S),
            httponly=True,
            samesite="Strict",
            # The browser's own word, if a proxy in between has ended the TLS.
            secure=request.secure or request.headers.get("Origin", "").startswith("https://"),
        )
        return answer

    async def _logout(self, request: web.Request) -> web.Response:
        self._sessions.end(self._cookie(request))
        answer = json(self._standing(None))
        answer.del_cookie(self._cookie_name, httponly=True, samesite="Strict")
        return answer


def _host_of(url: str) -> str:
    """The host of a URL without its port; what is no URL is its own host, and nobody's."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return url


def _is_of(origin: str, host: str) -> bool:
    """Whether an Origin is that of a Host. Of its scheme nothing is asked: a proxy in between may have ended the TLS."""
    scheme, _, theirs = origin.lower().partition("://")
    # A browser doesn't say the port that a scheme has anyway, and a proxy may.
    return host.lower() in (theirs, f"{theirs}:{_PORTS.get(scheme)}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
