"""Runs the commands of a documentation page without changes."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.platform import ISSUER

SCHEMA = "deploy/envoy/postrider.binpb"

needs_grpcurl = pytest.mark.skipif(
    shutil.which("grpcurl") is None, reason="grpcurl is not installed"
)

type Environment = dict[str, str]


def blocks(page: str) -> list[str]:
    """The shell blocks of a page."""
    return re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def section(page: str, heading: str) -> list[str]:
    """The shell blocks of one section, by its heading."""
    _, _, rest = (ROOT / page).read_text().partition(f"\n## {heading}\n")
    assert rest, f"{page} has no section {heading!r}"
    return blocks(rest.partition("\n## ")[0])


def sh(line: str, environment: Environment) -> str:
    """Run a line that must succeed. Returns its output."""
    done = subprocess.run(
        ["sh", "-euc", line],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def as_written(line: str, environment: Environment) -> list[str]:
    return ["sh", "-euc", line]


def as_buf_curl(line: str, environment: Environment) -> list[str]:
    """The command of a line, with `buf curl` for grpcurl. The shell parses its arguments."""
    if not line.startswith("grpcurl "):
        return as_written(line, environment)
    told = sh(f"grpcurl() {{ printf '%s\\0' \"$@\"; }}\n{line}", environment)
    *given, address, method = told.removesuffix("\0").split("\0")
    command = ["buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    # Only the server describes the health service.
    command += ["--schema", SCHEMA] if method.startswith("postrider.") else []
    arguments = iter(given)
    for argument in arguments:
        match argument:
            case "-plaintext":
                pass
            case "-protoset" | "-max-time":
                next(arguments)
            case "-H" | "-d":
                command += [argument, next(arguments)]
            case _:
                raise AssertionError(f"translate {argument}")
    return [*command, f"http://{address}/{method}"]


async def printed(command: list[str], environment: Environment) -> str:
    """Run a command that must succeed. Returns its output."""
    process = await started(command, environment)
    async with asyncio.timeout(30):
        output, complaint = await process.communicate()
    assert process.returncode == 0, f"{command}\n{output.decode()}{complaint.decode()}"
    return output.decode()


async def answer(command: list[str], environment: Environment) -> str:
    """Run a call that must succeed. Returns its output as normalized JSON."""
    return json.dumps(json.loads(await printed(command, environment)))


async def started(command: list[str], environment: Environment) -> asyncio.subprocess.Process:
    program = shutil.which(command[0], path=environment["PATH"])
    assert program
    return await asyncio.create_subprocess_exec(
        program,
        *command[1:],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def prepared(setup: str, data_dir: Path) -> Environment:
    """The variables of a page's first block, for the platform of the test."""
    environment = {
        "HOME": str(data_dir),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WEBHOOK_DATA_DIR": str(data_dir),
        "WEBHOOK_JWT_ISSUER": ISSUER,
    }
    names = re.findall(r"^([A-Z_]+)=", setup, re.MULTILINE)
    values = sh(f"{setup}printf '%s\\n' {' '.join(f'"${name}"' for name in names)}", environment)
    return environment | dict(zip(names, values.splitlines(), strict=True))
