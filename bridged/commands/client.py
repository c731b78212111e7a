"""What commands use to talk to the running daemon: plain blocking HTTP, never through a proxy."""

import http.client
import ssl
import sys
from collections.abc import Iterator
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

import msgspec

from bridged.addresses import split_address
from bridged.config import WITH_SYSTEMD, find_config, load, load_admin
from bridged.errors import BridgedError, ConfigError, UpstreamError
from bridged.redaction import redacted
from bridged.settings import Config

T = TypeVar("T")

_TIMEOUT_S: Final = 30.0
_NO_CHECK_TIME: Final = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME; Python has no name for it
ANOTHER_TOKEN: Final = f"is this the configuration that the daemon was started with? {WITH_SYSTEMD}"
_ADMIN_SECRETS: Final = (("admin", "token"),)
EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def this_certificate(path: str, key: str) -> ssl.SSLContext:
    """To reach a listener of the daemon over TLS. Raises ConfigError that names the key when the file can't be read."""
    try:
        context = ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one
        is_systemds = path.startswith("/run/credentials/")
        hint = (
            "systemd's copies are there while the service runs, and root's to read: does it run?" if is_systemds else ""
        )
        raise ConfigError(f"can't read {key} = {path!r}: {error}", hint) from error
    # Exactly this certificate, whoever signed it; so its name, which is not the address that we ask, says no more.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # On by default since Python 3.13: it refuses many that people sign themselves, for what they don't say of their use.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.check_hostname = False
    # Nor does its time: who renews it needs to see what is wrong. The daemon has an alarm for it, and `check` a warning.
    context.verify_flags |= _NO_CHECK_TIME
    return context


class Answer(msgspec.Struct):
    """Status and body."""

    status: int
    body: bytes


class Daemon:
    """One listener of the running daemon: its admin API or its HTTP door."""

    def __init__(self, address: str, token: str, name: str, tls_cert: str = "") -> None:
        """`tls_cert`: the certificate that it listens with; no other is taken. Without one it is plain HTTP."""
        host, self._port = split_address(address)
        self._host = EVERYWHERE.get(host, host)
        self._token = token
        self._name = name
        self._tls_cert = tls_cert

    @classmethod
    def configured(cls, flag: str | None) -> "Daemon":
        """The admin API of the configuration that `--config` names, if any. Raises ConfigError.

        A mistake elsewhere in it is told, and no reason not to ask: the daemon that runs may be alarmed by just that.
        """
        path = find_config(flag)
        try:
            return cls.admin(load(path, secrets=_ADMIN_SECRETS))
        except ConfigError as error:
            try:
                daemon = cls.admin(load_admin(path))
                daemon.call("GET", "/healthz")
            except BridgedError:  # nor is there one to ask
                raise error from None
            print(redacted(f"bridged: {error}\n  the daemon is asked nevertheless"), file=sys.stderr)
            return daemon

    @classmethod
    def admin(cls, config: Config) -> "Daemon":
        """The admin API. Raises ConfigError when the configuration closes it."""
        if not config.admin.listen:
            raise ConfigError("admin.listen is empty: the daemon has no admin API to ask", "set [admin] listen")
        return cls(config.admin.listen, config.admin.token, "[admin] listen", config.admin.tls_cert)

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = _TIMEOUT_S) -> Answer:
        """One request. Raises UpstreamError when nobody answers."""
        connection = self._connection(timeout_s)
        try:
            response = self._send(connection, method, path, body)
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        finally:
            connection.close()

    def ask(self, path: str, type_: type[T], **query: object) -> T:
        """What the API answers to a GET, decoded. Raises BridgedError with the API's own words."""
        given = {key: value for key, value in query.items() if value not in (None, "")}
        return self._decoded(self.call("GET", f"{path}?{urlencode(given)}" if given else path), type_)

    def order(self, path: str, body: object, type_: type[T]) -> T:
        """What the API answers to a POST, decoded; it may take as long as it takes."""
        return self._decoded(self.call("POST", path, body, timeout_s=None), type_)

    def stream(self, path: str, **query: object) -> Iterator[bytes]:
        """A long answer, piece by piece. Raises UpstreamError when it breaks off."""
        given = {key: value for key, value in query.items() if value not in (None, "")}
        connection = self._connection(_TIMEOUT_S)
        try:
            response = self._send(connection, "GET", f"{path}?{urlencode(given)}" if given else path, None)
            if response.status != 200:
                raise self._refused(Answer(response.status, response.read()))
            while piece := self._piece(response):
                yield piece
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        finally:
            connection.close()

    def _piece(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read(1 << 16)
        except (OSError, http.client.HTTPException) as error:
            said = f"the answer of the daemon at {self._host}:{self._port} broke off: {error!r}"
            raise UpstreamError(said, "was it stopped? run the same command again when it is back") from error

    def _connection(self, timeout_s: float | None) -> http.client.HTTPConnection:
        if not self._tls_cert:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        context = this_certificate(self._tls_cert, self._name.replace("listen", "tls_cert"))
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=context)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object
    ) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = msgspec.json.encode(body)
        connection.request(method, path, data, headers)
        return connection.getresponse()

    def _decoded(self, answer: Answer, type_: type[T]) -> T:
        if answer.status != 200:
            raise self._refused(answer)
        try:
            return msgspec.json.decode(answer.body, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._stranger(error) from error

    def _refused(self, answer: Answer) -> BridgedError:
        """The API's refusal as an error of ours."""
        try:
            said = msgspec.json.decode(answer.body, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            said = {}
        message = str(said.get("error", ""))
        if not message:
            return self._stranger(f"HTTP {answer.status}")
        if answer.status == 401:
            return UpstreamError(
                f"the daemon refuses us: {message}",
                ANOTHER_TOKEN,
            )
        if answer.status >= 500:
            return UpstreamError(f"the daemon says: {message}", str(said.get("hint", "")))
        return BridgedError(message, str(said.get("hint", "")))

    def _stranger(self, said: object) -> UpstreamError:
        where = f"what answers at {self._host}:{self._port} is not bridged {self._name}: {said}"
        return UpstreamError(where, "is another program, or another version of bridged, running there?")

    def _silent(self, error: Exception) -> UpstreamError:
        if isinstance(error, ssl.SSLCertVerificationError):
            key = self._name.replace("listen", "tls_cert")
            return UpstreamError(
                f"what answers at {self._host}:{self._port} shows another certificate than {key}: {error}",
                "if the file was renewed, have the daemon read it: SIGHUP, or under systemd `systemctl restart bridged`",
            )
        return UpstreamError(
            f"no daemon answers at {self._host}:{self._port} ({self._name}): {error}",
            "is it running? start it with `bridged run`, and give both the same --config",
        )
