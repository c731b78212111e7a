"""The pool of connections that requests leave by: which are used again, who is trusted, and how names are looked up."""

import functools
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from bridged.apart import apart

# OpenSSL's variables for a file and for a folder of them.
_AUTHORITIES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
# As it looks for a certificate in a folder: by a hash of whose it is.
_HASHED: Final = re.compile(r"[0-9a-f]{8}\.\d+")


class Connector(aiohttp.TCPConnector):
    """aiohttp's, which looks only whether an idle connection is open before it is used again.

    Bytes that came meanwhile, from a proxy that is out of step, would be taken for the answer to the next request.
    """

    def __init__(self, **options: Any) -> None:
        """`options` are aiohttp's. Over TLS it trusts whom this machine trusts now, or SSL_CERT_FILE names."""
        lookups: Any = _Lookups()
        context = _context(*[os.environ.get(name) for name in _AUTHORITIES])
        super().__init__(resolver=aiohttp.ThreadedResolver(lookups), ssl=context, **options)

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        for protocol, _ in self._conns.get(key, ()):
            if protocol.should_close:
                protocol.close()
        return await super()._get(key, traces)


@functools.lru_cache(maxsize=1)
def _context(*_authorities: str | None) -> ssl.SSLContext:
    # Of our own: aiohttp's was made when it was imported, and knows the authorities of that moment. One for all pools: to read
    # the authorities takes some 60 ms and 800 kB.
    context = ssl.create_default_context()
    # On by default since Python 3.13: it refuses private authorities, as of proxies that inspect TLS, for what they don't say of
    # themselves. Earlier ones and curl take them, and whoever runs this has named them.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(("http/1.1",))
    return context


class _Lookups:
    """What aiohttp's resolver asks of the loop, in threads that nobody waits for.

    A look-up can't be cancelled. Of the loop's own threads each end of the process, and of `check`, would wait for as long as
    a name server that says nothing is asked again: half a minute and more.
    """

    async def getaddrinfo(self, *args: Any, **options: Any) -> Any:
        return await apart(lambda: socket.getaddrinfo(*args, **options), "look-up")

    async def getnameinfo(self, *args: Any) -> Any:
        return await apart(lambda: socket.getnameinfo(*args), "look-up")


def unusable_authorities(environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """What is wrong with the variables that name authorities, in words: OpenSSL passes over it in silence."""
    for name, problem in zip(_AUTHORITIES, (_file_problem, _folders_problem), strict=True):
        if (path := environ.get(name)) is not None and (said := problem(path)):
            yield f"the environment variable {name}={path}: {said}; whom it should name is not trusted"


def _file_problem(path: str) -> str:
    if not path:
        return "it is empty: unset it"
    try:
        if Path(path).is_dir():
            return "it is a folder: SSL_CERT_DIR is for those"
        if Path(path).exists() and not Path(path).is_file():  # a pipe can be read once
            return ""
        # The size first: an empty one is garbage in other words, by each version of OpenSSL.
        if not Path(path).stat().st_size:
            return "it is empty"
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        return f"it holds no certificate in PEM ({error.reason or error})"
    except OSError as error:
        return f"{error.strerror}{_FOR_EVERYBODY if isinstance(error, PermissionError) else ''}"
    return ""


_FOR_EVERYBODY: Final = " (for this user: it must be a file that everybody may read)"


def _folders_problem(paths: str) -> str:
    return ", and ".join(filter(None, map(_folder_problem, paths.split(":"))))


def _folder_problem(path: str) -> str:
    try:
        if not any(map(_HASHED.fullmatch, os.listdir(path))):  # noqa: PTH208  # names
            return (
                f"{path or 'an empty name'} holds no certificate by the name that is looked for: run `openssl rehash`"
            )
    except PermissionError as error:
        return "" if os.access(path, os.X_OK, effective_ids=True) else f"{path}: {error.strerror}"
    except OSError as error:
        return f"{path or 'an empty name'}: {error.strerror}"
    return ""
