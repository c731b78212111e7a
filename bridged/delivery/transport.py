"""The one HTTP client call of the path: bytes out, a verdict back. Every exception of the network is translated here."""

import functools
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Self

import aiohttp

from bridged import __version__
from bridged.errors import ConfigError
from bridged.mixpanel.requests import Target
from bridged.mixpanel.verdicts import Retry, Verdict, clean, judge
from bridged.redaction import redacted, redacted_bytes

# An answer larger than this is no answer of Mixpanel's; 2,000 failed records are some 400 kB.
_MAX_ANSWER_BYTES = 8 * 2**20
_CONNECT_S = 10.0


class Transport:
    """A pool of connections to Mixpanel. `target` may be replaced at any time: the next request uses it."""

    def __init__(self, target: Target, timeout_s: float, max_connections: int) -> None:
        self.target = target
        self._timeout = aiohttp.ClientTimeout(total=timeout_s or None, sock_connect=_CONNECT_S)
        self._max_connections = max_connections

    async def __aenter__(self) -> Self:
        """Opens the pool. Raises ConfigError if the environment names a proxy that can't be used."""
        _proxy(self.target.import_url)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections, ttl_dns_cache=60),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"bridged/{__version__}"},
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._session.close()

    async def send(self, body: bytes, events: int, insert_ids: Callable[[], Sequence[str]]) -> Verdict:
        """Posts one gzip NDJSON body; never raises but for cancellation."""
        target = self.target
        try:
            async with self._session.post(
                target.import_url,
                data=body,
                headers=target.headers(),
                allow_redirects=False,
                proxy=_proxy(target.import_url),
            ) as response:
                # Before anything quotes it, and cuts the quotation off within a secret.
                said = redacted_bytes(await _read(response))
                return judge(response.status, response.headers, said, insert_ids, events)
        except aiohttp.ConnectionTimeoutError:
            return Retry("network", f"no connection within {_CONNECT_S:g} s")
        except TimeoutError:
            total_s = self._timeout.total
            return Retry("network", f"no answer within {total_s:g} s" if total_s else "no answer in time")
        except aiohttp.ClientError as error:
            # The class is our own word: a long one isn't to be taken for a secret.
            return Retry("network", f"{type(error).__name__}: {clean(redacted(str(error)))}")
        except (OSError, ConfigError) as error:
            return Retry("network", clean(redacted(str(error))))


@functools.lru_cache(maxsize=8)
def _proxy(url: str) -> str | None:
    """HTTPS_PROXY and friends: many a VM has no other way out. (aiohttp's own `trust_env` costs a thread hop a request.)

    Raises ConfigError if it can't be used; never quotes it, since it may hold a password.
    """
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        through = urllib.parse.urlsplit(proxy)
        usable = through.scheme in ("http", "https") and bool(through.hostname) and through.port != 0
    except ValueError:
        usable = False
    if not usable:
        name = f"{parts.scheme.upper()}_PROXY"
        raise ConfigError(f"the environment variable {name} is no address of a proxy", "expected http://host:port")
    return proxy


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer, at most so much of it: what answers may not be Mixpanel."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > _MAX_ANSWER_BYTES:
            break
    return b"".join(chunks)
