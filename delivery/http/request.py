"""Where the requests of a webhook config go, and the bytes that are the same in each of them."""

from collections.abc import Mapping
from functools import cached_property

from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

USER_AGENT = "Postrider/0.1"


class Destination:
    """A webhook config's URL and custom headers, prepared once for all its requests.

    `headers` are names and values in printable ASCII, none of them one of ours. They may hold
    credentials, so nothing here shows them.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None):
        self.url = URL(url, encoded=True)
        self._headers = headers or {}
        #: What aiohttp pools connections by: origin, and nothing that two merchants may differ in.
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
        """The request line and the first headers; ValueError when a value could break out.

        Made at the first request and not before, so that such a config harms no other.
        """
        constant = {
            "Host": self.url.host_port_subcomponent or "",
            **self._headers,
            "User-Agent": USER_AGENT,
            # An answer's body is read only to be thrown away: nothing to unpack, no bomb to go off.
            "Accept-Encoding": "identity",
        }
        target = self.url.raw_path_qs
        if not _is_plain(target) or " " in target:
            raise ValueError("the path holds a character that no path may hold")
        return b"POST %b HTTP/1.1\r\n%b" % (target.encode("ascii"), header_lines(constant))


def header_lines(headers: Mapping[str, str]) -> bytes:
    """The lines of these headers, each ended.

    Raises ValueError, without the value, for anything but printable ASCII: a line break in a value
    would be the beginning of another header, or of another request.
    """
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\n") != len(headers) or not _is_plain(text.replace("\r\n", "")):
        name = next(name for name, value in headers.items() if not _is_plain(name + value))
        raise ValueError(f"the header {name!r} holds a character that no header may hold")
    return text.encode("ascii")


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
