"""event_types: the kinds of event producers publish and merchants subscribe to."""

from datetime import datetime

from sqlalchemy import CheckConstraint, func
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
