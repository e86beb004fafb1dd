"""The demo's server process: serves the embedded adapter, and reports what it saw.

    python -m splitveil.demo.vendor FOLDER SEEN

prints one JSON line with its address, serves until a line arrives on standard input, then prints one JSON line with
what it received. A vendor's own server keeps nothing of the kind.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from splitveil.adapters import load_adapter
from splitveil.serving.publishing import publish_adapter
from splitveil.serving.server import Server
from splitveil.wire import codec

KEPT = 4 << 20
"""Bytes of queries that are kept for the report."""


class Witness:
    """Remembers the queries that a server received, up to ``KEPT`` bytes."""

    def __init__(self) -> None:
        self.queries = 0
        self.rows: Counter[int] = Counter()
        """By layer."""
        self.kept = bytearray()

    def saw(self, adapter: str, query: codec.Query) -> None:
        """One more query."""
        self.queries += 1
        self.rows.update(dict.fromkeys(query.layers, query.rows))
        if len(self.kept) < KEPT:
            self.kept += query.data


def main() -> None:
    """Serves until told to stop."""
    folder, seen_file = Path(sys.argv[1]), Path(sys.argv[2])
    witness = Witness()
    adapter = publish_adapter(load_adapter(folder))
    with Server({"clinic": adapter}, "127.0.0.1:0", on_query=witness.saw) as server:
        print(json.dumps({"address": server.address, "published": len(adapter.published)}), flush=True)  # noqa: T201
        sys.stdin.readline()
        seen_file.write_bytes(bytes(witness.kept))
        most = max(witness.rows.values(), default=0)
        print(json.dumps({"queries": witness.queries, "rows_of_a_layer": most}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
