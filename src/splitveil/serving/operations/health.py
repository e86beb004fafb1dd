"""The standard health service of gRPC (grpc.health.v1), for load balancers: no key, no names, one bit."""

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from splitveil.wire import codec

METHOD = "/grpc.health.v1.Health/Check"
SERVICES = ("", codec.METHOD.split("/")[1])
"""The whole server, and our service by its name."""


class Health(grpc.GenericRpcHandler):
    """SERVING until ``draining`` says otherwise.

    ``Check`` alone. ``Watch``, which the standard lets a server leave out, would let strangers occupy threads for ever.
    """

    def __init__(self, draining: Callable[[], bool]) -> None:
        self._draining = draining

    def service(self, details: Any) -> Any:
        """gRPC's hook: the handler of a method name, or None."""
        if details.method != METHOD:
            return None
        return grpc.unary_unary_rpc_method_handler(
            self._check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )

    def _check(self, request: Any, context: Any) -> Any:
        if request.service not in SERVICES:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        status = health_pb2.HealthCheckResponse
        return status(status=status.NOT_SERVING if self._draining() else status.SERVING)
