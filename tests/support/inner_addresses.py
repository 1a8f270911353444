"""A network namespace with public receivers, inner listeners and a hostile DNS server.

`python -m tests.support.inner_addresses DATABASE_URL DIRECTORY`, in new network and mount
namespaces, prints the result of every trick as JSON. Nothing is allowed here that production
refuses: the receivers have public addresses, on the loopback interface.
"""

import asyncio
import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import trustme
from aiohttp import web

from core.addresses import AddressPolicy
from core.encryption import KeyRing
from core.settings import EgressSettings
from core.signing import new_secret
from delivery.http.client import open_client
from delivery.http.request import RequestTemplate
from delivery.send import send
from tests.support.factories import make_webhook_config
from tests.support.platform import running_platform

RECEIVERS = ("93.184.216.34", "2606:2800:220:1::1")
INNER_ADDRESSES = (
    *("127.0.0.1", "169.254.169.254", "10.0.0.5", "100.100.100.200", "168.63.129.16"),
    *("::1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1"),
    *("2001:0:4136:e378:8000:63bf:5601:5601", "2a00:1450:4001:1:0:5efe:a9fe:a9fe", "3fff::1"),
)
PORTS = (80, 443, 8443)
INSIDE = "169.254.169.254"

#: Address literals in all notations, for the grammar and for the dialler.
LITERALS = (
    *(f"https://{a}/" for a in INNER_ADDRESSES if ":" not in a),
    *(f"https://[{a}]/" for a in INNER_ADDRESSES if ":" in a),
    *("https://2852039166/", "https://0xa9fea9fe/", "https://0xa9.0xfe.0xa9.0xfe/"),
    *("https://0251.0376.0251.0376/", "https://169.254.43518/", "https://169.254.169.254./"),
    *("https://[::ffff:a9fe:a9fe]/", "https://[::ffff:169.254.169.254]/", "https://[::a9fe:a9fe]/"),
    *("https://[::ffff:0:a9fe:a9fe]/", "https://0.0.0.0/", "https://[::]/", "https://0/"),
    *("https://①⑥⑨.②⑤④.①⑥⑨.②⑤④/", "https://169。254。169。254/", "https://127.1/"),
    *("https://[fe80::1%25lo]/", "https://localhost/", "https://a.localhost/"),
    *("https://good.shop.com@169.254.169.254/", "https://169.254.169.254#@good.shop.com/"),
    *("https://169.254.169.254\\@good.shop.com/", "https://169.254\t.169.254/"),
    *("https://metadata.google.internal/", "https://kubernetes.default.svc/", "https://inner/"),
)
#: Names that the grammar accepts, with their DNS records.
ZONE: dict[str, list[str]] = {
    "good.shop.com": [RECEIVERS[0]],
    "both.shop.com": list(RECEIVERS),
    "inner.shop.com": [INSIDE],
    "inner6.shop.com": ["fd00:ec2::254"],
    "mixed.shop.com": [RECEIVERS[0], INSIDE],
    "mixed6.shop.com": [RECEIVERS[0], "fd00:ec2::254"],
    "mapped.shop.com": ["::ffff:169.254.169.254"],
    "nat64.shop.com": ["64:ff9b::a9fe:a9fe"],
    "sixtofour.shop.com": ["2002:a9fe:a9fe::1"],
    "isatap.shop.com": ["2a00:1450:4001:1:0:5efe:a9fe:a9fe"],
    "loopback.shop.com": ["127.0.0.1"],
    "any.shop.com": ["0.0.0.0"],  # noqa: S104 - dialled, not listened on
}
NAMES = [f"https://{name}/" for name in ZONE if name not in {"good.shop.com", "both.shop.com"}]
SEARCH = "svc.cluster.local"


