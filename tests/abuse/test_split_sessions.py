"""Split sessions with devices, servers and networks that break: clear errors, whole checkpoints, and others served."""

import gc
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from certificates import Authority
from grpc_health.v1 import health_pb2
from torch import Tensor
from transformers import PreTrainedModel

from abuse.support import RawClient, Relay, clear_error, eventually, grpc_server, lying_server, tiny_llama
from splitveil.errors import (
    ConfigurationError,
    ConnectionFailedError,
    DataError,
    KeyRejectedError,
    NonFiniteError,
    ProtocolError,
    RefusedError,
    SplitveilError,
    VersionError,
)
from splitveil.metering import Database, Keyring
from splitveil.serving import stream
from splitveil.serving.server import Server
from splitveil.serving.tls import ClientTLS, ServerTLS
from splitveil.split import Crossing
from splitveil.splitlearning import carrying, service
from splitveil.splitlearning.agreement import folder_name, new_token, sent_plan
from splitveil.splitlearning.carrying import packed, request_of
from splitveil.splitlearning.cloud import LocalCloud
from splitveil.splitlearning.connection import RemoteCloud
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.halves import fingerprint
from splitveil.splitlearning.interface import Plan, Shape, Trains
from splitveil.splitlearning.server import SplitServer
from splitveil.splitlearning.training import DeviceRun, train
from splitveil.wire import split_codec as codec
from splitveil.wire.split_codec import Kind, Request
from splitveil.wire.tensors import Packed

CUT, WIDTH, VOCABULARY = 1, 16, 64
U, STRAIGHT = Shape.U, Shape.STRAIGHT
PLANS = {shape: Plan(CUT, shape, Trains.LORA, Trains.LORA, rank=2) for shape in Shape}
TOKEN = "ab" * 32
INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
WINDOWS = torch.randint(1, VOCABULARY, (12, 6), generator=torch.Generator().manual_seed(3))
COURSE = Course(6, batch=2, save_every=2)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_llama()


def serving(base: PreTrainedModel, state: Path | None, shape: Shape = U, **changes: Any) -> SplitServer:
    honest: dict[str, Any] = {"cut": CUT, "shape": shape, "state": state, "trains": frozenset(Trains)}
    return SplitServer(base, **(honest | {"listen": "127.0.0.1:0"} | changes))


def assert_serves(server: SplitServer, base: PreTrainedModel, shape: Shape) -> None:
    """A new device gets what the upper blocks in this process say."""
    crossing, labels = sent(), None if shape is U else torch.ones(2, 3, dtype=torch.long)
    with closing(RemoteCloud(base, server.address, cut=CUT, shape=shape)) as cloud:
        states, loss = cloud.evaluate(crossing, labels)
    expected, expected_loss = LocalCloud(base, cut=CUT, shape=shape).evaluate(crossing, labels)
    assert loss == expected_loss or (math.isnan(loss) and math.isnan(expected_loss))
    assert states is expected or (states is not None and expected is not None and torch.equal(states, expected))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def shared(base: PreTrainedModel, state: Path) -> Iterator[dict[Shape, SplitServer]]:
    with serving(base, state / "u", U) as u, serving(base, state / "straight", STRAIGHT) as straight:
        yield {U: u, STRAIGHT: straight}


