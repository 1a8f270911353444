"""The command without `cli.dev`, as the production image has it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages without the development code."""
    directory = tmp_path_factory.mktemp("production")
    for package in ("core", "server", "delivery", "cli", "migrations"):
        ignored = shutil.ignore_patterns("__pycache__", "dev") if package == "cli" else None
        shutil.copytree(ROOT / package, directory / package, ignore=ignored)
    return directory


def postrider(installation: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path.insert(0, {str(installation)!r}); from cli.main import main; "
    return subprocess.run(
        [sys.executable, "-P", "-c", f"{program}main({list(arguments)!r})"],
        cwd=installation,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["run", "demo", "token", "listen"])
def test_development_command_names_the_missing_extra(installation: Path, command: str) -> None:
    done = postrider(installation, command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"postrider: `postrider {command}` is for development")
    assert "pip install 'postrider[dev]'" in done.stderr


def test_help_and_production_commands_need_no_development_code(installation: Path) -> None:
    assert "Migrate the database" in postrider(installation, "--help").stdout
    keys = installation / ".postrider" / "keys"
    keys.mkdir(parents=True)
    (keys / "private.pem").write_text("left from a development run")
    done = postrider(installation, "canary", "--timeout", "1")
    assert done.returncode == 2
    assert "--publish-token-file" in done.stderr
