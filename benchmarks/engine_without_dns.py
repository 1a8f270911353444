"""The engine of `postrider delivery`, whose name server never answers.

Run as a process: `python -m benchmarks.engine_without_dns`. The other receivers have addresses for
names, so only those that are to be dead ask. The engine is what it is, c-ares included: only the
address of the name server is another than the system's.
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
