"""The engine of `postrider delivery` with a name server that never responds.

Run as a process: `python -m benchmarks.engine_without_dns`. The other receivers have IP addresses
in their URLs, so only dead configs use DNS. Only the address of the name server differs from
production.
"""

import socket
import sys
from typing import Any

import aiodns

from cli.main import main

_resolver: Any = aiodns.DNSResolver


def _ask(port: int) -> Any:
    def resolver(_: object = None, **options: Any) -> Any:
        return _resolver([f"127.0.0.1:{port}"], **options)

    return resolver


if __name__ == "__main__":
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        aiodns.DNSResolver = _ask(silent.getsockname()[1])  # type: ignore[misc]
        main(["delivery", *sys.argv[1:]])
