"""WebhookConfigService: a merchant's webhook configs.

The rules of the fields are in registration, the transactions in webhook_changes; no transaction is
open while a URL is pinged.
"""

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import grpc
from sqlalchemy import select

from core.encryption import KeyRing
from core.ids import new_id
from core.lifecycle import AttemptResult
from core.models import EventType, WebhookConfig
from core.postgres.protocols import Pool
from core.signing import SignatureScheme, new_secret, standard_secret
from core.urls import UrlPolicy
from postrider.v1 import (
    webhook_config_service_pb2,
    webhook_config_service_pb2_grpc,
)
from server.auth.principal import Scope
from server.auth.rate_limits import PingSlots
from server.database import Sessions
from server.event_types.cache import EventTypes, event_type_name, is_event_type_prefix
from server.event_types.convert import event_type_message
from server.rpc.authenticate import principal
from server.rpc.pagination import fitting, page_size, page_token, parse_page_token
from server.rpc.validation import check_mask
from server.webhooks.convert import (
    overlap_seconds,
    ping_message,
    signature_scheme,
    webhook_config_message,
    webhook_draft,
)
from server.webhooks.reachability import Pinger, is_reachable, require_reachable
from server.webhooks.rules import (
    UPDATABLE_FIELDS,
    WebhookDraft,
    check_draft,
    check_overlap,
)
from server.webhooks.store import WebhookChanges, check_etag, load

type Context = grpc.aio.ServicerContext[Any, Any]
pb = webhook_config_service_pb2


