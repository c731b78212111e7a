"""A pool of connections that gives out none on which something was said while nobody had asked."""

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.tracing import Trace


class Connector(aiohttp.TCPConnector):
    """aiohttp's, which looks only whether an idle connection is open before it is used again.

    Bytes that came meanwhile, from a proxy that is out of step, would be taken for the answer to the next request.
    """

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        for protocol, _ in self._conns.get(key, ()):
            if protocol.should_close:
                protocol.close()
        return await super()._get(key, traces)