class Dns(asyncio.DatagramProtocol):
    """Answers A and AAAA queries from a zone that may change, and records the queries."""

    def __init__(self) -> None:
        self.zone = {f"{name}.": addresses for name, addresses in ZONE.items()}
        self.asked: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        labels, position = [], 12
        while length := data[position]:
            labels.append(data[position + 1 : position + 1 + length].decode())
            position += 1 + length
        name = ".".join([*labels, ""]).lower()
        question, version = data[12 : position + 5], {1: 4, 28: 6}.get(data[position + 2])
        self.asked.add(name)
        # Names below the search domain resolve to inner addresses.
        found = [INSIDE] if name.endswith(f"{SEARCH}.") else self.zone.get(name, [])
        records = [ip_address(a).packed for a in found if ip_address(a).version == version]
        status = b"\x81\x80" if found else b"\x81\x83"
        head = data[:2] + status + b"\0\1" + len(records).to_bytes(2) + b"\0\0\0\0"
        kind = data[position + 1 : position + 3]
        answers = [b"\xc0\x0c" + kind + b"\0\1\0\0\0\0" + len(r).to_bytes(2) + r for r in records]
        self._transport.sendto(head + question + b"".join(answers), addr)


def prepare(directory: Path) -> None:
    """Configure addresses on `lo` and name resolution through this DNS with a search domain."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in {*RECEIVERS, *INNER_ADDRESSES} - {"127.0.0.1", "::1"}:
        nodad = ["nodad"] if ":" in address else []
        prefix = "128" if ":" in address else "32"
        subprocess.run(
            ["ip", "addr", "add", f"{address}/{prefix}", "dev", "lo", *nodad], check=True
        )
    (directory / "resolv.conf").write_text(
        f"nameserver 127.0.0.53\nsearch {SEARCH}\noptions ndots:5 timeout:1\n"
    )
    (directory / "nsswitch.conf").write_text("hosts: files dns\n")
    for name in ("resolv.conf", "nsswitch.conf"):
        subprocess.run(["mount", "--bind", directory / name, f"/etc/{name}"], check=True)


@asynccontextmanager
async def inner_listeners() -> AsyncIterator[list[str]]:
    """The connections to any inner address and port."""
    seen: list[str] = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(str(writer.get_extra_info("sockname")[:2]))
        writer.close()

    async with AsyncExitStack() as stack:
        for address in INNER_ADDRESSES:
            for port in PORTS:
                await stack.enter_async_context(await asyncio.start_server(accept, address, port))
        yield seen


@asynccontextmanager
async def receivers(authority: trustme.CA) -> AsyncIterator[list[str]]:
    """Endpoints on the public addresses. They answer 200 to pings, and to webhooks by path."""
    arrived: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        arrived.append(f"{request.headers['X-Webhook-Event']} {request.host}{request.path}")
        if request.headers["X-Webhook-Event"] == "webhook.ping":
            return web.Response()
        status = {"/301": 301, "/302": 302, "/303": 303, "/307": 307, "/308": 308}
        headers = {
            "Location": f"https://{INSIDE}/",
            "Alt-Svc": f'h3="{INSIDE}:443"; ma=86400, h2="{INSIDE}:443"',
            "Refresh": f"0; url=https://{INSIDE}/",
            "Link": f"<https://{INSIDE}/>; rel=preconnect",
        }
        return web.Response(status=status.get(request.path, 200), headers=headers)

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*RECEIVERS, "*.shop.com").configure_cert(tls)
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    for address in RECEIVERS:
        await web.TCPSite(runner, address, 443, ssl_context=tls).start()
    try:
        yield arrived
    finally:
        await runner.cleanup()


async def registrations(platform: Any) -> dict[str, str]:
    """The result of CreateWebhookConfig for each URL. Its ping uses the dialler."""
    said = {}
    for url in (*LITERALS, *NAMES):
        try:
            await platform.register(url)
            said[url] = "OK"
        except grpc.aio.AioRpcError as error:
            said[url] = error.code().name
    return said


async def deliveries(platform: Any, pool: Any, dns: Dns) -> dict[str, list[str]]:
    """The outcomes by URL of one event, for unchecked and for valid configs."""
    keyring = KeyRing({"k1": bytes(range(32))})
    urls = {}
    for url in (*LITERALS, *NAMES):
        if not url.isprintable() or not url.isascii():
            continue
        webhook_id = await make_webhook_config(pool, url=url)
        urls[webhook_id] = url
        await pool.execute(
            "UPDATE webhook_configs SET secret_key_id = $2, secret_ciphertext = $3 WHERE id = $1",
            *(webhook_id, *keyring.encrypt(new_secret(), webhook_id)),
        )
    dns.zone["rebind.shop.com."] = [RECEIVERS[0]]
    good = [f"https://{RECEIVERS[0]}/", f"https://[{RECEIVERS[1]}]/", "https://rebind.shop.com/"]
    good += [f"https://{name}/" for name in ("good.shop.com", "both.shop.com")]
    good += [f"https://good.shop.com/{status}" for status in (301, 302, 303, 307, 308)]
    for url in good:
        created = await platform.register(url, merchant_id=f"m_{len(urls) // 5}")
        urls[created.webhook_config.id] = url
    await pool.execute("UPDATE webhook_configs SET merchant_id = 'm_1'")
    dns.zone["rebind.shop.com."] = [INSIDE]
    rows = await pool.fetch("SELECT id, url FROM webhook_configs WHERE deleted_at IS NULL")
    async with platform.engine(max_retries=0), asyncio.timeout(60):
        await platform.publish()
        finished = "SELECT count(*) FROM finished_deliveries, pg_sleep(0.05)"
        while await pool.fetchval(finished) < len(rows):
            pass
    found: dict[str, list[str]] = {}
    for row in await pool.fetch(
        "SELECT c.url, a.outcome FROM attempts a JOIN finished_deliveries d ON d.id = a.delivery_id"
        " JOIN webhook_configs c ON c.id = d.webhook_id"
    ):
        found.setdefault(row["url"], []).append(row["outcome"])
    return found


async def dialled(ca_file: Path) -> dict[str, str]:
    """The result of the dialler for each URL, without the grammar."""
    said = {}
    async with open_client(policy=AddressPolicy(), ca_file=ca_file) as client:
        for url in (*LITERALS, *NAMES):
            try:
                result = await send(client, RequestTemplate(url), b"", b"{}", 5)
                said[url] = result.outcome.value
            except ValueError:
                said[url] = "no_url"
    return said


async def main(database_url: str, directory: Path) -> dict[str, Any]:
    prepare(directory)
    authority, ca_file = trustme.CA(), directory / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    _, dns = await asyncio.get_running_loop().create_datagram_endpoint(Dns, ("127.0.0.53", 53))
    async with AsyncExitStack() as stack:
        connects = await stack.enter_async_context(inner_listeners())
        arrived = await stack.enter_async_context(receivers(authority))
        pool = await stack.enter_async_context(asyncpg.create_pool(database_url, min_size=1))
        egress = EgressSettings(ca_file=ca_file)
        platform = await stack.enter_async_context(
            running_platform(database_url, ca_file, directory, egress=egress)
        )
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            os.environ[name] = os.environ[name.upper()] = f"http://{INSIDE}:80"
        report: dict[str, Any] = {
            "registered": await registrations(platform),
            "dialled": await dialled(ca_file),
            "delivered": await deliveries(platform, pool, dns),
        }
        report |= {"connects": list(connects), "arrived": arrived, "asked": sorted(dns.asked)}
        # Without this check, dead listeners would pass the test.
        connects.clear()
        for address in INNER_ADDRESSES:
            for port in PORTS:
                reader, writer = await asyncio.open_connection(address, port)
                await reader.read()
                writer.close()
        return report | {"alive": len(connects)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], Path(sys.argv[2])))))
