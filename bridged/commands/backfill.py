"""`bridged backfill`: files of Currents events, sent into the running daemon through its stream door, with acks.

How far a file was sent stands in a small file of its own, written with every ack: an interrupted backfill goes on behind the
last line that is known to be on disk. At most one window of lines can be sent twice, those whose ack hadn't come.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import os
import shlex
import socket
import ssl
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import msgspec
from msgspec import Struct

from bridged import config
from bridged.addresses import split_address
from bridged.commands import currents_files
from bridged.commands.books import Books
from bridged.commands.client import EVERYWHERE, Daemon, this_certificate
from bridged.commands.currents_files import WITHOUT_FORM, FileError, WithoutForm
from bridged.commands.stream_client import StreamClient
from bridged.errors import BridgedError, ConfigError, SpoolError
from bridged.settings import Config, Events

EPILOG = """\
Files hold Currents events as Braze's Custom HTTP connector sends them: one a line, or as a JSON array; or they are Avro, as
Currents' export to cloud storage writes them (for which fastavro must be installed), or such records as JSON, each with its
event_type. Any may be gzip. A folder means the files
below it; one that can't be read to its end doesn't stop the others: it is named at the end (exit code 74). Avro files of types
without a Mixpanel form (users.UserOrphan and the like) are passed over, unless [events] forwards the type.

FILE.backfill, beside each, says how far it was sent. After an interruption the same command goes on there; a file that was
sent whole is passed over. To send one again, delete it. --state keeps them elsewhere, if the folder can't be written.

Bad events become dead letters, as those of any door, and some are skipped, as [events] says: how many more there are
afterwards is told. Mixpanel recognises an event that it has by its id, its time, its user
and its name; it drops or hides events older than the project's retention (two years in newer projects, five in older ones).

examples:
  bridged backfill 2026-10-*.ndjson.gz
  bridged backfill --events-per-second 2000 --state /var/tmp/backfill /mnt/currents/dataexport.prod-01.S3.integration.1a2b
"""

_SUFFIX: Final = ".backfill"
_STATE_BYTES: Final = 200  # written in place, in one call: a kill leaves the old one or the new one
_HEAD_BYTES: Final = 65_536
_CHUNK: Final = 500  # lines
_CHUNK_BYTES: Final = 2**20
_CONNECT_S: Final = 10.0
_LAST_ACKS_S: Final = 5.0
_SPEAK_S: Final = 10.0
_SPEAK_AT_A_TERMINAL_S: Final = 1.0
_SILENT_S: Final = 10.0
_YEAR_S: Final = 365 * 86_400
_SHORT_RETENTION_S: Final = 2 * _YEAR_S
_LONG_RETENTION_S: Final = 5 * _YEAR_S
_AHEAD_S: Final = 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="files of events, or folders of them")
    parser.add_argument(
        "--events-per-second", metavar="N", type=_rate, help="no faster than this (default: as it goes)"
    )
    parser.add_argument("--state", metavar="DIR", type=Path, help="where FILE.backfill is kept (default: beside FILE)")
    parser.add_argument(
        "--to", metavar="ADDRESS", help="tcp:HOST:PORT or unix:PATH (default: the first of [sources.stream] listen)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Sends them in order; goes on behind one that can't be read to its end."""
    settings = config.load(config.find_config(arguments.config), secrets=())
    files = currents_files.found(path for path in arguments.files if path.suffix != _SUFFIX)
    books = Books(_daemon(settings, arguments))
    return Backfill(settings, arguments.to, arguments.state, arguments.events_per_second, books).run(files)


def _daemon(settings: Config, arguments: argparse.Namespace) -> Daemon | None:
    """Who can be asked what became of the events. None: whoever is at `--to` may be another one, or we don't know the token."""
    if arguments.to and arguments.to not in settings.sources.stream.listen:
        return None
    with contextlib.suppress(ConfigError):
        return Daemon.configured(arguments.config)
    return None


class _Events(Struct):
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    unknown: str


class _InForce(Struct):
    """Of the configuration that the daemon has, what was saved on the page included."""

    events: _Events


def _left_out(events: Events | _Events) -> frozenset[str]:
    """The types without a form that aren't forwarded all the same."""
    forwarded = WITHOUT_FORM if events.unknown == "forward" else WITHOUT_FORM.intersection(events.include)
    return WITHOUT_FORM - forwarded.difference(events.exclude)


class _State(Struct):
    """What FILE.backfill says."""

    acked: int = 0  # lines that are on disk at the daemon
    whole_bytes: int = -1  # the file's size when all of it was; -1: not yet
    head_bytes: int = 0  # how much of its beginning the checksum is of
    head_crc32: int = 0


