"""Settings blocks that several processes read.

Each field is an environment variable: `WEBHOOK_` and the upper-case field name. `cli` builds the
frozen blocks once and passes them down. No other code reads the environment. The description of a
field is its line in the settings table of the docs and in .env.example.
"""

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, HttpUrl, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.file_secrets import Secret

ENV_PREFIX = "WEBHOOK_"
_HOST_NAME = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)*")


def _comma_separated(parse: Callable[[str], Any] = str) -> BeforeValidator:
    def split(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(parse(part.strip()) for part in value.split(",") if part.strip())

    return BeforeValidator(split)


def _parse_port_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    ports = (int(low), int(high or low))
    if not 1 <= ports[0] <= ports[1] <= 65535:
        raise ValueError(f"{text!r} is not a port or a port range such as 8000-8999")
    return ports


def _parse_host_name(text: str) -> str:
    name = text.lower().rstrip(".")
    if not _HOST_NAME.fullmatch(name):
        raise ValueError(
            f"{text!r} is not a host name: write it without scheme and port, and an international "
            "name in its xn-- form"
        )
    return name


Network = IPv4Network | IPv6Network
Networks = Annotated[tuple[Network, ...], NoDecode, _comma_separated(ip_network)]
HostNames = Annotated[tuple[str, ...], NoDecode, _comma_separated(_parse_host_name)]
PortRanges = Annotated[tuple[tuple[int, int], ...], NoDecode, _comma_separated(_parse_port_range)]
Seconds = Annotated[float, Field(gt=0)]
SecondsList = Annotated[
    tuple[Annotated[float, Field(gt=0, le=86_400)], ...], NoDecode, _comma_separated(float)
]


def none_when_off(value: str | None) -> str | None:
    """Parse an address that may be `off`. An empty variable counts as unset."""
    return value if value and value.lower() != "off" else None


class SettingsBlock(BaseSettings):
    """Base class of the settings blocks: frozen, read from the environment, secrets masked.

    A secret has two fields, `name` and `name_file`: the value, or a file that holds it.
    """

    # An empty variable counts as unset, because compose files and CI define empty ones.
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True
    )

    #: The secrets that must be set, each with a hint on how to get one.
    required_secrets: ClassVar[Mapping[str, str]] = {}

    def secret(self, name: str) -> Secret:
        """Return the secret of this name."""
        return Secret(variable_name(name), getattr(self, name), getattr(self, f"{name}_file"))

    @classmethod
    def secret_names(cls) -> list[str]:
        return [name for name in cls.model_fields if f"{name}_file" in cls.model_fields]

    @model_validator(mode="after")
    def _one_source_each(self) -> Self:
        for name in self.secret_names():
            sources = (variable_name(name), f"{variable_name(name)}_FILE")
            given = [getattr(self, source) is not None for source in (name, f"{name}_file")]
            if all(given):
                raise ValueError(f"set {sources[0]} or {sources[1]}, not both")
            if not any(given) and name in self.required_secrets:
                raise ValueError(
                    f"{sources[0]} is not set: set it, or {sources[1]} to a file that holds it"
                    f"{self.required_secrets[name]}"
                )
        return self


def variable_name(field_name: str) -> str:
    """Return the environment variable of a field."""
    return f"{ENV_PREFIX}{field_name.upper()}"


class DatabaseSettings(SettingsBlock):
    """The connection to PostgreSQL."""

    required_secrets: ClassVar[Mapping[str, str]] = {"database_url": ""}

    database_url: SecretStr | None = Field(
        None,
        description="PostgreSQL 15 or newer, as postgresql://user:password@host:5432/database. "
        "With several hosts (host1:5432,host2:5432) the one that accepts writes is used. "
        "If unset, `postrider run` and `demo` start an embedded server.",
    )
    database_url_file: Path | None = Field(
        None, description="a file with this value, read for each new connection"
    )
    database_password: SecretStr | None = Field(
        None, description="the password, if the URL has none"
    )
    database_password_file: Path | None = Field(
        None, description="a file with this value, read for each new connection"
    )
    database_pool_size: int = Field(
        10,
        ge=2,
        le=200,
        description="maximum number of connections per process",
    )
    database_connect_timeout_seconds: Seconds = Field(
        5.0, description="how long a call waits for a connection before it is refused"
    )
    database_connection_seconds: Seconds = Field(
        1800.0,
        description="maximum age of a connection. An older one is closed when it is released, and "
        "a new one uses the current URL and password file",
    )
    database_statement_timeout_seconds: Seconds = Field(
        10.0, description="PostgreSQL cancels a statement after this time"
    )


