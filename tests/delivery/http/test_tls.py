"""Unusable CA settings fail at the start, not at the first delivery."""

from pathlib import Path

import pytest

from core.errors import ConfigurationError
from delivery.http.tls import client_tls_context


def test_a_ca_file_that_is_missing_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"WEBHOOK_CA_FILE: .*No such file"):
        client_tls_context(tmp_path / "missing.pem")


def test_a_ca_file_without_certificates_is_named_at_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    with pytest.raises(ConfigurationError, match="WEBHOOK_CA_FILE"):
        client_tls_context(tmp_path / "ca.pem")


def test_a_process_that_trusts_no_ca_does_not_start(
    tmp_path: Path, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.pem").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "empty.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no certificate authority"):
        client_tls_context(None)
    client_tls_context(ca_file)
    # A hashed directory is read during the handshake only, and counts all the same.
    (tmp_path / "0a1b2c3d.0").touch()
    client_tls_context(None)
