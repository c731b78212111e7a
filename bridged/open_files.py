"""How many files the process may open, and how many of them the doors' connections may take.

The rest is for the spool, the listeners, the requests to Mixpanel and Braze, and whoever looks at the admin side.
"""

import resource
from typing import Final, NamedTuple

import structlog

from bridged.errors import ConfigError
from bridged.settings import Config

log = structlog.get_logger()

_RESERVE: Final = 256
_OWN: Final = 32  # of it: the spool, the listeners, and a few requests to Mixpanel
# With fewer a start fails somewhere in its midst, or takes a handful of connections.
_LEAST: Final = 64


class Connections(NamedTuple):
    """At most so many at each door."""

    http: int
    stream: int


def demand_enough() -> None:
    """Raises the limit to what a start needs. Raises ConfigError if there may not be so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _LEAST:
        return
    if hard != resource.RLIM_INFINITY and hard < _LEAST:
        said = (
            f"the process may open {hard} files at most, and needs {_LEAST}, or better {_RESERVE} and one a connection"
        )
        raise ConfigError(said, "raise the limit: ulimit -n, LimitNOFILE=")
    resource.setrlimit(resource.RLIMIT_NOFILE, (_LEAST, hard))


def allow(config: Config) -> None:
    """Raises the limit to what the doors may need; systems start with 1,024. Says if that is more than there may be."""
    needed = sum(_wished(config)) + _RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        http, stream = connections(config)
        log.warning(
            "few_open_files",
            allowed=allowed,
            needed=needed,
            http_connections=http,
            stream_connections=stream,
            hint="the doors take so many connections, and no more: raise LimitNOFILE, or lower max_connections",
        )


def connections(config: Config) -> Connections:
    """What each door may take: as configured, or both less, in proportion, where the process may open too few files."""
    wished = _wished(config)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = soft - _kept_back(soft)
    if soft == resource.RLIM_INFINITY or sum(wished) <= room:
        return wished
    return Connections(*[max(1, room * of // sum(wished)) for of in wished])


def admin_connections() -> int:
    """What the admin side may take: half of what is left of the rest. Who may not ask anything could have them all."""
    return (_kept_back(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - _OWN) // 2


def _kept_back(soft: int) -> int:
    """What isn't for the doors, of a limit."""
    return _RESERVE if soft == resource.RLIM_INFINITY else min(_RESERVE, max(soft // 2, 3 * _OWN // 2))


def _wished(config: Config) -> Connections:
    http, stream = config.sources.http, config.sources.stream
    return Connections(http.max_connections if http.listen else 0, stream.max_connections if stream.listen else 0)
