"""What whoever runs a server sees of it and does to it: health, metrics, logs, draining, replaced adapters."""

import json
import logging
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import load_file, save_file

from abuse.support import (
    ADAPTER,
    WIDTHS,
    RawClient,
    assert_serves,
    attention_adapter,
    clear_error,
    eventually,
    hello,
    query_data,
    served,
    served_layers,
    session,
    tiny_llama,
)
from splitveil import connect, disconnect
from splitveil.embedded import folder
from splitveil.errors import (
    BudgetExceededError,
    ConfigurationError,
    ConnectionFailedError,
    KeyRejectedError,
    RefusedError,
)
from splitveil.metering import Database, Keyring, accounts
from splitveil.private.layer import public_half
from splitveil.serving.directions import FILE as DIRECTIONS
from splitveil.serving.operations import exposition
from splitveil.serving.operations.logs import Json, Text
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.serve import metered, reload, serve, sites
from splitveil.serving.server import Server
from splitveil.serving.session import Session
from splitveil.wire import codec

LIMIT = 40
CLIENT = "acme-hospital"


@dataclass
class Vendor:
    """A metered server with metrics."""

    server: Server
    database: Database
    keyring: Keyring
    key: str

    def session(self, adapter: str = ADAPTER) -> Session:
        return Session(self.server.address, adapter, key=self.key, allow_insecure=True)

    def figures(self) -> dict[str, float]:
        return scraped(self.server)


def scraped(server: Server) -> dict[str, float]:
    """All series: name with labels → value."""
    lines = page(server).splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


def page(server: Server) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=20) as answer:
        text: str = answer.read().decode()
    return text


@pytest.fixture
def vendor(tmp_path: Path) -> Iterator[Vendor]:
    with Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as database:
        adapters = {ADAPTER: served_layers(), "law": served_layers()}
        gate = metered(adapters, database, LIMIT)
        keyring = Keyring(database)
        with Server(
            adapters,
            "127.0.0.1:0",
            gate=gate,
            keys=keyring,
            metrics="127.0.0.1:0",
            on_replace=lambda name, adapter: gate.declare(name, sites(adapter, LIMIT)),
        ) as server:
            yield Vendor(server, database, keyring, keyring.create(CLIENT)[0])


def ask(opened: Session, rows: int = 1, layer: int = 0) -> bytes:
    return opened.result(opened.submit([layer], rows, query_data(WIDTHS[layer], rows)))


# -- health ------------------------------------------------------------------------------------------------------------


def health(address: str, service: str = "") -> str:
    """The state, or the status of the refusal."""
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        except grpc.RpcError as error:
            return str(error.code().name)  # type: ignore[attr-defined]
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return name


def test_health_needs_no_key_and_names_no_adapter(vendor: Vendor) -> None:
    address = vendor.server.address
    assert health(address) == health(address, "splitveil.v1.PrivateAdapter") == "SERVING"
    # An adapter that is served, and one that is not, look alike.
    assert health(address, ADAPTER) == health(address, "no such adapter") == "NOT_FOUND"
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for call in (
            lambda: next(iter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=20))),
            lambda: stub.List(health_pb2.HealthListRequest(), timeout=20),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_health_is_answered_while_every_session_is_taken(layers: ServedAdapter) -> None:
    with Server({ADAPTER: layers}, "127.0.0.1:0", sessions=1) as server:
        opened = session(server.address)
        assert health(server.address) == "SERVING"
        with clear_error(RefusedError, match="too many sessions open"):
            session(server.address)
        assert health(server.address) == "SERVING"
        opened.close()


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_count_what_happens(vendor: Vendor) -> None:
    opened = vendor.session()
    for rows in (1, 3):
        ask(opened, rows)
    with pytest.raises(RefusedError):
        opened.result(opened.submit([0], 1, b"too short"))
    with pytest.raises(BudgetExceededError):
        ask(opened, LIMIT)
    with pytest.raises(KeyRejectedError):
        session(vendor.server.address)
    with pytest.raises(RefusedError):
        Session(vendor.server.address, "no such adapter", key=vendor.key, allow_insecure=True)
    found = vendor.figures()
    mine = f'{{adapter="{ADAPTER}"}}'
    assert found["splitveil_sessions_open"] == 1
    assert found[f"splitveil_queries_total{mine}"] == 2
    assert found[f"splitveil_rows_total{mine}"] == 4
    assert found[f"splitveil_answer_seconds_count{mine}"] == 2
    assert 0 < found[f"splitveil_answer_seconds_sum{mine}"] < 20
    assert found[f"splitveil_received_bytes_total{mine}"] >= len(query_data(rows=4))
    assert found[f"splitveil_sent_bytes_total{mine}"] >= 4 * 4 * 2 + opened.welcome.publication_size
    assert found[f'splitveil_refusals_total{{adapter="{ADAPTER}",kind="malformed"}}'] == 1
    assert found[f'splitveil_refusals_total{{adapter="{ADAPTER}",kind="budget"}}'] == 1
    assert found['splitveil_sessions_refused_total{reason="key"}'] == 1
    assert found['splitveil_sessions_refused_total{reason="adapter"}'] == 1
    assert found[f"splitveil_publication_version{mine}"] == 1
    assert found['splitveil_queries_total{adapter="law"}'] == 0
    opened.close()
    eventually(lambda: vendor.figures()["splitveil_sessions_open"] == 0)


