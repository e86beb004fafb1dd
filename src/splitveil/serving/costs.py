"""What serving an adapter costs, from its shapes alone: for ``splitveil inspect``."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from splitveil.adapters import Adapter
from splitveil.lattice.parameters import DEFAULT, ParameterSet
from splitveil.serving.publishing import check_accepted, layer_shape, layer_specs


@dataclass(frozen=True)
class Kind:
    """Modules of one name and shape, such as all ``q_proj``."""

    name: str
    count: int
    ranks: str
    width: int
    features: int


@dataclass(frozen=True)
class Cost:
    """Bytes and rows. Which modules share a query depends on the base model, hence two figures for a token."""

    kinds: tuple[Kind, ...]
    modules: int
    rows: int
    publication_bytes: int
    sent_bytes: int
    sent_bytes_grouped: int
    received_bytes: int
    rows_until_learned: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def cost_of(adapter: Adapter, parameters: ParameterSet = DEFAULT) -> Cost:
    """What serving ``adapter`` would cost under ``parameters``; ``publication_bytes`` leaves out a small header.

    Raises ``UnsupportedAdapterError`` for an adapter that clients would not accept.
    """
    specs = layer_specs(adapter.modules)
    kinds: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for module in adapter.modules:
        kinds[module.name.rpartition(".")[2], module.d_in, module.d_out].append(module.rank)
    widths, ranks, _ = zip(*(layer_shape(spec) for spec in specs), strict=True)
    parents = {(spec.outputs[0][0].rpartition(".")[0], width) for spec, width in zip(specs, widths, strict=True)}
    return Cost(
        kinds=tuple(
            Kind(name, len(found), _span(found), width, outputs) for (name, width, outputs), found in kinds.items()
        ),
        modules=len(adapter.modules),
        rows=sum(ranks),
        publication_bytes=check_accepted(str(adapter.path), specs, parameters=parameters),
        sent_bytes=sum(4 * parameters.query_width(width) for width in widths),
        sent_bytes_grouped=sum(4 * parameters.query_width(width) for _, width in parents),
        received_bytes=sum(4 * rank for rank in ranks),
        rows_until_learned=min(widths),
    )


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)}"
