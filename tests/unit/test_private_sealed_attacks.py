"""Reading the weights out of a sealed answer, with the client's own keys and randomness: each attack succeeds on an
unprotected build, and fails on the real one. The one thing that undoes the protection, a dishonest public key, is here
too: docs/design/sealed.md names it first.
"""

import numpy as np
import pytest
from sealed_support import Ends, ends, polynomials, random_spec, slots_of, with_polynomials

from splitveil.private import ckks
from splitveil.private.ckks_library import forms, library
from splitveil.private.ckks_parameters import DATA_PRIMES, DEGREE, FLOOD, MODULI, SLOTS
from splitveil.private.ckks_served import SealedServed

# -- an honest client --------------------------------------------------------------------------------------------------

HIDDEN = 3
"""The last columns of A, whose signs are secret. The query is zero there: the answer's content is the same for all."""


class Guesser:
    """Knows all of a layer but three signs of A. CKKS evaluation is deterministic: it repeats it for every guess."""

    def __init__(self) -> None:
        self.a, self.b, _ = ckks.factored(random_spec(40, 40, 1))
        self.truth = 5
        self.guesses = [self.served(number) for number in range(1 << HIDDEN)]
        x = np.random.default_rng(0).normal(size=40)
        x[-HIDDEN:] = 0
        self.client = ends(self.guesses[0])
        padded = np.zeros(SLOTS)
        padded[:40] = x / np.linalg.norm(x)
        self.query = self.client.half.encrypt(padded + 0j)

    def served(self, number: int) -> SealedServed:
        a = self.a.copy()
        a[0, -HIDDEN:] *= [1 - 2 * (number >> bit & 1) for bit in range(HIDDEN)]
        return SealedServed([ckks._encoded(a, self.b)])

    def answer(self, number: int, unprotected: bool) -> bytes:
        opened = self.guesses[number].opened(self.client.keys, insecure_unprotected=unprotected)
        return opened.answer([0], 1, self.query)

    def distances(self, answer: bytes) -> list[float]:
        """How far the second polynomial is from each guess's, 0 to 1/2; 1/4 is chance."""
        prime, found = library().primes[0], []
        for number in range(1 << HIDDEN):
            other = polynomials(self.answer(number, unprotected=True), 1)[1, 0]
            apart = (polynomials(answer, 1)[1, 0].astype(np.int64) - other.astype(np.int64)) / prime % 1.0
            found.append(float(np.minimum(apart, 1 - apart).mean()))
        return found


@pytest.fixture(scope="module")
def guesser() -> Guesser:
    return Guesser()


def test_signs_that_the_answer_does_not_depend_on_are_read_from_an_unprotected_answer(guesser: Guesser) -> None:
    distances = guesser.distances(guesser.answer(guesser.truth, unprotected=True))
    assert int(np.argmin(distances)) == guesser.truth
    assert distances[guesser.truth] == 0
    assert min(distances[: guesser.truth] + distances[guesser.truth + 1 :]) > 0.2
    # And from what it decrypts to, which is where the noise goes: the same to the last bit for the truth alone.
    slots = guesser.client.half.decrypt(guesser.answer(guesser.truth, unprotected=True))
    apart = [
        np.abs(slots - guesser.client.half.decrypt(guesser.answer(number, unprotected=True))).max()
        for number in range(1 << HIDDEN)
    ]
    assert [number for number, distance in enumerate(apart) if distance == 0] == [guesser.truth]


def test_and_not_from_a_real_one(guesser: Guesser) -> None:
    answer = guesser.answer(guesser.truth, unprotected=False)
    # Each distance is a mean over 8192 uniform values: 1/4, with a standard deviation of 0.0016.
    assert all(abs(distance - 0.25) < 0.01 for distance in guesser.distances(answer))
    # Nor does the decrypted answer lie nearer to the truth than the noise puts it.
    slots = guesser.client.half.decrypt(answer)
    spreads = [
        np.std((slots - guesser.client.half.decrypt(guesser.answer(number, unprotected=True))).real) / FLOOD
        for number in range(1 << HIDDEN)
    ]
    assert all(abs(spread - 1) < 0.06 for spread in spreads), spreads
    # Each guess is rounded by itself, at an eighth of the noise's size: over 4096 slots that is 0.003 of a spread.
    assert max(spreads) - min(spreads) < 0.015


# -- a client that chooses its keys and its query ----------------------------------------------------------------------

WIDTH = 64
FACTOR = 1 << 33
"""What A and B are multiplied by in the second polynomial; large enough to stand above its rounding."""


def chosen(half_keys: bytes, public_key: bytes | None) -> bytes:
    """Rotation keys that leave next to nothing in the second polynomial, and the honest or another public key."""
    size = forms()["public key"].size
    keys = bytearray(half_keys)
    first, moved = size + 56, 0
    # Every row of the table: how many ciphertexts, and those.
    while first < len(keys):
        count = int.from_bytes(keys[first : first + 8], "little")
        first += 8
        for digit in range(count):
            empty = np.zeros((2, len(MODULI), DEGREE), np.uint64)
            # SEAL refuses ciphertexts whose second polynomial is zero; the first prime is larger than the special one.
            empty[1] = digit == 0
            keys[first : first + size] = with_polynomials(bytes(keys[first : first + size]), empty)
            first += size
            moved += 1
    assert moved == 13 * DATA_PRIMES
    return (public_key or bytes(keys[:size])) + bytes(keys[size:])


def read_weights(unprotected: bool, public_key: bytes | None = None) -> float:
    """Correlation of what is read from one answer with A's weights times B's, entry by entry."""
    a, b, _ = ckks.factored(random_spec(WIDTH, WIDTH, 1, seed=4))
    served = SealedServed([ckks._encoded(a, b)])
    client: Ends = ends(served)
    query = client.half.encrypt(np.zeros(SLOTS, np.complex128))
    constant = np.zeros((2, DATA_PRIMES, DEGREE), np.uint64)
    constant[1] = FACTOR  # the same value at every root of unity: a constant polynomial
    opened = served.opened(chosen(client.keys, public_key), insecure_unprotected=unprotected)
    answer = opened.answer([0], 1, with_polynomials(query, constant))
    read = slots_of(polynomials(answer, 1)[1, 0]).real[:WIDTH]
    return float(np.corrcoef(read, a[0] * b[:, 0])[0, 1])


def test_one_answer_gives_all_weights_away_without_protection() -> None:
    assert read_weights(unprotected=True) > 0.999


def test_and_none_with_it() -> None:
    assert abs(read_weights(unprotected=False)) < 0.6  # 64 values: five standard deviations


def test_a_dishonest_public_key_undoes_the_protection() -> None:
    """The limit that is stated first: re-randomisation is worth what the client's public key is worth."""
    size = forms()["public key"].size
    useless = with_polynomials(ends(SealedServed([])).keys[:size], np.zeros((2, len(MODULI), DEGREE), np.uint64))
    assert read_weights(unprotected=False, public_key=useless) > 0.999
