"""What the design obliges the code to, tried out; what can be read from the source is in test_source_obligations.py."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from splitveil import errors
from splitveil.errors import MaskReuseError, SplitveilError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.lattice.ring import Transformed
from splitveil.private import lattice_served
from splitveil.private.core import LayerSpec, integer_core
from splitveil.private.engine import Pending
from splitveil.private.layer import public_half, publish
from splitveil.private.masks import OneTimeMask
from splitveil.private.noise import AnswerNoise
from splitveil.private.plain import PlainServed
from splitveil.serving.pool import MaskPool

# Masks are used once.


def mask() -> OneTimeMask:
    return OneTimeMask(np.arange(8, dtype=np.uint32) + 123_456_789, np.arange(3, dtype=np.uint32) + 987_654_321)


def test_a_mask_is_consumed_once() -> None:
    one = mask()
    assert one.size == 44
    assert one.consume()[0][0] == 123_456_789
    assert one.size == 0
    for _ in range(2):
        with pytest.raises(MaskReuseError, match="twice"):
            one.consume()


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps, lambda m: pickle.dumps(m, protocol=0)])
@pytest.mark.parametrize("used", [False, True])
def test_a_mask_is_neither_copied_nor_pickled(attempt: Callable[[Any], Any], used: bool) -> None:
    one = mask()
    if used:
        one.consume()
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        attempt(one)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy({"held": [one]})


def test_of_many_threads_one_gets_a_mask() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            one, start, got = mask(), threading.Barrier(4), []

            def consume(one: OneTimeMask, start: threading.Barrier, got: list[str]) -> None:
                start.wait()
                try:
                    one.consume()
                    got.append("mask")
                except MaskReuseError:
                    got.append("error")

            threads = [threading.Thread(target=consume, args=(one, start, got)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(got) == ["error", "error", "error", "mask"]
    finally:
        sys.setswitchinterval(interval)


SPEC = LayerSpec(
    np.random.default_rng(0).standard_normal((3, 30)).astype(np.float32),
    np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32),
    1.0,
    (("m", 5),),
)


def test_the_same_mask_twice_in_one_query_sends_nothing() -> None:
    _, publication = publish([SPEC], parameters=INSECURE_TEST, allow_insecure=True)
    site = public_half(publication).site([0])
    (one,) = site.make_masks(1)
    with pytest.raises(MaskReuseError):
        site.query(np.ones((2, 30), dtype=np.float32), [one, one])


FORKING = """
import json, os, sys
import numpy as np
from splitveil.errors import MaskReuseError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.core import LayerSpec
from splitveil.private.layer import public_half, publish
from splitveil.private.noise import AnswerNoise
from splitveil.serving.pool import MaskPool

_, publication = publish(
    [LayerSpec(np.ones((2, 9), np.float32), None, 1.0, (("m", 2),))], parameters=INSECURE_TEST, allow_insecure=True
)
site = public_half(publication).site([0])
noise = AnswerNoise(2.0**30)
noise.take(1, 1)
pool = MaskPool([site], 64 * site.mask_size)
pool.fill()
held = site.make_masks(1)[0]
# The fork comes while other threads hold the locks, which nobody will release in the child.
noise._lock.acquire()
pool._adding.acquire()
read, write = os.pipe()
child = os.fork() == 0
if not child:
    noise._lock.release()
    pool._adding.release()
try:
    held.consume()
    used = True
except MaskReuseError:
    used = False
report = {
    "held": used,
    "stock": pool.size,
    "noise": noise.take(1, 500).ravel().tolist(),
    "masks": [mask.consume()[0].tolist() for mask in pool.take(site, 12)],
}
if child:
    os.write(write, json.dumps(report).encode())
    os._exit(0)
os.close(write)
with os.fdopen(read) as pipe:
    other = json.load(pipe)
