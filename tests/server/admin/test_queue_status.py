"""GetQueueStatus: exact counts per webhook config and in total."""

from typing import Any
from uuid import UUID

from grpc import StatusCode

from core import queue
from postrider.v1 import admin_service_pb2 as pb
from tests.support.factories import make_delivery, make_event, make_webhook_config
from tests.support.platform import Platform
from tests.support.refused_calls import refused


async def status(platform: Platform, **fields: Any) -> Any:
    return await platform.as_operator().GetQueueStatus(**fields)


def counts(part: pb.QueueStatus) -> tuple[int, int, int]:
    return part.ready, part.parked, part.leased


def text(webhook_id: UUID) -> str:
    return f"wh_{webhook_id.hex}"


async def test_empty_queue_has_zero_counts(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for answer in (await status(platform), await status(platform, webhook_id=text(webhook_id))):
        assert counts(answer.total) == (0, 0, 0)
        assert answer.total.oldest_due_age.ToNanoseconds() == 0
        assert not answer.webhooks


async def test_queue_status_counts_by_config_and_state(platform: Platform, pool: Any) -> None:
    few, many, none = [await make_webhook_config(pool, merchant_id=f"m_{n}") for n in range(3)]
    for due_in in (-100.0, -50.0, 1000.0):
        await make_delivery(pool, many, due_in=due_in)
    await make_delivery(pool, many, state="parked", due_in=-5000.0)
    await make_delivery(pool, many, state="leased", due_in=-5000.0)
    await make_delivery(pool, few, state="parked", due_in=-5000.0)
    await make_delivery(pool, few, due_in=1000.0)

    answer = await status(platform)

    assert [part.webhook_id for part in answer.webhooks] == [text(many), text(few)]
    assert [part.merchant_id for part in answer.webhooks] == ["m_1", "m_0"]
    assert [counts(part) for part in answer.webhooks] == [(3, 1, 1), (1, 1, 0)]
    assert counts(answer.total) == (4, 2, 1)
    assert (answer.total.webhook_id, answer.total.merchant_id) == ("", "")
    # The age counts only deliveries that are ready and due.
    assert 100 <= answer.webhooks[0].oldest_due_age.seconds < 400
    assert answer.webhooks[1].oldest_due_age.ToNanoseconds() == 0
    assert answer.total.oldest_due_age == answer.webhooks[0].oldest_due_age

    one = await status(platform, webhook_id=text(few))
    assert list(one.webhooks) == [answer.webhooks[1]]
    assert counts(one.total) == (1, 1, 0)
    assert not (await status(platform, webhook_id=text(none))).webhooks


async def test_total_includes_configs_beyond_top(platform: Platform, pool: Any) -> None:
    for _ in range(3):
        await make_delivery(pool, await make_webhook_config(pool))
    answer = await status(platform, top=2)
    assert (len(answer.webhooks), answer.total.ready) == (2, 3)


async def test_blocked_deliveries_are_counted_separately(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool, ordered=True)
    none = await make_webhook_config(pool, merchant_id="m_2")
    await make_delivery(pool, none)
    keys = ["k", "k", "k", "other"]
    await queue.enqueue_in_order(pool, [make_event(ordering_key=key) for key in keys])

    answer = await status(platform)

    assert [(part.webhook_id, part.ready, part.blocked) for part in answer.webhooks] == [
        (text(webhook_id), 2, 2),
        (text(none), 1, 0),
    ]
    assert (answer.total.ready, answer.total.blocked) == (3, 2)
    assert answer.total.oldest_due_age.seconds < 60
    assert (await status(platform, webhook_id=text(webhook_id))).total.blocked == 2


async def test_invalid_queue_status_filters_are_refused(platform: Platform) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "TOP_INVALID"):
        await status(platform, top=-1)
    async with refused(StatusCode.INVALID_ARGUMENT, "ID_INVALID"):
        await status(platform, webhook_id="evt_1")