@pytest.fixture(params=list(Shape), ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture
def server(shared: dict[Shape, SplitServer], shape: Shape, base: PreTrainedModel) -> Iterator[SplitServer]:
    """An honest server; whatever a test does to it, it serves the next device."""
    yield shared[shape]
    assert_serves(shared[shape], base, shape)


@pytest.fixture
def u_server(shared: dict[Shape, SplitServer], base: PreTrainedModel) -> Iterator[SplitServer]:
    yield shared[U]
    assert_serves(shared[U], base, U)


def sent(texts: int = 2, positions: int = 3, seen: int | None = None) -> Crossing:
    states = torch.randn(texts, positions, WIDTH, generator=torch.Generator().manual_seed(0))
    return Crossing(states, torch.ones(texts, seen or positions, dtype=torch.long))


def hello(base: PreTrainedModel, shape: Shape = U, **changes: Any) -> codec.Hello:
    """An honest greeting of a device that wants to train, except for what is changed."""
    token = bytes.fromhex(new_token())
    good = codec.Hello(
        codec.VERSION, bytes.fromhex(fingerprint(base)), CUT, list(Shape).index(shape), sent_plan(PLANS[shape]), token
    )
    return replace(good, **changes)


# -- devices that break the rules --------------------------------------------------------------------------------------

FORWARD = request_of(1, Kind.FORWARD, sent(), None, 6.0)
ENDED: dict[str, tuple[Callable[[PreTrainedModel], list[Any]], grpc.StatusCode, str]] = {
    "garbage": (lambda b: [b"\xff" * 40], INVALID, "not of the wire format"),
    "nothing": (lambda b: [b""], INVALID, "without a known body"),
    "a truncated greeting": (lambda b: [codec.encode_client(hello(b))[:-1]], INVALID, "not of the wire format"),
    "a server's message": (lambda b: [codec.encode_server(codec.Refusal(1, "no"))], INVALID, "without a known body"),
    "another version": (
        lambda b: [hello(b, version=2)],
        grpc.StatusCode.FAILED_PRECONDITION,
        "version 2 is not served",
    ),
    "an API key": (lambda b: [hello(b, key="sv_x")], grpc.StatusCode.UNAUTHENTICATED, "knows no API keys"),
    "a huge first message": (lambda b: [bytes(5000)], INVALID, "5000 is over the limit of 4096"),
    "a request first": (lambda b: [FORWARD], INVALID, "begins with Hello"),
    "a plan without sense": (
        lambda b: [hello(b, plan=replace(sent_plan(PLANS[U]), alpha=math.nan))],
        INVALID,
        "a plan that makes no sense",
    ),
    "greeted twice": (lambda b: [hello(b), hello(b)], INVALID, "request number 1 was expected"),
    "garbage later": (lambda b: [hello(b), b"\xff" * 40], INVALID, "not of the wire format"),
    "a truncated request": (lambda b: [hello(b), codec.encode_client(FORWARD)[:-1]], INVALID, "not of the wire"),
    "numbers begin with 0": (lambda b: [hello(b), replace(FORWARD, seq=0)], INVALID, "request number 1 was expected"),
    "a gap in the numbers": (lambda b: [hello(b), FORWARD, replace(FORWARD, seq=3)], INVALID, "request number 2"),
    "a number again": (lambda b: [hello(b), FORWARD, FORWARD], INVALID, "request number 2"),
    "a mask too short": (lambda b: [hello(b), replace(FORWARD, mask=b"")], INVALID, "mask: 0 bytes where 1"),
    "a huge message": (
        lambda b: [hello(b), bytes((32 << 20) + 1)],
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "larger than max",
    ),
    "another base model": (lambda b: [replace(hello(b), base=bytes(32))], DENIED, "base model here is another one"),
    "another cut": (
        lambda b: [hello(b, cut=2)],
        DENIED,
        "the blocks after cut 1 in the u shape, and was asked for cut 2",
    ),
    "another shape": (lambda b: [replace(hello(b), shape=0)], DENIED, "in the straight shape; give --cut 1 --shape u"),
    "a plan without a token": (lambda b: [hello(b, token=b"")], DENIED, "needs a token"),
    "a target that is not there": (
        lambda b: [hello(b, plan=replace(sent_plan(PLANS[U]), targets=("nowhere",)))],
        DENIED,
        "nowhere",
    ),
    "steps that the cloud lacks": (lambda b: [hello(b, steps=(7,))], DENIED, "none in common"),
    "a run that is not there": (lambda b: [hello(b, plan=None)], DENIED, "no trained weights"),
}


@pytest.mark.parametrize("case", ENDED)
def test_what_breaks_the_format_or_fits_nothing_ends_the_session(
    case: str, u_server: SplitServer, base: PreTrainedModel
) -> None:
    make, code, text = ENDED[case]
    with RawClient(u_server.address, *make(base), wire=codec) as client:
        got, details = client.ending()
    assert got is code, details
    assert text in details


def spoilt(value: float) -> Packed:
    states = sent().hidden.reshape(6, WIDTH).clone()
    states[2, 3] = value
    return packed(states)


def states_of(count: int, width: int = WIDTH) -> Packed:
    return packed(torch.randn(count, width, generator=torch.Generator().manual_seed(1)))


LABELS = torch.ones(2, 3, dtype=torch.long)
BACKWARD = Request(2, Kind.BACKWARD, states_of(6))


def labelled(shape: Shape, **changes: Any) -> Request:
    request = request_of(1, Kind.FORWARD, sent(), LABELS if shape is STRAIGHT else None, 6.0)
    return replace(request, **changes)


def with_labels(labels: Tensor) -> bytes:
    return labels.to(torch.int32).numpy().tobytes()


REFUSED: dict[str, tuple[Shape | None, Callable[[Shape], list[Request]], str]] = {
    "NaN states": (None, lambda s: [labelled(s, tensor=spoilt(math.nan))], "NaN or infinity"),
    "infinite states": (None, lambda s: [labelled(s, tensor=spoilt(math.inf))], "NaN or infinity"),
    "states too short": (None, lambda s: [labelled(s, tensor=states_of(5))], "where 384 are expected"),
    "states of another width": (None, lambda s: [labelled(s, tensor=states_of(6, 8))], "where 384 are expected"),
    "states of 16 bits": (
        None,
        lambda s: [labelled(s, tensor=packed(torch.ones(6, WIDTH).half()))],
        "float16, expected",
    ),
    "an unknown encoding": (None, lambda s: [labelled(s, tensor=Packed(99, 0, b""))], "unknown encoding 99"),
    "padding only": (None, lambda s: [labelled(s, mask=b"\0", tensor=states_of(0))], "padding only"),
    "more than the context": (
        None,
        lambda s: [replace(request_of(1, Kind.EXTEND, sent(1, 3000)), seq=1)],
        "positions are past the model's 2048",
    ),
    "more than the limits": (
        None,
        lambda s: [request_of(1, Kind.EVALUATE, sent(300, 2))],
        "more than this cloud",
    ),
    "many positions": (None, lambda s: [request_of(1, Kind.EXTEND, sent(100, 1, 2000))], "at most 32768 positions"),
    "a mask of positions that never came": (
        None,
        lambda s: [request_of(1, Kind.EXTEND, sent(2, 1, 5))],
        "the mask covers 5 positions, expected 0 earlier",
    ),
    "a label beyond the vocabulary": (
        STRAIGHT,
        lambda s: [labelled(s, labels=with_labels(LABELS * VOCABULARY))],
        "outside the vocabulary of 64",
    ),
    "a negative label": (STRAIGHT, lambda s: [labelled(s, labels=with_labels(LABELS * -7))], "outside the vocabulary"),
    "no labels": (STRAIGHT, lambda s: [labelled(s, labels=b"")], "it needs labels"),
    "labels without need": (U, lambda s: [labelled(s, labels=with_labels(LABELS))], "labels are the text, and stay"),
    "a normaliser of 0": (None, lambda s: [labelled(s, number=0.0)], "normaliser is a positive number"),
    "a normaliser of NaN": (None, lambda s: [labelled(s, number=math.nan)], "normaliser is a positive number"),
    "a gradient first": (None, lambda s: [replace(BACKWARD, seq=1)], "without a micro-batch"),
    "a NaN gradient": (U, lambda s: [labelled(s), replace(BACKWARD, tensor=spoilt(math.nan))], "gradient holds NaN"),
    "a gradient too short": (U, lambda s: [labelled(s), replace(BACKWARD, tensor=states_of(5))], "are expected"),
    "a second forward": (U, lambda s: [labelled(s), labelled(s, seq=2)], "gradient for the last micro-batch"),
    "a step too early": (U, lambda s: [labelled(s), Request(2, Kind.STEP, number=0.1)], "gradient for the last"),
    "a step of nothing": (None, lambda s: [Request(1, Kind.STEP, number=0.1)], "at least one micro-batch"),
    "a rate of NaN": (STRAIGHT, lambda s: [labelled(s), Request(2, Kind.STEP, number=math.nan)], "rate"),
    "a rate of 1e9": (STRAIGHT, lambda s: [labelled(s), Request(2, Kind.STEP, number=1e9)], "rate"),
    "a save of another step": (None, lambda s: [Request(1, Kind.SAVE, step=9)], "0 steps were made here, and 9"),
    "a save in the midst": (STRAIGHT, lambda s: [labelled(s), Request(2, Kind.SAVE, step=0)], "between steps"),
}
ONE_SHAPE = [
    pytest.param(case, shape, id=f"{case}-{shape}")
    for case, (only, _, _) in REFUSED.items()
    for shape in Shape
    if only in (None, shape)
]


@pytest.mark.parametrize(("case", "shape"), ONE_SHAPE)
def test_what_does_not_fit_is_refused_and_the_session_goes_on(
    case: str, shape: Shape, server: SplitServer, base: PreTrainedModel
) -> None:
    """After the refusal the session trains: as one that was never refused anything, to the same numbers."""
    _, make, match = REFUSED[case]
    requests = make(shape)
    with RawClient(server.address, hello(base, shape), *requests, wire=codec) as client:
        assert isinstance(client.receive(), codec.Welcome)
        *before, last = [client.receive() for _ in requests]
        assert all(isinstance(reply, codec.Result) for reply in before)
        assert isinstance(last, codec.Refusal), last
        assert re.search(match, last.message), last.message
        seq = len(requests)
        client.send(Request(seq + 1, Kind.DISCARD), labelled(shape, seq=seq + 2))
        assert isinstance(client.receive(), codec.Result)
        got = client.receive()
    assert isinstance(got, codec.Result), got
    honest = LocalCloud(base, cut=CUT, shape=shape, plan=PLANS[shape])
    states, _ = honest.forward(sent(), LABELS if shape is STRAIGHT else None, 6.0)
    assert got.tensor == packed(states.reshape(6, WIDTH))


@pytest.mark.parametrize("kind", [Kind.FORWARD, Kind.STEP, Kind.SAVE, Kind.DISCARD])
def test_without_a_plan_nothing_is_trained(kind: Kind, u_server: SplitServer, base: PreTrainedModel) -> None:
    request = FORWARD if kind is Kind.FORWARD else Request(1, kind)
    with RawClient(u_server.address, hello(base, plan=None, token=b""), request, wire=codec) as client:
        client.receive()
        reply = client.receive()
    assert isinstance(reply, codec.Refusal)
    assert "does not train" in reply.message


def test_what_a_server_does_not_offer(base: PreTrainedModel, tmp_path: Path) -> None:
    allowed = frozenset({Trains.NOTHING})
    with serving(base, tmp_path, trains=allowed) as server, clear_error(RefusedError, "trains nothing on its side"):
        RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=TOKEN)
    with serving(base, None) as server:
        with clear_error(RefusedError, "keeps no checkpoints"):
            RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=TOKEN)
        assert_serves(server, base, U)


