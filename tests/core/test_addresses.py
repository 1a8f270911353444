"""The address table: both sides of every edge, and IPv4 addresses inside IPv6 addresses."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.addresses import AddressClass, AddressPolicy, classify

# The network, its class, and the classes just below and just above.
EDGES = [
    ("0.0.0.0/8", "unspecified", None, "public"),
    ("10.0.0.0/8", "private", "public", "public"),
    ("100.64.0.0/10", "shared", "public", "public"),
    ("127.0.0.0/8", "loopback", "public", "public"),
    ("169.254.0.0/16", "link_local", "public", "public"),
    ("169.254.169.254/32", "metadata", "link_local", "link_local"),
    ("172.16.0.0/12", "private", "public", "public"),
    ("192.0.0.0/24", "reserved", "public", "public"),
    ("192.0.2.0/24", "documentation", "public", "public"),
    ("192.31.196.0/24", "infrastructure", "public", "public"),
    ("192.52.193.0/24", "infrastructure", "public", "public"),
    ("192.88.99.0/24", "transition", "public", "public"),
    ("192.168.0.0/16", "private", "public", "public"),
    ("192.175.48.0/24", "infrastructure", "public", "public"),
    ("198.18.0.0/15", "benchmarking", "public", "public"),
    ("198.51.100.0/24", "documentation", "public", "public"),
    ("203.0.113.0/24", "documentation", "public", "public"),
    ("168.63.129.16/32", "metadata", "public", "public"),
    ("224.0.0.0/4", "multicast", "public", "reserved"),
    ("240.0.0.0/4", "reserved", "multicast", None),
    ("::/128", "unspecified", None, "loopback"),
    ("::1/128", "loopback", "unspecified", "transition"),
    ("::ffff:0:0/96", "mapped", "reserved", "reserved"),
    ("::ffff:0:0:0/96", "transition", "reserved", "reserved"),
    ("64:ff9b::/96", "transition", "reserved", "reserved"),
    ("64:ff9b:1::/48", "transition", "reserved", "reserved"),
    ("2000::/3", "public", "reserved", "reserved"),
    ("2001::/32", "transition", "public", "reserved"),
    ("2001:2::/48", "benchmarking", "reserved", "reserved"),
    ("2001:200::/23", "public", "reserved", "public"),
    ("2001:db8::/32", "documentation", "public", "public"),
    ("2002::/16", "transition", "public", "public"),
    ("2620:4f:8000::/48", "infrastructure", "public", "public"),
    ("3fff::/20", "documentation", "public", "public"),
    ("fc00::/7", "private", "reserved", "reserved"),
    ("fe80::/10", "link_local", "reserved", "private"),
    ("fec0::/10", "private", "link_local", "multicast"),
    ("ff00::/8", "multicast", "private", None),
]

METADATA = """
169.254.169.254 169.254.170.2 169.254.170.23 169.254.0.23 169.254.42.42 100.100.100.200 192.0.0.192
168.63.129.16 fd00:ec2::254 fd00:ec2::23 fd00:ec2::253 fd20:ce::254 fd00:42::42 fe80::a9fe:a9fe
"""

# `is_global` accepts each of these in some Python version.
MISJUDGED_BY_IPADDRESS = """
64:ff9b::7f00:1 ::127.0.0.1 ::ffff:0:127.0.0.1 2002:7f00:1:: 64:ff9b:1::1 192.0.0.8 192.0.0.192
::ffff:100.64.0.1 224.0.0.1 ff02::1 fec0::1 4000::1 3fff::1 5f00::1 100:0:0:1::1 192.88.99.1
168.63.129.16 2001:20::1 2001:0:4136:e378:8000:63bf:3fff:fdd2
"""

PUBLIC = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 126.255.255.255 128.0.0.0 192.0.1.0 192.0.3.0 223.255.255.255
2000:: 2001:200::1 2001:4860:4860::8888 2606:4700::1111 2a00:1450:4001::200e 3ffe::1
"""


@pytest.mark.parametrize(("text", "inside", "below", "above"), EDGES)
def test_range_has_exact_bounds(
    text: str, inside: str, below: str | None, above: str | None
) -> None:
    network = ip_network(text)
    assert classify(network.network_address) == inside
    assert classify(network.broadcast_address) == inside
    if below is not None:
        assert classify(network.network_address - 1) == below
    if above is not None:
        assert classify(network.broadcast_address + 1) == above