class EncryptionSettings(SettingsBlock):
    """Keys that encrypt signing secrets at rest (AES-256-GCM)."""

    required_secrets: ClassVar[Mapping[str, str]] = {
        "encryption_keys": " (`postrider encryption-key` prints a new key)"
    }

    encryption_keys: SecretStr | None = Field(
        None,
        description="comma-separated `id:key` pairs, each key 32 bytes in base64. The first key "
        "encrypts, all keys decrypt. `postrider encryption-key` prints a new pair.",
    )
    encryption_keys_file: Path | None = Field(
        None,
        description="a file with these pairs, one per line or comma-separated, reloaded when it "
        "changes",
    )


class EgressSettings(SettingsBlock):
    """The receivers that may be called, and the way to them."""

    allowed_cidrs: Networks = Field(
        (),
        description="comma-separated CIDRs that may be called although they are private or "
        "loopback; for development, logged as a warning at every start",
    )
    denied_cidrs: Networks = Field(
        (),
        description="comma-separated CIDRs that are never called: your public addresses, the "
        "egress addresses of your engines, and your NAT64 prefixes; wins over the allowed ones",
    )
    denied_hosts: HostNames = Field(
        (),
        description="comma-separated host names of yours that no webhook URL may use, with all "
        "their subdomains",
    )
    allowed_ports: PortRanges = Field(
        ((443, 443), (8443, 8443)),
        description="comma-separated ports or ranges such as 8000-8999 that a webhook URL may use. "
        "A range excludes well-known ports of other services; list such a port alone",
    )
    ca_file: Path | None = Field(
        None,
        description="PEM file of certificate authorities to trust in addition to the system's "
        "when calling receivers",
    )
    receiver_connection_seconds: Seconds = Field(
        300.0,
        description="maximum age of a connection to a receiver when a request starts. Then a new "
        "connection resolves and checks the address again",
    )
    egress_proxy: SecretStr | None = Field(
        None,
        description="http://[user:password@]host:port of an HTTP proxy for all calls of receivers "
        "(CONNECT). The proxy resolves their names, so it must refuse internal addresses. "
        "HTTPS_PROXY and similar variables are ignored",
    )
    egress_proxy_file: Path | None = Field(
        None, description="a file with this value, reloaded when it changes"
    )


class RetentionSettings(SettingsBlock):
    """Retention of finished data. 0 keeps it without limit."""

    retention_delivered_days: int = Field(
        30,
        ge=0,
        le=36_500,
        description="days that a delivered delivery is kept after its end, with its attempts and "
        "its event; 0: no limit",
    )
    retention_undelivered_days: int = Field(
        90,
        ge=0,
        le=36_500,
        description="days for a failed or cancelled delivery; at least as many as for a delivered "
        "one; 0: no limit",
    )
    retention_idempotency_days: int = Field(
        30,
        ge=0,
        le=36_500,
        description="days that an idempotency key returns the same event; 0: no limit",
    )
    retention_audit_days: int = Field(
        2557,
        ge=0,
        le=36_500,
        description="days that an audit log entry is kept, by default 7 years; 0: no limit",
    )

    @model_validator(mode="after")
    def _undelivered_stays_longer(self) -> "RetentionSettings":
        delivered, undelivered = self.retention_delivered_days, self.retention_undelivered_days
        if undelivered and (not delivered or undelivered < delivered):
            raise ValueError(
                "WEBHOOK_RETENTION_UNDELIVERED_DAYS must be 0 (no limit) or at least "
                "WEBHOOK_RETENTION_DELIVERED_DAYS, because failures are investigated later"
            )
        return self


class LogSettings(SettingsBlock):
    """Level, format and sampling of the logs."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the lowest level that is written"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json, text, or auto: text on a terminal, otherwise json"
    )
    log_success_sample_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the calls and first attempts that succeed whose line is written. "
        "Failures, retries and slow ones are always written",
    )
    log_slow_seconds: Seconds = Field(
        1.0, description="duration from which a call or an attempt is slow"
    )


class TraceSettings(SettingsBlock):
    """Traces (OpenTelemetry) and the trace context in webhooks."""

    traces_endpoint: HttpUrl | None = Field(
        None,
        description="http(s)://host:4318 of an OpenTelemetry collector that receives spans by OTLP "
        "over HTTP; needs the extra `otel`",
    )
    traces_sample_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the traces that begin here whose spans are kept. A call with a "
        "`traceparent` follows its sampling flag",
    )
    send_traceparent: bool = Field(
        False, description="send merchants a `traceparent` header with each attempt"
    )

    @field_validator("traces_endpoint")
    @classmethod
    def _without_credentials(cls, value: HttpUrl | None) -> HttpUrl | None:
        # `postrider config` shows this setting.
        if value is not None and (value.username or value.password or value.query):
            raise ValueError("has credentials: put them into OTEL_EXPORTER_OTLP_HEADERS")
        return value
