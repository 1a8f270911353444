"""The one grammar of webhook URLs; what it returns is what is stored and sent.

It refuses rather than repairs: every character a parser elsewhere would strip, decode or map is a
way to show one host to the check and another to the dialler. Pure; looks nothing up.
"""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import NoReturn

import idna

from core.addresses import Address, AddressPolicy

_LENGTH_MAX = 2048
_SCHEME = "https://"
# Whitespace and controls (urlsplit and yarl delete some of them), the backslash that browsers
# read as a slash, and lone surrogates, which have no bytes.
_NEVER = re.compile(r"[\x00-\x20\x7f-\x9f\\\ud800-\udfff]")
_PARTS = re.compile(r"(?P<authority>[^/?]*)(?P<path>[^?]*)(?P<query>.*)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<host>[^:\[\]]+))(?P<port>:[0-9]{1,5})?")
_IPV6 = re.compile(r"[0-9A-Fa-f:]+")
_DOTTED_QUAD = re.compile(r"[0-9]+(?:\.[0-9]+){3}")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

# Names that mean something only inside a network, or nothing at all.
_REFUSED_SUFFIXES = frozenset(
    {"arpa", "example", "invalid", "localhost", "onion", "test"}  # RFC 6761 and the root itself
    | {"corp", "home", "internal", "lan", "local", "localdomain", "mail"}  # private networks
    | {"cluster", "consul", "svc"}  # service discovery
)
# Clouds that serve credentials under a public name, over HTTPS too.
_REFUSED_NAMES = frozenset(
    {"metadata.goog", "metadata.tencentyun.com", "api.metadata.cloud.ibm.com"}
)
# Where an HTTPS request would be read as another protocol's commands, or reach what administers a
# machine: SSH, mail, DNS, Windows, container and cluster APIs, databases, caches, queues.
_SERVICE_PORTS = frozenset(
    {*(20, 21, 22, 23, 25, 53, 110, 111, 135, 139, 143, 389, 445, 465, 514, 587, 636, 873, 993)}
    | {*(995, 1433, 1521, 2049, 2181, 2375, 2376, 2379, 2380, 3306, 3389, 4369, 5432, 5672, 5900)}
    | {*(5984, 5985, 5986, 6379, 6443, 6667, 8500, 9042, 9092, 9200, 9300, 10250, 10255, 11211)}
    | {*(15672, 27017)}
)
_LOCALHOST_ADDRESS = IPv4Address("127.0.0.1")


