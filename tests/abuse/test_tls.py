"""TLS between real servers and clients, and one clear reason for every connection that does not come about."""

import datetime
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from certificates import FUTURE, PAST, Authority, Pair

from abuse.support import (
    ADAPTER,
    Relay,
    attention_adapter,
    clear_error,
    eventually,
    hello,
    query_data,
    session,
    tiny_llama,
)
from abuse.test_metered import Counting
from abuse.test_strangers import SOCKETS, tcp_server
from splitveil import connect, disconnect
from splitveil.errors import ConfigurationError, ConnectionFailedError, KeyRejectedError
from splitveil.metering import Database, Keyring
from splitveil.serving import diagnosis, stream
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server
from splitveil.serving.session import Session
from splitveil.serving.tls import ClientCredentials, ClientTLS, ServerTLS
from splitveil.wire import codec


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


@pytest.fixture
def pair(ours: Authority) -> Pair:
    return ours.issue("server")


@pytest.fixture
def secured(layers: ServedAdapter, pair: Pair) -> Iterator[Server]:
    with Server({ADAPTER: layers}, "127.0.0.1:0", tls=ServerTLS(pair.certificate, pair.key)) as running:
        yield running


@pytest.fixture
def counting(layers: ServedAdapter) -> Counting:
    return Counting(layers)


@pytest.fixture
def mutual(layers: ServedAdapter, counting: Counting, pair: Pair, ours: Authority) -> Iterator[Server]:
    tls = ServerTLS(pair.certificate, pair.key, ours.file)
    with Server({ADAPTER: replace(layers, half=counting)}, "127.0.0.1:0", tls=tls) as running:
        yield running


def open_session(address: str, tls: ClientTLS, key: str = "") -> Session:
    return Session(address, ADAPTER, key=key, allow_insecure=True, credentials=ClientCredentials.read(tls))


def shown(authority: Authority, pair: Pair) -> ClientTLS:
    return ClientTLS(authority.file, pair.certificate, pair.key)


def serves(address: str, tls: ClientTLS) -> None:
    opened = open_session(address, tls)
    assert opened.result(opened.submit([0], 1, query_data()))
    opened.close()


def test_a_session_over_tls(secured: Server, ours: Authority) -> None:
    serves(secured.address, ClientTLS(ours.file))


def test_what_goes_over_the_wire_is_not_plaintext(layers: ServedAdapter, pair: Pair, ours: Authority) -> None:
    """The same session with and without TLS, seen from the middle: the adapter's name is in the one only."""
    seen: dict[bool, bool] = {}
    for tls in (None, ServerTLS(pair.certificate, pair.key)):
        captured: list[bytes] = []
        with Server({ADAPTER: layers}, "127.0.0.1:0", tls=tls) as server, Recorder(server.address, captured) as relay:
            if tls is None:
                session(relay.address).close()
            else:
                open_session(relay.address, ClientTLS(ours.file)).close()
        seen[tls is not None] = ADAPTER.encode() in b"".join(captured)
    assert seen == {False: True, True: False}


