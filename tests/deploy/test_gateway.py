"""REST through the Envoy configuration we ship, on a real Envoy and a real server."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import orjson
import pytest
from yarl import URL

from postrider.v1.webhook_config_service_pb2 import ListWebhookConfigsRequest
from postrider.v1.webhook_config_service_pb2_grpc import WebhookConfigServiceStub
from server.deliveries.service import DeliveryService
from server.events.service import EventService
from server.webhooks.service import WebhookConfigService
from tests.support.gateway import Gateway, running_gateway
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.rest_contract import assert_conforms

UNKNOWN_ID = "wh_" + "0" * 31 + "1"
CONFIGS = "/v1/webhookConfigs"


@pytest.fixture
async def gateway(platform: Platform, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(platform.address, tmp_path) as gateway:
        yield gateway


async def create(gateway: Gateway, platform: Platform, url: str) -> str:
    draft = {"url": url, "events": ["payment.succeeded"], "retrySchedule": ["1s", "2.5s"]}
    created = await gateway.call("POST", CONFIGS, platform.merchant(), json=draft)
    assert created.status == 200, created.body
    return str(created.body["webhookConfig"]["id"])


async def test_rest_manages_a_webhook_config(
    platform: Platform, gateway: Gateway, receiver: Receiver
) -> None:
    merchant = platform.merchant()
    draft = {"url": receiver.url, "events": ["payment.succeeded"], "retrySchedule": ["2.5s"]}

    created = await gateway.call("POST", CONFIGS, merchant, json=draft)
    config = created.body["webhookConfig"]
    path = f"{CONFIGS}/{config['id']}"
    listed = await gateway.call("GET", f"{CONFIGS}?pageSize=1", merchant)
    changes = {"description": "till 4", "active": False, "url": "https://left.out.example"}
    mask = "?updateMask=description,active"
    updated = await gateway.call("PATCH", path + mask, merchant, json=changes)
    got = await gateway.call("GET", path, merchant)
    deleted = await gateway.call("DELETE", path, merchant)
    gone = await gateway.call("GET", path, merchant)

    assert_conforms(created.body, "CreateWebhookConfigResponse")
    assert len(created.body["secret"]) == 64
    assert config["retrySchedule"] == ["2.500s"]
    assert config["active"] is True
    assert listed.body == {"webhookConfigs": [config], "nextPageToken": ""}
    assert updated.body["webhookConfig"]["description"] == "till 4"
    assert updated.body["webhookConfig"]["deactivationReason"] == "DEACTIVATION_REASON_PAUSED"
    assert updated.body["webhookConfig"]["url"] == receiver.url
    assert got.body == updated.body
    assert deleted.body == {"cancelledDeliveries": 0}
    assert (gone.status, gone.reason) == (404, "WEBHOOK_CONFIG_NOT_FOUND")


async def test_rest_pings_with_and_without_a_body(
    platform: Platform, gateway: Gateway, receiver: Receiver
) -> None:
    path = f"{CONFIGS}/{await create(gateway, platform, receiver.url)}:ping"

    answers = [
        await gateway.call("POST", path, platform.merchant(), json={}),
        await gateway.call("POST", path, platform.merchant()),
    ]

    assert [(a.body["reachable"], a.body["statusCode"]) for a in answers] == [(True, 200)] * 2


@pytest.mark.skipif("RotateSecret" not in vars(WebhookConfigService), reason="not served yet")
async def test_rest_rotates_a_secret(
    platform: Platform, gateway: Gateway, receiver: Receiver
) -> None:
    path = f"{CONFIGS}/{await create(gateway, platform, receiver.url)}:rotateSecret"

    rotated = await gateway.call("POST", path, platform.merchant(), json={"overlap": "60s"})

    assert len(rotated.body["secret"]) == 64
    assert rotated.body["webhookConfig"]["previousSecretExpireTime"]


async def test_rest_publishes_and_lists_deliveries(
    platform: Platform, gateway: Gateway, receiver: Receiver
) -> None:
    webhook_id = await create(gateway, platform, receiver.url)
    event = {"merchantId": "m_1", "type": "payment.succeeded", "payloadText": '{"amount": 1}'}

    one = await gateway.call("POST", "/v1/events", platform.producer(), json=event)
    batch = await gateway.call(
        "POST",
        "/v1/events:batch",
        platform.producer(),
        json={"events": [{**event, "payloadText": "{}"}, {**event, "type": "no.such"}]},
    )
    query = f"?webhookId={webhook_id}&startTime=2020-01-01T00:00:00Z&pageSize=10"
    deliveries = await gateway.call("GET", f"/v1/deliveries{query}", platform.merchant())
    newest = deliveries.body["deliveries"][0]
    delivery = await gateway.call("GET", f"/v1/deliveries/{newest['id']}", platform.merchant())

    assert one.body["event"]["deliveryCount"] == 1
    statuses = [result["status"] for result in batch.body["results"]]
    assert statuses == ["PUBLISH_STATUS_ACCEPTED", "PUBLISH_STATUS_REJECTED"]
    assert len(deliveries.body["deliveries"]) == 2
    assert delivery.body == {"delivery": newest}
    assert_conforms(batch.body, "PublishEventsResponse")
    assert_conforms(deliveries.body, "ListDeliveriesResponse")


@pytest.mark.skipif("ListEvents" not in vars(EventService), reason="not served yet")
async def test_rest_reads_events_back(platform: Platform, gateway: Gateway) -> None:
    event = {"merchantId": "m_1", "type": "payment.succeeded", "payloadText": "{}"}
    published = await gateway.call("POST", "/v1/events", platform.producer(), json=event)
    event_id = published.body["event"]["id"]

    got = await gateway.call("GET", f"/v1/events/{event_id}", platform.producer())
    listed = await gateway.call("GET", "/v1/events?merchantId=m_1", platform.producer())

    assert got.body["event"]["id"] == event_id
    assert [event["id"] for event in listed.body["events"]] == [event_id]


@pytest.mark.skipif("RedeliverDelivery" not in vars(DeliveryService), reason="not served yet")
async def test_rest_redelivers_what_was_delivered(
    platform: Platform, gateway: Gateway, receiver: Receiver
) -> None:
    await create(gateway, platform, receiver.url)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
    query = "/v1/deliveries?state=DELIVERY_STATE_DELIVERED"
    [first] = (await gateway.call("GET", query, platform.merchant())).body["deliveries"]

    path = f"/v1/deliveries/{first['id']}:redeliver"
    again = await gateway.call("POST", path, platform.merchant())

    assert again.body["delivery"]["redeliveryOf"] == first["id"]


@pytest.mark.skipif("WatchDeliveries" not in vars(DeliveryService), reason="not served yet")
async def test_rest_watches_deliveries_one_json_object_a_line(
    platform: Platform, gateway: Gateway, receiver: Receiver
) -> None:
    webhook_id = await create(gateway, platform, receiver.url)

    headers = dict(platform.merchant())
    async with (
        platform.engine(),
        asyncio.timeout(60),
        gateway.session.get("/v1/deliveries:watch", headers=headers) as answer,
    ):
        # The first is a sign of life: from here on everything is news.
        sign_of_life = orjson.loads(await answer.content.readline())
        await platform.publish()
        news = orjson.loads(await answer.content.readline())

    assert sign_of_life.keys() == {"resumeToken"}
    assert news["delivery"]["webhookId"] == webhook_id


async def test_an_error_has_its_code_message_and_typed_details_in_json(
    platform: Platform, gateway: Gateway
) -> None:
    draft = {"url": "http://merchant.example", "events": ["no.such"]}

    refused = await gateway.call("POST", CONFIGS, platform.merchant(), json=draft)
    anonymous = await gateway.call("GET", CONFIGS)
    foreign = await gateway.call("GET", CONFIGS, platform.producer())

    assert (refused.status, refused.body["code"], refused.reason) == (400, 3, "URL_NOT_HTTPS")
    assert "https://" in refused.body["message"]
    violations = refused.detail("BadRequest")["fieldViolations"]
    assert [v["reason"] for v in violations] == ["URL_NOT_HTTPS", "EVENT_TYPE_UNKNOWN"]
    assert (anonymous.status, anonymous.body["code"]) == (401, 16)
    assert anonymous.reason == "TOKEN_INVALID"
    assert (foreign.status, foreign.reason) == (403, "SCOPE_MISSING")
    assert_conforms(refused.body, "Error")


async def test_an_unknown_path_or_method_is_a_typed_404(
    platform: Platform, gateway: Gateway
) -> None:
    for method, path in (
        ("GET", "/"),
        ("GET", "/v2/webhookConfigs"),
        ("PUT", CONFIGS),
        ("POST", "/postrider.v1.AdminService/ListAllWebhookConfigs"),
        ("POST", "/postrider.v1.WebhookConfigService/ListWebhookConfigs"),
    ):
        answer = await gateway.call(method, path, platform.operator(), json={})

        assert (answer.status, answer.body["code"]) == (404, 5), path
        assert answer.reason == "PATH_UNKNOWN"
        assert_conforms(answer.body, "Error")


async def test_native_grpc_reaches_no_admin_service(platform: Platform, gateway: Gateway) -> None:
    headers = {**dict(platform.operator()), "content-type": "application/grpc", "te": "trailers"}

    for path in ("postrider.v1.AdminService/ListAllWebhookConfigs", "grpc.health.v1.Health/Check"):
        async with gateway.session.post(f"/{path}", headers=headers, data=bytes(5)) as answer:
            assert answer.headers["grpc-status"] == "12", path


async def test_json_of_the_wrong_form_is_a_typed_400(platform: Platform, gateway: Gateway) -> None:
    for query, body in (
        ("", b"{not json"),
        ("", b'{"url": 5}'),
        ("", b'{"active": "perhaps"}'),
        ("", b'{"retrySchedule": ["soon"]}'),
        ("?misspelt=1", b"{}"),
    ):
        answer = await gateway.call("POST", CONFIGS + query, platform.merchant(), data=body)

        assert (answer.status, answer.body["code"]) == (400, 3), body
        assert answer.reason == "REQUEST_MALFORMED"
        assert answer.body["message"]


async def test_text_that_is_not_utf_8_is_a_typed_400(platform: Platform, gateway: Gateway) -> None:
    for path in ("/v1/events/%ff%fe", "/v1/events?merchantId=%ff"):
        answer = await gateway.call("GET", URL(path, encoded=True), platform.producer())

        assert (answer.status, answer.body["code"]) == (400, 3), path
        assert answer.reason == "REQUEST_MALFORMED"


async def test_an_id_in_the_body_cannot_overrule_the_one_in_the_path(
    platform: Platform, gateway: Gateway, receiver: Receiver
) -> None:
    webhook_id = await create(gateway, platform, receiver.url)
    path = f"{CONFIGS}/{webhook_id}?updateMask=description"
    change = {"id": UNKNOWN_ID, "description": "mine"}

    answer = await gateway.call("PATCH", path, platform.merchant(), json=change)

    assert (answer.status, answer.reason) == (400, "REQUEST_MALFORMED")


async def test_headers_and_bodies_beyond_the_limits_are_refused(
    platform: Platform, gateway: Gateway
) -> None:
    large = b'{"payloadText": "' + b"x" * 16 * 1024 * 1024 + b'"}'
    headers = {"x-large": "x" * 20_000}

    body = await gateway.call("POST", "/v1/events", platform.producer(), data=io.BytesIO(large))
    header = await gateway.call("GET", CONFIGS, platform.merchant(), headers=headers)

    assert (body.status, body.reason) == (413, "REQUEST_TOO_LARGE")
    assert (header.status, header.reason) == (431, "REQUEST_TOO_LARGE")


async def test_malformed_header_does_not_break_other_callers(
    platform: Platform, gateway: Gateway
) -> None:
    """All share Envoy's connection to the server; who sends the header needs no token."""
    async with grpc.aio.insecure_channel(gateway.address.removeprefix("http://")) as channel:
        webhooks = WebhookConfigServiceStub(channel)

        async def list_within(seconds: int) -> None:
            await webhooks.ListWebhookConfigs(
                ListWebhookConfigsRequest(), metadata=platform.merchant(), timeout=seconds
            )

        await list_within(20)
        answer = await gateway.call("GET", CONFIGS, headers={"grpc-timeout": "soon"})
        assert answer.status == 500
        # A deadline that has been sent before is in the connection's table as it was.
        for seconds in (21, 22, 23):
            await list_within(seconds)


async def test_a_server_that_is_away_is_a_typed_503(tmp_path: Path) -> None:
    async with running_gateway("127.0.0.1:1", tmp_path) as gateway:
        answer = await gateway.call("GET", CONFIGS)

    assert (answer.status, answer.body["code"], answer.reason) == (503, 14, "SERVER_UNAVAILABLE")


async def test_what_is_no_server_is_a_typed_502(tmp_path: Path) -> None:
    async def speak_http_1(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    other = await asyncio.start_server(speak_http_1, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    async with other, running_gateway(f"127.0.0.1:{port}", tmp_path) as gateway:
        answer = await gateway.call("GET", CONFIGS)

    assert (answer.status, answer.body["code"], answer.reason) == (502, 14, "SERVER_UNAVAILABLE")


async def test_http_1_0_is_a_typed_426(platform: Platform, gateway: Gateway) -> None:
    async with aiohttp.ClientSession(gateway.address, version=aiohttp.HttpVersion10) as old:
        answer = await Gateway(old, gateway.address).call("GET", CONFIGS, platform.merchant())

    assert (answer.status, answer.body["code"], answer.reason) == (426, 3, "REQUEST_MALFORMED")
