"""Where a server may listen and a client may connect: without TLS, on this machine only."""

import socket

import numpy as np
import pytest

from splitveil.errors import ConfigurationError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.private.core import LayerSpec
from splitveil.private.layer import publish
from splitveil.private.published import digest
from splitveil.serving import address as address_module
from splitveil.serving.address import require_loopback, split_address
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.server import Server
from splitveil.serving.session import Session

IPV6 = "::1"


@pytest.fixture(scope="module")
def adapters() -> dict[str, ServedAdapter]:

    spec = LayerSpec(np.ones((1, 16), np.float32), np.ones((16, 1), np.float32), 1.0, (("m", 16),))
    half, public = publish([spec], parameters=INSECURE_TEST, allow_insecure=True)
    data = public.to_bytes()
    return {"a": ServedAdapter(half, public, data, digest(data), 1024)}


def has_ipv6() -> bool:
    try:
        socket.create_server((IPV6, 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "needs_ipv6"), [("127.0.0.1", False), ("127.0.0.2", False), ("localhost", False), ("[::1]", True)]
)
def test_loopback_addresses_are_served_and_reached(
    host: str, needs_ipv6: bool, adapters: dict[str, ServedAdapter]
) -> None:
    if needs_ipv6 and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with Server(adapters, f"{host}:0") as server:
        assert server.address.startswith(f"{host}:")
        assert not server.address.endswith(":0")
        Session(server.address, "a", allow_insecure=True).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "0", "10.1.2.3", "192.0.2.1", "[2001:db8::1]", "[fe80::1]"])
def test_other_addresses_are_refused(host: str, adapters: dict[str, ServedAdapter]) -> None:
    with pytest.raises(ConfigurationError, match="refusing to listen beyond loopback"):
        Server(adapters, f"{host}:0")


def test_names_count_by_what_they_resolve_to(
    monkeypatch: pytest.MonkeyPatch, adapters: dict[str, ServedAdapter]
) -> None:
    """All their addresses: a name of this machine and of its network is not loopback."""

    def resolving(*addresses: str) -> object:
        return lambda host, port: [(socket.AF_INET, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(address_module.socket, "getaddrinfo", resolving("127.0.0.1", "::1"))
    require_loopback("here.example", "connect")
    monkeypatch.setattr(address_module.socket, "getaddrinfo", resolving("127.0.0.1", "192.0.2.1"))
    with pytest.raises(ConfigurationError, match=r"refusing to connect \(there.example\) without TLS"):
        require_loopback("there.example", "connect")

    def unknown(*_: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(address_module.socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigurationError, match=r"host 'nowhere\.example' is not known"):
        Server(adapters, "nowhere.example:0")


@pytest.mark.parametrize("host", ["a" * 70, "a..b", "nul\x00byte", "127.0.0.1 ", "*", "[", "[]", "unix", "\ud800"])
def test_hosts_that_no_resolver_takes(host: str) -> None:
    with pytest.raises(ConfigurationError):
        require_loopback(host, "connect")


MALFORMED = [
    "",
    ":",
    "127.0.0.1",
    "127.0.0.1:",
    ":7433",
    "127.0.0.1:port",
    "127.0.0.1:-1",
    "127.0.0.1:+1",
    "127.0.0.1: 80",
    "127.0.0.1:80 ",
    "127.0.0.1:80\n",
    "127.0.0.1:65536",
    "127.0.0.1:" + "9" * 5000,
    "127.0.0.1:²",
    "127.0.0.1:٣٣",
    "127.0.0.1:1_0",
    "http://127.0.0.1:80/",
    "unix:/tmp/socket",
    "dns:127.0.0.1:80",
    "::1:7433",
    ":::7433",
    "::1",
    "[::1]",
    "[::1]7433",
    "[::1:7433",
]


@pytest.mark.parametrize("address", MALFORMED)
def test_malformed_addresses(address: str, adapters: dict[str, ServedAdapter]) -> None:
    with pytest.raises(ConfigurationError, match=r"is not HOST:PORT, such as 127.0.0.1:7433 or \[::1\]:7433"):
        split_address(address)
    with pytest.raises(ConfigurationError):
        Server(adapters, address)


def test_well_formed_addresses() -> None:
    assert split_address("127.0.0.1:7433") == ("127.0.0.1", 7433)
    assert split_address("localhost:0") == ("localhost", 0)
    assert split_address("[::1]:65535") == ("[::1]", 65535)


def test_a_port_that_is_taken(adapters: dict[str, ServedAdapter]) -> None:
    with Server(adapters, "127.0.0.1:0") as first:
        with pytest.raises(ConfigurationError, match=f"cannot listen on {first.address}: is the port taken"):
            Server(adapters, first.address)
        Session(first.address, "a", allow_insecure=True).close()
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match="is the port taken"):
            Server(adapters, address)


def test_a_server_without_adapters() -> None:
    with pytest.raises(ConfigurationError, match="at least one adapter"):
        Server({}, "127.0.0.1:0")
