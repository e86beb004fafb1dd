"""What all workers share: the job from its file, timed repetitions, and the one JSON object that they print.

Needs numpy alone and Python 3.10, for it runs in the environments of other libraries.
"""

import argparse
import importlib.metadata
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MOST = 200
"""Repetitions at most."""


@dataclass
class Job:
    """One token through one LoRA layer: ``x ↦ B(Ax)`` with A (r, d_in), B (d_out, r), x (d_in,), all float32."""

    A: np.ndarray = field(repr=False)
    B: np.ndarray = field(repr=False)
    x: np.ndarray = field(repr=False)
    variant: str
    seconds: float


@dataclass
class Measured:
    """What a worker found out; a time or a size that the library has no use for stays out of ``cpu`` and ``sizes``."""

    sizes: dict = field(default_factory=dict)
    """up, down: bytes a token; keys, published: bytes once."""
    cpu: dict = field(default_factory=dict)
    """Seconds of each repetition of server, encrypt, decrypt, offline; setup once."""
    wall: dict = field(default_factory=dict)

    def step(self, name, call, share=1):
        """Calls and returns; notes the time, ``1/share`` of it."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self.cpu.setdefault(name, []).append(cpu / share)
        self.wall.setdefault(name, []).append(wall / share)
        return result

    def repeat(self, seconds, once):
        """Calls ``once`` until the time is over, once at the least; returns its last result.

        The first of three or more finds cold caches, and does not count.
        """
        setup = {name: list(taken) for name, taken in self.cpu.items()}
        end, count, result = time.perf_counter() + seconds, 0, None
        while count == 0 or (count < MOST and time.perf_counter() < end):
            result = once()
            count += 1
        if count > 2:
            for times in (self.cpu, self.wall):
                for name in times.keys() - setup.keys():
                    del times[name][: len(times[name]) // count]
        return result


def job():
    """The job that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--variant", default="")
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    with np.load(options.job) as arrays:
        return Job(arrays["A"], arrays["B"], arrays["x"], options.variant, options.seconds)


def core(job):
    """(Q, C): an orthonormal basis of span(B), (d_out, r), and what it leaves, (r, d_in): ``Q·C = B·A``."""
    q, triangle = np.linalg.qr(job.B.astype(np.float64))
    return q, triangle @ job.A.astype(np.float64)


def power_of_two(least):
    return 1 << (int(least) - 1).bit_length()


def report(measured, output, package):
    """Prints the result: nothing else may be in the last line of the output."""
    values = [float(value) for value in np.asarray(output, dtype=np.float64).ravel()]
    facts = {"version": importlib.metadata.version(package), "output": values}
    print(json.dumps({**facts, "sizes": measured.sizes, "cpu": measured.cpu, "wall": measured.wall}))
