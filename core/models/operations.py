"""audit_entries and retention_runs."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Index, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from core.models.base import Base


class AuditEntry(Base):
    """A change by a caller or command, or a refused call of a known caller."""

    __tablename__ = "audit_entries"
    __table_args__ = (
        Index("audit_entries_of_resource", "resource", "id"),
        Index("audit_entries_of_actor", "actor", "id"),
        # Erasing a merchant removes personal data from its entries.
        Index(
            "audit_entries_of_merchant",
            "merchant_id",
            "id",
            postgresql_where=text("merchant_id IS NOT NULL"),
        ),
        {"comment": "Who changed what, and who was refused what; append-only"},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    actor: Mapped[str] = mapped_column(
        comment="The sub claim of the caller's token, or the name in its certificate"
    )
    merchant_id: Mapped[str | None] = mapped_column(
        comment="Whose resource, of a refusal whose caller; null: nobody's"
    )
    action: Mapped[str] = mapped_column(comment="The RPC, such as UpdateWebhookConfig")
    resource: Mapped[str] = mapped_column(comment="Id or name of what was changed, or was to be")
    result: Mapped[str] = mapped_column(comment="OK, or the reason of the refusal")
    changed_fields: Mapped[list[str]] = mapped_column(
        ARRAY(Text), server_default=text("'{}'"), comment="Names only, never values"
    )
    request_id: Mapped[str] = mapped_column(comment="The same as in the log line of the RPC")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    comment: Mapped[str] = mapped_column(
        server_default="", comment="The reason the caller gave, where one is asked for"
    )
    caller_address: Mapped[str] = mapped_column(
        server_default="", comment="Host and port of the caller, or of the gateway before it"
    )
    user_agent: Mapped[str] = mapped_column(
        server_default="", comment="What the caller's library calls itself"
    )


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
