"""Makes received text safe for a terminal."""

import json
import re
import unicodedata

_INDENT = "  "
#: Tokens of JSON: strings, empty containers, punctuation, white space, numbers and words.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\{\s*\}|\[\s*\]|[{}\[\],:]|\s+|[^\s{}\[\],:"]+')


def printable(text: str) -> str:
    """Return `text` with \\u escapes for characters that are not printable.

    Control and format characters move the cursor, change the writing direction or hide text. Lone
    surrogates stand for bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def payload_lines(body: bytes, most: int = 200) -> list[str]:
    """Return the lines of a payload, indented if it is JSON, with numbers and keys as received.

    Returns at most `most` lines of at most 500 characters, and one with the number left out.
    """
    text = body.decode(errors="backslashreplace")
    lines = _indented(text) if _is_json(body) else text.splitlines()
    shown = [_cut(printable(line)) for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"… {len(lines) - most:,} more lines, {len(body):,} bytes in all")
    return shown


def _indented(text: str) -> list[str]:
    # Not parsed, because that would round numbers and drop repeated keys.
    lines, line, depth = [], "", 0
    for part in _TOKEN.findall(text):
        if part in "}]":
            lines.append(line)
            depth -= 1
            line = _INDENT * depth + part
        elif part in "{[,":
            lines.append(line + part)
            depth += part != ","
            line = _INDENT * depth
        elif part[0] in "{[":
            line += part[0] + part[-1]
        elif not part.isspace():
            line += ": " if part == ":" else part
    return [*lines, line]


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _cut(line: str) -> str:
    return line if len(line) <= 500 else f"{line[:500]}… ({len(line):,} characters)"


def _escaped(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "    "
    if unicodedata.category(character) == "Zs":
        return " "
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
