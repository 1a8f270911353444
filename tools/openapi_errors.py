"""The schema of errors in REST: google.rpc.Status with the details that Postrider sends."""

from typing import Any

_TYPE = "type.googleapis.com/google.rpc."


def _detail(name: str, description: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "required": ["@type"],
        "properties": {"@type": {"const": _TYPE + name}, **properties},
    }


def _list(**properties: str) -> dict[str, Any]:
    fields = {name: {"type": "string", "description": text} for name, text in properties.items()}
    return {"type": "array", "items": {"type": "object", "properties": fields}}


ERROR_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["code", "message", "details"],
        "properties": {
            "code": {"type": "integer", "description": "The gRPC code; HTTP's status follows it."},
            "message": {"type": "string", "description": "What is wrong and what to do."},
            "details": {
                "type": "array",
                "items": {
                    "anyOf": [
                        {"$ref": f"#/components/schemas/{name}"}
                        for name in ("ErrorInfo", "BadRequest", "QuotaFailure", "RetryInfo")
                    ]
                },
            },
        },
    },
    "ErrorInfo": _detail(
        "ErrorInfo",
        "Always there: which error it is, for programs.",
        reason={
            "type": "string",
            "description": "A word that stays; docs/guide/errors.md lists them.",
        },
        domain={"enum": ["postrider", "gateway"], "description": "Who refused the call."},
        metadata={"type": "object", "additionalProperties": {"type": "string"}},
    ),
    "BadRequest": _detail(
        "BadRequest",
        "Each field that is wrong.",
        fieldViolations=_list(
            field="Its path as in the protos: `webhook_config.url`.",
            description="What to do.",
            reason="Which error it is, for programs.",
        ),
    ),
    "QuotaFailure": _detail(
        "QuotaFailure",
        "Which limit is reached.",
        violations=_list(subject="What the limit counts for.", description="What to do."),
    ),
    "RetryInfo": _detail(
        "RetryInfo",
        "The same call may be sent again.",
        retryDelay={"type": "string", "description": "After so long.", "examples": ["1s"]},
    ),
}

ERROR_RESPONSE: dict[str, Any] = {
    "description": "Refused.",
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/Error"},
            "example": {
                "code": 3,
                "message": "webhook_config.url: the URL must begin with https://",
                "details": [
                    {
                        "@type": f"{_TYPE}ErrorInfo",
                        "reason": "URL_NOT_HTTPS",
                        "domain": "postrider",
                        "metadata": {},
                    },
                    {
                        "@type": f"{_TYPE}BadRequest",
                        "fieldViolations": [
                            {
                                "field": "webhook_config.url",
                                "description": "the URL must begin with https://",
                                "reason": "URL_NOT_HTTPS",
                            }
                        ],
                    },
                ],
            },
        }
    },
}
