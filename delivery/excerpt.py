"""The beginning of an answer's body as text that any log, terminal and database takes."""

import codecs
import re

#: Of the body, in bytes; escaped it may be four times as long.
EXCERPT_BYTES = 1024

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def excerpt(beginning: bytes) -> str:
    """Its first bytes as valid UTF-8; control characters and what is not UTF-8 become \\xNN."""
    if not beginning:
        return ""
    whole = len(beginning) <= EXCERPT_BYTES
    # A character that the cut went through is left out, not shown as broken.
    text, _ = codecs.utf_8_decode(beginning[:EXCERPT_BYTES], "backslashreplace", whole)
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
