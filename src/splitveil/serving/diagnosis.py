"""Why a connection did not come about: gRPC hides it, so the same handshake is tried again by the standard library.

Nothing of the session is sent, no API key above all, and no step of it waits longer than ``PROBE_SECONDS``.
"""

import contextlib
import socket
import ssl
from collections.abc import Iterator

from splitveil.errors import ConnectionFailedError
from splitveil.serving.address import split_address
from splitveil.serving.tls import ALPN, ClientCredentials

PROBE_SECONDS = 3.0

# OpenSSL's verify codes (x509_vfy.h).
_NOT_YET, _EXPIRED = 9, 10
_UNKNOWN = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4  # type of the frame with which every HTTP/2 server begins


def diagnose(address: str, credentials: ClientCredentials | None) -> ConnectionFailedError | None:
    """What stood between this client and the server, or None if that is not about TLS."""
    host, port = split_address(address)
    if credentials is None:
        if _speaks_tls(host, port):
            return ConnectionFailedError(
                f"the server at {address} speaks TLS, and this client was told to connect without it; connect with "
                "TLS (--tls, or --tls-ca FILE for an authority of the vendor's own)"
            )
        return None
    try:
        context = credentials.context()
        with _connection(host, port) as plain, context.wrap_socket(plain, server_hostname=host.strip("[]")) as one:
            if _begins(one):
                return None
    except ssl.SSLCertVerificationError as error:
        return ConnectionFailedError(_unverified(address, host, error))
    except ssl.SSLError:
        return ConnectionFailedError(_no_handshake(address, host, port))
    except OSError:
        return None
    # The handshake was finished for this side, and the server hung up on what it saw then: our certificate.
    if credentials.chain is None:
        return ConnectionFailedError(
            f"the server at {address} asks for a certificate of this client; give the one that the vendor issued "
            "(--tls-cert, --tls-key)"
        )
    return ConnectionFailedError(
        f"the server at {address} refused this client's certificate {credentials.files.certificate}: it has expired "
        "there, or is not of an authority that the server trusts; ask the vendor for another"
    )


def _begins(one: ssl.SSLSocket) -> bool:
    """Whether the server says something after the handshake, or at least does not hang up."""
    try:
        return one.recv(1) != b""
    except TimeoutError:
        return True
    except (ssl.SSLError, ConnectionError):
        return False


def _unverified(address: str, host: str, error: ssl.SSLCertVerificationError) -> str:
    match error.verify_code:
        case code if code == _EXPIRED:
            return f"the certificate of the server at {address} has expired (or this machine's clock is wrong)"
        case code if code == _NOT_YET:
            return f"the certificate of the server at {address} is not valid yet (or this machine's clock is wrong)"
        case code if code in _OTHER_NAME:
            return f"the certificate of the server at {address} is for another host, not for {host}"
        case code if code in _UNKNOWN:
            return (
                f"the certificate of the server at {address} is of an authority that is not trusted here; if it is "
                "the vendor's own, get its certificate from the vendor and give it with --tls-ca"
            )
    return f"the certificate of the server at {address} was not accepted: {error.verify_message}"


def _no_handshake(address: str, host: str, port: int) -> str:
    if _speaks_plaintext(host, port):
        return f"the server at {address} speaks plaintext, and this client was told to use TLS"
    return f"what answers at {address} does not finish a TLS handshake; is it a Splitveil server?"


def _speaks_tls(host: str, port: int) -> bool:
    """Whether a handshake succeeds, with whatever certificate: nothing is entrusted to this connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(ALPN)
    try:
        with _connection(host, port) as plain, context.wrap_socket(plain):
            return True
    except OSError:  # SSLError is one
        return False


def _speaks_plaintext(host: str, port: int) -> bool:
    """Whether the first frame of HTTP/2 comes without TLS."""
    try:
        with _connection(host, port) as one:
            one.sendall(_HTTP2)
            head = b""
            while len(head) < 9 and (more := one.recv(9 - len(head))):
                head += more
    except OSError:
        return False
    return len(head) == 9 and head[3] == _SETTINGS and head[5:] == bytes(4)


@contextlib.contextmanager
def _connection(host: str, port: int) -> Iterator[socket.socket]:
    with socket.create_connection((host.strip("[]"), port), timeout=PROBE_SECONDS) as one:
        yield one
