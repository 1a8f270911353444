"""Canary secrets and a canary payload, looked for wherever something is written or answered."""

import base64
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToJson

from core.encryption import KeyRing
from core.ids import parse_id
from postrider.v1 import admin_service_pb2, delivery_service_pb2, event_pb2, event_service_pb2
from postrider.v1 import webhook_config_service_pb2 as pb
from postrider.v1.webhook_config_pb2 import SIGNATURE_SCHEME_ED25519, EventType
from tests.support.platform import ENCRYPTION_KEYS, Platform
from tests.support.processes import Processes, environment_of, talking_to
from tests.support.receiver import Receiver
from tests.support.rpcs import call, methods

PAYLOAD = "canary-payload-6f1d"
HEADER = "Bearer canary-header-90aa"


@pytest.fixture
async def processes(
    platform: Platform, database_url: str, ca_file: Path
) -> AsyncIterator[Processes]:
    processes = Processes(environment_of(database_url, ca_file, platform.key.public_key_file))
    yield processes
    await processes.kill_all()


def spellings(canary: str) -> set[str]:
    """A text as it may turn up: itself, in hexadecimal, in base64 at any of its three offsets."""
    raw = canary.encode()
    # Without the ends, which depend on the neighbours.
    encoded = {base64.b64encode(b"\0" * pad + raw).decode()[4:-4] for pad in range(3)}
    return {canary, raw.hex(), *encoded}


def found(canaries: Iterable[str], texts: Iterable[str]) -> list[tuple[str, str]]:
    """Which canary is where."""
    needles = {canary: spellings(canary) for canary in canaries}
    return [
        (canary, text[:300])
        for text in texts
        for canary, forms in needles.items()
        if any(form in text for form in forms)
    ]


async def rows(pool: Any) -> dict[str, list[str]]:
    """Every row of every table as text with hexadecimal bytes, and the sessions' last queries."""
    tables = await pool.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " AND relkind IN ('r', 'p') AND NOT relispartition"
    )
    names = [f'"{row["relname"]}"' for row in tables] + ["pg_stat_activity"]
    return {
        name.strip('"'): [r[0] for r in await pool.fetch(f"SELECT t::text FROM {name} t")]  # noqa: S608
        for name in names
    }


