"""The settings that the page may change, and the test of a connection before it is saved.

    GET    /api/settings                every key that may be changed: configured, saved, in force
    PUT    /api/settings                {"set": {"mixpanel.region": "eu"}, "remove": ["mixpanel.naming"], "revision": 12}
    DELETE /api/settings/KEY            back to what the configuration says
    GET    /api/settings/export         what was saved, as TOML; secrets are left out
    GET    /api/connection              what to give to Braze, and how long events are kept if Mixpanel takes nothing
    POST   /api/test-connection         {"mixpanel": {...}}: does Mixpanel take this, if it were saved?

A secret goes in and never comes out. It is also never sent to another address than the one that it was given for: a new
mixpanel.url, or alerts.webhook_url, wants the secrets once more.
"""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from msgspec import Struct

from bridged import options
from bridged.admin.answers import body, json
from bridged.admin.status import credential_from
from bridged.config import Key, value_at, with_credentials
from bridged.delivery.probe import Finding, probe
from bridged.errors import BadRequest, ConfigError
from bridged.mixpanel.requests import API_SECRET_RETIRED, Target
from bridged.saved import EDITABLE, BadSettings, SaveUnderWay, applied, is_secret, shown, toml
from bridged.settings import Config, Seconds, Size

if TYPE_CHECKING:
    from bridged.app import App

Kind = Literal["text", "secret", "choice", "number", "size", "time", "boolean", "list", "table"]

# Which secrets go to an address, by the key of the address.
_SENT_TO: Final = {
    "mixpanel.url": ("mixpanel.service_secret", "mixpanel.api_secret", "mixpanel.token"),
    "alerts.webhook_url": ("alerts.webhook_token",),
}
_CANDIDATES: Final = tuple(name.removeprefix("mixpanel.") for name in EDITABLE if name.startswith("mixpanel."))


class Setting(Struct, kw_only=True, omit_defaults=True):
    """A key that may be changed. Of a secret only whether it is set; size and time as text, such as "10GiB" and "48h"."""

    key: str
    kind: Kind
    description: str
    choices: list[str] = []
    default: Any = msgspec.UNSET
    configured: Any = msgspec.UNSET  # by the file, the environment, or a file of a secret
    saved: Any = msgspec.UNSET  # on the page: goes before it
    value: Any = msgspec.UNSET  # in force
    overridden: bool = msgspec.field(default_factory=bool)
    set: bool = msgspec.field(default_factory=bool)  # whether there is anything
    configured_set: bool = msgspec.field(default_factory=bool)


class Settings(Struct, kw_only=True):
    """What GET /api/settings answers."""

    revision: int
    saved_in: str
    problem: str  # why something that was saved isn't in force; empty: all of it is
    restart_needed: list[str]
    keys: list[Setting]


