"""Certificates of our own: when they end, which Python's ssl tells only of another side's, and those that take their place."""

import contextlib
import os
import re
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from bridged.errors import ConfigError, about_pem
from bridged.settings import Config

# Before its end somebody should renew it: so long, or a quarter of its life if that is less, as of those that live a week.
SOON_S: Final = 14 * 86400.0
_SOON_SHARE: Final = 0.25
_MAX_PEM_BYTES: Final = 2**20
_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
# Of DER, as X.509 uses it.
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


class Validity(NamedTuple):
    """From when to when a certificate is good, wall clock seconds."""

    begins: float
    ends: float

    def trouble(self, now: float) -> str:
        """Why nobody takes it, in words; empty: the time is right."""
        if now < self.begins:
            return f"isn't valid before {_moment(self.begins)}, and here it is {_moment(now)}: is the clock right?"
        return f"has ended on {_moment(self.ends)}: renew it" if now >= self.ends else ""

    def ends_soon(self, now: float) -> str:
        """That it will, in words; empty: it has time, or has ended."""
        soon_s = min(SOON_S, _SOON_SHARE * (self.ends - self.begins))
        left_s = self.ends - now
        if not 0 < left_s <= soon_s:
            return ""
        left = f"{left_s / 86400:.0f} days" if left_s >= 2 * 86400 else f"{left_s / 3600:.0f} hours"
        return f"ends on {_moment(self.ends)}, in {left}: renew it"


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def listeners(config: Config) -> dict[str, tuple[str, str]]:
    """The files of each listener that has a certificate, by its section: that of the certificate, and that of the key."""
    http, stream, admin = config.sources.http, config.sources.stream, config.admin
    sections = (("sources.http", http), ("sources.stream", stream), ("admin", admin))
    return {
        name: (section.tls_cert, section.tls_key) for name, section in sections if section.listen and section.tls_cert
    }


def read(file: str) -> Validity | None:
    """Of the first certificate in a PEM file, which is the listener's own. None: that can't be told."""
    try:
        # What is no file, such as a pipe, is for who listens: it can be read once.
        if not stat.S_ISREG(Path(file).stat().st_mode):
            return None
        return _validity_of(_content(file))
    except OSError:
        return None


def _content(file: str) -> bytes:
    with Path(file).open("rb") as opened:
        return opened.read(_MAX_PEM_BYTES)


def _validity_of(pem: bytes) -> Validity | None:
    try:
        found = _PEM.search(pem.decode("ascii", "replace"))
        return validity(ssl.PEM_cert_to_DER_cert(found[0])) if found else None
    except (ValueError, IndexError):
        return None


def validity(der: bytes) -> Validity:
    """Of a certificate in DER. Raises ValueError or IndexError for what is none."""
    _, start, _ = _element(der, 0)
    _, at, _ = _element(der, start)
    for _ in range(4 if der[at] == _VERSION else 3):  # the version, which may be left out; number, algorithm, issuer
        _, _, at = _element(der, at)
    tag, start, _ = _element(der, at)
    if tag != _SEQUENCE:
        raise ValueError("no certificate")
    begins, end = _time(der, start)
    ends, _ = _time(der, end)
    return Validity(begins, ends)


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Its tag, and where its content begins and ends."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[at + 2 : start], "big")
    return der[at], start, start + length


def _time(der: bytes, at: int) -> tuple[float, int]:
    tag, start, end = _element(der, at)
    text = der[start:end].decode("ascii")
    if tag == _UTC_TIME:  # of the years 1950 to 2049
        text = f"{19 if int(text[:2]) >= 50 else 20}{text}"
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp(), end


@dataclass(frozen=True, repr=False, slots=True)
class Pair:
    """A certificate with its chain, and its key: what the files held, which was tried."""

    validity: Validity | None
    _cert: bytes
    _key: bytes

    def load(self, context: ssl.SSLContext) -> None:
        """Has a listener show it to connections to come. From memory: for the loop, whatever the disk does meanwhile."""
        with _in_memory(self._cert) as cert, _in_memory(self._key) as key:
            # An encrypted key would be asked for at the terminal.
            context.load_cert_chain(cert, key, password=b"")


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A file for those that want its name, without a disk."""
    file = os.memfd_create("pem")
    try:
        with open(file, "wb", closefd=False) as written:  # a descriptor
            written.write(content)
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)


def tried(section: str, cert: str, key: str) -> Pair:
    """What a listener's files hold, if it can be used. Reads them: not for the loop. Raises ConfigError.

    What is a pipe or the like by now can't be read again.
    """
    try:
        for name, file in (("tls_cert", cert), ("tls_key", key)):
            if (there := Path(file)).exists() and not there.is_file():
                raise ConfigError(f"{section}.{name} = {file!r} is no file that can be read again", "name a file")
        content = _content(cert)
        pair = Pair(_validity_of(content), content, _content(key))
        pair.load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        said = f"can't use {section}.tls_cert = {cert!r} with {section}.tls_key = {key!r}: {error}"
        raise ConfigError(said, about_pem(error)) from error
    return pair


Renewed = Mapping[str, Pair | ConfigError]  # by the section of the listener


class Listener(Protocol):
    """Who shows a certificate."""

    def renew(self, load: Callable[[ssl.SSLContext], None]) -> None:
        """Has connections to come see another one."""


class Certificates:
    """Those that the listeners show."""

    def __init__(self, config: Config) -> None:
        self._files = listeners(config)
        self.shown: Mapping[str, Validity | None] = {name: read(cert) for name, (cert, _) in self._files.items()}

    def read_again(self) -> Renewed:
        """What the files of each listener hold now, or why that can't be used. Reads them: not for the loop."""
        found: dict[str, Pair | ConfigError] = {}
        for section, files in self._files.items():
            try:
                found[section] = tried(section, *files)
            except ConfigError as error:
                found[section] = error
        return found

    def renew(self, found: Callable[[], Renewed], listeners: Mapping[str, Listener | None]) -> Iterator[Exception]:
        """Has the listeners show what was found; gives why something can't be used, whose old one stays."""
        try:
            pairs = found()
        except Exception as error:
            yield error
            return
        for section, pair in pairs.items():
            try:
                if isinstance(pair, ConfigError):
                    yield pair
                elif (listener := listeners[section]) is not None:
                    listener.renew(pair.load)
                    self.shown = {**self.shown, section: pair.validity}
            except OSError as error:  # such as too many open files
                yield error

    def ended(self) -> str:
        """Which nobody takes, and why; empty: none."""
        return "; ".join(self._said("trouble"))

    def ending(self) -> str:
        """Which soon end; empty: none."""
        return "; ".join(self._said("ends_soon"))

    def _said(self, question: str) -> Iterator[str]:
        now = time.time()
        for section, known in self.shown.items():
            if known is not None and (words := getattr(known, question)(now)):
                yield f"{section}.tls_cert {words}"


def warnings(config: Config) -> Iterator[str]:
    """What of the listeners' certificates a person should know."""
    found = Certificates(config)
    yield from filter(None, (found.ended(), found.ending()))