class Progress:
    """How far one file was sent; the only one who may send it, until it is closed."""

    def __init__(self, path: Path, folder: Path | None) -> None:
        """Raises SpoolError when it can't be kept, FileError when it is about another file of this name or in use."""
        self.path = path
        real = path.resolve()  # never beside a link: that may stand in a folder of somebody else's, as /dev/stdin does
        self._at = real.with_name(f"{real.name}{_SUFFIX}")
        if folder is not None:
            # Files of one name lie in many folders of an export.
            mark = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
            self._at = folder / f"{real.name}.{mark}{_SUFFIX}"
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._at, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SpoolError(f"can't write {self._at}: {error}", "--state DIR keeps it elsewhere") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.state = self._read()
        except BlockingIOError:
            os.close(self._fd)
            raise FileError(f"another `bridged backfill` is sending {path}", "let it finish, or end it") from None
        except OSError as error:
            os.close(self._fd)
            raise FileError(
                f"can't read {path} or {self._at}: {error}", "--state DIR keeps the latter elsewhere"
            ) from error
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)

    @property
    def done(self) -> bool:
        """Whether the whole file, as it is now, was sent."""
        # Without a line of it sent it may have been of a type that was left out then: it is looked at again.
        return self.state.acked > 0 and self.state.whole_bytes == self._size()

    def add(self, lines: int) -> None:
        """So many more lines are on disk."""
        self.state.acked += lines
        self._write()

    def finish(self) -> None:
        """All of its lines are."""
        self.state.whole_bytes = self._size()
        self._write()
        os.fsync(self._fd)

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise FileError(f"{self.path} has gone: {error}", "put it back, or leave it out") from error

    def _read(self) -> _State:
        told = os.pread(self._fd, _STATE_BYTES, 0)
        with self.path.open("rb") as file:
            if told:
                try:
                    state = msgspec.json.decode(told, type=_State)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise FileError(f"{self._at} isn't what bridged wrote: {error}", self._hint()) from error
                head = file.read(state.head_bytes)
                if len(head) < state.head_bytes or zlib.crc32(head) != state.head_crc32:
                    raise FileError(f"{self.path} isn't the file that {self._at} is about", self._hint())
                return state
            head = file.read(_HEAD_BYTES)
        return _State(head_bytes=len(head), head_crc32=zlib.crc32(head))

    def _hint(self) -> str:
        return f"to send {self.path} from its beginning: rm {shlex.quote(str(self._at))}"

    def _write(self) -> None:
        try:
            os.pwrite(self._fd, msgspec.json.encode(self.state).ljust(_STATE_BYTES - 1) + b"\n", 0)
        except OSError as error:
            raise SpoolError(f"can't write {self._at}: {error}", "what was acked since would be sent again") from error


class _Line(Struct):
    event_type: str
    time: float  # the daemon takes whole ones, however they are written


class _Ages:
    """What the lines say of themselves, before the daemon does."""

    def __init__(self, now_s: float) -> None:
        self.no_events = 0  # not JSON, or without event_type or time
        self.ahead = 0
        self.older = 0  # than what newer projects keep
        self.oldest = 0  # older than what any project keeps
        self._now_s = now_s
        self._decoder = msgspec.json.Decoder(_Line)

    def look(self, lines: list[bytes]) -> None:
        """Counts."""
        for line in lines:
            try:
                age_s = self._now_s - self._decoder.decode(line).time
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self.no_events += 1
                continue
            if age_s > _SHORT_RETENTION_S:
                if not self.older:
                    _say("warning: there are events older than two years, which newer Mixpanel projects don't keep")
                self.older += 1
                self.oldest += age_s > _LONG_RETENTION_S
            elif age_s < -_AHEAD_S:
                self.ahead += 1


