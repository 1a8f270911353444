"""TLS on the listener: accepted versions, usable files and rotation of certificates."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace as with_parts
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from grpc import StatusCode
from pydantic import ValidationError

from core.errors import ConfigurationError
from postrider.v1 import webhook_config_service_pb2 as pb
from postrider.v1 import webhook_config_service_pb2_grpc
from server.rpc.tls import CertificateFiles
from server.settings import TlsSettings
from tests.support.certificates import Authority, Issued
from tests.support.platform import Platform

AUTHORITY = Authority()
type Files = tuple[Path, Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return tmp_path / "server.pem", tmp_path / "server.key"


def replace(files: Files, issued: Issued) -> None:
    """Replace each file atomically, as a certificate rotation does."""
    contents = (issued.certificate, issued.private_key)
    for path, content in zip(files, contents, strict=True):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        os.replace(fresh, path)


@pytest.fixture
def first(files: Files) -> Issued:
    """The certificate at the start of the server."""
    issued = AUTHORITY.issue(ips=("127.0.0.1",))
    replace(files, issued)
    return issued


@pytest.fixture
async def platform(
    start_platform: Callable[..., Any], files: Files, first: Issued
) -> AsyncIterator[Platform]:
    async with start_platform(
        tls=TlsSettings(tls_certificate_file=files[0], tls_private_key_file=files[1]),
        channel_credentials=AUTHORITY.channel_credentials(),
    ) as platform:
        yield platform


async def presented(address: str) -> bytes:
    """The certificate that the server presents on a new connection, in PEM."""
    _, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", int(port), ssl=context)
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
    return ssl.DER_cert_to_PEM_cert(der).encode()


async def presents(platform: Platform, issued: Issued) -> bool:
    pem = await presented(platform.address)
    certificates = [x509.load_pem_x509_certificate(text) for text in (pem, issued.certificate)]
    return len({certificate.serial_number for certificate in certificates}) == 1


async def test_plain_text_connection_is_refused(platform: Platform) -> None:
    assert (await platform.as_merchant().ListEventTypes()).event_types
    async with grpc.aio.insecure_channel(platform.address) as channel:
        stub = webhook_config_service_pb2_grpc.WebhookConfigServiceStub(channel)
        call = stub.ListEventTypes(pb.ListEventTypesRequest(), timeout=10)
        assert await call.code() is StatusCode.UNAVAILABLE


async def connected_version(platform: Platform, version: ssl.TLSVersion) -> str:
    """Connect with one version of TLS."""
    context = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())
    # The client allows insecure versions, so that the server has to refuse them.
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, _, port = platform.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=host)
    writer.close()
    return str(writer.get_extra_info("ssl_object").version())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1")
async def test_tls_before_1_2_is_refused(platform: Platform) -> None:
    assert await connected_version(platform, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert await connected_version(platform, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        with pytest.raises((ssl.SSLError, ConnectionError)) as refused:
            await connected_version(platform, version)
        assert "NO_PROTOCOLS_AVAILABLE" not in str(refused.value)


async def test_rotated_certificate_is_used_by_new_connections(
    platform: Platform, files: Files, first: Issued, logged: list[Any]
) -> None:
    """Live connections are not closed."""
    await platform.as_merchant().ListEventTypes()
    assert await presents(platform, first)
    stream = platform.events.StreamEvents(metadata=platform.producer())
    await stream.wait_for_connection()

    for _ in range(3):
        issued = AUTHORITY.issue(ips=("127.0.0.1",))
        replace(files, issued)
        assert await presents(platform, issued)
        await platform.as_merchant().ListEventTypes()

    assert not stream.done()
    await stream.done_writing()
    assert await stream.code() is StatusCode.OK
    assert len([entry for entry in logged if entry["event"] == "tls_files_loaded"]) == 3


async def test_broken_file_keeps_the_old_certificate(
    platform: Platform, files: Files, first: Issued, logged: list[Any]
) -> None:
    certificate, key = files
    other = AUTHORITY.issue(ips=("127.0.0.1",))
    for broken, error in (
        (other.certificate, "is not the key of"),
        (b"nonsense", "must hold certificates in PEM"),
        (b"", "must hold certificates in PEM"),
        (None, "cannot be read"),
    ):
        logged.clear()
        certificate.unlink(missing_ok=True)
        if broken is not None:
            certificate.write_bytes(broken)
        for _ in range(3):
            assert await presents(platform, first)
        [entry] = [entry for entry in logged if entry["event"] == "tls_files_unusable"]
        assert error in entry["error"]
        assert entry["log_level"] == "error"
        assert "BEGIN" not in repr(entry)
    other.write(certificate, key)
    assert await presents(platform, other)


def locked_key() -> bytes:
    lock = BestAvailableEncryption(b"hunter2")
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)


GOOD = AUTHORITY.issue()
UNUSABLE = {
    "expired": (AUTHORITY.issue(lifetime=timedelta(hours=-1)), "put one there that is valid"),
    "another key": (with_parts(GOOD, private_key=AUTHORITY.issue().private_key), "not the key of"),
    "locked key": (with_parts(GOOD, private_key=locked_key()), "without a password"),
    "no key": (with_parts(GOOD, private_key=GOOD.certificate), "hold a private key"),
    "no certificate": (with_parts(GOOD, certificate=GOOD.private_key), "certificates in PEM"),
    "Ed25519": (AUTHORITY.issue(key=Ed25519PrivateKey.generate()), "must be for RSA or EC"),
}


@pytest.mark.parametrize(("issued", "error"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_file_fails_the_start(files: Files, issued: Issued, error: str) -> None:
    issued.write(*files)
    with pytest.raises(ConfigurationError, match=error) as refused:
        CertificateFiles(*files, None)
    assert refused.value.message.startswith("WEBHOOK_TLS_")
    assert "BEGIN" not in refused.value.message


def test_unusable_client_ca_fails_the_start(files: Files, tmp_path: Path) -> None:
    AUTHORITY.issue().write(*files)
    (tmp_path / "ca.pem").write_bytes(b"nonsense")
    with pytest.raises(ConfigurationError, match="WEBHOOK_TLS_CLIENT_CA_FILE"):
        CertificateFiles(*files, tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("tls_certificate_file", "x.pem", "set both"),
        ("tls_private_key_file", "x.pem", "set both"),
        ("tls_client_ca_file", "x.pem", "needs WEBHOOK_TLS_CERTIFICATE_FILE"),
        ("mtls_listen_address", "[::]:1", "needs WEBHOOK_TLS_CLIENT_CA_FILE"),
        ("certificate_scopes", "a=events:publish", "needs WEBHOOK_TLS_CLIENT_CA_FILE"),
    ],
)
def test_setting_needs_its_companions(setting: str, value: str, error: str) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(ValidationError, match=error):
        TlsSettings(**settings)
