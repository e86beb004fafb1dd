"""Metrics over HTTP, one request at a time, ended with the server.

The library's own HTTP server takes a thread for every connection, without end: connections that say nothing would be a
way to exhaust this process.
"""

import contextlib
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from splitveil.errors import ConfigurationError
from splitveil.serving.address import require_loopback, split_address
from splitveil.serving.ending import end

log = logging.getLogger(__name__)

READ_SECONDS = 2.0
PATH = "/metrics"


class Exposition:
    """Serves a registry at ``http://HOST:PORT/metrics`` until closed."""

    def __init__(self, listen: str, registry: CollectorRegistry, *, allow_plaintext: bool) -> None:
        """Raises ``ConfigurationError`` for an address that is malformed, taken, or beyond loopback without leave."""
        host, port = split_address(listen)
        require_loopback(
            host, "serve metrics beyond loopback", allow_plaintext=allow_plaintext, instead="a loopback address"
        )
        try:
            self._http = _Http(host.strip("[]"), port, registry)
        except OSError:
            raise ConfigurationError(f"cannot serve metrics on {listen}: is the port taken?") from None
        self.address = f"{host}:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, name="splitveil-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and stops listening; safe to call twice."""
        self._http.hang_up()
        self._http.shutdown()
        self._http.server_close()
        end([self._thread])


class _Http(HTTPServer):
    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._closing = False
        self._current: socket.socket | None = None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # The base class would look its own name up in the DNS.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self._current = request
        return not self._closing

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request for metrics broke off", exc_info=True)

    def hang_up(self) -> None:
        """Whoever is being served may not hold up the end."""
        self._closing = True
        if self._current is not None:
            with contextlib.suppress(OSError):
                self._current.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = READ_SECONDS
    server: _Http

    def do_GET(self) -> None:
        """The figures, at their one path."""
        if self.path.partition("?")[0] != PATH:
            self.send_error(404)
            return
        encode, kind = choose_encoder(self.headers.get("Accept", ""))
        data = encode(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def version_string(self) -> str:
        """Which Python this is, is nobody's business."""
        return "splitveil"

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no events."""