# -- a remote cloud is a local one -------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor file below ``folder``, by its place."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


def unbroken(base: PreTrainedModel, folder: Path, shape: Shape, course: Course = COURSE) -> dict[str, bytes]:
    """What both sides keep after a run in one process that nothing interrupts."""
    plan = PLANS[shape]
    cloud = LocalCloud(
        base, cut=CUT, shape=shape, plan=plan, folder=folder / "cloud" / folder_name(bytes.fromhex(TOKEN))
    )
    train(Device(base, cut=CUT, shape=shape, plan=plan), cloud, WINDOWS, None, course, folder / "mine")
    return weights(folder)


def run(
    base: PreTrainedModel,
    address: str,
    folder: Path,
    shape: Shape = U,
    course: Course = COURSE,
    watch: Callable[[Any], None] | None = None,
    token: str = TOKEN,
) -> int:
    """A run over the network, begun or gone on with; returns the step that it went on from."""
    plan, steps = PLANS[shape], DeviceRun(folder).steps()
    device = Device(base, cut=CUT, shape=shape, plan=plan)
    with closing(RemoteCloud(base, address, cut=CUT, shape=shape, plan=plan, token=token, steps=steps)) as cloud:
        train(device, cloud, WINDOWS, None, course, folder, start=cloud.start, watch=watch)
        return cloud.start


