"""Defences: a crossing in, another crossing out. One file per defence, behind one small protocol."""
