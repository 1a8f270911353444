"""The URL grammar: refused URLs with their reasons, accepted URLs and their canonical form."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from urllib.parse import urlsplit

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from yarl import URL

from core.addresses import AddressPolicy
from core.urls import UrlPolicy, UrlRefused, parse_webhook_url

PORTS = ((443, 443), (8443, 8443))
STRICT = UrlPolicy(AddressPolicy(), PORTS)
LOOPBACK_ALLOWED = UrlPolicy(AddressPolicy((ip_network("127.0.0.0/8"),)), PORTS)

REFUSED = {
    "URL_NOT_HTTPS": [
        "",
        "hooks.shop.com/a",
        "//hooks.shop.com/a",
        "http://hooks.shop.com/a",
        "HTTP://hooks.shop.com/a",
        "https:/hooks.shop.com/a",
        "https:hooks.shop.com/a",
        "httpſ://hooks.shop.com/a",
        "ftp://hooks.shop.com/a",
        "file:///etc/passwd",
        "wss://hooks.shop.com/a",
        "javascript:alert(1)",
    ],
    "URL_HAS_CREDENTIALS": [
        "https://user:password@hooks.shop.com/",
        "https://user@hooks.shop.com/",
        "https://@hooks.shop.com/",
        "https://:@hooks.shop.com/",
        "https://hooks.shop.com@127.0.0.1/",
        "https://hooks.shop.com:443@127.0.0.1/",
        "https://hooks.shop.com%2F@127.0.0.1/",
    ],
    "URL_HAS_FRAGMENT": [
        "https://hooks.shop.com/a#b",
        "https://hooks.shop.com#",
        "https://hooks.shop.com#@127.0.0.1/",
        "https://127.0.0.1#.shop.com/",
    ],
    "URL_TOO_LONG": [
        "https://hooks.shop.com/" + "a" * 2026,
        "https://hooks.shop.com/" + "é" * 1100,
        "https://" + "ü" * 1100,
        "https://hooks.shop.com/\ud800" + "a" * 2026,
        "x" * 10_000_000,
    ],
    "URL_MALFORMED": [
        "https://",
        "https:///a",
        "https://?a",
        # Characters that urlsplit and yarl strip.
        " https://hooks.shop.com/",
        "https://hooks.shop.com/ ",
        "https://hooks.shop.com/a b",
        "https://127.0\t.0.1/",
        "https://127.0.0.1\r\n/",
        "https://hooks.shop.com/a\r\nX-Evil: 1",
        "https://hooks.shop.com/\x00",
        "https://hooks.shop.com/\x7f",
        "https://hooks.shop.com/\x85",
        "https://hooks.shop.com/\ud800",
        "https://hooks.shop.com\\@127.0.0.1/",
        "https:\\\\hooks.shop.com/",
        # Digits and dots that compatibility mapping turns into ASCII.
        "https://hoo\u212as.shop.com/",
        "https://hooks\u00ad.shop.com/",
        "https://hooks\u200b.shop.com/",
        "https://hooks\uff0eshop.com/",
        # Names.
        f"https://{'a' * 64}.com/",
        f"https://{'ü' * 60}.com/",
        f"https://{'.'.join(['a' * 63] * 4)}.com/",
        # Paths and queries that clients encode differently.
        "https://hooks.shop.com/é",
        "https://hooks.shop.com/?q=é",
        "https://hooks.shop.com/\u2028",
    ],
    "URL_PORT_NOT_ALLOWED": [
        "https://hooks.shop.com:65979/",  # 443 modulo 2**16
    ],
    "URL_ADDRESS_NOT_ALLOWED": [
        "https://169.254.169.254/latest/meta-data/",
    ],
}

#: Further refused URLs: `https://`, one of these hosts and `/`.
REFUSED_HOSTS = [
    # Ports that int() or yarl would read.
    (
        "URL_MALFORMED",
        """
        :443 hooks.shop.com: hooks.shop.com:+443 hooks.shop.com:-1 hooks.shop.com:4_43
        hooks.shop.com:٤٤٣ hooks.shop.com:４４３ hooks.shop.com:0x1bb hooks.shop.com:000443
        hooks.shop.com:443:443
        """,
    ),
    # Hosts that end in a number and are no dotted quad.
    (
        "URL_MALFORMED",
        """
        2130706433 017700000001 0x7f000001 0x7f.1 0x7f.0x0.0x0.0x1 0177.0.0.1 0177.0.0.01
        127.1 127.0.1 127.0.0.1. 127.0.0.1.. 127.0.0.01 127.0.0.256 127.0.0.1.1 4294967296
        8.8.2056 08.8.8.8 8.8.8.8. shop.1 shop.0x1 shop.0x
        """,
    ),
    # Digits and dots that compatibility mapping turns into ASCII.
    (
        "URL_MALFORMED",
        """
        ①②⑦.⓪.⓪.① １２７.0.0.1 ١٢٧.0.0.1 127。0。0。1 127．0．0．1 hooks。shop。com
        ⓛocalhost ｌｏｃａｌｈｏｓｔ localhoſt
        """,
    ),
    # Brackets around something else.
    (
        "URL_MALFORMED",
        """
        [] [::1 ::1] ::1 [[::1]] [127.0.0.1] [hooks.shop.com] [::ffff:127.0.0.1]
        [::127.0.0.1] [64:ff9b::127.0.0.1] [fe80::1%25eth0] [fe80::1%eth0]
        [2606:4700::1111%25] [v1.fe80::a] [1:2:3] [::1]x x[::1] [::１]
        """,
    ),
    # Names.
    (
        "URL_MALFORMED",
        """
        hooks%2eshop.com 127%2e0.0.1 %31%32%37.0.0.1 hooks.shop.com. localhost. .shop.com
        hooks..shop.com -hooks.shop.com hooks-.shop.com my_hooks.shop.com *.shop.com
        hooks.shop.com;a hooks,shop.com hooks.shop.com&a
        """,
    ),
    (
        "URL_PORT_NOT_ALLOWED",
        """
        hooks.shop.com:0 hooks.shop.com:22 hooks.shop.com:442 hooks.shop.com:444
        hooks.shop.com:5432 hooks.shop.com:65536 hooks.shop.com:99999
        """,
    ),
    (
        "URL_ADDRESS_NOT_ALLOWED",
        """
        0.0.0.0 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.1 127.0.0.1:8443
        127.255.255.255 168.63.129.16 172.16.0.0 172.31.255.255 192.0.0.192 192.168.0.0
        192.168.255.255 198.18.0.0 224.0.0.1 255.255.255.255 [::] [::1] [0:0:0:0:0:0:0:1]
        [::ffff:7f00:1] [::ffff:808:808] [::7f00:1] [::ffff:0:7f00:1] [64:ff9b::7f00:1]
        [64:ff9b:1::1] [2002:7f00:1::] [2001:0:4136:e378:8000:63bf:3fff:fdd2] [2001:db8::1]
        [fd00:ec2::254] [FE80::1] [fec0::1] [ff02::1] [4000::1]
        """,
    ),
    (
        "URL_HOST_NOT_ALLOWED",
        """
        localhost LOCALHOST a.localhost intranet com metadata.google.internal METADATA.GOOG
        metadata.tencentyun.com api.metadata.cloud.ibm.com printer.local a.localdomain a.lan
        a.home 1.0.0.127.in-addr.arpa a.corp a.mail a.test a.invalid a.example a.onion
        kubernetes.default.svc kubernetes.default.svc.cluster.local a.svc.cluster
        a.service.consul
        """,
    ),
]

# text: canonical form
ALLOWED = {
    "https://hooks.shop.com/a": "https://hooks.shop.com/a",
    "https://hooks.shop.com": "https://hooks.shop.com/",
    "https://hooks.shop.com?a=1": "https://hooks.shop.com/?a=1",
    "HTTPS://Hooks.SHOP.Com/A?B=C": "https://hooks.shop.com/A?B=C",
    "https://hooks.shop.com:443/a": "https://hooks.shop.com/a",
    "https://hooks.shop.com:00443/a": "https://hooks.shop.com/a",
    "https://hooks.shop.com:8443": "https://hooks.shop.com:8443/",
    # Both sides of a refused range.
    "https://9.255.255.255/": "https://9.255.255.255/",
    "https://11.0.0.0/": "https://11.0.0.0/",
    "https://100.63.255.255/": "https://100.63.255.255/",
    "https://100.128.0.0/": "https://100.128.0.0/",
    "https://126.255.255.255/": "https://126.255.255.255/",
    "https://128.0.0.0:8443/": "https://128.0.0.0:8443/",
    "https://172.15.255.255/": "https://172.15.255.255/",
    "https://172.32.0.0/": "https://172.32.0.0/",
    "https://[2606:4700:0000::1111]/": "https://[2606:4700::1111]/",
    "https://[2A00:1450:4001:0:0:0:0:200E]:8443/a": "https://[2a00:1450:4001::200e]:8443/a",
    # International names in both forms. ASCII capitals become lower-case.
    "https://bücher.de/a": "https://xn--bcher-kva.de/a",
    "https://Bücher.de/a": "https://xn--bcher-kva.de/a",
    "https://XN--bcher-KVA.de/a": "https://xn--bcher-kva.de/a",
    "https://straße.de/": "https://xn--strae-oqa.de/",
    "https://例え.jp/": "https://xn--r8jz45g.jp/",
    "https://r3---sn-4g5e.shop.com/": "https://r3---sn-4g5e.shop.com/",
    # Hosts that a blocklist of substrings would refuse.
    "https://localhost.shop.com/": "https://localhost.shop.com/",
    "https://localhost.example.com/": "https://localhost.example.com/",
    "https://127.0.0.1.nip.io/": "https://127.0.0.1.nip.io/",
    "https://10.shop.com/": "https://10.shop.com/",
    "https://0x7f.shop.com/": "https://0x7f.shop.com/",
    "https://internal.shop.com/": "https://internal.shop.com/",
    "https://mylocalhost.com/": "https://mylocalhost.com/",
    "https://metadata.google.com/": "https://metadata.google.com/",
    "https://hooks.shop.com/?to=http://169.254.169.254/": (
        "https://hooks.shop.com/?to=http://169.254.169.254/"
    ),
    "https://hooks.shop.com/localhost": "https://hooks.shop.com/localhost",
    # Path and query stay as they are.
    "https://hooks.shop.com//a//b/../%2e%2E/%7E%2f~;x@y:z!$'()*+,": (
        "https://hooks.shop.com//a//b/../%2e%2E/%7E%2f~;x@y:z!$'()*+,"
    ),
    "https://hooks.shop.com/?a=+%20&a=&=b?c/d": "https://hooks.shop.com/?a=+%20&a=&=b?c/d",
    "https://hooks.shop.com/%zz{|}": "https://hooks.shop.com/%zz{|}",
    "https://hooks.shop.com/a??": "https://hooks.shop.com/a??",
    "https://hooks.shop.com/a?": "https://hooks.shop.com/a",
    "https://hooks.shop.com/" + "a" * 2025: "https://hooks.shop.com/" + "a" * 2025,
}


def refusal(text: str, policy: UrlPolicy = STRICT) -> UrlRefused:
    with pytest.raises(UrlRefused) as caught:
        parse_webhook_url(text, policy)
    return caught.value


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        *((reason, text) for reason, texts in REFUSED.items() for text in texts),
        *((reason, f"https://{h}/") for reason, hosts in REFUSED_HOSTS for h in hosts.split()),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_url_outside_the_grammar_is_refused(reason: str, text: str) -> None:
    refused = refusal(text)
    assert refused.reason == reason
    assert refused.message


@pytest.mark.parametrize(("text", "canonical"), ALLOWED.items(), ids=lambda value: value[:60])
def test_url_within_the_grammar_is_canonicalized(text: str, canonical: str) -> None:
    url = parse_webhook_url(text, STRICT)
    assert url.text == canonical
    assert parse_webhook_url(canonical, STRICT) == url


@pytest.mark.parametrize("text", ALLOWED)
def test_http_client_reads_the_canonical_form_alike(text: str) -> None:
    url = parse_webhook_url(text, STRICT)
    seen = URL(url.text, encoded=True)
    assert (seen.raw_host, seen.port) == (url.host, url.port)
    assert url.text.endswith(seen.raw_path_qs)
    assert f"{seen.scheme}://{seen.raw_authority}{seen.raw_path_qs}" == url.text


def test_url_has_host_port_and_address() -> None:
    named = parse_webhook_url("https://Hooks.Shop.com:8443/a", STRICT)
    assert (named.host, named.port, named.address) == ("hooks.shop.com", 8443, None)
    ipv4 = parse_webhook_url("https://8.8.8.8/", STRICT)
    assert (ipv4.host, ipv4.port, ipv4.address) == ("8.8.8.8", 443, ip_address("8.8.8.8"))
    ipv6 = parse_webhook_url("https://[2606:4700::1111]/", STRICT)
    assert (ipv6.host, ipv6.address) == ("2606:4700::1111", ip_address("2606:4700::1111"))


@pytest.mark.parametrize(
    "text", ["https://localhost:8443/a", "https://shop.localhost/", "https://127.0.0.1:8443/a"]
)
def test_allowed_loopback_works_by_name_and_address(text: str) -> None:
    assert parse_webhook_url(text, LOOPBACK_ALLOWED).text == text


@pytest.mark.parametrize(
    "text",
    [
        "https://[::1]/",
        "https://[::ffff:7f00:1]/",
        "https://10.0.0.1/",
        "https://a.local/",
        "https://localhost./",
        "https://①.localhost/",
        "https://0x7f.1/",
        "https://2130706433/",
    ],
)
def test_allowed_loopback_allows_nothing_else(text: str) -> None:
    refusal(text, LOOPBACK_ALLOWED)


def test_international_name_under_localhost_is_encoded() -> None:
    url = parse_webhook_url("https://bücher.localhost/", LOOPBACK_ALLOWED)
    assert url.text == "https://xn--bcher-kva.localhost/"


def test_localhost_needs_allowed_loopback() -> None:
    policy = UrlPolicy(AddressPolicy((ip_network("10.0.0.0/8"),)), PORTS)
    assert refusal("https://localhost/", policy).reason == "URL_HOST_NOT_ALLOWED"


@pytest.mark.parametrize(("port", "allowed"), [(7999, False), (8000, True), (8999, True)])
def test_port_range_includes_both_ends(port: int, allowed: bool) -> None:
    policy = UrlPolicy(AddressPolicy(), ((8000, 8999),))
    text = f"https://hooks.shop.com:{port}/"
    if allowed:
        assert parse_webhook_url(text, policy).port == port
    else:
        assert refusal(text, policy).reason == "URL_PORT_NOT_ALLOWED"


def test_default_port_is_checked() -> None:
    policy = UrlPolicy(AddressPolicy(), ((8000, 8999),))
    assert refusal("https://hooks.shop.com/", policy).reason == "URL_PORT_NOT_ALLOWED"


@pytest.mark.parametrize("port", [0, 65536])
def test_impossible_port_is_always_refused(port: int) -> None:
    policy = UrlPolicy(AddressPolicy(), ((0, 99999),))
    assert refusal(f"https://hooks.shop.com:{port}/", policy).reason == "URL_PORT_NOT_ALLOWED"


@pytest.mark.parametrize("port", [22, 2375, 2379, 3306, 5432, 6379, 6443, 9200, 10250, 11211])
def test_port_range_excludes_ports_of_other_services(port: int) -> None:
    text = f"https://hooks.shop.com:{port}/"
    everything = UrlPolicy(AddressPolicy(), ((1, 65535),))
    assert refusal(text, everything).reason == "URL_PORT_NOT_ALLOWED"
    named = UrlPolicy(AddressPolicy(), ((1, 65535), (port, port)))
    assert parse_webhook_url(text, named).port == port


@pytest.mark.parametrize(
    "host", ["api.pay.com", "API.Pay.com", "eu.api.pay.com", "xn--bcher-kva.de"]
)
def test_denied_host_and_subdomains_are_refused(host: str) -> None:
    policy = UrlPolicy(AddressPolicy(), PORTS, denied_hosts=("api.pay.com", "xn--bcher-kva.de"))
    assert refusal(f"https://{host}/", policy).reason == "URL_HOST_NOT_ALLOWED"
    assert refusal("https://bücher.de/", policy).reason == "URL_HOST_NOT_ALLOWED"


@pytest.mark.parametrize("host", ["pay.com", "notapi.pay.com", "api.pay.com.shop.com"])
def test_denied_host_leaves_similar_names_allowed(host: str) -> None:
    policy = UrlPolicy(AddressPolicy(), PORTS, denied_hosts=("api.pay.com",))
    assert parse_webhook_url(f"https://{host}/", policy).host == host


def test_port_error_names_the_allowed_ports() -> None:
    policy = UrlPolicy(AddressPolicy(), ((443, 443), (8000, 8999)))
    assert "443, 8000-8999" in refusal("https://hooks.shop.com:22/", policy).message


def test_length_limit_applies_to_the_encoded_name() -> None:
    text = "https://" + "ü.de/" + "a" * (2048 - len("https://ü.de/".encode()))
    assert len(text.encode()) == 2048
    assert refusal(text).reason == "URL_TOO_LONG"


@pytest.mark.parametrize("text", ["https://10.1.2.3/", "https://a.internal/", "https://127.1/"])
def test_error_reveals_neither_host_nor_its_class(text: str) -> None:
    message = refusal(text).message
    assert not any(word in message for word in ("10.1", "127.1", "internal", "private", "loopback"))


# Notations of inet_aton: each part in any base, and the last part holds all remaining bytes.
BASES: list[Callable[[int], str]] = [str, hex, lambda n: f"0{n:o}", lambda n: f"0X{n:X}"]
PRIVATE = ["10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]


@st.composite
def private_address_notations(draw: st.DrawFn) -> tuple[IPv4Address, str]:
    network = draw(st.sampled_from(PRIVATE).map(IPv4Network))
    address = draw(st.ip_addresses(network=network))
    assert isinstance(address, IPv4Address)
    octets = address.packed
    leading = draw(st.integers(0, 3))
    parts = [*octets[:leading], int.from_bytes(octets[leading:])]
    text = ".".join(draw(st.sampled_from(BASES))(part) for part in parts)
    return address, text + draw(st.sampled_from(["", "", "."]))


@given(private_address_notations(), st.sampled_from(["", ":443", ":8443"]))
def test_private_address_is_refused_in_every_notation(
    notation: tuple[IPv4Address, str], port: str
) -> None:
    address, text = notation
    reason = refusal(f"https://{text}{port}/").reason
    assert reason == ("URL_ADDRESS_NOT_ALLOWED" if text == str(address) else "URL_MALFORMED")


@given(private_address_notations())
def test_address_is_accepted_in_one_notation_only(
    notation: tuple[IPv4Address, str],
) -> None:
    address, text = notation
    assume(text != str(address))
    allow_all = UrlPolicy(AddressPolicy((ip_network("0.0.0.0/0"), ip_network("::/0"))), PORTS)
    assert parse_webhook_url(f"https://{address}/", allow_all).address == address
    assert refusal(f"https://{text}/", allow_all).reason == "URL_MALFORMED"


@given(st.text("aAzZ019xX.:/?@%[]-_#\\\t ü①。٣ſ\u212a", max_size=24))
def test_parsers_agree_on_every_accepted_url(tail: str) -> None:
    try:
        url = parse_webhook_url(f"https://{tail}", STRICT)
    except UrlRefused:
        return
    assert parse_webhook_url(url.text, STRICT) == url
    assert urlsplit(url.text).hostname == url.host
    assert URL(url.text).raw_host == URL(url.text, encoded=True).raw_host == url.host
