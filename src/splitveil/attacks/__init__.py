"""Inversion attacks: from what crosses back to the text. One file per attack, behind one small protocol."""
