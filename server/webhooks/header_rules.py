"""Validates the headers that a merchant adds to webhooks.

A merchant may add headers, but cannot replace those that frame the request or that Postrider sends.
"""

import re
from collections.abc import Mapping

from core.errors import FieldViolation
from core.signing import prefixed_names

_COUNT_MAX = 20
_VALUE_BYTES_MAX = 4 * 1024
_TOTAL_BYTES_MAX = 16 * 1024
_SHOWN_MAX = 64
_PREFIX_MAX = 32
_PREFIX = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_DENIED = frozenset(
    {
        *("host", "content-length", "transfer-encoding", "te", "trailer", "connection"),
        *("keep-alive", "upgrade", "expect", "content-encoding", "content-type", "cookie"),
        *("accept-encoding", "user-agent"),
    }
)
_DENIED_PREFIXES = ("proxy-", "webhook-", "x-webhook-")


def header_violations(field: str, headers: Mapping[str, str]) -> list[FieldViolation]:
    """Return all violations. They contain no values, which may be secrets."""
    if len(headers) > _COUNT_MAX:
        text = f"must be at most {_COUNT_MAX} headers"
        return [FieldViolation(field, text, "HEADERS_COUNT")]
    if sum(len(name) + len(value) for name, value in headers.items()) > _TOTAL_BYTES_MAX:
        text = f"must be at most {_TOTAL_BYTES_MAX} bytes in all, names and values"
        return [FieldViolation(field, text, "HEADERS_TOO_LONG")]
    violations, seen = [], set[str]()
    for name, value in sorted(headers.items()):
        path = f"{field}[{name[:_SHOWN_MAX]!r}]"
        broken = _name_broken(path, name, seen) or _value_broken(path, value)
        if broken:
            violations.append(broken)
        seen.add(name.lower())
    return violations


def prefix_violations(field: str, prefix: str, headers: Mapping[str, str]) -> list[FieldViolation]:
    """Return at most one violation. The prefix must not produce a header of another sender."""
    if not prefix:
        return []
    if len(prefix) > _PREFIX_MAX or not _PREFIX.fullmatch(prefix):
        text = f"is 1 to {_PREFIX_MAX} lower-case letters, digits and single hyphens, as in acme"
        return [FieldViolation(field, text, "HEADER_PREFIX_INVALID")]
    names = set(prefixed_names(prefix))
    if any(_is_denied(name) for name in names):
        text = "would make headers that frame the request or that Postrider sends: choose another"
        return [FieldViolation(field, text, "HEADER_PREFIX_INVALID")]
    if names & {name.lower() for name in headers}:
        text = "would make a header that `headers` has, too: leave it out there"
        return [FieldViolation(field, text, "HEADER_PREFIX_INVALID")]
    return []


def _is_denied(lower: str) -> bool:
    return lower in _DENIED or lower.startswith(_DENIED_PREFIXES)


def _name_broken(path: str, name: str, seen: set[str]) -> FieldViolation | None:
    lower = name.lower()
    if not _TOKEN.fullmatch(name):
        text = "a header name is 1 to 128 letters, digits and !#$%&'*+-.^_`|~"
        return FieldViolation(path, text, "HEADER_NAME_INVALID")
    if _is_denied(lower):
        text = "frames the request or is sent by Postrider: choose another name"
        return FieldViolation(path, text, "HEADER_DENIED")
    if lower in seen:
        text = "is listed twice: header names ignore case"
        return FieldViolation(path, text, "HEADER_REPEATED")
    return None


def _value_broken(path: str, value: str) -> FieldViolation | None:
    if len(value) > _VALUE_BYTES_MAX:
        text = f"must have a value of at most {_VALUE_BYTES_MAX} bytes"
        return FieldViolation(path, text, "HEADER_VALUE_TOO_LONG")
    if not (value.isascii() and value.isprintable()) or value != value.strip(" "):
        text = "must have a value in printable ASCII, without spaces around it"
        return FieldViolation(path, text, "HEADER_VALUE_INVALID")
    return None
