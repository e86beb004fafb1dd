"""Split sessions on the wire: exact numbers, bounded messages, and an error of ours for everything else."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from splitveil.defences.catalogue import create
from splitveil.errors import ProtocolError
from splitveil.split import Crossing
from splitveil.splitlearning.carrying import crossing_of, labels_of, request_of
from splitveil.wire import split_codec as codec
from splitveil.wire import split_pb2 as pb
from splitveil.wire.parsing import MAX_HELLO, MAX_MESSAGE
from splitveil.wire.split_codec import Kind
from splitveil.wire.tensors import DType, Encoding, Packed, pack, unpack

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bits(rows: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(rows).view(np.uint32)


def back(rows: NDArray[np.float32], dtype: DType = DType.FLOAT32) -> Packed:
    """Packs, and demands that unpacking gives the same bits."""
    packed = pack(rows, dtype)
    np.testing.assert_array_equal(bits(unpack(packed, *rows.shape)), bits(rows))
    assert packed.size <= rows.nbytes or not rows.size
    return packed


# -- tensors -----------------------------------------------------------------------------------------------------------


@many
@given(hnp.arrays(np.float32, SHAPES, elements=FINITE))
def test_any_numbers_arrive_bit_by_bit(rows: NDArray[np.float32]) -> None:
    back(rows)


@many
@given(
    hnp.arrays(np.int8, SHAPES, elements=st.integers(-7, 7)),
    st.floats(2.0**-100, 2.0**100, width=32),
    st.integers(0, 2**32 - 1),
)
def test_any_multiples_arrive_bit_by_bit(codes: NDArray[np.int8], scale: float, seed: int) -> None:
    """Rows of few levels, zeros of both signs among them, whatever the scale."""
    draw = np.random.default_rng(seed)
    scales = (np.float32(scale) * draw.uniform(0.5, 2, (len(codes), 1))).astype(np.float32)
    rows = codes.astype(np.float32) * scales
    rows[(rows == 0) & (draw.random(rows.shape) < 0.5)] = -0.0
    back(rows)


DEFENCES = {
    "none": (Encoding.FLOAT32, 4.0),
    "gaussian:0.2": (Encoding.FLOAT32, 4.0),
    "dchi:20": (Encoding.FLOAT32, 4.0),
    "permutation": (Encoding.FLOAT32, 4.0),
    "bfloat16": (Encoding.BFLOAT16, 2.0),
    "int8": (Encoding.INT8, 1.0),
    "int4": (Encoding.INT4, 0.5),
    "topk:0.1": (Encoding.SPARSE, 0.6),
}


@pytest.mark.parametrize("spec", DEFENCES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-30, 1e-3, 1.0, 37.0, 1e8]))
def test_what_a_defence_makes_arrives_as_it_is_and_as_small_as_it_says(spec: str, seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    crossing = Crossing(scale * torch.randn(2, 5, 64, generator=draw), mask)
    protected = create(spec, seed=1).protect(crossing)
    request = request_of(1, Kind.FORWARD, protected, torch.full((2, 5), -100), 1.0)
    assert request.tensor is not None
    encoding, most = DEFENCES[spec]
    assert request.tensor.encoding == encoding
    assert request.tensor.size <= 8 * 64 * most + 8 * 4
    arrived = crossing_of(codec.decode_client(codec.encode_client(request)), 64, 100)  # type: ignore[arg-type]
    text = mask.bool()
    assert torch.equal(arrived.hidden[text].view(torch.int32), protected.hidden[text].view(torch.int32))
    assert not arrived.hidden[~text].any(), "a position without text travelled"
    assert torch.equal(arrived.mask, mask)


@pytest.mark.parametrize("spec", ["none", "int8", "int4", "topk:0.2", "bfloat16"])
def test_defences_say_what_their_states_take(spec: str) -> None:
    """``bytes_a_position`` is what travels, to the byte."""
    states = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(0))
    defence = create(spec)
    protected = defence.protect(Crossing(states, torch.ones(3, 7, dtype=torch.long)))
    packed = pack(protected.hidden.reshape(21, 96).numpy())
    assert packed.size == 21 * defence.bytes_a_position(96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits_send_16_bits(dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 8).to(dtype)
    crossing = Crossing(states, torch.ones(2, 3, dtype=torch.long))
    request = request_of(1, Kind.EXTEND, crossing)
    assert request.tensor is not None
    assert request.tensor.size == 2 * states.numel()
    arrived = crossing_of(request, 8, 100)
    assert arrived.hidden.dtype == dtype
    assert torch.equal(arrived.hidden, states)


ONE = np.ones((2, 4), np.float32)
FLOATS = ONE.tobytes()
BROKEN = {
    "too short": (Packed(0, 0, FLOATS[:-1]), "values of 31 bytes where 32"),
    "too long": (Packed(0, 0, FLOATS + b"x"), "values of 33 bytes where 32"),
    "empty": (Packed(0, 0, b""), "values of 0 bytes"),
    "an unknown encoding": (Packed(9, 0, FLOATS), "unknown encoding 9"),
    "an unknown type": (Packed(0, 7, FLOATS), "type 7"),
    "scales without need": (Packed(0, 0, FLOATS, b"1234"), "scales of 4 bytes where 0"),
    "indices without need": (Packed(0, 0, FLOATS, b"", b"1234"), "indices of 4 bytes where 0"),
    "NaN": (Packed(0, 0, np.full((2, 4), np.nan, np.float32).tobytes()), "NaN or infinite"),
    "infinite": (Packed(0, 0, np.full((2, 4), np.inf, np.float32).tobytes()), "NaN or infinite"),
    "half NaN": (Packed(2, 0, b"\xff\x7f" * 8), "NaN or infinite"),
    "float32 called bfloat16": (Packed(0, 1, np.full((2, 4), 0.1, np.float32).tobytes()), "are none"),
    "int8 without scales": (Packed(3, 0, bytes(8)), "scales of 0 bytes where 8"),
    "a NaN scale": (Packed(3, 0, bytes(8), np.full(2, np.nan, np.float32).tobytes()), "scale is negative, NaN"),
    "a negative scale": (Packed(3, 0, bytes(8), np.full(2, -1, np.float32).tobytes()), "scale is negative"),
    "an overflowing scale": (Packed(3, 0, b"\x7f" * 8, np.full(2, 3e38, np.float32).tobytes()), "NaN or infinite"),
    "int4 too long": (Packed(4, 0, bytes(5), bytes(8)), "values of 5 bytes where 4"),
    "a sparse row too full": (Packed(5, 0, bytes(20), np.array([5, 0], np.uint32).tobytes()), "a row of 5 entries"),
    "2^32 entries": (Packed(5, 0, b"", b"\xff" * 8), "a row of 4294967295 entries"),
    "a place beyond": (
        Packed(5, 0, FLOATS[:4], np.array([1, 0], np.uint32).tobytes(), np.array([4], np.uint16).tobytes()),
        "beyond the row",
    ),
    "places that fall": (
        Packed(5, 0, FLOATS[:8], np.array([2, 0], np.uint32).tobytes(), np.array([2, 1], np.uint16).tobytes()),
        "not rising",
    ),
    "a place twice": (
        Packed(5, 0, FLOATS[:8], np.array([2, 0], np.uint32).tobytes(), np.array([1, 1], np.uint16).tobytes()),
        "not rising",
    ),
    "places missing": (Packed(5, 0, FLOATS[:4], np.array([1, 0], np.uint32).tobytes()), "indices of 0 bytes where 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_refused(case: str) -> None:
    packed, match = BROKEN[case]
    with pytest.raises(ProtocolError, match=match):
        unpack(packed, 2, 4)


def test_who_checks_for_itself_gets_nan() -> None:
    assert np.isnan(unpack(BROKEN["NaN"][0], 2, 4, finite=False)).all()


@many
@given(
    st.integers(0, 6),
    st.integers(0, 3),
    st.binary(max_size=64),
    st.binary(max_size=16),
    st.binary(max_size=32),
    st.integers(0, 4),
    st.integers(1, 6),
)
def test_arbitrary_tensors(
    encoding: int, dtype: int, values: bytes, scales: bytes, indices: bytes, count: int, width: int
) -> None:
    try:
        rows = unpack(Packed(encoding, dtype, values, scales, indices), count, width)
    except ProtocolError:
        return
    assert rows.shape == (count, width)
    assert np.isfinite(rows).all()


def test_a_short_sparse_tensor_cannot_claim_a_large_one() -> None:
    """Sizes are the caller's: what arrives is compared with them, and never allocated by its own word."""
    with pytest.raises(ProtocolError, match=r"counts of 8 bytes where 4000000000"):
        unpack(Packed(5, 0, b"", bytes(8)), 10**9, 1 << 20)


