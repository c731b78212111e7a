"""Every section and key of the configuration: msgspec Structs whose annotations are its documentation.

`config.toml` at the top of the project is made from them; `config` finds and reads what somebody wrote.
"""

import re
from decimal import Decimal
from typing import Annotated, Literal

from msgspec import Meta, Struct

_SIZE_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Size(int):
    """A number of bytes, written `"10GiB"`, `"2GB"` or as a plain integer."""

    @classmethod
    def parse(cls, value: object) -> "Size":
        """Raises ValueError for anything but a non-negative integer or a number with a unit."""
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
            return cls(value)
        match = (
            re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kKMGT]?i?B?)", value.strip()) if isinstance(value, str) else None
        )
        unit = match[2].replace("K", "k").replace("kiB", "KiB") if match else None
        if match is None or unit not in _SIZE_UNITS:
            raise ValueError(f'expected a size such as "512MiB", "2GB" or 1000000, got {value!r}')
        number = float(match[1]) if "." in match[1] else int(match[1])
        return cls(round(number * _SIZE_UNITS[unit]))

    def __str__(self) -> str:
        for unit, factor in sorted(_SIZE_UNITS.items(), key=lambda item: -item[1]):
            if unit not in ("", "B") and self and int(self) % factor == 0:
                return f"{int(self) // factor}{unit}"
        return f"{int(self)}B"


class Seconds(float):
    """A length of time in seconds, written `"1s"`, `"250ms"`, `"48h"` or as a plain number of seconds."""

    @classmethod
    def parse(cls, value: object) -> "Seconds":
        """Raises ValueError for anything but a non-negative number or a number with a unit."""
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 10**18:
            return cls(value)
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(ms|s|m|h|d)", value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f'expected a time such as "250ms", "1s" or "48h", got {value!r}')
        return cls(float(match[1]) * _TIME_UNITS[match[2]])

    def __str__(self) -> str:
        # 48h stays 48h: people think of a retention in hours.
        for unit in ("h", "m", "s"):
            if self and float(self) % _TIME_UNITS[unit] == 0:
                return f"{int(self / _TIME_UNITS[unit])}{unit}"
        if round(self * 1000) / 1000 == self:
            return f"{round(self * 1000)}ms"
        return f"{Decimal(repr(float(self))):f}s"  # without an exponent


