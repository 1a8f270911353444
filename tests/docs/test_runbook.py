"""Runs every line of docs/operate/runbook.md in order, and checks its output."""

import asyncio
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from postrider.v1 import admin_service_pb2, delivery_pb2, delivery_service_pb2
from tests.support.doc_pages import (
    Environment,
    as_written,
    blocks,
    needs_grpcurl,
    prepared,
    printed,
)
from tests.support.monitored_stack import (
    AWAY,
    BRISK,
    STOPPED,
    WELL,
    MonitoredStack,
    monitored_stack,
    stopped_is_inactive,
    traffic,
)
from tests.support.paths import ROOT
from tests.support.processes import AMPLE
from tests.support.prometheus import needs_prometheus
from tests.support.receiver import Receiver

PAGE = (ROOT / "docs/operate/runbook.md").read_text()
BEGIN = "Before you begin"

#: For each section, a part and the expected output of each line. $NAMES come from the environment.
PROMISES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "Install": (
        ("encryption-key", (":",)),
        ("migrate", ("the schema is at",)),
        ("health server", ("server: SERVING", "delivery: ready")),
        ("up{", ('job="postrider-server"', 'job="postrider-delivery"', "=> 1")),
        ("verify", ("everything was checked",)),
    ),
    "Upgrade": (
        ("migrate", ("the schema is at",)),
        ("verify", ("everything was checked",)),
    ),
    "Scale": (
        ("postrider_attempts_total", ("{} => ",)),
        ("postrider_attempt_duration_seconds", ("{} => 0.",)),
        ("process_cpu_seconds_total", ('job="postrider-server"', 'job="postrider-delivery"')),
        ("postrider_in_flight", ("instance=",)),
        ("postrider_build_info", ('{job="postrider-server"} => 1', '"postrider-delivery"} => 2')),
    ),
    "A merchant says nothing arrived": (
        ("ListEvents", ('"id": "$EVENT"', '"type": "payment.succeeded"')),
        (
            "ListAllWebhookConfigs",
            ('"id": "$WEBHOOK"', '"deactivationReason": "DEACTIVATION_REASON_FAILURES"'),
        ),
        ("ListDeliveries", ('"state": "DELIVERY_STATE_FAILED"', '"statusCode": 500', "no disk")),
        ("GetQueueStatus", ('"webhookId": "$WEBHOOK"', '"parked": "1"')),
        ("PingWebhookConfig", ('"reachable": true', '"statusCode": 200')),
        ("ListAuditEntries", ('"action": "CreateWebhookConfig"', '"resource": "$WEBHOOK"')),
        ("ReactivateWebhookConfig", ('"id": "$WEBHOOK"', '"active": true')),
        ("RedeliverDeliveries", ('"redelivered": ',)),
    ),
    "The queue grows": (
        ("GetQueueStatus", ('"total"', f'"merchantId": "{AWAY}"')),
        ("postrider_in_flight_limit", ("{} => ",)),
        ("process_cpu_seconds_total", ('engine="1"', 'engine="2"')),
        ("postrider_claim_duration_seconds", ("{} => 0.",)),
        ("postrider_settle_duration_seconds", ("{} => 0.",)),
        ("DeactivateWebhookConfig", ('"deactivationReason": "DEACTIVATION_REASON_ADMIN"',)),
        ("FROM events", (f"{WELL} ",)),
    ),
    "Alerts": (
        ("Check", ('"status": "SERVING"',)),
        ("verify", ("everything was checked",)),
    ),
    "PostriderNoServer": (
        ("Check", ('"status": "SERVING"',)),
        ("postrider_build_info", ("postrider_build_info{",)),
        ("migrate", ("the schema is at",)),
    ),
    "PostriderNoEngine": (
        ("postrider_in_flight_limit", ('postrider_in_flight_limit{engine="2"} 500',)),
        ("GetQueueStatus", ('"total"',)),
    ),
    "PostriderProcessDown": (
        ("up", ('job="postrider-server"', 'job="postrider-delivery"', 'engine="2"')),
    ),
    "PostriderDatabaseAway": (
        ("postrider_database_up", ('job="postrider-server"', 'engine="1"', "=> 1")),
        ("Check", ('"status": "SERVING"',)),
        ("verify", ("everything was checked",)),
    ),
    "PostriderClockSkew": (("postrider_clock_skew_seconds", ('engine="1"', 'engine="2"')),),
    "PostriderFailureRate": (
        ("FROM finished_deliveries", ("$MERCHANT ",)),
        ("postrider_attempts_total", ('outcome="http_error"', 'outcome="succeeded"')),
        ("RedeliverDeliveries", ('"alreadyRedelivered": ',)),
        ("ListDeliveries", ('"state": "DELIVERY_STATE_FAILED"', '"statusCode": 500')),
    ),
    "PostriderDeliverySlow": (
        # Includes deliveries that were parked first, so it may be long.
        ("postrider_publish_to_first_attempt_seconds", ("{} => ",)),
        ("postrider_attempt_duration_seconds", ('{phase="first_byte"} => 0.',)),
        ("postrider_delivery_attempts", ("{} => 0",)),
        ("GetQueueStatus", ('"total"',)),
    ),
    "PostriderBreakersOpen": (
        ("postrider_attempts_total", ('outcome="http_error"',)),
        ("postrider_attempts_total", ("instance=", 'outcome="http_error"')),
        ("PingWebhookConfig", ('"reachable": true',)),
    ),
    "PostriderInternalErrors": (
        ("postrider_attempts_total", ("instance=",)),
        ("keys status", ("k1",)),
        ("RedeliverDeliveries", ("{",)),
    ),
    "PostriderDeactivationBurst": (
        ("postrider_webhook_deactivations_total", ('{reason="failures"} => ',)),
        ("ListAllWebhookConfigs", (f'"merchantId": "{STOPPED}"', "DEACTIVATION_REASON_ADMIN")),
        ("ReactivateWebhookConfig", (f'"merchantId": "{STOPPED}"', '"active": true')),
    ),
    "PostriderReclaimBurst": (
        ("process_start_time_seconds", ("instance=",)),
        ("postrider_leases_lost_total", ("{} => 0",)),
        ("DeactivateWebhookConfig", ('"id": "$WEBHOOK"', '"active": false')),
    ),
    "PostriderOldestDueAge": (
        ("GetQueueStatus", ('"total"',)),
        ("postrider_attempts_total", ("instance=",)),
        ("CheckInvariants", ('"name": "event_has_deliveries"', '"complete": true')),
    ),
    "PostriderQueueGrowing": (("postrider_queue_deliveries", ('{state="parked"} => ',)),),
    "PostriderRpcErrors": (
        ("postrider_rpcs_total", ()),
        ("postrider_database_pool_size", ("instance=",)),
    ),
    "PostriderSigningKeyAge": (
        ("postrider_jwks_age_seconds", ('job="postrider-server"',)),
        ("WEBHOOK_JWT_JWKS_URL", ('"keys"',)),
    ),
    "PostriderPartitionMissing": (
        ("postrider_partition_days_ahead", ("{} => ",)),
        ("retention --dry-run", ("days would be created: ",)),
    ),
    "PostriderRetentionStopped": (
        ("postrider_retention_last_run_timestamp_seconds", ()),
        ("retention", ("days created: ",)),
    ),
}
#: Sections whose lines need another setup, and the tests that run them.
ELSEWHERE: dict[str, str] = {
    "Rotate keys": "tests/faults/test_rotation.py",
    "Roll back": "tests/migrations/test_rollback.py",
    "Restore a backup": "tests/e2e/test_restore.py",
    "Database failing over": "tests/faults/test_failover.py",
}

