"""The cloud at the other end of a network, as the device sees it."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from splitveil.errors import ConfigurationError, ProtocolError, RefusedError, VersionError
from splitveil.serving.address import require_loopback, split_address
from splitveil.serving.stream import Stream, Traffic
from splitveil.serving.tls import ClientCredentials, ClientTLS
from splitveil.split import Crossing
from splitveil.splitlearning.agreement import sent_plan, shape_number, token_bytes
from splitveil.splitlearning.carrying import fits, packed, pieces, request_of, scattered, unpacked
from splitveil.splitlearning.halves import fingerprint, vocabulary_of, width_of
from splitveil.splitlearning.interface import Plan, Shape
from splitveil.wire import split_codec as codec
from splitveil.wire.split_codec import Kind, Request

ANSWER_SECONDS = 600.0
"""Without any answer for so long, a cloud counts as dead; a large micro-batch takes its time."""


class RemoteCloud:
    """One session with ``splitveil split serve``: ``interface.Cloud`` over a network.

    One call at a time. A call that fails other than by ``RefusedError`` ends the session, and every later call fails
    with the same error.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        address: str,
        *,
        cut: int,
        shape: Shape,
        plan: Plan | None = None,
        token: str | None = None,
        steps: Collection[int] = (),
        api_key: str | None = None,
        tls: ClientTLS | None = None,
        allow_plaintext: bool = False,
        patience: float = ANSWER_SECONDS,
    ) -> None:
        """``base`` is this side's model, as the cloud has it: the public one, not a personalised copy.

        ``plan`` and ``token`` name a run of training, and ``steps`` the checkpoints that this side has of it; without a
        plan the token's run is used as it was last saved.

        Raises ``ConnectionFailedError``, ``VersionError``, ``KeyRejectedError``, ``RefusedError`` for a cloud that has
        another model or cut or does not train so, ``ProtocolError``, and ``ConfigurationError`` for an address beyond
        this machine without TLS, unless ``allow_plaintext``.
        """
        host, _ = split_address(address)
        if tls is None:
            require_loopback(
                host, "connect beyond loopback", allow_plaintext=allow_plaintext, instead="--tls or --tls-ca FILE"
            )
        if plan is not None and (plan.cut, plan.shape) != (cut, shape):
            raise ConfigurationError(f"the plan is for cut {plan.cut} in the {plan.shape} shape")
        self.address = address
        self._shape = shape
        self._width, self._vocabulary = width_of(base), vocabulary_of(base)
        self._pending: Tensor | None = None  # text of a forward whose backward is due
        hello = codec.Hello(
            codec.VERSION,
            bytes.fromhex(fingerprint(base)),
            cut,
            shape_number(shape),
            None if plan is None else sent_plan(plan),
            b"" if token is None else token_bytes(token),
            tuple(sorted(steps))[-codec.MAX_STEPS :],
            api_key or "",
        )
        credentials = None if tls is None else ClientCredentials.read(tls)
        self._stream = Stream(address, hello, credentials, wire=codec, patience=patience)
        try:
            self.welcome = self._welcome(steps)
            self._stream.start_answers()
        except BaseException:
            self.close()
            raise

    @property
    def start(self) -> int:
        """The step that both sides go on from; 0 for a new run."""
        return self.welcome.step

    @property
    def traffic(self) -> Traffic:
        """Bytes of all messages so far."""
        return self._stream.traffic

    # -- generation and evaluation -----------------------------------------------------------------------------------

    def extend(self, crossing: Crossing) -> Tensor:
        """As ``interface.Cloud``: logits (batch, vocabulary) or hidden states (batch, width) of the last position.

        A prompt that is larger than a message goes piece by piece: the cloud keeps what it has seen.
        """
        batch = crossing.hidden.shape[0]
        width = self.welcome.vocabulary if self._shape is Shape.STRAIGHT else self._width
        for piece in pieces(crossing):
            result = self._rows(self._call(piece, Kind.EXTEND, replied=batch * width), batch, width)
        return result

    def restart(self) -> None:
        """Empties the session's cache."""
        self._plain(Kind.RESTART)

    def evaluate(self, crossing: Crossing, labels: Tensor | None) -> tuple[Tensor | None, float]:
        """As ``interface.Cloud``: (None, summed loss), or (hidden states, NaN)."""
        result = self._call(crossing, Kind.EVALUATE, labels)
        if self._shape is Shape.STRAIGHT:
            return None, self._loss(result)
        return self._states(result, crossing.text), math.nan

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, crossing: Crossing, labels: Tensor | None, normaliser: float) -> tuple[Tensor, float]:
        """As ``interface.Cloud``: (gradient by the states, loss), or (hidden states, NaN)."""
        result = self._call(crossing, Kind.FORWARD, labels, normaliser)
        back = self._states(result, crossing.text)
        if self._shape is Shape.STRAIGHT:
            return back, self._loss(result)
        self._pending = crossing.text
        return back, math.nan

    def backward(self, gradient: Tensor) -> Tensor:
        """As ``interface.Cloud``: the gradient by the states that crossed."""
        text = self._pending
        if text is None or gradient.shape[:2] != text.shape:
            raise RefusedError("a gradient without a forward that it belongs to")
        if bool(gradient[~text].any()):
            raise ConfigurationError("the gradient is not zero at positions without text, which do not travel")
        rows = packed(gradient[text])
        result = self._ask(lambda seq: Request(seq, Kind.BACKWARD, rows))
        self._pending = None
        return self._states(result, text)

    def step(self, rate: float) -> None:
        """One step of the cloud's optimiser."""
        self._plain(Kind.STEP, number=rate)

    def discard(self) -> None:
        """Forgets what was accumulated since the last step."""
        self._plain(Kind.DISCARD)
        self._pending = None

    def save(self, step: int) -> None:
        """The cloud keeps its part as it is; it is on its disk when this returns."""
        self._plain(Kind.SAVE, step=step)

    def close(self) -> None:
        """Ends the session; safe to call twice."""
        self._stream.close()

    # -- the wire ----------------------------------------------------------------------------------------------------

    def _welcome(self, steps: Collection[int]) -> codec.Welcome:
        message = self._stream.receive()
        if not isinstance(message, codec.Welcome):
            raise ProtocolError("the server did not begin with Welcome")
        if message.version != codec.VERSION:
            raise VersionError(f"the server speaks protocol version {message.version}, this client {codec.VERSION}")
        if (message.width, message.vocabulary) != (self._width, self._vocabulary):
            raise ProtocolError(
                f"the server announces states of {message.width} numbers and {message.vocabulary} tokens, this base "
                f"has {self._width} and {self._vocabulary}"
            )
        if message.step != 0 and message.step not in steps:
            raise ProtocolError(f"the server would go on from step {message.step}, which this device does not have")
        return message

    def _call(
        self, crossing: Crossing, kind: Kind, labels: Tensor | None = None, number: float = 0.0, replied: int = 0
    ) -> codec.Result:
        texts, positions, width = crossing.hidden.shape
        if not fits(replied, 1):
            raise ConfigurationError(f"the answer for {texts} texts is larger than a message; use a smaller batch")
        if not fits(texts * positions, width):
            raise ConfigurationError(
                f"{texts} texts of {positions} positions are larger than a message; use a smaller batch"
            )
        request = request_of(0, kind, crossing, labels, number)
        return self._ask(lambda seq: replace(request, seq=seq), texts * positions)

    def _plain(self, kind: Kind, *, number: float = 0.0, step: int = 0) -> None:
        result = self._ask(lambda seq: Request(seq, kind, number=number, step=step))
        if result.tensor is not None:
            self._broken(f"{kind.name.lower()} came back with numbers")

    def _ask(self, make: Callable[[int], Request], rows: int = 0) -> codec.Result:
        reply: codec.Result | codec.Refusal = self._stream.wait(self._stream.ask(make, rows))
        if isinstance(reply, codec.Refusal):
            raise RefusedError(f"the server refused: {reply.message}")
        return reply

    def _states(self, result: codec.Result, text: Tensor) -> Tensor:
        return scattered(self._rows(result, int(text.sum()), self._width), text)

    def _rows(self, result: codec.Result, count: int, width: int) -> Tensor:
        if result.tensor is None:
            self._broken("it has no numbers")
        try:
            return unpacked(result.tensor, count, width)
        except ProtocolError as error:
            self._broken(str(error))

    def _loss(self, result: codec.Result) -> float:
        if not math.isfinite(result.loss) or result.loss < 0:
            self._broken("it has no loss, or one that cannot be")
        return result.loss

    def _broken(self, what: str) -> NoReturn:
        """What answers so is not to be trusted with another message."""
        self.close()
        raise ProtocolError(f"the server's answer breaks the format: {what}") from None
