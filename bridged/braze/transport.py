"""The one HTTP client call towards Braze: a request out, a verdict back. Every exception of the network is translated here."""

import time
from types import SimpleNamespace
from typing import Self

import aiohttp
from msgspec import Struct

from bridged import __version__
from bridged.braze.requests import Request, Target
from bridged.braze.verdicts import RateLimit, judge, rate_limit
from bridged.connections import Connector
from bridged.delivery.transport import CONNECT_S, in_words, proxy_for, read_answer
from bridged.errors import ConfigError
from bridged.mixpanel.verdicts import Halt, Retry, Verdict, clean
from bridged.redaction import redacted, redacted_bytes

# How many are in flight is the sender's business; the pool only must not be what is waited for.
_MAX_CONNECTIONS = 64


class Outcome(Struct, frozen=True):
    """What became of a request, and what Braze said about the allowance."""

    verdict: Verdict
    rate_limit: RateLimit | None = None
    left: bool = True  # False: nothing of it did, so Braze surely hasn't carried it out


class _Leaving:
    """Whether a request is on its way: what fails before, or in a proxy's CONNECT, costs no data points."""

    def __init__(self) -> None:
        self.left = False

    @staticmethod
    async def note(_session: aiohttp.ClientSession, context: SimpleNamespace, _headers: object) -> None:
        """For aiohttp, which calls it when there is a connection, and before it writes to it."""
        context.trace_request_ctx.left = True


class Transport:
    """A pool of connections to Braze. `use` replaces target and timeout at any time: the next request has the new ones."""

    def __init__(self, target: Target, timeout_s: float) -> None:
        self.target = target
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        """Opens the pool. Raises ConfigError if the environment names a proxy that can't be used."""
        proxy_for(self.target.base)
        tracing = aiohttp.TraceConfig()
        tracing.on_request_headers_sent.append(_Leaving.note)
        self._session = aiohttp.ClientSession(
            connector=Connector(limit=_MAX_CONNECTIONS, ttl_dns_cache=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"bridged/{__version__}"},
            trace_configs=[tracing],
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._session.close()

    def use(self, target: Target, timeout_s: float) -> None:
        """Another target and timeout from the next request on. Raises ConfigError, and changes nothing, as on opening."""
        proxy_for(target.base)
        self.target = target
        self._timeout_s = timeout_s

    async def send(self, request: Request) -> Outcome:
        """Posts one request; never raises but for cancellation."""
        target, total_s, leaving = self.target, self._timeout_s, _Leaving()
        try:
            async with self._session.post(
                target.base + request.path,
                data=request.body,
                headers=target.headers(),
                allow_redirects=False,
                proxy=proxy_for(target.base),
                timeout=aiohttp.ClientTimeout(total=total_s or None, sock_connect=CONNECT_S),
                trace_request_ctx=leaving,
            ) as response:
                # Before anything quotes it, and cuts the quotation off within a secret.
                said = redacted_bytes(await read_answer(response))
                now_s = time.time()
                verdict = judge(
                    response.status,
                    response.headers,
                    said,
                    request.objects,
                    now_s,
                    partner=request.path.startswith("/partners/"),
                )
                return Outcome(verdict, rate_limit(response.headers, now_s))
        except aiohttp.ConnectionTimeoutError:
            why = f"no connection within {CONNECT_S:g} s"
        except TimeoutError:
            why = f"no answer within {total_s:g} s" if total_s else "no answer in time"
            if not leaving.left:
                why = f"no connection within {total_s:g} s"
        except aiohttp.InvalidURL as error:
            return _impossible(error)
        except aiohttp.ClientError as error:
            why = in_words(error)
        except (OSError, ConfigError) as error:
            why = clean(redacted(str(error)))
        except ValueError as error:
            return _impossible(error)
        return Outcome(Retry("network", why), left=leaving.left)


def _impossible(error: ValueError) -> Outcome:
    """The client couldn't even write the request: another key or address could be."""
    words = f"{type(error).__name__}: {clean(redacted(str(error)))}"
    advice = "check [braze] url, and that rest_key is one line of printable characters"
    return Outcome(Halt(0, f"no request can be made with this address and key: {advice} ({words})"), left=False)
