"""The REST document, and whether an answer is as it says."""

from typing import Any

import jsonschema
import yaml

from tests.support.paths import ROOT

DOCUMENT = yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())


def assert_conforms(body: Any, schema_name: str) -> None:
    """Fails unless a JSON value is what a schema of the document says, with no field beside."""
    schemas = {
        name: {"additionalProperties": False, **schema} if "properties" in schema else schema
        for name, schema in DOCUMENT["components"]["schemas"].items()
    }
    schema = {"$ref": f"#/components/schemas/{schema_name}", "components": {"schemas": schemas}}
    jsonschema.Draft202012Validator(schema).validate(body)
