"""An internal error reaches the caller as a reference, without any internals."""

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from grpc import StatusCode

from core.logs import configure_logs
from core.settings import LogSettings
from tests.support.platform import Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import call, code_of, methods, name_of

SCOPES = ("webhooks:manage", "events:publish", "webhooks:admin")
INTERNAL = "postgresql://user:password@10.0.0.5/postrider"


def breaks(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError(INTERNAL)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing deliveries raises an unexpected error."""
    monkeypatch.setattr("server.deliveries.service.list_deliveries", breaks)


async def list_deliveries(platform: Platform, *metadata: tuple[str, str]) -> Any:
    return await platform.calls([*platform.merchant(), *metadata]).ListDeliveries()


async def test_unexpected_error_reveals_only_a_reference(
    platform: Platform, broken: None, logged: list[Any]
) -> None:
    async with refused(StatusCode.INTERNAL, "INTERNAL") as error:
        await list_deliveries(platform)

    reference = error.metadata["reference"]
    assert reference in error.message
    for leak in ("password", "10.0.0.5", "ZeroDivision", "server/", "Traceback"):
        assert leak not in f"{error}"
    [broke] = [entry for entry in logged if entry["event"] == "rpc_broke"]
    assert broke["reference"] == reference
    assert broke["log_level"] == "error"
    assert isinstance(broke["exc_info"], ZeroDivisionError)
    assert broke["method"] == "/postrider.v1.DeliveryService/ListDeliveries"


async def test_internal_error_of_each_rpc_is_hidden(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    monkeypatch.setattr("server.auth.principal.Principal.require", breaks)
    for method in methods():
        async with refused(StatusCode.INTERNAL, "INTERNAL") as error:
            await call(platform.channel, method, metadata=platform.operator())
        assert "password" not in f"{error}", name_of(method)


async def test_reference_is_the_request_id_if_well_formed(
    platform: Platform, broken: None, logged: list[Any]
) -> None:
    async with refused(StatusCode.INTERNAL, "INTERNAL") as error:
        await list_deliveries(platform, ("x-request-id", "trace-0123456789"))
    assert error.metadata == {"reference": "trace-0123456789"}
    for malformed in ("short", "x" * 65, "has spaces in it", "dots.and.more"):
        async with refused(StatusCode.INTERNAL, "INTERNAL") as error:
            await list_deliveries(platform, ("x-request-id", malformed))
        assert error.metadata["reference"] != malformed
        assert len(error.metadata["reference"]) == 16


async def test_concurrent_calls_have_different_references(
    platform: Platform, broken: None, logged: list[Any]
) -> None:
    async def reference() -> str:
        async with refused(StatusCode.INTERNAL, "INTERNAL") as error:
            await list_deliveries(platform)
        return error.metadata["reference"]

    assert len(set(await asyncio.gather(*(reference() for _ in range(10))))) == 10


async def test_each_call_is_logged_with_caller_and_code(
    platform: Platform, logged: list[Any]
) -> None:
    await list_deliveries(platform, ("x-request-id", "trace-0123456789"))
    async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
        await platform.as_operator().ListDeliveries()
    async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
        await platform.calls(bearer("x.y.z")).ListDeliveries()
    lines = [entry for entry in logged if entry["event"] == "rpc"]
    assert [(line["code"], line["subject"], line["merchant_id"]) for line in lines] == [
        ("OK", "tester", "m_1"),
        ("PERMISSION_DENIED", "tester", None),
        ("UNAUTHENTICATED", None, None),
    ]
    assert lines[0]["request_id"] == "trace-0123456789"
    assert all(line["duration_ms"] > 0 for line in lines)


async def test_unknown_method_is_unimplemented(platform: Platform) -> None:
    missing: Any = platform.channel.unary_unary("/postrider.v1.DeliveryService/Nothing")
    assert await code_of(missing(b"", metadata=platform.merchant())) is StatusCode.UNIMPLEMENTED


async def test_malformed_request_is_refused(platform: Platform, logged: list[Any]) -> None:
    untyped: Any = platform.channel.unary_unary
    for method in methods():
        path = f"/{method.containing_service.full_name}/{method.name}"
        metadata = bearer(platform.token(*SCOPES, merchant_id="m_1", subject=path))
        # A new token and a known token take different code paths.
        for _ in range(2):
            async with refused(StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED"):
                await untyped(path)(b"\xff" * 10, metadata=metadata)
    lines = [(entry["event"], entry["reason"]) for entry in logged]
    assert lines == [("rpc", "REQUEST_MALFORMED")] * 2 * len(methods())


@pytest.fixture
def log_stream() -> Iterator[io.BytesIO]:
    """The log in JSON, as in production."""
    stream = io.BytesIO()
    before = structlog.get_config()
    configure_logs(LogSettings(log_format="json"), stream)
    yield stream
    structlog.configure(**before)


async def test_logged_stack_has_no_secret_token_or_payload(
    platform: Platform, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, log_stream: io.BytesIO
) -> None:
    secret = "0123456789abcdef" * 4
    monkeypatch.setattr("server.webhooks.service.new_secret", lambda _: secret)
    monkeypatch.setattr("server.webhooks.store.record_change", breaks)
    async with refused(StatusCode.INTERNAL, "INTERNAL"):
        await platform.register(receiver.url)
    monkeypatch.setattr("core.queue.enqueue", breaks)
    async with refused(StatusCode.INTERNAL, "INTERNAL"):
        await platform.publish('{"card": "4111111111111111"}')

    written = log_stream.getvalue().decode()
    assert "ZeroDivisionError" in written
    assert "webhooks/store.py" in written
    for leak in (secret, "4111111111111111", platform.merchant()[0][1][:60]):
        assert leak not in written


async def test_logged_statement_error_has_no_arguments(
    platform: Platform, receiver: Receiver, pool: Any, log_stream: io.BytesIO
) -> None:
    await pool.execute(
        "CREATE FUNCTION breaks() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE EXCEPTION 'on purpose'; END $$"
    )
    await pool.execute(
        "CREATE TRIGGER breaks BEFORE INSERT ON webhook_configs"
        " FOR EACH ROW EXECUTE FUNCTION breaks()"
    )
    async with refused(StatusCode.INTERNAL, "INTERNAL"):
        await platform.register(
            f"{receiver.url}?token=s3cret", headers={"Authorization": "Bearer s3cret"}
        )
    written = log_stream.getvalue().decode()
    assert "on purpose" in written
    assert "s3cret" not in written
