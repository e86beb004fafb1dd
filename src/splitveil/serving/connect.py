"""``connect`` and ``disconnect``: a base model that answers with a private adapter, and back."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from splitveil.errors import BaseModelError, ConfigurationError
from splitveil.private.layer import public_half
from splitveil.private.published import Publication
from splitveil.serving.address import check_adapter_name, require_loopback, split_address
from splitveil.serving.cache import PublicationCache
from splitveil.serving.hooks import Adapted, Adapter
from splitveil.serving.pool import DEFAULT_BYTES
from splitveil.serving.session import Session
from splitveil.serving.tls import ClientCredentials, ClientTLS

Model = TypeVar("Model", bound=nn.Module)
_ENGINES = ("lattice", "sealed")
_connected: "weakref.WeakKeyDictionary[nn.Module, Adapter]" = weakref.WeakKeyDictionary()
_finalizers: "weakref.WeakKeyDictionary[nn.Module, weakref.finalize[..., Any]]" = weakref.WeakKeyDictionary()


def connect(
    base_model: Model,
    address: str,
    adapter: str,
    *,
    api_key: str | None = None,
    tls: ClientTLS | None = None,
    allow_plaintext: bool = False,
    pool_bytes: int = DEFAULT_BYTES,
    cache: PublicationCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    fixed_length: bool = False,
    engine: str = "lattice",
    allow_insecure: bool = False,
) -> Model:
    """Attaches a private adapter, served at ``address`` ("host:port"), to a local base model, and returns that model.

    The model's weights, modules and state-dict keys stay as they are: the private part comes in through hooks, and
    ``generate()`` works as before, without consuming torch's random state. What leaves this machine is encrypted
    rows; what stays visible to the server is how many, and when (SECURITY.md).

    ``api_key`` is what the vendor gave this client, where the vendor asks for one. ``tls`` connects with TLS;
    ``ClientTLS()`` trusts whom this machine trusts. Without it only this machine itself can be reached, unless
    ``allow_plaintext`` says that something else protects the way. ``pool_bytes`` bounds the masks
    prepared ahead of time, ``cache`` is where publications are kept (by default in the user's cache folder),
    ``progress(done, total)`` is called while a publication is downloaded.

    With ``fixed_length`` every ``generate()`` takes as many steps as ``max_new_tokens`` allows, whatever it says, and
    reports errors after the last one, so that neither the number of messages nor their pace shows where it stopped.
    ``engine`` is "lattice" or "sealed": an adapter that is served by the other one is refused, for the two protect the
    user differently (docs/design/sealed.md).

    Raises ``ConnectionFailedError``, ``UnknownAdapterError``, ``KeyRejectedError``, ``BaseModelError`` if the adapter
    is for another base, ``ConfigurationError`` if the model is connected already, or a certificate cannot be used.
    """
    host, _ = split_address(address)
    if tls is None:
        require_loopback(
            host, "connect beyond loopback", allow_plaintext=allow_plaintext, instead="--tls or --tls-ca FILE"
        )
    check_adapter_name(adapter)
    if base_model in _connected:
        raise ConfigurationError("this model is connected already; call splitveil.disconnect(model) first")
    session = Session(
        address,
        adapter,
        key=api_key or "",
        cache=cache or PublicationCache(),
        progress=progress,
        allow_insecure=allow_insecure,
        credentials=None if tls is None else ClientCredentials.read(tls),
    )
    try:
        _check_engine(session.publication.engine, engine)
        modules = locate(base_model, session.publication)
        half = public_half(session.publication)
        attached = Adapter(base_model, modules, half, session, pool_bytes=pool_bytes, fixed_length=fixed_length)
    except BaseException:
        session.close()
        raise
    _connected[base_model] = attached
    finalizer = weakref.finalize(base_model, _release, attached)
    finalizer.atexit = False
    _finalizers[base_model] = finalizer
    return base_model


def _check_engine(served: str, wanted: str) -> None:
    # The plain engine, which is for tests, has been refused or allowed before.
    if served in _ENGINES and served != wanted:
        raise ConfigurationError(
            f"this adapter is served by the {served} engine, and the {wanted} one was asked for; ask its vendor, or "
            f"accept it with --engine {served} (docs/design/sealed.md says how they differ)"
        )


def disconnect(model: nn.Module) -> None:
    """Takes the private adapter off: the model is as it was before ``connect``. Does nothing to other models."""
    adapter = _connected.pop(model, None)
    if adapter is not None:
        _finalizers.pop(model).detach()
        adapter.remove()


def _release(adapter: Adapter) -> None:
    """For a model that was dropped while connected: its threads and its place at the server are given up.

    The garbage collector may call this in any thread, those that are to end included, so another one waits for them.
    """
    threading.Thread(target=adapter.remove, name="splitveil-release", daemon=True).start()


def connection(model: nn.Module) -> Adapter:
    """The hooks and the session of a connected model. Raises ``ConfigurationError`` if it is not connected."""
    adapter = _connected.get(model)
    if adapter is None:
        raise ConfigurationError("this model is not connected; call splitveil.connect first")
    return adapter


def locate(model: nn.Module, publication: Publication) -> list[Adapted]:
    """The base model's modules that the publication adapts. Raises ``BaseModelError`` naming what does not fit."""
    # A look-up by name, not by attribute: the names are the server's, and attributes may be properties that do things.
    local = dict(model.named_modules(remove_duplicate=False))
    found = []
    for index, layer in enumerate(publication.layers):
        first = 0
        for name, features in layer.outputs:
            module = local.get(name)
            if module is None:
                raise BaseModelError(f"the base model has no module {name}; the adapter is for another base model")
            shape = features_of(module)
            if shape is None:
                raise BaseModelError(f"{name} is a {type(module).__name__}, not a linear module")
            if shape != (layer.width, features):
                raise BaseModelError(
                    f"{name} maps {shape[0]} to {shape[1]} features, the adapter {layer.width} to {features}; "
                    "it is for another base model"
                )
            found.append(Adapted(name, module, index, first, features))
            first += features
    return found


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear module of any make, or None.

    Linear layers of torch and of quantisation libraries say ``in_features``; GPT-2's Conv1D says ``nx`` and ``nf``.
    """
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        shape = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            return shape[0], shape[1]
    return None
