"""The private part of every adapted module, added by forward hooks: the model itself is not changed.

pre-hook   the module's input leaves as an encrypted query (one for all modules of a site)
forward    the module computes its base product while the query is under way
hook       the answer is recovered and added, in float32, before rounding to the base's dtype (as PEFT does)
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from splitveil.errors import (
    BaseModelError,
    ConfigurationError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    SplitveilError,
)
from splitveil.private.engine import Pending, PublicHalf, Site
from splitveil.serving.fixed_length import FixedLength
from splitveil.serving.pool import MaskPool
from splitveil.serving.session import Session
from splitveil.serving.sites import Seen, SiteLearner
from splitveil.serving.stream import Ticket
from splitveil.wire import codec

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Adapted:
    """One adapted module: where it is, which published layer serves it, and its rows of Q."""

    name: str
    module: nn.Module
    layer: int
    first: int
    """First row of the module's part of the layer's Q."""
    features: int


# Told apart by identity: comparing tensors is slow and has no single truth value. Never printed: it holds activations.
@dataclass(eq=False, repr=False)
class _Flight:
    """One query under way, for one or several modules that read ``seen``."""

    seen: Seen
    copy: F32
    """The rows as they were sent, to compare with where a tensor keeps no version."""
    members: set[str]
    """Modules that have not taken their part yet."""
    layers: tuple[int, ...]
    site: Site
    parts: list[tuple[Ticket, Pending]]
    """(claim to the answer, what recovery needs), for each message that the rows were cut into."""
    cores: dict[int, torch.Tensor] | None = None
    """layer → (rows, rank), once the answers are in."""


@dataclass(frozen=True, repr=False)
class _Route:
    """How a module's query goes: worked out once, for a step's memory is cold where large weights have just passed."""

    members: frozenset[str]
    layers: tuple[int, ...]
    site: Site
    limit: int
    """Rows that one message may hold: the server's limit is for one layer, and a whole site's answers go in one."""


@dataclass
class _PerThread:
    """A forward pass belongs to one thread; so do its queries."""

    flights: list[_Flight] = field(default_factory=list)
    learner: SiteLearner | None = None
    deferred: list[SplitveilError] | None = None
    """Where errors are left for later while a generation of fixed length goes on; None to raise them."""


class Adapter:
    """All hooks of one connected model."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[Adapted],
        half: PublicHalf,
        session: Session,
        *,
        pool_bytes: int,
        fixed_length: bool = False,
    ) -> None:
        self.session = session
        session.upload(half.keys())
        self._half = half
        self._modules = {m.name: m for m in modules}
        self._pool_bytes = pool_bytes
        self._sites: dict[tuple[int, ...], Site] = {}
        self._routes: dict[tuple[str, ...], _Route] = {}
        self._group_of: dict[str, tuple[str, ...]] = {}
        self._fused: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._local = threading.local()
        self._learning = threading.Lock()
        self.pool: MaskPool | None = None
        self._fixed = FixedLength(model, self._defer) if fixed_length else None
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for m in modules:
            self._handles.append(m.module.register_forward_pre_hook(self._send_for(m), with_kwargs=True))
            self._handles.append(m.module.register_forward_hook(self._add_for(m), with_kwargs=True))

    def remove(self) -> None:
        """Takes all hooks off, stops the mask pool and ends the session; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        fixed, self._fixed = self._fixed, None
        if fixed is not None:
            fixed.remove()
        if self.pool is not None:
            self.pool.close()
        self.session.close()

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The sites learned so far: modules that share one query."""
        return list(dict.fromkeys(self._group_of.values()))

    # -- the model's own hooks ---------------------------------------------------------------------------------------

    def _state(self) -> _PerThread:
        if not hasattr(self._local, "state"):
            self._local.state = _PerThread()
        state: _PerThread = self._local.state
        return state

    def _begin(self, model: nn.Module, _: Any) -> None:
        state = self._state()
        # Queries whose answers nobody fetched: an interrupted pass, or a module that was skipped.
        state.flights.clear()
        if not self._group_of:
            state.learner = SiteLearner()

    def _end(self, model: nn.Module, _: Any, output: Any) -> None:
        state = self._state()
        state.flights.clear()
        learner, state.learner = state.learner, None
        # `output` is None when the forward pass itself failed: its own error is the one to be seen.
        if learner is None or output is None:
            return
        missing = self._modules.keys() - learner.seen
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise BaseModelError(
                f"{len(missing)} of {len(self._modules)} adapted modules were not called in a forward pass ({some}). "
                "The adapter would have no effect there: this base model bypasses them and cannot be used privately"
            )
        with self._learning:
            if not self._group_of:
                if self.pool is None:
                    sites = [self._site(self._layers(group)) for group in learner.groups()]
                    self.pool = MaskPool(sites, self._pool_bytes)
                # Last: an interrupt before it means that the next pass learns again.
                self._group_of = {name: group for group in learner.groups() for name in group}

    # -- an adapted module's hooks -----------------------------------------------------------------------------------

    def _send_for(self, m: Adapted) -> Any:
        def send(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                raise ConfigurationError("a private adapter serves inference only; call model.eval() first")
            x = args[0] if args else next(iter(kwargs.values()))
            state = self._state()
            if state.learner is not None:
                state.learner.saw(m.name, x)
            if self._flight(state, m, x) is None:
                state.flights.append(self._send(m, x))

        return send

    def _add_for(self, m: Adapted) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            state = self._state()
            flight = self._flight(state, m, x)
            if flight is None:
                raise ConfigurationError(f"the input of {m.name} changed while the module was running")
            flight.members.discard(m.name)
            if not flight.members:
                state.flights.remove(flight)
            core = self._receive(flight)[m.layer].to(output.device)
            flat = output.detach().reshape(-1, output.shape[-1]).float()
            rows = self._rows_of_q(m, output.device)
            total = flat + core[:, m.first : m.first + m.features] if rows is None else _added(flat, core, rows)
            return total.to(output.dtype).reshape(output.shape)

        return add

    def _flight(self, state: _PerThread, m: Adapted, x: torch.Tensor) -> _Flight | None:
        """The query under way that serves module ``m`` for input ``x``, if there is one."""
        for flight in state.flights:
            if m.name in flight.members and flight.seen.tensor is x:
                if flight.seen.is_now(x):
                    return flight
                if x.is_inference() and _same(x, flight.copy):
                    return flight
        return None

    def _send(self, m: Adapted, x: torch.Tensor) -> _Flight:
        route = self._route(m.name)
        rows = _rows(x)
        if rows.shape[1] != route.site.width:
            raise BaseModelError(f"{m.name} received {rows.shape[1]} features, the adapter expects {route.site.width}")
        parts = []
        for first in range(0, len(rows), route.limit):
            part = rows[first : first + route.limit]
            masks = route.site.make_masks(len(part)) if self.pool is None else self.pool.take(route.site, len(part))
            data, pending = route.site.query(part, masks)
            parts.append((self.session.submit(route.layers, len(part), data), pending))
        return _Flight(Seen.of(x), rows, set(route.members), route.layers, route.site, parts)

    def _route(self, name: str) -> _Route:
        members = self._group_of.get(name, (name,))
        route = self._routes.get(members)
        if route is None:
            layers = self._layers(members)
            site = self._site(layers)
            limit = min(self.session.welcome.max_rows, codec.max_rows(site.query_size, site.answer_size))
            route = self._routes[members] = _Route(frozenset(members), layers, site, limit)
        return route

    def _receive(self, flight: _Flight) -> dict[int, torch.Tensor]:
        if flight.cores is None:
            answers = [self._recovered(flight.site, ticket, pending) for ticket, pending in flight.parts]
            flight.cores = {
                layer: torch.from_numpy(
                    np.concatenate([answer[i] for answer in answers]) if len(answers) > 1 else answers[0][i]
                )
                for i, layer in enumerate(flight.layers)
            }
        return flight.cores

    def _recovered(self, site: Site, ticket: Ticket, pending: Pending) -> list[F32]:
        """One message's cores, or zeros in their place where errors are told later."""
        try:
            return site.recover(pending, self.session.result(ticket))
        except (ProtocolError, RefusedError, NonFiniteError) as error:
            deferred = self._state().deferred
            if deferred is None:
                raise
            deferred.append(error)
            return [np.zeros((pending.rows, rank), dtype=np.float32) for rank in site.ranks]

    def _defer(self, failures: list[SplitveilError] | None) -> None:
        self._state().deferred = failures

    def _layers(self, names: Sequence[str]) -> tuple[int, ...]:
        """The published layers that serve these modules, each once."""
        return tuple(dict.fromkeys(self._modules[name].layer for name in names))

    def _site(self, layers: tuple[int, ...]) -> Site:
        if layers not in self._sites:
            self._sites[layers] = self._half.site(layers)
        return self._sites[layers]

    def _rows_of_q(self, m: Adapted, device: torch.device) -> torch.Tensor | None:
        """Qᵀ of one module, (rank, features) float32 on ``device``; None for the identity."""
        q = self._half.publication.layers[m.layer].Q
        if q is None:
            return None
        key = (m.name, device)
        if key not in self._fused:
            part = torch.from_numpy(q[m.first : m.first + m.features])
            self._fused[key] = part.T.contiguous().to(device)
        return self._fused[key]


def _added(flat: torch.Tensor, core: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``flat`` + ``core``·``rows`` in float32, also under autocast: it leaves calls with ``out`` as they are."""
    if torch.is_autocast_enabled(flat.device.type):
        return torch.addmm(flat, core, rows, out=torch.empty_like(flat))
    return torch.addmm(flat, core, rows)


def _rows(x: torch.Tensor) -> F32:
    """All rows of a module's input as float32 on the CPU, (rows, features), in memory of their own."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if flat.dtype is torch.float32 and flat.device.type == "cpu":
        return flat.numpy().copy()  # numpy's copy takes half as long as torch's
    return flat.to(device="cpu", dtype=torch.float32, copy=True).contiguous().numpy()


def _same(x: torch.Tensor, rows: F32) -> bool:
    """Whether a module's input still is what was sent, bit for bit: as integers, which compare fast, NaN included."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if flat.dtype is torch.float32 and flat.device.type == "cpu" and flat.is_contiguous():
        return flat.shape == rows.shape and bool((flat.numpy().view(np.uint32) == rows.view(np.uint32)).all())
    return np.array_equal(_rows(x).view(np.uint32), rows.view(np.uint32))