def test_over_the_network_training_is_the_same(base: PreTrainedModel, tmp_path: Path, shape: Shape) -> None:
    with serving(base, tmp_path / "net" / "cloud", shape) as server:
        run(base, server.address, tmp_path / "net" / "mine", shape)
    assert weights(tmp_path / "net") == unbroken(base, tmp_path / "local", shape)


def test_padding_and_generation_are_the_same(base: PreTrainedModel, server: SplitServer, shape: Shape) -> None:
    """Positions without text do not travel; what has text is as if they had."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    device, local = Device(base, cut=CUT, shape=shape), LocalCloud(base, cut=CUT, shape=shape)
    with closing(RemoteCloud(base, server.address, cut=CUT, shape=shape)) as remote:
        found = []
        for cloud in (local, remote):
            cloud.restart()
            cache, tokens, grown, steps = device.new_cache(), WINDOWS[:2, :4], mask, []
            for _ in range(3):
                logits = device.next_logits(cloud, tokens, grown, cache)
                steps.append(logits)
                tokens, grown = logits.argmax(-1, keepdim=True), torch.cat([grown, torch.ones(2, 1).long()], 1)
            labels = torch.where(mask.bool(), WINDOWS[:2, :4], -100)
            found.append((torch.stack(steps), device.evaluate(cloud, WINDOWS[:2, :4], labels, mask)))
        assert remote.traffic.sent > 0
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_prompt_larger_than_a_message_goes_piece_by_piece(
    base: PreTrainedModel, server: SplitServer, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0  # the first piece reaches to where every text has begun
    tokens = WINDOWS.flatten()[:24].view(2, 12)
    device, local = Device(base, cut=CUT, shape=shape), LocalCloud(base, cut=CUT, shape=shape)
    with closing(RemoteCloud(base, server.address, cut=CUT, shape=shape)) as remote:
        expected = device.next_logits(local, tokens, mask, device.new_cache())
        whole = device.next_logits(remote, tokens, mask, device.new_cache())
        asked = remote.traffic.queries
        monkeypatch.setattr(carrying, "MAX_MESSAGE", codec.OVERHEAD + 4 * 2 * WIDTH * 6)
        remote.restart()
        pieces = device.next_logits(remote, tokens, mask, device.new_cache())
        assert remote.traffic.queries == asked + 1 + 2
        monkeypatch.setattr(carrying, "MAX_MESSAGE", codec.OVERHEAD + 4 * 2 * VOCABULARY)
        remote.restart()
        with clear_error(ConfigurationError, match="larger than a message; use a smaller batch"):
            device.next_logits(remote, tokens, mask, device.new_cache())
        remote.restart()
        monkeypatch.undo()
    assert torch.equal(whole, expected)
    torch.testing.assert_close(pieces, expected, rtol=1e-5, atol=1e-5)


def test_two_devices_train_at_once_as_if_alone(base: PreTrainedModel, tmp_path: Path) -> None:
    expected = unbroken(base, tmp_path / "local", U)
    with serving(base, tmp_path / "net" / "cloud") as server:
        other = threading.Thread(
            target=run, args=(base, server.address, tmp_path / "other"), kwargs={"token": "cd" * 32}
        )
        other.start()
        run(base, server.address, tmp_path / "net" / "mine")
        other.join()
    assert weights(tmp_path / "other") == {
        name.removeprefix("mine/"): data for name, data in expected.items() if name.startswith("mine/")
    }
    assert weights(tmp_path / "net" / "mine") == weights(tmp_path / "other")


# -- things that die ---------------------------------------------------------------------------------------------------


def test_a_server_that_dies_in_the_middle(base: PreTrainedModel, tmp_path: Path, shape: Shape) -> None:
    """A clear error, whole checkpoints, and against another server the weights of a run that nothing interrupted."""
    place = tmp_path / "net"
    first = serving(base, place / "cloud", shape)

    def kill(progress: Any) -> None:
        if progress.step == 3:
            first.close()

    with first, clear_error(ConnectionFailedError):
        run(base, first.address, place / "mine", shape, watch=kill)
    assert DeviceRun(place / "mine").steps() == (2,)
    with serving(base, place / "cloud", shape) as second:
        assert run(base, second.address, place / "mine", shape) == 2
    assert weights(place) == unbroken(base, tmp_path / "local", shape)


def test_a_server_that_lost_its_checkpoints_is_not_trained_from_scratch(base: PreTrainedModel, tmp_path: Path) -> None:
    with serving(base, tmp_path / "cloud") as server:
        run(base, server.address, tmp_path / "mine")
    before = weights(tmp_path / "mine")
    with serving(base, tmp_path / "empty") as server, clear_error(RefusedError, match="none in common"):
        run(base, server.address, tmp_path / "mine")
    assert weights(tmp_path / "mine") == before


def test_a_checkpoint_damaged_on_the_server_is_passed_over(base: PreTrainedModel, tmp_path: Path) -> None:
    expected = unbroken(base, tmp_path / "local", U)
    place = tmp_path / "net"
    with serving(base, place / "cloud") as server:
        run(base, server.address, place / "mine")
        (newest,) = (place / "cloud").glob("*/step-000006/tensors.safetensors")
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
        assert run(base, server.address, place / "mine") == 4
    assert weights(place) == expected


def test_a_device_that_dies(base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session ends, its memory and its place are free, its checkpoint is whole, and others are served meanwhile."""
    made: list[weakref.ref[LocalCloud]] = []
    honest = service.LocalCloud

    def recorded(*args: Any, **kwargs: Any) -> LocalCloud:
        cloud = honest(*args, **kwargs)
        made.append(weakref.ref(cloud))
        return cloud

    with serving(base, tmp_path / "net" / "cloud", training=1) as server:
        monkeypatch.setattr(service, "LocalCloud", recorded)
        with Relay(server.address) as relay:

            def die(progress: Any) -> None:
                if progress.step == 3:
                    assert_serves(server, base, U)
                    relay.cut()

            with clear_error(ConnectionFailedError):
                run(base, relay.address, tmp_path / "net" / "mine", watch=die)

        def gone() -> bool:
            gc.collect()
            return len(made) == 2 and all(cloud() is None for cloud in made)

        eventually(gone)
        assert_serves(server, base, U)
        # The only place for training is free again, and the run goes on.
        assert run(base, server.address, tmp_path / "net" / "mine") == 2
    assert weights(tmp_path / "net") == unbroken(base, tmp_path / "local", U)


