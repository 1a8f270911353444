"""Settings: what is wrong is named with its variable, and no value is ever repeated."""

import os
import subprocess
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from cli.settings import (
    BLOCKS,
    all_fields,
    load,
    refuse_unknown_variables,
    warn_of_removed_variables,
)
from cli.startup import url_policy
from core.errors import ConfigurationError
from core.settings import DatabaseSettings, EgressSettings, EncryptionSettings, variable_name
from delivery.settings import DeliverySettings
from server.settings import AuthSettings
from tests.support.paths import ROOT


def test_no_two_settings_share_a_variable() -> None:
    names = [name for name, _ in all_fields()]

    assert len(names) == len(set(names))


def test_every_setting_says_what_it_means() -> None:
    undescribed = [name for name, field in all_fields() if not field.description]

    assert undescribed == []


def test_settings_page_and_example_list_every_setting() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.settings_table", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    for text in (ROOT / "docs/settings.md", ROOT / ".env.example"):
        listed = text.read_text()
        assert all(variable_name(name) in listed for name, _ in all_fields())


def test_misspelt_variable_error_suggests_the_right_name() -> None:
    with pytest.raises(ConfigurationError, match="did you mean WEBHOOK_MAX_RETRIES"):
        refuse_unknown_variables({"WEBHOOK_MAX_RETRYS": "3"})


def test_variable_like_nothing_we_know_is_an_error_too() -> None:
    with pytest.raises(ConfigurationError, match="WEBHOOK_ZZZ is not a setting"):
        refuse_unknown_variables({"WEBHOOK_ZZZ": "", "OTHER_ZZZ": ""})


def test_known_variables_pass() -> None:
    refuse_unknown_variables({variable_name(name): "" for name, _ in all_fields()})


def test_removed_variable_is_ignored_with_a_warning(logged: list[Any]) -> None:
    environment = {"WEBHOOK_METRICS_MERCHANTS": "20"}
    refuse_unknown_variables(environment)
    warn_of_removed_variables(environment)

    [warning] = logged
    assert (warning["log_level"], warning["setting"]) == ("warning", "WEBHOOK_METRICS_MERCHANTS")


def test_missing_setting_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^WEBHOOK_DATABASE_URL is not set: set it, or"):
        load(DatabaseSettings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WEBHOOK_MAX_RETRIES", "many", "WEBHOOK_MAX_RETRIES: .*integer"),
        ("WEBHOOK_MAX_RETRIES", "21", "WEBHOOK_MAX_RETRIES: .*20"),
        ("WEBHOOK_DELIVERY_TIMEOUT_SECONDS", "31", "WEBHOOK_DELIVERY_TIMEOUT_SECONDS: .*30"),
        ("WEBHOOK_RETRY_SCHEDULE_SECONDS", "1,soon", "WEBHOOK_RETRY_SCHEDULE_SECONDS: .*soon"),
        ("WEBHOOK_LEASE_SECONDS", "59", "WEBHOOK_LEASE_SECONDS must be at least twice"),
    ],
)
def test_bad_value_is_refused_with_its_variable_and_the_bound(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError, match=message):
        load(DeliverySettings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("WEBHOOK_ALLOWED_CIDRS", "10.0.0.1/8"), ("WEBHOOK_ALLOWED_PORTS", "0-70000")],
)
def test_bad_network_or_port_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError, match=name):
        load(EgressSettings)


def test_secret_in_a_bad_value_stays_out_of_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_ENCRYPTION_KEYS", "k1:canary")
    monkeypatch.setenv("WEBHOOK_ENCRYPTION_KEYS_FILE", "/also/given")

    with pytest.raises(ConfigurationError) as caught:
        load(EncryptionSettings)

    assert "canary" not in caught.value.message


def test_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_CA_FILE", "")
    monkeypatch.setenv("WEBHOOK_ALLOWED_PORTS", "")

    settings = load(EgressSettings)

    assert settings.ca_file is None
    assert settings.allowed_ports == ((443, 443), (8443, 8443))


def test_denied_hosts_are_read_as_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_DENIED_HOSTS", "API.Pay.com., hooks.pay.com")
    monkeypatch.setenv("WEBHOOK_DENIED_CIDRS", "93.184.215.0/24,2a00:1450:64::/96")

    policy = url_policy(load(EgressSettings))

    assert policy.denied_hosts == ("api.pay.com", "hooks.pay.com")
    assert policy.addresses.denied == (
        ip_network("93.184.215.0/24"),
        ip_network("2a00:1450:64::/96"),
    )


@pytest.mark.parametrize(
    "value", ["https://api.pay.com", "api.pay.com:443", "*.pay.com", "bücher.de"]
)
def test_a_denied_host_that_would_never_match_is_an_error(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WEBHOOK_DENIED_HOSTS", value)

    with pytest.raises(ConfigurationError, match=r"WEBHOOK_DENIED_HOSTS: .*not a host name"):
        load(EgressSettings)


def test_environment_wins_over_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_JWT_ISSUER", "theirs")

    settings = load(AuthSettings, jwt_issuer="ours", jwt_public_key_file=Path("key.pem"))

    assert settings.jwt_issuer == "theirs"


def test_blocks_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(DeliverySettings)

    with pytest.raises(ValueError, match="frozen"):
        settings.max_retries = 5  # type: ignore[misc]


def test_defaults_alone_are_valid_but_for_what_is_required() -> None:
    required = {name for name, field in all_fields() if field.is_required()}

    assert required == {"jwt_issuer"}
    needed = {name for block in BLOCKS for name in block.required_secrets}
    assert needed == {"database_url", "encryption_keys"}
    assert not any(name.startswith("WEBHOOK_") for name in os.environ)
    assert len(BLOCKS) == len(set(BLOCKS))
