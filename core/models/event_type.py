"""event_types: the kinds of event producers publish and merchants subscribe to."""

from datetime import datetime

from sqlalchemy import CheckConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from core.models.base import Base


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
