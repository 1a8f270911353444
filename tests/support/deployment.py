"""Values from the files of deploy/, for tests that compare them with the service."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cli.settings import all_fields
from core.settings import variable_name
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
#: All settings with their defaults, by environment variable.
SETTINGS = {variable_name(name): field.default for name, field in all_fields()}


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def unknown(environment: Mapping[str, object]) -> list[str]:
    """Variables that prevent the start of a process."""
    return [name for name in environment if name.startswith("WEBHOOK_") and name not in SETTINGS]


def port_of(name: str) -> int:
    """The default port of a listening address."""
    return int(str(SETTINGS[name]).rpartition(":")[2])


def drain_seconds(environment: Mapping[str, object], process: str) -> float:
    """The longest time that a process needs after SIGTERM.

    An engine waits for its attempts, then as long again for a database that is away.
    """
    name = f"WEBHOOK_{process.upper()}_DRAIN_SECONDS"
    seconds = float(str(environment.get(name, SETTINGS[name])))
    return 2 * seconds if process == "delivery" else seconds
