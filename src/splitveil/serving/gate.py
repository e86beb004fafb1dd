"""The one place where a server may refuse rows: between decoding a query and computing its answer."""

from typing import Protocol


class Gate(Protocol):
    """Decides whether a client may have its rows answered."""

    def reserve(self, identity: str, adapter: str, module: str, rows: int) -> None:
        """Returns to allow, raises ``RefusedError`` to refuse; called for every layer of a query, before the kernel."""
        ...


class Open:
    """Allows everything: nothing is metered."""

    def reserve(self, identity: str, adapter: str, module: str, rows: int) -> None:
        """Allows."""
