"""Opens tunnels to receivers through the operator's HTTP proxy (CONNECT, RFC 9110 section 9.3.6).

The address of the proxy is not checked, because the operator chose it. The proxy resolves the names
of receivers, so it also has to refuse those that lead to inner addresses.
"""

import asyncio
import re
import socket
import ssl
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

import structlog

from core.errors import ConfigurationError
from core.file_secrets import ReloadedSecret, Secret

_URL = re.compile(
    r"http://(?:(?P<userinfo>[^@/?#\s]+)@)?"
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})"
)
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r\n")
_HEAD_END = b"\r\n\r\n"
_HEAD_BYTES_MAX = 16 * 1024
#: Limit for each address of the proxy, so that a silent one leaves time for the next.
_REACH_SECONDS = 3.0

log = structlog.get_logger()


class ProxyError(Exception):
    """No tunnel could be opened. The text may reach the merchant, so it names no proxy.

    `status` is the proxy's status code, or None without a valid response.
    """

    def __init__(self, text: str, status: int | None = None):
        super().__init__(text)
        self.status = status


def proxy_unreachable() -> ProxyError:
    return ProxyError("the egress proxy cannot be reached")


@dataclass(frozen=True, slots=True)
class _Proxy:
    host: str
    port: int
    #: A complete header line, or empty.
    authorization: bytes = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> "_Proxy":
        """Raises ConfigurationError, without the value, unless it is http://host:port."""
        match = _URL.fullmatch(url)
        if match is None or not 1 <= int(match["port"]) <= 65535:
            raise ConfigurationError(
                "WEBHOOK_EGRESS_PROXY is not the URL of an HTTP proxy: write http://host:port or "
                "http://user:password@host:port, without a path and with special characters of "
                "the password percent-encoded, or unset it to call receivers directly"
            )
        authorization = b""
        if match["userinfo"]:
            credentials = b64encode(unquote_to_bytes(match["userinfo"]))
            authorization = b"Proxy-Authorization: Basic %b\r\n" % credentials
        return cls(match["ipv6"] or match["host"], int(match["port"]), authorization)


class EgressProxy:
    """The proxy of the settings. No repr shows its credentials."""

    def __init__(self, url: Secret):
        """Raises ConfigurationError, without the value, unless it is http://host:port."""
        self._setting = ReloadedSecret(url, _Proxy.parse)

    async def reach(self) -> socket.socket:
        """Return a socket that is connected to the proxy. Raises ProxyError."""
        loop = asyncio.get_running_loop()
        failure: OSError | None = None
        proxy = self._setting.current()
        try:
            # With the system's search domains, because the name is the operator's.
            found = await loop.getaddrinfo(proxy.host, proxy.port, type=socket.SOCK_STREAM)
        except OSError as error:
            found, failure = [], error
        for family, kind, protocol, _, address in found:
            connecting = socket.socket(family, kind, protocol)
            try:
                connecting.setblocking(False)
                async with asyncio.timeout(_REACH_SECONDS):
                    await loop.sock_connect(connecting, address)
            except OSError as error:  # TimeoutError is one
                connecting.close()
                failure = error
            except BaseException:
                connecting.close()
                raise
            else:
                return connecting
        log.warning("egress_proxy_away", error=repr(failure))
        raise proxy_unreachable() from failure

    async def open_tunnel(self, connected: socket.socket, authority: str) -> None:
        """Turn the socket into a tunnel to `authority`, the receiver's host:port.

        Raises ProxyError, and SSLError if the receiver sends first, which no TLS server does.
        """
        loop = asyncio.get_running_loop()
        target = authority.encode("ascii")
        request = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (
            target,
            target,
            self._setting.current().authorization,
        )
        try:
            await loop.sock_sendall(connected, request)
            head, early = await _read_head(connected)
        except OSError as error:
            log.warning("egress_proxy_broke_off", error=repr(error))
            raise ProxyError("the egress proxy closed the connection") from error
        status_line = _STATUS_LINE.match(head)
        if status_line is None:
            log.warning("egress_proxy_not_understood")
            raise ProxyError("the egress proxy's response is not valid HTTP/1.1")
        status = int(status_line[1])
        if not 200 <= status < 300:
            log.warning("egress_proxy_refused", status=status)
            raise ProxyError(f"the egress proxy answered {status}", status)
        if early:
            raise ssl.SSLError("the receiver sent data before the handshake")


async def _read_head(connected: socket.socket) -> tuple[bytes, bytes]:
    """Return the head of the proxy's response and the bytes after it. The head may be empty."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    while _HEAD_END not in received:
        if len(received) >= _HEAD_BYTES_MAX:
            return b"", b""
        chunk = await loop.sock_recv(connected, _HEAD_BYTES_MAX - len(received))
        if not chunk:
            raise ConnectionResetError("closed before the end of the response head")
        received += chunk
    head, _, early = bytes(received).partition(_HEAD_END)
    return head + _HEAD_END, early