def test_a_device_that_comes_back_takes_its_run_over(base: PreTrainedModel, tmp_path: Path) -> None:
    """What it left behind may not write into its checkpoints."""
    with serving(base, tmp_path) as server:
        old, new = (RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=TOKEN) for _ in range(2))
        with clear_error(ConnectionFailedError):
            old.forward(sent(), None, 6.0)
        new.forward(sent(), None, 6.0)
        old.close()
        new.close()


def test_places_for_training_are_few_and_come_back(base: PreTrainedModel, tmp_path: Path) -> None:
    with serving(base, tmp_path, training=1) as server:
        opened = RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=TOKEN)
        with clear_error(RefusedError, match="too many sessions"):
            RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=new_token())
        assert_serves(server, base, U)
        opened.close()

        def trains() -> bool:
            try:
                RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=new_token()).close()
            except RefusedError:
                return False
            return True

        eventually(trains)


def test_a_silent_session_is_ended(base: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "splitveil")
    with serving(base, tmp_path, silence=0.5) as server:
        cloud = RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=TOKEN)
        eventually(lambda: any(getattr(r, "fields", {}).get("reason") == "silent" for r in caplog.records))
        with clear_error(ConnectionFailedError):
            cloud.forward(sent(), None, 6.0)
        cloud.close()


