"""idempotency_keys: which event an idempotency key stands for."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import LargeBinary, func
from sqlalchemy.orm import Mapped, mapped_column

from core.models.base import Base


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
