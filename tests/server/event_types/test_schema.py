"""Payload schemas: violations, refused schemas and limits of their cost."""

import json
from time import perf_counter
from typing import Any

import pytest

from server.event_types.schema import PayloadSchema, SchemaRefused


def schema(value: Any) -> PayloadSchema:
    return PayloadSchema(json.dumps(value))


def test_violation_has_path_and_rule_without_values() -> None:
    payments = schema(
        {
            "type": "object",
            "required": ["amount"],
            "properties": {
                "amount": {"type": "integer", "minimum": 1},
                "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
                "card": {"pattern": "^[0-9]{4}$"},
            },
            "$defs": {"line": {"type": "object", "additionalProperties": False}},
        }
    )
    assert payments.violation({"amount": 1, "lines": [{}], "card": "1234"}) is None
    assert (
        payments.violation({"amount": 0}) == "at $.amount by the rule #/properties/amount/minimum"
    )
    assert payments.violation({}) == "at $ by the rule #/required, 'amount' is missing"
    violation = payments.violation({"amount": 1, "lines": [{}, {"secret-name": "secret-value"}]})
    assert violation == "at $.lines[1] by the rule #/$defs/line/additionalProperties"
    violation = payments.violation({"amount": 1, "card": "4111111111111111"})
    assert violation == "at $.card by the rule #/properties/card/pattern"
    assert schema(False).violation({"secret": 1}) == "at $ by the rule #"


def test_violation_is_one_short_line() -> None:
    numbers = schema({"additionalProperties": {"type": "integer"}})
    violation = numbers.violation({"a\n\u202e" + "x" * 10_000: "y"})
    assert violation is not None
    assert violation.isprintable()
    assert len(violation) < 600


def test_deeply_nested_payload_is_checked() -> None:
    nested = json.loads("[" * 900 + "]" * 900)
    assert schema({"type": "array"}).violation(nested) is None
    assert (
        schema({"type": "object"}).violation(nested) == "it is nested too deeply to find the place"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("5", "must be a JSON object"),
        ('{"type": "strin"}', "not a JSON Schema"),
        ('{"$schema": "http://json-schema.org/draft-07/schema#"}', "draft/2020-12"),
        ('{"$schema": 5}', "draft/2020-12"),
        ('{"$ref": "https://other.test/schema"}', "only #/"),
        ('{"$ref": "file:///etc/passwd"}', "only #/"),
        ('{"$ref": "#anchor"}', "only #/"),
        ('{"$ref": "#/$defs/none"}', "not in it"),
        ('{"allOf": [true], "$ref": "#/allOf/1"}', "not in it"),
        ('{"$ref": "#/%24defs/a", "$defs": {"a": {}}}', "%-escapes"),
        ('{"items": {"$ref": "#"}}', "within itself"),
        ('{"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}', "within itself"),
        (
            '{"$defs": {"a": {"not": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}}}',
            "within itself",
        ),
        ('{"properties": {"a": {"$id": "https://other.test/"}}}', "$id below its top"),
        ('{"$dynamicRef": "#a"}', "$dynamicRef"),
        ('{"pattern": "("}', "at $.pattern"),
        ('{"pattern": "(?=a)"}', "look-around"),
        (r'{"pattern": "(a)\\1"}', "back-references"),
        ('{"pattern": "((a{100}){100}){100}"}', "too large"),
        ('{"patternProperties": {"(": {}}}', "regular expression"),
        (json.dumps({"description": "x" * 65_536}), "more than 65536 bytes"),
        (json.dumps({"allOf": [{} for _ in range(1001)]}), "1002 subschemas"),
        ('{"not":' * 1000 + "true" + "}" * 1000, "nested too deeply"),
    ],
)
def test_invalid_or_expensive_schema_is_refused(text: str, reason: str) -> None:
    with pytest.raises(SchemaRefused) as refused:
        PayloadSchema(text)
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 600


def test_repeated_references_count_each_time() -> None:
    doubling: dict[str, Any] = {"a0": {}}
    for n in range(1, 40):
        doubling[f"a{n}"] = {"allOf": [{"$ref": f"#/$defs/a{n - 1}"}] * 2}
    with pytest.raises(SchemaRefused, match="subschemas"):
        schema({"$defs": doubling})


def test_unevaluated_properties_count_twice_per_level() -> None:
    value: dict[str, Any] = {}
    for _ in range(20):
        value = {"anyOf": [{"properties": {"a": value}}], "unevaluatedProperties": False}
    with pytest.raises(SchemaRefused, match="subschemas"):
        schema(value)


def test_properties_may_have_keyword_names() -> None:
    names = schema({"properties": {name: {"type": "integer"} for name in ("$id", "$ref")}})
    assert names.violation({"$id": 1, "$ref": 2}) is None
    assert names.violation({"$ref": "x"}) == "at $.$ref by the rule #/properties/$ref/type"


def test_pattern_does_not_backtrack_exponentially() -> None:
    began = perf_counter()
    assert schema({"pattern": "^(a+)+$"}).violation("a" * 250_000 + "!")
    assert perf_counter() - began < 5
