"""The parts of benchmarks/peers.py: who is measured, their environments, the runs, the report."""
