"""The authority of local receivers: kept, private, and good for its names alone."""

import asyncio
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cli import authority as authority_module
from cli.authority import Authority, ensure_authority
from core.errors import ConfigurationError


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "receiver-ca.pem"


async def shake_hands(authority: Authority, named: str, dialled: str) -> None:
    """A TLS handshake with a listener that has a certificate for `named`."""

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    tls = authority.server_context([named])
    trusting = ssl.create_default_context(cafile=str(authority.ca_file))
    trusting.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    async with await asyncio.start_server(close, "127.0.0.1", 0, ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=trusting, server_hostname=dialled
        )
        writer.close()


async def test_who_trusts_the_file_trusts_the_names_and_no_others(ca_file: Path) -> None:
    authority = ensure_authority(ca_file, ["laptop.example", "192.168.7.7"])
    for name in ("localhost", "127.0.0.1", "::1", "laptop.example", "192.168.7.7"):
        await shake_hands(authority, name, name)

    for name in ("shop.example", "10.0.0.1"):
        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
            await shake_hands(authority, name, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        await shake_hands(authority, "localhost", "laptop.example")


def test_it_is_kept_and_made_anew_only_when_it_has_to_be(
    ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_authority(ca_file)
    assert first.new
    before = ca_file.read_bytes()
    assert not ensure_authority(ca_file, ["localhost"]).new
    assert ca_file.read_bytes() == before

    assert ensure_authority(ca_file, ["laptop.example"]).new
    assert not ensure_authority(ca_file, ["127.0.0.1"]).new
    assert not ensure_authority(ca_file, ["laptop.example"]).new

    late = datetime.now(UTC) + timedelta(days=360)
    monkeypatch.setattr(authority_module, "_soon", lambda: late)
    assert ensure_authority(ca_file).new is False
    monkeypatch.setattr(authority_module, "_soon", lambda: late + timedelta(days=6))
    assert ensure_authority(ca_file).new


@pytest.mark.parametrize("file", ["receiver-ca.pem", "receiver-ca-key.pem"])
def test_a_broken_or_lost_file_is_mended(ca_file: Path, file: str) -> None:
    ensure_authority(ca_file)
    ca_file.with_name(file).write_text("nonsense")
    assert ensure_authority(ca_file).new
    ca_file.with_name(file).unlink()
    assert ensure_authority(ca_file).new


def test_the_key_is_for_us_alone(ca_file: Path) -> None:
    ensure_authority(ca_file)

    assert ca_file.with_name("receiver-ca-key.pem").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in ca_file.read_text()
    assert len(os.listdir(ca_file.parent)) == 2


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match="name a file in a writable directory"):
        ensure_authority(tmp_path / "file" / "ca.pem")
