"""Split sessions with devices that want more than their share: memory, places, the disk, and what is none of theirs."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from abuse.support import RawClient, clear_error, eventually, tiny_llama
from abuse.test_split_sessions import CUT, PLANS, STRAIGHT, TOKEN, U, assert_serves, hello, sent, serving
from splitveil.errors import ConnectionFailedError, KeyRejectedError, RefusedError
from splitveil.split import Crossing
from splitveil.splitlearning import service
from splitveil.splitlearning.agreement import folder_name, new_token, sent_plan
from splitveil.splitlearning.carrying import request_of
from splitveil.splitlearning.checks import Limits
from splitveil.splitlearning.connection import RemoteCloud
from splitveil.splitlearning.course import Course
from splitveil.splitlearning.device import Device
from splitveil.splitlearning.interface import Shape
from splitveil.splitlearning.server import SplitServer
from splitveil.splitlearning.training import train
from splitveil.wire import split_codec as codec
from splitveil.wire.split_codec import Kind
from splitveil.wire.tensors import Packed


@pytest.fixture(params=list(Shape), ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_llama()


def training(base: PreTrainedModel, server: SplitServer, token: str = TOKEN, shape: Shape = U) -> RemoteCloud:
    return RemoteCloud(base, server.address, cut=CUT, shape=shape, plan=PLANS[shape], token=token)


def asked(server: SplitServer, *messages: Any) -> Any:
    """What the server says to the last message."""
    with RawClient(server.address, *messages, wire=codec) as client:
        return [client.receive() for _ in messages][-1]


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.FORWARD, Kind.EVALUATE])
def test_few_bytes_do_not_buy_many_logits(kind: Kind, base: PreTrainedModel, tmp_path: Path) -> None:
    """States that are zero travel in 4 bytes a position; each position has logits for the whole vocabulary."""
    crossing, labels = sent(8, 16), torch.ones(8, 16, dtype=torch.long)
    request = request_of(1, kind, crossing.with_hidden(torch.zeros_like(crossing.hidden)), labels, 6.0)
    assert request.tensor is not None
    assert request.tensor.size == 4 * 8 * 16
    with serving(base, tmp_path, STRAIGHT, limits=Limits(logits=8 * 16 * 64 - 1)) as server:
        reply = asked(server, hello(base, STRAIGHT), request)
        assert isinstance(reply, codec.Refusal)
        assert "more logits than this cloud computes at once" in reply.message
        assert_serves(server, base, STRAIGHT)
    with serving(base, tmp_path, STRAIGHT, limits=Limits(logits=8 * 16 * 64)) as server:
        assert isinstance(asked(server, hello(base, STRAIGHT), request), codec.Result)


def test_sizes_are_judged_before_numbers_are_made(
    base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(request_of(1, Kind.EVALUATE, sent()), tensor=Packed(99, 0, b""))
    with serving(base, tmp_path) as server:
        assert "unknown encoding" in asked(server, hello(base), request).message
        monkeypatch.setattr(service, "fits", lambda rows, width: False)
        assert "larger than a message" in asked(server, hello(base), request).message


def test_next_logits_that_fit_no_message_are_not_computed(tmp_path: Path) -> None:
    """200 texts, a vocabulary of 50,000: 40 MB for a request of 13 kB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50_000, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    wide = LlamaForCausalLM(config).eval()
    with serving(wide, tmp_path, STRAIGHT) as server:
        reply = asked(server, hello(wide, STRAIGHT), request_of(1, Kind.EXTEND, sent(200, 1)))
        assert isinstance(reply, codec.Refusal)
        assert "the answer for 200 texts is larger than a message" in reply.message
        assert isinstance(asked(server, hello(wide, STRAIGHT), request_of(1, Kind.EXTEND, sent(2, 1))), codec.Result)


# -- places ------------------------------------------------------------------------------------------------------------


