"""retention_runs: when retention ran, and what it did."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Index, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from core.models.base import Base


class RetentionRun(Base):
    __tablename__ = "retention_runs"
    __table_args__ = (
        Index(
            "retention_runs_completed",
            "completed_at",
            postgresql_where=text("completed_at IS NOT NULL"),
        ),
        Index(
            "retention_runs_removed",
            "removed_before",
            postgresql_where=text("removed_before IS NOT NULL"),
        ),
        {"comment": "When retention ran, and what it did; the last 90 days"},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    began_at: Mapped[datetime] = mapped_column(server_default=func.now())
    completed_at: Mapped[datetime | None] = mapped_column(comment="Null: under way, or broken off")
    removed_before: Mapped[datetime | None] = mapped_column(
        comment="Deliveries finished before may be gone; null: none are"
    )
    actor: Mapped[str] = mapped_column(comment="engine, or who ran the command")
    done: Mapped[Any] = mapped_column(
        JSONB, server_default=text("'{}'"), comment="Counts of what was made, moved and removed"
    )
