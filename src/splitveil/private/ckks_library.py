"""Microsoft SEAL, through seal-python: the one context of the sealed engine, and objects from and to bytes.

What the other side sends must equal a message of our own making in every byte that is not a polynomial's coefficient.
SEAL's readers take compressed and seeded forms too, nested to any depth, and a few hundred bytes of those can ask for
gigabytes of memory; what is left for SEAL to check is that coefficients are below their primes.
"""

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError, ProtocolError
from splitveil.private.ckks_layout import coefficients, small_slots
from splitveil.private.ckks_parameters import (
    A_SCALE,
    B_BITS,
    DATA_PRIMES,
    DEGREE,
    DROPPED_BEFORE_NOISE,
    INPUT_SCALE,
    MODULI,
)

INSTALL = "pip install 'splitveil[sealed]'"
STEPS = [1 << i for i in range(DEGREE.bit_length() - 2)]
"""Rotations that every session has keys for: all powers of two below the number of slots."""
CONJUGATION = 0  # what SEAL's key generator calls it
ERRORS = (ValueError, RuntimeError, IndexError)
"""What SEAL raises: std::invalid_argument, std::logic_error and std::runtime_error, std::out_of_range."""
_HEADER = 16  # bytes before any serialised object; its length is in the last 8
_IDENTITY = 32  # bytes of the digest of the parameters
_SHIFT = 26  # 37-bit residues times 2^26 still fit in 64 bits


def seal_module() -> Any:
    """The library. Raises ``ConfigurationError`` with the install command."""
    try:
        import seal
    except ImportError as error:
        raise ConfigurationError(
            f"this needs Microsoft SEAL for Python, which cannot be imported ({error}): {INSTALL}"
        ) from None
    return seal


class Library:
    """The parameters' context and what comes from it. Safe for several threads."""

    def __init__(self) -> None:
        self.seal = seal = seal_module()
        parameters = seal.EncryptionParameters(seal.scheme_type.ckks)
        parameters.set_poly_modulus_degree(DEGREE)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(MODULI)))
        self.context = seal.SEALContext(parameters)
        if not self.context.parameters_set():
            raise ConfigurationError(f"SEAL refuses the parameters: {self.context.parameter_error_message()}")
        self.encoder = seal.CKKSEncoder(self.context)
        self.evaluator = seal.Evaluator(self.context)
        self.primes = [modulus.value() for modulus in parameters.coeff_modulus()]
        chain = [self.context.first_context_data()]
        while (following := chain[-1].next_context_data()) is not None:
            chain.append(following)
        self.levels = [chain[dropped].parms_id() for dropped in (0, DROPPED_BEFORE_NOISE, DATA_PRIMES - 1)]
        """Parameters of queries, of answers while noise is added, and of answers as sent."""
        self.noise_scale = INPUT_SCALE * A_SCALE * 2.0**B_BITS
        for prime in self.primes[DATA_PRIMES - DROPPED_BEFORE_NOISE : DATA_PRIMES]:
            self.noise_scale /= prime
        self.answer_scale = self.noise_scale / self.primes[1]

    # -- plaintexts --------------------------------------------------------------------------------------------------

    def encode(self, slots: NDArray[Any], scale: float, level: int = 0) -> Any:
        """A plaintext of these slots, in double precision."""
        plain = self.encoder.encode_complex(np.ascontiguousarray(slots, dtype=np.complex128), scale)
        if level:
            self.evaluator.mod_switch_to_inplace(plain, self.levels[level])
        return plain

    def encode_exactly(self, slots: NDArray[Any], bits: int) -> Any:
        """A plaintext of these slots at scale 2^bits, off by half a unit in every coefficient and no more.

        SEAL encodes polynomials with 31-bit coefficients exactly; two of them make the plaintext.
        """
        exact = coefficients(np.asarray(slots, dtype=np.complex128), bits)
        half = (bits + 1) // 2
        high = exact + (1 << half - 1) >> half
        parts = [self.encoder.encode_complex(small_slots(part), 1.0) for part in (high, exact - (high << half))]
        upper, lower = (_words(plain.to_bytes(), DATA_PRIMES * DEGREE).reshape(DATA_PRIMES, -1) for plain in parts)
        primes = np.array(self.primes[:DATA_PRIMES], dtype=np.uint64)[:, None]
        sum_ = upper.copy()
        for done in range(0, half, _SHIFT):
            sum_ = (sum_ << np.uint64(min(_SHIFT, half - done))) % primes
        sum_ = (sum_ + lower) % primes
        whole = self.seal.Plaintext()
        data = parts[0].to_bytes()
        whole.load_bytes(self.context, data[: len(data) - sum_.nbytes] + sum_.astype("<u8").tobytes())
        whole.scale(2.0**bits)
        return whole

    # -- from and to bytes -------------------------------------------------------------------------------------------

    def load(self, what: str, kind: str, data: bytes) -> Any:
        """A "query", an "answer", a "public key" or "rotation keys" from bytes. Raises ``ProtocolError``."""
        forms()[kind].check(what, data)
        try:
            match kind:
                case "public key":
                    return self.context.from_public_str(data)
                case "rotation keys":
                    return self.context.from_galois_str(data)
            ciphertext = self.seal.Ciphertext()
            ciphertext.load_bytes(self.context, data)
        except ERRORS:  # SEAL's text may quote nothing of ours, but says nothing either
            raise ProtocolError(f"{what} that SEAL refuses: a coefficient is not below its prime") from None
        return ciphertext


