"""How many publications of the same weights show ΔW·ΔWᵀ: a layer of the embedded clinic, or of --adapter.

python benchmarks/republished.py              each in a gauge of its own
python benchmarks/republished.py --gauge-key  all in the one that a vendor's key gives, as `splitveil serve` publishes
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np

from splitveil.adapters import load_adapter
from splitveil.embedded import folder
from splitveil.extraction.republished import gram
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.lattice_served import publish
from splitveil.serving.publishing import layer_specs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=folder("clinic"))
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--counts", default="1,50,100,136,200,300,400")
    parser.add_argument("--gauge-key", action="store_true")
    options = parser.parse_args()
    counts = [int(count) for count in options.counts.split(",")]
    spec = layer_specs(load_adapter(options.adapter).modules)[options.layer]
    if spec.B is None:
        parser.error("a layer of full rank has no gauge")
    delta = spec.scale * spec.B.astype(np.float64) @ spec.A.astype(np.float64)
    # Q, step and ρ are the same under any parameter set, and this one publishes quickly.
    key = os.urandom(32) if options.gauge_key else None
    published = [publish([spec], noise=0.0, parameters=INSECURE_TEST, gauge_key=key)[1] for _ in range(max(counts))]
    print(f"{spec.outputs[0][0]}: rank {min(spec.B.shape)}\n")
    print("| publications | error of ΔW·ΔWᵀ | misfit | s |\n|---|---|---|---|")
    for count in counts:
        began = time.process_time()
        found = gram(published[:count], 0)
        truth = found.frame.T @ delta @ delta.T @ found.frame
        error = np.linalg.norm(found.values - truth) / np.linalg.norm(truth)
        print(f"| {count} | {error:.2g} | {found.misfit:.1g} | {time.process_time() - began:.0f} |", flush=True)
    flat = np.eye(len(truth)) * np.trace(truth) / len(truth)
    print(f"\nwithout knowledge of anything but the trace: {np.linalg.norm(flat - truth) / np.linalg.norm(truth):.2g}")


if __name__ == "__main__":
    main()
