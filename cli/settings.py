"""Reads the environment into frozen blocks of settings, and explains invalid values."""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog
from pydantic import Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from core.errors import ConfigurationError
from core.settings import (
    ENV_PREFIX,
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    RetentionSettings,
    SettingsBlock,
    TraceSettings,
    variable_name,
)
from delivery.settings import DeliverySettings
from server.settings import AuthSettings, ServerSettings, TlsSettings


class LocalSettings(SettingsBlock):
    """Only for `postrider run`, `demo`, `token` and `listen`."""

    data_dir: Path = Field(
        Path(".postrider"), description="where `postrider run` keeps its database, keys and log"
    )
    pg_bin: Path | None = Field(
        None, description="directory of the PostgreSQL programs to use instead of the bundled ones"
    )
    receiver_port: int = Field(
        8443, ge=1, le=65535, description="port of the demo receiver of `postrider run`"
    )
    receiver_secrets: SecretStr | None = Field(
        None,
        description="comma-separated secrets and public keys that `postrider listen` verifies with",
    )


class CanarySettings(SettingsBlock):
    """The tokens of `postrider canary`, unless they are in files."""

    canary_publish_token: SecretStr | None = Field(
        None, description="a token with the scope events:publish"
    )
    canary_manage_token: SecretStr | None = Field(
        None, description="a token with the scope webhooks:manage and the canary's merchant_id"
    )


#: All blocks, in the order of docs/settings.md.
BLOCKS: tuple[type[SettingsBlock], ...] = (
    DatabaseSettings,
    EncryptionSettings,
    EgressSettings,
    LogSettings,
    TraceSettings,
    ServerSettings,
    AuthSettings,
    TlsSettings,
    DeliverySettings,
    RetentionSettings,
    LocalSettings,
    CanarySettings,
)


#: Removed settings and their replacements. They are ignored with a warning, so that an environment
#: that still sets one does not stop an upgrade.
REMOVED = {
    "WEBHOOK_METRICS_MERCHANTS": "the runbook has a query for the busiest merchants",
}

log = structlog.get_logger()


def load[B: SettingsBlock](block: type[B], **fallbacks: Any) -> B:
    """Return a block from the environment. `fallbacks` replace values that are not set.

    Raises ConfigurationError with one line for each problem.
    """
    given = {name: value for name, value in fallbacks.items() if not is_set(name)}
    try:
        return block(**given)
    except ValidationError as error:
        raise ConfigurationError("\n".join(explain(error))) from None


def warn_of_removed_variables(environment: Mapping[str, str]) -> None:
    for name in sorted(REMOVED.keys() & environment.keys()):
        log.warning("setting_removed", setting=name, message=f"unset it: {REMOVED[name]}")


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Raise ConfigurationError for WEBHOOK_ variables that are no settings, as when misspelt."""
    if unknown := list(unknown_variables(environment)):
        raise ConfigurationError("\n".join(unknown))


def unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a message for each WEBHOOK_ variable that is no setting."""
    known = {variable_name(name) for name, _ in all_fields()} | REMOVED.keys()
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]}?" if close else "docs/settings.md lists them all"
            yield f"{name} is not a setting; {advice}"


def all_fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yield the field name and description of each setting."""
    for block in BLOCKS:
        yield from block.model_fields.items()


def is_set(field_name: str) -> bool:
    """Return whether the environment has a value, or for a secret the path of a file."""
    name = variable_name(field_name)
    return bool(os.environ.get(name) or os.environ.get(f"{name}_FILE"))


def explain(error: ValidationError) -> Iterator[str]:
    """Yield a line for each problem, with its variable and without its value."""
    for fault in error.errors(include_input=False, include_url=False):
        # The value stays out of the message: it may be a secret.
        message = fault["msg"].removeprefix("Value error, ")
        if fault["loc"]:
            name = variable_name(str(fault["loc"][0]))
            yield f"{name} is not set" if fault["type"] == "missing" else f"{name}: {message}"
        else:
            yield message


def plain(value: Any) -> str:
    """Return the value as it is written in the environment."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}" if value < 1e6 else str(value)
        case tuple():
            return ",".join(_plain_item(item) for item in value)
    return str(value)


def _plain_item(item: Any) -> str:
    if isinstance(item, tuple):
        low, high = item
        return str(low) if low == high else f"{low}-{high}"
    return plain(item)