class Backfill:
    """One call of the command: its counts, its pace, its words."""

    def __init__(self, settings: Config, to: str | None, state: Path | None, rate: float | None, books: Books) -> None:
        self._books = books
        in_force = books.asked("/api/config", _InForce)
        self._left_out = _left_out(in_force.events if in_force else settings.events)
        self._without_form: Counter[str] = Counter()  # files, by event type
        self._settings = settings
        self._connect = _connector(settings, to)
        self._state = state
        self._rate = rate
        self._chunk = _CHUNK if rate is None else max(1, min(_CHUNK, int(rate / 10)))
        self._progress: Progress | None = None
        self._ages = _Ages(time.time())
        self._files = self._passed_over = 0
        self._before = self._read = self._acked = 0  # lines: acked by an earlier run; handed on; acked
        self._due = 0.0  # monotonic: when the next chunk may go
        self._began = time.monotonic()
        self._spoke = self._began
        self._heard = self._began  # the last ack, or when the first line without one was sent

    def run(self, files: list[Path]) -> int:
        """Sends the files; gives the exit code. Raises BridgedError, when what was sent before has its acks or never will: at
        once if the others couldn't be sent either, else at the end.
        """
        bad: list[FileError] = []
        client = StreamClient(self._connect, self._on_acked, self._speak)
        try:
            for path in files:
                try:
                    with Progress(path, self._state) as self._progress:
                        if self._progress.done:
                            self._passed_over += 1
                            self._before += self._progress.state.acked
                            continue
                        self._send(path, self._progress, client)
                except WithoutForm as left_out:
                    self._without_form[left_out.event_type] += 1
                except FileError as error:
                    bad.append(error)
        except KeyboardInterrupt:
            self._give_up(client, "interrupted")
            return 130
        except BridgedError as error:
            self._give_up(client, "stopped")
            error.hint = error.hint or "run the same command again: it goes on where it was"
            raise
        finally:
            client.close()
        self._summary()
        if len(bad) == 1:
            raise bad[0]
        if bad:
            each = "\n  ".join(f"{error.args[0]} ({error.hint})" for error in bad)
            raise FileError(
                f"{len(bad)} files weren't sent to their ends:\n  {each}", "then run the same command again"
            )
        return 0

    def _send(self, path: Path, progress: Progress, client: StreamClient) -> None:
        self._files += 1
        self._before += progress.state.acked
        lines = currents_files.lines(path, int(self._settings.sources.stream.max_line), self._left_out)
        rest = itertools.islice(lines, progress.state.acked, None)
        damage: FileError | None = None
        # Those on their way belong to this file: it must hear of their acks while it is open.
        try:
            try:
                for chunk in currents_files.chunks(rest, self._chunk, _CHUNK_BYTES):
                    self._ages.look(chunk)
                    self._read += len(chunk)
                    if self._rate is not None:
                        client.pause_until(self._due)
                        self._due = max(self._due, time.monotonic() - 0.1) + len(chunk) / self._rate
                    if not client.unacked:
                        self._heard = time.monotonic()
                    client.send(chunk)
            except FileError as error:
                damage = error
            client.drain()
        except BaseException:
            client.drain(_LAST_ACKS_S)
            raise
        if damage is not None:
            raise damage
        progress.finish()

    def _on_acked(self, lines: int) -> None:
        self._acked += lines
        self._heard = time.monotonic()
        if self._progress is not None:
            self._progress.add(lines)

    def _give_up(self, client: StreamClient, why: str) -> None:
        left = f": {client.unacked:,} events were sent without an ack, and will be sent again" if client.unacked else ""
        _say(f"{why}{left}")
        self._summary()

    def _speak(self) -> None:
        """Every ten seconds a line, at a terminal the same one every second."""
        now, is_terminal = time.monotonic(), sys.stderr.isatty()
        if now - self._spoke < (_SPEAK_AT_A_TERMINAL_S if is_terminal else _SPEAK_S) or self._progress is None:
            return
        self._spoke = now
        per_second = self._acked / (now - self._began)
        waiting = "" if self._acked == self._read else f", {self._read - self._acked:,} on their way"
        text = f"{self._progress.path.name}: {self._acked:,} events acked{waiting}, {per_second:,.0f}/s"
        if waiting and now - self._heard >= _SILENT_S:
            text += f"; no ack for {now - self._heard:.0f} s: `bridged status` may say why"
        print(f"\r{text}\x1b[K" if is_terminal else text, end="" if is_terminal else "\n", file=sys.stderr, flush=True)

    def _summary(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        without_form = self._without_form.total()
        files = _files(self._files - without_form)
        print(f"{files}: {self._read:,} events read, {self._acked:,} acked, {self._read - self._acked:,} not")
        if self._passed_over:
            print(f"  {self._passed_over} more had been sent whole, and were passed over")
        if without_form:
            types = ", ".join(sorted(self._without_form))
            print(f"  {_files(without_form)} of types without a Mixpanel form passed over: {types}")
        if self._before:
            print(f"  {self._before:,} events had been acked before, and weren't sent again")
        if self._ages.no_events:
            print(f"  {self._ages.no_events:,} are no Currents events: see `bridged dead-letters list`")
        if self._ages.ahead:
            print(f"  {self._ages.ahead:,} are more than an hour ahead of this clock: see `bridged dead-letters list`")
        if self._ages.older:
            print(
                f"  {self._ages.older:,} are older than two years, {self._ages.oldest:,} of them than five: Mixpanel "
                "takes them, and hides what is older than the project's retention"
            )
        for line in self._books.meanwhile(self._acked):
            print(line)


def _files(number: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}"


def _say(text: str) -> None:
    print(f"\r{text}\x1b[K" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError("must be more than 0")
    return rate


def _connector(settings: Config, to: str | None) -> Callable[[], socket.socket]:
    """What opens a connection to the stream door. Raises ConfigError when there is none to open."""
    stream = settings.sources.stream
    if not to and not stream.listen:
        raise ConfigError("sources.stream.listen is empty: a backfill goes through the stream door", "open it")
    if not to and not settings.mixpanel.export:
        raise ConfigError("mixpanel.export is false: the stream door is closed, no events are taken")
    kind, _, address = (to or stream.listen[0]).partition(":")
    try:
        host, port = split_address(address) if kind == "tcp" else (address, 0)
    except ValueError:
        kind = ""
    if kind not in ("tcp", "unix") or not address:
        raise ConfigError(f"--to {to!r} is no address", "tcp:HOST:PORT or unix:PATH")

    def unix() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock

    if kind == "unix":
        return unix
    context: ssl.SSLContext | None = None
    if stream.tls_cert:
        context = this_certificate(stream.tls_cert, "sources.stream.tls_cert")

    def tcp() -> socket.socket:
        sock = socket.create_connection((EVERYWHERE.get(host, host), port), _CONNECT_S)
        try:
            return sock if context is None else context.wrap_socket(sock)
        except BaseException:
            sock.close()
            raise

    return tcp
