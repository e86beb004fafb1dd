"""A causal language model cut in two: a device half, a cloud half, and exactly what crosses between them."""

from splitveil.split.crossing import Crossing
from splitveil.split.halves import CloudHalf, DeviceHalf, Split, cut

__all__ = ["CloudHalf", "Crossing", "DeviceHalf", "Split", "cut"]