def test_a_server_that_drains_says_so(base: PreTrainedModel, tmp_path: Path) -> None:
    def drain(progress: Any) -> None:
        if progress.step == 3:
            threading.Thread(target=server.drain, args=(0.0,)).start()
            eventually(lambda: server._visits.finished)

    with serving(base, tmp_path / "cloud") as server, clear_error(ConnectionFailedError, match="is shutting down"):
        run(base, server.address, tmp_path / "mine", watch=drain)
    assert DeviceRun(tmp_path / "mine").steps() == (2,)


# -- servers that lie --------------------------------------------------------------------------------------------------


def welcome(**changes: Any) -> codec.Welcome:
    return replace(codec.Welcome(1, 2, WIDTH, VOCABULARY, 2048, 256, 32768), **changes)


def cloud_at(base: PreTrainedModel, address: str, shape: Shape = U, **how: Any) -> RemoteCloud:
    return RemoteCloud(base, address, cut=CUT, shape=shape, plan=PLANS[shape], token=TOKEN, **how)


OPENINGS: dict[str, tuple[list[Any], type[SplitveilError], str]] = {
    "nothing at all": ([], ConnectionFailedError, "ended the session"),
    "garbage": ([b"\xff" * 30], ProtocolError, "not of the wire format"),
    "a result first": ([codec.Result(1)], ProtocolError, "did not begin with Welcome"),
    "another version": ([welcome(version=2)], VersionError, "version 2, this client 1"),
    "another width": ([welcome(width=32)], ProtocolError, "states of 32 numbers"),
    "another vocabulary": ([welcome(vocabulary=65)], ProtocolError, "65 tokens"),
    "no limits": ([welcome(max_texts=0)], ProtocolError, "without sensible sizes"),
    "a step that this device lacks": ([welcome(step=4)], ProtocolError, "go on from step 4"),
    "a huge message": ([bytes((32 << 20) + 1)], ProtocolError, "over the limit of its size"),
    "a refusal": ([(DENIED, "no\x1b[2J")], RefusedError, r"refuses: no\?"),
    "a key wanted": ([(grpc.StatusCode.UNAUTHENTICATED, "a key")], KeyRejectedError, "a key"),
}


@pytest.mark.parametrize("case", OPENINGS)
def test_a_false_opening_is_a_clear_error(case: str, base: PreTrainedModel) -> None:
    messages, kind, match = OPENINGS[case]

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield from messages

    with lying_server(script, codec) as address, clear_error(kind, match):
        cloud_at(base, address)


