"""TLS for the doors that listen on TCP."""

import ssl

from bridged.errors import ConfigError

# A handshake takes two round trips; who needs longer is not a client.
HANDSHAKE_S = 10.0


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
            f"[{section}] tls_cert = {cert!r} and tls_key = {key!r} can't be used: {error}",
            "PEM files that the daemon may read: the certificate with its chain, and its private key, unencrypted",
        ) from error
    return context
