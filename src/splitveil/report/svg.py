"""SVG as text: elements whose attributes and contents are always escaped, and the two ways a plot is delivered."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files

STYLE = files("splitveil.report").joinpath("templates/plot.css").read_text(encoding="utf-8")
"""Colours of plots, light and dark; part of the page, and of every file of its own."""


def element(tag: str, /, *children: str, text: str = "", **attributes: str | float) -> str:
    """One element. ``class_`` stands for class, and an underscore for a hyphen; floats keep two decimals."""
    words = "".join(f' {name.strip("_").replace("_", "-")}="{_value(v)}"' for name, v in attributes.items())
    return f"<{tag}{words}>{escape(text)}{''.join(children)}</{tag}>"


def path(points: Iterable[tuple[float, float]]) -> str:
    """The ``d`` of straight lines through ``points``."""
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


@dataclass(frozen=True)
class Plot:
    """A finished plot."""

    name: str
    """Its file name without the suffix, and its id in the page."""
    width: float
    height: float
    title: str
    description: str
    """What it shows, for people who do not see it."""
    body: str

    def inline(self) -> str:
        """For the page, whose own style holds the colours."""
        return self._svg("")

    def file(self) -> str:
        """As a file of its own."""
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + self._svg(element("style", text=STYLE))

    def _svg(self, style: str) -> str:
        return element(
            "svg",
            element("title", text=self.title, id=f"{self.name}-title"),
            element("desc", text=self.description, id=f"{self.name}-desc"),
            style,
            self.body,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            role="img",
            class_="plot",
            aria_labelledby=f"{self.name}-title {self.name}-desc",
        )


def _value(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape(str(value))
