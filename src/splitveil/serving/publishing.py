"""From a PEFT adapter to the two halves that are served and published."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from splitveil.adapters import Adapter, LoraModule
from splitveil.lattice.parameters import DEFAULT, ParameterSet
from splitveil.private.core import LayerSpec
from splitveil.private.engine import ServedHalf
from splitveil.private.layer import publish
from splitveil.private.published import Publication, digest
from splitveil.wire import codec


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter as a server holds it: the private half, and the publication in bytes."""

    half: ServedHalf = field(repr=False)
    publication: Publication = field(repr=False)
    published: bytes = field(repr=False)
    digest: bytes
    max_rows: int
    """Rows that one query for one layer may have, so that neither it nor its answer outgrows a message."""

    def answer_size(self, layers: Sequence[int]) -> int:
        """Bytes of one row's answer for these layers, which must exist."""
        word = _word(self.publication)
        return sum(word * self.publication.layers[index].rank for index in layers)


def layer_specs(modules: Sequence[LoraModule]) -> list[LayerSpec]:
    """One private layer a module, except that neighbours with byte-identical A share one.

    A fused projection that a base model splits into q, k and v arrives as several modules with the same A: their B are
    stacked, and one core of r rows serves them all. Only children of one parent are joined, since only they can read
    one tensor.
    """
    groups: dict[tuple[str, float, bytes], list[LoraModule]] = {}
    for module in modules:
        parent = module.name.rpartition(".")[0]
        groups.setdefault((parent, module.scale, module.A.tobytes()), []).append(module)
    return [
        LayerSpec(
            group[0].A,
            np.vstack([module.B for module in group]),
            group[0].scale,
            tuple((module.name, module.B.shape[0]) for module in group),
        )
        for group in groups.values()
    ]


def publish_adapter(
    adapter: Adapter,
    *,
    noise: float = 0.0,
    engine: str = "lattice",
    parameters: ParameterSet = DEFAULT,
    allow_insecure: bool = False,
) -> ServedAdapter:
    """Splits an adapter into its served and its published half. Raises as ``private.layer.publish`` does."""
    half, publication = publish(
        layer_specs(adapter.modules), noise=noise, engine=engine, parameters=parameters, allow_insecure=allow_insecure
    )
    published = publication.to_bytes()
    widest = max(row_sizes(publication), key=max)
    return ServedAdapter(half, publication, published, digest(published), codec.max_rows(*widest))


def row_sizes(publication: Publication) -> list[tuple[int, int]]:
    """(query bytes, answer bytes) of one row of every layer on its own."""
    word = _word(publication)
    pad = 0 if publication.engine == "plain" else publication.parameters.pad_width
    return [(word * (layer.width + pad), word * layer.rank) for layer in publication.layers]


def _word(publication: Publication) -> int:
    """Bytes of one number on the wire."""
    return 8 if publication.engine == "plain" else 4
