"""Settings of the gRPC process alone."""

from pathlib import Path

from pydantic import Field, model_validator

from core.config import Block, Seconds


class ServerSettings(Block):
    """Listening, limits, and how long a stop may take."""

    listen_address: str = Field(
        "127.0.0.1:50051",
        description="host:port of the gRPC listener; [::]:50051 for all interfaces",
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
    max_concurrent_rpcs: int = Field(
        1000, ge=1, description="RPCs served at once; one more is refused with RESOURCE_EXHAUSTED"
    )
    ping_timeout_seconds: Seconds = Field(
        10.0, description="how long a receiver may take to answer the ping at registration"
    )
    server_drain_seconds: Seconds = Field(
        15.0, description="how long running RPCs may finish after SIGTERM"
    )


class AuthSettings(Block):
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