needs_psql = pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
needs_jq = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


def sections() -> dict[str, list[str]]:
    """Return the lines of each section that has lines, by heading."""
    _, *parts = re.split(r"^##+ (.+)\n", PAGE, flags=re.MULTILINE)
    found = {heading: blocks(body) for heading, body in zip(parts[::2], parts[1::2], strict=True)}
    return {heading: lines for heading, lines in found.items() if lines}


def test_runbook_lines_are_all_run_by_tests() -> None:
    lines = sections()
    here = {heading: len(promised) for heading, promised in PROMISES.items()}

    assert {heading: len(lines.get(heading, [])) for heading in PROMISES} == here
    for heading in lines.keys() - PROMISES.keys() - {BEGIN}:
        assert heading in ELSEWHERE, f"no test runs the lines of {heading!r}"
        assert "docs/operate/runbook.md" in (ROOT / ELSEWHERE[heading]).read_text(), heading


@pytest.mark.slow
@needs_grpcurl
@needs_prometheus
@needs_psql
@needs_jq
async def test_runbook_lines_print_their_answers(
    database_url: str, ca_file: Path, tmp_path: Path, receiver: Receiver
) -> None:
    since = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    async with (
        monitored_stack(database_url, ca_file, tmp_path, receiver) as stack,
        traffic(stack.platform),
    ):
        [begin] = sections()[BEGIN]
        environment = stack.processes.environment | await asyncio.to_thread(
            prepared, begin, tmp_path
        )
        environment |= {
            "ADDRESS": stack.addresses["grpc"],
            "ADMIN_ADDRESS": stack.addresses["admin"],
            "SERVER_METRICS": stack.addresses["postrider-server"],
            "ENGINE_METRICS": stack.addresses["postrider-delivery"],
            "PROMETHEUS": stack.prometheus.url,
            "WEBHOOK_JWT_JWKS_URL": stack.jwks_url,
            "SINCE": since,
            **await deactivated(stack, receiver, environment["MERCHANT"]),
        }
        del environment["WEBHOOK_JWT_PUBLIC_KEY_FILE"]
        for heading, lines in sections().items():
            if heading in PROMISES:
                for line, (part, expected) in zip(lines, PROMISES[heading], strict=True):
                    assert part in line, f"{heading}: {line}"
                    await assert_prints(line, expected, environment)
        await assert_audited(stack, environment["ACTOR"])


