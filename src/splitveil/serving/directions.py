"""What a vendor measured of an adapter's directions, kept in its folder: ``splitveil extract --directions`` writes it.

A server has no base model, so it cannot measure what directions are worth to an attacker who does. The file is the
vendor's as the weights are, and like them it is never published.
"""

import json
from dataclasses import asdict
from pathlib import Path

from splitveil.adapters import Adapter
from splitveil.errors import ConfigurationError, DataError
from splitveil.private.directions import ByLayer
from splitveil.private.exposure import read_directions
from splitveil.private.published import Publication

FILE = "splitveil_directions.json"
FORMAT = 1
MAX_BYTES = 1 << 24


def write_directions_file(adapter: Adapter, directions: ByLayer) -> Path:
    """``directions`` by the name of a layer's first module, into the adapter's folder, in place of what was there.

    Raises ``ConfigurationError`` where the folder cannot be written to.
    """
    path = adapter.path / FILE
    # One line a layer, so that people can read it and see what changed.
    layers = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps([asdict(one) for one in found])}" for name, found in directions.items()
    )
    head = f'{{"format": {FORMAT}, "adapter": {json.dumps(adapter.digest)}, "layers": {{\n'
    written = path.with_suffix(".new")
    try:
        written.write_text(f"{head}{layers}\n}}}}\n", encoding="utf-8")
        written.replace(path)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror}); give --adapter a folder that you may write to"
        ) from None
    return path


def read_directions_file(adapter: Adapter) -> ByLayer | None:
    """What was measured of these very weights; None where nothing was.

    Raises ``DataError`` for a file that cannot be read, or that is of other weights.
    """
    path = adapter.path / FILE
    advice = "measure again with `splitveil extract --directions`, or take the file away"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {advice}") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"{MAX_BYTES} bytes are enough for any adapter")
        kept = json.loads(data)
        if not isinstance(kept, dict) or kept.keys() != {"format", "adapter", "layers"} or kept["format"] != FORMAT:
            raise ValueError(f"no measurement of format {FORMAT}")
        layers = {str(name): read_directions(found) for name, found in dict(kept["layers"]).items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not what `splitveil extract --directions` writes ({error}); {advice}") from None
    if kept["adapter"] != adapter.digest:
        raise DataError(f"{path} was measured of other weights or another configuration; {advice}")
    return layers


def check_directions(adapter: Adapter, directions: ByLayer, publication: Publication) -> None:
    """Raises ``DataError`` unless there is a curve for every layer that is published, up to all of its inputs."""
    widths = {layer.outputs[0][0]: layer.width for layer in publication.layers}
    wrong = [name for name in widths if not directions.get(name)] + [
        name for name, curves in directions.items() if any(curve.counts[-1] != widths.get(name) for curve in curves)
    ]
    if wrong:
        raise DataError(
            f"{adapter.path / FILE} has no curve of all inputs for the layer {wrong[0]!r}, as it is published; measure "
            "again with `splitveil extract --directions`, or take the file away"
        )