class Section(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A table of config.toml."""


class HttpSource(Section, frozen=True, kw_only=True):
    """Braze's Custom HTTP connector posts here: POST /v1/currents."""

    listen: Annotated[str, Meta(description='host:port of the HTTP door; "" closes it.')] = "127.0.0.1:8480"
    bearer_token: Annotated[
        str,
        Meta(description="Braze sends it as `Authorization: Bearer ...`. Required when listen is not loopback."),
    ] = ""
    bearer_token_file: Annotated[str, Meta(description="A file that holds bearer_token.")] = ""
    max_body: Annotated[Size, Meta(description="Larger bodies (after gunzip) are answered 413; Braze splits them.")] = (
        Size(16 * 2**20)
    )
    max_connections: Annotated[
        int, Meta(ge=1, description="More are answered 503, unless one that asked for nothing yet can make room.")
    ] = 8000
    max_connections_per_client: Annotated[
        int,
        Meta(ge=0, description="The same of one address (IPv6: of one /64), unless it is this machine's. 0: no limit."),
    ] = 500
    max_in_flight: Annotated[
        Size,
        Meta(
            description="Bytes of all bodies not yet handed on. Beyond it the one that has come for longest is answered 503."
        ),
    ] = Size(24 * 2**20)
    tls_cert: Annotated[
        str, Meta(description="PEM file: the certificate and its chain: HTTPS. Read again at SIGHUP.")
    ] = ""
    tls_key: Annotated[str, Meta(description="PEM file: the private key of tls_cert, unencrypted.")] = ""


class StreamSource(Section, frozen=True, kw_only=True):
    """NDJSON, one Currents event a line, over TCP and Unix sockets."""

    listen: Annotated[
        tuple[str, ...],
        Meta(description='"tcp:host:port" and "unix:path", any number; [] closes the door.'),
    ] = ("tcp:127.0.0.1:8482", "unix:bridged.sock")
    max_line: Annotated[Size, Meta(description="A longer line becomes one dead letter (its first 4 KiB are kept).")] = (
        Size(2**20)
    )
    allow_remote: Annotated[
        bool,
        Meta(description="Permits tcp: addresses beyond loopback. The stream has no authentication of its own."),
    ] = False
    max_connections: Annotated[
        int, Meta(ge=1, description="More are closed at once, unless one that never sent a line can make room.")
    ] = 8000
    max_connections_per_client: Annotated[
        int,
        Meta(ge=0, description="The same of one address (IPv6: of one /64), unless it is this machine's. 0: no limit."),
    ] = 500
    max_unfinished: Annotated[
        Size,
        Meta(
            description="Bytes of all lines without their end, or waiting for room. Beyond it the oldest are cut off."
        ),
    ] = Size(8 * 2**20)
    tls_cert: Annotated[
        str, Meta(description="PEM file: the certificate and its chain, for the tcp: addresses. Read again at SIGHUP.")
    ] = ""
    tls_key: Annotated[str, Meta(description="PEM file: the private key of tls_cert, unencrypted.")] = ""


class Sources(Section, frozen=True, kw_only=True):
    """The doors."""

    http: HttpSource = HttpSource()
    stream: StreamSource = StreamSource()


class Mixpanel(Section, frozen=True, kw_only=True):
    """Where events go, and as whom."""

    export: Annotated[
        bool,
        Meta(description="false: no event is taken or sent, and no credential needed. Cohorts are another matter."),
    ] = True
    url: Annotated[
        str,
        Meta(
            description="Overrides the region's host (an emulator, a proxy). A private authority of its: SSL_CERT_FILE."
        ),
    ] = ""
    region: Annotated[Literal["us", "eu", "in"], Meta(description="us | eu | in: where the project's data lives.")] = (
        "us"
    )
    token: Annotated[
        str, Meta(description="The project token. Put into every event; alone, it is the credential as well.")
    ] = ""
    token_file: Annotated[str, Meta(description="A file that holds token.")] = ""
    api_secret: Annotated[str, Meta(description="The project's API secret. Mixpanel retires it on 2027-03-03.")] = ""
    api_secret_file: Annotated[str, Meta(description="A file that holds api_secret.")] = ""
    service_account: Annotated[
        str, Meta(description="A service account's user name; preferred. Needs service_secret and project_id.")
    ] = ""
    service_secret: Annotated[str, Meta(description="The service account's secret.")] = ""
    service_secret_file: Annotated[str, Meta(description="A file that holds service_secret.")] = ""
    project_id: Annotated[str, Meta(description="The project's numeric id; only with a service account.")] = ""
    naming: Annotated[
        Literal["seed", "current"],
        Meta(description="seed | current: the spelling of event and property names (see README, Events)."),
    ] = "seed"
    partner_id: Annotated[
        str, Meta(description="The `$partner_id` of every event: marks it as Braze's, for Mixpanel's MTU exemption.")
    ] = "braze"


class Events(Section, frozen=True, kw_only=True):
    """Which events are forwarded."""

    message_engagement: Annotated[bool, Meta(description="Forward the message engagement events.")] = True
    customer_behavior: Annotated[bool, Meta(description="Forward the customer behaviour events.")] = True
    include: Annotated[
        tuple[str, ...],
        Meta(
            description="Event types forwarded although their group is off, or bridged doesn't know them (Currents' names)."
        ),
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Meta(description="Event types not forwarded although their group is on (Currents' names).")
    ] = ()
    unknown: Annotated[
        Literal["dead_letter", "forward", "skip"],
        Meta(description="dead_letter | forward | skip: what happens to an event type that is not in the table."),
    ] = "dead_letter"
    anonymous: Annotated[
        Literal["skip", "device", "dead_letter"],
        Meta(
            description=(
                "skip | device | dead_letter: events of users without external_user_id. "
                "device sends `$device:<device_id>`, and skips where there is none."
            )
        ),
    ] = "skip"
    names: Annotated[
        dict[str, str],
        Meta(
            description=(
                'Mixpanel event name by event type, e.g. "users.messages.sms.CarrierSend" = "SMS Carrier". '
                'Of "users.behaviors.CustomEvent" what comes before each event\'s own name, with its blank: "Custom ".'
            )
        ),
    ] = {}
    transform: Annotated[
        dict[str, dict[str, Literal["remove", "hash"]]],
        Meta(
            description=(
                'Fields that Mixpanel doesn\'t get as they are, by event type, e.g. "users.messages.email.Send" = '
                '{ email_address = "hash" }. remove: "[REDACTED]"; hash: SHA-256 in hex. See README, Events.'
            )
        ),
    ] = {}


class SpoolSettings(Section, frozen=True, kw_only=True):
    """What waits, on disk."""

    path: Annotated[str, Meta(description="The SQLite file; relative to the working directory.")] = "spool.db"
    max_bytes: Annotated[Size, Meta(description="Near this size the doors answer 503 and pause reading.")] = Size(
        10 * 2**30
    )
    ring_bytes: Annotated[
        Size, Meta(description="Waiting segments also kept in memory, so that they aren't re-read.")
    ] = Size(32 * 2**20)
    max_dead_letters: Annotated[
        int,
        Meta(ge=0, description="Beyond this many, or a quarter of max_bytes, the oldest are dropped (and counted)."),
    ] = 1_000_000


class DeliverySettings(Section, frozen=True, kw_only=True):
    """What leaves, and how fast."""

    max_events_per_second: Annotated[
        float, Meta(ge=0, description="Mixpanel's ceiling for a project; bridged stays at 97 % of it. 0: no ceiling.")
    ] = 30000
    max_bytes_per_minute: Annotated[
        Size, Meta(description="Mixpanel's ceiling in uncompressed bytes; bridged stays at 97 % of it. 0: no ceiling.")
    ] = Size(2 * 10**9)
    max_concurrency: Annotated[int, Meta(ge=1, le=64, description="Requests in flight at most.")] = 20
    max_batch_events: Annotated[int, Meta(ge=1, le=2000, description="Events in a request at most.")] = 2000
    max_batch_bytes: Annotated[
        Size,
        Meta(
            description="Uncompressed bytes in a request at most. The docs say 10MB, the error text 2 MiB: safe is 2MB."
        ),
    ] = Size(2 * 10**6)
    flush_interval: Annotated[Seconds, Meta(description="A batch that isn't full waits this long for more.")] = Seconds(
        1
    )
    timeout: Annotated[Seconds, Meta(description="A request without an answer for so long is tried again.")] = Seconds(
        60
    )
    probe_interval: Annotated[
        Seconds, Meta(description="While Mixpanel refuses the credential: one small request so often.")
    ] = Seconds(60)
    grace: Annotated[Seconds, Meta(description="At SIGTERM: time for requests in flight; the rest stays on disk.")] = (
        Seconds(10)
    )


class Retention(Section, frozen=True, kw_only=True):
    """What happens to events that can't be delivered because the credential is refused."""

    max_age: Annotated[Seconds, Meta(description="While halted, older events expire.")] = Seconds(48 * 3600)
    on_expiry: Annotated[
        Literal["archive", "drop", "keep"],
        Meta(
            description=(
                "archive | drop | keep: into files that `bridged replay` sends later; for good, as the "
                "hosted connector does; never."
            )
        ),
    ] = "archive"
    archive_path: Annotated[str, Meta(description="The folder of the archive files.")] = "archive"


class Cohorts(Section, frozen=True, kw_only=True):
    """The way back: Mixpanel's custom webhook posts cohorts to /v1/cohorts/mixpanel of [sources.http], for [braze]."""

    enabled: Annotated[bool, Meta(description="Takes cohorts, and writes them to Braze.")] = False
    username: Annotated[str, Meta(description="What Mixpanel is told to authenticate with (Basic).")] = "mixpanel"
    password: Annotated[str, Meta(description="Its password. Required when sources.http.listen is not loopback.")] = ""
    password_file: Annotated[str, Meta(description="A file that holds password.")] = ""
    user_id: Annotated[
        str,
        Meta(
            description=(
                "Which property of a member is Braze's external id: distinct_id | $braze_external_id | $user_id | another "
                "that the sync exports."
            )
        ),
    ] = "distinct_id"
    path: Annotated[str, Meta(description="The SQLite file of the membership; relative to the working directory.")] = (
        "cohorts.db"
    )
    max_bytes: Annotated[Size, Meta(description="Near this size pages are answered 503, and Mixpanel keeps them.")] = (
        Size(20 * 2**30)
    )
    attribute: Annotated[
        str, Meta(description="The array attribute of a user in Braze that holds the names of the cohorts.")
    ] = "mixpanel_cohorts"
    update_existing_only: Annotated[bool, Meta(description="false: a user whom Braze doesn't know is made there.")] = (
        True
    )
    max_data_points_per_day: Annotated[
        int,
        Meta(
            ge=0,
            description="Beyond it nothing is sent until the next day (UTC) or `bridged cohorts allow`. 0: no cap.",
        ),
    ] = 0
    max_concurrency: Annotated[int, Meta(ge=1, le=64, description="Requests to Braze in flight at most.")] = 8


class Braze(Section, frozen=True, kw_only=True):
    """Where cohorts go, and as whom."""

    cluster: Annotated[str, Meta(description="The instance in your dashboard's address: US-01, EU-02, ...")] = ""
    url: Annotated[
        str,
        Meta(
            description="Overrides the cluster's host (an emulator, a proxy). A private authority of its: SSL_CERT_FILE."
        ),
    ] = ""
    rest_key: Annotated[str, Meta(description="A REST API key with the permission users.track.")] = ""
    rest_key_file: Annotated[str, Meta(description="A file that holds rest_key.")] = ""
    partner_name: Annotated[str, Meta(description="Only with partner_key: as which of Braze's partners.")] = "mixpanel"
    partner_key: Annotated[
        str, Meta(description="Set: cohorts are written as one of Braze's partners, not as an attribute.")
    ] = ""
    partner_key_file: Annotated[str, Meta(description="A file that holds partner_key.")] = ""
    data_import_key: Annotated[str, Meta(description="The workspace's data import key; goes with partner_key.")] = ""
    data_import_key_file: Annotated[str, Meta(description="A file that holds data_import_key.")] = ""
    timeout: Annotated[Seconds, Meta(description="A request without an answer for so long is tried again.")] = Seconds(
        30
    )
    probe_interval: Annotated[Seconds, Meta(description="While Braze refuses the key: one user so often.")] = Seconds(
        60
    )


class Alerts(Section, frozen=True, kw_only=True):
    """Who is told when something needs a person; the log, /metrics and `bridged status` always are."""

    webhook_url: Annotated[
        str,
        Meta(description='Each alarm is posted here as JSON with a `text`, as Slack and others take it; "": nowhere.'),
    ] = ""
    webhook_url_file: Annotated[str, Meta(description="A file that holds webhook_url: many of them are secrets.")] = ""
    webhook_token: Annotated[str, Meta(description="Sent along as `Authorization: Bearer ...`.")] = ""
    webhook_token_file: Annotated[str, Meta(description="A file that holds webhook_token.")] = ""
    spool_share: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Alarm when the spool has this share of max_bytes, or of what the disk lets it have.",
        ),
    ] = 0.8
    undelivered: Annotated[
        Seconds, Meta(description="Alarm when events have waited so long without one success, whatever the cause.")
    ] = Seconds(600)


