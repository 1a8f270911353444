"""`postrider config`: where each value is from, no secret in it, and everything wrong at once."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cli.ops.configuration import masked
from cli.settings import BLOCKS, all_fields
from core.encryption import new_key
from core.settings import variable_name
from tests.support.certificates import Authority

CANARY = "c4n4ry"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The required settings only."""
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{new_key()}\n")
    return {
        "WEBHOOK_DATABASE_URL": f"postgresql://u:{CANARY}@h1,h2/db?sslpassword={CANARY}",
        "WEBHOOK_ENCRYPTION_KEYS_FILE": str(keys),
        "WEBHOOK_JWT_ISSUER": "https://id.example/",
        "WEBHOOK_JWT_JWKS_URL": "https://id.example/keys",
    }


def config(environment: dict[str, str], *arguments: str) -> Result:
    return CliRunner().invoke(main, ["config", *arguments], env=environment)


def found(environment: dict[str, str], *arguments: str) -> tuple[dict[str, Any], list[str], int]:
    done = config(environment, "--json", *arguments)
    report = orjson.loads(done.stdout)
    return {s["name"]: s for s in report["settings"]}, report["problems"], done.exit_code


def test_every_setting_is_there_with_its_source(environment: dict[str, str]) -> None:
    settings, problems, code = found(environment | {"WEBHOOK_MAX_RETRIES": "5"})

    assert (problems, code) == ([], 0)
    assert list(settings) == [variable_name(name) for name, _ in all_fields()]
    assert (settings["WEBHOOK_MAX_RETRIES"]["value"], "environment") == ("5", "environment")
    assert settings["WEBHOOK_MAX_RETRIES"]["source"] == "environment"
    assert settings["WEBHOOK_CLAIM_BATCH"] | {"block": ""} == {
        "block": "",
        "name": "WEBHOOK_CLAIM_BATCH",
        "value": "200",
        "source": "default",
    }
    keys = settings["WEBHOOK_ENCRYPTION_KEYS"]
    assert keys["source"] == environment["WEBHOOK_ENCRYPTION_KEYS_FILE"]
    assert keys["value"] == Path(keys["source"]).read_text().partition(":")[0] + ":***"


def test_the_text_says_the_same(environment: dict[str, str]) -> None:
    done = config(environment)

    assert done.exit_code == 0
    assert done.stdout.endswith("\nno problems\n")
    for block in BLOCKS:
        assert f"# {(block.__doc__ or '').splitlines()[0].rstrip('.')}\n" in done.stdout
    assert "WEBHOOK_MAX_RETRIES  " in done.stdout
    wrong = config(environment | {"WEBHOOK_MAX_RETRYS": "5", "WEBHOOK_MAX_RETRIES": "x"})
    assert wrong.exit_code == 1
    assert "\nproblems: 2\n  - WEBHOOK_MAX_RETRYS is not a setting; did you mean" in wrong.stdout


@pytest.mark.parametrize(
    ("process", "absent"), [("server", "CLAIM_BATCH"), ("delivery", "JWT_ISSUER")]
)
def test_a_process_is_asked_only_for_its_own(
    environment: dict[str, str], process: str, absent: str
) -> None:
    if process == "delivery":
        environment = {k: v for k, v in environment.items() if "JWT" not in k}
    settings, problems, code = found(environment, "--for", process)

    assert (problems, code) == ([], 0)
    assert f"WEBHOOK_{absent}" not in settings
    assert "WEBHOOK_DATABASE_URL" in settings


@pytest.mark.parametrize(
    ("name", "secret", "shown"),
    [
        ("database_url", f"postgresql://u:{CANARY}@h/d", "postgresql://u:***@h/d"),
        ("database_url", f"postgresql://u:a@{CANARY}:b@h/d", "postgresql://u:***@h/d"),
        (
            "database_url",
            f"postgresql://h/d?password={CANARY}&a=b",
            "postgresql://h/d?password=***&a=b",
        ),
        ("database_url", CANARY, "***"),
        ("database_password", CANARY, "***"),
        ("egress_proxy", f"http://me:{CANARY}@proxy:3128", "http://me:***@proxy:3128"),
        ("encryption_keys", f"k1:{CANARY}, k2:{CANARY}", "k1:***,k2:***"),
        ("encryption_keys", CANARY, "***"),
    ],
)
def test_what_is_shown_of_a_secret(name: str, secret: str, shown: str) -> None:
    assert masked(name, secret) == shown


