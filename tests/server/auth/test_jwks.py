import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt.algorithms
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from cli.metrics.server import ServerCollector
from core.errors import ConfigurationError, Unavailable
from server.auth import jwks as keys_module
from server.auth.jwks import (
    MAX_PEM_KEYS,
    JwksKeys,
    PemKeys,
    VerificationKey,
)
from server.metrics import ServerMetrics

# Said here again, since they are promises: to the issuer, and about its outages.
FETCH_INTERVAL_SECONDS = 30
REFRESH_AFTER_SECONDS = 300
STALE_AFTER_SECONDS = 24 * 3600

URL = "https://id.example.com/jwks"
ED = Ed25519PrivateKey.generate()
EC = ec.generate_private_key(ec.SECP256R1())
EC_384 = ec.generate_private_key(ec.SECP384R1())
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
DSA = dsa.generate_private_key(key_size=2048)
WEAK_RSA = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 — to be refused


def public_pem(key: Any, form: PublicFormat = PublicFormat.SubjectPublicKeyInfo) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, form))


def private_pem(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def certificate_pem() -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer")])
    now = datetime(2030, 1, 1, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder(name, name, RSA.public_key(), 1, now, now + timedelta(days=1))
    ).sign(RSA, hashes.SHA256())
    return certificate.public_bytes(Encoding.PEM)


def make_jwk(key: Any = ED, kid: str | None = "ed", **members: Any) -> dict[str, Any]:
    match key:
        case rsa.RSAPrivateKey():
            jwk = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case ec.EllipticCurvePrivateKey():
            jwk = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case _:
            jwk = jwt.algorithms.OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    jwk.pop("key_ops", None)
    return jwk | ({} if kid is None else {"kid": kid}) | members


def make_jwks(*jwks: Any) -> bytes:
    return json.dumps({"keys": jwks}).encode()


class FakeIssuer:
    """Answers with `document`, or raises it, and counts; a closed gate holds answers back."""

    def __init__(self, document: bytes | Exception):
        self.document = document
        self.fetches = 0
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, url: str) -> bytes:
        assert url == URL
        self.fetches += 1
        self.begun.set()
        await self.gate.wait()
        if isinstance(self.document, Exception):
            raise self.document
        return self.document


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def issuer() -> FakeIssuer:
    return FakeIssuer(make_jwks(make_jwk()))


@pytest.fixture
def jwks(issuer: FakeIssuer, clock: FakeClock) -> JwksKeys:
    return JwksKeys(URL, issuer, clock)


async def land(jwks: JwksKeys) -> None:
    """Wait for the fetch under way."""
    assert jwks._fetching is not None
    await jwks._fetching


# --- PEM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "algorithm"),
    [
        (public_pem(RSA), "RS256"),
        (public_pem(RSA, PublicFormat.PKCS1), "RS256"),
        (public_pem(EC), "ES256"),
        (public_pem(ED), "EdDSA"),
        (b"the issuer's key, 2030\n" + public_pem(ED).replace(b"\n", b"\r\n"), "EdDSA"),
    ],
    ids=["RSA", "RSA PKCS1", "EC", "Ed25519", "with comment and CRLF"],
)
async def test_pem_key_decides_its_algorithm_and_serves_any_kid(
    tmp_path: Path, content: bytes, algorithm: str
) -> None:
    (tmp_path / "key.pem").write_bytes(content)
    keys = PemKeys(tmp_path / "key.pem")
    (key,) = await keys.keys_for(None)
    assert key.algorithm == algorithm
    assert await keys.keys_for("any") == (key,)


async def test_concatenated_pem_keys_are_candidates_each_with_its_own_algorithm(
    tmp_path: Path,
) -> None:
    (tmp_path / "key.pem").write_bytes(public_pem(RSA) + public_pem(ED) + public_pem(EC))
    keys = await PemKeys(tmp_path / "key.pem").keys_for("any")
    assert [key.algorithm for key in keys] == ["RS256", "EdDSA", "ES256"]


