"""Page sizes and page tokens."""

import base64
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidArgument
from core.ids import new_id
from server.rpc.pagination import page_size, page_token, parse_page_token


@pytest.mark.parametrize(
    ("requested", "used"), [(0, 50), (1, 1), (50, 50), (100, 100), (101, 100), (2**31 - 1, 100)]
)
def test_page_size_is_bounded_by_the_maximum(requested: int, used: int) -> None:
    assert page_size(requested, default=50, maximum=100) == used


def test_negative_page_size_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="meaning 50") as refused:
        page_size(-1, default=50, maximum=100)
    assert refused.value.violations[0].field == "page_size"


def test_empty_token_means_the_first_page() -> None:
    assert parse_page_token("", UUID, "list") is None


def test_token_returns_its_position() -> None:
    position = new_id()
    token = page_token(position.hex, "list", "m_1")
    assert parse_page_token(token, UUID, "list", "m_1") == position


@pytest.mark.parametrize(
    "identity",
    [
        *(("list", "m_2"), ("other", "m_1"), ("m_1", "list")),
        *(("list",), ("list", "m_1", ""), ("listm_1",)),
    ],
)
def test_token_of_another_list_is_refused(identity: tuple[str, ...]) -> None:
    token = page_token(new_id().hex, "list", "m_1")
    with pytest.raises(InvalidArgument) as refused:
        parse_page_token(token, UUID, *identity)
    assert refused.value.reason == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize("position", ["", "x", "\x00", "-" * 1000, "0" * 31])
def test_forged_position_is_refused(position: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_page_token(page_token(position, "list"), UUID, "list")


def test_position_must_be_ascii() -> None:
    genuine = base64.urlsafe_b64decode(page_token("x" * 7, "list") + "=")
    forged = base64.urlsafe_b64encode(genuine[:8] + b"\xff").decode()
    with pytest.raises(InvalidArgument):
        parse_page_token(forged, str, "list")


@given(st.text())
def test_random_text_is_refused(text: str) -> None:
    if text:
        with pytest.raises(InvalidArgument):
            parse_page_token(text, UUID, "list")


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_tokens_are_url_safe(position: str) -> None:
    token = page_token(position, "list")
    assert token.replace("-", "").replace("_", "").isalnum()
    assert parse_page_token(token, str, "list") == position
