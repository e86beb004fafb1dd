"""The standard health service of gRPC (grpc.health.v1), for load balancers: no key, no names, one bit."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from splitveil.serving.operations.threshold import Threshold
from splitveil.wire import codec

METHOD = "/grpc.health.v1.Health/Check"
SERVICES = ("", codec.METHOD.split("/")[1])
"""The whole server, and our service by its name."""
CHECK_SECONDS = 3.0
"""A check whose request has not come by then is ended."""


class Health(grpc.GenericRpcHandler):
    """SERVING until ``draining`` says otherwise.

    ``Check`` alone. ``Watch``, which the standard lets a server leave out, would let strangers occupy threads for ever.
    """

    def __init__(self, draining: Callable[[], bool], most: int, services: Collection[str] = SERVICES) -> None:
        """``draining()`` is what is told; at most so many checks wait for their request."""
        self._services = services
        self._draining = draining
        self._threshold = Threshold(most)

    def service(self, details: Any) -> Any:
        """gRPC's hook: the handler of a method name, or None."""
        if details.method != METHOD:
            return None
        # One request and one response, as on the wire of a unary method; but gRPC's own handler of those waits for a
        # request that never comes without end, and out of our reach.
        return grpc.stream_unary_rpc_method_handler(
            self._check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )

    def _check(self, requests: Iterator[Any], context: Any) -> Any:
        request: Any = None
        with self._threshold.waiting(CHECK_SECONDS, context.cancel):
            request = next(requests, None)
        if request is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{METHOD} requires exactly one request message")
        if request.service not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        status = health_pb2.HealthCheckResponse
        return status(status=status.NOT_SERVING if self._draining() else status.SERVING)
