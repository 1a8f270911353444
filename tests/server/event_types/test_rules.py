"""Names and prefixes of event types."""

import pytest

from server.event_types.rules import is_event_type_prefix


@pytest.mark.parametrize("text", ["payment.*", "a.b.c.*", "x_1.*", "p" * 126 + ".*"])
def test_prefix_is_segments_and_a_star(text: str) -> None:
    assert is_event_type_prefix(text)


@pytest.mark.parametrize(
    "text", ["*", ".*", "payment*", "payment.*.x", "a..*", "A.*", "a.**", "a.*\n", "p" * 127 + ".*"]
)
def test_other_text_is_not_a_prefix(text: str) -> None:
    assert not is_event_type_prefix(text)
