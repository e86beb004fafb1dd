"""Randomness, secret and public. Nothing else under ``lattice`` and ``private`` may make any.

Secret bytes are a ChaCha20 expansion of a key that the operating system hands out anew for every call, so there is no
generator state that a fork, a copy or a crash could make repeat; or of a key that the caller has derived from such a
one, where the same bytes are wanted again. Public words are a SHAKE256 expansion of published
values: both sides compute them, neither takes them from the wire.
"""

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

_DOMAIN = b"splitveil public randomness 1"
_DERIVED = b"splitveil derived key 1"
KEY = 32
"""Bytes of a key."""


def derived_key(master: bytes, purpose: bytes, context: bytes) -> bytes:
    """A key for one purpose and one context, which may be secret: SHAKE256 of all three. ``master`` has 32 bytes."""
    if len(master) != KEY:
        raise ValueError(f"a master key of {KEY} bytes is needed, got {len(master)}")
    length = len(purpose).to_bytes(4, "little")
    return hashlib.shake_256(_DERIVED + master + length + purpose + context).digest(KEY)


def secret_bytes(count: int, key: bytes | None = None) -> NDArray[np.uint8]:
    """``count`` secret bytes, as a writable array of shape (count,).

    They are fresh, unless ``key`` (32 bytes, from ``derived_key``, for this and nothing else) says which.
    """
    out = np.zeros(count, dtype=np.uint8)
    Cipher(ChaCha20(key or os.urandom(KEY), bytes(16)), mode=None).encryptor().update_into(out.data, out.data)
    return out


def secret_words(count: int, key: bytes | None = None) -> NDArray[np.uint64]:
    """``count`` secret 64-bit words; ``key`` as for ``secret_bytes``."""
    return secret_bytes(8 * count, key).view(np.uint64)


def secret_uniforms(count: int, key: bytes | None = None) -> NDArray[np.float64]:
    """``count`` secret reals, uniform on the odd multiples of 2^-53 in (0, 1): never 0, never 1."""
    return ((secret_words(count, key) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def secret_normals(count: int, key: bytes | None = None) -> NDArray[np.float64]:
    """``count`` secret standard normals (Box–Muller); ``key`` as for ``secret_bytes``."""
    pairs = -(-count // 2)
    u = secret_uniforms(2 * pairs, key)
    radius = np.sqrt(-2.0 * np.log(u[:pairs]))
    angle = 2.0 * np.pi * u[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def public_element(publication: bytes, seed: bytes, width: int, index: int, degree: int) -> NDArray[np.uint32]:
    """One public ring element, uniform in Z_{2^32}^degree, the same on every machine.

    ``publication`` is the 16-byte publication id, ``seed`` its 32-byte seed, ``width`` the number of inputs d that the
    element serves, ``index`` its place among that width's elements (the pad's element has the last index).
    """
    if len(publication) != 16 or len(seed) != 32:
        raise ValueError(
            f"a publication id of 16 bytes and a seed of 32 are needed, got {len(publication)}, {len(seed)}"
        )
    numbers = b"".join(value.to_bytes(4, "little") for value in (width, index, degree, 32))
    stream = hashlib.shake_256(_DOMAIN + publication + numbers + seed).digest(4 * degree)
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32)
