"""Writes what the settings say of themselves into the README's table and .env.example.

`make generate` runs it; with --check it changes nothing and fails when something is out of date.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from cli.settings import BLOCKS, plain
from core.settings import SettingsBlock, variable_name

ROOT = Path(__file__).parent.parent
UNITS = {"_seconds": "s", "_bytes": "bytes"}
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def main() -> None:
    readme, example = ROOT / "README.md", ROOT / ".env.example"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = {
        readme: f"{before}{BEGIN}\n{table()}{END}{after}",
        example: env_example(),
    }
    stale = [path for path, text in wanted.items() if path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.name} is out of date: run `make generate`")
        sys.exit(bool(stale))
    for path in stale:
        path.write_text(wanted[path])


def table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for block in BLOCKS:
        rows.append(f"| **{_title(block)}** | | |")
        for name, field in block.model_fields.items():
            default = "required" if name in block.required_secrets else _cell(name, field)
            rows.append(f"| `{variable_name(name)}` | {default} | {_meaning(field)} |")
    return "\n".join(rows) + "\n"


def env_example() -> str:
    return "\n".join(_env_lines())


def _env_lines() -> Iterator[str]:
    yield "# Every setting of Postrider with its default. Copy to .env, change it, load it:"
    yield "#     set -a; . ./.env; set +a"
    for block in BLOCKS:
        yield ""
        yield f"# {_title(block)}"
        for name, field in block.model_fields.items():
            yield ""
            yield f"# {_meaning(field)}"
            default = "" if field.is_required() else plain(field.get_default())
            yield f"#{variable_name(name)}={default}"
    yield ""


def _title(block: type[SettingsBlock]) -> str:
    return (block.__doc__ or "").splitlines()[0].rstrip(".")


def _meaning(field: FieldInfo) -> str:
    return field.description or ""


def _cell(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    text = plain(field.get_default())
    unit = next((f" {unit}" for suffix, unit in UNITS.items() if name.endswith(suffix)), "")
    return f"`{text}`{unit}" if text else "none"


if __name__ == "__main__":
    main()
