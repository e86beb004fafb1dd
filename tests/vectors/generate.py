"""Writes the known-answer vectors, from the big-integer reference alone: ``python tests/vectors/generate.py``.

Every file is an object with a header (what the vectors are about, how to read them) and a list of vectors. Each vector
says in ``expect`` what must come of it: ``success``, ``mismatch`` (the computation ends, the result is another), or the
name of the error that must be raised. An implementation in another language can be tested with these files alone.
"""

import base64
import copy
import hashlib
import json
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference

HERE = Path(__file__).resolve().parent
FORMAT = "splitveil-vectors-1"
ID, SEED = bytes(range(16)), bytes(range(100, 132))
Json = dict[str, Any]


def public_elements() -> Json:
    """SHAKE256 expansion of the public randomness."""
    vectors: list[Json] = []
    for width, index, degree in ((9, 0, 4), (9, 1, 16), (4096, 2, 2048)):
        words = reference.public_element(ID, SEED, width, index, degree)
        raw = b"".join(word.to_bytes(4, "little") for word in words)
        vectors.append(
            {
                "name": f"d = {width}, index {index}, N = {degree}",
                "expect": "success",
                "id": ID.hex(),
                "seed": SEED.hex(),
                "width": width,
                "index": index,
                "degree": degree,
                "message": reference.public_message(ID, SEED, width, index, degree).hex(),
                "first": words[:4],
                "sha256": hashlib.sha256(raw).hexdigest(),
            }
        )
    for name, change in (("short id", {"id": ID[1:].hex()}), ("short seed", {"seed": SEED[1:].hex()})):
        vectors.append({**vectors[0], "name": name, "expect": "ValueError", **change})
    return {
        "about": "Public ring elements. message is what SHAKE256 hashes; first are the first four coefficients; sha256 "
        "is that of all coefficients as little-endian 32-bit words.",
        "vectors": vectors,
    }


def ring_products() -> Json:
    """Products in Z_{2^32}[X]/(X^N + 1), small and extreme."""
    rng = random.Random(1)
    small = [rng.randint(-900, 900) for _ in range(16)]
    vectors = [
        {
            "name": name,
            "expect": "success",
            "fixed": fixed,
            "small": other,
            "product": reference.multiply(fixed, other),
            "reflected": reference.reflect(fixed),
        }
        for name, fixed, other in (
            ("X^3·X = −1", [0, 0, 0, 1], [0, 1, 0, 0]),
            ("random", [rng.randrange(2**32) for _ in range(16)], small),
            ("halves of 2^15 − 1", [0x7FFF7FFF] * 16, [2**15] * 16),
            ("halves of −2^15", [0x80008000] * 16, [-(2**15)] * 16),
            ("halves of −1", [0xFFFFFFFF] * 16, small),
            ("one entry at the limit", [0x80008000] * 16, [0] * 15 + [2**17]),
        )
    ]
    for name, other in (("one entry past the limit", [2**17 + 1] + [0] * 15), ("a row past it", [2**15 + 1] * 16)):
        vectors.append({"name": name, "expect": "ValueError", "fixed": [1] * 16, "small": other})
    return {
        "about": "fixed·small mod X^N + 1 and mod 2^32, and fixed(X^-1). An operand small longer than 2^17 in the "
        "2-norm is refused.",
        "vectors": vectors,
    }