class Change(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a change. With `revision` it is refused if somebody else has changed something since."""

    set: dict[str, Any] = {}
    remove: list[str] = []
    revision: int | None = None


class Changed(Struct):
    """What a change came to."""

    revision: int
    changed: list[str]
    unused: list[str]  # of these: keys of the export, which is off
    restart_needed: list[str]


class Connection(Struct, kw_only=True):
    """Both ends of the bridge, in a few facts."""

    export: bool  # false: no events are taken, nor sent
    credential: Literal["service account", "API secret", "project token", "none"]
    credential_from: Literal["configuration", "page", "api"]
    import_host: str
    region: str
    http_listen: str  # empty: the door is closed
    path: str
    https: bool
    bearer_token_set: bool
    bearer_token_needed: bool  # the door can be reached from other machines
    expires_after_s: float | None  # None: never
    on_expiry: str
    api_secret_retired: str  # the day
    warnings: list[str]


class Candidate(Struct, forbid_unknown_fields=True):
    """The body of a test: members of [mixpanel] that differ from what is in force."""

    mixpanel: dict[str, Any] = {}


class SettingsApi:
    """The endpoints. One test of a connection at a time."""

    def __init__(self, app: "App") -> None:
        self._app = app
        self._testing = False

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Declares every endpoint."""
        router.add_get("/api/settings", self._settings)
        router.add_put("/api/settings", self._change)
        router.add_get("/api/settings/export", self._export)
        router.add_delete("/api/settings/{key}", self._remove)
        router.add_get("/api/connection", self._connection)
        router.add_post("/api/test-connection", self._test)

    # -- settings -----------------------------------------------------------------------------------------------------

    async def _settings(self, request: web.Request) -> web.Response:
        app = self._app
        return json(
            Settings(
                revision=app.saved.revision,
                saved_in=str(app.saved.path),
                problem=app.saved.problem,
                restart_needed=app.restart_needed,
                keys=[_setting(name, key, app) for name, key in EDITABLE.items()],
            )
        )

    async def _change(self, request: web.Request) -> web.Response:
        change = await body(request, Change)
        if not (change.set or change.remove):
            raise BadRequest("which settings?", '{"set": {"mixpanel.region": "eu"}} or {"remove": ["mixpanel.region"]}')
        return await saved(self._app, change)

    async def _remove(self, request: web.Request) -> web.Response:
        name = request.match_info["key"]
        if name not in EDITABLE:
            raise web.HTTPNotFound(text=f"there is no key {name[:80]!r} that can be changed here")
        return await saved(self._app, Change(remove=[name]))

    async def _export(self, request: web.Request) -> web.Response:
        text = toml(self._app.saved.values, placeholders=True)
        headers = {"Content-Disposition": 'attachment; filename="bridged.toml"'}
        head = "# Saved on bridged's page. In config.toml, these keys would say the same.\n"
        return web.Response(text=head + text, content_type="text/plain", headers=headers)

    # -- the connection -----------------------------------------------------------------------------------------------

    async def _connection(self, request: web.Request) -> web.Response:
        app, config = self._app, self._app.config
        target, http = options.target(config), config.sources.http
        retention = config.retention
        return json(
            Connection(
                export=config.mixpanel.export,
                credential=target.credentials.kind if target.credentials.given else "none",
                credential_from=credential_from(app),
                import_host=urlsplit(target.import_url).netloc,
                region=config.mixpanel.region,
                http_listen=http.listen,
                path="/v1/currents",
                https=bool(http.tls_cert),
                bearer_token_set=bool(http.bearer_token),
                bearer_token_needed=bool(http.listen) and not http.listen.startswith(("127.", "localhost:", "[::1]:")),
                expires_after_s=None if retention.on_expiry == "keep" else float(retention.max_age),
                on_expiry=retention.on_expiry,
                api_secret_retired=API_SECRET_RETIRED,
                warnings=list(_connection_warnings(config)),
            )
        )

    async def _test(self, request: web.Request) -> web.Response:
        candidate = (await body(request, Candidate)).mixpanel
        if self._testing:
            raise SaveUnderWay("another test of a connection is under way", "wait for its end")
        target = self._candidate(candidate)
        self._testing = True
        try:
            found: Finding = await probe(target, float(self._app.config.delivery.timeout))
        finally:
            self._testing = False
        return json(found)

    def _candidate(self, given: Mapping[str, Any]) -> Target:
        """What would be asked, if it were saved. Raises BadSettings."""
        unknown = [name for name in given if name not in _CANDIDATES]
        if unknown:
            raise BadSettings(
                f"[mixpanel] has no key {unknown[0][:80]!r} that can be tested",
                {f"mixpanel.{name}"[:200]: "there is no such key" for name in unknown},
            )
        changes = {f"mixpanel.{name}": value for name, value in given.items()}
        values, wrong = self._app.saved.checked(changes)
        if wrong:
            raise BadSettings(
                "; ".join(f"{name}: {problem}" for name, problem in wrong.items()), wrong, "nothing was asked"
            )
        config = self._app.config
        try:
            wanted = applied(config, values)
        except ConfigError as error:
            said = str(error.args[0])
            raise BadSettings(said, _by_key(said), "nothing was asked") from error
        _demand_secrets_for_new_addresses(self._app, wanted, values, {**self._app.saved.values, **values})
        return options.target(wanted)


async def saved(app: "App", change: Change) -> web.Response:
    """Saves a change, and answers. Raises BadSettings, SaveUnderWay, SpoolError."""
    if change.revision is not None and change.revision != app.saved.revision:
        raise SaveUnderWay(
            "the settings were changed meanwhile, in another window or file", "look at them, and try again"
        )
    values = app.saved.with_changes(change.set, change.remove)
    try:
        config = applied(app.base, values)
        in_use = with_credentials(config, app.given_beside(config))
    except ConfigError as error:
        said = str(error.args[0])
        raise BadSettings(said, _by_key(said)) from error
    _demand_secrets_for_new_addresses(app, in_use, change.set, values)
    try:
        changed = await app.save(change.set, change.remove)
    except ConfigError as error:
        said = str(error.args[0])
        raise BadSettings(said, _by_key(said)) from error
    unused = [name for name in changed if not (app.config.mixpanel.export or name.startswith("alerts."))]
    return json(Changed(app.saved.revision, changed, unused, app.restart_needed))


def _demand_secrets_for_new_addresses(app: "App", new: Config, given: Mapping[str, Any], kept: Container[str]) -> None:
    """Raises BadSettings where a secret that is known already would go to an address that it wasn't given for.

    `given` are the keys of this change, `kept` those that the page has saved or gives: to an address that isn't the
    configuration's nothing of the configuration's goes, however many steps lead there. What the API gave stays where it is.
    """
    wrong = {}
    for name, secrets in _SENT_TO.items():
        path = EDITABLE[name].path
        address = _origin(value_at(new, path))
        # Without an address it is Mixpanel's own, and no other.
        if not address or address == _origin(value_at(app.base, path)):
            continue
        is_new = address != _origin(value_at(app.config, path))
        for secret in secrets:
            value = value_at(new, EDITABLE[secret].path)
            by_api = app.given.get(secret.removeprefix("mixpanel.")) == value
            is_given = given.get(secret) == value if by_api else secret in given
            if value and ((is_new and not is_given) or not (by_api or secret in kept)):
                wrong[secret] = (
                    f"give it once more: {name} leads elsewhere, and a secret is sent only where it was given for"
                )
    if wrong:
        raise BadSettings("; ".join(f"{name}: {problem}" for name, problem in wrong.items()), wrong)


def _origin(url: str) -> str:
    if not url:
        return ""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}".lower()