@pytest.mark.parametrize("case", ["full", "silent", "malformed", "version"])
def test_every_refused_session_has_a_reason(case: str, layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitveil.serving import conversation

    monkeypatch.setattr(conversation, "HELLO_SECONDS", 0.3)
    with Server({ADAPTER: layers}, "127.0.0.1:0", sessions=1, metrics="127.0.0.1:0") as server:
        reason = {"full": "sessions"}.get(case, case)
        if case == "full":
            opened = session(server.address)
        first = {"malformed": b"\xff", "version": hello(version=99), "full": hello()}
        with RawClient(server.address, *([first[case]] if case in first else [])) as client:
            client.ending()
        eventually(lambda: scraped(server)[f'splitveil_sessions_refused_total{{reason="{reason}"}}'] == 1)
        if case == "full":
            opened.close()


def test_metrics_name_no_client_and_no_key(vendor: Vendor) -> None:
    opened = vendor.session()
    ask(opened)
    with pytest.raises(BudgetExceededError):
        ask(opened, LIMIT)
    wrong = vendor.key[:-4] + "AAAA"
    with pytest.raises(KeyRejectedError):
        Session(vendor.server.address, ADAPTER, key=wrong, allow_insecure=True)
    shown = page(vendor.server)
    assert "splitveil_rows_total" in shown
    number = vendor.key.split("_")[1]
    for secret in (CLIENT, vendor.key, wrong, number, "sv_", opened.welcome.digest.hex(), "127.0.0.1"):
        assert secret not in shown
    opened.close()


def test_metrics_are_off_by_default(server: Server) -> None:
    assert server.metrics_address is None


def test_metrics_stay_on_this_machine_unless_told_otherwise(
    layers: ServedAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    with clear_error(ConfigurationError, match=r"refusing to serve metrics beyond loopback \(0\.0\.0\.0\)"):
        Server({ADAPTER: layers}, "127.0.0.1:0", metrics="0.0.0.0:0")
    with Server({ADAPTER: layers}, "127.0.0.1:0", metrics="0.0.0.0:0", allow_plaintext=True):
        assert "serve metrics beyond loopback (0.0.0.0) without TLS" in caplog.text


def test_a_port_for_metrics_that_is_taken(layers: ServedAdapter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with clear_error(ConfigurationError, match=f"cannot serve metrics on {taken}"):
            Server({ADAPTER: layers}, "127.0.0.1:0", metrics=taken)


def test_other_paths_and_broken_requests(vendor: Vendor) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{vendor.server.metrics_address}/", timeout=20)
    assert vendor.server.metrics_address is not None
    host, _, port = vendor.server.metrics_address.rpartition(":")
    for data in (b"\xff\xfe\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b"GET " + b"x" * 70_000):
        with socket.create_connection((host, int(port)), timeout=20) as one:
            one.sendall(data)
    assert "splitveil_sessions_open" in page(vendor.server)


def test_a_connection_that_says_nothing_holds_up_neither_metrics_nor_the_end(
    layers: ServedAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 0.5)
    server = Server({ADAPTER: layers}, "127.0.0.1:0", metrics="127.0.0.1:0")
    assert server.metrics_address is not None
    host, _, port = server.metrics_address.rpartition(":")
    with socket.create_connection((host, int(port))):
        assert "splitveil_sessions_open" in page(server)
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 60.0)
    with socket.create_connection((host, int(port))):
        time.sleep(0.2)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 10
    assert not [t.name for t in threading.enumerate() if t.name == "splitveil-metrics"]
    server.close()


# -- logs --------------------------------------------------------------------------------------------------------------


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    return [(r.event, r.fields) for r in caplog.records if hasattr(r, "fields")]  # type: ignore[attr-defined]


def test_what_is_logged(vendor: Vendor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "splitveil")
    opened = vendor.session()
    ask(opened, 2)
    for _ in range(3):
        with pytest.raises(BudgetExceededError):
            ask(opened, LIMIT)
    with pytest.raises(KeyRejectedError):
        session(vendor.server.address)
    opened.close()
    eventually(lambda: any(name == "session_ended" for name, _ in events(caplog)))
    found = dict(events(caplog))
    assert [name for name, _ in events(caplog)].count("query_refused") == 1, "a client could fill the disk"
    assert found["session_opened"]["adapter"] == ADAPTER
    assert found["session_refused"]["reason"] == "key"
    ended = found["session_ended"]
    assert (ended["queries"], ended["rows"], ended["refused"], ended["reason"]) == (1, 2, 3, "left")
    assert ended["session"] == found["session_opened"]["session"]


def test_no_key_and_no_client_in_any_log_line(vendor: Vendor, caplog: pytest.LogCaptureFixture) -> None:
    """Looked for in what was logged itself: the formatters would take a key out."""
    caplog.set_level(logging.DEBUG)
    wrong = vendor.key[:-4] + "AAAA"
    revoked, _ = vendor.keyring.create("bolt")
    vendor.keyring.revoke("bolt")
    for key in (wrong, revoked, "secret", ""):
        with pytest.raises(KeyRejectedError):
            Session(vendor.server.address, ADAPTER, key=key, allow_insecure=True)
    with RawClient(vendor.server.address, hello(key=vendor.key), b"\xff" + vendor.key.encode()) as client:
        client.ending()
    with RawClient(vendor.server.address, vendor.key.encode()) as client:
        client.ending()
    with RawClient(vendor.server.address, hello(key=vendor.key, adapter=vendor.key)) as client:
        client.ending()
    opened = vendor.session()
    ask(opened)
    opened.close()
    eventually(lambda: [name for name, _ in events(caplog)].count("session_ended") >= 2)
    lines = [str(vars(record)) for record in caplog.records]
    assert len(lines) >= 6
    for secret in (vendor.key, wrong, revoked, vendor.key.split("_", 2)[2], vendor.key.split("_")[1], CLIENT, "bolt"):
        assert not [line for line in lines if secret in line], secret[:6]


def test_clients_are_named_where_the_operator_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "splitveil")
    with Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as database:
        keyring = Keyring(database)
        key, _ = keyring.create(CLIENT)
        with Server({ADAPTER: served_layers()}, "127.0.0.1:0", keys=keyring, log_identities=True) as server:
            Session(server.address, ADAPTER, key=key, allow_insecure=True).close()
    assert dict(events(caplog))["session_opened"]["client"] == CLIENT
    assert key not in caplog.text


def record(message: str, *arguments: object, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("splitveil.x", logging.WARNING, "", 0, message, arguments, None)
    vars(made).update(more)
    return made


def test_the_two_formats() -> None:
    told = record("session ended", event="session_ended", fields={"rows": 3, "adapter": "clinic"})
    line = json.loads(Json().format(told))
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "event": "session_ended", "rows": 3, "adapter": "clinic"}
    assert re.fullmatch(r"\S+Z warning session ended rows=3 adapter=clinic", Text().format(told))
    key = "sv_0123456789ab_" + "A" * 43
    for form in (Json(), Text()):
        other = form.format(record("from %s:\nodd \u2028 thing %s", "elsewhere", key))
        assert key not in other
        assert "sv_…" in other
    assert "\n" not in Json().format(record("two\nlines"))
    try:
        raise ValueError(key)
    except ValueError as error:
        broken = record("broken", exc_info=(type(error), error, error.__traceback__))
    assert key not in Json().format(broken)
    assert "ValueError" in json.loads(Json().format(broken))["traceback"]


# -- draining ----------------------------------------------------------------------------------------------------------


class Busy:
    """A session that asks without end, in a thread; ``error`` is what it ended with."""

    def __init__(self, address: str) -> None:
        self.answers = 0
        self.error: Exception | None = None
        self._session = session(address)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                ask(self._session)
                self.answers += 1
        except ConnectionFailedError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(60)
        self._session.close()


def test_draining_lets_a_generation_go_on_and_ends_it_with_a_reason(layers: ServedAdapter) -> None:
    server = Server({ADAPTER: layers}, "127.0.0.1:0")
    busy = Busy(server.address)
    began = time.monotonic()
    draining = threading.Thread(target=server.drain, args=(1.5,))
    draining.start()
    eventually(lambda: health(server.address) == "NOT_SERVING", 1.0)
    with clear_error(ConnectionFailedError, match="is shutting down; connect again later"):
        session(server.address)
    before = busy.answers
    time.sleep(0.3)
    assert busy.answers > before, "a generation was cut while the server drained"
    draining.join(30)
    took = time.monotonic() - began
    busy.join()
    assert 1.4 < took < 6
    assert type(busy.error) is ConnectionFailedError
    assert "is shutting down; connect again later" in str(busy.error)
    with socket.socket() as one:
        host, _, port = server.address.rpartition(":")
        assert one.connect_ex((host, int(port))) != 0


def test_draining_waits_for_nobody_who_is_idle(layers: ServedAdapter) -> None:
    server = Server({ADAPTER: layers}, "127.0.0.1:0")
    idle = [session(server.address) for _ in range(3)]
    ask(idle[0])
    began = time.monotonic()
    server.drain(60.0)
    assert time.monotonic() - began < 10
    for one in idle:
        with clear_error(ConnectionFailedError):
            ask(one)
        one.close()


def test_draining_can_be_hurried(layers: ServedAdapter) -> None:
    server = Server({ADAPTER: layers}, "127.0.0.1:0")
    busy = Busy(server.address)
    began = time.monotonic()
    server.drain(60.0, lambda: time.monotonic() - began > 0.5)
    assert time.monotonic() - began < 10
    busy.join()


def test_a_query_under_way_is_answered_before_the_end(layers: ServedAdapter) -> None:
    """Longer than it takes to call a session idle."""

    class Slow:
        def check(self, *arguments: Any) -> None:
            layers.half.check(*arguments)

        def answer(self, *arguments: Any) -> bytes:
            begun.set()
            time.sleep(2.0)
            return layers.half.answer(*arguments)

    from dataclasses import replace

    begun = threading.Event()
    server = Server({ADAPTER: replace(layers, half=Slow())}, "127.0.0.1:0")  # type: ignore[arg-type]
    opened = session(server.address)
    ticket = opened.submit([0], 1, query_data())
    assert begun.wait(20)
    server.drain(20.0)
    assert opened.result(ticket)
    opened.close()


# -- replacing an adapter ----------------------------------------------------------------------------------------------


def test_a_replaced_adapter_keeps_its_accounts(vendor: Vendor, own_cache: Path) -> None:
    opened = vendor.session()
    for _ in range(3):
        ask(opened, 10)
    vendor.server.replace(ADAPTER, served_layers())
    with clear_error(ConnectionFailedError, match="the adapter was replaced by its vendor; connect again"):
        ask(opened)
    again = vendor.session()
    ask(again, 10)
    with pytest.raises(BudgetExceededError, match="0 are left of 40"):
        ask(again)
    for one in (opened, again):
        one.close()
    rows = {a.site: a.rows for a in accounts(vendor.database) if a.identity == CLIENT}
    assert max(rows.values()) <= LIMIT
    mine = f'{{adapter="{ADAPTER}"}}'
    assert vendor.figures()[f"splitveil_publication_version{mine}"] == 2


def test_sessions_on_other_adapters_notice_nothing(vendor: Vendor) -> None:
    opened = vendor.session("law")
    ask(opened)
    vendor.server.replace(ADAPTER, served_layers())
    ask(opened)
    opened.close()


def test_the_client_gets_the_new_publication_and_the_new_outputs(own_cache: Path) -> None:
    from splitveil.serving.cache import PublicationCache

    tokens = torch.tensor([[3, 4, 5]])
    old, new = attention_adapter(0), attention_adapter(1)
    with Server({ADAPTER: old}, "127.0.0.1:0") as server:
        model = tiny_llama()

        def outputs() -> tuple[np.ndarray[Any, Any], int]:
            connect(model, server.address, ADAPTER, allow_insecure=True)
            from splitveil.serving.connect import connection

            received = connection(model).session.traffic.received
            with torch.no_grad():
                result = model(tokens).logits.numpy()
            disconnect(model)
            return result, received

        first, downloaded = outputs()
        _, cached = outputs()
        assert cached < len(old.published) < downloaded
        server.replace(ADAPTER, new)
        second, missed = outputs()
        assert missed > len(new.published), "the client took the old publication from its cache"
        assert PublicationCache().load(server.address, ADAPTER) == new.published
    with Server({ADAPTER: new}, "127.0.0.1:0") as server:
        expected, _ = outputs()
    np.testing.assert_allclose(second, expected, atol=0.02)
    assert np.abs(first - expected).max() > 0.2, "the two adapters do not differ: equality shows nothing"


def test_other_layers_and_widths(vendor: Vendor) -> None:
    """Another adapter altogether: the ledger counts its layers from then on, and no longer the old ones."""
    from abuse.support import lora

    vendor.server.replace(ADAPTER, served([lora("m0.linear", 16, 16, rank=3), lora("new.linear", 24, 8)]))
    opened = vendor.session()
    assert len(public_half(opened.publication).publication.layers) == 2
    ask(opened, 10)
    opened.result(opened.submit([1], 10, query_data(24, 10)))
    opened.close()
    assert {"m0.linear", "new.linear"} <= {a.site for a in accounts(vendor.database)}


def test_what_cannot_be_replaced(vendor: Vendor) -> None:
    with clear_error(ConfigurationError, match="no adapter named 'medicine' is served here"):
        vendor.server.replace("medicine", served_layers())
    opened = vendor.session()
    ask(opened)
    opened.close()


def test_a_folder_is_published_again_when_it_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And only then: many publications of the same weights say more than one."""
    adapter = tmp_path / "clinic"
    shutil.copytree(folder("clinic"), adapter, ignore=shutil.ignore_patterns(DIRECTIONS))
    with serve({"clinic": adapter}, "127.0.0.1:0", metrics="127.0.0.1:0") as server:
        mine = 'splitveil_publication_version{adapter="clinic"}'
        reload(server, {"clinic": adapter})
        assert scraped(server)[mine] == 1
        weights = adapter / "adapter_model.safetensors"
        save_file({name: -x for name, x in load_file(weights).items()}, weights)
        reload(server, {"clinic": adapter}, stop=lambda: True)
        assert scraped(server)[mine] == 1
        reload(server, {"clinic": adapter})
        assert scraped(server)[mine] == 2
        weights.unlink()
        reload(server, {"clinic": adapter})
        assert scraped(server)[mine] == 2
        assert scraped(server)['splitveil_replacements_failed_total{adapter="clinic"}'] == 1
        assert "adapter_model.safetensors is missing" in dict(events(caplog))["adapter_not_replaced"]["error"]


def test_while_many_sessions_are_open(layers: ServedAdapter) -> None:
    """Replacing under load: every answer is of the publication that the session has, or there is none."""
    with Server({ADAPTER: layers}, "127.0.0.1:0") as server:
        busy = [Busy(server.address) for _ in range(3)]
        for _ in range(3):
            time.sleep(0.1)
            server.replace(ADAPTER, served_layers())
        for one in busy:
            one.join()
            assert "was replaced by its vendor" in str(one.error)
        assert_serves(server.address)


def test_a_message_in_the_middle_of_a_replacement(layers: ServedAdapter) -> None:
    """A client that has greeted and not asked yet: the same."""
    with Server({ADAPTER: layers}, "127.0.0.1:0") as server, RawClient(server.address, hello()) as client:
        client.welcome()
        server.replace(ADAPTER, served_layers())
        client.send(codec.Query(1, (0,), 1, query_data()))
        assert client.ending()[0] is grpc.StatusCode.ABORTED
