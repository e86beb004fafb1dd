"""Addresses and names as people write them, and what may be reached without TLS."""

import ipaddress
import logging
import re
import socket

from splitveil.errors import ConfigurationError
from splitveil.wire import codec

log = logging.getLogger(__name__)

PLAINTEXT_FLAG = "--allow-plaintext-beyond-this-machine"


def check_adapter_name(name: str) -> None:
    """Raises ``ConfigurationError`` for a name that no adapter can have."""
    if not name or len(name) > codec.MAX_ADAPTER_NAME or not name.isprintable():
        raise ConfigurationError(
            f"adapter name {name[:32]!r} must be printable and 1 to {codec.MAX_ADAPTER_NAME} characters long"
        )


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 host is in brackets, and stays so. Raises ``ConfigurationError``."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed) or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigurationError(f"address {address!r} is not HOST:PORT, such as 127.0.0.1:7433 or [::1]:7433")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether every address that ``host`` resolves to is of this machine alone. Raises ``ConfigurationError``."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except (OSError, ValueError):  # ValueError: a name that no resolver would take
        raise ConfigurationError(f"host {host!r} is not known; try 127.0.0.1") from None
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def require_loopback(host: str, purpose: str, *, allow_plaintext: bool = False, instead: str = "TLS") -> None:
    """For a transport without TLS: raises ``ConfigurationError`` unless it stays on this machine, or was allowed.

    ``instead`` names the flags that give TLS. What was allowed in so many words is still warned of, every time.
    """
    if is_loopback(host):
        return
    if not allow_plaintext:
        raise ConfigurationError(
            f"refusing to {purpose} ({host}) without TLS; give {instead}, or {PLAINTEXT_FLAG} if something else "
            "protects the way"
        )
    log.warning(
        "%s (%s) without TLS: whoever is on the way reads API keys, and can answer in the server's stead",
        purpose,
        host,
        extra={"event": "plaintext_beyond_this_machine"},
    )
