"""Masks ahead of time: bounded at every moment, each handed out once, never an obstacle."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from splitveil.errors import MaskReuseError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.lattice.ring import LANES
from splitveil.private.core import LayerSpec
from splitveil.private.engine import Mask, PublicHalf, Site
from splitveil.private.layer import public_half, publish
from splitveil.serving.pool import MaskPool


@pytest.fixture(scope="module")
def half() -> PublicHalf:
    draw = np.random.default_rng(0)
    specs = [
        LayerSpec(draw.normal(size=(2, w)).astype("f4"), draw.normal(size=(8, 2)).astype("f4"), 1.0, ((f"m{w}", 8),))
        for w in (16, 40)
    ]
    return public_half(publish(specs, parameters=INSECURE_TEST, allow_insecure=True)[1])


@pytest.fixture
def sites(half: PublicHalf) -> list[Site]:
    return [half.site([0]), half.site([1])]


@pytest.fixture
def pool(sites: list[Site]) -> Iterator[MaskPool]:
    """Room for 64 rows of both sites, and a little more."""
    made = MaskPool(sites, 64 * sum(site.mask_size for site in sites) + 77)
    yield made
    made.close()


def wait_until_full(pool: MaskPool) -> None:
    """Waits for the background thread until no site has room for another batch."""
    end = time.monotonic() + 60
    while any(len(stock) + LANES <= pool.rows_per_site for stock in pool._stock):
        assert time.monotonic() < end, [len(stock) for stock in pool._stock]
        time.sleep(0.005)


def held(pool: MaskPool) -> int:
    """Bytes of all masks in stock, one by one."""
    return sum(mask.size for stock in pool._stock for mask in list(stock))


def test_it_fills_up_to_its_bound(pool: MaskPool, sites: list[Site]) -> None:
    assert pool.rows_per_site == 64
    wait_until_full(pool)
    time.sleep(0.05)
    assert pool.size == held(pool) == sum(site.mask_size for site in sites) * 64


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 64, 100])
def test_it_gives_what_is_asked_for(rows: int, pool: MaskPool, sites: list[Site]) -> None:
    for site in sites:
        masks = pool.take(site, rows)
        assert len({id(mask) for mask in masks}) == rows
        assert {mask.size for mask in masks} == {site.mask_size}
        x = np.ones((rows, site.width), dtype=np.float32)
        assert len(site.query(x, masks)[0]) == rows * site.query_size


def test_its_bound_holds_at_every_moment(pool: MaskPool, sites: list[Site]) -> None:
    """Four threads take odd numbers, so that surplus and background batches compete for the room."""
    bound = sum(site.mask_size for site in sites) * 64
    largest, done = 0, threading.Event()

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(150):
            pool.take(sites[draw.integers(2)], int(draw.integers(1, 70)))
        done.set()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        largest = max(largest, pool.size)
    for thread in threads:
        thread.join()
    assert largest <= bound
    wait_until_full(pool)
    assert held(pool) == pool.size <= bound


def test_several_threads_never_get_the_same_mask(pool: MaskPool, sites: list[Site]) -> None:
    taken: list[list[Mask]] = [[] for _ in range(4)]
    start = threading.Barrier(4)

    def work(mine: list[Mask]) -> None:
        start.wait()
        for i in range(200):
            mine.extend(pool.take(sites[0], 1 + i % 5))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    masks = [mask for mine in taken for mask in mine]
    assert len(masks) == 4 * 200 * 3
    assert max(Counter(map(id, masks)).values()) == 1
    contents = {mask.consume()[0].tobytes() for mask in masks}  # type: ignore[attr-defined]
    assert len(contents) == len(masks)
    with pytest.raises(MaskReuseError):
        masks[0].consume()  # type: ignore[attr-defined]


@pytest.mark.parametrize("capacity", [0, 1, 500])
def test_a_pool_without_room_computes_on_the_spot(capacity: int, sites: list[Site]) -> None:
    threads = threading.active_count()
    pool = MaskPool(sites, capacity)
    assert pool.rows_per_site == 0
    assert threading.active_count() == threads
    assert len(pool.take(sites[0], 3)) == 3
    assert pool.size == 0
    pool.fill()
    pool.close()


def test_an_empty_pool_computes_on_the_spot_and_keeps_the_surplus(sites: list[Site]) -> None:
    pool = MaskPool(sites, 0)
    pool.rows_per_site = LANES  # room, but no thread to fill it
    assert len(pool.take(sites[0], 3)) == 3
    assert pool.size == held(pool) == (LANES - 3) * sites[0].mask_size
    assert len(pool.take(sites[0], LANES)) == LANES
    assert pool.size <= LANES * sites[0].mask_size


def test_a_site_that_the_pool_does_not_know(pool: MaskPool, half: PublicHalf) -> None:
    stranger = half.site([0])
    assert len(pool.take(stranger, 5)) == 5


def test_fill_fills(sites: list[Site]) -> None:
    pool = MaskPool(sites, 0)
    pool.rows_per_site = 24
    pool.fill()
    assert [len(stock) for stock in pool._stock] == [24, 24]
    pool.close()
    pool.fill()
    assert pool.size == 0


def test_closing_drops_the_masks_and_ends_the_thread(sites: list[Site]) -> None:
    threads = threading.active_count()
    pool = MaskPool(sites, 1 << 22)
    assert threading.active_count() == threads + 1
    pool.take(sites[0], 1)
    pool.close()
    pool.close()
    assert threading.active_count() == threads
    assert pool.size == 0
    # Whoever still holds it gets masks, and nothing is kept.
    assert len(pool.take(sites[0], 3)) == 3
    assert pool.size == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_leaves_the_child_empty_and_working(pool: MaskPool, sites: list[Site]) -> None:
    wait_until_full(pool)
    parents = pool.take(sites[0], 1)[0]
    for _ in range(3):
        child = os.fork()
        if child == 0:  # only exits with a code: the test's own process goes on elsewhere
            code = 1
            try:
                empty = pool.size == 0
                try:
                    parents.consume()  # type: ignore[attr-defined]
                except MaskReuseError:
                    code = 0 if empty and len(pool.take(sites[0], 5)) == 5 else 2
                pool.close()
            finally:
                os._exit(code)
        end = time.monotonic() + 60
        while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(waited[1]) == 0
    # The parent's own are as they were.
    parents.consume()  # type: ignore[attr-defined]
    wait_until_full(pool)
