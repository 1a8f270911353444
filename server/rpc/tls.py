"""TLS of the main listener. Changed certificate files apply to new connections.

gRPC asks for the files at each new connection, from a separate thread. It supports only TLS 1.2 and
1.3. gRPC for Python can require a client certificate or not ask for one, and has no mode between,
so there is a second address for clients with certificates.
"""

import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from core.errors import ConfigurationError
from core.file_secrets import file_version, is_world_readable
from server.settings import TlsSettings

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The contents of the files, and the version of the files that were read."""

    file_version: tuple[object, ...]
    configuration: grpc.ServerCertificateConfiguration
    expires_at: datetime


class CertificateFiles:
    """A certificate with its key, and the client CAs if client certificates are required."""

    def __init__(self, certificate: Path, private_key: Path, client_ca: Path | None):
        self._certificate = certificate
        self._private_key = private_key
        self._client_ca = client_ca
        self._loading = threading.Lock()
        self._loaded = self._load(self._file_versions())
        self._seen = self._loaded.file_version

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one address. They follow changes of the files."""
        return grpc.dynamic_ssl_server_credentials(
            self._loaded.configuration,
            self.changed,  # type: ignore[arg-type] # None is as documented, not as typed.
            require_client_authentication=self._client_ca is not None,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration, or None. An error is logged once per change."""
        with self._loading:
            try:
                found = self._file_versions()
                if found == self._seen:
                    return None
                # Set before the files are read, so that a concurrent change is noticed next time.
                self._seen = found
                self._loaded = self._load(found)
            except ConfigurationError as error:
                log.error("tls_files_unusable", error=error.message, kept=self._expiry())
                return None
            log.info("tls_files_loaded", certificate=str(self._certificate), until=self._expiry())
            return self._loaded.configuration

    def _expiry(self) -> str:
        return self._loaded.expires_at.isoformat()

    def _file_versions(self) -> tuple[object, ...]:
        paths = (self._certificate, self._private_key, self._client_ca)
        return tuple(file_version(path) for path in paths if path is not None)

    def _load(self, seen: tuple[object, ...]) -> _Loaded:
        chain = _read("TLS_CERTIFICATE_FILE", self._certificate)
        key = _read("TLS_PRIVATE_KEY_FILE", self._private_key)
        authorities = None
        if self._client_ca is not None:
            authorities = _read("TLS_CLIENT_CA_FILE", self._client_ca)
            _certificates("TLS_CLIENT_CA_FILE", self._client_ca, authorities)
        leaf = _certificates("TLS_CERTIFICATE_FILE", self._certificate, chain)[0]
        self._check_pair(leaf, key)
        if not leaf.not_valid_before_utc <= datetime.now(UTC) < leaf.not_valid_after_utc:
            raise _unusable(
                "TLS_CERTIFICATE_FILE",
                self._certificate,
                f"holds a certificate for {leaf.not_valid_before_utc:%Y-%m-%d} to "
                f"{leaf.not_valid_after_utc:%Y-%m-%d}; put one there that is valid now",
            )
        configuration = grpc.ssl_server_certificate_configuration([(key, chain)], authorities)
        return _Loaded(seen, configuration, leaf.not_valid_after_utc)

    def _check_pair(self, leaf: x509.Certificate, key: bytes) -> None:
        public_key = leaf.public_key()
        if not isinstance(public_key, RSAPublicKey | EllipticCurvePublicKey):
            raise _unusable("TLS_CERTIFICATE_FILE", self._certificate, "must be for RSA or EC")
        try:
            private_key = load_pem_private_key(key, password=None)
        # It raises TypeError if a password is needed, and other errors for malformed keys.
        except Exception as error:
            raise _unusable(
                "TLS_PRIVATE_KEY_FILE",
                self._private_key,
                "must hold a private key in PEM without a password",
            ) from error
        if private_key.public_key() != public_key:
            raise _unusable(
                "TLS_PRIVATE_KEY_FILE",
                self._private_key,
                f"is not the key of {self._certificate}; its own certificate must come first there",
            )
        if is_world_readable(self._private_key):
            # Logs the name of the file only.
            log.warning(  # nosemgrep: secret-in-log
                "secret_file_readable_by_all",
                setting=f"WEBHOOK_TLS_PRIVATE_KEY_FILE: {self._private_key}",
            )


def listeners(
    address: str, settings: TlsSettings | None
) -> list[tuple[str, grpc.ServerCredentials | None]]:
    """Return the addresses to listen on with their credentials. None means plain text."""
    if settings is None:
        return [(address, None)]
    certificate, private_key = settings.tls_certificate_file, settings.tls_private_key_file
    if certificate is None or private_key is None:
        return [(address, None)]
    client_ca, mtls_address = settings.tls_client_ca_file, settings.mtls_listen_address
    if mtls_address is None:
        return [(address, CertificateFiles(certificate, private_key, client_ca).credentials())]
    return [
        (address, CertificateFiles(certificate, private_key, None).credentials()),
        (mtls_address, CertificateFiles(certificate, private_key, client_ca).credentials()),
    ]


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(name, path, f"cannot be read ({error.strerror})") from error


def _certificates(name: str, path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise _unusable(name, path, "must hold certificates in PEM") from error


def _unusable(name: str, path: Path, problem: str) -> ConfigurationError:
    return ConfigurationError(f"WEBHOOK_{name}: {path} {problem}")
