"""A local certificate authority, for receivers on a developer's machine or of a canary.

It is created once and kept, so that engines keep trusting its file. Name constraints (RFC 5280)
limit it to its own names, so that a stolen key cannot impersonate a merchant.
"""

import ssl
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cli.atomic_file import replace_file
from core.errors import ConfigurationError

#: In the data directory: the certificate of the authority that all receivers share.
AUTHORITY_FILE = "receiver-ca.pem"
#: Names of every authority.
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_LIFETIME = timedelta(days=365)
#: An authority that ends sooner is replaced.
_REMAINDER = timedelta(days=7)
#: For clocks that are slow.
_BACKDATED = timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """An authority whose certificate is in `ca_file`. `new` if it was created just now."""

    ca_file: Path
    certificate: x509.Certificate
    key: EllipticCurvePrivateKey
    new: bool

    def server_context(self, names: Sequence[str]) -> ssl.SSLContext:
        """Return a TLS context for a listener with these names or addresses."""
        key = generate_private_key(SECP256R1())
        certificate = (
            _builder("Postrider receiver", self.certificate.subject, key, self._end)
            .add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), False)
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False
            )
            .sign(self.key, hashes.SHA256())
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # load_cert_chain reads files only.
        with tempfile.NamedTemporaryFile() as file:
            file.write(certificate.public_bytes(Encoding.PEM) + _private_pem(key))
            file.flush()
            context.load_cert_chain(file.name)
        return context

    @property
    def _end(self) -> datetime:
        return self.certificate.not_valid_after_utc


def ensure_authority(ca_file: Path, names: Collection[str] = ()) -> Authority:
    """Return the authority of this file, for loopback and `names`, created if needed.

    Its key is in a file beside it with mode 0600. Raises ConfigurationError if the directory is not
    writable.
    """
    key_file = ca_file.with_name(f"{ca_file.stem}-key.pem")
    wanted = {*LOOPBACK, *names}
    try:
        ca_file.parent.mkdir(parents=True, exist_ok=True)
        kept = _read(ca_file, key_file)
        allowed = _names(kept.certificate) if kept else set[str]()
        if kept and wanted <= allowed and kept.certificate.not_valid_after_utc > _soon():
            return kept
        made = _make(ca_file, sorted(wanted | allowed))
        replace_file(key_file, _private_pem(made.key))
        replace_file(ca_file, made.certificate.public_bytes(Encoding.PEM), mode=0o644)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write a certificate authority to {ca_file} ({error.strerror}): "
            "name a file in a writable directory"
        ) from error
    return made


def _make(ca_file: Path, names: Sequence[str]) -> Authority:
    key = generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Postrider development")])
    certificate = (
        _builder("Postrider development", subject, key, datetime.now(UTC) + _LIFETIME)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(_KEY_CERT_SIGN, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.NameConstraints([_constraint(name) for name in names], None), True)
        .sign(key, hashes.SHA256())
    )
    return Authority(ca_file, certificate, key, new=True)


def _builder(
    name: str, issuer: x509.Name, key: EllipticCurvePrivateKey, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _BACKDATED)
        .not_valid_after(end)
    )


_KEY_CERT_SIGN = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _read(ca_file: Path, key_file: Path) -> Authority | None:
    """Return the stored authority, or None without a usable one."""
    try:
        certificate = x509.load_pem_x509_certificate(ca_file.read_bytes())
        key = load_pem_private_key(key_file.read_bytes(), password=None)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        return None
    return Authority(ca_file, certificate, key, new=False)


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return set()
    return {
        str(name.value).removesuffix("/32").removesuffix("/128")
        for name in constraints.permitted_subtrees or ()
    }


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _constraint(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_network(name))
    except ValueError:
        return x509.DNSName(name)


def _soon() -> datetime:
    return datetime.now(UTC) + _REMAINDER


def _private_pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