# -- messages ----------------------------------------------------------------------------------------------------------

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
NUMBERS = st.floats(allow_nan=False)
NAMES = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=64)
plans = st.builds(
    codec.Plan,
    st.integers(0, 2),
    st.integers(0, 2),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    U32,
    NUMBERS,
    st.lists(NAMES, max_size=5).map(tuple),
    U64,
    st.booleans(),
)
tokens = st.one_of(st.just(b""), st.binary(min_size=32, max_size=32))
checkpoints = st.lists(st.integers(1, codec.MAX_NUMBER), unique=True, max_size=16).map(lambda s: tuple(sorted(s)))
hellos = st.builds(
    codec.Hello,
    U32,
    st.binary(min_size=32, max_size=32),
    U32,
    st.integers(0, 1),
    st.one_of(st.none(), plans),
    tokens,
    checkpoints,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=99),
)
tensors = st.builds(Packed, U32, U32, st.binary(max_size=30), st.binary(max_size=9), st.binary(max_size=9))
plain = st.builds(
    codec.Request,
    U64,
    st.sampled_from([Kind.RESTART, Kind.STEP, Kind.DISCARD, Kind.SAVE]),
    number=NUMBERS,
    step=st.integers(0, codec.MAX_NUMBER),
)
gradients = st.builds(codec.Request, U64, st.just(Kind.BACKWARD), tensors)


