"""The bare loop: aiohttp POSTs over TLS, with the same bytes and headers.

Run as a process: `python -m benchmarks.bare_post URL CA_FILE COUNT CONCURRENCY`; prints JSON.
"""

import asyncio
import json
import ssl
import sys
import time

import aiohttp
import uvloop

from benchmarks.payload import PAYLOAD
from core.signing import signature_headers


async def _post_all(url: str, ca_file: str, count: int, concurrency: int) -> None:
    tls = ssl.create_default_context(cafile=ca_file)
    headers = {"Content-Type": "application/json", "User-Agent": "bare"}
    headers |= signature_headers(["00" * 32], "evt_" + "0" * 32, 1, PAYLOAD)
    left = iter(range(count))
    connector = aiohttp.TCPConnector(limit=0, ssl=tls)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def loop() -> None:
            for _ in left:
                async with session.post(url, data=PAYLOAD, headers=headers) as response:
                    await response.read()

        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(loop() for _ in range(concurrency)))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"rate": count / seconds, "cpu_us": cpu / count * 1e6}))


if __name__ == "__main__":
    uvloop.run(_post_all(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
