"""The addresses that may be called. Pure; checked for each literal, DNS answer and socket.

`ipaddress.is_global` is not enough: it accepts NAT64 and IPv4-compatible forms of loopback,
multicast and cloud hosts, and it differs between Python versions. An address outside the public
rows of this table is refused. `tests/core/test_iana.py` compares it with the IANA registries.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class AddressClass(StrEnum):
    """The purpose of an address. Only PUBLIC addresses are called by default."""

    PUBLIC = "public"
    UNSPECIFIED = "unspecified"
    LOOPBACK = "loopback"
    PRIVATE = "private"
    LINK_LOCAL = "link_local"
    SHARED = "shared"
    METADATA = "metadata"
    MULTICAST = "multicast"
    BENCHMARKING = "benchmarking"
    DOCUMENTATION = "documentation"
    MAPPED = "mapped"
    TRANSITION = "transition"
    INFRASTRUCTURE = "infrastructure"
    RESERVED = "reserved"
    #: Denied by the operator.
    DENIED = "denied"


# The longest prefix wins, so a row may carve an exception out of a wider one.
_NETWORKS: dict[AddressClass, tuple[str, ...]] = {
    # In IPv6 only the range that IANA assigns today is public, so that future ranges are refused.
    AddressClass.PUBLIC: ("0.0.0.0/0", "2000::/3"),
    # On Linux, connecting to 0.0.0.0 or :: reaches the local machine.
    AddressClass.UNSPECIFIED: ("0.0.0.0/8", "::/128"),
    AddressClass.LOOPBACK: ("127.0.0.0/8", "::1/128"),
    AddressClass.PRIVATE: (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "fc00::/7",
        "fec0::/10",  # site-local: deprecated, still routed inside some networks
    ),
    AddressClass.LINK_LOCAL: ("169.254.0.0/16", "fe80::/10"),
    AddressClass.SHARED: ("100.64.0.0/10",),
    # Metadata services of clouds hand out credentials. Registries list 168.63.129.16 as public,
    # but the host serves it to its guests.
    AddressClass.METADATA: (
        "100.100.100.200/32",
        "168.63.129.16/32",
        "169.254.0.23/32",
        "169.254.42.42/32",
        "169.254.169.254/32",
        "169.254.170.2/32",
        "169.254.170.23/32",
        "192.0.0.192/32",
        "fd00:42::42/128",
        "fd00:ec2::23/128",
        "fd00:ec2::253/128",
        "fd00:ec2::254/128",
        "fd20:ce::254/128",
        "fe80::a9fe:a9fe/128",
    ),
    AddressClass.MULTICAST: ("224.0.0.0/4", "ff00::/8"),
    AddressClass.BENCHMARKING: ("198.18.0.0/15", "2001:2::/48"),
    AddressClass.DOCUMENTATION: (
        "192.0.2.0/24",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "2001:db8::/32",
        "3fff::/20",
    ),
    AddressClass.MAPPED: ("::ffff:0:0/96",),
    # An IPv4 address inside an IPv6 address: compatible, SIIT, NAT64 (both), Teredo, 6to4. No
    # receiver needs them, and unwrapping eight forms is error-prone.
    AddressClass.TRANSITION: (
        "192.88.99.0/24",
        "::/96",
        "::ffff:0:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
    ),
    # Anycast services (AS112, AMT) that no merchant owns. The registry calls them globally
    # reachable, but the nearest instance may be in our own network.
    AddressClass.INFRASTRUCTURE: (
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.175.48.0/24",
        "2620:4f:8000::/48",
    ),
    AddressClass.RESERVED: ("192.0.0.0/24", "240.0.0.0/4", "::/0", "2001::/23"),
}

# ISATAP puts an IPv4 address behind this interface identifier, under any prefix. The mask excludes
# the bits that say whether that address is unique.
_ISATAP = 0x00005EFE
_ISATAP_MASK = 0xFCFFFFFF


class _RangeTable[N: Network]:
    """Networks split into ranges without overlap, so that a lookup is one bisection."""

    def __init__(self, rows: Iterable[tuple[N, AddressClass]]):
        narrowest_first = sorted(rows, key=lambda row: -row[0].prefixlen)
        edges = {int(network.network_address) for network, _ in narrowest_first}
        edges |= {int(network.broadcast_address) + 1 for network, _ in narrowest_first}
        self._starts = sorted(edges)
        # The last edge is past the end of the address space.
        self._classes = [
            next(
                kind
                for network, kind in narrowest_first
                if int(network.network_address) <= start <= int(network.broadcast_address)
            )
            for start in self._starts[:-1]
        ]

    def classify(self, number: int) -> AddressClass:
        return self._classes[bisect_right(self._starts, number) - 1]


_ROWS = [(ip_network(text), kind) for kind, texts in _NETWORKS.items() for text in texts]
_IPV4 = _RangeTable([row for row in _ROWS if isinstance(row[0], IPv4Network)])
_IPV6 = _RangeTable([row for row in _ROWS if isinstance(row[0], IPv6Network)])


def network_table() -> Sequence[tuple[Network, AddressClass]]:
    """Return the rows. The longest matching prefix wins."""
    return _ROWS


def classify(address: Address) -> AddressClass:
    """Classify an address as written, without unwrapping an address inside it."""
    number = int(address)
    if address.version == 4:
        return _IPV4.classify(number)
    kind = _IPV6.classify(number)
    if kind is AddressClass.PUBLIC and number >> 32 & _ISATAP_MASK == _ISATAP:
        return AddressClass.TRANSITION
    return kind


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """The table plus an operator's allowed and denied networks. Denied networks win.

    Operators deny their own public addresses and NAT64 prefixes.
    """

    allowed: tuple[Network, ...] = ()
    denied: tuple[Network, ...] = ()

    def refusal(self, address: Address) -> AddressClass | None:
        """Return why an address must not be called, or None if it may be called.

        An allowed network covers addresses of its address family. IPv4-mapped addresses are always
        refused: the kernel calls the IPv4 address inside, which an allowed ::/0 does not mean.
        """
        if any(address in network for network in self.denied):
            return AddressClass.DENIED
        kind = classify(address)
        if kind is AddressClass.PUBLIC:
            return None
        if kind is not AddressClass.MAPPED and any(address in network for network in self.allowed):
            return None
        return kind
