from typing import Any
from uuid import UUID

import pytest

from tests.support.factories import make_webhook_config


@pytest.fixture
async def webhook_id(pool: Any) -> UUID:
    """An active webhook config."""
    return await make_webhook_config(pool)


@pytest.fixture
async def ordered_id(pool: Any) -> UUID:
    """An active webhook config that gets the events of an ordering key in order."""
    return await make_webhook_config(pool, ordered=True)
