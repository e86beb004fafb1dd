"""Medians of alternating runs, and what they ran on."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np


def median_times(work: dict[str, Callable[[], object]], runs: int, block: int = 1) -> dict[str, float]:
    """Median seconds of each piece of work over ``runs`` rounds after one that warms up.

    In a round every piece is called ``block`` times, one piece after the other: with a block of 1 each finds the
    processor's caches as the others left them, with a larger one mostly as it left them itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(runs + 1):
        for name, call in work.items():
            for _ in range(block):
                begun = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begun)
    return {name: float(np.median(taken[block:])) for name, taken in seconds.items()}


def machine() -> str:
    """Processor, cores and versions, in one line."""
    names = ("splitveil", "torch", "transformers", "peft", "numba", "grpcio")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a pseudo-file
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
