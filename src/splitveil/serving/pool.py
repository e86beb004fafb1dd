"""Masks ahead of time: a background thread keeps some ready for every site, within a bound in bytes.

An empty pool means computing on the spot. Masks are handed out once; a fork leaves the child with an empty pool and no
thread; closing drops what is left.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

from splitveil.lattice.ring import LANES
from splitveil.private.engine import Mask, Site

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
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        _alive.add(self)
        if self.rows_per_site:
            self._start()

    def take(self, site: Site, rows: int) -> list[Mask]:
        """``rows`` masks for a site, from the stock as far as it goes, the rest computed now."""
        index = self._index.get(id(site))
        taken: list[Mask] = []
        if index is not None:
            with self._changed:
                stock = self._stock[index]
                while stock and len(taken) < rows:
                    taken.append(stock.popleft())
                self._changed.notify()
        missing = rows - len(taken)
        if missing:
            # Eight cost little more than one, so an empty stock gets the surplus of the batch.
            made = site.make_masks(-(-missing // LANES) * LANES if self._room(index) else missing)
            taken += made[:missing]
            if made[missing:] and index is not None:
                with self._changed:
                    self._stock[index].extend(made[missing:])
        return taken

    def _room(self, index: int | None) -> bool:
        return index is not None and len(self._stock[index]) + LANES <= self.rows_per_site

    @property
    def size(self) -> int:
        """Bytes held now."""
        with self._changed:
            return sum(mask.size for stock in self._stock for mask in stock)

    def fill(self) -> None:
        """Fills the pool before returning: for measurements, and before a burst."""
        for index, site in enumerate(self._sites):
            while self._room(index):
                self._stock[index].extend(site.make_masks(LANES))

    def close(self) -> None:
        """Stops the thread and drops the masks."""
        with self._changed:
            self._closed = True
            for stock in self._stock:
                stock.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="splitveil-masks", daemon=True)
        self._thread.start()

    def _emptiest(self) -> int | None:
        """The site with the smallest stock, if it has room for a batch."""
        index = min(range(len(self._stock)), key=lambda i: len(self._stock[i]))
        return index if self._room(index) else None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and self._emptiest() is None:
                    self._changed.wait()
                if self._closed:
                    return
                index = self._emptiest()
            if index is None:
                continue
            made = self._sites[index].make_masks(LANES)
            with self._changed:
                if self._closed:
                    return
                self._stock[index].extend(made)

    def _after_fork(self) -> None:
        # Only the forking thread lives on in the child: the lock's state is unknown, and the masks are the parent's.
        self._changed = threading.Condition()
        self._stock = [deque() for _ in self._sites]
        self._thread = None


def _after_fork_in_child() -> None:
    for pool in list(_alive):
        pool._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
