"""Attacks on the private weights: what a client can make of the answers that it is entitled to."""
