"""The pool of connections that requests leave by: which are used again, who is trusted, and how names are looked up."""

import functools
import os
import socket
import ssl
from typing import Any, Final

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from bridged.apart import apart

# OpenSSL's variables for a file and for a folder of them.
_AUTHORITIES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")


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
