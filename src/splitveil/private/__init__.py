"""The private linear layer: publish, query, answer, recover (protocol design, sections 1 to 5)."""

from splitveil.private.engine import PublicHalf, ServedHalf, Site
from splitveil.private.layer import PrivateLinear
from splitveil.private.published import Publication

__all__ = ["PrivateLinear", "PublicHalf", "Publication", "ServedHalf", "Site"]