ANSWERS: dict[str, tuple[Any, type[SplitveilError], str]] = {
    "the end": ((grpc.StatusCode.OK, ""), ConnectionFailedError, r"broke \(unknown\)"),
    "garbage": (b"\xff" * 30, ProtocolError, "not of the wire format"),
    "a welcome": (welcome(), ProtocolError, "not the answer to the next query"),
    "another number": (codec.Result(2, states_of(6)), ProtocolError, "not the answer to the next query"),
    "no numbers": (codec.Result(1), ProtocolError, "it has no numbers"),
    "numbers too short": (codec.Result(1, states_of(5)), ProtocolError, "are expected"),
    "NaN": (codec.Result(1, spoilt(math.nan)), ProtocolError, "NaN or infinite"),
    "a sparse tensor that claims much": (codec.Result(1, Packed(5, 0, b"", b"\xff" * 24)), ProtocolError, "a row of"),
    "a refusal": (codec.Refusal(1, "no\x1b[2J"), RefusedError, r"the server refused: no\?"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_false_answer_is_a_clear_error(case: str, base: PreTrainedModel, tmp_path: Path) -> None:
    """Nothing of it gets into the device's weights or onto its disk."""
    answer, kind, match = ANSWERS[case]

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield welcome()
        next(requests)
        yield answer
        yield from (codec.Refusal(n, "over") for n, _ in enumerate(requests, 2))

    with lying_server(script, codec) as address, closing(cloud_at(base, address)) as cloud:
        with clear_error(kind, match):
            cloud.forward(sent(), None, 6.0)
        if kind is not RefusedError:
            with pytest.raises(SplitveilError):  # it stays ended
                cloud.forward(sent(), None, 6.0)
    with lying_server(script, codec) as address, pytest.raises(SplitveilError):
        run(base, address, tmp_path / "mine")
    assert DeviceRun(tmp_path / "mine").steps() == ()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0])
def test_a_loss_that_cannot_be(loss: float, base: PreTrainedModel) -> None:
    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        yield welcome()
        next(requests)
        yield codec.Result(1, states_of(6), loss)

    with (
        lying_server(script, codec) as address,
        closing(cloud_at(base, address, STRAIGHT)) as cloud,
        clear_error(ProtocolError, match="no loss, or one that cannot be"),
    ):
        cloud.forward(sent(), LABELS, 6.0)


@pytest.mark.parametrize("welcomed", [False, True])
def test_a_server_that_falls_silent_is_given_up(
    welcomed: bool, base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 1.0)

    def script(requests: Iterator[bytes]) -> Iterator[Any]:
        next(requests)
        if welcomed:
            yield welcome()
        yield from (codec.Result(0) for _ in requests if False)

    with lying_server(script, codec) as address:
        if not welcomed:
            with clear_error(ConnectionFailedError, match="is `splitveil split serve` running there"):
                cloud_at(base, address)
            return
        cloud = cloud_at(base, address, patience=1.0)
        with closing(cloud), clear_error(ConnectionFailedError, match="no longer answers"):
            cloud.forward(sent(), None, 6.0)


def test_servers_of_other_kinds(base: PreTrainedModel, shared_server: Server) -> None:
    with clear_error(ConnectionFailedError, match="is not a Splitveil server for split sessions"):
        cloud_at(base, shared_server.address)
    with grpc_server() as address, clear_error(ConnectionFailedError, match="is not a Splitveil server"):
        cloud_at(base, address)
    with clear_error(ConnectionFailedError, match="is `splitveil split serve` running there"):
        cloud_at(base, "127.0.0.1:9")


def test_a_batch_larger_than_a_message_is_not_sent(base: PreTrainedModel, u_server: SplitServer) -> None:
    with closing(cloud_at(base, u_server.address)) as cloud:
        before = cloud.traffic.sent
        with clear_error(ConfigurationError, match="larger than a message; use a smaller batch"):
            cloud.forward(sent(512, 2000), None, 6.0)
        assert cloud.traffic.sent == before


def test_a_gradient_at_padding_is_not_dropped_silently(base: PreTrainedModel, u_server: SplitServer) -> None:
    crossing = Crossing(sent().hidden, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    with closing(cloud_at(base, u_server.address)) as cloud:
        cloud.forward(crossing, None, 5.0)
        with clear_error(ConfigurationError, match="not zero at positions without text"):
            cloud.backward(torch.ones(2, 3, WIDTH))
        with clear_error(RefusedError, match="without a forward that it belongs to"):
            cloud.backward(torch.ones(2, 4, WIDTH))


def test_a_model_that_explodes_ends_in_an_error_and_not_on_the_disk(base: PreTrainedModel, tmp_path: Path) -> None:
    """A device whose weights have become huge: the cloud refuses what it cannot compute with."""
    device = Device(base, cut=CUT, shape=U, plan=PLANS[U])
    for parameter in device.own.list:
        parameter.data.fill_(1e38)
    with (
        serving(base, tmp_path / "cloud") as server,
        closing(cloud_at(base, server.address)) as cloud,
        pytest.raises((NonFiniteError, RefusedError)) as caught,
    ):
        train(device, cloud, WINDOWS, None, COURSE, tmp_path / "mine", start=cloud.start)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.rglob("*.safetensors"))


