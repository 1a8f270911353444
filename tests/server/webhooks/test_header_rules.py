"""The rules for headers that a merchant adds."""

import pytest

from server.webhooks.header_rules import header_violations, prefix_violations


def reasons(headers: dict[str, str]) -> dict[str, str]:
    return {v.field: v.reason for v in header_violations("headers", headers)}


def test_ordinary_headers_are_accepted() -> None:
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
def test_reserved_header_names_are_refused_in_any_case(name: str) -> None:
    for spelling in {name, name.lower(), name.upper()}:
        assert reasons({spelling: "x"}) == {f"headers[{spelling!r}]": "HEADER_DENIED"}


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a:", "a\r\nb", "é", "(x)", "a/b", "\x00", "x" * 129]
)
def test_header_name_must_be_a_token(name: str) -> None:
    assert list(reasons({name: "x"}).values()) == ["HEADER_NAME_INVALID"]


@pytest.mark.parametrize("value", [" a", "a ", "a\r\nHost: b", "a\nb", "\t", "é", "\x7f", "a\x00"])
def test_header_value_must_be_trimmed_printable_ascii(
    value: str,
) -> None:
    [violation] = header_violations("headers", {"X-A": value.replace("a", "swordfish")})
    assert violation.reason == "HEADER_VALUE_INVALID"
    assert "swordfish" not in violation.description


def test_header_names_are_case_insensitive() -> None:
    assert list(reasons({"X-A": "1", "x-a": "2"}).values()) == ["HEADER_REPEATED"]


def test_headers_are_limited_in_number_and_size() -> None:
    assert reasons({f"X-{n}": "x" for n in range(20)}) == {}
    assert reasons({f"X-{n}": "x" for n in range(21)}) == {"headers": "HEADERS_COUNT"}
    assert reasons({"X-A": "x" * 4096}) == {}
    assert reasons({"X-A": "x" * 4097}) == {"headers['X-A']": "HEADER_VALUE_TOO_LONG"}
    full = {f"X-{n}": "x" * 4093 for n in range(4)}
    assert reasons(full) == {}
    assert reasons({**full, "Y": ""}) == {"headers": "HEADERS_TOO_LONG"}


@pytest.mark.parametrize("prefix", ["", "svix", "a", "acme-hooks", "x2", "a" * 32, "x-acme"])
def test_ordinary_prefixes_are_accepted(prefix: str) -> None:
    assert prefix_violations("p", prefix, {"X-Tenant": "a", "acmeid": "b"}) == []


@pytest.mark.parametrize(
    "prefix",
    [
        *("Acme", "acme_", "2acme", "-acme", "acme-", "a--b", "a b", "a:b", "a\r\nb", "é", "ａ"),
        *("a" * 33, "webhook", "webhook-x", "x-webhook", "proxy", "proxy-acme"),
    ],
)
def test_malformed_or_reserved_prefix_is_refused(prefix: str) -> None:
    [violation] = prefix_violations("p", prefix, {})
    assert (violation.field, violation.reason) == ("p", "HEADER_PREFIX_INVALID")


@pytest.mark.parametrize("name", ["acme-id", "ACME-Timestamp", "Acme-Signature"])
def test_prefix_colliding_with_merchant_header_is_refused(name: str) -> None:
    [violation] = prefix_violations("p", "acme", {name: "x"})
    assert violation.reason == "HEADER_PREFIX_INVALID"
