"""seal-python: the CKKS evaluation of splitveil.bench.ckks, without flooding.

Variant ``core``: only C is evaluated, and Q is published, as by Splitveil's lattice engine.
"""

import numpy as np
from timed import Measured, core, job, report

from splitveil.bench.ckks import CkksLayer

work, measured = job(), Measured()
if work.variant == "core":
    q, c = core(work)
    layer = measured.step("setup", lambda: CkksLayer(c, np.eye(len(c))))
    measured.sizes["published"] = 4 * q.size
else:
    q = None
    layer = measured.step("setup", lambda: CkksLayer(work.A, work.B))
measured.sizes["keys"] = layer.key_bytes


def recover(answer, norm):
    values = layer.decrypt(answer, norm)
    return values if q is None else q @ values


def once():
    query, norm = measured.step("encrypt", lambda: layer.encrypt(work.x))
    answer = measured.step("server", lambda: layer.answer(query))
    measured.sizes |= {"up": len(query), "down": len(answer)}
    return measured.step("decrypt", lambda: recover(answer, norm))


report(measured, measured.repeat(work.seconds, once), "seal-python")
