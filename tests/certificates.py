"""Certificates for tests: authorities, and what they issue."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
HOSTS = ("localhost", "127.0.0.1", "::1")
PAST = (NOW - 3 * DAY, NOW - DAY)
FUTURE = (NOW + DAY, NOW + 3 * DAY)
PRESENT = (NOW - DAY, NOW + DAY)

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class Pair:
    """Files with a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority that writes everything into ``folder``; ``file`` is its certificate."""

    def __init__(self, folder: Path, name: str = "authority", when: tuple[datetime.datetime, ...] = PRESENT) -> None:
        self._folder = folder
        self._key: Key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.file = folder / f"{name}.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        made = self._begin(self._name, self._key, when).add_extension(constraints, critical=True)
        self.file.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = HOSTS,
        when: tuple[datetime.datetime, ...] = PRESENT,
        kind: str = "p256",
        passphrase: bytes | None = None,
    ) -> Pair:
        """A certificate for these hosts, valid from ``when[0]`` to ``when[1]``."""
        key: Key = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(CURVES[kind])
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        made = self._begin(_name(name), key, when).add_extension(names, critical=False)
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        hidden: KeySerializationEncryption = NoEncryption()
        if passphrase is not None:
            hidden = BestAvailableEncryption(passphrase)
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
        return pair

    def _begin(self, name: x509.Name, key: Key, when: tuple[datetime.datetime, ...]) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key.public_key())
        number = x509.random_serial_number()
        return builder.serial_number(number).not_valid_before(when[0]).not_valid_after(when[1])


CURVES: dict[str, ec.EllipticCurve] = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "k1": ec.SECP256K1()}


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