@cache
def library() -> Library:
    """The process's one library. Raises ``ConfigurationError`` where seal-python is not installed."""
    return Library()


@dataclass(frozen=True)
class Form:
    """A serialised object's length in bytes, and what it has outside of polynomials."""

    size: int
    fixed: tuple[tuple[int, bytes], ...]
    """(offset, bytes)"""

    def check(self, what: str, data: bytes) -> None:
        """Raises ``ProtocolError`` unless the object has this form."""
        if len(data) != self.size:
            raise ProtocolError(f"{what} of {len(data)} bytes; expected {self.size}")
        if any(data[start : start + len(part)] != part for start, part in self.fixed):
            raise ProtocolError(f"{what} not of the expected form; do both sides have the same version of SEAL?")


@cache
def forms() -> dict[str, Form]:
    """How honest messages look, from throw-away keys, by what they are."""
    sealing = library()
    seal, primes = sealing.seal, len(MODULI)
    keys = seal.KeyGenerator(sealing.context)
    encrypted = seal.Encryptor(sealing.context, keys.secret_key()).encrypt_symmetric(
        sealing.encode(np.ones(DEGREE // 2), INPUT_SCALE)
    )
    query = encrypted.to_string()
    encrypted.scale(sealing.answer_scale)
    sealing.evaluator.mod_switch_to_inplace(encrypted, sealing.levels[2])
    rotations = seal.GaloisKeys()
    keys.create_galois_keys([*STEPS, CONJUGATION], rotations)
    return {
        "query": _form(query, primes - 1),
        "answer": _form(encrypted.to_string(), 1),
        "public key": _form(keys.create_public_key().to_string(), primes),
        "rotation keys": _form_of_keys(rotations.to_string()),
    }


def _form(data: bytes, primes: int) -> Form:
    """Of a ciphertext: two polynomials modulo so many primes at the end, and what precedes them."""
    return Form(len(data), ((0, data[: len(data) - _polynomials(primes)]),))


def _form_of_keys(data: bytes) -> Form:
    """Of rotation keys: a table that has, for every automorphism, a ciphertext for each data prime, or none."""
    fixed, begin = [], 0
    position = _HEADER + _IDENTITY
    (rows,) = struct.unpack_from("<Q", data, position)
    position += 8
    for _ in range(rows):
        (count,) = struct.unpack_from("<Q", data, position)
        position += 8
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", data, position + 8)
            position += size
            fixed.append((begin, data[begin : position - _polynomials(len(MODULI))]))
            begin = position
    fixed.append((begin, data[begin:]))
    return Form(len(data), tuple(fixed))


def _polynomials(primes: int) -> int:
    return 2 * primes * DEGREE * 8


def _words(data: bytes, count: int) -> NDArray[np.uint64]:
    """The last ``count`` words of a serialised object."""
    return np.frombuffer(data, dtype="<u8", count=count, offset=len(data) - 8 * count).astype(np.uint64)
