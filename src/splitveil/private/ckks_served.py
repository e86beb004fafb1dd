"""The vendor's half of the sealed engine: B(Ax) under a client's keys, and what makes the answer tell nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from splitveil.errors import ProtocolError
from splitveil.lattice.randomness import secret_normals
from splitveil.private.ckks_library import ERRORS, forms, library
from splitveil.private.ckks_parameters import DROPPED_BEFORE_NOISE, FLOOD, SLOTS, ciphertexts


@dataclass(frozen=True)
class SealedLayer:
    """One layer's weights as plaintexts; secret. None stands for a plaintext of zeros, which SEAL does not multiply."""

    width: int
    outputs: int
    rank: int
    """k: a power of two."""
    a: list[list[Any]] = field(repr=False)
    """[diagonal][input ciphertext]"""
    b: list[list[list[Any]]] = field(repr=False)
    """[output ciphertext][giant step][baby step]"""


class SealedServed:
    """All layers of one adapter. Answers need a client's keys: ``opened`` has them."""

    def __init__(self, layers: Sequence[SealedLayer]) -> None:
        self.layers = tuple(layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers)"

    def __reduce__(self) -> str:
        raise TypeError("a served half holds the vendor's secrets and is not pickled")

    @property
    def key_size(self) -> int:
        """Bytes that a session uploads before its first query."""
        return forms()["public key"].size + forms()["rotation keys"].size

    def opened(self, keys: bytes, *, insecure_unprotected: bool = False) -> "SealedSession":
        """The half as it answers the client whose keys these are. Raises ``ProtocolError`` for keys that are none.

        ``insecure_unprotected`` leaves out all that protects the weights: it is there for the attacks in the tests.
        """
        if len(keys) != self.key_size:
            raise ProtocolError(f"keys of {len(keys)} bytes; expected {self.key_size}")
        return SealedSession(self.layers, keys, insecure_unprotected=insecure_unprotected)

    def check(self, layers: Sequence[int], rows: int, size: int) -> None:
        """Raises ``ProtocolError``, with one constant text each, unless the query fits."""
        if not layers or len(set(layers)) != len(layers) or not all(0 <= i < len(self.layers) for i in layers):
            raise ProtocolError("the query names a layer that the publication does not have, or one twice, or none")
        widths = {self.layers[i].width for i in layers}
        if len(widths) != 1:
            raise ProtocolError("the query names layers of different input widths")
        if rows < 1 or size != rows * ciphertexts(widths.pop()) * forms()["query"].size:
            raise ProtocolError("the query's length does not fit its layers and rows")

    def answer(self, layers: Sequence[int], rows: int, query: bytes) -> bytes:
        """Raises ``ProtocolError``: without a client's keys there is no answer."""
        raise ProtocolError("the sealed engine answers nothing before the client's keys are there")


class SealedSession(SealedServed):
    """The served half of one session, with its client's keys. Safe for several threads."""

    def __init__(self, layers: Sequence[SealedLayer], keys: bytes, *, insecure_unprotected: bool) -> None:
        super().__init__(layers)
        self._unprotected = insecure_unprotected
        self._library = sealing = library()
        first = forms()["public key"].size
        public_key = sealing.load("a public key", "public key", keys[:first])
        self._rotations = sealing.load("rotation keys", "rotation keys", keys[first:])
        self._encryptor = sealing.seal.Encryptor(sealing.context, public_key)

    def answer(self, layers: Sequence[int], rows: int, query: bytes) -> bytes:
        """The layers' answers, one by one: for each row, as many ciphertexts as its outputs take.

        Raises ``ProtocolError`` for a query that does not fit, and for ciphertexts that SEAL does not compute with.
        """
        self.check(layers, rows, len(query))
        size = forms()["query"].size
        read = [self._library.load("a query", "query", query[at : at + size]) for at in range(0, len(query), size)]
        each = len(read) // rows
        inputs = [read[at : at + each] for at in range(0, len(read), each)]
        try:
            return b"".join(
                self._sendable(total) for index in layers for row in inputs for total in self.evaluate(index, row)
            )
        except ERRORS:  # a second polynomial that is, or becomes, zero: nothing is encrypted there
            raise ProtocolError("a query that SEAL does not evaluate: it is not encrypted") from None

    def evaluate(self, index: int, inputs: Sequence[Any]) -> list[Any]:
        """A layer's bare sums, one for each output ciphertext, None for zero: not to be sent as they are."""
        layer, evaluator = self.layers[index], self._library.evaluator
        total: Any = None
        # Rotating after multiplying: noise of a rotation that came before would be multiplied by A.
        for diagonal in reversed(layer.a):
            if total is not None:
                total = self._rotated(total, 1)
            total = self._sum(total, diagonal, inputs)
        if total is None:
            return [None] * len(layer.b)
        step = layer.rank
        while step < SLOTS:
            evaluator.add_inplace(total, self._rotated(total, step))
            step *= 2
        # Twice the real part: whatever the slots held, what goes on is A times one real row.
        evaluator.add_inplace(total, evaluator.complex_conjugate(total, self._rotations))
        babies = [total]
        while len(babies) < len(layer.b[0][0]):
            babies.append(self._rotated(babies[-1], 1))
        return [self._stepped(giants, babies) for giants in layer.b]

    def _stepped(self, giants: list[list[Any]], babies: list[Any]) -> Any:
        """B's product for one output ciphertext, at the scale and modulus at which noise is added."""
        total: Any = None
        for plains in reversed(giants):
            if total is not None:
                total = self._rotated(total, len(babies))
            total = self._sum(total, plains, babies)
        if total is not None:
            for _ in range(DROPPED_BEFORE_NOISE):
                self._library.evaluator.rescale_to_next_inplace(total)
            total.scale(self._library.noise_scale)
        return total

    def _sum(self, total: Any, plains: Sequence[Any], ciphertexts_: Sequence[Any]) -> Any:
        """``total`` plus the products; None for zero."""
        terms = [] if total is None else [total]
        for plain, ciphertext in zip(plains, ciphertexts_, strict=True):
            if plain is not None:
                terms.append(self._library.evaluator.multiply_plain(ciphertext, plain))
        return self._library.evaluator.add_many(terms) if terms else None

    def _rotated(self, ciphertext: Any, step: int) -> Any:
        return self._library.evaluator.rotate_vector(ciphertext, step, self._rotations)

    def _sendable(self, total: Any) -> bytes:
        """A bare sum as it is sent: with an encryption of zero and noise, modulo the smallest modulus."""
        sealing, evaluator = self._library, self._library.evaluator
        if total is None or not self._unprotected:
            zero = self._encryptor.encrypt_zero(sealing.levels[1])
            zero.scale(sealing.noise_scale)
            if total is not None:
                evaluator.add_inplace(zero, total)
            total = zero
        if not self._unprotected:
            evaluator.add_plain_inplace(total, sealing.encode(noise(), sealing.noise_scale, level=1))
        evaluator.rescale_to_next_inplace(total)
        total.scale(sealing.answer_scale)
        return bytes(total.to_string())


def noise() -> np.typing.NDArray[np.complex128]:
    """What floods one answer ciphertext: independent Gaussians in the components of all slots, (4096,).

    The same as independent Gaussians of 2^42.5 units in all coefficients; there a double still tells units apart.
    """
    return (FLOOD * secret_normals(2 * SLOTS)).view(np.complex128)
