"""WebhookConfigService: a merchant's webhook configs.

`rules` checks the fields and `store` runs the transactions. No transaction is open during a ping.
"""

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import grpc

from core.encryption import KeyRing
from core.ids import new_id
from core.lifecycle import AttemptResult
from core.models import WebhookConfig
from core.postgres.protocols import Pool
from core.signing import SignatureScheme, new_secret
from core.urls import UrlPolicy
from postrider.v1 import (
    webhook_config_service_pb2,
    webhook_config_service_pb2_grpc,
)
from server.auth.principal import Scope
from server.auth.rate_limits import PingSlots
from server.database import Sessions
from server.event_types.rules import event_type_message, event_type_name, is_event_type_prefix
from server.event_types.store import EventTypes, list_event_types
from server.rpc.authenticate import principal
from server.rpc.pagination import fitting, page_size, page_token, parse_page_token
from server.rpc.validation import check_mask
from server.webhooks.convert import overlap_seconds, ping_message, secret_fields, signature_scheme
from server.webhooks.reachability import Pinger, is_reachable, require_reachable
from server.webhooks.rules import FIELDS, check_draft, webhook_config_message, webhook_draft
from server.webhooks.store import WebhookStore, check_etag

type Context = grpc.aio.ServicerContext[Any, Any]
pb = webhook_config_service_pb2


