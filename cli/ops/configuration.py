"""Reads every setting as a process would, and lists all problems, for `postrider config`.

Nothing is started or changed. Secrets are masked, also inside URLs.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from cli.ops.configuration_faults import Blocks, faults
from cli.settings import BLOCKS, explain, plain, unknown_variables
from core.errors import ConfigurationError
from core.file_secrets import Secret
from core.settings import SettingsBlock, variable_name

_USERINFO = re.compile(r"(://[^:/?#@]*):.*@")
_QUERY_PASSWORD = re.compile(r"([?&](?:ssl)?password=)[^&]*")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting. `value` is masked. `source` is default, environment, or the path of a file."""

    block: str
    name: str
    value: str
    source: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings of a process, their problems, and the valid blocks by class."""

    settings: Sequence[Setting]
    problems: Sequence[str]
    blocks: Blocks

    def with_problems(self, further: Sequence[str]) -> "Configuration":
        return replace(self, problems=[*self.problems, *further])

    def report(self, *, as_json: bool) -> str:
        return _as_json(self) if as_json else _as_text(self)


def read_configuration(process: str) -> Configuration:
    """Return the settings and problems of `process`: "server", "delivery" or "all"."""
    environment = os.environ
    settings: list[Setting] = []
    problems = list(unknown_variables(environment))
    blocks = Blocks()
    for block in blocks_of(process):
        settings += _settings_of(block, environment)
        valid, messages = _load(block)
        problems += messages
        if valid is not None:
            blocks.add(valid)
    return Configuration(settings, [*problems, *faults(blocks)], blocks)


def _load(block: type[SettingsBlock]) -> tuple[SettingsBlock | None, list[str]]:
    """Return the block and its problems.

    Defaults replace invalid values, so that one problem does not hide others.
    """
    try:
        return block(), []
    except ValidationError as error:
        messages = list(explain(error))
        wrong = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
    fields = {name: block.model_fields[name] for name in wrong}
    stand_ins: dict[str, Any] = {
        name: "?" if field.is_required() else field.get_default() for name, field in fields.items()
    }
    try:
        return (block(**stand_ins) if stand_ins else None), messages
    except ValidationError as error:
        return None, messages + list(explain(error))


def blocks_of(process: str) -> Iterator[type[SettingsBlock]]:
    """Yield the blocks that a process reads. Every process reads those of `core`."""
    for block in BLOCKS:
        package = block.__module__.partition(".")[0]
        if process == "all" or package in {"core", process}:
            yield block


def _settings_of(block: type[SettingsBlock], environment: Mapping[str, str]) -> Iterator[Setting]:
    title = (block.__doc__ or "").splitlines()[0].rstrip(".")
    secrets = block.secret_names()
    for name, field in block.model_fields.items():
        given = environment.get(variable_name(name), "")
        file = environment.get(f"{variable_name(name)}_FILE", "") if name in secrets else ""
        if given:
            value, source = (
                masked(name, given) if name in secrets else mask_urls(given),
                "environment",
            )
        elif file:
            value, source = _content(name, Path(file)), file
        else:
            value = "" if field.is_required() else plain(field.get_default())
            source = "default"
        yield Setting(title, variable_name(name), value, source)


def _content(name: str, file: Path) -> str:
    try:
        return masked(name, Secret(variable_name(name), file=file).text())
    except ConfigurationError:
        return "?"


def masked(name: str, secret: str) -> str:
    """Mask a secret. URLs stay visible except for passwords, and keys keep their ids."""
    if name == "encryption_keys":
        pairs = [pair.partition(":") for pair in secret.replace("\n", ",").split(",") if pair]
        return ",".join(f"{key_id.strip()}:***" if colon else "***" for key_id, colon, _ in pairs)
    return mask_urls(secret) if "://" in secret else "***"


def mask_urls(text: str) -> str:
    """Mask passwords in URLs: everything from the first colon to the last @."""
    return _QUERY_PASSWORD.sub(r"\1***", _USERINFO.sub(r"\1:***@", text))


def _as_text(configuration: Configuration) -> str:
    lines: list[str] = []
    width = max(len(setting.name) for setting in configuration.settings)
    block = ""
    for setting in configuration.settings:
        if setting.block != block:
            block = setting.block
            lines += ["", f"# {block}"] if lines else [f"# {block}"]
        lines.append(f"{setting.name:<{width}}  {setting.value or '-'}  ({setting.source})")
    lines.append("")
    if configuration.problems:
        lines.append(f"problems: {len(configuration.problems)}")
        lines += [f"  - {problem}" for problem in configuration.problems]
    else:
        lines.append("no problems")
    return "\n".join(lines)


def _as_json(configuration: Configuration) -> str:
    return orjson.dumps(
        {
            "settings": [asdict(setting) for setting in configuration.settings],
            "problems": list(configuration.problems),
        }
    ).decode()
