"""The TLS context for requests to receivers."""

import ssl
from pathlib import Path

from core.errors import ConfigurationError


def client_tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer and HTTP/1.1, with the system's CAs and `ca_file`.

    Raises ConfigurationError for an unusable file, or if no CA is trusted.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigurationError(
                f"WEBHOOK_CA_FILE: {ca_file} cannot be used ({error.strerror or error}): name a "
                "readable PEM file of CA certificates, or unset it"
            ) from error
    if not context.cert_store_stats()["x509_ca"] and not _has_certificate_directory():
        raise ConfigurationError(
            "no certificate authority is trusted, so every delivery would fail: install the "
            "system's CA bundle (Debian: apt-get install ca-certificates) or set WEBHOOK_CA_FILE"
        )
    return context


def _has_certificate_directory() -> bool:
    """Return whether there are hashed CA files, which OpenSSL loads at verification only."""
    directory = ssl.get_default_verify_paths().capath
    return directory is not None and any(Path(directory).glob("????????.[0-9]"))
