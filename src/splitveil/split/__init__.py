"""A causal language model cut in two or three: a device half, a cloud half, and exactly what crosses between them."""

from splitveil.split.crossing import Crossing
from splitveil.split.halves import CloudHalf, DeviceHalf, MiddlePart, Split, Three, cut, cut_in_three

__all__ = ["CloudHalf", "Crossing", "DeviceHalf", "MiddlePart", "Split", "Three", "cut", "cut_in_three"]