class Answers:
    """What calls were answered, refusals included, as text."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def of(self, answering: Any) -> Any:
        try:
            answer = await answering
        except grpc.aio.AioRpcError as error:
            trailers = [(key, str(value)) for key, value in error.trailing_metadata() or ()]
            self.texts.append(f"{error.code()} {error.details()} {trailers}")
            return None
        if answer is not None:
            self.texts += [MessageToJson(answer), str(answer.SerializeToString())]
        return answer


async def test_no_secret_or_payload_appears_in_clear(
    platform: Platform, processes: Processes, receiver: Receiver, pool: Any, keyring: KeyRing
) -> None:
    server, address = await processes.server(log_level="debug")
    engine = await processes.engine(log_level="debug", retry_schedule_seconds="0.02", max_retries=1)
    answers = Answers()
    async with talking_to(address, platform) as postrider:
        created = await postrider.register(receiver.url, headers={"Authorization": HEADER})
        rotated = await postrider.webhooks.RotateSecret(
            pb.RotateSecretRequest(id=created.webhook_config.id), metadata=postrider.merchant()
        )
        paired = (
            await postrider.register(receiver.url, signature_scheme=SIGNATURE_SCHEME_ED25519)
        ).webhook_config
        broken = (await postrider.register(receiver.url)).webhook_config
        refusing = (await postrider.register(receiver.url)).webhook_config
        row = await pool.fetchrow(
            "SELECT * FROM webhook_configs WHERE id = $1", parse_id("wh", paired.id)
        )
        pair = keyring.decrypt(row["secret_key_id"], row["secret_ciphertext"], row["id"])
        # A header that cannot be sent, a record that cannot be read, a receiver that is away.
        await pool.execute(
            "UPDATE webhook_configs SET version = version + 1, headers = $2 WHERE id = $1",
            *(parse_id("wh", broken.id), json.dumps({"X-A": f"{HEADER}\r\n"})),
        )
        await pool.execute(
            "UPDATE webhook_configs SET url = 'https://127.0.0.1:9/', secret_ciphertext ="
            " secret_ciphertext || '\\x00', version = version + 1 WHERE id = $1",
            parse_id("wh", refusing.id),
        )
        receiver.script.extend([500, 500, 302])
        published = await answers.of(postrider.publish(json.dumps({"note": PAYLOAD})))
        await engine.wait_for("attempt", 5)
        await _provoke(postrider, answers, created.webhook_config.id, published.event.id)
        for method in methods():
            for caller in (postrider.merchant(), postrider.operator(), postrider.producer(), None):
                await answers.of(call(postrider.channel, method, None, caller))
    tokens = [*platform.tokens.values(), *postrider.tokens.values()]
    secrets = [created.secret, rotated.secret, pair, pair.removeprefix("whsk_")[:40]]
    secrets += [created.standard_webhooks_secret, ENCRYPTION_KEYS.partition(":")[2][:40], *tokens]
    secrets += [token.rpartition(".")[2] for token in tokens]

    logged = [*server.lines, *engine.lines]
    assert len(engine.named("attempt")) >= 5
    assert any(entry.get("outcome") == "internal_error" for entry in engine.named("attempt"))
    assert found([*secrets, PAYLOAD, HEADER], logged) == []

    assert len(answers.texts) > 4 * len(methods())
    assert found([*secrets, PAYLOAD], answers.texts) == []

    stored = await rows(pool)
    assert found(secrets, [text for texts in stored.values() for text in texts]) == []
    holding = {table for table, texts in stored.items() if found([PAYLOAD], texts)}
    assert holding == {"events"}

    # The search finds what is there.
    assert found([created.secret], [f"\\x{created.secret.encode().hex()}"])
    assert found([PAYLOAD], [base64.b64encode(f"ab{PAYLOAD}yz".encode()).decode()])


async def _provoke(postrider: Platform, answers: Answers, webhook_id: str, event_id: str) -> None:
    """Calls that are refused because of a payload, and reads of everything about it."""
    schema = EventType(
        name="payment.succeeded",
        json_schema='{"properties": {"note": {"type": "integer"}}}',
        enforce_schema=True,
    )
    update = admin_service_pb2.UpdateEventTypeRequest(event_type=schema)
    update.update_mask.paths.extend(["json_schema", "enforce_schema"])
    await postrider.admin.UpdateEventType(update, metadata=postrider.operator())
    refused = event_pb2.EventInput(
        merchant_id="m_1", type="payment.succeeded", payload_text=json.dumps({"note": PAYLOAD})
    )
    for event in (
        refused,
        event_pb2.EventInput(merchant_id="m_1", type="refund.created", payload_text=f"{{{PAYLOAD}"),
        event_pb2.EventInput(
            merchant_id="m_1", type="refund.created", payload_text=PAYLOAD * 20_000
        ),
    ):
        request = event_service_pb2.PublishEventRequest(event=event)
        await answers.of(postrider.events.PublishEvent(request, metadata=postrider.producer()))
    merchant, operator = postrider.merchant(), postrider.operator()
    deliveries = await answers.of(
        postrider.deliveries.ListDeliveries(
            delivery_service_pb2.ListDeliveriesRequest(), metadata=merchant
        )
    )
    for delivery in deliveries.deliveries:
        await answers.of(
            postrider.deliveries.GetDelivery(
                delivery_service_pb2.GetDeliveryRequest(id=delivery.id), metadata=merchant
            )
        )
    get = pb.GetWebhookConfigRequest(id=webhook_id)
    await answers.of(postrider.webhooks.GetWebhookConfig(get, metadata=merchant))
    ping = pb.PingWebhookConfigRequest(id=webhook_id)
    await answers.of(postrider.webhooks.PingWebhookConfig(ping, metadata=merchant))
    event_request = event_service_pb2.GetEventRequest(id=event_id)
    await answers.of(postrider.events.GetEvent(event_request, metadata=postrider.producer()))
    entries = admin_service_pb2.ListAuditEntriesRequest()
    await answers.of(postrider.admin.ListAuditEntries(entries, metadata=operator))