def linear_layer() -> Json:
    """One publish, query, answer, recover with all randomness given; N does not divide d."""
    rng = random.Random(2)
    draw = lambda bound, count: [rng.randint(-bound, bound) for _ in range(count)]  # noqa: E731
    degree, pad_width, width, rows = 16, 8, 21, 3
    core = [draw(9000, width) for _ in range(rows)]
    pad = [draw(128, pad_width) for _ in range(rows)]
    hint_error = [draw(800, degree) for _ in range(rows)]
    secret, error, pad_error = draw(1, degree), draw(2, width), draw(2, pad_width)
    noise = draw(800, rows)
    x = [value / 64 for value in draw(1000, width)]
    step = 2.0**-20
    elements = reference.public_elements(ID, SEED, width, degree)
    a, a_pad = elements[:-1], elements[-1]
    rho = reference.norm_bound(core)
    size = reference.theta(width, rho, 0.0, degree, pad_width, 128, 256.0) * 2**31 / rho
    encoded = reference.encode(x, size)
    hints = [reference.hint(*row, a, a_pad) for row in zip(core, pad, hint_error, strict=True)]
    masks = reference.mask(a, a_pad, secret, error, pad_error)
    sent = reference.query(encoded, masks)
    answers = [reference.answer(*row[:2], sent, row[2]) for row in zip(core, pad, noise, strict=True)]
    values = [reference.recovered(u, h, secret) for u, h in zip(answers, hints, strict=True)]
    length = sum(value * value for value in x) ** 0.5
    good: Json = {
        "name": "three rows, 21 inputs, N = 16",
        "expect": "success",
        "ring_degree": degree,
        "pad_width": pad_width,
        "id": ID.hex(),
        "seed": SEED.hex(),
        "core": core,
        "step": step,
        "pad": pad,
        "hint_error": hint_error,
        "secret": secret,
        "error": error,
        "pad_error": pad_error,
        "answer_noise": noise,
        "x": x,
        "elements": elements,
        "norm_bound": rho,
        "hint": hints,
        "encoded": encoded,
        "mask": masks[0] + masks[1],
        "corrections": [reference.dot(h, secret) % reference.Q for h in hints],
        "query": b"".join(word.to_bytes(4, "little") for word in sent).hex(),
        "answer": b"".join(word.to_bytes(4, "little") for word in answers).hex(),
        "values": values,
        "output": [value * step * length / size for value in values],
    }
    unreflected = [
        reference.hint(*row, [reference.reflect(a_k) for a_k in a], reference.reflect(a_pad))
        for row in zip(core, pad, hint_error, strict=True)
    ]
    other_pad = [reference.hint(c, p[::-1], f, a, a_pad) for c, p, f in zip(core, pad, hint_error, strict=True)]
    wrong_places = masks[0] + reference.add(reference.multiply(a_pad, secret)[:pad_width], pad_error)
    vectors = [
        good,
        {**good, "name": "public elements not reflected in the hint", "expect": "mismatch", "hint": unreflected},
        {**good, "name": "another pad in the hint than in the answer", "expect": "mismatch", "hint": other_pad},
        {**good, "name": "the pad's mask from the first n_pad places", "expect": "mismatch", "mask": wrong_places},
        {**good, "name": "answer without its last byte", "expect": "ProtocolError", "answer": good["answer"][:-2]},
        {**good, "name": "answer with a byte too many", "expect": "ProtocolError", "answer": good["answer"] + "00"},
        {**good, "name": "query without the pad", "expect": "ProtocolError", "query": good["query"][: 8 * width]},
    ]
    return {
        "about": "A complete exchange for one layer. values are what is left of the answers after the mask is taken "
        "off; output is C·x: float32, compared to six digits. query and answer are hexadecimal bytes.",
        "vectors": vectors,
    }


