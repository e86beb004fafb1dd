"""Certificates and keys from PEM files, checked before TLS uses them: TLS itself says little about what is wrong."""

import datetime
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from splitveil.errors import ConfigurationError

_MOST_BYTES = 4 << 20  # of a file; all authorities of an operating system are a few hundred kilobytes
_CURVES = ("secp256r1", "secp384r1")


def read_pair(certificate: Path, key: Path) -> tuple[bytes, bytes, x509.Certificate]:
    """(certificate chain, private key, the first certificate), the first two as PEM.

    Raises ``ConfigurationError`` for files that cannot be read or parsed, a key that is not the certificate's, kinds of
    key that the TLS library does not speak, and a certificate outside its time.
    """
    chain, secret = _read(certificate, "certificate"), _read(key, "private key")
    leaf = _parse(chain, certificate)[0]
    try:
        private = load_pem_private_key(secret, None)
    except TypeError:
        raise ConfigurationError(
            f"the private key {key} has a passphrase, which nobody is asked for here: remove it"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(f"{key} holds no private key in PEM form (-----BEGIN PRIVATE KEY-----)") from None
    public = leaf.public_key()
    if _spki(private.public_key()) != _spki(public):
        raise ConfigurationError(f"the private key {key} does not belong to the certificate {certificate}")
    usable = isinstance(public, rsa.RSAPublicKey) or (
        isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in _CURVES
    )
    if not usable:
        raise ConfigurationError(
            f"{certificate}: its kind of key is not spoken here; use RSA, or ECDSA on P-256 or P-384"
        )
    _check_time(leaf, certificate)
    return chain, secret, leaf


def read_authorities(file: Path) -> bytes:
    """The certificates of authorities, as PEM. Raises ``ConfigurationError``, also if none of them is valid now."""
    data = _read(file, "certificate")
    found = _parse(data, file)
    if all(expiry(one) <= now() for one in found):
        _check_time(found[0], file)
    return data


def system_authorities() -> bytes:
    """The authorities that this machine trusts, as PEM. Raises ``ConfigurationError`` if it has none."""
    # gRPC would take a list of its own, which the machine's administrator cannot change.
    paths = ssl.get_default_verify_paths()
    context = ssl.create_default_context()
    found = [ssl.DER_cert_to_PEM_cert(one) for one in context.get_ca_certs(binary_form=True)]
    if not found and paths.capath:
        found = [
            _read(file, "certificate").decode("ascii", "ignore") for file in sorted(Path(paths.capath).glob("*.0"))
        ]
    if not found:
        raise ConfigurationError("this machine has no list of certificate authorities; name the server's with --tls-ca")
    return "\n".join(found).encode()


def expiry(certificate: x509.Certificate) -> datetime.datetime:
    """When a certificate ends, in UTC."""
    return certificate.not_valid_after_utc


def now() -> datetime.datetime:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC)


def _read(file: Path, what: str) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"the {what} {file} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise ConfigurationError(f"the {what} {file} has more than {_MOST_BYTES:,} bytes; is it the right file?")
    return data


def _parse(data: bytes, file: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(f"{file} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)") from None


def _check_time(certificate: x509.Certificate, file: Path) -> None:
    if expiry(certificate) <= now():
        raise ConfigurationError(
            f"the certificate {file} expired on {expiry(certificate):%Y-%m-%d %H:%M} UTC; renew it"
        )
    begins = certificate.not_valid_before_utc
    if begins > now():
        raise ConfigurationError(f"the certificate {file} is not valid before {begins:%Y-%m-%d %H:%M} UTC")


def _spki(key: object) -> bytes:
    # ``key`` is any of a dozen public key classes, which have this method in common but no base that says so.
    data: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return data
