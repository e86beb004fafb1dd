"""From a PEFT adapter to the two halves that are served and published."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from splitveil.adapters import Adapter, LoraModule
from splitveil.errors import UnsupportedAdapterError
from splitveil.lattice.parameters import DEFAULT, ParameterSet
from splitveil.private.ckks_parameters import MAX_ROWS as MAX_SEALED_ROWS
from splitveil.private.ckks_served import SealedServed
from splitveil.private.core import LayerSpec
from splitveil.private.directions import ByLayer
from splitveil.private.engine import KeyedHalf, ServedHalf
from splitveil.private.layer import publish, row_sizes
from splitveil.private.published import (
    ENGINE_SEALED,
    MAX_FEATURES,
    MAX_HEADER,
    MAX_LAYERS,
    MAX_OUTPUTS,
    MAX_RANK,
    MAX_WIDTH,
    Publication,
    digest,
)
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
    keyed: KeyedHalf | None = field(default=None, repr=False)
    """Where a session needs keys of its client's: the half that takes them, and gives the session's own."""
    source: str = field(default="", repr=False)
    """Digest of the folder that it was made from, to tell whether the folder holds something else now."""
    directions: ByLayer | None = field(default=None, repr=False)
    """What the vendor measured of it, by the name of a layer's first module: for the ledger alone."""

    def answer_size(self, layers: Sequence[int]) -> int:
        """Bytes of one row's answer for these layers, which must exist."""
        sizes = row_sizes(self.publication)
        return sum(sizes[index][1] for index in layers)


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


def layer_shape(spec: LayerSpec) -> tuple[int, int, int]:
    """(inputs, rows of the core, outputs) of a private layer, from the shapes of its matrices alone."""
    rank = spec.A.shape[0] if spec.B is None else min(spec.B.shape)
    return spec.A.shape[1], rank, sum(size for _, size in spec.outputs)


def check_accepted(
    where: str, specs: Sequence[LayerSpec], *, engine: str = "lattice", parameters: ParameterSet = DEFAULT
) -> int:
    """Bytes that publishing these layers makes, but for a small header. ``where`` names the adapter in messages.

    Raises ``UnsupportedAdapterError`` for more, or larger ones, than clients accept: the same limits as in
    ``Publication.from_bytes`` and on the wire, met by the vendor at the start and not by every client afterwards.
    """

    def demand(what: str, got: int, limit: int, advice: str) -> None:
        if got > limit:
            raise UnsupportedAdapterError(f"{where}: {what}: {got:,}, clients accept at most {limit:,}; {advice}")

    demand("private layers", len(specs), MAX_LAYERS, "train fewer modules")
    total = 0
    for spec in specs:
        name = spec.outputs[0][0]
        width, rank, features = layer_shape(spec)
        demand(f"modules that share A with {name}", len(spec.outputs), MAX_OUTPUTS, "train fewer of them")
        demand(f"inputs of {name}", width, MAX_WIDTH, "train without that module")
        demand(f"outputs of {name}", max(size for _, size in spec.outputs), MAX_FEATURES, "train without that module")
        if engine == ENGINE_SEALED:
            # Its publication has no tensors, and its answers are the outputs themselves.
            demand(f"outputs of {name} with the sealed engine", features, MAX_RANK, "use the lattice engine")
        else:
            demand(f"rank of {name}", rank, MAX_RANK, "train with a lower rank")
            total += 4 * rank * (parameters.ring_degree + features)
    demand(
        "bytes to publish",
        total,
        codec.MAX_PUBLICATION - MAX_HEADER,
        "train with a lower rank or fewer modules, or use the sealed engine, which publishes no matrices",
    )
    return total


def publish_adapter(
    adapter: Adapter,
    *,
    noise: float = 0.0,
    engine: str = "lattice",
    parameters: ParameterSet = DEFAULT,
    allow_insecure: bool = False,
    gauge_key: bytes | None = None,
) -> ServedAdapter:
    """Splits an adapter into its served and its published half.

    Arguments and errors: ``private.layer.publish``; and ``UnsupportedAdapterError`` for what clients would not accept.
    """
    specs = layer_specs(adapter.modules)
    check_accepted(str(adapter.path), specs, engine=engine, parameters=parameters)
    half, publication = publish(
        specs,
        noise=noise,
        engine=engine,
        parameters=parameters,
        allow_insecure=allow_insecure,
        gauge_key=gauge_key,
    )
    published = publication.to_bytes()
    widest = max(row_sizes(publication), key=max)
    rows = codec.max_rows(*widest)
    keyed = half if isinstance(half, SealedServed) else None
    if keyed is not None:
        rows = min(rows, MAX_SEALED_ROWS)
    return ServedAdapter(half, publication, published, digest(published), rows, keyed, adapter.digest)
