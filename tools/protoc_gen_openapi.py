"""A buf plugin that writes openapi.yaml, the REST part of the contract, from the protos.

Paths are from google.api.http, schemas from the messages, and texts from their comments. It fails
for a construct that it cannot express, so that the document is complete.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any

import yaml
from google.api import annotations_pb2
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import (
    FieldDescriptorProto,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

from tools.openapi_errors import ERROR_RESPONSE, ERROR_SCHEMAS
from tools.openapi_schemas import Contract, Schemas, lower_camel, ref

_SUCCESS = "200"
_INFO = {
    "title": "Postrider",
    "version": "v1",
    "summary": "Signed webhooks, delivered at least once.",
    "description": (
        "What the gateway in `deploy/envoy` serves, made from the protos. Every call needs a "
        "token; the scope it must carry stands with each group of calls."
    ),
    "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
}


def main() -> None:
    request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    response = CodeGeneratorResponse(
        supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL
    )
    response.file.add(name="openapi.yaml", content=to_yaml(document(request)))
    sys.stdout.buffer.write(response.SerializeToString())


def document(request: CodeGeneratorRequest) -> dict[str, Any]:
    """Return the document, with the schemas that paths need, and the errors."""
    contract = Contract(request.proto_file)
    schemas = Schemas(contract)
    paths: dict[str, dict[str, Any]] = {}
    tags = []
    for full_name, service in contract.services(request.file_to_generate):
        operations = list(_operations(contract, schemas, full_name, service))
        if operations:
            tags.append({"name": service.name, "description": contract.comment(full_name)})
        for path, verb, operation in operations:
            paths.setdefault(path, {})[verb] = {"tags": [service.name], **operation}
    return {
        "openapi": "3.1.0",
        "info": _INFO,
        "servers": [{"url": "http://127.0.0.1:8080", "description": "deploy/envoy as it is"}],
        "security": [{"token": []}],
        "tags": tags,
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            },
            "responses": {"Error": ERROR_RESPONSE},
            "schemas": {**schemas.made, **ERROR_SCHEMAS},
        },
    }


def to_yaml(value: Any) -> str:
    """Writes block style without anchors, which few tools for OpenAPI support."""
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    return f"# Made from protos/ by `make generate`; do not edit.\n{text}"


def _operations(
    contract: Contract, schemas: Schemas, full_name: str, service: ServiceDescriptorProto
) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yield (path, verb, operation) of every method with a path."""
    for method in service.method:
        rule = method.options.Extensions[annotations_pb2.http]
        verb = rule.WhichOneof("pattern")
        if verb is None:
            continue
        if rule.additional_bindings or verb == "custom":
            raise NotImplementedError(f"{method.name}: additional and custom bindings")
        path, bound = _path(getattr(rule, verb))
        comment = contract.comment(f"{full_name}.{method.name}")
        yield (
            path,
            verb,
            {
                "operationId": method.name[0].lower() + method.name[1:],
                "summary": re.split(r"(?<=\.)\s", comment, maxsplit=1)[0],
                "description": comment,
                **_inputs(contract, schemas, method, rule.body, bound),
                "responses": {
                    _SUCCESS: _success(schemas, method),
                    "default": {"$ref": "#/components/responses/Error"},
                },
            },
        )


def _path(template: str) -> tuple[str, dict[str, str]]:
    """Return the path with plain parameter names, and the field of each."""
    bound = {field.rpartition(".")[2]: field for field in re.findall(r"\{([^}=]+)\}", template)}
    path = re.sub(r"\{([^}]+)\}", lambda m: f"{{{lower_camel(m[1].rpartition('.')[2])}}}", template)
    return path, bound


def _inputs(
    contract: Contract,
    schemas: Schemas,
    method: MethodDescriptorProto,
    body: str,
    bound: dict[str, str],
) -> dict[str, Any]:
    """Return `parameters` and `requestBody`, if present."""
    message = contract.message(method.input_type)
    parameters = [
        _parameter("path", lower_camel(name), *contract.field(method.input_type, field), schemas)
        for name, field in bound.items()
    ]
    free = [field for field in message.field if field.name not in {*bound.values(), body}]
    found: dict[str, Any] = {}
    if body == "*":
        if free:
            schema = schemas.object_of(method.input_type, fields=free)
            # A call on an existing resource may have no body. A create needs one.
            found["requestBody"] = _json(schema) | {"required": not bound}
    else:
        parameters += [
            _parameter("query", f.json_name, method.input_type, f, schemas) for f in free
        ]
        if body:
            [field] = [field for field in message.field if field.name == body]
            found["requestBody"] = _json(schemas.of_field(method.input_type, field)) | {
                "required": True
            }
    return ({"parameters": parameters} if parameters else {}) | found


def _parameter(
    place: str, name: str, owner: str, field: FieldDescriptorProto, schemas: Schemas
) -> dict[str, Any]:
    if schemas.is_object(field):
        raise NotImplementedError(f"{field.name}: a message in the {place} of a request")
    schema = schemas.of_field(owner, field)
    description = schema.pop("description")
    # In the message the field is read-only, but in the path it names the resource.
    schema.pop("readOnly", None)
    return {
        "name": name,
        "in": place,
        **({"required": True} if place == "path" else {}),
        "description": description,
        "schema": schema,
    }


def _success(schemas: Schemas, method: MethodDescriptorProto) -> dict[str, Any]:
    name = schemas.require(method.output_type)
    if method.server_streaming:
        return {"description": "One JSON object a line, as they come."} | _json(ref(name))
    return {"description": "Done."} | _json(ref(name))


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


if __name__ == "__main__":
    main()
