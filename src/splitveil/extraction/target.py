"""What is attacked: an adapter, published and served as a server does it; and how close a clone of it comes.

The truth in here is for judging alone. Attacks see a ``Client``, or transcripts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitveil.adapters import Adapter, LoraModule
from splitveil.extraction.client import Client
from splitveil.private.published import Publication
from splitveil.serving.publishing import ServedAdapter, publish_adapter

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Delta:
    """One module's update in two factors: ΔW = left·right, (d_out, k) times (k, d_in)."""

    left: F64 = field(repr=False)
    right: F64 = field(repr=False)

    def square_distance(self, other: "Delta") -> float:
        """‖ΔW − ΔW'‖² in the Frobenius norm, without forming either."""
        left = np.hstack([self.left, -other.left])
        right = np.vstack([self.right, other.right])
        # Of triangular factors, so that nothing cancels.
        return float(np.linalg.norm(_triangular(left) @ _triangular(right.T).T) ** 2)

    @property
    def square(self) -> float:
        """‖ΔW‖²."""
        return float(np.linalg.norm(_triangular(self.left) @ self.right) ** 2)


def _triangular(matrix: F64) -> F64:
    """R of the QR decomposition: a factor with the same lengths and angles, and no more rows than columns."""
    found: F64 = np.linalg.qr(matrix)[1]
    return found


@dataclass(frozen=True)
class Target:
    """One adapter under one noise."""

    served: ServedAdapter = field(repr=False)
    truth: Mapping[str, Delta] = field(repr=False)
    first: Mapping[int, LoraModule] = field(repr=False)
    """The module that each published layer comes from; the first, where several share a layer."""

    @property
    def publication(self) -> Publication:
        """What everyone may see."""
        return self.served.publication

    def client(self) -> Client:
        """A fresh attacker, who has asked nothing yet."""
        return Client(self.publication, self.served.half.answer)

    def core(self, layer: int) -> F64:
        """The true core of a layer, not rounded, in units of its integers: (rank, d)."""
        published, deltas = self.publication.layers[layer], self.parts(layer)
        stacked = np.vstack([delta.left @ delta.right for delta in deltas])
        q = np.eye(published.rank) if published.Q is None else published.Q.astype(np.float64)
        found: F64 = q.T @ stacked / published.step
        return found

    def parts(self, layer: int) -> list[Delta]:
        """The true updates of a layer's modules, in the order of its outputs."""
        return [self.truth[name] for name, _ in self.publication.layers[layer].outputs]

    def clone(self, cores: Mapping[int, F64]) -> dict[str, Delta]:
        """The updates that estimated cores, (rank, d) in integer units, amount to. Layers left out have none."""
        found = {}
        for index, values in cores.items():
            layer, first = self.publication.layers[index], 0
            q = np.eye(layer.rank) if layer.Q is None else layer.Q.astype(np.float64)
            for name, features in layer.outputs:
                found[name] = Delta(q[first : first + features], values * layer.step)
                first += features
        return found


def publish_target(adapter: Adapter, noise: float) -> Target:
    """Publishes an adapter with answer noise δ, as ``splitveil serve`` does."""
    served = publish_adapter(adapter, noise=noise)
    modules = {module.name: module for module in adapter.modules}
    truth = {
        module.name: Delta(module.B.astype(np.float64) * module.scale, module.A.astype(np.float64))
        for module in adapter.modules
    }
    first = {i: modules[layer.outputs[0][0]] for i, layer in enumerate(served.publication.layers)}
    return Target(served, truth, first)


def errors(clone: Mapping[str, Delta], truth: Mapping[str, Delta]) -> dict[str, float]:
    """‖ΔŴ − ΔW‖/‖ΔW‖ of every module, and of all together under the name ``""``; a missing module counts as 1.

    NaN for a module whose ΔW is 0.
    """
    found, wrong_total, right_total = {}, 0.0, 0.0
    for name, true in truth.items():
        right = true.square
        wrong = clone[name].square_distance(true) if name in clone else right
        found[name] = math.sqrt(wrong / right) if right else math.nan
        wrong_total, right_total = wrong_total + wrong, right_total + right
    return {"": math.sqrt(wrong_total / right_total) if right_total else math.nan} | found
