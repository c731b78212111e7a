"""The one HTTP client call of the path: bytes out, a verdict back. Every exception of the network is translated here."""

import asyncio
import functools
import secrets
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Self

import aiohttp
import msgspec
from isal import igzip

from bridged import __version__
from bridged.connections import Connector
from bridged.errors import ConfigError
from bridged.mixpanel.requests import Target
from bridged.mixpanel.verdicts import Halt, Retry, Verdict, clean, clock_skew_s, judge
from bridged.redaction import redacted, redacted_bytes

# An answer larger than this is no answer of Mixpanel's, or its request is split: 2,000 failed records are some 400 kB.
_MAX_ANSWER_BYTES = 2 * 2**20
# To look through one of that size takes some hundredths of a second. From here on it is done one by one.
_LARGE_ANSWER_BYTES = 128 * 2**10
CONNECT_S = 10.0
# Who may send at a time is the pace's business; the pool only must not be what is waited for.
_MAX_CONNECTIONS = 64
# Of which the exception says nothing at all.
CLOSED_IN_HANDSHAKE = "it closed the connection in the TLS handshake"


class Transport:
    """A pool of connections to Mixpanel. `use` replaces target and timeout at any time: the next request has the new ones."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.target = target
        self.clock_skew_s: float | None = None  # our wall clock less Mixpanel's, by its last answer; None: not known
        self._timeout = _timeout(timeout_s)
        self._large = asyncio.Lock()  # whose turn it is to look through a large answer

    async def __aenter__(self) -> Self:
        """Opens the pool. Raises ConfigError if the environment names a proxy that can't be used."""
        proxy_for(self.target.import_url)
        self._session = aiohttp.ClientSession(
            connector=Connector(limit=_MAX_CONNECTIONS, ttl_dns_cache=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"bridged/{__version__}"},
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._session.close()

    def use(self, target: Target, timeout_s: float) -> None:
        """Another target and timeout from the next request on. Raises ConfigError, and changes nothing, as on opening."""
        proxy_for(target.import_url)
        self.target = target
        self._timeout = _timeout(timeout_s)

    async def ask(self) -> Verdict:
        """Whether the credential works: one record without a name, which Mixpanel must refuse, so that nothing is stored."""
        insert_id = f"bridged-check-{secrets.token_hex(8)}"
        properties: dict[str, object] = {
            "time": int(time.time()),
            "distinct_id": "bridged-check",
            "$insert_id": insert_id,
        }
        if self.target.credentials.token:
            properties["token"] = self.target.credentials.token
        record = msgspec.json.encode({"event": "", "properties": properties}) + b"\n"
        return await self.send(igzip.compress(record, 1), 1, lambda: [insert_id])

    async def send(self, body: bytes, events: int, insert_ids: Callable[[], Sequence[str]]) -> Verdict:
        """Posts one gzip NDJSON body; never raises but for cancellation."""
        target, timeout = self.target, self._timeout
        if not target.credentials.given:
            return Halt(0, "no credential for Mixpanel is set yet")
        try:
            async with self._session.post(
                target.import_url,
                data=body,
                headers=target.headers(),
                allow_redirects=False,
                proxy=proxy_for(target.import_url),
                timeout=timeout,
            ) as response:
                self.clock_skew_s = clock_skew_s(response.headers, time.time())
                said = await read_answer(response)
                if len(said) > _LARGE_ANSWER_BYTES:
                    async with self._large:  # twenty may come at once: the loop turns between them
                        await asyncio.sleep(0)
                # Before anything quotes it, and cuts the quotation off within a secret.
                said = redacted_bytes(said)
                return judge(response.status, response.headers, said, insert_ids, events)
        except aiohttp.ConnectionTimeoutError:
            return Retry("network", f"no connection within {CONNECT_S:g} s")
        except TimeoutError:
            total_s = timeout.total
            return Retry("network", f"no answer within {total_s:g} s" if total_s else "no answer in time")
        except aiohttp.InvalidURL as error:
            return _impossible(error)
        except aiohttp.ClientError as error:
            if isinstance(error, aiohttp.ClientHttpProxyError) and error.status == 407:
                return judge(407, {}, b"", insert_ids, events)
            return Retry("network", in_words(error))
        except (OSError, ConfigError) as error:
            return Retry("network", clean(redacted(str(error))))
        except ValueError as error:
            return _impossible(error)


def _impossible(error: ValueError) -> Halt:
    """The client couldn't even write the request, or look for whom it is for: another address could be."""
    words = f"{type(error).__name__}: {clean(redacted(str(error)))}"
    return Halt(0, f"no request can be made with this address: check [mixpanel] url, and any proxy ({words})")


def in_words(error: aiohttp.ClientError) -> str:
    """Why there was no answer."""
    if type(error) is aiohttp.ClientResponseError:  # whose 400 is aiohttp's own: nobody has sent it
        return f"it doesn't speak HTTP (what it sent can't be read: {clean(redacted(error.message))})"
    if isinstance(error, aiohttp.ClientPayloadError) and "not completed" in str(error):
        return "the answer broke off"
    words = str(error)
    if isinstance(error, aiohttp.ClientConnectorError) and error.strerror is None:
        words = words.replace("[None]", f"[{str(error.os_error) or CLOSED_IN_HANDSHAKE}]")
    # The class is our own word: a long one isn't to be taken for a secret.
    return f"{type(error).__name__}: {clean(redacted(words))}"


def _timeout(total_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s or None, sock_connect=CONNECT_S)


@functools.lru_cache(maxsize=8)
def proxy_for(url: str) -> str | None:
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
        host = (through.hostname or "").encode("idna")
        usable = through.scheme in ("http", "https") and bool(host) and through.port != 0
    except ValueError:
        usable = False
    if not usable:
        name = f"{parts.scheme.upper()}_PROXY"
        raise ConfigError(f"the environment variable {name} is no address of a proxy", "expected http://host:port")
    return proxy


async def read_answer(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer, at most so much of it: what answers may not be Mixpanel."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > _MAX_ANSWER_BYTES:
            break
    return b"".join(chunks)
