"""events, event_types and idempotency_keys."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, LargeBinary, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.models.base import Base


class Event(Base):
    """Published events. Append-only, partitioned by day through the time in their UUIDv7 ids.

    The id is the primary key of each partition, because one of the whole table would need `kept`.
    """

    __tablename__ = "events"
    __table_args__ = (
        Index("events_of_merchant", "merchant_id", "id"),
        {
            "comment": "Published events; append-only",
            "postgresql_partition_by": "LIST (kept)",
        },
    )

    __mapper_args__ = {"primary_key": ["id"]}  # noqa: RUF012 - required by SQLAlchemy

    id: Mapped[UUID] = mapped_column(comment="UUIDv7; seen as webhook-id")
    merchant_id: Mapped[str] = mapped_column()
    type: Mapped[str] = mapped_column()
    content_type: Mapped[str] = mapped_column()
    payload: Mapped[bytes] = mapped_column(LargeBinary, comment="Sent byte for byte")
    delivery_count: Mapped[int] = mapped_column(comment="Webhook configs that wanted it")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    not_before: Mapped[datetime | None] = mapped_column(
        comment="Delivered no earlier; null: at once"
    )
    ordering_key: Mapped[str | None] = mapped_column(
        comment="In order with others of this key; null: in none"
    )
    kept: Mapped[bool | None] = mapped_column(
        server_default=text("false"),
        comment="Whether it outlives its day; null: from before there were days",
    )
    trace_parent: Mapped[str | None] = mapped_column(
        comment="W3C traceparent of the call that published it; null: it had none"
    )


class EventType(Base):
    __tablename__ = "event_types"
    __table_args__ = (
        CheckConstraint(
            "name ~ '^[a-z0-9_]+([.][a-z0-9_]+)+$' AND length(name) <= 128", name="name_form"
        ),
        {"comment": "Kinds of event that may be published and subscribed to"},
    )

    name: Mapped[str] = mapped_column(primary_key=True, comment="Dotted lower-case name")
    description: Mapped[str] = mapped_column(server_default="")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    json_schema: Mapped[str] = mapped_column(
        server_default="", comment="JSON Schema of its payloads; empty: none"
    )
    enforce_schema: Mapped[bool] = mapped_column(
        server_default=text("false"), comment="Whether publish refuses what does not match"
    )
    example: Mapped[str] = mapped_column(server_default="", comment="A payload; empty: none")
    deprecated: Mapped[bool] = mapped_column(
        server_default=text("false"), comment="No new subscriptions"
    )


class IdempotencyKey(Base):
    __tablename__ = "idempotency_keys"
    __table_args__ = ({"comment": "Makes publishing safe to repeat; one key, one event"},)

    merchant_id: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    content_hash: Mapped[bytes] = mapped_column(
        LargeBinary, comment="SHA-256 of type, content type and payload"
    )
    event_id: Mapped[UUID] = mapped_column()
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)
