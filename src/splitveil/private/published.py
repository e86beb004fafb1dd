"""What a vendor publishes, and its byte form: a safetensors file, which any tool can open and none executes.

A publication holds, for every private layer, the hint (one ring element a row), the orthonormal Q, the size of one
integer unit, the row bound ρ and the names of its outputs; and, once, the id and seed of the public randomness, the
parameter set's name and the noise δ. To a client it is untrusted input: everything is checked before it is used.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from splitveil.errors import ParameterError, PublicationError
from splitveil.lattice.parameters import DEFAULT, ParameterSet, parameter_set
from splitveil.private import ckks_parameters

FORMAT = "splitveil-publication-1"
ENGINE_SEALED = "sealed"
ENGINES = ("lattice", ENGINE_SEALED, "plain")
MAX_LAYERS = 16384
MAX_WIDTH = 1 << 17
MAX_FEATURES = 8 * MAX_WIDTH
"""Outputs of one module."""
MAX_RANK = 1 << 17
MAX_NORM_BOUND = 1 << 20
MAX_NOISE = 10.0
MAX_STEP = 1e30
MAX_OUTPUTS = 64
MAX_NAME = 512
MAX_HEADER = 16 << 20


@dataclass(frozen=True)
class PublicLayer:
    """The published half of one private layer with ``rank`` core rows and ``width`` inputs."""

    width: int
    rank: int
    step: float
    norm_bound: int
    outputs: tuple[tuple[str, int], ...]
    """(module, number of its output features), in the order of Q's rows."""
    Q: NDArray[np.float32] | None = field(repr=False, compare=False)
    """(Σ output features, rank), orthonormal; None for the identity."""
    hint: NDArray[np.uint32] | None = field(repr=False, compare=False)
    """(rank, N); None for the sealed engine, which publishes none, and the plain one, which hides nothing."""


