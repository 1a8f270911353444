"""The OpenAPI document, and a check of responses against it."""

from typing import Any

import jsonschema
import yaml

from tests.support.paths import ROOT

DOCUMENT = yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())


def assert_conforms(body: Any, schema_name: str) -> None:
    """Fails unless a JSON value matches a schema of the document without additional fields."""
    schemas = {
        name: {"additionalProperties": False, **schema} if "properties" in schema else schema
        for name, schema in DOCUMENT["components"]["schemas"].items()
    }
    schema = {"$ref": f"#/components/schemas/{schema_name}", "components": {"schemas": schemas}}
    jsonschema.Draft202012Validator(schema).validate(body)