async def assert_prints(line: str, promised: tuple[str, ...], environment: Environment) -> None:
    expected = [re.sub(r"\$([A-Z]+)", lambda name: environment[name[1]], text) for text in promised]
    output = await printed(as_written(line, environment), environment)
    assert [text for text in expected if text not in output] == [], f"{line}\n{output}"


async def deactivated(stack: MonitoredStack, receiver: Receiver, merchant_id: str) -> Environment:
    """Return a config that failures deactivated, with a parked delivery and a working receiver."""
    platform = stack.platform
    created = await platform.register(f"{receiver.url}/{merchant_id}", merchant_id)
    stack.broken.add(merchant_id)
    request = delivery_service_pb2.ListDeliveriesRequest(
        webhook_id=created.webhook_config.id, state=delivery_pb2.DELIVERY_STATE_FAILED
    )
    for _ in range(BRISK["max_consecutive_failures"]):
        await platform.publish(merchant_id=merchant_id)
    failed: list[Any] = []
    async with asyncio.timeout(AMPLE):
        while len(failed) < BRISK["max_consecutive_failures"]:
            await stack.prometheus.scrapes.further(1)
            listed = await platform.deliveries.ListDeliveries(
                request, metadata=platform.merchant(merchant_id)
            )
            failed = list(listed.deliveries)
    await platform.publish(merchant_id=merchant_id)
    stack.broken.remove(merchant_id)
    await stopped_is_inactive(stack)
    # Database metrics are read every 5 s, and a rate needs two samples.
    await stack.prometheus.scrapes.further(8)
    return {
        "EVENT": failed[0].event_id,
        "WEBHOOK": created.webhook_config.id,
        "DELIVERY": failed[0].id,
        "UNTIL": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
    }


async def assert_audited(stack: MonitoredStack, actor: str) -> None:
    listed = await stack.platform.admin.ListAuditEntries(
        admin_service_pb2.ListAuditEntriesRequest(actor=actor, page_size=100),
        metadata=stack.platform.operator(),
    )
    assert {entry.action for entry in listed.audit_entries} == {
        "ReactivateWebhookConfig",
        "RedeliverDeliveries",
        "DeactivateWebhookConfig",
    }
