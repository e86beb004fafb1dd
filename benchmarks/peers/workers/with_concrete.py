"""concrete-ml-extensions: one encrypted integer vector times one plain integer matrix, with its default parameters.

It has one product and no second one on the result: variant ``merged`` multiplies by B·A, variant ``core`` by C alone,
with Q published, as by Splitveil's lattice engine. Concrete ML quantises to 7 or 8 bits; 11 are the most that surely
stay below the 27 bits which the default parameters reserve for the result, for inputs of 4096 features.
"""

import concrete_ml_extensions as fhe
import numpy as np
from timed import Measured, core, job, report

BITS = 11
COLUMNS = 2048
"""Results in one ciphertext: the degree of the polynomials of the default parameters."""

work, measured = job(), Measured()
if work.variant == "core":
    q, matrix = core(work)
    measured.sizes["published"] = 4 * q.size
else:
    q, matrix = None, work.B.astype(np.float64) @ work.A.astype(np.float64)


def quantised(values):
    """(integers as the library takes them, their unit)"""
    unit = float(np.abs(values).max()) / (2 ** (BITS - 1) - 1)
    return np.rint(values / unit).astype(np.int64).astype(np.uint64), unit


parameters = fhe.MatmulCryptoParameters.deserialize(fhe.default_params())
secret, compression = measured.step("setup", lambda: fhe.create_private_key(parameters))
measured.sizes["keys"] = len(compression.serialize())
weights, weight_unit = quantised(matrix.T)
last = len(matrix) % COLUMNS or COLUMNS


def encrypt():
    integers, unit = quantised(work.x[None])
    return fhe.encrypt_matrix(secret, parameters, integers).serialize(), unit


def answer(query):
    return fhe.matrix_multiplication(fhe.EncryptedMatrix.deserialize(query), weights, compression).serialize()


def decrypt(data, unit):
    result = fhe.CompressedResultEncryptedMatrix.deserialize(data)
    integers = fhe.decrypt_matrix(result, secret, parameters, num_valid_glwe_values_in_last_ciphertext=last)
    values = np.asarray(integers).astype(np.int64)[0] * (unit * weight_unit)
    return values if q is None else q @ values


def once():
    query, unit = measured.step("encrypt", encrypt)
    result = measured.step("server", lambda: answer(query))
    measured.sizes |= {"up": len(query), "down": len(result)}
    return measured.step("decrypt", lambda: decrypt(result, unit))


report(measured, measured.repeat(work.seconds, once), "concrete-ml-extensions")