@st.composite
def crossings(draw: st.DrawFn) -> codec.Request:
    texts, positions = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    seen = positions + draw(st.integers(0, 5))
    kind = draw(st.sampled_from([Kind.EXTEND, Kind.EVALUATE, Kind.FORWARD]))
    mask = codec.pack_mask(draw(hnp.arrays(np.bool_, (texts, seen))))
    labels = draw(st.sampled_from([b"", bytes(4 * texts * positions)])) if kind is not Kind.EXTEND else b""
    return codec.Request(draw(U64), kind, draw(tensors), texts, positions, seen, mask, labels, draw(NUMBERS))


welcomes = st.builds(
    codec.Welcome,
    U32,
    U32,
    st.integers(1, codec.MAX_WIDTH),
    st.integers(1, codec.MAX_VOCABULARY),
    st.integers(1, 2**32 - 1),
    st.integers(1, 2**32 - 1),
    st.integers(1, 2**32 - 1),
    st.integers(0, codec.MAX_NUMBER),
)
results = st.builds(codec.Result, U64, st.one_of(st.none(), tensors), NUMBERS)
refusals = st.builds(codec.Refusal, U64, st.text(st.characters(categories=["L", "N"]), max_size=200))
client_messages = st.one_of(hellos, plain, gradients, crossings())
server_messages = st.one_of(welcomes, results, refusals)


@many
@given(client_messages)
def test_client_messages_arrive_as_sent(message: codec.ClientMessage) -> None:
    assert codec.decode_client(codec.encode_client(message)) == message


@many
@given(server_messages)
def test_server_messages_arrive_as_sent(message: codec.ServerMessage) -> None:
    assert codec.decode_server(codec.encode_server(message)) == message


@many
@given(st.one_of(client_messages.map(codec.encode_client), server_messages.map(codec.encode_server)), st.data())
def test_damaged_messages(data: bytes, draw: st.DataObject) -> None:
    """Cut, extended, or with some bytes replaced: a message within the limits, or ``ProtocolError``."""
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 4))):
        if damaged:
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    first, last = sorted(draw.draw(st.integers(0, len(damaged))) for _ in range(2))
    broken = bytes(damaged[first:last]) + draw.draw(st.binary(max_size=9))
    for decode in (codec.decode_client, codec.decode_server):
        try:
            message = decode(broken)
        except ProtocolError:
            continue
        if isinstance(message, codec.Request) and message.kind in codec.WITH_CROSSING:
            assert codec.unpack_mask(message).shape == (message.texts, message.seen)
            labels = codec.unpack_labels(message)
            assert labels is None or labels.shape == (message.texts, message.positions)


def request(**changes: object) -> pb.ClientMessage:
    """A good forward of 2 texts of 3 positions, except for what is changed."""
    outer = pb.ClientMessage()
    good = {"seq": 1, "kind": 4, "texts": 2, "positions": 3, "seen": 3, "mask": b"\x3f", "labels": bytes(24)}
    for name, value in (good | changes).items():
        if name != "tensor":
            setattr(outer.request, name, value)
    if changes.get("tensor", True):
        outer.request.tensor.values = b"1234"
    return outer