def _by_key(said: str) -> dict[str, str]:
    """What contradicts itself, by the first key that the words name."""
    found: dict[str, str] = {}
    for line in said.split("\n  "):
        at, name = min(((line.find(name), name) for name in EDITABLE if name in line), default=(0, ""))
        if name:
            found[name] = f"{found[name]}; {line[at:]}" if name in found else line[at:]
    return found


def _setting(name: str, key: Key, app: "App") -> Setting:
    in_force, configured = value_at(app.config, key.path), value_at(app.base, key.path)
    setting = Setting(
        key=name,
        kind=_kind(key),
        description=key.description,
        choices=list(get_args(key.type)) if get_origin(key.type) is Literal else [],
        overridden=name in app.saved.values,
        set=bool(in_force),
        configured_set=bool(configured),
    )
    if not is_secret(key):
        setting.default = shown(key, key.default)
        setting.configured = shown(key, configured)
        setting.value = shown(key, in_force)
        if setting.overridden:
            setting.saved = shown(key, app.saved.values[name])
    return setting


def _kind(key: Key) -> Kind:
    if is_secret(key):
        return "secret"
    if get_origin(key.type) is Literal:
        return "choice"
    kinds: dict[Any, Kind] = {
        str: "text",
        bool: "boolean",
        int: "number",
        float: "number",
        Size: "size",
        Seconds: "time",
    }
    return kinds.get(key.type) or ("table" if get_origin(key.type) is dict else "list")


def _connection_warnings(config: Config) -> list[str]:
    """What somebody should do about this configuration."""
    http, mixpanel = config.sources.http, config.mixpanel
    found: list[str] = []
    if not mixpanel.export:
        return found
    if mixpanel.api_secret and not mixpanel.service_account:
        found.append(f"Mixpanel retires API secrets on {API_SECRET_RETIRED}: create a service account.")
    if mixpanel.service_account and not mixpanel.token:
        found.append("The project token is empty: events carry no `token` property, as those of Braze's connector do.")
    if http.listen and not http.bearer_token:
        found.append(
            "The HTTP door takes events from everybody who reaches it: set a bearer token, and give it to Braze."
        )
    return found