# -- who may come ------------------------------------------------------------------------------------------------------


def test_keys(base: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as database:
        keyring = Keyring(database)
        mine, foreign = keyring.create("acme", adapters=["qwen"])[0], keyring.create("acme", adapters=["law"])[0]
        with serving(base, tmp_path, keys=keyring, name="qwen") as server:
            with closing(cloud_at(base, server.address, api_key=mine)) as cloud:
                cloud.forward(sent(), None, 6.0)
            for key, match in (
                (None, "asks for an API key"),
                ("sv_" + 12 * "0" + "_" + 43 * "x", "not known here"),
                (foreign, "not for adapter 'qwen'"),
            ):
                with clear_error(KeyRejectedError, match=match):
                    cloud_at(base, server.address, api_key=key)
            keyring.revoke("acme")
            with clear_error(KeyRejectedError, match="has been revoked"):
                cloud_at(base, server.address, api_key=mine)
    assert mine not in caplog.text
    assert TOKEN not in caplog.text


def test_a_runs_token_is_not_on_the_servers_disk(base: PreTrainedModel, tmp_path: Path) -> None:
    with serving(base, tmp_path / "cloud") as server:
        run(base, server.address, tmp_path / "mine")
    kept = list((tmp_path / "cloud").rglob("*"))
    assert len(kept) > 4
    for path in kept:
        assert TOKEN not in str(path)
        assert not path.is_file() or (TOKEN.encode() not in path.read_bytes())
        assert not path.is_file() or (bytes.fromhex(TOKEN) not in path.read_bytes())


def test_tls_and_addresses_beyond_this_machine(base: PreTrainedModel, tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    pair = ours.issue("server")
    files = ServerTLS(pair.certificate, pair.key, ours.file)
    shown = ClientTLS(ours.file, pair.certificate, pair.key)
    with serving(base, tmp_path, tls=files) as server:
        with closing(RemoteCloud(base, server.address, cut=CUT, shape=U, tls=shown)) as cloud:
            assert cloud.evaluate(sent(), None)[0] is not None
        with clear_error(ConnectionFailedError, match="asks for a certificate of this client"):
            RemoteCloud(base, server.address, cut=CUT, shape=U, tls=ClientTLS(ours.file))
        with clear_error(ConnectionFailedError, match="speaks TLS, and this client"):
            RemoteCloud(base, server.address, cut=CUT, shape=U)
    with clear_error(ConfigurationError, match="without TLS; give --tls-cert and --tls-key"):
        serving(base, tmp_path, listen="0.0.0.0:0")
    with clear_error(ConfigurationError, match="without TLS; give --tls or --tls-ca"):
        RemoteCloud(base, "192.0.2.1:7435", cut=CUT, shape=U)


def test_health(base: PreTrainedModel, u_server: SplitServer) -> None:
    with grpc.insecure_channel(u_server.address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        for name in ("", "splitveil.split.v1.Split"):
            assert check(health_pb2.HealthCheckRequest(service=name), timeout=60).status == 1


def test_what_cannot_be_served(base: PreTrainedModel, tmp_path: Path) -> None:
    with clear_error(ConfigurationError, match="cut 9 does not exist"):
        serving(base, tmp_path, cut=9)
    with serving(base, tmp_path) as server, clear_error(ConfigurationError, match="is the port taken"):
        serving(base, tmp_path, listen=server.address)
    with clear_error(ConfigurationError, match="64 hexadecimal digits"):
        RemoteCloud(base, "127.0.0.1:9", cut=CUT, shape=U, token="secret")


def test_a_damaged_device_is_a_clear_error(base: PreTrainedModel, tmp_path: Path) -> None:
    with serving(base, tmp_path / "cloud") as server:
        run(base, server.address, tmp_path / "mine")
        for file in (tmp_path / "mine" / "checkpoints").rglob("*.safetensors"):
            file.write_bytes(b"")
        with clear_error(DataError, match="no checkpoint in .* can be used"):
            run(base, server.address, tmp_path / "mine")
