"""OpenFHE (CKKS), the layout of splitveil.bench.ckks: N = 8192, complex slots, HEStd_128_classic, hoisted rotations.

A enters as r generalised diagonals in baby and giant steps; folds by halves leave ``(Ax)[i mod r]`` in slot i; r
diagonals of B follow, outputs past 4096 in the imaginary parts.
"""

import numpy as np
import openfhe as fhe
from timed import Measured, job, power_of_two, report

DEGREE = 8192
SLOTS = DEGREE // 2

work, measured = job(), Measured()
k = power_of_two(len(work.A))
period = max(k, power_of_two(len(work.x)))
babies = 1 << (k.bit_length() // 2)
folds = [k << index for index in range((period // k).bit_length() - 1)]
steps = sorted({*range(1, babies), *range(babies, k, babies), *folds})


def made():
    """(context, keys) with the rotation keys in OpenFHE's own table."""
    parameters = fhe.CCParamsCKKSRNS()
    parameters.SetSecurityLevel(fhe.SecurityLevel.HEStd_128_classic)
    parameters.SetRingDim(DEGREE)
    parameters.SetBatchSize(SLOTS)
    parameters.SetMultiplicativeDepth(2)
    parameters.SetScalingModSize(40)
    parameters.SetFirstModSize(50)
    parameters.SetScalingTechnique(fhe.ScalingTechnique.FIXEDMANUAL)
    parameters.SetKeySwitchTechnique(fhe.KeySwitchTechnique.HYBRID)
    # One prime a digit: with fewer digits the special primes would push the degree to 16384.
    parameters.SetNumLargeDigits(3)
    parameters.SetCKKSDataType(fhe.CKKSDataType.COMPLEX)
    context = fhe.GenCryptoContext(parameters)
    for feature in (fhe.PKESchemeFeature.PKE, fhe.PKESchemeFeature.KEYSWITCH, fhe.PKESchemeFeature.LEVELEDSHE):
        context.Enable(feature)
    keys = context.KeyGen()
    context.EvalRotateKeyGen(keys.secretKey, steps)
    return context, keys


def diagonals(matrix, level):
    """[giant step][baby step] plaintexts."""
    slot, groups = np.arange(SLOTS), []
    for giant in range(0, k, babies):
        group = []
        for baby in range(babies):
            values = matrix[slot % matrix.shape[0], (slot + giant + baby) % matrix.shape[1]]
            values = np.roll(values, giant).astype(np.complex128)
            group.append(context.MakeCKKSPackedPlaintext(values, 1, level, None, SLOTS))
        groups.append(group)
    return groups


def product(vector, groups):
    hoisted = context.EvalFastRotationPrecompute(vector)
    order = context.GetCyclotomicOrder()
    rotated = [vector] + [context.EvalFastRotation(vector, step, order, hoisted) for step in range(1, babies)]
    total = None
    for index, group in enumerate(groups):
        term = context.EvalMult(rotated[0], group[0])
        for ciphertext, plain in zip(rotated[1:], group[1:]):  # noqa: B905 - as many by construction
            term = context.EvalAdd(term, context.EvalMult(ciphertext, plain))
        term = context.Rescale(term)
        if index:
            term = context.EvalRotate(term, index * babies)
        total = term if total is None else context.EvalAdd(total, term)
    return total


context, keys = measured.step("setup", made)
measured.sizes["keys"] = len(fhe.SerializeEvalAutomorphismKeyString(fhe.BINARY))
wide = np.zeros((k, period))
wide[: len(work.A), : len(work.x)] = work.A
tall = np.zeros((2 * SLOTS, k))
tall[: len(work.B), : len(work.A)] = work.B
a, b = diagonals(wide, 0), diagonals(tall[:SLOTS] + 1j * tall[SLOTS:], 1)


def encrypt():
    padded = np.zeros(period, dtype=np.complex128)
    padded[: len(work.x)] = work.x
    plain = context.MakeCKKSPackedPlaintext(np.tile(padded, SLOTS // period), 1, 0, None, SLOTS)
    return fhe.Serialize(context.Encrypt(keys.publicKey, plain), fhe.BINARY)


def answer(query):
    vector = product(fhe.DeserializeCiphertextString(query, fhe.BINARY), a)
    for step in folds:
        vector = context.EvalAdd(vector, context.EvalRotate(vector, step))
    return fhe.Serialize(product(vector, b), fhe.BINARY)


def decrypt(data):
    plain = context.Decrypt(keys.secretKey, fhe.DeserializeCiphertextString(data, fhe.BINARY))
    plain.SetLength(SLOTS)
    slots = np.array(plain.GetCKKSPackedValue())
    return np.concatenate([slots.real, slots.imag])[: len(work.B)]


def once():
    query = measured.step("encrypt", encrypt)
    result = measured.step("server", lambda: answer(query))
    measured.sizes |= {"up": len(query), "down": len(result)}
    return measured.step("decrypt", lambda: decrypt(result))


report(measured, measured.repeat(work.seconds, once), "openfhe")
