"""Splitveil measures and closes the two leaks of a language model split between a device and a cloud."""

from splitveil.errors import SplitveilError
from splitveil.private.layer import PrivateLinear
from splitveil.serving.connect import connect, disconnect
from splitveil.serving.serve import serve

__all__ = ["PrivateLinear", "SplitveilError", "__version__", "connect", "disconnect", "serve"]
__version__ = "0.1.0"