def safetensors(header: object, tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file, by its specification."""
    described: Json = {"__metadata__": {"splitveil": header if isinstance(header, str) else json.dumps(header)}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def publications() -> Json:
    """A publication, and all the ways in which one can be malformed."""
    rng = random.Random(3)
    layer = {"width": 9, "rank": 2, "step": 0.25, "norm_bound": 30000, "outputs": [["q_proj", 2], ["v_proj", 1]]}
    header: Json = {
        "format": "splitveil-publication-1",
        "id": ID.hex(),
        "seed": SEED.hex(),
        "engine": "lattice",
        "parameters": "insecure_64",
        "noise": 0.0,
        "layers": [layer],
    }
    q = struct.pack("<6f", 1, 0, 0, 1, 0, 0)
    tensors = {"Q.0": ("F32", [3, 2], q), "hint.0": ("U32", [2, 64], rng.randbytes(512))}
    vectors: list[Json] = []

    def put(name: str, expect: str, data: bytes) -> None:
        vectors.append({"name": name, "expect": expect, "publication": base64.b64encode(data).decode()})

    def changed(name: str, change: Callable[[Json], object], expect: str = "PublicationError") -> None:
        other = copy.deepcopy(header)
        change(other)
        put(name, expect, safetensors(other, tensors))

    def tensor(name: str, **other: tuple[str, list[int], bytes]) -> None:
        put(name, "PublicationError", safetensors(header, tensors | {k.replace("_", "."): v for k, v in other.items()}))

    good = safetensors(header, tensors)
    put("well formed", "success", good)
    size = int.from_bytes(good[:8], "little")
    for name, length in (("nothing", 0), ("half a length", 4), ("a length and nothing else", 8), ("half a header", 90)):
        put(f"cut: {name}", "PublicationError", good[:length])
    put("cut: a header and no tensors", "PublicationError", good[: 8 + size])
    put("cut: the last byte", "PublicationError", good[:-1])
    put("a byte too many", "PublicationError", good + b"\0")
    put("a header of 2^63 bytes", "PublicationError", (2**63).to_bytes(8, "little") + good[8:])
    put("a header of 2^24 + 1 bytes", "PublicationError", (2**24 + 1).to_bytes(8, "little") + good[8:])
    put("not JSON", "PublicationError", good[:8] + b"x" * size + good[8 + size :])
    for name, text in (("nested", "[" * 5_000), ("a number", "5"), ("a list", "[]"), ("null", "null"), ("empty", "")):
        put(f"description: {name}", "PublicationError", safetensors(text, tensors))
    for key in header:
        changed(
            f"without {key}",
            lambda h, key=key: h.pop(key),
            "ParameterError" if key == "parameters" else "PublicationError",
        )
        changed(
            f"{key} is an object",
            lambda h, key=key: h.update({key: {}}),
            "ParameterError" if key == "parameters" else "PublicationError",
        )
    for key in layer:
        changed(f"layer without {key}", lambda h, key=key: h["layers"][0].pop(key))
        changed(f"{key} is true", lambda h, key=key: h["layers"][0].update({key: True}))
    for key, values in {
        "format": ["splitveil-publication-2"],
        "engine": ["Lattice"],
        "id": [ID[1:].hex(), ID.hex() + "00", "zz" * 16],
        "seed": [SEED[1:].hex(), SEED.hex().replace("6", "六")],
        "noise": [-0.01, 10.5, float("nan"), float("inf")],
        "layers": [[], [5], [None]],
    }.items():
        for value in values:
            changed(f"{key} = {value!r}", lambda h, key=key, value=value: h.update({key: value}))
    # The sealed engine has parameters of its own.
    changed("engine = 'sealed'", lambda h: h.update(engine="sealed"), "ParameterError")
    for value in ("lattice-1024-512", "insecure_", ""):
        changed(f"parameters = {value!r}", lambda h, value=value: h.update(parameters=value), "ParameterError")
    for key, values in {
        "norm_bound": [0, -1, 2**20 + 1, 1.5, "30000"],
        "step": [0, -1.0, float("nan"), float("inf"), 1e31, "0.25"],
        "rank": [0, 1, 3, 2**17 + 1, 2.0],
        "width": [0, -9, 2**17 + 1, 9.0],
        "outputs": [
            [],
            [["q_proj", 2]],
            [["q_proj", 2], ["v_proj", 2]],
            [["q_proj", 3], ["q_proj", 0]],
            [["q_proj", 2], ["q_proj", 1]],
            [["q_proj", 2], ["v\nproj", 1]],
            [["q_proj", 2], ["", 1]],
            [["q_proj", 2], ["v" * 513, 1]],
            [["q_proj", 2, 0], ["v_proj", 1]],
            [["q_proj", 2.0], ["v_proj", 1]],
            [[f"m{i}", 1] for i in range(65)],
        ],
    }.items():
        for value in values:
            shown = repr(value) if len(repr(value)) < 60 else "too long"
            changed(f"{key} = {shown}", lambda h, key=key, value=value: h["layers"][0].update({key: value}))
    changed("a module in two layers", lambda h: h["layers"].append(layer))
    tensor("Q has a NaN", Q_0=("F32", [3, 2], struct.pack("<6f", 1, 0, float("nan"), 1, 0, 0)))
    tensor("Q is infinite", Q_0=("F32", [3, 2], struct.pack("<6f", 1, 0, float("-inf"), 1, 0, 0)))
    tensor("Q is float64", Q_0=("F64", [3, 2], struct.pack("<6d", 1, 0, 0, 1, 0, 0)))
    tensor("Q is transposed", Q_0=("F32", [2, 3], q))
    tensor("Q has three dimensions", Q_0=("F32", [3, 2, 1], q))
    tensor("the hint is int32", hint_0=("I32", [2, 64], bytes(512)))
    tensor("the hint has a row", hint_0=("U32", [1, 64], bytes(256)))
    tensor("the hint has degree 128", hint_0=("U32", [1, 128], bytes(512)))
    tensor("a shape that overflows", extra=("F32", [2**32, 2**32], b""))
    put("no hint", "PublicationError", safetensors(header, {"Q.0": tensors["Q.0"]}))
    put("no Q, though it is needed", "PublicationError", safetensors(header, {"hint.0": tensors["hint.0"]}))
    return {
        "about": "Publications, in base64; read with insecure parameter sets allowed. Each but the first is malformed.",
        "vectors": vectors,
    }


FILES: dict[str, Callable[[], Json]] = {
    "public_element.json": public_elements,
    "ring_product.json": ring_products,
    "linear_layer.json": linear_layer,
    "publication.json": publications,
}


def text(name: str) -> str:
    """The content of one file: one vector a line."""
    made = FILES[name]()
    lines = ",\n".join("  " + json.dumps(vector, ensure_ascii=False) for vector in made["vectors"])
    head = json.dumps({"format": FORMAT, "about": made["about"]}, indent=1, ensure_ascii=False).rstrip("\n}")
    return f'{head},\n "vectors": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    for file in FILES:
        (HERE / file).write_text(text(file), encoding="utf-8")
