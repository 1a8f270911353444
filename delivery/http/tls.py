"""Whom TLS trusts when receivers are called."""

import ssl
from pathlib import Path

from core.errors import ConfigurationError


def trusting_context(ca_file: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or newer, the system's authorities and those of `ca_file`; HTTP/1.1 alone.

    Raises ConfigurationError when the file cannot be used, or no authority could be trusted.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigurationError(
                f"WEBHOOK_CA_FILE: {ca_file} cannot be used ({error.strerror or error}); name a "
                "readable PEM file of CA certificates, or unset it"
            ) from error
    if not context.cert_store_stats()["x509_ca"] and not _has_certificate_directory():
        raise ConfigurationError(
            "no certificate authority is trusted, so that every delivery would fail: install the "
            "system's CA bundle (Debian: apt-get install ca-certificates) or set WEBHOOK_CA_FILE"
        )
    return context


def _has_certificate_directory() -> bool:
    """OpenSSL reads a hashed directory only when it verifies, so such CAs are not counted yet."""
    directory = ssl.get_default_verify_paths().capath
    return directory is not None and any(Path(directory).glob("????????.[0-9]"))
