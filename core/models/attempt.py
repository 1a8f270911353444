"""attempts: one HTTP request each; append-only, in parts like events."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import Outcome
from core.models.base import Base

_OUTCOMES = ", ".join(f"'{outcome}'" for outcome in Outcome)


class Attempt(Base):
    """The delivery comes first in the key: attempts are read by delivery."""

    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint("number >= 1", name="number_counted"),
        CheckConstraint(f"outcome IN ({_OUTCOMES})", name="outcome_known"),
        # For the live tail, which follows what is committed and not what was begun.
        Index("attempts_recorded", "recorded_xid"),
        {
            "comment": "HTTP requests made for deliveries; append-only",
            "postgresql_partition_by": "LIST (kept)",
        },
    )

    __mapper_args__ = {"primary_key": ["delivery_id", "number"]}  # noqa: RUF012 - SQLAlchemy wants it so

    delivery_id: Mapped[UUID] = mapped_column()
    number: Mapped[int] = mapped_column(comment="1 for the first")
    outcome: Mapped[str] = mapped_column()
    status_code: Mapped[int | None] = mapped_column(comment="HTTP status, when there was an answer")
    detail: Mapped[str] = mapped_column(comment="The outcome in words, for people")
    started_at: Mapped[datetime] = mapped_column()
    duration_us: Mapped[int] = mapped_column(comment="To the status line or the failure")
    dns_us: Mapped[int | None] = mapped_column(comment="Null: the connection was there already")
    connect_us: Mapped[int | None] = mapped_column(comment="TCP and TLS; null: as for dns_us")
    first_byte_us: Mapped[int | None] = mapped_column(comment="From request sent to status line")
    remote_address: Mapped[str | None] = mapped_column(comment="What was dialled")
    response_excerpt: Mapped[str] = mapped_column(
        server_default="", comment="The first 1 KiB of the body, escaped"
    )
    recorded_xid: Mapped[int | None] = mapped_column(
        BigInteger,
        server_default=text("pg_current_xact_id()::text::bigint"),
        comment="Transaction that recorded it; null: before there was this",
    )
    kept: Mapped[bool | None] = mapped_column(
        server_default=text("false"),
        comment="Whether it outlives its day; null: from before there were days",
    )
    tls_us: Mapped[int | None] = mapped_column(
        comment="Of connect_us, TLS; null: as for dns_us, or it never began"
    )
