"""Settings of the gRPC server."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from core.settings import Seconds, SettingsBlock, none_when_off
from server.auth.principal import Scope, parse_certificate_scopes


class ServerSettings(SettingsBlock):
    """Listening, limits, and how long a stop may take."""

    listen_address: str = Field(
        "127.0.0.1:50051",
        description="host:port of the gRPC listener; [::]:50051 for all interfaces",
    )
    admin_address: str | None = Field(
        "127.0.0.1:50052",
        description="host:port of the operators' listener for health, reflection and channelz; it "
        "needs no token, so keep it on loopback; `off` for none",
    )
    server_metrics_address: str | None = Field(
        "127.0.0.1:9464",
        description="host:port of the HTTP listener for metrics, without a token; [::]:9464 for "
        "all interfaces; `off` for none",
    )
    reflection: bool = Field(
        False, description="serve gRPC reflection without a token, for grpcurl in development"
    )
    max_payload_bytes: int = Field(
        262_144, ge=1, le=1_048_576, description="largest payload of one event, in bytes"
    )
    max_webhooks_per_merchant: int = Field(
        10, ge=1, le=1000, description="most webhook configs of one merchant"
    )
    merchant_call_rate: float = Field(
        100.0,
        ge=0,
        description="sustained calls per second of one merchant to one server process; a stream "
        "counts as one call; 0 for no limit",
    )
    merchant_call_burst: int = Field(
        500, ge=1, description="burst of calls of one merchant above that rate"
    )
    service_call_rate: float = Field(
        5000.0,
        ge=0,
        description="the same rate for each caller without a merchant; 0 for no limit",
    )
    service_call_burst: int = Field(
        10_000, ge=1, description="burst of calls of such a caller above that rate"
    )
    registration_rate: float = Field(
        1.0,
        ge=0,
        description="sustained creates, updates and pings of webhook configs per second of one "
        "merchant to one server process; 0 for no limit",
    )
    registration_burst: int = Field(60, ge=1, description="burst of these calls above that rate")
    max_pings_per_merchant: int = Field(
        10, ge=1, description="concurrent pings of one merchant in one server process"
    )
    max_streams_per_merchant: int = Field(
        50,
        ge=1,
        description="open watches and event streams of one merchant in one server process",
    )
    max_concurrent_rpcs: int = Field(
        1000, ge=1, description="concurrent RPCs; further ones are refused with RESOURCE_EXHAUSTED"
    )
    max_message_bytes: int = Field(
        16_777_216,
        ge=1_310_720,
        le=134_217_728,
        description="largest message of a call, such as one batch of events, in bytes",
    )
    max_streams_per_connection: int = Field(
        500,
        ge=1,
        description="open RPCs of one connection; further ones wait in the client, or are refused "
        "with UNAVAILABLE in a burst",
    )
    max_connection_age_seconds: Seconds = Field(
        1800.0,
        description="age at which a connection is closed, so that clients find new servers",
    )
    max_connection_grace_seconds: Seconds = Field(
        60.0, description="time for RPCs on such a connection to finish"
    )
    max_connection_idle_seconds: Seconds = Field(
        600.0, description="time after which a connection without RPCs is closed"
    )
    keepalive_seconds: Seconds = Field(
        60.0, description="silence after which the server sends a keepalive ping"
    )
    keepalive_timeout_seconds: Seconds = Field(
        20.0, description="time to answer a keepalive ping before the connection is closed"
    )
    min_ping_interval_seconds: Seconds = Field(
        20.0, description="shortest allowed time between HTTP/2 pings of an idle client"
    )
    max_ping_strikes: int = Field(
        2,
        ge=1,
        description="pings above the allowed rate before the connection is closed "
        "(ENHANCE_YOUR_CALM)",
    )
    health_interval_seconds: Seconds = Field(
        2.0, description="time between two checks of the database for the health service"
    )
    ping_timeout_seconds: Seconds = Field(10.0, description="timeout of the ping at registration")
    watch_keep_alive_seconds: Seconds = Field(
        15.0, description="time between keepalive messages of a WatchDeliveries stream"
    )
    watch_backlog: int = Field(
        5000, ge=1, description="unread attempts after which a watch is ended"
    )
    server_drain_seconds: Seconds = Field(
        15.0, description="time for running RPCs to finish after SIGTERM"
    )

    _off = field_validator("admin_address", "server_metrics_address")(none_when_off)


class AuthSettings(SettingsBlock):
    """The issuer whose tokens are accepted."""

    jwt_issuer: str = Field(min_length=1, description="the `iss` every token must carry, exactly")
    jwt_audience: str = Field("postrider", description="the `aud` every token must name")
    jwt_jwks_url: str | None = Field(
        None, description="https URL of the issuer's key set (http only on loopback)"
    )
    jwt_public_key_file: Path | None = Field(
        None, description="PEM file with the issuer's public key, instead of a key set"
    )
    jwt_max_lifetime_seconds: Seconds = Field(
        86_400.0, description="longest accepted time between a token's `iat` and `exp`"
    )

    @model_validator(mode="after")
    def _one_key_source(self) -> "AuthSettings":
        if (self.jwt_jwks_url is None) == (self.jwt_public_key_file is None):
            raise ValueError(
                "set exactly one of WEBHOOK_JWT_JWKS_URL and WEBHOOK_JWT_PUBLIC_KEY_FILE"
            )
        return self


def _certificate_scopes(value: Any) -> Any:
    return parse_certificate_scopes(value) if isinstance(value, str) else value


CertificateScopes = Annotated[
    tuple[tuple[str, frozenset[Scope]], ...], NoDecode, BeforeValidator(_certificate_scopes)
]


class TlsSettings(SettingsBlock):
    """TLS of the gRPC listener, and callers that certificates identify."""

    tls_certificate_file: Path | None = Field(
        None,
        description="PEM file with the listener's certificate and its chain; unset for plain text, "
        "for loopback and meshes; a changed file applies to new connections",
    )
    tls_private_key_file: Path | None = Field(
        None, description="PEM file with the private key of that certificate"
    )
    tls_client_ca_file: Path | None = Field(
        None,
        description="PEM file with the CAs of client certificates, which are then required (mTLS)",
    )
    mtls_listen_address: str | None = Field(
        None,
        description="host:port of a second listener that requires client certificates, so that "
        "WEBHOOK_LISTEN_ADDRESS accepts callers without one",
    )
    certificate_scopes: CertificateScopes = Field(
        (),
        description="comma-separated `identity=scope scope` pairs of services that call without a "
        "token; an identity is a URI (SPIFFE) or DNS name of the client certificate (mTLS)",
    )

    @model_validator(mode="after")
    def _whole_tls(self) -> "TlsSettings":
        if (self.tls_certificate_file is None) != (self.tls_private_key_file is None):
            raise ValueError(
                "set both of WEBHOOK_TLS_CERTIFICATE_FILE and WEBHOOK_TLS_PRIVATE_KEY_FILE, or none"
            )
        if self.tls_client_ca_file is not None and self.tls_certificate_file is None:
            raise ValueError(
                "WEBHOOK_TLS_CLIENT_CA_FILE needs WEBHOOK_TLS_CERTIFICATE_FILE: clients' "
                "certificates are shown over TLS only"
            )
        if self.mtls_listen_address is not None and self.tls_client_ca_file is None:
            raise ValueError(
                "WEBHOOK_MTLS_LISTEN_ADDRESS needs WEBHOOK_TLS_CLIENT_CA_FILE: set whose "
                "certificates are accepted there"
            )
        if self.certificate_scopes and self.tls_client_ca_file is None:
            raise ValueError(
                "WEBHOOK_CERTIFICATE_SCOPES needs WEBHOOK_TLS_CLIENT_CA_FILE: set whose "
                "certificates are accepted"
            )
        return self