os.wait()
pool.close()
print(json.dumps([report, other]))
"""


def test_a_forked_process_shares_no_mask_and_no_noise() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    parent, child = json.loads(done.stdout)
    assert parent["held"] is True
    assert child["held"] is False, "a mask that was drawn before the fork served in the child"
    assert parent["stock"] > 0
    assert child["stock"] == 0
    assert not {tuple(row) for row in parent["masks"]} & {tuple(row) for row in child["masks"]}
    assert len(set(parent["noise"]) & set(child["noise"])) < 5, "the same noise on both sides"


def test_a_pool_hands_out_every_mask_once() -> None:
    _, publication = publish([SPEC], parameters=INSECURE_TEST, allow_insecure=True)
    site = public_half(publication).site([0])
    pool, got, lock = MaskPool([site], 64 * site.mask_size), [], threading.Lock()

    def take() -> None:
        for rows in (1, 3, 9, 1, 20):
            masks = [mask.consume()[0].tobytes() for mask in pool.take(site, rows) if isinstance(mask, OneTimeMask)]
            assert len(masks) == rows
            with lock:
                got.extend(masks)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert len(got) == len(set(got)) == 4 * 34


# No secret is printed.

TELLTALE = 123456.75  # in every secret; none of its digits may be printed


def holders() -> dict[str, object]:
    """An object of every kind that holds a secret, which contains the telltale or is random."""
    a = np.full((2, 30), TELLTALE, dtype=np.float32)
    spec = LayerSpec(a, a.T.copy(), 1.0, (("m", 30),))
    served, publication = publish([spec], parameters=INSECURE_TEST, allow_insecure=True)
    site = public_half(publication).site([0])
    used = mask()
    used.consume()
    _, pending = site.query(a, site.make_masks(2))
    return {
        "LayerSpec": spec,
        "IntegerCore": integer_core(a.astype(np.float64)),
        "_SecretLayer": served._secret[0],  # type: ignore[attr-defined]
        "LatticeServed": served,
        "PlainServed": PlainServed([a.astype(np.float64)]),
        "AnswerNoise": AnswerNoise(256.0),
        "fresh mask": OneTimeMask(np.full(9, 123456, dtype=np.uint32), np.full(2, 123456, dtype=np.uint32)),
        "used mask": used,
        "Pending": Pending(1, np.full(1, TELLTALE), np.full((1, 2), 123456, dtype=np.uint32)),
        "real Pending": pending,
        "Transformed": Transformed.of(np.full((1, 4), 123456, dtype=np.int32)),
        "site": site,
        "pool": MaskPool([site], 0),
    }


def test_no_secret_in_the_text_of_any_object() -> None:
    for name, holder in holders().items():
        for text in (repr(holder), str(holder), f"{holder}", repr([holder]), repr({"x": holder})):
            text = re.sub("0x[0-9a-f]+", "", text)  # an address may hold any digits
            assert "12345" not in text, name
            assert "array" not in text, name
            assert "[[" not in text, name
            assert len(text) < 250, name


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_the_vendors_half_is_neither_copied_nor_pickled(attempt: Callable[[Any], Any]) -> None:
    served, _ = publish([SPEC], parameters=INSECURE_TEST, allow_insecure=True)
    with pytest.raises(TypeError, match="not pickled"):
        attempt(served)


def test_no_secret_in_the_text_of_any_error() -> None:
    secret = np.full((2, 30), TELLTALE, dtype=np.float32)
    broken = secret.copy()
    broken[0, 0] = np.nan
    served, publication = publish(
        [LayerSpec(secret, None, 1.0, (("m", 2),))], parameters=INSECURE_TEST, allow_insecure=True
    )
    site = public_half(publication).site([0])
    masks = site.make_masks(9)
    query, pending = site.query(broken, masks[:2])
    row = secret[:1]
    tries: list[Callable[[], object]] = [
        lambda: publish([LayerSpec(broken, None, 1.0, (("m", 2),))]),
        lambda: publish([LayerSpec(secret, None, 1e300, (("m", 2),))]),
        lambda: site.query(secret, masks[:1]),
        lambda: site.query(row, masks[:1]),
        lambda: site.query(row[:, :7], masks[3:4]),
        lambda: site.query(row.astype(np.float64), masks[4:5]),
        lambda: site.query(row, [mask()]),
        lambda: site.recover(pending, bytes(3)),
        lambda: site.recover(pending, served.answer([0], 2, query)),
        lambda: served.answer([0], 2, query[:-4]),
        lambda: served.answer([7], 2, query),
        lambda: pickle.dumps(masks[5]),
        lambda: pickle.dumps(served),
    ]
    for attempt in tries:
        with pytest.raises((SplitveilError, ValueError, TypeError)) as caught:
            attempt()
        text = f"{caught.value!r} {caught.value.args}"
        assert "12345" not in text
        assert "[[" not in text
        assert caught.value.__cause__ is None


def test_every_error_is_in_the_tree() -> None:
    documented = set((errors.__doc__ or "").split())
    for name, kind in vars(errors).items():
        if isinstance(kind, type):
            assert issubclass(kind, SplitveilError)
            assert name in documented


# Publications never share randomness.


def test_every_publication_has_its_own_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [publish([SPEC], parameters=INSECURE_TEST, allow_insecure=True) for _ in range(6)]
    for part in ("id", "seed"):
        assert len({getattr(publication, part) for _, publication in made}) == 6
    pads = {served._secret[0].matrix[:, 30:].tobytes() for served, _ in made}  # type: ignore[attr-defined]
    assert len(pads) == 6
    asked: list[int] = []
    real = os.urandom
    monkeypatch.setattr(lattice_served.os, "urandom", lambda size: asked.append(size) or real(size))
    publish([SPEC], parameters=INSECURE_TEST, allow_insecure=True)
    assert asked[:2] == [16, 32]


def test_rows_of_a_publication_have_pads_and_hint_errors_of_their_own() -> None:
    layers = [LayerSpec(SPEC.A, None, 1.0, ((f"m{i}", 3),)) for i in range(3)]
    served, publication = publish(layers, parameters=INSECURE_TEST, allow_insecure=True)
    pads = np.vstack([layer.matrix[:, 30:] for layer in served._secret])  # type: ignore[attr-defined]
    assert len({pad.tobytes() for pad in pads}) == 9
    shown = [layer.hint for layer in publication.layers]
    assert len({row.tobytes() for hint in shown if hint is not None for row in hint}) == 9
