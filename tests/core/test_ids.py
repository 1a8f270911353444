"""Ids: ascending inside, prefixed outside, and nothing else is taken for one."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import first_id_at, format_id, new_id, parse_id

KINDS = st.sampled_from(["wh", "evt", "dlv"])


def test_new_ids_are_uuids_of_version_7_that_ascend() -> None:
    made = [new_id() for _ in range(1000)]

    assert {(one.version, one.variant) for one in made} == {(7, "specified in RFC 4122")}
    assert made == sorted(set(made))


def test_the_first_id_of_a_millisecond_is_between_those_made_in_it_and_before_it() -> None:
    moment = datetime(2026, 11, 22, 7, 30, 12, 345_999, tzinfo=UTC)

    first = first_id_at(moment)

    assert first == first_id_at(moment.replace(microsecond=345_000))
    assert first.int >> 80 == 1_795_332_612_345
    assert first.int & ((1 << 80) - 1) == 0


def test_the_first_id_of_another_clock_is_as_far_away_as_that_clock_is() -> None:
    moment, apart = datetime(2026, 11, 22, tzinfo=UTC), timedelta(days=1)

    assert first_id_at(moment, apart) == first_id_at(moment + apart)
    assert first_id_at(moment, -apart) == first_id_at(moment - apart)


def test_before_1970_the_first_id_is_the_lowest_and_after_9999_it_is_still_one() -> None:
    earliest = datetime(1970, 1, 1, tzinfo=UTC)

    assert first_id_at(earliest, timedelta(minutes=-1)) == first_id_at(earliest) == UUID(int=0)
    assert first_id_at(datetime.max.replace(tzinfo=UTC), timedelta(days=1)) > new_id()


def test_an_id_is_its_prefix_and_32_hexadecimal_digits() -> None:
    value = UUID("01890a5d-ac96-774b-bcce-b302099a8057")

    assert format_id("wh", value) == "wh_01890a5dac96774bbcceb302099a8057"


@given(kind=KINDS, value=st.uuids())
def test_what_is_formatted_parses_back_and_holds_no_dot(kind: str, value: UUID) -> None:
    text = format_id(kind, value)  # type: ignore[arg-type]

    assert parse_id(kind, text) == value  # type: ignore[arg-type]
    assert "." not in text


def test_an_id_of_another_kind_is_not_an_id_of_this_one() -> None:
    text = format_id("evt", new_id())

    assert parse_id("wh", text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "wh",
        "wh_",
        "_01890a5dac96774bbcceb302099a8057",
        "01890a5dac96774bbcceb302099a8057",
        "wh_01890a5dac96774bbcceb302099a805",
        "wh_01890a5dac96774bbcceb302099a80570",
        "wh_01890A5DAC96774BBCCEB302099A8057",
        "wh_01890a5d-ac96-774b-bcce-b302099a8057",
        "wh_01890a5dac96774bbcceb302099a805g",
        "wh_01890a5dac96774bbcceb302099a8057\n",
        " wh_01890a5dac96774bbcceb302099a8057",
        "WH_01890a5dac96774bbcceb302099a8057",
        "wh__01890a5dac96774bbcceb302099a8057",
        "wh_٠1890a5dac96774bbcceb302099a8057",
    ],
)
def test_one_id_has_one_spelling(text: str) -> None:
    assert parse_id("wh", text) is None


@given(kind=KINDS, text=st.text())
def test_any_text_parses_to_nothing_or_to_what_formats_to_it(kind: str, text: str) -> None:
    value = parse_id(kind, text)  # type: ignore[arg-type]

    assert value is None or format_id(kind, value) == text  # type: ignore[arg-type]