@pytest.mark.parametrize(
    ("content", "mend"),
    [
        (b"", "is empty"),
        (b"ssh-ed25519 AAAA somebody@example", "must hold 1 to 8"),
        (public_pem(ED) * (MAX_PEM_KEYS + 1), "must hold 1 to 8"),
        (private_pem(RSA), "openssl pkey -pubout"),
        (public_pem(ED) + private_pem(ED), "openssl pkey -pubout"),
        (certificate_pem(), "openssl x509 -pubkey"),
        (public_pem(WEAK_RSA), "2048 bits"),
        (public_pem(EC_384), "P-256"),
        (public_pem(ed448.Ed448PrivateKey.generate()), "Ed25519"),
        (public_pem(DSA), "Ed25519"),
        (public_pem(ED).replace(b"MCow", b"AAAA"), "unusable"),
        (public_pem(ED) + public_pem(WEAK_RSA), "2048 bits"),
    ],
    ids=[
        "empty",
        "SSH",
        "too many",
        "private",
        "public and private",
        "certificate",
        "weak RSA",
        "P-384",
        "Ed448",
        "DSA",
        "damaged",
        "one good and one weak",
    ],
)
def test_unusable_pem_file_says_in_one_line_what_to_do(
    tmp_path: Path, content: bytes, mend: str
) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=mend) as caught:
        PemKeys(path)
    assert caught.value.message.startswith(f"WEBHOOK_JWT_PUBLIC_KEY_FILE: {path} ")
    assert "\n" not in caught.value.message


async def test_a_changed_pem_file_counts_at_the_next_token_and_a_bad_one_never(
    tmp_path: Path, logged: list[Any]
) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(public_pem(RSA))
    keys = PemKeys(path)
    path.write_bytes(public_pem(EC) + public_pem(RSA))
    both = await keys.keys_for(None)
    assert [key.algorithm for key in both] == ["ES256", "RS256"]
    path.write_bytes(private_pem(RSA))
    assert await keys.keys_for(None) == both
    assert await keys.keys_for(None) == both
    assert [entry["event"] for entry in logged] == ["secret_file_loaded", "secret_file_unusable"]


def test_absent_pem_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.pem cannot be read"):
        PemKeys(tmp_path / "absent.pem")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        PemKeys(tmp_path)


# --- JWKS: which keys --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "HTTPS://id.example.com",
        "http://localhost:8080/jwks",
        "http://127.0.0.2/jwks",
        "http://[::1]:8080/jwks",
    ],
)
def test_key_set_url_is_https_or_loopback(url: str) -> None:
    JwksKeys(url, FakeIssuer(b""))


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example.com/jwks",
        "http://10.0.0.1/jwks",
        "http://localhost.example.com/jwks",
        "http://127.0.0.1@evil.example/jwks",
        "http://127.0.0.1.evil.example/jwks",
        "file:///etc/passwd",
        "ftp://127.0.0.1/jwks",
        "https:///jwks",
        "https://[::1/jwks",
        "id.example.com",
        "",
    ],
)
def test_other_key_set_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="WEBHOOK_JWT_JWKS_URL"):
        JwksKeys(url, FakeIssuer(b""))