class WebhookConfigService(webhook_config_service_pb2_grpc.WebhookConfigServiceServicer):
    """Every method first asks for the scope and the merchant, then reads data."""

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
        self._changes = WebhookChanges(sessions, pool, keyring, max_webhooks_per_merchant)
        self._event_types = event_types
        self._keyring = keyring
        self._pinger = pinger
        self._ping_places = ping_slots
        self._url_policy = url_policy

    async def CreateWebhookConfig(
        self, request: pb.CreateWebhookConfigRequest, context: Context
    ) -> pb.CreateWebhookConfigResponse:
        merchant_id = _merchant()
        draft = webhook_draft(request.webhook_config)
        url = await self._checked_url(draft, UPDATABLE_FIELDS)
        scheme = signature_scheme(
            request.webhook_config.signature_scheme, "webhook_config.signature_scheme"
        )
        await self._changes.require_room(merchant_id)
        webhook_id, secret = new_id(), new_secret(scheme or SignatureScheme.HMAC_SHA256)
        require_reachable(await self._ping(merchant_id, webhook_id, url, [secret], draft))
        row = await _finish(self._changes.insert(webhook_id, merchant_id, url, draft, secret))
        return pb.CreateWebhookConfigResponse(
            webhook_config=webhook_config_message(row), **_shown_once(row, secret)
        )

    async def GetWebhookConfig(
        self, request: pb.GetWebhookConfigRequest, context: Context
    ) -> pb.GetWebhookConfigResponse:
        merchant_id = _merchant()
        async with self._sessions() as session:
            row = await load(session, merchant_id, request.id)
        return pb.GetWebhookConfigResponse(webhook_config=webhook_config_message(row))

    async def ListWebhookConfigs(
        self, request: pb.ListWebhookConfigsRequest, context: Context
    ) -> pb.ListWebhookConfigsResponse:
        merchant_id = _merchant()
        size = page_size(request.page_size, default=50, maximum=100)
        after = parse_page_token(request.page_token, UUID, "webhooks", merchant_id)
        query = select(WebhookConfig).where(
            WebhookConfig.merchant_id == merchant_id, WebhookConfig.deleted_at.is_(None)
        )
        if after is not None:
            query = query.where(WebhookConfig.id > after)
        async with self._sessions() as session:
            rows = (await session.scalars(query.order_by(WebhookConfig.id).limit(size + 1))).all()
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
        check_mask(fields, UPDATABLE_FIELDS)
        async with self._sessions() as session:
            current = await load(session, merchant_id, request.webhook_config.id)
        check_etag(current, request.webhook_config.etag)
        draft = webhook_draft(request.webhook_config)
        # These two must go together, so what is not changed of them is judged, too.
        if "headers" not in fields:
            draft = replace(draft, headers=current.headers)
        if "header_prefix" not in fields:
            draft = replace(draft, header_prefix=current.header_prefix)
        url = await self._checked_url(draft, fields, current.events)
        if "url" in fields and url != current.url:
            secrets = self._secrets(current)
            require_reachable(await self._ping(merchant_id, current.id, url, secrets, draft))
        row = await _finish(
            self._changes.update(
                merchant_id,
                request.webhook_config.id,
                url,
                draft,
                fields=fields,
                etag=request.webhook_config.etag,
            )
        )
        return pb.UpdateWebhookConfigResponse(webhook_config=webhook_config_message(row))

    async def DeleteWebhookConfig(
        self, request: pb.DeleteWebhookConfigRequest, context: Context
    ) -> pb.DeleteWebhookConfigResponse:
        cancelled = await _finish(self._changes.delete(_merchant(), request.id))
        return pb.DeleteWebhookConfigResponse(cancelled_deliveries=cancelled)

    async def RotateSecret(
        self, request: pb.RotateSecretRequest, context: Context
    ) -> pb.RotateSecretResponse:
        merchant_id = _merchant()
        overlap = overlap_seconds(request)
        check_overlap(overlap)
        scheme = signature_scheme(request.signature_scheme, "signature_scheme")
        row, secret = await _finish(self._changes.rotate(merchant_id, request.id, scheme, overlap))
        return pb.RotateSecretResponse(
            webhook_config=webhook_config_message(row), **_shown_once(row, secret)
        )

    async def PingWebhookConfig(
        self, request: pb.PingWebhookConfigRequest, context: Context
    ) -> pb.PingWebhookConfigResponse:
        merchant_id = _merchant()
        async with self._sessions() as session:
            row = await load(session, merchant_id, request.id)
        result = await self._ping(merchant_id, row.id, row.url, self._secrets(row), row)
        if is_reachable(result):
            await self._changes.found_working(row.id)
        return ping_message(result)

    async def ListEventTypes(
        self, request: pb.ListEventTypesRequest, context: Context
    ) -> pb.ListEventTypesResponse:
        principal().require(Scope.MANAGE)
        size = page_size(request.page_size, default=100, maximum=1000)
        after = parse_page_token(request.page_token, event_type_name, "event_types")
        query = select(EventType).order_by(EventType.name).limit(size + 1)
        if after is not None:
            query = query.where(EventType.name > after)
        async with self._sessions() as session:
            rows = (await session.scalars(query)).all()
        page = fitting([event_type_message(row) for row in rows[:size]])
        more = len(rows) > len(page)
        return pb.ListEventTypesResponse(
            event_types=page,
            next_page_token=page_token(rows[len(page) - 1].name, "event_types") if more else "",
        )

    async def _checked_url(
        self, draft: WebhookDraft, fields: Collection[str], subscribed: Collection[str] = ()
    ) -> str:
        unknown, deprecated = set[str](), set[str]()
        if "events" in fields:
            names = {name for name in draft.events if not is_event_type_prefix(name)}
            unknown = await self._event_types.unknown(names)
            deprecated = await self._event_types.deprecated(names.difference(subscribed))
        return check_draft(draft, fields, self._url_policy, unknown, deprecated)

    async def _ping(
        self,
        merchant_id: str,
        webhook_id: UUID,
        url: str,
        secrets: Sequence[str],
        options: WebhookDraft | WebhookConfig,
    ) -> AttemptResult:
        with self._ping_places.place(merchant_id):
            return await self._pinger(
                url=url,
                webhook_id=webhook_id,
                secrets=secrets,
                headers=options.headers,
                header_prefix=options.header_prefix,
            )

    def _secrets(self, row: WebhookConfig) -> list[str]:
        """What signs a ping: the present secret, and during an overlap the one before."""
        records = [(row.secret_key_id, row.secret_ciphertext)]
        retired, expires_at = row.previous_secret_ciphertext, row.previous_secret_expires_at
        if retired is not None and expires_at is not None and expires_at > datetime.now(UTC):
            records.append((str(row.previous_secret_key_id), retired))
        return [self._keyring.decrypt(*record, row.id) for record in records]


def _merchant() -> str:
    caller = principal()
    caller.require(Scope.MANAGE)
    return caller.merchant()


def _shown_once(row: WebhookConfig, secret: str) -> dict[str, str]:
    """The secret in both spellings; of a key pair nothing, since its private half stays here."""
    if row.public_key:
        return {}
    return {"secret": secret, "standard_webhooks_secret": standard_secret(secret)}


async def _finish[T](change: Coroutine[Any, Any, T]) -> T:
    """Run a change to its end even when the caller hangs up: its outcome is not left to chance."""
    return await asyncio.shield(asyncio.create_task(change))
