"""The parts of a request that are the same for all deliveries of a webhook config."""

from collections.abc import Mapping
from functools import cached_property

from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

USER_AGENT = "Postrider/0.1"


class RequestTemplate:
    """A webhook config's URL and custom headers, prepared once for all requests.

    `headers` are printable ASCII and contain none of Postrider's headers. They may hold
    credentials, so they are never shown.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None):
        self.url = URL(url, encoded=True)
        self._headers = headers or {}
        #: aiohttp pools connections by this key: the origin, so that merchants share connections.
        self.connection_key = ConnectionKey(
            host=self.url.raw_host or "",
            port=self.url.port,
            is_ssl=True,
            ssl=True,
            proxy=None,
            proxy_auth=None,
            proxy_headers_hash=None,
            server_hostname=None,
        )

    @cached_property
    def head(self) -> bytes:
        """The request line and the first headers. Raises ValueError for a forbidden character.

        Built at the first request, so that a broken config affects no other config.
        """
        constant = {
            "Host": self.url.host_port_subcomponent or "",
            **self._headers,
            "User-Agent": USER_AGENT,
            # No compression, because the body is discarded and a bomb could be unpacked.
            "Accept-Encoding": "identity",
        }
        target = self.url.raw_path_qs
        if not _is_plain(target) or " " in target:
            raise ValueError("the path contains a forbidden character")
        return b"POST %b HTTP/1.1\r\n%b" % (target.encode("ascii"), header_lines(constant))


def header_lines(headers: Mapping[str, str]) -> bytes:
    """Return the header lines. Raises ValueError, without the value, except for printable ASCII.

    A line break in a value could inject another header or another request.
    """
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\n") != len(headers) or not _is_plain(text.replace("\r\n", "")):
        name = next(name for name, value in headers.items() if not _is_plain(name + value))
        raise ValueError(f"the header {name!r} contains a forbidden character")
    return text.encode("ascii")


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
