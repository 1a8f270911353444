"""Received text cannot control a terminal, and JSON is shown unchanged."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.dev.printable import payload_lines, printable


@given(text=st.text(st.characters(codec=None)))
def test_nothing_that_is_not_printable_comes_through(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[2J", "\\u001b[2J"),
        ("\x9b31m", "\\u009b31m"),
        ("\r\n", "\\u000d\\u000a"),
        ("abc\u202egpj.exe", "abc\\u202egpj.exe"),
        ("\udc80", "\\udc80"),
        ("\U000e0041", "\\U000e0041"),
        ("Müller ✓ 東", "Müller ✓ 東"),
    ],
)
def test_hostile_characters_are_escaped(hostile: str, shown: str) -> None:
    assert printable(hostile) == shown


@given(body=st.binary(max_size=300))
def test_no_payload_drives_the_terminal(body: bytes) -> None:
    assert all(line.isprintable() for line in payload_lines(body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=30)
@given(value=JSON, compact=st.booleans())
def test_indented_json_is_the_json_that_came(value: object, compact: bool) -> None:
    body = json.dumps(value, separators=(",", ":") if compact else None).encode()

    assert json.loads("\n".join(payload_lines(body, most=10**6))) == value


def test_numbers_and_keys_that_come_twice_stay_as_they_were_sent() -> None:
    lines = payload_lines(b'{"a": 1.10, "a": 1e400, "b": [], "c": [{"d": "x,\\"]"}]}')

    assert lines == [
        "{",
        '  "a": 1.10,',
        '  "a": 1e400,',
        '  "b": [],',
        '  "c": [',
        "    {",
        '      "d": "x,\\"]"',
        "    }",
        "  ]",
        "}",
    ]


def test_much_is_cut_and_it_says_so() -> None:
    lines = payload_lines(b"[1" + b",1" * 1000 + b"]")

    assert len(lines) == 201
    assert lines[-1] == "… 803 more lines, 2,003 bytes in all"
    assert payload_lines(b"x" * 501) == ["x" * 500 + "… (501 characters)"]
    assert payload_lines(b"[" * 100_000)
