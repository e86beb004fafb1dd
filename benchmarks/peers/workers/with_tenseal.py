"""TenSEAL (CKKS), one thread, symmetric encryption, N = 8192.

Variant ``mm``: ``x.mm(A').mm(B')`` with the parameters of its README, as in its tutorials: a rotation for every input.
Variant ``dot``: the quickest way that we found in its interface. One dot product for every row of A, which leaves its
sum in all slots where x is padded to as many; those packed into a vector of r values; ``mm`` with at most 4096 columns
of B' at a time. One level more, and no rotation for every input.
"""

import numpy as np
import tenseal as ts
from timed import Measured, job, report

DEGREE = 8192
SLOTS = DEGREE // 2
MODULI = {"mm": [60, 40, 40, 60], "dot": [48, 40, 40, 40, 50]}
"""Bits; their sum is at most 218, the 128 bits of security that SEAL enforces for this degree."""

work, measured = job(), Measured()
rank = len(work.A)


def contexts():
    context = ts.context(
        ts.SCHEME_TYPE.CKKS,
        poly_modulus_degree=DEGREE,
        coeff_mod_bit_sizes=MODULI[work.variant],
        encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )
    context.global_scale = 2**40
    context.generate_galois_keys()
    return context


context = measured.step("setup", contexts)
measured.sizes["keys"] = len(
    context.serialize(save_public_key=False, save_secret_key=False, save_galois_keys=True, save_relin_keys=False)
)


def plain(matrix):
    return ts.plain_tensor(matrix.ravel().tolist(), list(matrix.shape))


if work.variant == "mm":
    x, a, b = work.x, plain(work.A.T), plain(work.B.T)
else:
    x, wide = np.zeros(SLOTS), np.zeros((rank, SLOTS))
    x[: len(work.x)], wide[:, : len(work.x)] = work.x, work.A
    a = [row.tolist() for row in wide]
    b = [plain(work.B[first : first + SLOTS].T) for first in range(0, len(work.B), SLOTS)]


def evaluate(query):
    vector = ts.ckks_vector_from(context, query)
    if work.variant == "mm":
        return [vector.mm(a).mm(b).serialize()]
    packed = ts.CKKSVector.pack_vectors([vector.dot(row) for row in a])
    return [packed.mm(part).serialize() for part in b]


def once():
    query = measured.step("encrypt", lambda: ts.ckks_vector(context, x.tolist()).serialize())
    answers = measured.step("server", lambda: evaluate(query))
    measured.sizes |= {"up": len(query), "down": sum(map(len, answers))}
    parts = measured.step("decrypt", lambda: [ts.ckks_vector_from(context, part).decrypt() for part in answers])
    return np.concatenate(parts)


report(measured, measured.repeat(work.seconds, once), "tenseal")