class Recorder(Relay):
    """Passes a connection on, and keeps what went over it."""

    def __init__(self, address: str, captured: list[bytes]) -> None:
        self._captured = captured
        super().__init__(address)

    def _pump(self, source, sink, limit) -> None:  # type: ignore[no-untyped-def]
        captured = self._captured

        class Sink:
            def sendall(self, data: bytes) -> None:
                captured.append(data)
                sink.sendall(data)

        super()._pump(source, Sink(), limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_connect_and_generate(host: str, pair: Pair, ours: Authority) -> None:
    try:
        socket.create_server((host.strip("[]"), 0), family=socket.AF_INET6 if "[" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    adapter = attention_adapter()
    with Server({ADAPTER: adapter}, f"{host}:0", tls=ServerTLS(pair.certificate, pair.key)) as server:
        model = tiny_llama()
        connect(model, server.address, ADAPTER, tls=ClientTLS(ours.file), allow_insecure=True)
        assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
        disconnect(model)
        with clear_error(ConnectionFailedError, match="speaks TLS, and this client"):
            connect(model, server.address, ADAPTER, allow_insecure=True)


# -- a server that is not trusted --------------------------------------------------------------------------------------


def test_an_unknown_authority(secured: Server, theirs: Authority) -> None:
    with clear_error(ConnectionFailedError, match="of an authority that is not trusted here.*--tls-ca"):
        open_session(secured.address, ClientTLS(theirs.file))


def test_the_system_does_not_trust_our_authority(secured: Server) -> None:
    with clear_error(ConnectionFailedError, match="of an authority that is not trusted here"):
        open_session(secured.address, ClientTLS())


def test_the_systems_authorities_can_be_ours(
    secured: Server, ours: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.file))
    serves(secured.address, ClientTLS())


@pytest.mark.parametrize("hosts", [("other.example",), ("localhost",), ("127.0.0.2",)])
def test_a_certificate_for_another_host(hosts: tuple[str, ...], layers: ServedAdapter, ours: Authority) -> None:
    pair = ours.issue("other", hosts=hosts)
    with (
        Server({ADAPTER: layers}, "127.0.0.1:0", tls=ServerTLS(pair.certificate, pair.key)) as server,
        clear_error(ConnectionFailedError, match=r"is for another host, not for 127\.0\.0\.1"),
    ):
        open_session(server.address, ClientTLS(ours.file))


@pytest.mark.parametrize(("when", "reason"), [(PAST, "has expired"), (FUTURE, "is not valid yet")])
def test_a_server_certificate_outside_its_time(
    when: tuple[object, ...], reason: str, ours: Authority, layers: ServedAdapter
) -> None:
    """Our server refuses to start with one: this is one that was started before, by gRPC alone."""
    pair = ours.issue("late", when=when)  # type: ignore[arg-type]
    running = grpc.server(None)
    credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.certificate.read_bytes())])
    port = running.add_secure_port("127.0.0.1:0", credentials)
    running.start()
    with clear_error(ConnectionFailedError, match=reason):
        open_session(f"127.0.0.1:{port}", ClientTLS(ours.file))
    running.stop(0).wait()


# -- one side without TLS ----------------------------------------------------------------------------------------------


def test_a_plaintext_client_at_a_tls_server(secured: Server, mutual: Server, ours: Authority) -> None:
    for server in (secured, mutual):
        with clear_error(ConnectionFailedError, match="speaks TLS, and this client was told to connect without it"):
            session(server.address)
    serves(secured.address, ClientTLS(ours.file))


def test_a_tls_client_at_a_plaintext_server(server: Server, ours: Authority) -> None:
    with clear_error(ConnectionFailedError, match="speaks plaintext, and this client was told to use TLS"):
        open_session(server.address, ClientTLS(ours.file))


def test_a_tls_client_where_nobody_is(ours: Authority) -> None:
    with clear_error(ConnectionFailedError, match="is `splitveil serve` running there"):
        open_session("127.0.0.1:9", ClientTLS(ours.file))


