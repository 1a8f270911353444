"""Settings of the gRPC process alone."""

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
        description="host:port where operators' tools find health, reflection and channelz without "
        "a token, so keep it on loopback; `off` for none",
    )
    server_metrics_address: str | None = Field(
        "127.0.0.1:9464",
        description="host:port where Prometheus finds the metrics of a server, by HTTP and without "
        "a token: [::]:9464 for all interfaces; `off` for none",
    )
    reflection: bool = Field(
        False, description="serve gRPC reflection without a token, for grpcurl in development"
    )
    max_payload_bytes: int = Field(
        262_144, ge=1, le=1_048_576, description="largest payload of one event, in bytes"
    )
    max_webhooks_per_merchant: int = Field(
        10, ge=1, le=1000, description="webhook configs one merchant may have at a time"
    )
    merchant_call_rate: float = Field(
        100.0,
        ge=0,
        description="calls a second that the tokens of one merchant may make of one server process "
        "in the long run, a stream counting as one; 0 for no limit",
    )
    merchant_call_burst: int = Field(
        500, ge=1, description="such calls at once, after a time without"
    )
    service_call_rate: float = Field(
        5000.0,
        ge=0,
        description="the same for each caller that is not of a merchant; 0 for no limit",
    )
    service_call_burst: int = Field(
        10_000, ge=1, description="such calls at once, after a time without"
    )
    registration_rate: float = Field(
        1.0,
        ge=0,
        description="creates, updates and pings of webhook configs a second that one merchant may "
        "make of one server process in the long run; 0 for no limit",
    )
    registration_burst: int = Field(
        60, ge=1, description="such calls at once, after a time without"
    )
    max_pings_per_merchant: int = Field(
        10, ge=1, description="receivers that one server process pings at once for one merchant"
    )
    max_streams_per_merchant: int = Field(
        50,
        ge=1,
        description="watches and event streams that one server process keeps open for the tokens "
        "of one merchant",
    )
    max_concurrent_rpcs: int = Field(
        1000, ge=1, description="RPCs served at once; one more is refused with RESOURCE_EXHAUSTED"
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
        description="RPCs one connection may have open; further ones wait at the client, or in a "
        "burst are refused with UNAVAILABLE before they begin",
    )
    max_connection_age_seconds: Seconds = Field(
        1800.0,
        description="age at which a connection is asked to close, so that clients find new servers",
    )
    max_connection_grace_seconds: Seconds = Field(
        60.0, description="how long RPCs on a connection that became too old may go on"
    )
    max_connection_idle_seconds: Seconds = Field(
        600.0, description="after which a connection without RPCs is closed"
    )
    keepalive_seconds: Seconds = Field(
        60.0, description="silence after which a peer is asked whether it is still there"
    )
    keepalive_timeout_seconds: Seconds = Field(
        20.0, description="how long it may take to answer before its connection is closed"
    )
    min_ping_interval_seconds: Seconds = Field(
        20.0, description="shortest time between the HTTP/2 pings of a client that sends nothing"
    )
    max_ping_strikes: int = Field(
        2, ge=1, description="pings too many before such a client is cut off (ENHANCE_YOUR_CALM)"
    )
    health_interval_seconds: Seconds = Field(
        2.0, description="time between the looks at the database that the health service reports"
    )
    ping_timeout_seconds: Seconds = Field(
        10.0, description="how long a receiver may take to answer the ping at registration"
    )
    watch_keep_alive_seconds: Seconds = Field(
        15.0, description="how often WatchDeliveries gives a sign of life when there is no news"
    )
    watch_backlog: int = Field(
        5000, ge=1, description="attempts one watch may leave unread before it is ended"
    )
    server_drain_seconds: Seconds = Field(
        15.0, description="how long running RPCs may finish after SIGTERM"
    )

    _off = field_validator("admin_address", "server_metrics_address")(none_when_off)


class AuthSettings(SettingsBlock):
    """Whose tokens are accepted."""

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
    """TLS of the gRPC listener, and the callers that their certificates make known."""

    tls_certificate_file: Path | None = Field(
        None,
        description="PEM file with the listener's certificate and its chain; none: plain text, for "
        "loopback and meshes. A changed file counts from the next connection on",
    )
    tls_private_key_file: Path | None = Field(
        None, description="PEM file with the private key of that certificate"
    )
    tls_client_ca_file: Path | None = Field(
        None,
        description="PEM file with the authorities whose certificates clients must show (mTLS)",
    )
    mtls_listen_address: str | None = Field(
        None,
        description="host:port of a second listener that alone requires clients' certificates, so "
        "that WEBHOOK_LISTEN_ADDRESS takes callers without",
    )
    certificate_scopes: CertificateScopes = Field(
        (),
        description="comma-separated `identity=scope scope` pairs: services that may call without "
        "a token, by the URI (SPIFFE) or DNS name in the certificate they show (mTLS)",
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
