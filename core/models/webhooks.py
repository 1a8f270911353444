"""webhook_configs: registered URLs with secrets and filters."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import ARRAY, CheckConstraint, Double, Index, LargeBinary, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from core.models.base import Base


class WebhookConfig(Base):
    """A row stays after deletion, because the history of deliveries refers to it."""

    __tablename__ = "webhook_configs"
    __table_args__ = (
        CheckConstraint("merchant_id ~ '^[A-Za-z0-9_-]{1,64}$'", name="merchant_id_form"),
        CheckConstraint("url LIKE 'https://%' AND octet_length(url) <= 2048", name="url_form"),
        CheckConstraint("cardinality(events) BETWEEN 1 AND 100", name="events_count"),
        CheckConstraint("active = (deactivation_reason IS NULL)", name="inactive_has_reason"),
        CheckConstraint(
            "deactivation_reason IN ('paused', 'failures', 'admin', 'gone')",
            name="deactivation_reason_known",
        ),
        CheckConstraint("consecutive_failures >= 0", name="consecutive_failures_counted"),
        CheckConstraint("cardinality(retry_schedule_seconds) <= 20", name="retry_schedule_bounded"),
        CheckConstraint("timeout_seconds BETWEEN 1 AND 30", name="timeout_bounded"),
        CheckConstraint("rate_limit >= 0 AND max_in_flight >= 0", name="limits_counted"),
        CheckConstraint("breaker_trips >= 0", name="breaker_trips_counted"),
        CheckConstraint(
            "(previous_secret_ciphertext IS NULL) = (previous_secret_key_id IS NULL)"
            " AND (previous_secret_key_id IS NULL) = (previous_secret_expires_at IS NULL)",
            name="previous_secret_whole",
        ),
        Index(
            "webhook_configs_of_merchant",
            "merchant_id",
            "id",
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "webhook_configs_retired_secret",
            "previous_secret_expires_at",
            postgresql_where=text("previous_secret_expires_at IS NOT NULL"),
        ),
        # Inactive configs are few, and operators search for them.
        Index(
            "webhook_configs_inactive",
            "id",
            postgresql_where=text("NOT active AND deleted_at IS NULL"),
        ),
        {"comment": "Registered URLs with their secrets and event filters"},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    merchant_id: Mapped[str] = mapped_column(
        comment="The merchant_id claim of the token that made it"
    )
    url: Mapped[str] = mapped_column(comment="Canonical form, sent exactly so")
    events: Mapped[list[str]] = mapped_column(ARRAY(Text), comment="Event types it receives")
    description: Mapped[str] = mapped_column(server_default="")
    secret_ciphertext: Mapped[bytes] = mapped_column(
        LargeBinary, comment="AES-256-GCM nonce and ciphertext; associated data is the id"
    )
    secret_key_id: Mapped[str] = mapped_column(comment="Which encryption key made the ciphertext")
    active: Mapped[bool] = mapped_column(server_default=text("true"))
    deactivation_reason: Mapped[str | None] = mapped_column(comment="Why it is not active")
    consecutive_failures: Mapped[int] = mapped_column(
        server_default=text("0"), comment="Failed deliveries since the last delivered one"
    )
    retry_schedule_seconds: Mapped[list[float]] = mapped_column(
        ARRAY(Double), server_default=text("'{}'"), comment="Empty: the operator's schedule"
    )
    version: Mapped[int] = mapped_column(
        server_default=text("1"), comment="Counts changes; the etag, and the engines' cache key"
    )
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None] = mapped_column()
    headers: Mapped[dict[str, str]] = mapped_column(
        JSONB, server_default=text("'{}'"), comment="Sent with every webhook beside our own"
    )
    timeout_seconds: Mapped[float | None] = mapped_column(
        comment="Of one attempt; null: the operator's timeout"
    )
    rate_limit: Mapped[float] = mapped_column(
        server_default=text("0"), comment="Webhooks a second; 0: no limit"
    )
    rate_used_until: Mapped[datetime | None] = mapped_column(
        comment="Webhooks up to now have used up the rate until then"
    )
    max_in_flight: Mapped[int] = mapped_column(
        server_default=text("0"), comment="Per engine process; 0: the operator's cap"
    )
    previous_secret_ciphertext: Mapped[bytes | None] = mapped_column(
        LargeBinary, comment="Signs too until previous_secret_expires_at"
    )
    previous_secret_key_id: Mapped[str | None] = mapped_column()
    previous_secret_expires_at: Mapped[datetime | None] = mapped_column()
    breaker_open_until: Mapped[datetime | None] = mapped_column(
        comment="Nothing is sent before, then one probe at a time; null: closed"
    )
    breaker_trips: Mapped[int] = mapped_column(
        server_default=text("0"), comment="Times it opened since it was closed"
    )
    ordered: Mapped[bool] = mapped_column(
        server_default=text("false"), comment="Events with an ordering key go in order"
    )
    public_key: Mapped[str | None] = mapped_column(
        comment="Of the secret when that is a key pair; null: it signs by HMAC"
    )
    previous_public_key: Mapped[str | None] = mapped_column(comment="The same of the secret before")
    header_prefix: Mapped[str] = mapped_column(
        server_default="", comment="Id, timestamp and signature are sent under it, too; empty: not"
    )
