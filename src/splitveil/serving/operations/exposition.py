"""Metrics over HTTP, a few requests at a time and each for a few seconds, ended with the server.

The library's own HTTP server takes a thread for every connection, without end: connections that say nothing would be a
way to exhaust this process.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from splitveil.errors import ConfigurationError
from splitveil.serving.address import require_loopback, split_address
from splitveil.serving.ending import end, never
from splitveil.serving.operations.threshold import Threshold
from splitveil.serving.threads import SessionThreads

log = logging.getLogger(__name__)

REQUEST_SECONDS = 2.0
"""For one request, from its connection to the last byte of its answer."""
REQUESTS = 8
"""At once. One more, and the one that has taken longest is cut off: the newest is always served."""
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

    def close(self, hurry: Callable[[], bool] = never) -> None:
        """Ends the threads and stops listening; safe to call twice."""
        self._http.shutdown()
        self._http.server_close()
        self._http.hang_up(hurry)
        end([self._thread], hurry)


class _Http(HTTPServer):
    request_queue_size = 64  # by default 5: strangers could fill that in the time it takes to accept one

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._threshold = Threshold(REQUESTS)
        self._threads = SessionThreads("splitveil-metrics")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # The base class would look its own name up in the DNS.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._threads.submit(self._serve, request, client_address)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        def cut() -> None:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

        try:
            with self._threshold.waiting(REQUEST_SECONDS, cut):
                self.finish_request(request, client_address)
        except OSError:
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request for metrics broke off", exc_info=True)

    def hang_up(self, hurry: Callable[[], bool]) -> None:
        """Whoever is being served may not hold up the end."""
        self._threshold.close()
        self._threads.end(hurry)


class _Handler(BaseHTTPRequestHandler):
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
