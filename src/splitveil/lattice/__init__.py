"""Exact lattice arithmetic: parameter sets, ring products, samplers, hardness estimates."""