async def test_keys_are_found_by_their_kid(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    issuer.document = make_jwks(make_jwk(ED, "ed"), make_jwk(RSA, "rsa"), make_jwk(EC, "ec"))
    for kid, key in (("ed", ED), ("rsa", RSA), ("ec", EC)):
        assert await jwks.keys_for(kid) == (VerificationKey.of(key.public_key()),)
    assert await jwks.keys_for(None) == ()
    assert issuer.fetches == 1


@pytest.mark.parametrize("kid", ["ed", None])
async def test_only_key_of_a_set_serves_a_token_without_kid(
    issuer: FakeIssuer, jwks: JwksKeys, kid: str | None
) -> None:
    issuer.document = make_jwks(make_jwk(ED, kid), make_jwk(RSA, "encryption", use="enc"))
    assert await jwks.keys_for(None) == (VerificationKey.of(ED.public_key()),)
    assert await jwks.keys_for("other") == ()


UNUSABLE_JWKS = {
    "oct": {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LTEyMzQ"},
    "unknown kty": {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"},
    "no kty": {},
    "kty a list": {"kty": ["RSA"]},
    "weak RSA": make_jwk(WEAK_RSA),
    "P-384": make_jwk(EC_384),
    "Ed448": make_jwk(ed448.Ed448PrivateKey.generate()),
    "for encryption": make_jwk(RSA, use="enc"),
    "for another operation": make_jwk(RSA, key_ops=["encrypt"]),
    "key_ops a number": make_jwk(RSA, key_ops=1),
    "of another RSA algorithm": make_jwk(RSA, alg="PS256"),
    "claiming HMAC": make_jwk(RSA, alg="HS256"),
    "private": jwt.algorithms.OKPAlgorithm.to_jwk(ED, as_dict=True),
    "damaged": make_jwk(RSA, n="!"),
    "off the curve": make_jwk(EC, x="AAAA" * 10 + "AAA"),
    "a string": "key",
    "null": None,
}


@pytest.mark.parametrize("unusable", UNUSABLE_JWKS.values(), ids=UNUSABLE_JWKS.keys())
async def test_unusable_key_is_skipped_and_the_others_stay(
    issuer: FakeIssuer, jwks: JwksKeys, unusable: Any
) -> None:
    odd = unusable | {"kid": "odd"} if isinstance(unusable, dict) else unusable
    issuer.document = make_jwks(odd, make_jwk(ED, "ed"))
    assert await jwks.keys_for("odd") == ()
    assert await jwks.keys_for("ed") == (VerificationKey.of(ED.public_key()),)


async def test_first_of_two_keys_with_one_kid_counts(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    issuer.document = make_jwks(make_jwk(ED, "same"), make_jwk(RSA, "same"))
    assert await jwks.keys_for("same") == (VerificationKey.of(ED.public_key()),)


# --- JWKS: when it is fetched --------------------------------------------------------------------


async def test_nothing_is_fetched_before_a_token_comes(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    assert issuer.fetches == 0
    await jwks.keys_for("ed")
    await jwks.keys_for("ed")
    assert issuer.fetches == 1


async def test_callers_of_one_moment_share_one_fetch(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    found = await asyncio.gather(*(jwks.keys_for("ed") for _ in range(100)))
    assert all(len(keys) == 1 for keys in found)
    assert issuer.fetches == 1


async def test_caller_that_gives_up_leaves_the_fetch_to_the_others(
    issuer: FakeIssuer, jwks: JwksKeys
) -> None:
    issuer.gate.clear()
    impatient = asyncio.create_task(jwks.keys_for("ed"))
    patient = asyncio.create_task(jwks.keys_for("ed"))
    await issuer.begun.wait()
    impatient.cancel()
    issuer.gate.set()
    assert len(await patient) == 1
    assert impatient.cancelled()
    assert issuer.fetches == 1


async def test_flood_of_unknown_kids_fetches_once_in_30_seconds(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock
) -> None:
    started = clock.now
    for number in range(1000):
        clock.now = started + number * 0.1
        assert await jwks.keys_for(f"unknown-{number}") == ()
    assert issuer.fetches == 4  # at 0, 30, 60 and 90 seconds


async def test_flood_of_unknown_kids_holds_few_calls_up_while_the_issuer_is_slow(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock
) -> None:
    await jwks.keys_for("ed")
    clock.now += FETCH_INTERVAL_SECONDS
    issuer.gate.clear()
    flood = [asyncio.create_task(jwks.keys_for(f"unknown-{number}")) for number in range(1000)]
    done, waiting = await asyncio.wait(flood, timeout=0)
    while len(waiting) > keys_module.WAITING_MAX:
        done, waiting = await asyncio.wait(flood, timeout=0)
    assert len(waiting) == keys_module.WAITING_MAX
    assert {task.result() for task in done} == {()}
    assert len(await jwks.keys_for("ed")) == 1
    issuer.gate.set()
    assert set(await asyncio.gather(*flood)) == {()}
    assert issuer.fetches == 2
    # They have left their places to the next.
    clock.now += FETCH_INTERVAL_SECONDS
    issuer.document = make_jwks(make_jwk(EC, "new"))
    assert len(await jwks.keys_for("new")) == 1


async def test_new_key_of_the_issuer_is_found_on_its_first_token(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock
) -> None:
    await jwks.keys_for("ed")
    issuer.document = make_jwks(make_jwk(EC, "new"))
    clock.now += FETCH_INTERVAL_SECONDS - 1
    assert await jwks.keys_for("new") == ()
    clock.now += 1
    assert await jwks.keys_for("new") == (VerificationKey.of(EC.public_key()),)
    assert await jwks.keys_for("ed") == ()
    assert issuer.fetches == 2


async def test_refresh_ahead_keeps_nobody_waiting(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock
) -> None:
    await jwks.keys_for("ed")
    clock.now += REFRESH_AFTER_SECONDS
    await jwks.keys_for("ed")
    assert issuer.fetches == 1
    clock.now += 1
    issuer.document = make_jwks(make_jwk(EC, "new"))
    issuer.gate.clear()
    assert len(await jwks.keys_for("ed")) == 1
    issuer.gate.set()
    await land(jwks)
    assert issuer.fetches == 2
    assert len(await jwks.keys_for("new")) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        OSError("connection refused"),
        b"<html>502 Bad Gateway</html>",
        b"\xff",
        b"[]",
        b'{"keys": null}',
        make_jwks(),
        make_jwks(UNUSABLE_JWKS["oct"]),
    ],
    ids=["no connection", "HTML", "not UTF-8", "a list", "keys null", "no keys", "no usable keys"],
)
async def test_old_keys_outlive_the_issuers_trouble_for_a_day(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock, trouble: bytes | Exception
) -> None:
    await jwks.keys_for("ed")
    loaded = clock.now
    issuer.document = trouble
    clock.now = loaded + REFRESH_AFTER_SECONDS + 1
    await jwks.keys_for("ed")
    await land(jwks)
    clock.now = loaded + STALE_AFTER_SECONDS
    assert len(await jwks.keys_for("ed")) == 1
    await land(jwks)
    assert issuer.fetches == 3
    clock.now = loaded + STALE_AFTER_SECONDS + FETCH_INTERVAL_SECONDS
    with pytest.raises(Unavailable):
        await jwks.keys_for("ed")
    issuer.document = make_jwks(make_jwk())
    clock.now += FETCH_INTERVAL_SECONDS
    assert len(await jwks.keys_for("ed")) == 1


async def test_keys_that_never_came_are_unavailable_and_asked_for_rarely(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock
) -> None:
    issuer.document = OSError("no route")
    started = clock.now
    for number in range(100):
        clock.now = started + number * 0.5
        with pytest.raises(Unavailable) as caught:
            await jwks.keys_for(f"kid-{number}")
        assert 1.0 <= caught.value.retry_after_seconds <= FETCH_INTERVAL_SECONDS
    assert issuer.fetches == 2
    issuer.document = make_jwks(make_jwk())
    clock.now = started + 60
    assert len(await jwks.keys_for("ed")) == 1


async def test_fetch_that_hangs_is_given_up(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "FETCH_TIMEOUT_SECONDS", 0.0)
    issuer.gate.clear()
    with pytest.raises(Unavailable):
        await jwks.keys_for("ed")
    issuer.gate.set()
    clock.now += FETCH_INTERVAL_SECONDS
    monkeypatch.undo()
    assert len(await jwks.keys_for("ed")) == 1


async def test_fetch_longer_than_the_interval_stays_the_only_one(
    issuer: FakeIssuer, jwks: JwksKeys, clock: FakeClock
) -> None:
    issuer.gate.clear()
    waiting = [asyncio.create_task(jwks.keys_for("ed"))]
    await issuer.begun.wait()
    clock.now += FETCH_INTERVAL_SECONDS + 1
    waiting.append(asyncio.create_task(jwks.keys_for("ed")))
    await asyncio.sleep(0)
    issuer.gate.set()
    assert [len(keys) for keys in await asyncio.gather(*waiting)] == [1, 1]
    assert issuer.fetches == 1


async def test_failed_fetch_says_so_in_the_log(
    issuer: FakeIssuer, jwks: JwksKeys, capsys: pytest.CaptureFixture[str]
) -> None:
    issuer.document = OSError("no route")
    with pytest.raises(Unavailable):
        await jwks.keys_for("ed")
    assert "jwks_fetch_failed" in capsys.readouterr().out


async def test_the_age_counts_from_the_last_fetch_that_went_well(
    jwks: JwksKeys, issuer: FakeIssuer, clock: FakeClock
) -> None:
    metrics = ServerCollector(ServerMetrics({}), Pool(), jwks)  # type: ignore[arg-type]
    assert await age_told(metrics) == []

    await jwks.keys_for("ed")
    clock.now += 400
    issuer.document = OSError("away")
    await jwks.keys_for("ed")
    await land(jwks)

    assert await age_told(metrics) == [400]


class Pool:
    """As much of a pool as is told of it."""

    statements = 0

    def get_idle_size(self) -> int:
        return 0

    get_size = get_max_size = get_idle_size


async def age_told(metrics: ServerCollector) -> list[float]:
    return [
        sample.value
        for metric in await metrics.scrape()
        for sample in metric.samples
        if sample.name == "postrider_jwks_age_seconds"
    ]