@dataclass(frozen=True)
class Publication:
    """All published layers of one adapter."""

    id: bytes
    seed: bytes
    engine: str
    parameters: ParameterSet
    """Of the lattice engine; the sealed engine has a single set (``ckks_parameters``) and does not use this one."""
    noise: float
    layers: tuple[PublicLayer, ...]

    @property
    def parameters_name(self) -> str:
        """The name of the parameters in force."""
        return ckks_parameters.NAME if self.engine == ENGINE_SEALED else self.parameters.name

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        tensors: dict[str, NDArray[Any]] = {}
        described = []
        for index, layer in enumerate(self.layers):
            if layer.Q is not None:
                tensors[f"Q.{index}"] = np.ascontiguousarray(layer.Q)
            if layer.hint is not None:
                tensors[f"hint.{index}"] = np.ascontiguousarray(layer.hint)
            described.append(
                {
                    "width": layer.width,
                    "rank": layer.rank,
                    "step": layer.step,
                    "norm_bound": layer.norm_bound,
                    "outputs": [list(output) for output in layer.outputs],
                }
            )
        header = {
            "format": FORMAT,
            "id": self.id.hex(),
            "seed": self.seed.hex(),
            "engine": self.engine,
            "parameters": self.parameters_name,
            "noise": self.noise,
            "layers": described,
        }
        data: bytes = safetensors.numpy.save(tensors, {"splitveil": json.dumps(header)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, *, allow_insecure: bool = False) -> "Publication":
        """Reads and checks a publication. Raises ``PublicationError``, or ``ParameterError`` for its parameter set."""
        header = _header(data)
        try:
            tensors = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = repr(str(error)[:200])  # it may quote the file, which may hold anything
            raise PublicationError(f"the publication is not a readable safetensors file: {reason}") from None
        if header.get("format") != FORMAT:
            raise PublicationError(f"publication format {str(header.get('format'))[:64]!r}, expected {FORMAT!r}")
        engine = header.get("engine")
        if engine not in ENGINES:
            raise PublicationError(
                f"unknown engine {str(engine)[:64]!r} in the publication; expected 'lattice' or 'sealed'"
            )
        if engine == "plain" and not allow_insecure:
            raise PublicationError("the publication uses the plain engine, which is for tests only and hides nothing")
        name = str(header.get("parameters"))
        if engine == ENGINE_SEALED:
            if name != ckks_parameters.NAME:
                raise ParameterError(f"unknown parameter set {name[:64]!r}; known: {ckks_parameters.NAME}")
            parameters = DEFAULT
        else:
            parameters = parameter_set(name, allow_insecure=allow_insecure)
        described = header.get("layers")
        if not isinstance(described, list) or not 1 <= len(described) <= MAX_LAYERS:
            raise PublicationError(f"a publication has a list of 1 to {MAX_LAYERS} layers")
        layers = tuple(_layer(index, entry, tensors, engine, parameters) for index, entry in enumerate(described))
        names = [name for layer in layers for name, _ in layer.outputs]
        if len(set(names)) != len(names):
            raise PublicationError("a module appears twice in the publication")
        return cls(
            _hex(header, "id", 16),
            _hex(header, "seed", 32),
            engine,
            parameters,
            _number(header, "noise", 0.0, MAX_NOISE),
            layers,
        )


def digest(data: bytes) -> bytes:
    """The SHA-256 by which a publication is cached."""
    return hashlib.sha256(data).digest()


def _header(data: bytes) -> dict[str, Any]:
    """The JSON that ``to_bytes`` put into the safetensors metadata."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
        raise PublicationError(f"the publication is truncated or not a safetensors file ({len(data)} bytes)")
    try:
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["splitveil"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PublicationError("the publication's header is missing or malformed") from None
    if not isinstance(header, dict):
        raise PublicationError("the publication's header is not an object")
    return header


def _hex(entry: dict[str, Any], key: str, size: int) -> bytes:
    value = entry.get(key)
    try:
        decoded = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        decoded = b""
    if len(decoded) != size:
        raise PublicationError(f"publication: {key!r} must be {size} bytes in hexadecimal")
    return decoded


def _number(entry: dict[str, Any], key: str, low: float, high: float) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise PublicationError(f"publication: {key!r} must be a number from {low} to {high}, got {str(value)[:64]!r}")
    return float(value)


def _integer(entry: dict[str, Any], key: str, low: int, high: int) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PublicationError(f"publication: {key!r} must be an integer from {low} to {high}, got {str(value)[:64]!r}")
    return value


def _outputs(entry: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    outputs = entry.get("outputs")
    if not isinstance(outputs, list) or not 1 <= len(outputs) <= MAX_OUTPUTS:
        raise PublicationError(f"publication: a layer has 1 to {MAX_OUTPUTS} outputs")
    checked = []
    for output in outputs:
        if not isinstance(output, list) or len(output) != 2:
            raise PublicationError("publication: an output is a pair of module name and size")
        name, size = output
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise PublicationError(f"publication: a module name is printable and at most {MAX_NAME} characters long")
        checked.append((name, _integer({"size": size}, "size", 1, MAX_FEATURES)))
    return tuple(checked)


def _tensor(
    tensors: dict[str, NDArray[Any]], name: str, shape: tuple[int, int], dtype: type[np.generic]
) -> NDArray[Any]:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
        raise PublicationError(f"publication: tensor {name!r} must be {np.dtype(dtype)} {shape}, got {got}")
    return tensor


def _layer(
    index: int, entry: object, tensors: dict[str, NDArray[Any]], engine: str, parameters: ParameterSet
) -> PublicLayer:
    if not isinstance(entry, dict):
        raise PublicationError("publication: a layer is an object")
    rank, width = _integer(entry, "rank", 1, MAX_RANK), _integer(entry, "width", 1, MAX_WIDTH)
    outputs = _outputs(entry)
    total = sum(size for _, size in outputs)
    q: NDArray[np.float32] | None = None
    if f"Q.{index}" in tensors:
        q = _tensor(tensors, f"Q.{index}", (total, rank), np.float32)
        if not np.isfinite(q).all():
            raise PublicationError(f"publication: Q of layer {index} has NaN or infinite entries")
    elif total != rank:
        raise PublicationError(f"publication: layer {index} lacks Q, yet its rank {rank} is not its {total} outputs")
    hint = None
    if engine == ENGINE_SEALED and q is not None:
        raise PublicationError(f"publication: layer {index} has a Q; the sealed engine publishes none")
    if engine == "lattice":
        hint = _tensor(tensors, f"hint.{index}", (rank, parameters.ring_degree), np.uint32)
    step = _number(entry, "step", 0.0, MAX_STEP)
    if not step > 0:
        raise PublicationError(f"publication: the step of layer {index} must be positive")
    return PublicLayer(width, rank, step, _integer(entry, "norm_bound", 1, MAX_NORM_BOUND), outputs, q, hint)
