"""Every error that a person may see, with a hint and an exit code or HTTP status.

    BridgedError
    +-- ConfigError          exit 78   the configuration can't be used
    +-- SpoolError           exit 74   the spool can't be opened, written or trusted
    |   +-- SpoolFull        503       no room for one more event; the sender keeps it and tries again
    |   +-- MembershipError  503       the cohorts' file can't be opened, written or trusted
    |       +-- MembershipDamaged      it isn't what was written
    +-- UnknownCohort        404       no cohort has this name
    +-- ListenError          exit 74   a door's address can't be listened on
    +-- UpstreamError        exit 69   Mixpanel or the daemon can't be reached, or refuses us
    +-- DoorError                      one request at a door is refused; the class carries its HTTP status
        +-- BadRequest       400
        +-- Unauthorized     401
        +-- NothingTaken     503       the door is closed by the configuration
        +-- TooLarge         413

Anything else that escapes is a bug: the process ends and systemd restarts it.
"""

import errno
import os
import sqlite3
from pathlib import Path
from typing import ClassVar


class BridgedError(Exception):
    """What happened; `hint` says what to do about it."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n  hint: {self.hint}" if self.hint else message


class ConfigError(BridgedError):
    """The configuration can't be used: names the file and the key."""

    exit_code = 78


class SpoolError(BridgedError):
    """The spool can't be opened, written or trusted: names the file."""

    exit_code = 74
    http_status = 503


class SpoolFull(SpoolError):
    """The spool is near its cap: the sender keeps the events and tries again later."""


class MembershipError(SpoolError):
    """The file of the cohorts can't be opened, written or trusted: names it."""


class MembershipDamaged(MembershipError):
    """It isn't what was written, or its disk has no room for it. Events don't depend on it."""


class UnknownCohort(BridgedError):
    """No cohort has this key, or several have."""

    http_status = 404


class ListenError(BridgedError):
    """An address can't be listened on: names the key and the address."""

    exit_code = 74

    def __init__(self, message: str, error: OSError) -> None:
        super().__init__(
            f"{message}: {error}", _LISTEN_HINTS.get(error.errno or 0, "is it an address of this machine?")
        )


_LISTEN_HINTS = {
    errno.EADDRINUSE: "is another bridged running? choose another port or path",
    errno.EEXIST: "remove what is there, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.EACCES: "not permitted to this user: choose a port above 1023, a folder that is writable, or systemd's socket",
    errno.ENOENT: "the folder isn't there: make it, or choose another",
}


LOCKED = "another process has locked it, such as sqlite3 or a backup: end that"


def is_locked(error: BaseException) -> bool:
    """Whether another process has an SQLite file to itself for now. Errors of the module itself have no code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


_NO_MORE_FILES = "the process may open no more files: raise the limit (ulimit -n, LimitNOFILE=)"


def whose(error: Exception, path: Path, otherwise: str) -> str:
    """The hint for a file of ours that can't be opened: in our own folder, and not for us, it is somebody else's.

    Looks at the disk, unless the file is locked: not for the loop, if that may hang.
    """
    if is_locked(error):
        return LOCKED
    if getattr(error, "errno", 0) == errno.EMFILE:
        return _NO_MORE_FILES
    # Behind a link, as that of systemd's DynamicUser is: `chown -R` doesn't go through it.
    folder = Path(os.path.realpath(path.parent))
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    try:
        if code == sqlite3.SQLITE_CANTOPEN:
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))  # why, it doesn't tell
        disk = os.statvfs(folder)
        if code == sqlite3.SQLITE_CANTOPEN and disk.f_files and not disk.f_favail:
            return "its disk has no inodes left for another file (df -i): delete some files there"
        refused = isinstance(error, PermissionError) or code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
        found = folder.stat()
        ours = refused and found.st_uid == os.geteuid()
    except OSError as why:
        return _NO_MORE_FILES if why.errno == errno.EMFILE else otherwise
    if ours and found.st_mode & 0o700 != 0o700:
        return f"chmod u+rwx {folder}"
    said = "was it made by another user, such as root with `bridged run`, or copied? stop the daemon, then:"
    return f"{said} chown -R --reference={folder} {folder}" if ours else otherwise


NO_MORE_THREADS = (
    "the process may make no more threads",
    "raise the limit: TasksMax= of the unit, --pids-limit of the container, ulimit -u of the user",
)


def wants_threads(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is that there may be no more of them. Python has no class for it."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, RuntimeError) and "can't start new thread" in str(found):
            return True
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return False


def about_pem(error: Exception) -> str:
    """The hint for a certificate and its key that can't be used."""
    hint = "PEM files that the daemon may read: the certificate with its chain, and its private key, unencrypted"
    # Read by root, they pass `check`; the unit's service is another user.
    systemd = "; for the systemd unit LoadCredential= hands them over (see the README, Under systemd)"
    return hint + systemd if isinstance(error, PermissionError) else hint


class UpstreamError(BridgedError):
    """Mixpanel, or the daemon a command talks to, can't be reached or refuses us."""

    exit_code = 69
    http_status = 502


class DoorError(BridgedError):
    """One request is refused at a door; nobody else is touched."""

    http_status = 400


class BadRequest(DoorError):
    """The body is not JSON of the promised shape."""


class Unauthorized(DoorError):
    """No token, or a wrong one."""

    http_status = 401


class NothingTaken(DoorError):
    """The door is closed by the configuration; its sender shall keep what it has until it is open."""

    http_status = 503


class TooLarge(DoorError):
    """The body is larger than the door takes."""

    http_status = 413
