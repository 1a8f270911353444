"""Settings that more than one process reads, in blocks; each process adds its own block beside it.

Every setting is an environment variable `WEBHOOK_` + the field's name in capitals. Blocks are
frozen, built once in `cli`, and passed down; nothing else reads the environment. Durations carry
their unit in the name. A field's description is its line in the README's table and .env.example.
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
        raise ValueError(f"{text!r} is not a port or a range of ports such as 8000-8999")
    return ports


def _parse_host_name(text: str) -> str:
    name = text.lower().rstrip(".")
    if not _HOST_NAME.fullmatch(name):
        raise ValueError(
            f"{text!r} is not a host name: write it without scheme and port, an international one "
            "in its xn-- form"
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
    """For addresses that may be `off`; an empty variable counts as not set, here as everywhere."""
    return value if value and value.lower() != "off" else None


class SettingsBlock(BaseSettings):
    """Base of the settings blocks: from the environment, frozen, values masked where secret.

    A secret is two fields, `name` and `name_file`: the value itself, or a file that holds it.
    """

    # An empty variable counts as not set, as compose files and CI leave them.
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True
    )

    #: The secrets that must be set, each with a hint where to get one.
    required_secrets: ClassVar[Mapping[str, str]] = {}

    def secret(self, name: str) -> Secret:
        """The secret of that name, from wherever it was set."""
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
    """The environment variable of a field."""
    return f"{ENV_PREFIX}{field_name.upper()}"


class DatabaseSettings(SettingsBlock):
    """Where PostgreSQL is, and how long we are willing to wait for it."""

    required_secrets: ClassVar[Mapping[str, str]] = {"database_url": ""}

    database_url: SecretStr | None = Field(
        None,
        description="PostgreSQL 15 or newer, as postgresql://user:password@host:5432/database; of "
        "several hosts (host1:5432,host2:5432) the one that takes writes. "
        "`postrider run` and `demo` start their own when it is not set.",
    )
    database_url_file: Path | None = Field(
        None, description="a file that holds the same, read anew for each connection"
    )
    database_password: SecretStr | None = Field(
        None, description="the password, instead of one in the URL"
    )
    database_password_file: Path | None = Field(
        None, description="a file that holds the same, read anew for each connection"
    )
    database_pool_size: int = Field(
        10,
        ge=2,
        le=200,
        description="connections one process may hold, each engine process its own",
    )
    database_connect_timeout_seconds: Seconds = Field(
        5.0, description="how long to wait for a connection before a call is refused"
    )
    database_connection_seconds: Seconds = Field(
        1800.0,
        description="how old a connection may be when it is given back; then the next use makes a "
        "new one, to whatever the URL and the password's file say by then",
    )
    database_statement_timeout_seconds: Seconds = Field(
        10.0, description="after which PostgreSQL itself cancels a statement"
    )


class EncryptionSettings(SettingsBlock):
    """The keys that encrypt signing secrets at rest (AES-256-GCM)."""

    required_secrets: ClassVar[Mapping[str, str]] = {
        "encryption_keys": " (`postrider encryption-key` prints a new key)"
    }

    encryption_keys: SecretStr | None = Field(
        None,
        description="comma-separated `id:key` pairs, each key 32 bytes in base64; the first "
        "encrypts, all decrypt. Make one with `postrider encryption-key`.",
    )
    encryption_keys_file: Path | None = Field(
        None,
        description="a file that holds the same, one pair a line or comma-separated; read anew "
        "when it has changed",
    )


class EgressSettings(SettingsBlock):
    """Which receivers may be dialled at all, and by which way."""

    allowed_cidrs: Networks = Field(
        (),
        description="comma-separated CIDRs that are dialled although they are private or loopback; "
        "for development, logged as a warning at every start",
    )
    denied_cidrs: Networks = Field(
        (),
        description="comma-separated CIDRs that are never dialled: your own public addresses, "
        "those your engines send from, and NAT64 prefixes of your own; wins over the allowed",
    )
    denied_hosts: HostNames = Field(
        (),
        description="comma-separated host names of your own that no webhook URL may name, each "
        "with all names below it",
    )
    allowed_ports: PortRanges = Field(
        ((443, 443), (8443, 8443)),
        description="comma-separated ports, or ranges as 8000-8999, that a webhook URL may name; "
        "well-known ports of other services are not in a range, only by themselves",
    )
    ca_file: Path | None = Field(
        None,
        description="PEM file of certificate authorities to trust beside the system's "
        "when calling receivers",
    )
    receiver_connection_seconds: Seconds = Field(
        300.0,
        description="how old a connection to a receiver may be when a request begins on it; then a "
        "new one is made, to an address that is looked up and judged anew",
    )
    egress_proxy: SecretStr | None = Field(
        None,
        description="http://host:port of an HTTP proxy, with user:password@ before the host if it "
        "asks for them, through which all receivers are called (CONNECT); it looks up their names, "
        "so refusing inner addresses is then its task; HTTPS_PROXY and the like are never read",
    )
    egress_proxy_file: Path | None = Field(
        None, description="a file that holds the same, read anew when it has changed"
    )


class RetentionSettings(SettingsBlock):
    """How long what is over is kept; 0 keeps it for ever."""

    retention_delivered_days: int = Field(
        30,
        ge=0,
        le=36_500,
        description="how many days after its end a delivered delivery is kept, with its attempts "
        "and its event; 0: for ever",
    )
    retention_undelivered_days: int = Field(
        90,
        ge=0,
        le=36_500,
        description="the same of a delivery that failed or was cancelled; not less than that of "
        "delivered ones; 0: for ever",
    )
    retention_idempotency_days: int = Field(
        30,
        ge=0,
        le=36_500,
        description="for how many days the same idempotency key gives the same event; 0: for ever",
    )
    retention_audit_days: int = Field(
        2557,
        ge=0,
        le=36_500,
        description="how many days an entry of the audit log is kept, by default 7 years; 0: for "
        "ever",
    )

    @model_validator(mode="after")
    def _failures_stay_longer(self) -> "RetentionSettings":
        delivered, undelivered = self.retention_delivered_days, self.retention_undelivered_days
        if undelivered and (not delivered or undelivered < delivered):
            raise ValueError(
                "WEBHOOK_RETENTION_UNDELIVERED_DAYS must be 0 (for ever) or at least "
                "WEBHOOK_RETENTION_DELIVERED_DAYS: what failed is looked for longer"
            )
        return self


class LogSettings(SettingsBlock):
    """What is logged and how it looks."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the least important level that is written"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json, text, or auto: text on a terminal and json elsewhere"
    )
    log_success_sample_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="part of the calls and attempts that went well at once whose line is written; "
        "failures, retries and slow ones always are",
    )
    log_slow_seconds: Seconds = Field(
        1.0, description="duration from which on a call or an attempt is slow"
    )


class TraceSettings(SettingsBlock):
    """Traces (OpenTelemetry), and the context of a trace in what merchants are sent."""

    traces_endpoint: HttpUrl | None = Field(
        None,
        description="http(s)://host:4318 of an OpenTelemetry collector, where spans are sent by "
        "OTLP over HTTP; needs the extra `otel`",
    )
    traces_sample_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="part of the traces that begin here of which spans are kept; what comes with "
        "a `traceparent` follows that",
    )
    send_traceparent: bool = Field(
        False, description="send merchants a `traceparent` header with each attempt"
    )

    @field_validator("traces_endpoint")
    @classmethod
    def _without_credentials(cls, value: HttpUrl | None) -> HttpUrl | None:
        # Settings that are no secrets are shown.
        if value is not None and (value.username or value.password or value.query):
            raise ValueError("is a URL without credentials: OTEL_EXPORTER_OTLP_HEADERS has those")
        return value
