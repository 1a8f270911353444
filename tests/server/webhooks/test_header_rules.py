"""The rules for headers that a merchant adds."""

import pytest

from server.webhooks.header_rules import header_violations, prefix_violations


def reasons(headers: dict[str, str]) -> dict[str, str]:
    return {v.field: v.reason for v in header_violations("headers", headers)}


def test_ordinary_headers_are_taken() -> None:
    assert reasons({}) == {}
    assert (
        reasons({"Authorization": "Bearer a.b-c", "X-Tenant": "a b", "x~1!#$%&'*+^_`|.": ""}) == {}
    )


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "Content-Length", "Transfer-Encoding", "TE", "Trailer", "Connection"),
        *("Keep-Alive", "Upgrade", "Expect", "Proxy-Authorization", "Proxy-Connection"),
        *("Content-Encoding", "Content-Type", "Cookie", "Accept-Encoding", "User-Agent"),
        *("webhook-id", "webhook-signature", "webhook-timestamp", "webhook-anything"),
        *("X-Webhook-Signature", "X-Webhook-Event", "x-webhook-attempt", "X-WEBHOOK-NEW"),
    ],
)
def test_a_name_that_frames_the_request_or_is_ours_is_refused_in_any_spelling(name: str) -> None:
    for spelling in {name, name.lower(), name.upper()}:
        assert reasons({spelling: "x"}) == {f"headers[{spelling!r}]": "HEADER_DENIED"}


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a:", "a\r\nb", "é", "(x)", "a/b", "\x00", "x" * 129]
)
def test_a_name_is_a_token(name: str) -> None:
    assert list(reasons({name: "x"}).values()) == ["HEADER_NAME_INVALID"]


@pytest.mark.parametrize("value", [" a", "a ", "a\r\nHost: b", "a\nb", "\t", "é", "\x7f", "a\x00"])
def test_a_value_is_printable_ascii_without_spaces_around_it_and_is_not_repeated(
    value: str,
) -> None:
    [violation] = header_violations("headers", {"X-A": value.replace("a", "swordfish")})
    assert violation.reason == "HEADER_VALUE_INVALID"
    assert "swordfish" not in violation.description


def test_names_that_differ_only_in_case_are_one_name() -> None:
    assert list(reasons({"X-A": "1", "x-a": "2"}).values()) == ["HEADER_REPEATED"]


def test_number_and_size_are_bounded() -> None:
    assert reasons({f"X-{n}": "x" for n in range(20)}) == {}
    assert reasons({f"X-{n}": "x" for n in range(21)}) == {"headers": "HEADERS_COUNT"}
    assert reasons({"X-A": "x" * 4096}) == {}
    assert reasons({"X-A": "x" * 4097}) == {"headers['X-A']": "HEADER_VALUE_TOO_LONG"}
    full = {f"X-{n}": "x" * 4093 for n in range(4)}
    assert reasons(full) == {}
    assert reasons({**full, "Y": ""}) == {"headers": "HEADERS_TOO_LONG"}


@pytest.mark.parametrize("prefix", ["", "svix", "a", "acme-hooks", "x2", "a" * 32, "x-acme"])
def test_ordinary_prefixes_are_taken(prefix: str) -> None:
    assert prefix_violations("p", prefix, {"X-Tenant": "a", "acmeid": "b"}) == []


@pytest.mark.parametrize(
    "prefix",
    [
        *("Acme", "acme_", "2acme", "-acme", "acme-", "a--b", "a b", "a:b", "a\r\nb", "é", "ａ"),
        *("a" * 33, "webhook", "webhook-x", "x-webhook", "proxy", "proxy-acme"),
    ],
)
def test_a_prefix_that_is_no_name_or_hides_another_header_is_refused(prefix: str) -> None:
    [violation] = prefix_violations("p", prefix, {})
    assert (violation.field, violation.reason) == ("p", "HEADER_PREFIX_INVALID")


@pytest.mark.parametrize("name", ["acme-id", "ACME-Timestamp", "Acme-Signature"])
def test_a_prefix_that_makes_a_header_of_the_merchants_is_refused(name: str) -> None:
    [violation] = prefix_violations("p", "acme", {name: "x"})
    assert violation.reason == "HEADER_PREFIX_INVALID"
