"""The operator's HTTP proxy, when there is one: how a socket becomes a tunnel to a receiver.

The proxy is the operator's, so its own address is not judged. It looks up the names of receivers,
so the last check of where they lead is the proxy's as well.
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
#: For each address of the proxy: one that is silent must not take all the time from the next.
_REACH_SECONDS = 3.0

log = structlog.get_logger()


class ProxyError(Exception):
    """No tunnel came about; the text may reach the merchant and says nothing of the proxy's.

    `status` is what the proxy answered, None when it was not reached or not understood.
    """

    def __init__(self, text: str, status: int | None = None):
        super().__init__(text)
        self.status = status


def proxy_away() -> ProxyError:
    return ProxyError("the egress proxy cannot be reached")


@dataclass(frozen=True, slots=True)
class _Proxy:
    host: str
    port: int
    #: A whole header line, or nothing.
    authorization: bytes = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> "_Proxy":
        """Raises ConfigurationError, without the value, for anything but http://host:port."""
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
    """Where the proxy is and what it is told; nothing here shows the credentials."""

    def __init__(self, url: Secret):
        """Raises ConfigurationError, without the value, for anything but http://host:port."""
        self._setting = ReloadedSecret(url, _Proxy.parse)

    async def reach(self) -> socket.socket:
        """A socket that is connected to the proxy; raises ProxyError."""
        loop = asyncio.get_running_loop()
        failure: OSError | None = None
        proxy = self._setting.current()
        try:
            # As the system does it, search domains included: the name is the operator's.
            found = await loop.getaddrinfo(proxy.host, proxy.port, type=socket.SOCK_STREAM)
        except OSError as error:
            found, failure = [], error
        for family, kind, protocol, _, address in found:
            reaching = socket.socket(family, kind, protocol)
            try:
                reaching.setblocking(False)
                async with asyncio.timeout(_REACH_SECONDS):
                    await loop.sock_connect(reaching, address)
            except OSError as error:  # TimeoutError is one
                reaching.close()
                failure = error
            except BaseException:
                reaching.close()
                raise
            else:
                return reaching
        log.warning("egress_proxy_away", error=repr(failure))
        raise proxy_away() from failure

    async def open_tunnel(self, connected: socket.socket, authority: str) -> None:
        """Have the proxy lead this socket to `authority`, the receiver's host:port.

        Raises ProxyError, and SSLError when the receiver speaks first, which no TLS server does.
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
            raise ProxyError("the egress proxy broke the connection off") from error
        status_line = _STATUS_LINE.match(head)
        if status_line is None:
            log.warning("egress_proxy_not_understood")
            raise ProxyError("the egress proxy's answer is not valid HTTP/1.1")
        status = int(status_line[1])
        if not 200 <= status < 300:
            log.warning("egress_proxy_refused", status=status)
            raise ProxyError(f"the egress proxy answered {status}", status)
        if early:
            raise ssl.SSLError("the receiver spoke before the handshake")


async def _read_head(connected: socket.socket) -> tuple[bytes, bytes]:
    """The head of the proxy's answer, and what came with it; b"" for a head without end."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    while _HEAD_END not in received:
        if len(received) >= _HEAD_BYTES_MAX:
            return b"", b""
        chunk = await loop.sock_recv(connected, _HEAD_BYTES_MAX - len(received))
        if not chunk:
            raise ConnectionResetError("closed before the head of an answer was whole")
        received += chunk
    head, _, early = bytes(received).partition(_HEAD_END)
    return head + _HEAD_END, early