def test_who_takes_no_answer_in_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A connection whose reader has stopped goes on answering pings; its place is free again all the same."""
    caplog.set_level("INFO", "splitveil")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    wide = LlamaForCausalLM(config).eval()
    crossing = Crossing(torch.randn(16, 800, 512), torch.ones(16, 800, dtype=torch.long))
    with serving(wide, tmp_path, cut=2, silence=1.0, sessions=1) as server:
        # An answer of 26 MB, more than a connection takes in by itself; at the last cut it costs no computation.
        greeting = hello(wide, cut=2, plan=None, token=b"")
        with RawClient(server.address, greeting, request_of(1, Kind.EVALUATE, crossing), wire=codec) as client:
            assert isinstance(client.receive(), codec.Welcome)
            eventually(lambda: any(getattr(r, "fields", {}).get("reason") == "silent" for r in caplog.records), 20)
            RemoteCloud(wide, server.address, cut=2, shape=U).close()


def test_who_comes_back_needs_no_second_place(base: PreTrainedModel, tmp_path: Path) -> None:
    """All places are taken, one of them by what this device left behind."""
    with serving(base, tmp_path, training=1) as server:
        old, new = training(base, server), training(base, server)
        new.forward(sent(), None, 6.0)
        with clear_error(ConnectionFailedError):
            old.forward(sent(), None, 6.0)
        with clear_error(RefusedError, match="too many sessions"):
            training(base, server, new_token())
        old.close()
        new.close()


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_runs_are_counted(base: PreTrainedModel, tmp_path: Path) -> None:
    """A token costs nothing, and each makes a folder."""
    tokens = [new_token() for _ in range(3)]
    with serving(base, tmp_path, runs=2) as server:
        for token in tokens[:2]:
            with closing(training(base, server, token)) as cloud:
                cloud.save(0)
        with clear_error(RefusedError, match="keeps 2 runs, and begins no other"):
            training(base, server, tokens[2])
        with closing(training(base, server, tokens[0])) as cloud:  # one that is kept goes on
            cloud.save(0)
    assert len(list(tmp_path.iterdir())) == 2


def test_many_saves_leave_two_checkpoints(base: PreTrainedModel, tmp_path: Path) -> None:
    with serving(base, tmp_path) as server, closing(training(base, server)) as cloud:
        for step in range(5):
            cloud.save(step)
            cloud.save(step)
            states, _ = cloud.forward(sent(), None, 6.0)
            cloud.backward(torch.ones_like(states))
            cloud.step(1e-3)
    (kept,) = tmp_path.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["step-000003", "step-000004"]


# -- what is none of a device's ----------------------------------------------------------------------------------------


def test_nothing_but_numbers_depends_on_the_text(
    shape: Shape, base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs on two texts: in the U shape only what is in the tensors differs; straight, labels do, as is said."""
    encode, found = codec.encode_client, []
    for seed in (1, 2):
        sent_messages: list[Any] = []

        def spy(message: Any, kept: list[Any] = sent_messages) -> bytes:
            kept.append(message)
            return encode(message)

        monkeypatch.setattr(codec, "encode_client", spy)
        windows = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(seed))
        device = Device(base, cut=CUT, shape=shape, plan=PLANS[shape])
        place = tmp_path / str(seed)
        with serving(base, place / "cloud", shape) as server, closing(training(base, server, shape=shape)) as cloud:
            train(device, cloud, windows, windows[:2], Course(2, batch=2), place / "mine")
        found.append([m for m in sent_messages if isinstance(m, codec.Request)])
    assert len(found[0]) == len(found[1]) > 4
    pairs = list(zip(*found, strict=True))
    assert any(one.tensor != other.tensor for one, other in pairs)
    same = all(replace(one, tensor=None) == replace(other, tensor=None) for one, other in pairs)
    assert same is (shape is U)
    assert any(one.labels for one, _ in pairs) is (shape is STRAIGHT)


def test_a_database_that_fails_is_told_as_that(
    base: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "splitveil")

    class Guest:
        identity = "acme"

        def check(self) -> None:
            raise RefusedError("the keys cannot be looked up; try again later")

    class Door:
        def admit(self, key: str, adapter: str) -> Guest:
            return Guest()

    with serving(base, tmp_path, keys=Door()) as server:
        request = request_of(1, Kind.EVALUATE, sent())
        assert "cannot be looked up" in asked(server, hello(base, key="x"), request).message
    assert "database" in [r.fields["kind"] for r in caplog.records if getattr(r, "event", "") == "query_refused"]


def test_a_key_that_is_revoked_ends_an_open_session(base: PreTrainedModel, tmp_path: Path) -> None:
    valid = [True]

    class Guest:
        identity = "acme"

        def check(self) -> None:
            if not valid[0]:
                raise KeyRejectedError("this API key has been revoked")

    class Door:
        def admit(self, key: str, adapter: str) -> Guest:
            return Guest()

    with serving(base, tmp_path, keys=Door()) as server:
        request = request_of(1, Kind.EVALUATE, sent())
        with RawClient(server.address, hello(base, key="x"), request, wire=codec) as client:
            assert isinstance([client.receive(), client.receive()][-1], codec.Result)
            valid[0] = False
            client.send(replace(request, seq=2))
            code, details = client.ending()
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "revoked" in details


def test_a_full_disk_is_told_without_the_servers_paths(
    base: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "splitveil")
    run = folder_name(bytes.fromhex(TOKEN))
    with serving(base, tmp_path / "state") as server, closing(training(base, server)) as cloud:
        (tmp_path / "state" / run).write_text("a file where the folder should be")
        with pytest.raises(RefusedError, match="cannot be written to this run in the cloud: File exists") as caught:
            cloud.save(0)
        assert_serves(server, base, U)
    assert "/" not in str(caught.value)
    (told,) = [r.fields for r in caplog.records if getattr(r, "event", "") == "checkpoint_not_written"]
    assert told["run"] == run
    assert TOKEN not in caplog.text


def test_a_state_that_is_no_folder_is_told_before_anything_is_trained(
    base: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    with serving(base, tmp_path / "state") as server:
        with pytest.raises(RefusedError, match="cannot keep checkpoints at the moment: File exists") as caught:
            training(base, server)
        assert_serves(server, base, U)
    assert "/" not in str(caught.value)
    assert [r for r in caplog.records if getattr(r, "event", "") == "state_not_writable"]


def test_damage_is_told_without_the_servers_paths(base: PreTrainedModel, tmp_path: Path) -> None:
    with serving(base, tmp_path) as server:
        with closing(training(base, server)) as cloud:
            cloud.save(0)
        (run,) = tmp_path.iterdir()
        (run / "step-000000").rename(run / "step-000001")
        with pytest.raises(RefusedError, match="step 1 of this run in the cloud is damaged") as caught:
            RemoteCloud(base, server.address, cut=CUT, shape=U, plan=PLANS[U], token=TOKEN, steps=[1])
    assert "/" not in str(caught.value)


def test_a_target_that_is_the_whole_model_is_one_line(base: PreTrainedModel, tmp_path: Path) -> None:
    greeting = replace(hello(base), plan=replace(sent_plan(PLANS[U]), targets=("model",)))
    with serving(base, tmp_path) as server:
        with RawClient(server.address, greeting, wire=codec) as client:
            code, details = client.ending()
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "no adapters for model" in details
        assert details.isprintable()
        assert len(details) < 300