MALFORMED = {
    "no texts": (request(texts=0), "a crossing of 0 texts"),
    "no positions": (request(positions=0), "0 of 3 positions"),
    "more positions than seen": (request(positions=4), "4 of 3 positions"),
    "2^32-1 texts": (request(texts=2**32 - 1), "a crossing of 4294967295 texts"),
    "many seen": (request(seen=2**32 - 1), "of 4294967295 positions"),
    "a mask too short": (request(mask=b""), "mask: 0 bytes where 1"),
    "a mask too long": (request(mask=b"12"), "mask: 2 bytes where 1"),
    "labels too short": (request(labels=bytes(23)), "labels: 23 bytes where 24"),
    "labels too long": (request(labels=bytes(28)), "labels: 28 bytes where 24"),
    "an unknown kind": (request(kind=77), "unknown kind 77"),
    "no kind": (request(kind=0), "unknown kind 0"),
    "no numbers": (request(tensor=False), "numbers are missing"),
    "numbers for a step": (request(kind=6, texts=0, positions=0, seen=0, mask=b"", labels=b""), "none of this request"),
    "a mask for a step": (request(kind=6, tensor=False), "no use for"),
    "labels for extend": (request(kind=1), "no use for"),
    "a huge step": (request(step=2**64 - 1), "over the limit"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests(case: str) -> None:
    message, match = MALFORMED[case]
    with pytest.raises(ProtocolError, match=match):
        codec.decode_client(message.SerializeToString())


def test_the_honest_request_is_taken() -> None:
    """Otherwise the refusals above would prove nothing."""
    decoded = codec.decode_client(request().SerializeToString())
    assert isinstance(decoded, codec.Request)
    labels = labels_of(decoded)
    assert labels is not None
    assert labels.shape == (2, 3)


def hello(**changes: object) -> bytes:
    good: dict[str, object] = {"version": 1, "base": bytes(32), "cut": 1, "token": bytes(32)}
    return pb.ClientMessage(hello=pb.Hello(**(good | changes))).SerializeToString()  # type: ignore[arg-type]


GREETINGS = {
    "a short fingerprint": (hello(base=b"x"), "fingerprint of the base: 1 bytes where 32"),
    "a short token": (hello(token=b"x"), "token of a run: 1 bytes where 32"),
    "a long key": (hello(key="k" * 513), "key: 513 is over"),
    "an unknown shape": (hello(shape=2), "shape: 2 is over"),
    "half a step": (hello(steps=bytes(7)), "checkpoints: 7 bytes"),
    "steps that fall": (hello(steps=np.array([2, 1], np.uint64).tobytes()), "not in order"),
    "step 0": (hello(steps=bytes(8)), "not in order"),
    "too many steps": (hello(steps=np.arange(1, 18, dtype=np.uint64).tobytes()), "over the limit"),
    "an unknown way to train": (hello(plan=pb.Plan(device=3)), "what is trained: 3"),
    "too many targets": (hello(plan=pb.Plan(targets="\n".join(["q"] * 33))), "targets: 33 is over"),
    "a long target": (hello(plan=pb.Plan(targets="q" * 65)), "names of targets"),
    "a target of control characters": (hello(plan=pb.Plan(targets="\x1b[2J")), "names of targets"),
    "longer than a greeting": (hello(plan=pb.Plan(targets="q" * MAX_HELLO)), "message: .* is over the limit of 4096"),
}


@pytest.mark.parametrize("case", GREETINGS)
def test_malformed_greetings(case: str) -> None:
    data, match = GREETINGS[case]
    with pytest.raises(ProtocolError, match=match):
        codec.decode_client(data, MAX_HELLO)


def test_the_longest_greeting_fits() -> None:
    plan = codec.Plan(2, 2, 0.9, 0.9, 0.9, 0.9, 2**32 - 1, 0.9, ("t" * 64,) * 32, 2**64 - 1, True)
    steps = tuple(range(2**53 - 15, 2**53 + 1))
    longest = codec.Hello(2**32 - 1, bytes(32), 2**32 - 1, 1, plan, bytes(32), steps, "k" * 512)
    assert codec.decode_client(codec.encode_client(longest), MAX_HELLO) == longest


def test_secrets_and_states_are_not_printed() -> None:
    shown = repr(codec.Hello(1, bytes(32), 1, 1, None, b"T" * 32, (), "sv_secret"))
    assert "TTT" not in shown
    assert "sv_secret" not in shown
    assert "1234" not in repr(codec.Request(1, Kind.FORWARD, Packed(0, 0, b"1234"), mask=b"1234", labels=b"1234"))


@pytest.mark.parametrize("decode", [codec.decode_client, codec.decode_server])
def test_oversized_messages(decode: object) -> None:
    with pytest.raises(ProtocolError, match="over the limit of 33554432"):
        decode(bytes(MAX_MESSAGE + 1))  # type: ignore[operator]


def test_a_message_of_millions_of_parts_stays_small() -> None:
    """Empty tensors by the million inside one request: they are merged, not kept; bodies by the million are refused."""
    import tracemalloc

    inner = b"\x1a\x00" * 1_000_000  # Request.tensor, empty
    request_ = pb.ClientMessage(request=pb.Request(seq=1, kind=5)).SerializeToString()[2:]
    body = request_ + inner
    length = len(body)
    varint = bytearray()
    while length > 127:
        varint.append(length & 127 | 128)
        length >>= 7
    varint.append(length)
    tracemalloc.start()
    decoded = codec.decode_client(b"\x12" + bytes(varint) + body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(decoded, codec.Request)
    assert peak < 20e6
    with pytest.raises(ProtocolError, match="more than 8 fields"):
        codec.decode_client(b"\x12\x00" * 1_000_000)
