"""The same job by Splitveil's engines, plaintext and other libraries: one token through one LoRA layer, one run.

    python benchmarks/peers.py                                      four shapes, everybody (an hour with the slow ones)
    python benchmarks/peers.py --shapes chatglm --peers "Splitveil lattice;OpenFHE" --rounds 1
    python benchmarks/peers.py --python openfhe=/path/to/python3.10

Other libraries run in virtual environments of their own, made under --envs with pinned versions; what does not install,
import or finish is a row with its reason. Peers take turns, --rounds times, each in a new process; times are medians of
CPU time over all threads, of which each is told to use one, so that they hold on a machine that does other work too.
A peer that takes more than --slow seconds runs once. Security is 128 bits where the library has the choice.
"""

import argparse
import datetime
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from peers.catalogue import PEERS, SHAPES, Peer
from peers.environments import Environments
from peers.report import THRESHOLD, facts, markdown, rows
from peers.runs import Shape, measure

from splitveil.bench.timing import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="Names, or IN:OUT:RANK, with commas.")
    parser.add_argument("--peers", help=f"With semicolons, of: {'; '.join(peer.name for peer in PEERS)}.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="For the repetitions of one peer in one round.")
    parser.add_argument("--slow", type=float, default=60.0, help="A peer that took longer, wall time, is not repeated.")
    parser.add_argument("--limit", type=float, default=300.0, help="Wall seconds after which a peer is given up.")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "splitveil-peers")
    parser.add_argument("--python", action="append", default=[], metavar="PACKAGE=PATH", help="Base of an environment.")
    parser.add_argument("--json", action="store_true", help="JSON instead of Markdown, with every repetition.")
    parser.add_argument("--out", type=Path, help="Also write the report here; JSON if it ends in .json.")
    options = parser.parse_args()
    try:
        shapes = [Shape.of(text) for text in options.shapes.split(",")]
        peers, pythons = chosen(options.peers), dict(pair.split("=", 1) for pair in options.python)
    except ValueError as error:
        parser.error(str(error))
    environments = Environments(options.envs, pythons)
    head = (
        f"{datetime.date.today()}, {machine()}; load {os.getloadavg()[0]:.1f} at the start; CPU ms, one thread each; "
        f"right: relative error ≤ {THRESHOLD:g}; at most {options.rounds} rounds, {options.limit:g} s each"
    )
    parts: list[tuple[Shape, list[dict[str, Any]]]] = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = measure(
                shape,
                peers,
                environments,
                Path(folder),
                rounds=options.rounds,
                seconds=options.seconds,
                limit=options.limit,
                slow=options.slow,
            )
        made = rows(outcomes)
        parts.append((shape, made))
        # After every shape, so that an interrupted run leaves what it has.
        if options.out:
            written = as_json if options.out.suffix == ".json" else as_markdown
            options.out.write_text(written(head, parts) + "\n", encoding="utf-8")
    print((as_json if options.json else as_markdown)(head, parts))


def as_markdown(head: str, parts: list[tuple[Shape, list[dict[str, Any]]]]) -> str:
    """The head, who was measured, and one table a shape."""
    return "\n\n".join([head, facts(parts[-1][1]), *(markdown(shape, made) for shape, made in parts)])


def as_json(head: str, parts: list[tuple[Shape, list[dict[str, Any]]]]) -> str:
    """The same with the seconds of every repetition."""
    return json.dumps(
        finite({"run": head, "shapes": [{"shape": vars(s), "peers": made} for s, made in parts]}), indent=1
    )


def chosen(names: str | None) -> list[Peer]:
    """The peers of these names, in the catalogue's order. Raises ``ValueError`` for an unknown name."""
    if names is None:
        return list(PEERS)
    wanted = {name.strip() for name in names.split(";")}
    unknown = wanted - {peer.name for peer in PEERS}
    if unknown:
        raise ValueError(f"unknown peers {sorted(unknown)}; expected some of {[peer.name for peer in PEERS]}")
    return [peer for peer in PEERS if peer.name in wanted]


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
