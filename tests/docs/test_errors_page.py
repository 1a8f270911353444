"""docs/guide/errors.md lists exactly the reasons of the code, with their gRPC codes."""

import re
from collections.abc import Iterator

import yaml

from core import errors
from server.rpc import ids, status
from tests.support.error_reasons import SOURCES, Use, uses_in
from tests.support.gateway import CONFIGURATION
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/guide/errors.md").read_text()
_ROW = re.compile(r"^\| `([A-Z_]+)` \| ([^|]+) \| [^|]+ \| [^|]+ \|$", re.MULTILINE)

#: Not exceptions. They become INVALID_ARGUMENT.
_VIOLATIONS = {"FieldViolation", "UrlRefused"}


def rows(heading: str) -> dict[str, str]:
    """The reasons of a section, each with its code."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = _ROW.findall(section)
    assert len(dict(found)) == len(found), "a reason has two rows"
    return dict(found)


def uses() -> Iterator[Use]:
    for use in uses_in({str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}):
        if use.reason == "*_NOT_FOUND":
            for kind in ids._NAMES:
                yield Use(ids.not_found(kind, "").reason, use.given_to, use.place)
        else:
            yield use


def test_errors_page_lists_exactly_the_reasons_of_the_code() -> None:
    given = {use.reason: use.place for use in uses()}
    listed = rows("Postrider")

    assert {r: place for r, place in given.items() if r not in listed} == {}, "add rows for these"
    assert [r for r in listed if r not in given] == [], "remove these rows"


def test_errors_page_has_the_code_of_each_reason() -> None:
    listed = rows("Postrider")
    codes = {error.__name__: code.name for error, code in status._CODES.items()}
    codes |= dict.fromkeys(_VIOLATIONS, codes["InvalidArgument"])
    checked = [use for use in uses() if use.given_to in codes]

    assert len(checked) > 30
    assert [use for use in checked if listed[use.reason] != codes[use.given_to]] == []


def test_errors_page_is_sorted() -> None:
    for heading in ("Postrider", "Gateway"):
        assert list(rows(heading)) == sorted(rows(heading)), heading


def test_errors_page_lists_the_replies_of_envoy() -> None:
    configured = yaml.safe_load(CONFIGURATION.read_text())
    [listener] = configured["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    answers = {}
    for mapper in manager["local_reply_config"]["mappers"]:
        [detail] = mapper["body_format_override"]["json_format"]["details"]
        statuses = re.findall(r"'default_value': (\d+)", str(mapper["filter"]))
        answers[detail["reason"]] = ", ".join(statuses)

    assert rows("Gateway") == answers


def test_each_error_class_has_a_code() -> None:
    assert set(errors.PostriderError.__subclasses__()) == set(status._CODES)