@pytest.mark.parametrize("text", METADATA.split())
def test_metadata_services_have_their_own_class(text: str) -> None:
    assert classify(ip_address(text)) is AddressClass.METADATA


@pytest.mark.parametrize("text", MISJUDGED_BY_IPADDRESS.split())
def test_addresses_misjudged_by_ipaddress_are_refused(text: str) -> None:
    assert AddressPolicy().refusal(ip_address(text)) is not None


@pytest.mark.parametrize("text", PUBLIC.split())
def test_public_addresses_are_allowed(text: str) -> None:
    assert AddressPolicy().refusal(ip_address(text)) is None


@given(st.ip_addresses(v=6).filter(lambda address: address not in IPv6Network("2000::/3")))
def test_unassigned_ipv6_is_refused(address: IPv6Address) -> None:
    assert AddressPolicy().refusal(address) is not None


@given(st.ip_addresses(v=4))
def test_ipv4_inside_ipv6_is_refused_in_every_form(address: IPv4Address) -> None:
    number = int(address)
    forms = [
        IPv6Address(number),
        IPv6Address((0xFFFF << 32) | number),
        IPv6Address((0xFFFF << 48) | number),
        IPv6Address((0x64FF9B << 96) | number),
        IPv6Address((0x2002 << 112) | (number << 80)),
        IPv6Address((0x20010000 << 96) | (number ^ 0xFFFFFFFF)),
        # ISATAP, under any prefix.
        IPv6Address((0x2A00145040010000 << 64) | (0x00005EFE << 32) | number),
        IPv6Address((0x2606470000000000 << 64) | (0x02005EFE << 32) | number),
    ]
    assert all(AddressPolicy().refusal(form) for form in forms)


def test_allowed_network_allows_nothing_else() -> None:
    policy = AddressPolicy((ip_network("10.1.0.0/16"), ip_network("fd00::/8")))
    assert policy.refusal(ip_address("10.1.255.255")) is None
    assert policy.refusal(ip_address("fd00::1")) is None
    assert policy.refusal(ip_address("10.2.0.0")) is AddressClass.PRIVATE
    assert policy.refusal(ip_address("127.0.0.1")) is AddressClass.LOOPBACK


def test_allowed_ipv4_network_excludes_ipv6_forms() -> None:
    policy = AddressPolicy((ip_network("0.0.0.0/0"),))
    assert policy.refusal(ip_address("127.0.0.1")) is None
    assert policy.refusal(ip_address("::127.0.0.1")) is AddressClass.TRANSITION
    assert policy.refusal(ip_address("64:ff9b::7f00:1")) is AddressClass.TRANSITION


@pytest.mark.parametrize("allowed", ["::/0", "::ffff:0:0/96", "127.0.0.0/8"])
def test_mapped_address_is_always_refused(allowed: str) -> None:
    policy = AddressPolicy((ip_network(allowed),))
    assert policy.refusal(ip_address("::ffff:127.0.0.1")) is AddressClass.MAPPED
    assert policy.refusal(ip_address("::ffff:8.8.8.8")) is AddressClass.MAPPED


@given(st.ip_addresses(network="2a00:1450:4001::/64"))
def test_isatap_is_refused_by_its_interface_identifier(address: IPv6Address) -> None:
    identifier = int(address) >> 32 & 0xFFFFFFFF
    isatap = identifier in {0x5EFE, 0x1005EFE, 0x2005EFE, 0x3005EFE}
    assert (AddressPolicy().refusal(address) is not None) == isatap


def test_denied_network_wins_over_allowed() -> None:
    policy = AddressPolicy(
        allowed=(ip_network("0.0.0.0/0"), ip_network("::/0")),
        denied=(ip_network("93.184.215.0/24"), ip_network("2a00:1450:64::/96")),
    )
    assert policy.refusal(ip_address("93.184.215.14")) is AddressClass.DENIED
    assert policy.refusal(ip_address("2a00:1450:64::7f00:1")) is AddressClass.DENIED
    assert policy.refusal(ip_address("93.184.216.14")) is None
    assert policy.refusal(ip_address("2a00:1450:65::1")) is None
    assert policy.refusal(ip_address("::ffff:93.184.215.14")) is AddressClass.MAPPED
