"""The undocumented parts of aiohttp that delivery/http/connection.py and connector.py use.

When a test here fails after an upgrade of aiohttp, read the two modules beside its client_proto.py
and connector.py before anything else: the other tests may pass by luck.
"""

import asyncio
import inspect
import re
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import TCPConnector
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest, ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_parser import HttpResponseParser, RawResponseMessage
from aiohttp.streams import StreamReader

from delivery.http.connector import RequestTrace
from delivery.http.request import RequestTemplate

#: Read only if aiohttp itself uses a proxy, which it never does here.
_OF_PROXIES = {"proxy_headers", "proxy_auth", "headers", "request_info", "host"}


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (ResponseHandler, {"loop"}),
        (
            ResponseHandler.set_response_params,
            {"read_until_eof", "auto_decompress", "read_bufsize", "max_line_size", "max_headers"},
        ),
        (ResponseHandler.read, set()),
        (ResponseHandler.data_received, {"data"}),
        (ResponseHandler.abort, set()),
        (TCPConnector, {"resolver", "socket_factory", "ssl", "keepalive_timeout", "limit"}),
        (TCPConnector.connect, {"req", "traces", "timeout"}),
        (TCPConnector._create_connection, {"req", "traces", "timeout"}),
        (TCPConnector._resolve_host, {"host", "port", "traces"}),
        (Connection.release, set()),
        (Connection.close, set()),
        (StreamReader.readany, set()),
        (StreamReader.is_eof, set()),
        (StreamReader.at_eof, set()),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_what_we_call_or_override_is_there(
    function: Callable[..., Any], parameters: set[str]
) -> None:
    found = set(inspect.signature(function).parameters) - {"self"}
    assert parameters <= found, f"aiohttp {aiohttp.__version__} changed {function.__qualname__}"


async def test_connections_are_pooled_by_what_a_destination_names() -> None:
    """A new field may be one by which two merchants have to be kept apart."""
    mine = RequestTemplate("https://hooks.shop.com:8443/a?b")
    theirs = ClientRequest("POST", mine.url, loop=asyncio.get_running_loop())
    assert mine.connection_key == theirs.connection_key
    assert mine.connection_key == RequestTemplate("https://hooks.shop.com:8443/c").connection_key
    for other in ("https://hooks.shop.com/", "https://other.shop.com:8443/"):
        assert mine.connection_key != RequestTemplate(other).connection_key
    assert len(ConnectionKey._fields) == 8, f"aiohttp {aiohttp.__version__} pools by something new"


@pytest.mark.parametrize(
    "function",
    [
        TCPConnector.connect,
        TCPConnector._create_connection,
        TCPConnector._create_direct_connection,
        TCPConnector._wrap_create_connection,
        TCPConnector._get_ssl_context,
        TCPConnector._get_fingerprint,
    ],
    ids=lambda function: function.__name__,
)
def test_connector_uses_only_attributes_of_the_trace(
    function: Callable[..., Any],
) -> None:
    asked = set(re.findall(r"\breq\.(\w+)", inspect.getsource(function)))
    missing = {name for name in asked - _OF_PROXIES if not hasattr(RequestTrace, name)}
    assert not missing, f"aiohttp {aiohttp.__version__} asks a request for {missing}"


async def test_a_connection_is_what_the_factory_made() -> None:
    connector = TCPConnector()
    try:
        assert connector._factory.func is ResponseHandler
        handler = connector._factory()
        handler.set_response_params(read_until_eof=True)
        # The head and the body are apart: data goes through the parser to the queue that is read.
        handler.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        handler.data_received(b"ok")
        head, body = await handler.read()
        assert isinstance(head, RawResponseMessage)
        assert (head.code, body.is_eof(), await body.readany()) == (200, True, b"ok")
        assert not handler.should_close
        handler.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert handler.should_close
    finally:
        await connector.close()


def test_the_parser_is_the_one_in_c() -> None:
    assert HttpResponseParser.__module__ == "aiohttp._http_parser"
