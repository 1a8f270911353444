"""Compiles JSON Schemas (draft 2020-12) of bounded cost, and validates payloads with them.

No schema fetches a document or has a pattern that backtracks. Validation runs at most 1,000 checks
for each value of the payload, about 10 ns each.
"""

from itertools import islice
from typing import Any

import jsonschema_rs
import orjson

SCHEMA_BYTES_MAX = 64 * 1024
#: Subschemas of a schema. Each counts once for every reference to it.
_PARTS_MAX = 1000
_PATTERN_BYTES_MAX = 256 * 1024
_PATH_CHARACTERS_MAX = 200
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_DYNAMIC = ("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor")
#: These match the schemas beside them a second time.
_MATCHED_TWICE = ("unevaluatedProperties", "unevaluatedItems")


class SchemaRefused(Exception):  # noqa: N818 - a refusal, not an error
    """The schema is not accepted. The message is the reason, without a full stop."""


class PayloadSchema:
    """A compiled schema."""

    def __init__(self, text: str):
        """Raises SchemaRefused unless the text is a schema of bounded cost."""
        if len(text.encode()) > SCHEMA_BYTES_MAX:
            raise SchemaRefused(f"has more than {SCHEMA_BYTES_MAX} bytes")
        try:
            schema = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise SchemaRefused(f"is not JSON: {error}") from None
        if not isinstance(schema, (dict, bool)):
            raise SchemaRefused("must be a JSON object")
        if isinstance(schema, dict) and schema.get("$schema", _DRAFT) != _DRAFT:
            raise SchemaRefused(f"must have {_DRAFT} as $schema, or none")
        _Parts(schema).require_bounded()
        try:
            self._validator = jsonschema_rs.Draft202012Validator(
                schema,
                retriever=_refuse_to_fetch,
                pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES_MAX),
            )
        except jsonschema_rs.ValidationError as error:
            raise SchemaRefused(_why_not_a_schema(error)) from None
        except ValueError:
            raise SchemaRefused("is nested too deeply") from None

    def violation(self, document: object) -> str | None:
        """Return the place and the rule of the first violation, or None.

        It never contains values of the payload, because producers may log it.
        """
        try:
            if self._validator.is_valid(document):
                return None
            [error] = islice(self._validator.iter_errors(document), 1)
        except ValueError:
            return "it is nested too deeply to find the place"
        rule = _shortened("#" + "".join(f"/{_escaped(step)}" for step in error.schema_path))
        missing = getattr(error.kind, "property", None) if rule.endswith("/required") else None
        lacking = f", {_shortened(str(missing))!r} is missing" if missing else ""
        return f"at {_path_of(error.instance_path)} by the rule {rule}{lacking}"


class _Parts:
    """Counts the subschemas of a schema and follows its references.

    Every object counts, also one that is data, as in `enum`. So the count is never too low.
    """

    def __init__(self, schema: Any):
        self._schema = schema
        self._counted: dict[str, int] = {}
        self._following: set[str] = set()

    def require_bounded(self) -> None:
        """Raises SchemaRefused for a reference to another document, a circle, or a large schema."""
        try:
            parts = self._count(self._schema, is_root=True)
        except RecursionError:
            raise SchemaRefused("is nested too deeply") from None
        if parts > _PARTS_MAX:
            raise SchemaRefused(
                f"has {min(parts, 10**9)} subschemas, counted once for each reference "
                f"and twice beside unevaluated…; at most {_PARTS_MAX} are accepted"
            )

    def _count(self, value: Any, *, is_root: bool = False) -> int:
        if isinstance(value, list):
            return sum(map(self._count, value))
        if not isinstance(value, dict):
            return 0
        for keyword in _DYNAMIC if is_root else (*_DYNAMIC, "$id", "$schema"):
            if isinstance(value.get(keyword), (str, bool)):
                where = "" if is_root else " below its top"
                raise SchemaRefused(f"uses {keyword}{where}, which is not accepted")
        parts = 1 + sum(map(self._count, value.values()))
        reference = value.get("$ref")
        if isinstance(reference, str):
            parts += self._count_reference(reference)
        return parts * 2 if any(keyword in value for keyword in _MATCHED_TWICE) else parts

    def _count_reference(self, reference: str) -> int:
        shown = _shortened(reference)
        if reference != "#" and not reference.startswith("#/"):
            raise SchemaRefused(f"refers to {shown!r}: only #/… within the schema is accepted")
        if reference in self._following or reference == "#":
            raise SchemaRefused(f"refers to {shown!r} from within itself, which is not accepted")
        if reference not in self._counted:
            self._following.add(reference)
            self._counted[reference] = self._count(self._resolve(reference))
            self._following.remove(reference)
        return self._counted[reference]

    def _resolve(self, reference: str) -> Any:
        if "%" in reference:
            raise SchemaRefused(f"refers to {_shortened(reference)!r}: write it without %-escapes")
        value = self._schema
        for step in reference[2:].split("/"):
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif (
                isinstance(value, list)
                and key.isascii()
                and key.isdigit()
                and int(key) < len(value)
            ):
                value = value[int(key)]
            else:
                raise SchemaRefused(f"refers to {_shortened(reference)!r}, which is not in it")
        return value


def _refuse_to_fetch(uri: str) -> Any:
    raise ValueError(f"{uri} is not fetched")


def _why_not_a_schema(error: jsonschema_rs.ValidationError) -> str:
    if error.message.endswith('is not a "regex"'):
        return (
            f"has a pattern at {_path_of(error.instance_path)} that is not a regular expression "
            "without look-around and back-references, or is too large"
        )
    return f"is not a JSON Schema: {_shortened(error.message)} at {_path_of(error.instance_path)}"


def _path_of(steps: list[str | int]) -> str:
    parts = [f"[{s}]" if isinstance(s, int) else f".{_escaped(s)}" for s in steps]
    return _shortened("$" + "".join(parts))


def _escaped(step: str | int) -> str:
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in str(step))


def _shortened(text: str) -> str:
    text = _escaped(text)
    return text if len(text) <= _PATH_CHARACTERS_MAX else text[:_PATH_CHARACTERS_MAX] + "…"