class Admin(Section, frozen=True, kw_only=True):
    """API, /metrics, /healthz, /readyz."""

    listen: Annotated[str, Meta(description='host:port of the admin listener; "" closes it.')] = "127.0.0.1:8481"
    token: Annotated[
        str, Meta(description="Demanded as `Authorization: Bearer ...`. Required when listen is not loopback.")
    ] = ""
    token_file: Annotated[str, Meta(description="A file that holds token.")] = ""
    hosts: Annotated[
        tuple[str, ...],
        Meta(
            description=(
                "Names by which it may be asked, besides localhost, addresses and that of listen; others are "
                "answered 421 (DNS rebinding)."
            )
        ),
    ] = ()
    tls_cert: Annotated[
        str, Meta(description="A PEM file with its certificate and chain: HTTPS. Read again at SIGHUP.")
    ] = ""
    tls_key: Annotated[str, Meta(description="A PEM file with the certificate's private key.")] = ""


class Log(Section, frozen=True, kw_only=True):
    """Logs go to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="debug | info | warning | error.")
    ] = "info"
    format: Annotated[
        Literal["auto", "console", "json"], Meta(description="auto | console | json: auto is console on a terminal.")
    ] = "auto"


class Config(Section, frozen=True, kw_only=True):
    """Everything; see the sections."""

    sources: Sources = Sources()
    mixpanel: Mixpanel = Mixpanel()
    events: Events = Events()
    spool: SpoolSettings = SpoolSettings()
    delivery: DeliverySettings = DeliverySettings()
    retention: Retention = Retention()
    cohorts: Cohorts = Cohorts()
    braze: Braze = Braze()
    alerts: Alerts = Alerts()
    admin: Admin = Admin()
    log: Log = Log()

    @property
    def stream_addresses(self) -> tuple[str, ...]:
        """Where the stream door is open: nowhere if no event is taken."""
        return tuple(self.sources.stream.listen) if self.mixpanel.export else ()


SECRETS = (
    ("sources", "http", "bearer_token"),
    ("mixpanel", "token"),
    ("mixpanel", "api_secret"),
    ("mixpanel", "service_secret"),
    ("cohorts", "password"),
    ("braze", "rest_key"),
    ("braze", "partner_key"),
    ("braze", "data_import_key"),
    ("alerts", "webhook_url"),
    ("alerts", "webhook_token"),
    ("admin", "token"),
)
