"""Masks ahead of time: a background thread keeps some ready for every site, within a bound in bytes.

An empty pool means computing on the spot. Masks are handed out once; a fork leaves the child with an empty pool and no
thread; closing drops what is left.
"""

import contextlib
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Sequence

from splitveil.lattice.ring import LANES
from splitveil.private.engine import Mask, Site
from splitveil.serving.ending import close_at_exit, end

DEFAULT_BYTES = 64 << 20
_alive: "weakref.WeakSet[MaskPool]" = weakref.WeakSet()


class MaskPool:
    """Masks for a fixed list of sites; ``capacity`` bytes are shared so that every site holds equally many rows.

    A site's stock is refilled, a batch of eight at a time, the emptiest site first.
    """

    def __init__(self, sites: Sequence[Site], capacity: int = DEFAULT_BYTES) -> None:
        self._sites = list(sites)
        row = sum(site.mask_size for site in self._sites)
        # Batches of eight: a smaller stock than that is not worth a thread.
        self.rows_per_site = capacity // row // LANES * LANES if row else 0
        self._stock: list[deque[Mask]] = [deque() for _ in self._sites]
        self._index = {id(site): i for i, site in enumerate(self._sites)}
        self._closed = False
        self._thread: threading.Thread | None = None
        self._make_locks()
        _alive.add(self)
        close_at_exit(self)
        if self.rows_per_site:
            self._start()

    def _make_locks(self) -> None:
        # Both are C objects, which Ctrl-C cannot leave locked, as it can a Condition.
        self._adding = threading.Lock()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def take(self, site: Site, rows: int) -> list[Mask]:
        """``rows`` masks for a site, from the stock as far as it goes, the rest computed now."""
        index = self._index.get(id(site))
        taken: list[Mask] = []
        if index is not None:
            stock = self._stock[index]
            # popleft is atomic: of several threads, one gets a mask.
            with contextlib.suppress(IndexError):
                while len(taken) < rows:
                    taken.append(stock.popleft())
            self._wake.put(None)
        missing = rows - len(taken)
        if missing:
            # Eight cost little more than one, so an empty stock gets the surplus of the batch.
            made = site.make_masks(-(-missing // LANES) * LANES if self._room(index) else missing)
            taken += made[:missing]
            if index is not None:
                self._keep(index, made[missing:])
        return taken

    @property
    def size(self) -> int:
        """Bytes held now."""
        return sum(len(stock) * site.mask_size for stock, site in zip(self._stock, self._sites, strict=True))

    def fill(self) -> None:
        """Fills the pool before returning: for measurements, and before a burst."""
        for index, site in enumerate(self._sites):
            while self._room(index):
                self._keep(index, site.make_masks(LANES))

    def clear(self) -> None:
        """Drops all masks; the thread begins again."""
        with self._adding:
            for stock in self._stock:
                stock.clear()
        self._wake.put(None)

    def close(self) -> None:
        """Stops the thread and drops the masks."""
        with self._adding:
            self._closed = True
            for stock in self._stock:
                stock.clear()
        self._wake.put(None)
        if self._thread is not None:
            end([self._thread])

    def _room(self, index: int | None) -> bool:
        return index is not None and not self._closed and len(self._stock[index]) + LANES <= self.rows_per_site

    def _keep(self, index: int, masks: Sequence[Mask]) -> None:
        """Stocks as many of these unused masks as there is room for now: another thread may have filled it."""
        with self._adding:
            if not self._closed:
                stock = self._stock[index]
                stock.extend(masks[: self.rows_per_site - len(stock)])

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="splitveil-masks", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            index = min(range(len(self._stock)), key=lambda i: len(self._stock[i]))
            if self._room(index):
                self._keep(index, self._sites[index].make_masks(LANES))
            else:
                self._wake.get()

    def _after_fork(self) -> None:
        # Only the forking thread lives on in the child: the lock's state is unknown, and the masks are the parent's.
        self._make_locks()
        self._stock = [deque() for _ in self._sites]
        self._thread = None


def _after_fork_in_child() -> None:
    for pool in list(_alive):
        pool._after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