class WebhookConfigService(webhook_config_service_pb2_grpc.WebhookConfigServiceServicer):
    """Each method checks the scope and the merchant before it reads data."""

    def __init__(
        self,
        sessions: Sessions,
        pool: Pool,
        event_types: EventTypes,
        keyring: KeyRing,
        pinger: Pinger,
        url_policy: UrlPolicy,
        ping_slots: PingSlots,
        max_webhooks_per_merchant: int,
    ):
        self._sessions = sessions
        self._store = WebhookStore(sessions, pool, keyring, max_webhooks_per_merchant)
        self._event_types = event_types
        self._keyring = keyring
        self._pinger = pinger
        self._ping_slots = ping_slots
        self._url_policy = url_policy

    async def CreateWebhookConfig(
        self, request: pb.CreateWebhookConfigRequest, context: Context
    ) -> pb.CreateWebhookConfigResponse:
        merchant_id = _merchant()
        draft = webhook_draft(request.webhook_config)
        await self._check(draft, FIELDS)
        scheme = signature_scheme(
            request.webhook_config.signature_scheme, "webhook_config.signature_scheme"
        )
        await self._store.check_count(merchant_id)
        webhook_id, secret = new_id(), new_secret(scheme or SignatureScheme.HMAC_SHA256)
        require_reachable(await self._ping(merchant_id, webhook_id, [secret], draft))
        row = await _complete(self._store.insert(webhook_id, merchant_id, draft, secret))
        return pb.CreateWebhookConfigResponse(
            webhook_config=webhook_config_message(row), **secret_fields(row, secret)
        )

    async def GetWebhookConfig(
        self, request: pb.GetWebhookConfigRequest, context: Context
    ) -> pb.GetWebhookConfigResponse:
        row = await self._store.get(_merchant(), request.id)
        return pb.GetWebhookConfigResponse(webhook_config=webhook_config_message(row))

    async def ListWebhookConfigs(
        self, request: pb.ListWebhookConfigsRequest, context: Context
    ) -> pb.ListWebhookConfigsResponse:
        merchant_id = _merchant()
        size = page_size(request.page_size, default=50, maximum=100)
        after = parse_page_token(request.page_token, UUID, "webhooks", merchant_id)
        rows = await self._store.list(merchant_id, after, size + 1)
        more = len(rows) > size
        return pb.ListWebhookConfigsResponse(
            webhook_configs=[webhook_config_message(row) for row in rows[:size]],
            next_page_token=page_token(rows[size - 1].id.hex, "webhooks", merchant_id)
            if more
            else "",
        )

    async def UpdateWebhookConfig(
        self, request: pb.UpdateWebhookConfigRequest, context: Context
    ) -> pb.UpdateWebhookConfigResponse:
        merchant_id = _merchant()
        fields = set(request.update_mask.paths)
        check_mask(fields, FIELDS)
        webhook_id, etag = request.webhook_config.id, request.webhook_config.etag
        current = await self._store.get(merchant_id, webhook_id)
        check_etag(current, etag)
        draft = webhook_draft(request.webhook_config, fields, current)
        await self._check(draft, fields, current.events)
        if draft.url != current.url:
            secrets = self._secrets(current)
            require_reachable(await self._ping(merchant_id, current.id, secrets, draft))
        row = await _complete(
            self._store.update(merchant_id, webhook_id, draft, fields=fields, etag=etag)
        )
        return pb.UpdateWebhookConfigResponse(webhook_config=webhook_config_message(row))

    async def DeleteWebhookConfig(
        self, request: pb.DeleteWebhookConfigRequest, context: Context
    ) -> pb.DeleteWebhookConfigResponse:
        cancelled = await _complete(self._store.delete(_merchant(), request.id))
        return pb.DeleteWebhookConfigResponse(cancelled_deliveries=cancelled)

    async def RotateSecret(
        self, request: pb.RotateSecretRequest, context: Context
    ) -> pb.RotateSecretResponse:
        merchant_id = _merchant()
        overlap = overlap_seconds(request)
        scheme = signature_scheme(request.signature_scheme, "signature_scheme")
        row, secret = await _complete(self._store.rotate(merchant_id, request.id, scheme, overlap))
        return pb.RotateSecretResponse(
            webhook_config=webhook_config_message(row), **secret_fields(row, secret)
        )

    async def PingWebhookConfig(
        self, request: pb.PingWebhookConfigRequest, context: Context
    ) -> pb.PingWebhookConfigResponse:
        merchant_id = _merchant()
        row = await self._store.get(merchant_id, request.id)
        result = await self._ping(merchant_id, row.id, self._secrets(row), row)
        if is_reachable(result):
            await self._store.close_breaker(row.id)
        return ping_message(result)

    async def ListEventTypes(
        self, request: pb.ListEventTypesRequest, context: Context
    ) -> pb.ListEventTypesResponse:
        principal().require(Scope.MANAGE)
        size = page_size(request.page_size, default=100, maximum=1000)
        after = parse_page_token(request.page_token, event_type_name, "event_types")
        rows = await list_event_types(self._sessions, after, size + 1)
        page = fitting([event_type_message(row) for row in rows[:size]])
        more = len(rows) > len(page)
        return pb.ListEventTypesResponse(
            event_types=page,
            next_page_token=page_token(rows[len(page) - 1].name, "event_types") if more else "",
        )

    async def _check(
        self, draft: WebhookConfig, fields: Collection[str], subscribed: Collection[str] = ()
    ) -> None:
        """Check the fields. Deprecated types among `subscribed` stay allowed."""
        unknown, deprecated = set[str](), set[str]()
        if "events" in fields:
            names = {name for name in draft.events if not is_event_type_prefix(name)}
            unknown = await self._event_types.unknown(names)
            deprecated = await self._event_types.deprecated(names.difference(subscribed))
        check_draft(draft, fields, self._url_policy, unknown, deprecated)

    async def _ping(
        self, merchant_id: str, webhook_id: UUID, secrets: Sequence[str], config: WebhookConfig
    ) -> AttemptResult:
        with self._ping_slots.slot(merchant_id):
            return await self._pinger(
                url=config.url,
                webhook_id=webhook_id,
                secrets=secrets,
                headers=config.headers,
                header_prefix=config.header_prefix,
            )

    def _secrets(self, row: WebhookConfig) -> list[str]:
        """Return the current secret and, during an overlap, the previous one."""
        records = [(row.secret_key_id, row.secret_ciphertext)]
        retired, expires_at = row.previous_secret_ciphertext, row.previous_secret_expires_at
        if retired is not None and expires_at is not None and expires_at > datetime.now(UTC):
            records.append((str(row.previous_secret_key_id), retired))
        return [self._keyring.decrypt(*record, row.id) for record in records]


def _merchant() -> str:
    caller = principal()
    caller.require(Scope.MANAGE)
    return caller.merchant()


async def _complete[T](change: Coroutine[Any, Any, T]) -> T:
    """Run a change to its end even if the caller disconnects, so that its result is definite."""
    return await asyncio.shield(asyncio.create_task(change))
