"""Ids: order, format and parsing."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import first_id_at, format_id, new_id, parse_id

KINDS = st.sampled_from(["wh", "evt", "dlv"])


def test_new_ids_are_ascending_uuidv7() -> None:
    made = [new_id() for _ in range(1000)]

    assert {(one.version, one.variant) for one in made} == {(7, "specified in RFC 4122")}
    assert made == sorted(set(made))


def test_first_id_at_is_the_lowest_of_its_millisecond() -> None:
    moment = datetime(2026, 11, 22, 7, 30, 12, 345_999, tzinfo=UTC)

    first = first_id_at(moment)

    assert first == first_id_at(moment.replace(microsecond=345_000))
    assert first.int >> 80 == 1_795_332_612_345
    assert first.int & ((1 << 80) - 1) == 0


def test_first_id_at_applies_the_clock_shift() -> None:
    moment, apart = datetime(2026, 11, 22, tzinfo=UTC), timedelta(days=1)

    assert first_id_at(moment, apart) == first_id_at(moment + apart)
    assert first_id_at(moment, -apart) == first_id_at(moment - apart)


def test_first_id_at_accepts_extreme_moments() -> None:
    earliest = datetime(1970, 1, 1, tzinfo=UTC)

    assert first_id_at(earliest, timedelta(minutes=-1)) == first_id_at(earliest) == UUID(int=0)
    assert first_id_at(datetime.max.replace(tzinfo=UTC), timedelta(days=1)) > new_id()


def test_id_has_prefix_and_32_hexadecimal_digits() -> None:
    value = UUID("01890a5d-ac96-774b-bcce-b302099a8057")

    assert format_id("wh", value) == "wh_01890a5dac96774bbcceb302099a8057"


@given(kind=KINDS, value=st.uuids())
def test_formatted_id_parses_and_has_no_dot(kind: str, value: UUID) -> None:
    text = format_id(kind, value)  # type: ignore[arg-type]

    assert parse_id(kind, text) == value  # type: ignore[arg-type]
    assert "." not in text


def test_id_of_another_kind_is_refused() -> None:
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
def test_other_spellings_of_an_id_are_refused(text: str) -> None:
    assert parse_id("wh", text) is None


@given(kind=KINDS, text=st.text())
def test_parsed_text_formats_back(kind: str, text: str) -> None:
    value = parse_id(kind, text)  # type: ignore[arg-type]

    assert value is None or format_id(kind, value) == text  # type: ignore[arg-type]