@pytest.mark.parametrize("case", SOCKETS)
def test_a_tls_client_at_a_socket_of_another_kind(case: str, ours: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(diagnosis, "PROBE_SECONDS", 0.3)
    with tcp_server(SOCKETS[case]) as address, clear_error(ConnectionFailedError, match=address):
        open_session(address, ClientTLS(ours.file))


# -- a client that is not trusted --------------------------------------------------------------------------------------


def test_mutual_tls(mutual: Server, ours: Authority) -> None:
    serves(mutual.address, shown(ours, ours.issue("client")))
    assert mutual.transport == "TLS, clients show a certificate"


def test_a_client_without_a_certificate(mutual: Server, counting: Counting, ours: Authority) -> None:
    with clear_error(ConnectionFailedError, match="asks for a certificate of this client"):
        open_session(mutual.address, ClientTLS(ours.file))
    assert counting.rows == 0
    serves(mutual.address, shown(ours, ours.issue("client")))


def test_a_client_of_another_authority(mutual: Server, counting: Counting, ours: Authority, theirs: Authority) -> None:
    with clear_error(ConnectionFailedError, match=r"refused this client's certificate .*theirs\.crt"):
        open_session(mutual.address, ClientTLS(ours.file, *pair_of(theirs.issue("theirs"))))
    assert counting.rows == 0


def pair_of(pair: Pair) -> tuple[Path, Path]:
    return pair.certificate, pair.key


@pytest.mark.parametrize(("when", "answered"), [(PAST, False), (FUTURE, False), (None, True)])
def test_an_expired_client_certificate_is_refused_and_nothing_is_computed(
    when: tuple[object, ...] | None, answered: bool, mutual: Server, counting: Counting, ours: Authority
) -> None:
    """With a client that does not look at its own certificate, and sends its query at once."""
    pair = ours.issue("late") if when is None else ours.issue("late", when=when)  # type: ignore[arg-type]
    credentials = grpc.ssl_channel_credentials(
        ours.file.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
    )
    with grpc.secure_channel(mutual.address, credentials) as channel:
        messages = [codec.encode_client(hello()), codec.encode_client(codec.Query(1, (0,), 1, query_data()))]
        call = channel.stream_stream(codec.METHOD)(iter(messages), timeout=20)
        try:
            received = list(call)
        except grpc.RpcError:
            received = []
    assert bool(received) is answered
    assert (counting.rows == 1) is answered


def test_a_client_knows_that_its_own_certificate_has_expired(ours: Authority) -> None:
    with clear_error(ConfigurationError, match=r"late\.crt expired on \d{4}-"):
        ClientCredentials.read(shown(ours, ours.issue("late", when=PAST)))


def test_a_client_certificate_that_expires_after_it_was_read(mutual: Server, ours: Authority) -> None:
    end = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(seconds=2)
    credentials = ClientCredentials.read(shown(ours, ours.issue("brief", when=(PAST[0], end))))
    time.sleep(max(0.0, (end - datetime.datetime.now(datetime.UTC)).total_seconds()) + 1.1)
    with clear_error(ConnectionFailedError, match=r"refused this client's certificate .*brief\.crt: it has expired"):
        Session(mutual.address, ADAPTER, allow_insecure=True, credentials=credentials)


def test_a_certificate_is_no_api_key(layers: ServedAdapter, pair: Pair, ours: Authority, tmp_path: Path) -> None:
    """With mutual TLS the key still names the client."""
    client = shown(ours, ours.issue("client"))
    with (
        Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as database,
        Server(
            {ADAPTER: layers},
            "127.0.0.1:0",
            keys=Keyring(database),
            tls=ServerTLS(pair.certificate, pair.key, ours.file),
        ) as server,
    ):
        with clear_error(KeyRejectedError, match="asks for an API key"):
            open_session(server.address, client)
        open_session(server.address, client, Keyring(database).create("acme")[0]).close()


# -- files -------------------------------------------------------------------------------------------------------------


def garbage(file: Path) -> Path:
    file.write_text("-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\n")
    return file


BROKEN: dict[str, tuple[Callable[[Authority, Path], ServerTLS], str]] = {
    "no certificate": (
        lambda a, f: ServerTLS(f / "none.crt", a.issue("s").key),
        "none.crt cannot be read: No such file",
    ),
    "no key": (
        lambda a, f: ServerTLS(a.issue("s").certificate, f / "none.key"),
        "none.key cannot be read: No such file",
    ),
    "a folder": (lambda a, f: ServerTLS(f, a.issue("s").key), "cannot be read: Is a directory"),
    "garbage": (lambda a, f: ServerTLS(garbage(f / "x.crt"), a.issue("s").key), "x.crt holds no certificate in PEM"),
    "garbage as key": (
        lambda a, f: ServerTLS(a.issue("s").certificate, garbage(f / "x.key")),
        "x.key holds no private key in PEM",
    ),
    "swapped": (
        lambda a, f: ServerTLS(a.issue("s").key, a.issue("s").certificate),
        "s.key holds no certificate in PEM",
    ),
    "another key": (lambda a, f: ServerTLS(a.issue("s").certificate, a.issue("t").key), "t.key does not belong to"),
    "a passphrase": (lambda a, f: ServerTLS(*pair_of(a.issue("s", passphrase=b"x"))), "s.key has a passphrase"),
    "expired": (lambda a, f: ServerTLS(*pair_of(a.issue("s", when=PAST))), r"s.crt expired on \d{4}-\d\d-\d\d"),
    "not valid yet": (lambda a, f: ServerTLS(*pair_of(a.issue("s", when=FUTURE))), "s.crt is not valid before"),
    "a kind of key that TLS clients refuse": (
        lambda a, f: ServerTLS(*pair_of(a.issue("s", kind="ed25519"))),
        "use RSA, or ECDSA on P-256 or P-384",
    ),
    "a curve that TLS clients refuse": (
        lambda a, f: ServerTLS(*pair_of(a.issue("s", kind="k1"))),
        "use RSA, or ECDSA on P-256 or P-384",
    ),
    "no client authority": (
        lambda a, f: ServerTLS(*pair_of(a.issue("s")), f / "none.pem"),
        "none.pem cannot be read",
    ),
    "garbage as client authority": (
        lambda a, f: ServerTLS(*pair_of(a.issue("s")), garbage(f / "x.pem")),
        "x.pem holds no certificate",
    ),
    "an expired client authority": (
        lambda a, f: ServerTLS(*pair_of(a.issue("s")), Authority(f, "old", PAST).file),
        "old.pem expired on",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_server_does_not_start_with(case: str, ours: Authority, tmp_path: Path, layers: ServedAdapter) -> None:
    make, reason = BROKEN[case]
    with clear_error(ConfigurationError, match=reason):
        Server({ADAPTER: layers}, "127.0.0.1:0", tls=make(ours, tmp_path))


@pytest.mark.parametrize("case", ["p256", "p384"])
def test_kinds_of_keys_that_are_spoken(case: str, ours: Authority, layers: ServedAdapter) -> None:
    tls = ServerTLS(*pair_of(ours.issue("server", kind=case)))
    with Server({ADAPTER: layers}, "127.0.0.1:0", tls=tls) as server:
        serves(server.address, ClientTLS(ours.file))


def test_a_file_in_place_of_tls(layers: ServedAdapter) -> None:
    with clear_error(ConfigurationError, match=r"ServerTLS\('server\.crt', 'server\.key'\)"):
        Server({ADAPTER: layers}, "127.0.0.1:0", tls="server.crt")  # type: ignore[arg-type]


def test_half_a_client_certificate() -> None:
    with clear_error(ConfigurationError, match="give both, or neither"):
        ClientTLS(certificate="client.crt")


def test_no_key_in_the_text_of_any_object(ours: Authority) -> None:
    pair = ours.issue("client")
    for thing in (ServerTLS(pair.certificate, pair.key), ClientCredentials.read(shown(ours, pair))):
        assert "BEGIN" not in f"{thing!r}{thing}"


def test_a_certificate_is_renewed_under_a_running_server(
    layers: ServedAdapter, ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair = ours.issue("server", hosts=("other.example",))
    with Server({ADAPTER: layers}, "127.0.0.1:0", tls=ServerTLS(pair.certificate, pair.key)) as server:
        with clear_error(ConnectionFailedError, match="for another host"):
            open_session(server.address, ClientTLS(ours.file))
        pair.key.write_text("broken")
        server.renew_certificate()
        assert "holds no private key" in str(caplog.records[-1].fields["error"])  # type: ignore[attr-defined]
        with clear_error(ConnectionFailedError, match="for another host"):  # the old one stays
            open_session(server.address, ClientTLS(ours.file))
        ours.issue("server")
        server.renew_certificate()
        eventually(lambda: _works(server.address, ClientTLS(ours.file)), 5)


def _works(address: str, tls: ClientTLS) -> bool:
    try:
        serves(address, tls)
    except ConnectionFailedError:
        return False
    return True


# -- beyond this machine -----------------------------------------------------------------------------------------------


def test_beyond_this_machine_with_tls_or_in_so_many_words(
    layers: ServedAdapter, pair: Pair, ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with clear_error(ConfigurationError, match=r"without TLS; give --tls-cert and --tls-key, or --allow-plaintext-"):
        Server({ADAPTER: layers}, "0.0.0.0:0")
    assert not caplog.records
    for _ in range(2):
        with Server({ADAPTER: layers}, "0.0.0.0:0", allow_plaintext=True) as open_to_all:
            assert open_to_all.transport == "PLAINTEXT, also beyond this machine"
    assert [record.levelname for record in caplog.records if "without TLS" in record.getMessage()] == ["WARNING"] * 2
    caplog.clear()
    with Server({ADAPTER: layers}, "0.0.0.0:0", tls=ServerTLS(pair.certificate, pair.key)) as server:
        serves(server.address.replace("0.0.0.0", "127.0.0.1"), ClientTLS(ours.file))
        assert server.transport == "TLS"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_client_beyond_this_machine(
    ours: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(diagnosis, "PROBE_SECONDS", 0.3)
    with clear_error(ConfigurationError, match=r"without TLS; give --tls or --tls-ca FILE, or --allow-plaintext-"):
        connect(model, "192.0.2.1:7433", ADAPTER)
    assert not caplog.records
    with clear_error(ConnectionFailedError):
        connect(model, "192.0.2.1:7433", ADAPTER, allow_plaintext=True)
    assert "without TLS: whoever is on the way reads API keys" in caplog.text
    caplog.clear()
    with clear_error(ConnectionFailedError):
        connect(model, "192.0.2.1:7433", ADAPTER, tls=ClientTLS(ours.file))
    assert not caplog.records
