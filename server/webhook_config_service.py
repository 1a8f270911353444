"""WebhookConfigService: a merchant's webhook configs.

No transaction is open while a URL is pinged; each change is one transaction with its audit entry.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any
from uuid import UUID

import grpc
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core import queue
from core.errors import Aborted, FailedPrecondition, QuotaExceeded
from core.ids import format_id, new_id
from core.keyring import KeyRing
from core.lifecycle import DeactivationReason
from core.models import EventType, WebhookConfig
from core.signing import new_secret, standard_secret
from core.urls import UrlPolicy
from postrider.v1 import (
    webhook_config_pb2,
    webhook_config_service_pb2,
    webhook_config_service_pb2_grpc,
)
from server import convert
from server.audit import record_change
from server.authentication import principal
from server.database import Sessions, driver_connection
from server.event_types import EventTypes, event_type_name
from server.pagination import page_size, page_token, parse_page_token
from server.ping import Pinger, require_reachable
from server.principal import Scope
from server.registration import UPDATABLE_FIELDS, WebhookDraft, check_draft, check_mask

type Context = grpc.aio.ServicerContext[Any, Any]
pb = webhook_config_service_pb2


class WebhookConfigService(webhook_config_service_pb2_grpc.WebhookConfigServiceServicer):
    """Every method first asks for the scope and the merchant, then reads data."""

    def __init__(
        self,
        sessions: Sessions,
        event_types: EventTypes,
        keyring: KeyRing,
        pinger: Pinger,
        url_policy: UrlPolicy,
        max_webhooks_per_merchant: int,
    ):
        self._sessions = sessions
        self._event_types = event_types
        self._keyring = keyring
        self._pinger = pinger
        self._url_policy = url_policy
        self._max_webhooks = max_webhooks_per_merchant

    async def CreateWebhookConfig(
        self, request: pb.CreateWebhookConfigRequest, context: Context
    ) -> pb.CreateWebhookConfigResponse:
        merchant_id = _merchant()
        draft = convert.webhook_draft(request.webhook_config)
        url = await self._checked_url(draft, UPDATABLE_FIELDS)
        async with self._sessions() as session:
            await self._require_room(session, merchant_id)
        webhook_id, secret = new_id(), new_secret()
        require_reachable(await self._pinger(url=url, webhook_id=webhook_id, secret=secret))
        row = await _finish(self._insert(webhook_id, merchant_id, url, draft, secret))
        return pb.CreateWebhookConfigResponse(
            webhook_config=convert.webhook_config_message(row),
            secret=secret,
            standard_webhooks_secret=standard_secret(secret),
        )

    async def GetWebhookConfig(
        self, request: pb.GetWebhookConfigRequest, context: Context
    ) -> pb.GetWebhookConfigResponse:
        merchant_id = _merchant()
        async with self._sessions() as session:
            row = await _load(session, merchant_id, request.id)
        return pb.GetWebhookConfigResponse(webhook_config=convert.webhook_config_message(row))

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
            webhook_configs=[convert.webhook_config_message(row) for row in rows[:size]],
            next_page_token=page_token(rows[size - 1].id.hex, "webhooks", merchant_id)
            if more
            else "",
        )

    async def UpdateWebhookConfig(
        self, request: pb.UpdateWebhookConfigRequest, context: Context
    ) -> pb.UpdateWebhookConfigResponse:
        merchant_id = _merchant()
        fields = set(request.update_mask.paths)
        check_mask(fields)
        async with self._sessions() as session:
            current = await _load(session, merchant_id, request.webhook_config.id)
        _check_etag(current, request.webhook_config.etag)
        draft = convert.webhook_draft(request.webhook_config)
        url = await self._checked_url(draft, fields)
        if "url" in fields and url != current.url:
            secret = self._secret(current)
            require_reachable(await self._pinger(url=url, webhook_id=current.id, secret=secret))
        row = await _finish(self._update(merchant_id, request.webhook_config, url, draft, fields))
        return pb.UpdateWebhookConfigResponse(webhook_config=convert.webhook_config_message(row))

    async def DeleteWebhookConfig(
        self, request: pb.DeleteWebhookConfigRequest, context: Context
    ) -> pb.DeleteWebhookConfigResponse:
        cancelled = await _finish(self._delete(_merchant(), request.id))
        return pb.DeleteWebhookConfigResponse(cancelled_deliveries=cancelled)

    async def PingWebhookConfig(
        self, request: pb.PingWebhookConfigRequest, context: Context
    ) -> pb.PingWebhookConfigResponse:
        merchant_id = _merchant()
        async with self._sessions() as session:
            row = await _load(session, merchant_id, request.id)
        secret = self._secret(row)
        return convert.ping_message(
            await self._pinger(url=row.url, webhook_id=row.id, secret=secret)
        )

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
        more = len(rows) > size
        return pb.ListEventTypesResponse(
            event_types=[convert.event_type_message(row) for row in rows[:size]],
            next_page_token=page_token(rows[size - 1].name, "event_types") if more else "",
        )

    async def _checked_url(self, draft: WebhookDraft, fields: Any) -> str:
        unknown = await self._event_types.unknown(draft.events) if "events" in fields else set()
        return check_draft(draft, fields, self._url_policy, unknown)

    async def _require_room(self, session: AsyncSession, merchant_id: str) -> None:
        count = await session.scalar(
            select(func.count())
            .select_from(WebhookConfig)
            .where(WebhookConfig.merchant_id == merchant_id, WebhookConfig.deleted_at.is_(None))
        )
        if (count or 0) >= self._max_webhooks:
            raise QuotaExceeded(
                f"this merchant has {count} webhook configs, the most there can be: delete one, or "
                "add event types to an existing one",
                reason="WEBHOOK_CONFIG_LIMIT",
                subject=f"merchant:{merchant_id}",
            )

    async def _insert(
        self, webhook_id: UUID, merchant_id: str, url: str, draft: WebhookDraft, secret: str
    ) -> WebhookConfig:
        key_id, ciphertext = self._keyring.encrypt(secret, webhook_id)
        async with self._sessions.begin() as session:
            # One create of a merchant at a time from here on, in any process: the count holds.
            await session.execute(
                select(func.pg_advisory_xact_lock(func.hashtextextended(merchant_id, 0)))
            )
            await self._require_room(session, merchant_id)
            row = WebhookConfig(
                id=webhook_id,
                merchant_id=merchant_id,
                url=url,
                events=list(draft.events),
                description=draft.description,
                secret_ciphertext=ciphertext,
                secret_key_id=key_id,
                active=draft.active,
                deactivation_reason=None if draft.active else DeactivationReason.PAUSED,
                retry_schedule_seconds=list(draft.retry_schedule_seconds),
            )
            session.add(row)
            record_change(
                session,
                action="CreateWebhookConfig",
                resource=format_id("wh", webhook_id),
                merchant_id=merchant_id,
                changed_fields=UPDATABLE_FIELDS,
            )
            await session.flush()
            await session.refresh(row)
        return row

    async def _update(
        self,
        merchant_id: str,
        message: webhook_config_pb2.WebhookConfig,
        url: str,
        draft: WebhookDraft,
        fields: set[str],
    ) -> WebhookConfig:
        async with self._sessions.begin() as session:
            row = await _load(session, merchant_id, message.id, lock=True)
            _check_etag(row, message.etag)
            changed = _changes(row, url, draft, fields)
            for column, value in changed.items():
                setattr(row, column, value)
            if not changed:
                return row
            row.version += 1
            row.updated_at = func.now()
            record_change(
                session,
                action="UpdateWebhookConfig",
                resource=format_id("wh", row.id),
                merchant_id=merchant_id,
                # The one column that is not named like its field.
                changed_fields=(column.removesuffix("_seconds") for column in changed),
            )
            await session.flush()
            if changed.get("active") is False:
                await queue.park_webhooks(await driver_connection(session), [row.id])
            await session.refresh(row)
        return row

    async def _delete(self, merchant_id: str, text: str) -> int:
        async with self._sessions.begin() as session:
            row = await _load(session, merchant_id, text, lock=True)
            row.deleted_at = func.now()
            row.version += 1
            # Nothing will be signed for it again.
            row.secret_ciphertext = b""
            record_change(
                session,
                action="DeleteWebhookConfig",
                resource=format_id("wh", row.id),
                merchant_id=merchant_id,
            )
            await session.flush()
            return await queue.cancel_webhook(await driver_connection(session), row.id)

    def _secret(self, row: WebhookConfig) -> str:
        return self._keyring.decrypt(row.secret_key_id, row.secret_ciphertext, row.id)


def _merchant() -> str:
    caller = principal()
    caller.require(Scope.MANAGE)
    return caller.merchant()


async def _load(
    session: AsyncSession, merchant_id: str, text: str, *, lock: bool = False
) -> WebhookConfig:
    query = select(WebhookConfig).where(
        WebhookConfig.id == convert.id_of("wh", text),
        WebhookConfig.merchant_id == merchant_id,
        WebhookConfig.deleted_at.is_(None),
    )
    row = await session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise convert.not_found("wh", text)
    return row


def _check_etag(row: WebhookConfig, etag: str) -> None:
    if etag and etag != convert.etag_of(row):
        raise Aborted(
            "the webhook config has changed since it was read: get it again and repeat the change "
            "with its new etag",
            reason="ETAG_MISMATCH",
        )


def _changes(row: WebhookConfig, url: str, draft: WebhookDraft, fields: set[str]) -> dict[str, Any]:
    """New column values, only where they differ; FailedPrecondition where the merchant may not."""
    wanted: dict[str, Any] = {}
    if "url" in fields:
        wanted["url"] = url
    if "events" in fields:
        wanted["events"] = list(draft.events)
    if "description" in fields:
        wanted["description"] = draft.description
    if "retry_schedule" in fields:
        wanted["retry_schedule_seconds"] = list(draft.retry_schedule_seconds)
    if "active" in fields and draft.active != row.active:
        if row.deactivation_reason == DeactivationReason.FAILURES:
            raise FailedPrecondition(
                "this webhook config went inactive after consecutive failed deliveries; mend the "
                "receiver, then ask the platform's operators to reactivate it",
                reason="WEBHOOK_CONFIG_DEACTIVATED",
            )
        wanted["active"] = draft.active
        wanted["deactivation_reason"] = None if draft.active else DeactivationReason.PAUSED
    return {column: value for column, value in wanted.items() if getattr(row, column) != value}


async def _finish[T](change: Coroutine[Any, Any, T]) -> T:
    """Run a change to its end even when the caller hangs up: its outcome is not left to chance."""
    return await asyncio.shield(asyncio.create_task(change))
