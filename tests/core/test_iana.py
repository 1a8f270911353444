"""The address table compared with a dated copy of both IANA registries (see iana/)."""

import csv
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from core.addresses import AddressClass, AddressPolicy, Network, network_table

HERE = Path(__file__).parent / "iana"

#: Globally reachable by the registry, but refused for this reason.
REACHABLE_AND_REFUSED = {
    "192.0.0.9/32": "anycast of a protocol: the nearest router may be our own",
    "192.0.0.10/32": "the same",
    "192.31.196.0/24": "AS112: anycast service that no merchant owns",
    "192.52.193.0/24": "AMT: the same",
    "192.175.48.0/24": "AS112",
    "64:ff9b::/96": "NAT64: contains any IPv4 address",
    "2001:1::1/128": "anycast of a protocol",
    "2001:1::2/128": "the same",
    "2001:1::3/128": "the same",
    "2001:3::/32": "AMT",
    "2001:4:112::/48": "AS112",
    "2001:20::/28": "ORCHIDv2: identifiers, not locations",
    "2001:30::/28": "drone ids: the same",
    "2620:4f:8000::/48": "AS112",
}

#: Refused by our table, but not in the registries.
NOT_IN_REGISTRIES = {
    "224.0.0.0/4": "multicast has its own registry",
    "ff00::/8": "the same",
    "fec0::/10": "site-local: deprecated before the registry, but still routed inside networks",
    "::/96": "IPv4-compatible: the same, with an IPv4 address inside",
    "::ffff:0:0:0/96": "SIIT: the same",
    "::/0": "IPv6 outside 2000::/3 is unassigned",
    "168.63.129.16/32": "Azure: public by registry, but served by the host to its guests",
}


def registry() -> Iterator[tuple[Network, str, str]]:
    """Yield the block, its name and whether it is globally reachable."""
    for file in ("ipv4.csv", "ipv6.csv"):
        with (HERE / file).open(newline="") as text:
            for row in csv.DictReader(text):
                for block in row["Address Block"].split(","):
                    reachable = row["Globally Reachable"].partition(" ")[0]
                    yield ip_network(block.split()[0]), row["Name"], reachable


BLOCKS = list(registry())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]} {block[1]}")
def test_special_purpose_addresses_are_refused(block: tuple[Network, str, str]) -> None:
    network, _, reachable = block
    # The class changes only at the edges of rows, so the edges cover all answers.
    for row in [network, *(row for row, _ in network_table() if _inside(row, network))]:
        for address in (row.network_address, row.broadcast_address):
            assert AddressPolicy().refusal(address) is not None
    assert (reachable == "True") == (str(network) in REACHABLE_AND_REFUSED)


def test_further_refused_ranges_have_a_reason() -> None:
    refused = [row for row, kind in network_table() if kind is not AddressClass.PUBLIC]
    unnamed = {
        str(row) for row in refused if not any(_inside(row, block) for block, _, _ in BLOCKS)
    }
    assert unnamed == set(NOT_IN_REGISTRIES)


def test_registries_are_complete() -> None:
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
