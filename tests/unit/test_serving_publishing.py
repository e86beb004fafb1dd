"""What clients would refuse is refused when it is inspected and before it is published, and nothing else is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitveil.adapters import Adapter, LoraModule
from splitveil.errors import UnsupportedAdapterError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private import published
from splitveil.private.core import LayerSpec
from splitveil.private.published import MAX_HEADER, MAX_WIDTH, Publication
from splitveil.serving.costs import cost_of
from splitveil.serving.publishing import ServedAdapter, check_accepted, publish_adapter
from splitveil.wire import codec

GIB = 2**30


def adapter(*shapes: tuple[int, int, int]) -> Adapter:
    """Modules m0, m1, … of these (inputs, rank, outputs), in a folder ``lora``."""
    draw = np.random.default_rng(0)
    modules = []
    for i, (inputs, rank, outputs) in enumerate(shapes):
        a = draw.normal(size=(rank, inputs)).astype(np.float32)
        b = draw.normal(size=(outputs, rank)).astype(np.float32)
        modules.append(LoraModule(f"m{i}", a, b, 1.0))
    return Adapter(Path("lora"), None, "", tuple(modules))


def publish(loaded: Adapter) -> ServedAdapter:
    return publish_adapter(loaded, parameters=INSECURE_TEST, allow_insecure=True)


def of_shapes(shapes: Sequence[tuple[int, int]], rank: int, blocks: int) -> list[LayerSpec]:
    """Layers of every block with these (inputs, outputs), in no memory to speak of."""
    zero = np.float32(0)
    return [
        LayerSpec(
            np.broadcast_to(zero, (rank, inputs)),
            np.broadcast_to(zero, (outputs, rank)),
            1.0,
            ((f"layers.{block}.m{i}", outputs),),
        )
        for block in range(blocks)
        for i, (inputs, outputs) in enumerate(shapes)
    ]


# All linear modules of a block: q, k, v, o, gate, up, down.
LLAMA_8B = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
LLAMA_70B = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]


@pytest.mark.parametrize(
    ("shapes", "rank", "blocks", "gib"),
    [(LLAMA_8B, 64, 32, 0.44), (LLAMA_8B, 256, 32, 1.75), (LLAMA_70B, 64, 80, 1.88)],
    ids=["8B, rank 64", "8B, rank 256", "70B, rank 64"],
)
def test_adapters_of_large_models_fit(shapes: Sequence[tuple[int, int]], rank: int, blocks: int, gib: float) -> None:
    assert check_accepted("lora", of_shapes(shapes, rank, blocks)) / GIB == pytest.approx(gib, abs=0.01)


def test_what_is_too_large_to_publish_is_refused_with_a_way_out() -> None:
    specs = of_shapes(LLAMA_8B, 1024, 32)
    with pytest.raises(UnsupportedAdapterError) as error:
        check_accepted("lora", specs)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("lora: bytes to publish: 7,516,192,768, clients accept at most 4,278,190,080; ")
    assert "lower rank" in message
    assert check_accepted("lora", specs, engine="sealed") == 0


def test_the_estimate_is_the_publication_but_for_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit both are let through, a byte below it neither is, and nothing has been published by then."""
    loaded = adapter((64, 4, 32), (64, 40, 32))
    served = publish(loaded)
    tensors = cost_of(loaded, INSECURE_TEST).publication_bytes
    assert 0 < len(served.published) - tensors < 4096
    monkeypatch.setattr(codec, "MAX_PUBLICATION", tensors + MAX_HEADER)
    publish(loaded)
    monkeypatch.setattr(codec, "MAX_PUBLICATION", tensors + MAX_HEADER - 1)
    monkeypatch.setattr("splitveil.serving.publishing.publish", lambda *_, **__: pytest.fail("it was published"))
    for attempt in (publish, lambda it: cost_of(it, INSECURE_TEST)):
        with pytest.raises(UnsupportedAdapterError, match="lora: bytes to publish"):
            attempt(loaded)


def test_the_widest_layer_that_is_published_is_one_that_clients_read() -> None:
    served = publish(adapter((MAX_WIDTH, 1, 4)))
    read = Publication.from_bytes(served.published, allow_insecure=True)
    assert read.layers[0].width == MAX_WIDTH
    for attempt in (publish, cost_of):
        with pytest.raises(UnsupportedAdapterError, match="inputs of m0: 131,073, clients accept at most 131,072"):
            attempt(adapter((MAX_WIDTH + 1, 1, 4)))


def shared(count: int) -> list[LayerSpec]:
    """One layer of ``count`` modules."""
    outputs = tuple((f"m{i}", 1) for i in range(count))
    return [LayerSpec(np.ones((1, 8), np.float32), np.ones((count, 1), np.float32), 1.0, outputs)]


TOO_MUCH: dict[str, tuple[Callable[[], list[LayerSpec]], dict[str, Any], str]] = {
    "layers": (lambda: of_shapes([(8, 8)], 1, published.MAX_LAYERS + 1), {}, "private layers: 16,385, .* 16,384"),
    "outputs": (lambda: of_shapes([(8, published.MAX_FEATURES + 1)], 1, 1), {}, r"outputs of layers\.0\.m0: 1,048,577"),
    "rank": (
        lambda: of_shapes([(8, published.MAX_RANK + 1)], published.MAX_RANK + 1, 1),
        {},
        r"rank of layers\.0\.m0: 131,073",
    ),
    "modules of one A": (lambda: shared(published.MAX_OUTPUTS + 1), {}, "share A with m0: 65, .* 64"),
    "sealed outputs": (
        lambda: of_shapes([(8, published.MAX_RANK + 1)], 1, 1),
        {"engine": "sealed"},
        "with the sealed engine: 131,073, .* 131,072; use the lattice engine",
    ),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_every_limit_of_the_reader_is_one_of_the_publisher(case: str) -> None:
    make, how, match = TOO_MUCH[case]
    with pytest.raises(UnsupportedAdapterError, match=match):
        check_accepted("lora", make(), **how)
