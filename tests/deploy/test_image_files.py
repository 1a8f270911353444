"""The sources of the image: one lock, one release, and no other files."""

import re
import shlex
import tomllib
from pathlib import PurePosixPath

import pytest

from tests.support.containerfile import Step, steps, visible
from tests.support.deployment import port_of, unknown
from tests.support.lock_files import pinned
from tests.support.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTAINERFILE = list(steps((ROOT / "Containerfile").read_text()))
IGNORED = [
    line
    for line in (ROOT / ".containerignore").read_text().splitlines()
    if line and not line.startswith("#")
]


def of(instruction: str) -> list[str]:
    return [step.value for step in CONTAINERFILE if step.instruction == instruction]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize("lock", ["requirements-production.lock", "tools/image/requirements.lock"])
def test_image_locks_have_the_tested_versions(lock: str) -> None:
    everything, some = pinned(ROOT / "requirements.lock"), pinned(ROOT / lock)
    if lock.startswith("tools"):
        # Whoever sets up a checkout may have any.
        del some["uv"]
    assert [name for name, pin in some.items() if everything.get(name) != pin] == []
    assert all(hashes for _, hashes in some.values())


def test_production_lock_has_no_tools_and_no_postgresql() -> None:
    production = set(pinned(ROOT / "requirements-production.lock"))
    assert names(PYPROJECT["project"]["dependencies"]) <= production
    unwanted = names(PYPROJECT["project"]["optional-dependencies"]["dev"])
    unwanted |= names(PYPROJECT["dependency-groups"]["dev"])
    assert production & unwanted == set()


def test_image_has_this_release_and_the_tested_python() -> None:
    [label] = of("LABEL")
    assert f'image.version="{PYPROJECT["project"]["version"]}"' in label
    [base] = {value.split()[0] for value in of("FROM")}
    wanted = (ROOT / ".python-version").read_text().strip()
    assert re.fullmatch(rf"python:{re.escape(wanted)}\.\d+-slim-\w+", base)


def test_what_runs_is_a_process_and_no_shell_and_nobody() -> None:
    begin = max(n for n, step in enumerate(CONTAINERFILE) if step.instruction == "FROM")
    stage = CONTAINERFILE[begin:]
    order = [step.instruction for step in stage]
    assert Step("ENTRYPOINT", '["postrider"]') in stage
    assert Step("USER", "65532:65532") in stage
    # Root runs nothing after our files are copied.
    assert "RUN" not in order[order.index("COPY") :]
    [check] = [step.value for step in stage if step.instruction == "HEALTHCHECK"]
    assert check.endswith('CMD ["postrider", "health"]')


def test_only_the_admin_listener_stays_on_loopback() -> None:
    given = dict(pair.split("=", 1) for value in of("ENV") for pair in shlex.split(value))
    addresses = {name: value for name, value in given.items() if name.startswith("WEBHOOK_")}
    assert unknown(addresses) == []
    assert "WEBHOOK_ADMIN_ADDRESS" not in addresses
    assert addresses == {name: f"0.0.0.0:{port_of(name)}" for name in addresses}
    [exposed] = of("EXPOSE")
    assert exposed.split() == [str(port_of(name)) for name in addresses]


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("core/settings.py", True),
        ("cli/commands/dev.py", True),
        ("cli/dev/run.py", False),
        ("migrations/versions/20261121_initial.py", True),
        ("requirements-production.lock", True),
        ("core/__pycache__/config.cpython-312.pyc", False),
        (".env", False),
        (".postrider/keys/private.pem", False),
        (".git/config", False),
        ("tests/conftest.py", False),
        ("deploy/secrets/encryption-keys", False),
    ],
)
def test_a_build_sees_what_it_copies_and_no_secret(path: str, seen: bool) -> None:
    assert visible(PurePosixPath(path), IGNORED) is seen
