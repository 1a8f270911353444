"""`postrider run` and `demo`, as a newcomer meets them: real processes, real signals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

POSTRIDER = Path(sys.executable).with_name("postrider")

type Environment = dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Free ports and a data directory of this test's own."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "WEBHOOK_DATA_DIR": str(tmp_path / ".postrider"),
        "WEBHOOK_LISTEN_ADDRESS": f"127.0.0.1:{free_port()}",
        "WEBHOOK_RECEIVER_PORT": str(free_port()),
    }


@pytest.fixture(autouse=True)
def _tidy_data_of_root(tmp_path: Path) -> Iterator[None]:
    yield
    for left in Path("/var/lib/postrider").glob(f"{tmp_path.name}-*"):
        subprocess.run(["rm", "-rf", left], check=True)


@contextmanager
def running(environment: Environment, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [POSTRIDER, "run", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        # In good order: a PostgreSQL that lost its parent would still be writing for a moment.
        process.terminate()
        process.wait(30)
        if process.stdout:
            process.stdout.close()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return its output up to the line with `text`."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"ended without {text!r}:\n{printed}")


def postrider(environment: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [POSTRIDER, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_run_delivers_and_stays_until_ctrl_c(environment: Environment) -> None:
    with running(environment, "--events", "3") as process:
        printed = read_until(process, "Ctrl-C stops everything.")
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[0]

    assert "3 published, 3 delivered, 1 retried, 4 signatures verified" in printed
    assert "0 duplicates, 0 lost" in printed
    assert "answered 503, on purpose" in printed
    assert rest.rstrip().endswith("Stopped.")
    assert process.returncode == 0


def test_printed_line_works_when_it_is_pasted(environment: Environment) -> None:
    with running(environment, "--events", "1") as process:
        printed = read_until(process, "Ctrl-C stops everything.")
        token = re.search(r"^TOKEN=\S+$", printed, re.MULTILINE)
        command = re.search(r"^\S+/buf curl .*?/PublishEvent$", printed, re.MULTILINE | re.DOTALL)
        assert token
        assert command
        pasted = subprocess.run(
            ["sh", "-c", f"{token[0]}\n{command[0]}"],
            capture_output=True,
            text=True,
            check=False,
        )
        event_id = json.loads(pasted.stdout)["event"]["id"]
        shown = read_until(process, event_id)

    assert "signature verified, answered 200" in shown


def test_second_run_says_that_one_is_running(environment: Environment) -> None:
    with running(environment, "--events", "1") as process:
        read_until(process, "Ctrl-C stops everything.")
        second = postrider(environment, "run")

    assert second.returncode == 2
    assert re.fullmatch(
        r"postrider: another Postrider is running here .*stop it.*\n", second.stderr
    )


def test_run_after_a_killed_one_carries_on(environment: Environment) -> None:
    with running(environment, "--events", "1") as process:
        first = read_until(process, "Ctrl-C stops everything.")
        process.kill()
        process.wait()
    with running(environment, "--events", "2") as process:
        second = read_until(process, "Ctrl-C stops everything.")

    webhook_id = re.compile(r"wh_[0-9a-f]{32}")
    assert webhook_id.findall(first) == webhook_id.findall(second)
    assert "2 published, 2 delivered" in second


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("WEBHOOK_LISTEN_ADDRESS", "cannot listen on 127.0.0.1:{port}: .*WEBHOOK_LISTEN_ADDRESS"),
        ("WEBHOOK_RECEIVER_PORT", "cannot listen on 127.0.0.1:{port} .*WEBHOOK_RECEIVER_PORT"),
    ],
)
def test_taken_port_is_one_line_that_says_what_to_do(
    environment: Environment, setting: str, message: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        prefix = "" if setting == "WEBHOOK_RECEIVER_PORT" else "127.0.0.1:"
        refused = postrider(environment | {setting: f"{prefix}{port}"}, "run")

    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert re.search(message.format(port=port), line)


@pytest.mark.slow
def test_demo_prints_one_json_object_beside_a_running_one(environment: Environment) -> None:
    with running(environment, "--events", "1") as process:
        read_until(process, "Ctrl-C stops everything.")
        demo = postrider(environment, "demo", "--json", "--events", "30")

    assert demo.returncode == 0, demo.stderr
    assert demo.stderr == ""
    result = json.loads(demo.stdout)
    seconds = result.pop("seconds")
    assert 0 < seconds < 60
    assert result == {
        "published": 30,
        "delivered": 30,
        "retried": 1,
        "verified": 31,
        "duplicates": 0,
        "lost": 0,
    }


def test_demo_uses_a_database_it_is_given(environment: Environment, database_url: str) -> None:
    demo = postrider(environment | {"WEBHOOK_DATABASE_URL": database_url}, "demo", "--json")

    assert demo.returncode == 0, demo.stderr
    assert json.loads(demo.stdout)["lost"] == 0


def test_data_directory_that_cannot_be_made_is_one_line(
    environment: Environment, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    refused = postrider(environment | {"WEBHOOK_DATA_DIR": str(tmp_path / "file" / "data")}, "run")

    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert "WEBHOOK_DATA_DIR" in line


def test_token_without_a_development_key_says_who_makes_one(environment: Environment) -> None:
    refused = postrider(environment, "token")

    assert refused.returncode == 2
    assert "`postrider run` creates one" in refused.stderr


@pytest.mark.parametrize("command", ["server", "delivery", "migrate", "run", "demo", "token"])
def test_help_says_what_the_command_does(environment: Environment, command: str) -> None:
    shown = postrider(environment, command, "--help")

    assert shown.returncode == 0
    assert len(shown.stdout.splitlines()) >= 8


@pytest.fixture
def key_pair(environment: Environment) -> Callable[[], str]:
    def make() -> str:
        return postrider(environment, "encryption-key").stdout.strip()

    return make


def test_encryption_key_is_new_each_time_and_fits_the_setting(key_pair: Callable[[], str]) -> None:
    first, second = key_pair(), key_pair()

    assert first != second
    assert re.fullmatch(r"k[0-9a-f]{6}:[A-Za-z0-9+/]{43}=", first)
