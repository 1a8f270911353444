"""An allow-list is not forgotten in production: both processes name it whenever they start."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cli.startup import warn_of_allowed_cidrs
from core.settings import EgressSettings


async def test_both_processes_warn_of_allowed_networks_at_start(
    logged: list[Any], start_platform: Callable[..., Any]
) -> None:
    async with start_platform() as platform:
        for starts in (2, 3):
            async with platform.engine():
                pass
            warnings = [e for e in logged if e["event"] == "private_addresses_allowed"]
            assert len(warnings) == starts
        assert {entry["log_level"] for entry in warnings} == {"warning"}
        assert warnings[0]["cidrs"] == ["127.0.0.0/8"]
        assert warnings[0]["setting"] == "WEBHOOK_ALLOWED_CIDRS"

        platform.settings = replace(platform.settings, egress=EgressSettings())
        async with platform.engine():
            pass
    assert len([e for e in logged if e["event"] == "private_addresses_allowed"]) == 3


@pytest.mark.parametrize("allowed", ["", "10.0.0.0/8"])
def test_nothing_is_allowed_by_default(logged: list[Any], allowed: str) -> None:
    assert EgressSettings().allowed_cidrs == ()
    warn_of_allowed_cidrs(EgressSettings(allowed_cidrs=allowed))
    assert len(logged) == bool(allowed)
