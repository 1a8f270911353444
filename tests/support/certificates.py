"""A certificate authority for servers and clients, with names and URIs of the test's choice."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its key, in PEM."""

    certificate: bytes
    private_key: bytes

    def write(self, certificate_file: Path, private_key_file: Path) -> None:
        certificate_file.write_bytes(self.certificate)
        private_key_file.write_bytes(self.private_key)


class Authority:
    """Signs certificates for servers and clients."""

    def __init__(self, name: str = "authority of the tests"):
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(self._name, self._key, timedelta(days=1))
        certificate = builder.add_extension(x509.BasicConstraints(True, None), True).sign(
            self._key, hashes.SHA256()
        )
        self.certificate = certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        *,
        dns: tuple[str, ...] = (),
        uris: tuple[str, ...] = (),
        ips: tuple[str, ...] = (),
        common_name: str = "anybody",
        lifetime: timedelta = timedelta(hours=1),
        key: CertificateIssuerPrivateKeyTypes | None = None,
    ) -> Issued:
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        names = [
            *(x509.DNSName(name) for name in dns),
            *(x509.UniformResourceIdentifier(uri) for uri in uris),
            *(x509.IPAddress(ip_address(ip)) for ip in ips),
        ]
        builder = self._builder(subject, key, lifetime)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Issued(certificate.public_bytes(Encoding.PEM), pem)

    def channel_credentials(self, client: Issued | None = None) -> grpc.ChannelCredentials:
        """Trusts this authority; shows the client's certificate."""
        if client is None:
            return grpc.ssl_channel_credentials(self.certificate)
        return grpc.ssl_channel_credentials(
            self.certificate, client.private_key, client.certificate
        )

    def _builder(
        self, subject: x509.Name, key: CertificateIssuerPrivateKeyTypes, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        # A minute earlier than now, as authorities do; a negative lifetime ends before it.
        begins = datetime.now(UTC) - timedelta(minutes=1) + min(lifetime, timedelta())
        return x509.CertificateBuilder(
            self._name,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            begins,
            datetime.now(UTC) + lifetime,
        )
