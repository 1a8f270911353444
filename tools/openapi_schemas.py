"""Converts protobuf messages to schemas of OpenAPI 3.1, by the JSON mapping of protobuf."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)

_F = FieldDescriptorProto
#: JavaScript numbers cannot represent 64 bits, so protobuf writes strings.
_INT64 = {"type": "string", "format": "int64", "pattern": "^-?[0-9]+$"}
_SCALARS: dict[int, dict[str, Any]] = {
    _F.TYPE_DOUBLE: {"type": "number", "format": "double"},
    _F.TYPE_FLOAT: {"type": "number", "format": "float"},
    _F.TYPE_INT32: {"type": "integer", "format": "int32"},
    _F.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    _F.TYPE_INT64: _INT64,
    _F.TYPE_UINT64: _INT64,
    _F.TYPE_BOOL: {"type": "boolean"},
    _F.TYPE_STRING: {"type": "string"},
    _F.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_WELL_KNOWN: dict[str, dict[str, Any]] = {
    ".google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    ".google.protobuf.Duration": {
        "type": "string",
        "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$",
        "examples": ["2.500s"],
    },
    ".google.protobuf.FieldMask": {"type": "string", "examples": ["description,retrySchedule"]},
}


class Contract:
    """Descriptors by name, and their comments."""

    def __init__(self, files: Iterable[FileDescriptorProto]):
        self._files = {file.name: file for file in files}
        self._messages: dict[str, DescriptorProto] = {}
        self._enums: dict[str, EnumDescriptorProto] = {}
        self._comments: dict[str, str] = {}
        for file in self._files.values():
            self._read(file)

    def services(self, names: Iterable[str]) -> Iterator[tuple[str, ServiceDescriptorProto]]:
        """Return the services of these files by full name."""
        for file in map(self._files.__getitem__, names):
            for service in file.service:
                yield f".{file.package}.{service.name}", service

    def comment(self, full_name: str) -> str:
        """Return the leading comment, or an empty string."""
        return self._comments.get(full_name, "")

    def message(self, full_name: str) -> DescriptorProto:
        return self._messages[full_name]

    def enum(self, full_name: str) -> EnumDescriptorProto:
        return self._enums[full_name]

    def field(self, message_name: str, path: str) -> tuple[str, FieldDescriptorProto]:
        """Return the field at a dotted path, and the full name of its message."""
        first, _, rest = path.partition(".")
        [field] = [field for field in self.message(message_name).field if field.name == first]
        return self.field(field.type_name, rest) if rest else (message_name, field)

    def _read(self, file: FileDescriptorProto) -> None:
        self._add(f".{file.package}", file.message_type, file.enum_type)
        for location in file.source_code_info.location:
            if location.leading_comments and (name := _name_at(file, location.path)):
                self._comments[name] = _text(location.leading_comments)

    def _add(
        self,
        prefix: str,
        messages: Iterable[DescriptorProto],
        enums: Iterable[EnumDescriptorProto],
    ) -> None:
        self._enums.update({f"{prefix}.{enum.name}": enum for enum in enums})
        for message in messages:
            full_name = f"{prefix}.{message.name}"
            self._messages[full_name] = message
            self._add(full_name, message.nested_type, message.enum_type)


class Schemas:
    """Creates each requested schema and its references once."""

    def __init__(self, contract: Contract):
        self._contract = contract
        self.made: dict[str, dict[str, Any]] = {}

    def require(self, full_name: str) -> str:
        """Return the name of a message's schema in `made`."""
        name = full_name.rpartition(".")[2]
        if name not in self.made:
            self.made[name] = {}  # First, for recursive messages.
            self.made[name] = self.object_of(full_name)
        return name

    def object_of(
        self, full_name: str, fields: Iterable[FieldDescriptorProto] | None = None
    ) -> dict[str, Any]:
        """Return a message as an object, with all or some of its fields."""
        chosen = list(self._contract.message(full_name).field if fields is None else fields)
        schema: dict[str, Any] = {
            "type": "object",
            "description": self._contract.comment(full_name),
            "properties": {field.json_name: self.of_field(full_name, field) for field in chosen},
        }
        groups: dict[int, list[str]] = {}
        for field in chosen:
            if field.HasField("oneof_index") and not field.proto3_optional:
                groups.setdefault(field.oneof_index, []).append(field.json_name)
        if groups:
            schema["allOf"] = [_at_most_one(names) for names in groups.values()]
        return schema

    def of_field(self, owner: str, field: FieldDescriptorProto) -> dict[str, Any]:
        """Return the schema of a field with its comment. `owner` is the message's full name."""
        comment = self._contract.comment(f"{owner}.{field.name}")
        schema: dict[str, Any] = {"description": comment}
        if "Read-only." in comment:
            schema["readOnly"] = True
        if entry := self._map_entry(field):
            value = self._value(entry.field[1])
            return schema | {"type": "object", "additionalProperties": value}
        if field.label == _F.LABEL_REPEATED:
            return schema | {"type": "array", "items": self._value(field)}
        return schema | self._value(field)

    def is_object(self, field: FieldDescriptorProto) -> bool:
        """Return whether JSON represents it as an object."""
        return field.type == _F.TYPE_MESSAGE and field.type_name not in _WELL_KNOWN

    def _value(self, field: FieldDescriptorProto) -> dict[str, Any]:
        if field.type == _F.TYPE_ENUM:
            return ref(self._require_enum(field.type_name))
        if field.type != _F.TYPE_MESSAGE:
            return dict(_SCALARS[field.type])
        if field.type_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[field.type_name])
        if field.type_name.startswith(".google."):
            raise NotImplementedError(f"the JSON form of {field.type_name}")
        return ref(self.require(field.type_name))

    def _require_enum(self, full_name: str) -> str:
        enum = self._contract.enum(full_name)
        values = [
            f"- `{v.name}`: {self._contract.comment(f'{full_name}.{v.name}')}" for v in enum.value
        ]
        self.made[enum.name] = {
            "type": "string",
            "description": "\n".join([self._contract.comment(full_name), "", *values]),
            "enum": [value.name for value in enum.value],
        }
        return enum.name

    def _map_entry(self, field: FieldDescriptorProto) -> DescriptorProto | None:
        if field.type != _F.TYPE_MESSAGE:
            return None
        message = self._contract.message(field.type_name)
        return message if message.options.map_entry else None


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def lower_camel(name: str) -> str:
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), name)


def _at_most_one(names: list[str]) -> dict[str, Any]:
    given = [{"required": [name]} for name in names]
    return {"oneOf": [*given, {"not": {"anyOf": given}}]}


def _name_at(file: FileDescriptorProto, path: Sequence[int]) -> str | None:
    """Return the full name of the descriptor at a location's path, or None, as for options."""
    found: Any = file
    name = f".{file.package}"
    for number, index in zip(path[::2], path[1::2], strict=False):
        step = found.DESCRIPTOR.fields_by_number.get(number)
        if step is None or not step.is_repeated or step.message_type is None:
            return None
        found = getattr(found, step.name)[index]
        name += f".{found.name}"
    return None if len(path) % 2 else name


def _text(comment: str) -> str:
    paragraphs = re.split(r"\n\s*\n", comment.strip())
    return "\n\n".join(" ".join(line.strip() for line in p.splitlines()) for p in paragraphs)
