"""Adds the stubs `postrider.v1` to the wheel, from the checkout or from the unpacked sdist."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface[Any]):
    """Adds `postrider/` with a py.typed. An editable install finds `generated/` without it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        here = Path(self.root)
        checkout, unpacked = here.parent.parent / "generated" / "postrider", here / "postrider"
        stubs = unpacked if unpacked.exists() else checkout
        included = build_data["force_include"]
        included[str(stubs)] = "postrider"
        if not (stubs / "py.typed").exists():
            included[str(here / "stubs" / "py.typed")] = "postrider/py.typed"
