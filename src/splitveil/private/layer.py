"""The front door: one private linear layer, or all layers of an adapter, by whichever engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError
from splitveil.lattice.parameters import DEFAULT, ParameterSet
from splitveil.private import ckks, lattice_served, plain
from splitveil.private.ckks_public import SealedPublic, sealed_row_size
from splitveil.private.core import LayerSpec
from splitveil.private.engine import PublicHalf, ServedHalf, Site
from splitveil.private.lattice_public import LatticePublic
from splitveil.private.published import ENGINE_SEALED, Publication


def publish(
    specs: Sequence[LayerSpec],
    *,
    noise: float = 0.0,
    engine: str = "lattice",
    parameters: ParameterSet = DEFAULT,
    allow_insecure: bool = False,
    gauge_key: bytes | None = None,
) -> tuple[ServedHalf, Publication]:
    """Splits private maps into the vendor's served half and the publication.

    ``gauge_key``, 32 secret bytes that a vendor keeps, has the same weights published in the same gauge every time;
    the lattice engine needs it where weights are published more than a few times. The sealed engine shows no gauge.

    Raises ``ConfigurationError`` for an unknown engine, for the sealed one where seal-python is not installed, and for
    the plain engine or an ``insecure_…`` parameter set unless ``allow_insecure``.
    """
    if (engine == "plain" or parameters.is_insecure) and not allow_insecure:
        raise ConfigurationError("the plain engine and insecure_… parameter sets are for tests; they hide nothing")
    if engine == "plain":
        return plain.publish(specs)
    if engine == ENGINE_SEALED:
        return ckks.publish(specs, noise=noise)
    if engine != "lattice":
        raise ConfigurationError(f"unknown engine {engine!r}; expected 'lattice' or 'sealed'")
    return lattice_served.publish(specs, noise=noise, parameters=parameters, gauge_key=gauge_key)


def public_half(publication: Publication) -> PublicHalf:
    """The client's half for a publication that has been checked (``Publication.from_bytes``).

    Raises ``ConfigurationError``, with the install command, where a sealed layer's client lacks seal-python.
    """
    match publication.engine:
        case "plain":
            return plain.PlainPublic(publication)
        case "sealed":
            return SealedPublic(publication)
    return LatticePublic(publication)


def row_sizes(publication: Publication) -> list[tuple[int, int]]:
    """(query bytes, answer bytes) of one row of every layer on its own."""
    match publication.engine:
        case "plain":
            return [(8 * layer.width, 8 * layer.rank) for layer in publication.layers]
        case "sealed":
            return [sealed_row_size(layer) for layer in publication.layers]
    words = publication.parameters.query_width
    return [(4 * words(layer.width), 4 * layer.rank) for layer in publication.layers]


@dataclass(frozen=True)
class PrivateLinear:
    """The public half of a single private linear layer: query, send it anywhere, recover.

    >>> served, public = PrivateLinear.publish(linear)      # the vendor keeps `served`, gives `public` to anyone
    >>> query, pending = public.query(x)                    # x: (rows, d_in) float32
    >>> answer = served.answer([0], len(x), query)          # at the vendor: sees only the query
    >>> y = public.recover(pending, answer)                 # (rows, d_out): W x + bias, within the stated error
    """

    publication: Publication
    bias: NDArray[np.float32] | None = field(default=None, repr=False)
    """(d_out,) added by the client: a bias is public."""

    @staticmethod
    def publish(linear: Any, *, scale: float = 1.0, noise: float = 0.0) -> tuple[ServedHalf, "PrivateLinear"]:
        """Splits a ``torch.nn.Linear`` (whose weight becomes private), or a pair ``(A, B)`` with ``ΔW = scale·B·A``.

        ``A`` is (r, d_in) and ``B`` (d_out, r), arrays or tensors. Raises ``ConfigurationError`` if the shapes do not
        fit or for a noise outside its range, ``NonFiniteError`` for NaN or infinity.
        """
        bias = None
        if isinstance(linear, tuple):
            a, b = (_matrix(m) for m in linear)
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                raise ConfigurationError(f"A (r, d_in) and B (d_out, r) are needed, got {a.shape} and {b.shape}")
            spec = LayerSpec(a, b, scale, (("linear", b.shape[0]),))
        else:
            weight = _matrix(linear.weight)
            bias = None if linear.bias is None else _matrix(linear.bias)
            spec = LayerSpec(weight, None, scale, (("linear", weight.shape[0]),))
        served, publication = publish([spec], noise=noise)
        return served, PrivateLinear(publication, bias)

    @property
    def site(self) -> Site:
        """The layer as a site of its own; masks come from here when they are wanted ahead of time."""
        return public_half(self.publication).site([0])

    def query(self, x: NDArray[np.float32]) -> tuple[bytes, Any]:
        """Encrypts rows of x (rows, d_in): the bytes to send, and what to keep for ``recover``."""
        site = self.site
        return site.query(np.ascontiguousarray(x, dtype=np.float32), site.make_masks(len(x)))

    def recover(self, pending: Any, answer: bytes) -> NDArray[np.float32]:
        """(rows, d_out) float32: the layer's output. Raises ``ProtocolError`` for an answer of the wrong length."""
        (core,) = self.site.recover(pending, answer)
        q = self.publication.layers[0].Q
        out = core if q is None else core @ q.T
        return out if self.bias is None else out + self.bias


def _matrix(tensor: Any) -> NDArray[np.float32]:
    """A float32 array of an array or a torch tensor, which is recognised by its methods: torch is not needed here."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().float().numpy()
    return np.asarray(tensor, dtype=np.float32)
