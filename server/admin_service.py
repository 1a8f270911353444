"""AdminService: what operators change, across merchants."""

from typing import Any

import grpc
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from core.errors import AlreadyExists, InvalidArgument
from core.ids import format_id
from core.models import EventType, WebhookConfig
from postrider.v1 import admin_service_pb2, admin_service_pb2_grpc
from server import convert
from server.audit import record_change
from server.authentication import principal
from server.database import Sessions
from server.event_types import is_event_type_name
from server.hint import Hints
from server.principal import Scope
from server.registration import description_violations

type Context = grpc.aio.ServicerContext[Any, Any]
pb = admin_service_pb2


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Every method needs the scope `webhooks:admin` and no merchant."""

    def __init__(self, sessions: Sessions, hints: Hints):
        self._sessions = sessions
        self._hints = hints

    async def ReactivateWebhookConfig(
        self, request: pb.ReactivateWebhookConfigRequest, context: Context
    ) -> pb.ReactivateWebhookConfigResponse:
        principal().require(Scope.ADMIN)
        webhook_id = convert.id_of("wh", request.id)
        async with self._sessions.begin() as session:
            row = await session.scalar(
                select(WebhookConfig)
                .where(WebhookConfig.id == webhook_id, WebhookConfig.deleted_at.is_(None))
                .with_for_update()
            )
            if row is None:
                raise convert.not_found("wh", request.id)
            if not row.active:
                row.active = True
                row.deactivation_reason = None
                row.consecutive_failures = 0
                row.version += 1
                row.updated_at = func.now()
                record_change(
                    session,
                    action="ReactivateWebhookConfig",
                    resource=format_id("wh", row.id),
                    merchant_id=row.merchant_id,
                    changed_fields=("active", "consecutive_failures", "deactivation_reason"),
                )
                await session.flush()
                await session.refresh(row)
        self._hints.give()
        return pb.ReactivateWebhookConfigResponse(
            webhook_config=convert.webhook_config_message(row)
        )

    async def CreateEventType(
        self, request: pb.CreateEventTypeRequest, context: Context
    ) -> pb.CreateEventTypeResponse:
        principal().require(Scope.ADMIN)
        name, description = request.event_type.name, request.event_type.description
        if not is_event_type_name(name):
            raise InvalidArgument.of(
                "event_type.name",
                "must be words of a-z 0-9 _ joined by dots, such as payment.succeeded, at most 128 "
                "characters",
                reason="EVENT_TYPE_NAME_INVALID",
            )
        if violations := description_violations("event_type.description", description):
            raise InvalidArgument(*violations)
        row = EventType(name=name, description=description)
        try:
            async with self._sessions.begin() as session:
                session.add(row)
                record_change(
                    session,
                    action="CreateEventType",
                    resource=name,
                    merchant_id=None,
                    changed_fields=("name", "description"),
                )
                await session.flush()
                await session.refresh(row)
        except IntegrityError:
            raise AlreadyExists(
                f"the event type {name} is registered already", reason="EVENT_TYPE_EXISTS"
            ) from None
        return pb.CreateEventTypeResponse(event_type=convert.event_type_message(row))
