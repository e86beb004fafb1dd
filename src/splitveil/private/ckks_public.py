"""The client's half of the sealed engine: keys once a session, encrypted rows out, decrypted answers in."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import NonFiniteError, ProtocolError
from splitveil.private.ckks_library import CONJUGATION, STEPS, forms, library
from splitveil.private.ckks_parameters import FEATURES, INPUT_SCALE, SLOTS, ciphertexts
from splitveil.private.engine import WRONG_LENGTH, Mask, NoMask, Pending, Site
from splitveil.private.published import Publication, PublicLayer

NOT_FINITE = "the input of a private layer is NaN or infinite; an encryption of zero was sent in its place"
_SLACK = 1e-6


class SealedPublic:
    """What a client holds: the publication, and secret keys of its own, drawn anew for every object of this class.

    Raises ``ConfigurationError`` where seal-python is not installed.
    """

    def __init__(self, publication: Publication) -> None:
        self.publication = publication
        self._library = sealing = library()
        self._keys = sealing.seal.KeyGenerator(sealing.context)
        secret = self._keys.secret_key()
        self._encryptor = sealing.seal.Encryptor(sealing.context, secret)
        self._decryptor = sealing.seal.Decryptor(sealing.context, secret)

    def __repr__(self) -> str:
        return f"SealedPublic({len(self.publication.layers)} layers)"

    def __reduce__(self) -> str:
        raise TypeError("a client's half holds its secret keys and is not pickled")

    def keys(self) -> bytes:
        """What the server needs, once a session: a public key and the rotation keys."""
        rotations = self._library.seal.GaloisKeys()
        self._keys.create_galois_keys([*STEPS, CONJUGATION], rotations)
        return bytes(self._keys.create_public_key().to_string()) + bytes(rotations.to_string())

    def site(self, layers: Sequence[int]) -> Site:
        """The view of some layers of equal width. Raises ``ValueError`` if their widths differ."""
        chosen = [self.publication.layers[i] for i in layers]
        if len({layer.width for layer in chosen}) != 1:
            raise ValueError("layers of one site read inputs of one width")
        return SealedSite(self, chosen)

    def encrypt(self, slots: NDArray[np.complex128]) -> bytes:
        """One query ciphertext of these slots (4096,)."""
        plain = self._library.encode(slots, INPUT_SCALE)
        return bytes(self._encryptor.encrypt_symmetric(plain).to_string())

    def decrypt(self, answer: bytes) -> NDArray[np.complex128]:
        """The slots (4096,) of one answer ciphertext. Raises ``ProtocolError``."""
        ciphertext = self._library.load("an answer", "answer", answer)
        slots: NDArray[np.complex128] = self._library.encoder.decode_complex(self._decryptor.decrypt(ciphertext))
        return slots


class SealedSite:
    """One site: some layers that read the same tensor."""

    def __init__(self, half: SealedPublic, layers: Sequence[PublicLayer]) -> None:
        self._half = half
        self._units = [layer.step for layer in layers]
        self.width = layers[0].width
        self.ranks = tuple(layer.rank for layer in layers)
        self._answer = forms()["answer"].size
        sizes = [sealed_row_size(layer) for layer in layers]
        self.query_size, self.answer_size = sizes[0][0], sum(answer for _, answer in sizes)
        self.mask_size = 0

    def make_masks(self, rows: int) -> list[Mask]:
        """Nothing, ``rows`` times: encrypting zero ahead of time would save a hundredth of a row's time."""
        return [NoMask() for _ in range(rows)]

    def query(self, x: NDArray[np.float32], masks: Sequence[Mask]) -> tuple[bytes, Pending]:
        """Encrypts rows of x (rows, width), each scaled to length 1; rows that are zero or not finite as zeros."""
        rows = len(x)
        if x.shape != (rows, self.width) or len(masks) != rows:
            raise ValueError(f"got x of shape {x.shape} and {len(masks)} masks, expected ({rows}, {self.width})")
        factors, sent = np.empty(rows), []
        for i, row in enumerate(x.astype(np.float64)):
            unit, factors[i] = _normalised(row)
            padded = np.zeros(ciphertexts(self.width) * FEATURES)
            padded[: self.width] = unit
            for part in padded.reshape(-1, 2, SLOTS):
                sent.append(self._half.encrypt(part[0] + 1j * part[1]))
        finite = not bool(np.isnan(factors).any())
        return b"".join(sent), Pending(rows, factors, np.empty((rows, 0), np.uint32), finite)

    def recover(self, pending: Pending, answer: bytes) -> list[NDArray[np.float32]]:
        """The layers' outputs ΔW·x: (rows, d_out) float32 each."""
        if len(answer) != pending.rows * self.answer_size:
            raise ProtocolError(WRONG_LENGTH)
        if not pending.finite:
            raise NonFiniteError(NOT_FINITE)
        out, first = [], 0
        for unit, rank in zip(self._units, self.ranks, strict=True):
            values = np.empty((pending.rows, ciphertexts(rank), 2, SLOTS))
            for place in np.ndindex(values.shape[:2]):
                slots = self._half.decrypt(answer[first : first + self._answer])
                values[place] = slots.real, slots.imag
                first += self._answer
            scaled = values.reshape(pending.rows, -1)[:, :rank] * (unit * pending.factors[:, None])
            out.append(scaled.astype(np.float32))
        return out


def sealed_row_size(layer: PublicLayer) -> tuple[int, int]:
    """(query bytes, answer bytes) of one row."""
    sizes = forms()
    return ciphertexts(layer.width) * sizes["query"].size, ciphertexts(layer.rank) * sizes["answer"].size


def _normalised(row: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """(row ÷ its length, that length); (zeros, 0) for zeros, (zeros, NaN) for a row that is not finite.

    What leaves here is at most 1 long, and with that no answer can wrap around; what is not is a defect of this code.
    """
    largest = float(np.abs(row).max())
    if not np.isfinite(largest):
        return np.zeros_like(row), float("nan")
    if largest == 0.0:
        return row, 0.0
    scaled = row / largest
    length = float(np.linalg.norm(scaled))
    unit = scaled / length
    if not abs(float(np.linalg.norm(unit)) - 1) < _SLACK:
        raise ArithmeticError("a query exceeds the no-wrap bound; nothing was sent")
    return unit, largest * length
