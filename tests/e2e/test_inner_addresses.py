"""Every trick by which an inner address could be reached, on real packets: nothing arrives there.

In a network namespace, so that public addresses can be had and no test-only permission is needed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.inner_addresses import INNER_ADDRESSES, LITERALS, NAMES, PORTS, SEARCH
from tests.support.paths import ROOT

NAMESPACE = ["unshare", "--net", "--mount"]
if os.geteuid() != 0:
    NAMESPACE += ["--user", "--map-root-user"]


def why_not() -> str:
    """Why this machine cannot do it; empty when it can."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return "unshare and ip are needed (Debian: util-linux, iproute2)"
    tried = subprocess.run(
        [*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False
    )
    return "" if tried.returncode == 0 else f"no network namespace here: {tried.stderr.strip()}"


@pytest.fixture
def report(database_url: str, tmp_path: Path) -> Any:
    if reason := why_not():
        pytest.skip(reason)
    command = [
        *NAMESPACE,
        sys.executable,
        "-m",
        "tests.support.inner_addresses",
        database_url,
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_request_reaches_an_inner_address(report: Any) -> None:
    assert report["connects"] == []
    assert report["alive"] == len(INNER_ADDRESSES) * len(PORTS)

    # Registration: refused before or by the dialler, all of them.
    assert set(report["registered"]) == {*LITERALS, *NAMES}
    assert set(report["registered"].values()) == {"INVALID_ARGUMENT"}

    # The dialler alone, without the grammar before it.
    assert set(report["dialled"]) == {*LITERALS, *NAMES}
    assert set(report["dialled"].values()) <= {"refused", "dns_error", "no_url"}
    assert {report["dialled"][url] for url in NAMES} == {"refused"}

    # Deliveries to stored URLs are refused permanently, also after a change of DNS.
    delivered = report["delivered"]
    refused = {url for url, outcomes in delivered.items() if outcomes == ["refused"]}
    assert {*NAMES, "https://rebind.shop.com/"} <= refused
    assert len(refused) > len(NAMES) + 30
    redirects = {url for url, outcomes in delivered.items() if outcomes == ["http_error"]}
    assert redirects == {f"https://good.shop.com/{s}" for s in (301, 302, 303, 307, 308)}
    succeeded = {url for url, outcomes in delivered.items() if outcomes == ["succeeded"]}
    assert len(succeeded) == 4
    assert refused | redirects | succeeded == set(delivered)
    assert len([what for what in report["arrived"] if what.startswith("payment")]) == 9

    # Names are absolute for DNS: no search domain is tried, not even first.
    assert [name for name in report["asked"] if SEARCH in name] == []
