"""The address table beside a dated copy of both IANA special-purpose registries (see iana/)."""

import csv
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from core.addresses import AddressClass, AddressPolicy, Network, network_table

HERE = Path(__file__).parent / "iana"

#: The registry calls these globally reachable; we do not dial them, each for its reason.
REACHABLE_AND_REFUSED = {
    "192.0.0.9/32": "anycast of a protocol, answered by the nearest router: maybe our own",
    "192.0.0.10/32": "the same",
    "192.31.196.0/24": "AS112: anycast plumbing that no merchant owns",
    "192.52.193.0/24": "AMT: the same",
    "192.175.48.0/24": "AS112",
    "64:ff9b::/96": "NAT64: an IPv4 address inside, which may be any",
    "2001:1::1/128": "anycast of a protocol",
    "2001:1::2/128": "the same",
    "2001:1::3/128": "the same",
    "2001:3::/32": "AMT",
    "2001:4:112::/48": "AS112",
    "2001:20::/28": "ORCHIDv2: identifiers, not places",
    "2001:30::/28": "drone ids: the same",
    "2620:4f:8000::/48": "AS112",
}

#: What our table refuses and the registries do not name.
OURS = {
    "224.0.0.0/4": "multicast has a registry of its own",
    "ff00::/8": "the same",
    "fec0::/10": "site-local: deprecated before there was the registry, still routed inside",
    "::/96": "IPv4-compatible: the same, with an IPv4 address inside",
    "::ffff:0:0:0/96": "SIIT: the same",
    "::/0": "IPv6 outside 2000::/3 has not been handed out",
    # What clouds serve to their guests, where no registry looks.
    "168.63.129.16/32": "Azure: a public address by every registry",
}


def registry() -> Iterator[tuple[Network, str, str]]:
    """Block, name, and whether it is globally reachable, as the registries write it."""
    for file in ("ipv4.csv", "ipv6.csv"):
        with (HERE / file).open(newline="") as text:
            for row in csv.DictReader(text):
                for block in row["Address Block"].split(","):
                    reachable = row["Globally Reachable"].partition(" ")[0]
                    yield ip_network(block.split()[0]), row["Name"], reachable


BLOCKS = list(registry())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]} {block[1]}")
def test_nothing_in_the_registries_is_dialled(block: tuple[Network, str, str]) -> None:
    network, _, reachable = block
    # The class changes at the edges of rows only, so these are all the answers there are.
    for row in [network, *(row for row, _ in network_table() if _inside(row, network))]:
        for address in (row.network_address, row.broadcast_address):
            assert AddressPolicy().refusal(address) is not None
    assert (reachable == "True") == (str(network) in REACHABLE_AND_REFUSED)


def test_whatever_else_is_refused_has_its_reason_here() -> None:
    refused = [row for row, kind in network_table() if kind is not AddressClass.PUBLIC]
    unnamed = {
        str(row) for row in refused if not any(_inside(row, block) for block, _, _ in BLOCKS)
    }
    assert unnamed == set(OURS)


def test_the_registries_are_read_whole() -> None:
    assert [network.version for network, _, _ in BLOCKS].count(4) == 25
    assert [network.version for network, _, _ in BLOCKS].count(6) == 25
    networks = {str(network) for network, _, _ in BLOCKS}
    assert networks >= {"192.0.0.171/32", "192.0.0.0/24", "2002::/16", "fc00::/7"}


def _inside(row: Network, block: Network) -> bool:
    return (
        row.version == block.version
        and row.network_address in block
        and row.broadcast_address in block
    )
