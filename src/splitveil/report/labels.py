"""Names beside the marks of a plot, where they cover neither each other nor a mark."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splitveil.report.svg import element

LETTER = 7.6  # of a name in bold, in the widest of the fonts that a browser may choose
TALL = 13.0
GAP = 2.0
NEAR = 17.0
"""Beyond this distance from its mark a name gets a line to it."""
ANGLES = 16
ROUNDS = 3
PERSONAL = "personal"
Spot = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle in a drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box", gap: float = 0.0) -> bool:
        """Whether the two come closer than ``gap``."""
        across = self.left < other.right + gap and other.left < self.right + gap
        return across and self.top < other.bottom + gap and other.top < self.bottom + gap

    def holds(self, other: "Box") -> bool:
        inside = self.left <= other.left and other.right <= self.right
        return inside and self.top <= other.top and other.bottom <= self.bottom

    def crossed(self, one: Spot, other: Spot) -> bool:
        """Whether the line between two spots goes through it (clipped as by Liang and Barsky)."""
        first, last = 0.0, 1.0
        for start, way, low, high in (
            (one[0], other[0] - one[0], self.left, self.right),
            (one[1], other[1] - one[1], self.top, self.bottom),
        ):
            if way == 0:
                if not low < start < high:
                    return False
                continue
            a, b = (low - start) / way, (high - start) / way
            first, last = max(first, min(a, b)), min(last, max(a, b))
        return first < last


@dataclass(frozen=True)
class Label:
    """Where a name stands: its box, and where the line from its mark ends."""

    box: Box
    end: Spot
    distance: float


def place(names: Sequence[str], marks: Sequence[Spot], radius: float, frame: Box) -> list[Label] | None:
    """A place for each name beside its mark; None where the frame is too small. Whatever it is given, it repeats.

    Each is put where it disturbs least, those with many neighbours first, then all once more beside all others.
    """
    found: dict[int, Label] = {}
    crowd = [sum(math.dist(a, b) < 60 for b in marks) for a in marks]
    order = sorted(range(len(names)), key=lambda i: (-crowd[i], i))
    for _ in range(ROUNDS):
        for i in order:
            others = [label for j, label in found.items() if j != i]
            leaders = [(marks[j], label.end) for j, label in found.items() if j != i]
            best = _best(names[i], i, marks, radius, frame, others, leaders)
            if best is None:
                return None
            found[i] = best
    return [found[i] for i in range(len(names))]


def drawn(name: str, title: str, mark: Spot, label: Label) -> str:
    """The name, and the line to its mark where it stands away from it; ``title`` is what pointing at it shows."""
    parts = ""
    if label.distance > NEAR:
        parts = element("line", x1=mark[0], y1=mark[1], x2=label.end[0], y2=label.end[1], class_="leader axis")
    middle = (label.box.left + label.box.right) / 2
    words = element("title", text=title)
    # The text comes after its title, in a tspan: ``element`` writes text before children.
    return parts + element(
        "text",
        words,
        element("tspan", text=name),
        x=middle,
        y=label.box.bottom - 3,
        text_anchor="middle",
        class_="name",
    )


def shortened(name: str, most: int = 22) -> str:
    """A defence's name as a plot has room for it: of a path its last part, and of what is long its beginning.

    A run of training keeps what it made in a folder called personal; the folder around it says more.
    """
    kind, colon, rest = name.partition(":")
    *around, last = [part for part in rest.split("/") if part] or [""]
    short = kind + colon + (around[-1] if last == PERSONAL and around else last)
    return short if len(short) <= most else short[: most - 1] + "…"


def _best(
    name: str,
    own: int,
    marks: Sequence[Spot],
    radius: float,
    frame: Box,
    others: Sequence[Label],
    leaders: Sequence[tuple[Spot, Spot]],
) -> Label | None:
    best, least = None, math.inf
    for label in _candidates(name, marks[own], frame):
        if label.distance >= least:  # they come by distance, and disturb at least that much
            break
        if _free(label, marks, radius, others):
            cost = _disturbance(label, own, marks, radius, others, leaders)
            if cost < least:
                best, least = label, cost
    return best


def _candidates(name: str, mark: Spot, frame: Box) -> Iterator[Label]:
    wide = LETTER * len(name)
    furthest = math.hypot(frame.right - frame.left, frame.bottom - frame.top)
    distances = itertools.takewhile(lambda d: d < furthest, itertools.accumulate(itertools.count(2.0, 1.5), initial=10))
    for distance in distances:
        for step in range(ANGLES):
            angle = 2 * math.pi * step / ANGLES
            right, down = math.cos(angle), math.sin(angle)
            x, y = mark[0] + distance * right, mark[1] + distance * down
            left = x if right > 0.3 else x - wide if right < -0.3 else x - wide / 2
            top = y if down > 0.7 else y - TALL if down < -0.7 else y - TALL / 2
            box = Box(left, top, left + wide, top + TALL)
            if frame.holds(box):
                yield Label(box, (x, y), distance)


def _around(mark: Spot, radius: float) -> Box:
    return Box(mark[0] - radius, mark[1] - radius, mark[0] + radius, mark[1] + radius)


def _free(label: Label, marks: Sequence[Spot], radius: float, others: Sequence[Label]) -> bool:
    return not any(label.box.meets(other.box, GAP) for other in others) and not any(
        label.box.meets(_around(mark, radius)) for mark in marks
    )


def _disturbance(
    label: Label,
    own: int,
    marks: Sequence[Spot],
    radius: float,
    others: Sequence[Label],
    leaders: Sequence[tuple[Spot, Spot]],
) -> float:
    mark = marks[own]
    line = (mark, label.end)
    return (
        label.distance
        + 60 * sum(other.box.crossed(*line) for other in others)
        + 40 * sum(label.box.crossed(*leader) for leader in leaders)
        + 20 * sum(_around(m, radius).crossed(*line) for m in marks if math.dist(m, mark) > radius)
        + 30 * sum(_cross(line, leader) for leader in leaders)
    )


def _cross(one: tuple[Spot, Spot], other: tuple[Spot, Spot]) -> bool:
    def side(a: Spot, b: Spot, c: Spot) -> float:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    return side(*one, other[0]) * side(*one, other[1]) < 0 and side(*other, one[0]) * side(*other, one[1]) < 0
