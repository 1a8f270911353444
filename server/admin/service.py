"""AdminService: the calls of operators, across merchants. Each duty has its module."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import grpc

from core import queue
from core.postgres.protocols import Pool
from postrider.v1 import admin_service_pb2, admin_service_pb2_grpc
from server.admin import activation
from server.admin.audit_log import AuditFilter, list_audit_entries
from server.admin.convert import (
    audit_entry_message,
    deactivation_reason_filter,
    failed_filter,
    invariant_budget,
    invariant_check_message,
    queue_status_message,
)
from server.admin.erasure import erase_merchant
from server.admin.queue_status import queue_status
from server.admin.redelivery import count_failed, parse_position, position_text, redeliver_failed
from server.auth.principal import Scope
from server.database import Sessions
from server.event_types.rules import event_type_draft, event_type_message
from server.event_types.store import EventTypeRegister, EventTypes
from server.notify import Notifier
from server.rpc.authenticate import principal
from server.rpc.ids import check_merchant_id, optional_id_of
from server.rpc.pagination import page_size, page_token, parse_page_token
from server.rpc.times import time_filter, time_range
from server.webhooks.rules import webhook_config_message

type Context = grpc.aio.ServicerContext[Any, Any]
pb = admin_service_pb2


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Every method needs the scope `webhooks:admin`, and no merchant."""

    def __init__(self, sessions: Sessions, pool: Pool, notifier: Notifier, event_types: EventTypes):
        self._sessions = sessions
        self._pool = pool
        self._notifier = notifier
        self._register = EventTypeRegister(sessions, event_types)

    async def ReactivateWebhookConfig(
        self, request: pb.ReactivateWebhookConfigRequest, context: Context
    ) -> pb.ReactivateWebhookConfigResponse:
        _require_admin()
        row = await activation.reactivate(self._sessions, request.id)
        self._notifier.notify()
        return pb.ReactivateWebhookConfigResponse(webhook_config=webhook_config_message(row))

    async def DeactivateWebhookConfig(
        self, request: pb.DeactivateWebhookConfigRequest, context: Context
    ) -> pb.DeactivateWebhookConfigResponse:
        _require_admin()
        activation.check_reason(request.reason)
        row = await activation.deactivate(self._sessions, request.id, request.reason)
        return pb.DeactivateWebhookConfigResponse(webhook_config=webhook_config_message(row))

    async def ListAllWebhookConfigs(
        self, request: pb.ListAllWebhookConfigsRequest, context: Context
    ) -> pb.ListAllWebhookConfigsResponse:
        _require_admin()
        size = page_size(request.page_size, default=50, maximum=100)
        identity = (
            "all_webhooks",
            request.merchant_id,
            request.inactive_only,
            request.deactivation_reason,
        )
        before = parse_page_token(request.page_token, UUID, *identity)
        if request.merchant_id:
            check_merchant_id(request.merchant_id)
        wanted = activation.WebhookConfigFilter(
            request.merchant_id,
            request.inactive_only,
            deactivation_reason_filter(request.deactivation_reason),
            before,
        )
        rows = await activation.list_webhook_configs(self._sessions, wanted, size + 1)
        page = rows[:size]
        return pb.ListAllWebhookConfigsResponse(
            webhook_configs=[webhook_config_message(row) for row in page],
            next_page_token=page_token(page[-1].id.hex, *identity) if len(rows) > size else "",
        )

    async def RedeliverDeliveries(
        self, request: pb.RedeliverDeliveriesRequest, context: Context
    ) -> pb.RedeliverDeliveriesResponse:
        _require_admin()
        identity = (
            "redeliveries",
            str(time_filter(request, "start_time")),
            str(time_filter(request, "end_time")),
            request.merchant_id,
            request.webhook_id,
            tuple(request.outcomes),
            request.dry_run,
        )
        after = parse_page_token(request.page_token, parse_position, *identity) or queue.BEGINNING
        wanted = failed_filter(request, datetime.now(UTC))
        if request.dry_run:
            page = await count_failed(self._pool, wanted, after)
        else:
            page = await redeliver_failed(self._sessions, wanted, after, self._notifier.notify)
        return pb.RedeliverDeliveriesResponse(
            redelivered=page.redelivered,
            already_redelivered=page.already_redelivered,
            skipped=page.skipped,
            next_page_token=page_token(position_text(page.end), *identity) if page.end else "",
        )

    async def CreateEventType(
        self, request: pb.CreateEventTypeRequest, context: Context
    ) -> pb.CreateEventTypeResponse:
        _require_admin()
        row = await self._register.create(event_type_draft(request.event_type))
        return pb.CreateEventTypeResponse(event_type=event_type_message(row))

    async def UpdateEventType(
        self, request: pb.UpdateEventTypeRequest, context: Context
    ) -> pb.UpdateEventTypeResponse:
        _require_admin()
        draft = event_type_draft(request.event_type)
        row = await self._register.update(draft, set(request.update_mask.paths))
        return pb.UpdateEventTypeResponse(event_type=event_type_message(row))

    async def GetQueueStatus(
        self, request: pb.GetQueueStatusRequest, context: Context
    ) -> pb.GetQueueStatusResponse:
        _require_admin()
        webhook_id = optional_id_of("wh", request.webhook_id, "webhook_id")
        total, webhooks = await queue_status(self._pool, webhook_id, request.top)
        return pb.GetQueueStatusResponse(
            total=queue_status_message(total),
            webhooks=[queue_status_message(status) for status in webhooks],
        )

    async def CheckInvariants(
        self, request: pb.CheckInvariantsRequest, context: Context
    ) -> pb.CheckInvariantsResponse:
        _require_admin()
        budget_seconds = invariant_budget(request)
        findings = await queue.check_invariants(self._pool, budget_seconds)
        return pb.CheckInvariantsResponse(
            checks=[invariant_check_message(finding) for finding in findings]
        )

    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: Context
    ) -> pb.ListAuditEntriesResponse:
        _require_admin()
        size = page_size(request.page_size, default=50, maximum=100)
        start, end = time_range(request)
        identity = ("audit_entries", request.actor, request.resource, str(start), str(end))
        before = parse_page_token(request.page_token, UUID, *identity)
        wanted = AuditFilter(request.actor, request.resource, start, end, before)
        rows = await list_audit_entries(self._sessions, wanted, size + 1)
        page = rows[:size]
        return pb.ListAuditEntriesResponse(
            audit_entries=[audit_entry_message(row) for row in page],
            next_page_token=page_token(page[-1].id.hex, *identity) if len(rows) > size else "",
        )

    async def EraseMerchant(
        self, request: pb.EraseMerchantRequest, context: Context
    ) -> pb.EraseMerchantResponse:
        _require_admin()
        check_merchant_id(request.merchant_id)
        erased = await erase_merchant(self._sessions, self._pool, request.merchant_id)
        return pb.EraseMerchantResponse(
            deleted_webhook_configs=erased.webhook_configs, erased_events=erased.events
        )


def _require_admin() -> None:
    principal().require(Scope.ADMIN)
