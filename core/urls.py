"""The grammar of webhook URLs. Returns the canonical form, which is stored and called. Pure.

Invalid URLs are refused, never repaired. A character that another parser strips, decodes or maps
could show one host to this check and another host to the HTTP client.
"""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import NoReturn

import idna

from core.addresses import Address, AddressPolicy

_LENGTH_MAX = 2048
_SCHEME = "https://"
# Whitespace and control characters (urlsplit and yarl delete some), the backslash (a slash in
# browsers) and lone surrogates (not encodable).
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f\\\ud800-\udfff]")
_PARTS = re.compile(r"(?P<authority>[^/?]*)(?P<path>[^?]*)(?P<query>.*)", re.DOTALL)
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<host>[^:\[\]]+))(?P<port>:[0-9]{1,5})?")
_IPV6 = re.compile(r"[0-9A-Fa-f:]+")
_DOTTED_QUAD = re.compile(r"[0-9]+(?:\.[0-9]+){3}")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

# Names without a meaning in the public DNS.
_REFUSED_SUFFIXES = frozenset(
    {"arpa", "example", "invalid", "localhost", "onion", "test"}  # RFC 6761 and the root itself
    | {"corp", "home", "internal", "lan", "local", "localdomain", "mail"}  # private networks
    | {"cluster", "consul", "svc"}  # service discovery
)
# Metadata services of clouds with public names.
_REFUSED_NAMES = frozenset(
    {"metadata.goog", "metadata.tencentyun.com", "api.metadata.cloud.ibm.com"}
)
# Services that could read an HTTPS request as commands, or that administer machines: SSH, mail,
# DNS, Windows, container and cluster APIs, databases, caches, queues.
_SERVICE_PORTS = frozenset(
    {*(20, 21, 22, 23, 25, 53, 110, 111, 135, 139, 143, 389, 445, 465, 514, 587, 636, 873, 993)}
    | {*(995, 1433, 1521, 2049, 2181, 2375, 2376, 2379, 2380, 3306, 3389, 4369, 5432, 5672, 5900)}
    | {*(5984, 5985, 5986, 6379, 6443, 6667, 8500, 9042, 9092, 9200, 9300, 10250, 10255, 11211)}
    | {*(15672, 27017)}
)
_LOCALHOST_ADDRESS = IPv4Address("127.0.0.1")


class UrlRefused(ValueError):  # noqa: N818 - named as in core/errors.py
    """A URL that is not stored or called. `reason` is for programs, `message` for the merchant."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """The addresses, ports (inclusive ranges) and hosts that a URL may name.

    A range does not allow a well-known port of another service. Only a single port does.
    `denied_hosts` are lower-case names, refused together with their subdomains.
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
    """A URL in canonical form. `address` is set if the host is a literal."""

    text: str
    host: str
    port: int
    address: Address | None


def parse_webhook_url(text: str, policy: UrlPolicy) -> WebhookUrl:
    """Return the canonical form. Raises UrlRefused. A canonical form parses to itself."""
    authority, target = _split(text)
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        _malformed("the host is malformed: write https://host/path")
    port = _parse_port(match["port"], policy)
    if match["ipv6"] is not None:
        address: Address | None = _parse_ipv6(match["ipv6"])
        host = str(address)
        netloc = f"[{host}]"
    else:
        # Only ASCII letters, because str.lower() maps for example the Kelvin sign to k.
        netloc = host = match["host"].encode().lower().decode()
        address = _parse_ipv4(host) if _DOTTED_QUAD.fullmatch(host) else None
        if address is None:
            netloc = host = _parse_name(host, policy)
    if address is not None and policy.addresses.refusal(address) is not None:
        raise UrlRefused(
            "URL_ADDRESS_NOT_ALLOWED",
            "the address is not a public one: use a host that can be reached from the internet",
        )
    if port != 443:
        netloc += f":{port}"
    canonical = f"{_SCHEME}{netloc}{target}"
    _check_length(canonical)
    return WebhookUrl(text=canonical, host=host, port=port, address=address)


def _split(text: str) -> tuple[str, str]:
    """Check the text and split it into authority and request target."""
    _check_length(text)
    if _FORBIDDEN.search(text):
        _malformed("percent-encode spaces, control characters and backslashes")
    if text[: len(_SCHEME)].lower() != _SCHEME:
        raise UrlRefused("URL_NOT_HTTPS", "the URL must begin with https://")
    if "#" in text:
        raise UrlRefused("URL_HAS_FRAGMENT", "remove the fragment after '#': it is never sent")
    parts = _PARTS.fullmatch(text, len(_SCHEME))
    assert parts is not None  # noqa: S101 - the pattern matches every string
    authority, path, query = parts["authority"], parts["path"], parts["query"]
    if "@" in authority:
        raise UrlRefused(
            "URL_HAS_CREDENTIALS",
            "remove the credentials before the '@': verify the webhook's signature instead",
        )
    if not (path + query).isascii():
        _malformed("percent-encode the characters of the path and query that are not ASCII")
    # HTTP clients drop an empty query, so it is not stored.
    return authority, (path or "/") + (query if query != "?" else "")


def _check_length(text: str) -> None:
    # In bytes. `surrogatepass`, because surrogates are refused later and must not raise here.
    if len(text.encode(errors="surrogatepass")) > _LENGTH_MAX:
        raise UrlRefused("URL_TOO_LONG", f"the URL is longer than {_LENGTH_MAX} bytes: shorten it")


def _parse_port(text: str | None, policy: UrlPolicy) -> int:
    port = int(text[1:]) if text else 443
    if not policy.allows_port(port):
        usable = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in policy.ports)
        raise UrlRefused(
            "URL_PORT_NOT_ALLOWED", f"the port is not one we call: use one of {usable}"
        )
    return port


def _parse_ipv6(text: str) -> IPv6Address:
    # The pattern excludes zone ids and dotted IPv4 tails, which IPv6Address accepts.
    try:
        if _IPV6.fullmatch(text):
            return IPv6Address(text)
    except AddressValueError:
        pass
    return _malformed("the brackets must hold a plain IPv6 address without a zone")


def _parse_ipv4(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError:
        return _malformed("an IPv4 address is four numbers from 0 to 255, without leading zeros")


def _parse_name(host: str, policy: UrlPolicy) -> str:
    labels = [_ascii_label(label) for label in host.split(".")]
    name = ".".join(labels)
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        _malformed("the host name is malformed: check dots, hyphens and underscores")
    # Resolvers and proxies may read 2130706433, 0x7f.1 and 127.1 as addresses, as inet_aton does.
    # No top-level domain begins with a digit.
    if labels[-1][0].isdigit():
        _malformed("write an IPv4 address as four decimal numbers, or use a host name")
    if labels[-1] == "localhost" and policy.addresses.refusal(_LOCALHOST_ADDRESS) is None:
        return name
    refused = labels[-1] in _REFUSED_SUFFIXES or name in _REFUSED_NAMES or policy.denies_host(name)
    if refused or len(labels) < 2:
        raise UrlRefused(
            "URL_HOST_NOT_ALLOWED",
            "the host is not a public name: use one that can be reached from the internet",
        )
    return name


def _ascii_label(label: str) -> str:
    """Encode by IDNA 2008. It maps no characters, so ① and fullwidth letters are refused."""
    if label.isascii():
        return label
    try:
        return idna.alabel(label).decode()
    except idna.IDNAError:
        return _malformed("the host name has characters that international names may not contain")


def _malformed(message: str) -> NoReturn:
    raise UrlRefused("URL_MALFORMED", message)
