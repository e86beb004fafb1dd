"""``splitveil split serve``: the upper blocks of one base model, for many devices."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from splitveil.serving.address import check_adapter_name
from splitveil.serving.ending import never
from splitveil.serving.gate import Doorkeeper
from splitveil.serving.host import SPARE_CALLS, Host
from splitveil.serving.operations.health import Health
from splitveil.serving.operations.visits import Visits
from splitveil.serving.tls import ServerTLS
from splitveil.split.blocks import find_blocks
from splitveil.splitlearning.checks import DEFAULT_LIMITS, Limits
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.interface import Shape, Trains
from splitveil.splitlearning.service import DEFAULT_RUNS, SILENT_SECONDS, Offer, SplitService
from splitveil.wire import split_codec as codec

DEFAULT_SESSIONS = 32
DEFAULT_TRAINING = 2
"""Sessions that train at once: each has weights, gradients and the optimiser's numbers of its own."""


class SplitServer(Host):
    """Serves the blocks after a cut until closed; a context manager. ``address`` says where.

    What devices send can be read: `splitveil audit` measures how well. In the straight shape labels come along, and
    labels are the text.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        cut: int,
        shape: Shape = Shape.U,
        name: str = "base",
        state: Path | None = None,
        trains: frozenset[Trains] = frozenset({Trains.NOTHING}),
        listen: str = "127.0.0.1:7435",
        tls: ServerTLS | None = None,
        allow_plaintext: bool = False,
        keys: Doorkeeper | None = None,
        sessions: int = DEFAULT_SESSIONS,
        training: int = DEFAULT_TRAINING,
        runs: int = DEFAULT_RUNS,
        silence: float = SILENT_SECONDS,
        limits: Limits = DEFAULT_LIMITS,
        log_identities: bool = False,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """``base`` is only read, and shared by all sessions; those that train copy what they train.

        ``name`` is what API keys call it, ``state`` where checkpoints of runs are kept, ``trains`` what may be trained
        here, ``training`` how many sessions at once may, ``runs`` how many ``state`` keeps, ``silence`` after how many
        seconds without a request, or with an answer that is not taken, a session is ended. ``on_close`` is called once.

        Raises ``ConfigurationError`` as ``Host`` does, and for a cut that the model does not have; ``BaseModelError``
        for a model that cannot be cut.
        """
        super().__init__(listen, tls=tls, allow_plaintext=allow_plaintext)
        check_adapter_name(name)
        LocalCloud(base, cut=cut, shape=shape).close()  # raises now what every session would meet
        self._on_close = on_close
        self._offer = Offer(base, name, cut, shape, len(find_blocks(base)[1]), state, trains, limits, runs)
        self._visits = Visits(sessions, log_identities=log_identities)
        service = SplitService(self._offer, keys, self._visits, sessions + SPARE_CALLS, training, silence)
        health = Health(lambda: self._visits.draining, SPARE_CALLS, ("", codec.METHOD.split("/")[1]))
        self._bound([service, health], sessions)
        self._started()

    def summary(self) -> list[str]:
        """What is served, for the operator to read."""
        offer = self._offer
        kinds = [str(kind) for kind in Trains if kind in offer.trains]
        head = " with norm and head" if offer.shape is Shape.STRAIGHT else "; norm and head are on the device"
        return [
            f"{offer.name}: blocks {offer.cut + 1} to {offer.blocks} of {offer.blocks}{head}; trains {', '.join(kinds)}"
        ]

    def close(self, hurry: Callable[[], bool] = never) -> None:
        """As every host's; ``on_close`` is called, once."""
        super().close(hurry)
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
