"""TLS for both sides: what people configure, and what gRPC wants.

The server shows a certificate; with ``client_ca`` set, clients must show one, too (mutual TLS). What *names* a client
stays its API key: a certificate only opens the transport.
"""

import ssl
import threading
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import grpc

from splitveil.errors import ConfigurationError
from splitveil.serving.certificates import expiry, read_authorities, read_pair, system_authorities

File = str | PathLike[str]
ALPN = ["h2"]


@dataclass(frozen=True)
class ServerTLS:
    """Files of a server, in PEM form: its certificate with what leads to the authority, and its key.

    With ``client_ca``, only clients that show a valid certificate of that authority are let in.
    """

    certificate: File
    key: File
    client_ca: File | None = None


@dataclass(frozen=True)
class ClientTLS:
    """Files of a client, in PEM form. Without ``ca`` the authorities that this machine trusts are trusted.

    ``certificate`` and ``key`` are shown to servers that ask for them (mutual TLS).
    """

    ca: File | None = None
    certificate: File | None = None
    key: File | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError("a client's certificate and its key come together: give both, or neither")


class ServerCredentials:
    """A server's certificate, which can be renewed while the server runs."""

    def __init__(self, files: ServerTLS) -> None:
        """Raises ``ConfigurationError`` as ``certificates.read_pair`` does."""
        if not isinstance(files, ServerTLS):
            raise ConfigurationError("tls is a splitveil.serving.tls.ServerTLS: ServerTLS('server.crt', 'server.key')")
        self._files = files
        self._lock = threading.Lock()
        self._fresh: grpc.ServerCertificateConfiguration | None = None
        configuration = self._read()
        # gRPC asks for news at every handshake; None, which its type stubs leave out, says that there are none.
        news: Any = self._news
        self.grpc = grpc.dynamic_ssl_server_credentials(configuration, news, files.client_ca is not None)

    @property
    def mutual(self) -> bool:
        """Whether clients must show a certificate."""
        return self._files.client_ca is not None

    def renew(self) -> None:
        """Reads the files again, for connections from now on. Raises ``ConfigurationError`` and changes nothing."""
        fresh = self._read()
        with self._lock:
            self._fresh = fresh

    def _news(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            fresh, self._fresh = self._fresh, None
        return fresh

    def _read(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        chain, key, leaf = read_pair(Path(files.certificate), Path(files.key))
        authority = None if files.client_ca is None else read_authorities(Path(files.client_ca))
        self.expires = expiry(leaf)
        return grpc.ssl_server_certificate_configuration([(key, chain)], authority)


@dataclass(frozen=True)
class ClientCredentials:
    """The contents of a client's files, checked."""

    files: ClientTLS
    authorities: bytes = field(repr=False)
    chain: bytes | None = field(repr=False)
    key: bytes | None = field(repr=False)

    @classmethod
    def read(cls, files: ClientTLS) -> "ClientCredentials":
        """Raises ``ConfigurationError`` for what cannot be read or used, a certificate that has expired included."""
        if not isinstance(files, ClientTLS):
            raise ConfigurationError("tls is a splitveil.serving.tls.ClientTLS: ClientTLS(), or ClientTLS('ca.pem')")
        authorities = system_authorities() if files.ca is None else read_authorities(Path(files.ca))
        if files.certificate is None or files.key is None:
            return cls(files, authorities, None, None)
        chain, key, _ = read_pair(Path(files.certificate), Path(files.key))
        return cls(files, authorities, chain, key)

    def grpc(self) -> grpc.ChannelCredentials:
        """For a secure channel."""
        return grpc.ssl_channel_credentials(self.authorities, self.key, self.chain)

    def context(self) -> ssl.SSLContext:
        """The same for the standard library, with the checks that gRPC makes. Raises ``OSError`` for vanished files."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(ALPN)
        # Bundles have comments between certificates, in any language; the standard library takes ASCII only.
        context.load_verify_locations(cadata=self.authorities.decode("ascii", "ignore"))
        if self.files.certificate is not None and self.files.key is not None:
            context.load_cert_chain(self.files.certificate, self.files.key)
        return context