class UrlRefused(ValueError):  # noqa: N818 - named for what happened, as in core/errors.py
    """A URL we will not store or call: a `reason` for programs, a `message` for the merchant."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """Which addresses and ports (ranges, both ends included) a URL may name.

    A well-known port of another service is not let in by a range, only when it is named by itself.
    `denied_hosts` are lower-case names that are refused with every name below them.
    """

    addresses: AddressPolicy
    ports: tuple[tuple[int, int], ...]
    denied_hosts: tuple[str, ...] = ()

    def allows_port(self, port: int) -> bool:
        return 1 <= port <= 65535 and any(
            low <= port <= high and (low == high or port not in _SERVICE_PORTS)
            for low, high in self.ports
        )

    def denies_host(self, name: str) -> bool:
        return any(name == host or name.endswith(f".{host}") for host in self.denied_hosts)


@dataclass(frozen=True, slots=True)
class WebhookUrl:
    """A URL in canonical form; `address` is set when the host is a literal."""

    text: str
    host: str
    port: int
    address: Address | None


def parse_webhook_url(text: str, policy: UrlPolicy) -> WebhookUrl:
    """Return the canonical form, or raise UrlRefused; a canonical form parses to itself."""
    authority, target = _split(text)
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        _malformed("the host is not well formed; write https://host/path")
    port = _parse_port(match["port"], policy)
    if match["ipv6"] is not None:
        address: Address | None = _parse_ipv6(match["ipv6"])
        host = str(address)
        netloc = f"[{host}]"
    else:
        # ASCII letters only: str.lower() would map the Kelvin sign to k, and so on.
        netloc = host = match["host"].encode().lower().decode()
        address = _parse_ipv4(host) if _DOTTED_QUAD.fullmatch(host) else None
        if address is None:
            netloc = host = _parse_name(host, policy)
    if address is not None and policy.addresses.refusal(address) is not None:
        raise UrlRefused(
            "URL_ADDRESS_NOT_ALLOWED",
            "the address is not a public one; use a host that can be reached from the internet",
        )
    if port != 443:
        netloc += f":{port}"
    canonical = f"{_SCHEME}{netloc}{target}"
    _check_length(canonical)
    return WebhookUrl(text=canonical, host=host, port=port, address=address)


def _split(text: str) -> tuple[str, str]:
    """Cut the text into authority and request target, having refused what fits in neither."""
    _check_length(text)
    if _NEVER.search(text):
        _malformed("percent-encode spaces, control characters and backslashes")
    if text[: len(_SCHEME)].lower() != _SCHEME:
        raise UrlRefused("URL_NOT_HTTPS", "the URL must begin with https://")
    if "#" in text:
        raise UrlRefused("URL_HAS_FRAGMENT", "remove the '#' and what follows; it is never sent")
    parts = _PARTS.fullmatch(text, len(_SCHEME))
    assert parts is not None  # noqa: S101 - the pattern matches every string
    authority, path, query = parts["authority"], parts["path"], parts["query"]
    if "@" in authority:
        raise UrlRefused(
            "URL_HAS_CREDENTIALS",
            "remove what is before the '@'; to know us, verify the signature of the webhook",
        )
    if not (path + query).isascii():
        _malformed("percent-encode the characters of the path and query that are not ASCII")
    # An empty query is not sent by any client we know of, so it must not be stored either.
    return authority, (path or "/") + (query if query != "?" else "")


def _check_length(text: str) -> None:
    # In bytes where that differs; a surrogate is refused later, and must not raise here.
    if len(text.encode(errors="surrogatepass")) > _LENGTH_MAX:
        raise UrlRefused("URL_TOO_LONG", f"the URL is longer than {_LENGTH_MAX} bytes; shorten it")


def _parse_port(text: str | None, policy: UrlPolicy) -> int:
    port = int(text[1:]) if text else 443
    if not policy.allows_port(port):
        usable = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in policy.ports)
        raise UrlRefused(
            "URL_PORT_NOT_ALLOWED", f"the port is not one we call; use one of: {usable}"
        )
    return port


def _parse_ipv6(text: str) -> IPv6Address:
    # The pattern leaves out what IPv6Address takes besides: zone ids and a dotted IPv4 tail.
    try:
        if _IPV6.fullmatch(text):
            return IPv6Address(text)
    except AddressValueError:
        pass
    return _malformed("what is in brackets must be a plain IPv6 address, without a zone")


def _parse_ipv4(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError:
        return _malformed("an IPv4 address is four numbers from 0 to 255, without leading zeros")


def _parse_name(host: str, policy: UrlPolicy) -> str:
    labels = [_ascii_label(label) for label in host.split(".")]
    name = ".".join(labels)
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        _malformed("the host name is not well formed; check dots, hyphens and underscores")
    # inet_aton reads 2130706433, 0x7f.1 and 127.1 as addresses, and so may a resolver or a proxy.
    # A top-level domain never begins with a digit, so nothing is lost by refusing all of them.
    if labels[-1][0].isdigit():
        _malformed("write an IPv4 address as four decimal numbers, or use a host name")
    if labels[-1] == "localhost" and policy.addresses.refusal(_LOCALHOST_ADDRESS) is None:
        return name
    refused = labels[-1] in _REFUSED_SUFFIXES or name in _REFUSED_NAMES or policy.denies_host(name)
    if refused or len(labels) < 2:
        raise UrlRefused(
            "URL_HOST_NOT_ALLOWED",
            "the host is not a public name; use one that can be reached from the internet",
        )
    return name


def _ascii_label(label: str) -> str:
    """Encode by IDNA 2008, whose lack of mapping is the point: ① and fullwidth letters stay out."""
    if label.isascii():
        return label
    try:
        return idna.alabel(label).decode()
    except idna.IDNAError:
        return _malformed("the host name has characters that international names cannot hold")


def _malformed(message: str) -> NoReturn:
    raise UrlRefused("URL_MALFORMED", message)
