"""The client's wheel: content, requirements, and installation next to the server's wheel."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import postrider_client
from tests.support.paths import ROOT

HEAVY = {"asyncpg", "aiohttp", "sqlalchemy", "pydantic", "structlog", "server", "core", "cli"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist, as a release does."""
    out = tmp_path_factory.mktemp("dist")
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(
        [*hatchling, "-t", "sdist"], cwd=ROOT / "clients/python", check=True, capture_output=True
    )
    [sdist] = out.glob("*.tar.gz")
    subprocess.run(["tar", "xf", sdist, "-C", out], check=True)
    unpacked = out / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*hatchling, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    [wheel] = out.glob("*.whl")
    return wheel


def test_wheel_contains_client_stubs_and_types(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"postrider_client", "postrider"}
    assert {"postrider_client/py.typed", "postrider/py.typed"} <= names
    generated = ROOT / "generated"
    stubs = {
        str(path.relative_to(generated))
        for path in generated.rglob("*.py*")
        if path.suffix != ".pyc"
    }
    assert stubs <= names


def test_wheel_requires_only_grpc(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    requirements = [line.partition(": ")[2] for line in lines if "Requires-Dist" in line]
    extras = {line for line in requirements if "extra ==" in line}
    assert {line.partition(">")[0] for line in extras} == {"cryptography"}
    needed = {line.partition(">")[0] for line in requirements if line not in extras}
    assert needed == {"googleapis-common-protos", "grpcio", "grpcio-status", "protobuf"}
    [licence] = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the wheel ahead of the installed packages."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=site, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_import_loads_no_server_code(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = run(
        tmp_path,
        "import sys, postrider_client, postrider.v1.event_pb2 as e;"
        "print(postrider_client.__file__, e.__file__, *sys.modules)",
    )
    client, stubs, *modules = done.stdout.split()
    assert client.startswith(str(tmp_path)), done.stderr
    assert stubs.startswith(str(tmp_path))
    assert not HEAVY & set(modules)


def test_server_of_another_version_fails_the_import(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    other = tmp_path / "postrider-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: postrider\nVersion: 9.9.9\n")
    done = run(tmp_path, "import postrider_client")
    assert done.returncode == 1
    assert "postrider 9.9.9 and postrider-client" in done.stderr
    assert "same version" in done.stderr


def test_client_and_server_share_a_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert postrider_client.__version__ == project["version"]
