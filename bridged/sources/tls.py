"""TLS for the doors that listen on TCP."""

import asyncio
import ssl
from typing import Any

from bridged.errors import ConfigError, about_pem

# A handshake takes two round trips; who needs longer is not a client.
HANDSHAKE_S = 10.0
# So long we wait for the client's goodbye after ours; by then it has the answer that stands before it.
_GOODBYE_S = 1.0


def options(context: ssl.SSLContext | None) -> dict[str, Any]:
    """What a listener is to be made with."""
    if context is None:
        return {}
    return {"ssl": context, "ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": _GOODBYE_S}


def server_context(section: str, cert: str, key: str) -> ssl.SSLContext | None:
    """What a listener speaks TLS with; None without a certificate.

    `cert` is a PEM file with the certificate and its chain, `key` one with its private key. Raises ConfigError, which names
    the keys of `section`, for files that can't be used.
    """
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An encrypted key would be asked for at the terminal.
        context.load_cert_chain(cert, key, password=b"")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"[{section}] tls_cert = {cert!r} and tls_key = {key!r} can't be used: {error}", about_pem(error)
        ) from error
    return context


def stop_reading(transport: asyncio.Transport, *, within_read: bool) -> None:
    """Has TCP make the client wait. `within_read`: called by what uvloop calls with data.

    `pause_reading` would only keep what is read from us, and uvloop drops it, still encrypted, when the end comes after it.
    The bound of its buffer stops the socket itself: when more waits in it than `high`, until that is as little as `low`.
    Both are 0, so each look turns it over; and after a read uvloop looks once more.
    """
    if not transport.is_closing():
        start_reading(transport)
        transport.set_read_buffer_limits(high=0)  # type: ignore[attr-defined]  # uvloop's
        if within_read and not transport.get_read_buffer_size():  # type: ignore[attr-defined]  # uvloop's
            transport.set_read_buffer_limits(high=0)  # type: ignore[attr-defined]  # uvloop's


def start_reading(transport: asyncio.Transport) -> None:
    """Lets it come again."""
    if not transport.is_closing():
        transport.set_read_buffer_limits()  # type: ignore[attr-defined]  # uvloop's
