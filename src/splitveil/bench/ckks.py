"""The peer: one token through one LoRA layer with SEAL's CKKS, the weights in the clear at the server.

An *unprotected* evaluation, there to measure speed: nothing re-randomises or floods the answer, so its slots and its
ciphertext noise tell the client about the weights (ePrint 2023/301; SECURITY.md of Lattigo on circuit privacy).
Scheme: Cheon, Kim, Kim, Song, ASIACRYPT 2017. N and the moduli lie within the 128 bits of the homomorphic encryption
standard's table, which SEAL enforces.

Layout: x repeats through the N/2 slots. A enters as its r generalised diagonals ``A[i mod r, i + k]`` (Halevi, Shoup,
CRYPTO 2014; short and wide matrices: GAZELLE, USENIX Security 2018), summed in baby and giant steps. Folding by halves
then leaves ``(Ax)[i mod r]`` in slot i, and r diagonals of B follow, outputs past N/2 in the imaginary parts.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from splitveil.errors import ConfigurationError, NonFiniteError
from splitveil.private.ckks_layout import baby_steps, power_of_two, stepped
from splitveil.private.ckks_library import seal_module

DEGREE = 8192
SLOTS = DEGREE // 2
MODULI = (50, 40, 40, 50)  # bits; the last one serves key switching only
SCALE = 2.0**40
RANKS = 256  # beyond, encoded diagonals and rotation keys grow past what a benchmark should hold
# Bound of the answer's real and imaginary parts: √2 · 2^8 · SCALE stays below half of the last modulus left, 2^49.
HEADROOM = 2.0**8


def available() -> bool:
    """Whether seal-python can be imported."""
    try:
        seal_module()
    except ConfigurationError:
        return False
    return True


class CkksLayer:
    """``x ↦ B(Ax)`` under encryption: the client (:meth:`encrypt`, :meth:`decrypt`) and the server (:meth:`answer`).

    Both sides live in one object, and SEAL runs in the caller's thread. Everything is scaled so that no x can make an
    answer wrap; the one number which undoes that, a product of norms of A and B, is the client's to know.
    """

    def __init__(self, A: ArrayLike, B: ArrayLike) -> None:
        """Makes keys and encodes the weights.

        Args:
            A: ``(r, d_in)``, with d_in at most 4096 and r at most 256.
            B: ``(d_out, r)``, with d_out at most 8192.

        Raises:
            ConfigurationError: seal is missing, shapes do not fit each other or the layout, A or B is zero.
            NonFiniteError: a weight is NaN or infinite.
        """
        a, b = _weights("A", A), _weights("B", B)
        rank, self.d_in = a.shape
        self.d_out = b.shape[0]
        if b.shape[1] != rank:
            raise ConfigurationError(f"A has {rank} rows and B has {b.shape[1]} columns: they must be equal")
        for name, got, most in (("d_in", self.d_in, SLOTS), ("d_out", self.d_out, 2 * SLOTS), ("rank", rank, RANKS)):
            if got > most:
                raise ConfigurationError(f"the CKKS peer's layout holds {name} up to {most}, got {got}")
        self._k = power_of_two(rank)
        self._period = max(self._k, power_of_two(self.d_in))
        self._babies = baby_steps(self._k)

        self._seal = seal = seal_module()
        parameters = seal.EncryptionParameters(seal.scheme_type.ckks)
        parameters.set_poly_modulus_degree(DEGREE)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(MODULI)))
        self._context = seal.SEALContext(parameters)
        keys = seal.KeyGenerator(self._context)
        self._encryptor = seal.Encryptor(self._context, keys.secret_key())
        self._decryptor = seal.Decryptor(self._context, keys.secret_key())
        self._encoder = seal.CKKSEncoder(self._context)
        self._evaluator = seal.Evaluator(self._context)

        self._folds = [self._k << i for i in range((self._period // self._k).bit_length() - 1)]
        steps = {*range(1, self._babies), *range(self._babies, self._k, self._babies), *self._folds}
        self._rotations = seal.GaloisKeys()
        keys.create_galois_keys(sorted(steps), self._rotations)
        # ‖Ax‖₂ ≤ ‖A‖₂·‖x‖₂, and x is sent with ‖x‖₂ = √period; rows of B have norms of at most 1.
        norm_a, norm_b = float(np.linalg.norm(a, 2)), float(np.linalg.norm(b, axis=1).max())
        self._unit = norm_a * norm_b / HEADROOM
        wide = np.zeros((self._k, self._period))
        wide[:rank, : self.d_in] = a * (HEADROOM / (norm_a * self._period**0.5))
        tall = np.zeros((2 * SLOTS, self._k))
        tall[: self.d_out, :rank] = b / norm_b
        self._a = self._diagonals(wide, 0)
        self._b = self._diagonals(tall[:SLOTS] + 1j * tall[SLOTS:], 1)

    @property
    def key_bytes(self) -> int:
        """Size of the rotation keys, which the client sends once."""
        return len(self._rotations.to_string())

    def encrypt(self, x: ArrayLike) -> tuple[bytes, float]:
        """The client: the query for x ``(d_in,)``, and x's norm, which stays here until :meth:`decrypt`.

        Raises:
            ConfigurationError: x has another shape.
            NonFiniteError: x holds NaN or infinity.
        """
        values = np.asarray(x, dtype=np.float64)
        if values.shape != (self.d_in,):
            raise ConfigurationError(f"x has shape {values.shape}, expected ({self.d_in},)")
        largest = float(np.abs(values).max())
        if not np.isfinite(largest):
            raise NonFiniteError("x holds NaN or infinity")
        values = values / (largest or 1.0)
        norm = float(np.linalg.norm(values)) or 1.0
        padded = np.zeros(self._period)
        padded[: self.d_in] = values * (self._period**0.5 / norm)
        plain = self._encoder.encode(np.tile(padded, SLOTS // self._period), SCALE)
        return self._encryptor.encrypt_symmetric(plain).to_string(), largest * norm

    def answer(self, query: bytes) -> bytes:
        """The server: query to answer, both serialised (SEAL's format, uncompressed, not seeded)."""
        return bytes(self.evaluate(self.load(query)).to_string())

    def load(self, message: bytes) -> Any:
        """A ciphertext from its bytes, checked by SEAL against the parameters."""
        ciphertext = self._seal.Ciphertext()
        ciphertext.load_bytes(self._context, message)
        return ciphertext

    def evaluate(self, query: Any) -> Any:
        """The server's evaluation alone, ciphertext to ciphertext."""
        folded = self._product(query, self._a)
        for step in self._folds:
            self._evaluator.add_inplace(folded, self._rotated(folded, step))
        return self._product(folded, self._b)

    def decrypt(self, answer: bytes, norm: float) -> NDArray[np.float64]:
        """The client again: ``B(Ax)``, ``(d_out,)``, from the answer and the norm that :meth:`encrypt` returned."""
        slots = self._encoder.decode_complex(self._decryptor.decrypt(self.load(answer)))
        values = np.concatenate([slots.real, slots.imag])[: self.d_out]
        return np.asarray(values * (self._unit * norm), dtype=np.float64)

    def _diagonals(self, matrix: NDArray[Any], level: int) -> list[list[tuple[int, Any]]]:
        """``[giant step][(baby step, plaintext)]`` of a matrix whose rows and columns repeat through the slots."""
        groups: dict[int, list[tuple[int, Any]]] = {}
        for giant, baby, diagonal in stepped(matrix, SLOTS, self._k):
            plain = self._encoder.encode_complex(diagonal.astype(np.complex128), SCALE)
            for _ in range(level):
                self._evaluator.mod_switch_to_next_inplace(plain)
            group = groups.setdefault(giant, [])
            if not plain.is_zero():  # SEAL refuses products with zero
                group.append((baby, plain))
        return list(groups.values())

    def _product(self, vector: Any, groups: list[list[tuple[int, Any]]]) -> Any:
        """Sum of diagonals times rotated vectors, rescaled; giant steps come after rescaling, which is cheaper."""
        needed = {baby for group in groups for baby, _ in group}
        rotated = {baby: self._rotated(vector, baby) for baby in needed}
        terms = []
        for index, group in enumerate(groups):
            if group:
                products = [self._evaluator.multiply_plain(rotated[baby], plain) for baby, plain in group]
                term = self._evaluator.add_many(products)
                self._evaluator.rescale_to_next_inplace(term)
                terms.append(self._rotated(term, index * self._babies))
        return self._evaluator.add_many(terms)

    def _rotated(self, ciphertext: Any, step: int) -> Any:
        return self._evaluator.rotate_vector(ciphertext, step, self._rotations) if step else ciphertext


def _weights(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ConfigurationError(f"{name} has shape {array.shape}, expected two dimensions, neither of them 0")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} holds NaN or infinity")
    if not array.any():
        raise ConfigurationError(f"{name} is zero: there is nothing to evaluate")
    return array
