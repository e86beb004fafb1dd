"""One gRPC method that is a bidirectional stream, a session each: how it begins, and how it may end."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from splitveil.errors import ProtocolError
from splitveil.serving.gate import Rejected
from splitveil.serving.operations.threshold import Threshold
from splitveil.serving.operations.visits import Visit, Visits

HELLO_SECONDS = 20.0


class Conversations(grpc.GenericRpcHandler):
    """The single method of a service, with bytes in and out: decoding, and its limits, are the codec's."""

    def __init__(self, method: str, visits: Visits, silent: int) -> None:
        """``silent`` is how many may be connected that have not said anything yet."""
        self._method = method
        self._visits = visits
        self._threshold = Threshold(silent)

    def service(self, details: Any) -> Any:
        """gRPC's hook: the handler of a method name, or None."""
        return grpc.stream_stream_rpc_method_handler(self._session) if details.method == self._method else None

    @abstractmethod
    def _serve(
        self, first: bytes, requests: Iterator[bytes], visit: Visit, hang_up: Callable[[], object]
    ) -> Iterator[bytes]:
        """One session; ``hang_up()`` ends it at once. Raises ``Rejected`` and ``ProtocolError``."""

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        visit = self._visits.enter()
        reason, detail = "silent", ""
        try:
            self._visits.require_running()
            with self._threshold.waiting(HELLO_SECONDS, context.cancel):
                first = next(requests, None)
            if first is not None:
                reason = "error"
                yield from self._serve(first, requests, visit, context.cancel)
                reason = "left"
        except (grpc.RpcError, GeneratorExit):
            reason = "left" if visit.adapter else reason
            raise
        except Rejected as rejected:
            reason = rejected.reason
            context.abort(rejected.status, str(rejected))
        except ProtocolError as error:
            reason, detail = "malformed", str(error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            if visit.overdue:  # however the end of the wait has shown itself: to gRPC a call that is cut may just end
                reason, detail = "silent", ""
            self._visits.leave(visit, reason, detail)
