"""delivery_queue, finished_deliveries and attempts."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.lifecycle import Outcome
from core.models.base import Base


class QueuedDelivery(Base):
    """The open deliveries.

    There are no foreign keys, because a check per row would cost more than the insert. All writers
    are in core/queue.
    """

    __tablename__ = "delivery_queue"
    __table_args__ = (
        CheckConstraint("state IN ('ready', 'parked', 'leased', 'blocked')", name="state_open"),
        CheckConstraint(
            "(state = 'leased') = (lease_id IS NOT NULL)"
            " AND (lease_id IS NULL) = (lease_until IS NULL)",
            name="lease_whole",
        ),
        CheckConstraint("attempt_count >= 0 AND reclaim_count >= 0", name="counts"),
        # Blocked deliveries are due at infinity, so that no index by due time finds them.
        CheckConstraint(
            "(state = 'blocked') = (due_at = 'infinity')"
            " AND (state <> 'blocked' OR ordering_key IS NOT NULL)"
            " AND (ordering_key IS NULL) = (ordering_position IS NULL)",
            name="order_whole",
        ),
        # Claims read this in the order of due times. It has no parked or leased rows.
        Index("delivery_queue_due", "due_at", postgresql_where=text("state = 'ready'")),
        Index("delivery_queue_lease", "lease_until", postgresql_where=text("state = 'leased'")),
        # Counts and lists the ready and leased deliveries of a config.
        Index(
            "delivery_queue_of_webhook",
            "webhook_id",
            "due_at",
            postgresql_where=text("state <> 'parked'"),
        ),
        # The backlog of a config, oldest first.
        Index(
            "delivery_queue_parked",
            "webhook_id",
            "id",
            postgresql_where=text("state = 'parked'"),
        ),
        # Unique, so that the database refuses a second unblocked delivery of a chain.
        Index(
            "delivery_queue_first",
            "webhook_id",
            "ordering_key",
            unique=True,
            postgresql_where=text("ordering_key IS NOT NULL AND state <> 'blocked'"),
        ),
        # The blocked deliveries of a chain in their order, and of a config.
        Index(
            "delivery_queue_blocked",
            "webhook_id",
            "ordering_key",
            "ordering_position",
            unique=True,
            postgresql_where=text("state = 'blocked'"),
        ),
        Index(
            "delivery_queue_blocked_of_webhook",
            "webhook_id",
            "id",
            postgresql_where=text("state = 'blocked'"),
        ),
        # Lists the waiting deliveries of an event without reading backlogs. The expression makes
        # sure that no other statement uses this index.
        Index(
            "delivery_queue_waiting_of_event",
            "event_id",
            postgresql_where=text("greatest(state) IN ('parked', 'blocked')"),
        ),
        # Finds open redeliveries of an event, which are few.
        Index(
            "delivery_queue_redeliveries",
            "event_id",
            postgresql_where=text("redelivery_of IS NOT NULL"),
        ),
        {
            "comment": "Open deliveries; a row leaves when its delivery is finished",
            # Every row is updated and then deleted, so pages keep free space and vacuum runs early.
            "postgresql_with": {
                "fillfactor": "70",
                "autovacuum_vacuum_scale_factor": "0.01",
                "autovacuum_vacuum_threshold": "1000",
                "autovacuum_vacuum_cost_delay": "1",
            },
        },
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(comment="ready, parked, leased or blocked")
    due_at: Mapped[datetime] = mapped_column(
        server_default=func.now(), comment="Not attempted before; database time"
    )
    lease_until: Mapped[datetime | None] = mapped_column(comment="When the lease may be taken back")
    lease_id: Mapped[UUID | None] = mapped_column(comment="Fence: who settles must know it")
    webhook_id: Mapped[UUID] = mapped_column()
    event_id: Mapped[UUID] = mapped_column()
    merchant_id: Mapped[str] = mapped_column()
    event_type: Mapped[str] = mapped_column()
    attempt_count: Mapped[int] = mapped_column(
        server_default=text("0"), comment="Attempts on record"
    )
    reclaim_count: Mapped[int] = mapped_column(
        server_default=text("0"), comment="Leases that ended without a result"
    )
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    redelivery_of: Mapped[UUID | None] = mapped_column(
        comment="The delivery it repeats at somebody's request"
    )
    ordering_key: Mapped[str | None] = mapped_column(
        comment="Goes in order with others of this key and config; null: in none"
    )
    ordering_position: Mapped[int | None] = mapped_column(
        BigInteger, comment="Its place in that order"
    )
    fault_count: Mapped[int] = mapped_column(
        server_default=text("0"), comment="Attempts on record that a fault of ours broke"
    )


class FinishedDelivery(Base):
    """Deliveries in a final state. Append-only, partitioned like events."""

    __tablename__ = "finished_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('delivered', 'failed', 'cancelled')", name="state_final"),
        Index("finished_deliveries_of_merchant", "merchant_id", "id"),
        Index("finished_deliveries_of_webhook", "webhook_id", "id"),
        Index("finished_deliveries_of_event", "event_id"),
        Index("finished_deliveries_of_type", "merchant_id", "event_type", "id"),
        # Failed deliveries are rare, and people search for them.
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

    __mapper_args__ = {"primary_key": ["id"]}  # noqa: RUF012 - required by SQLAlchemy

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


_OUTCOMES = ", ".join(f"'{outcome}'" for outcome in Outcome)


class Attempt(Base):
    """HTTP requests. Append-only, partitioned like events, and keyed by delivery."""

    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint("number >= 1", name="number_counted"),
        CheckConstraint(f"outcome IN ({_OUTCOMES})", name="outcome_known"),
        # The live tail reads attempts in the order of commits.
        Index("attempts_recorded", "recorded_xid"),
        {
            "comment": "HTTP requests made for deliveries; append-only",
            "postgresql_partition_by": "LIST (kept)",
        },
    )

    __mapper_args__ = {"primary_key": ["delivery_id", "number"]}  # noqa: RUF012 - required by SQLAlchemy

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
