"""Splitveil measures and closes the two leaks of a language model split between a device and a cloud."""

import importlib
from typing import TYPE_CHECKING, Any

from splitveil.errors import SplitveilError

if TYPE_CHECKING:
    from splitveil.auditing.audit import audit
    from splitveil.private.layer import PrivateLinear
    from splitveil.serving.connect import connect, disconnect
    from splitveil.serving.serve import serve

__all__ = ["PrivateLinear", "SplitveilError", "__version__", "audit", "connect", "disconnect", "serve"]
__version__ = "0.1.0"

# Loaded when first asked for: torch alone takes seconds, which `splitveil --help` should not.
_HOMES = {
    "PrivateLinear": "splitveil.private.layer",
    "audit": "splitveil.auditing.audit",
    "connect": "splitveil.serving.connect",
    "disconnect": "splitveil.serving.connect",
    "serve": "splitveil.serving.serve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'splitveil' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