def test_no_secret_is_shown_whatever_is_wrong_with_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "proxy"
    file.write_text(f"gopher://u:{CANARY}@proxy")
    environment |= {
        "WEBHOOK_EGRESS_PROXY_FILE": str(file),
        "WEBHOOK_ENCRYPTION_KEYS": f"k1:{CANARY}",
        "WEBHOOK_JWT_JWKS_URL": f"https://u:{CANARY}@id.example/keys",
        "WEBHOOK_DATABASE_PASSWORD": CANARY,
        "WEBHOOK_DATABASE_URL": f"mysql://u:{CANARY}@h/d",
    }
    for arguments in ((), ("--json",), ("--for", "delivery")):
        done = config(environment, *arguments)
        assert done.exit_code == 1
        assert CANARY not in done.output


def test_everything_wrong_is_told_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    authority = Authority()
    here, there = authority.issue(), authority.issue()
    for name, content in (("cert", here.certificate), ("key", there.private_key)):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "key").chmod(0o644)
    (tmp_path / "proxy").write_text("http://proxy")
    (tmp_path / "proxy").chmod(0o604)
    Path(environment["WEBHOOK_ENCRYPTION_KEYS_FILE"]).write_text("k1:short")
    del environment["WEBHOOK_JWT_ISSUER"], environment["WEBHOOK_JWT_JWKS_URL"]
    _, problems, code = found(
        environment
        | {
            "WEBHOOK_DATABASE_URL": "h1:5432",
            "WEBHOOK_DATABASE_POOL_SIZE": "3",
            "WEBHOOK_ALLOWED_CIDRS": "10.0.0.1/8",
            "WEBHOOK_CA_FILE": str(tmp_path / "absent"),
            "WEBHOOK_EGRESS_PROXY_FILE": str(tmp_path / "proxy"),
            "WEBHOOK_TLS_CERTIFICATE_FILE": str(tmp_path / "cert"),
            "WEBHOOK_TLS_PRIVATE_KEY_FILE": str(tmp_path / "key"),
            "WEBHOOK_CLAIM_BATCH": "0",
            "WEBHOOK_MAX_RETRYS": "3",
            "WEBHOOK_DATABASE_URl": "",
        }
    )
    assert code == 1
    for part in (
        "WEBHOOK_MAX_RETRYS is not a setting; did you mean WEBHOOK_MAX_RETRIES?",
        "WEBHOOK_DATABASE_URl is not a setting; did you mean WEBHOOK_DATABASE_URL?",
        "WEBHOOK_DATABASE_URL is not a PostgreSQL URL: write it as",
        "WEBHOOK_DATABASE_POOL_SIZE is 3: an engine uses up to 5 connections at once",
        "WEBHOOK_ENCRYPTION_KEYS_FILE: ",
        "WEBHOOK_ALLOWED_CIDRS: 10.0.0.1/8 has host bits set",
        "WEBHOOK_CA_FILE: ",
        "WEBHOOK_EGRESS_PROXY is not the URL of an HTTP proxy: write http://host:port",
        "WEBHOOK_EGRESS_PROXY_FILE: ",
        "WEBHOOK_JWT_ISSUER is not set",
        "set exactly one of WEBHOOK_JWT_JWKS_URL and WEBHOOK_JWT_PUBLIC_KEY_FILE",
        "WEBHOOK_TLS_PRIVATE_KEY_FILE: ",
        "WEBHOOK_CLAIM_BATCH: ",
    ):
        assert any(problem.startswith(part) for problem in problems), (part, problems)
    assert sum("can be read by every user" in problem for problem in problems) == 2
    assert len(problems) == len(set(problems)) == 14


def test_a_limit_of_files_that_is_too_low_is_told(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    _, problems, _ = found(environment, "--for", "delivery")

    [problem] = problems
    assert problem.startswith(
        "WEBHOOK_MAX_IN_FLIGHT is 500, so an engine opens up to 1042 files, but it may open only "
        "1024: raise the limit"
    )
