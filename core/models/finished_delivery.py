"""finished_deliveries: deliveries in a final state; append-only, in parts like events."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.models.base import Base


class FinishedDelivery(Base):
    __tablename__ = "finished_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('delivered', 'failed', 'cancelled')", name="state_final"),
        Index("finished_deliveries_of_merchant", "merchant_id", "id"),
        Index("finished_deliveries_of_webhook", "webhook_id", "id"),
        Index("finished_deliveries_of_event", "event_id"),
        Index("finished_deliveries_of_type", "merchant_id", "event_type", "id"),
        # What went wrong is rare among what went well, and what people look for.
        Index(
            "finished_deliveries_undelivered",
            "merchant_id",
            "id",
            postgresql_where=text("state <> 'delivered'"),
        ),
        {
            "comment": "Deliveries in a final state; append-only",
            "postgresql_partition_by": "LIST (kept)",
        },
    )

    __mapper_args__ = {"primary_key": ["id"]}  # noqa: RUF012 - SQLAlchemy wants it so

    id: Mapped[UUID] = mapped_column()
    state: Mapped[str] = mapped_column(comment="delivered, failed or cancelled")
    webhook_id: Mapped[UUID] = mapped_column()
    event_id: Mapped[UUID] = mapped_column()
    merchant_id: Mapped[str] = mapped_column()
    event_type: Mapped[str] = mapped_column()
    attempt_count: Mapped[int] = mapped_column()
    created_at: Mapped[datetime] = mapped_column()
    finished_at: Mapped[datetime] = mapped_column(server_default=func.now())
    redelivery_of: Mapped[UUID | None] = mapped_column(
        comment="The delivery it repeats at somebody's request"
    )
    kept: Mapped[bool | None] = mapped_column(
        server_default=text("false"),
        comment="Whether it outlives its day; null: from before there were days",
    )
