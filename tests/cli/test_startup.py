"""How many attempts fit into the limit of open files, in processes that have such limits."""

import subprocess
import sys

import pytest

_ASK = """
import resource
from cli.startup import in_flight_within_file_limit
print(in_flight_within_file_limit(500, 10), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("limits", "fitting", "open_files"),
    [
        ("ulimit -n 2000", 500, 2000),
        # Only the soft limit is in the way, so it goes: as far as all of them racing may need.
        ("ulimit -n 5000 && ulimit -S -n 256", 500, 1042 + 7 * 500),
        ("ulimit -n 1100 && ulimit -S -n 1060", 500, 1100),
        ("ulimit -n 256", (256 - 42) // 2, 256),
        # It works with next to nothing, and says so.
        ("ulimit -n 40", 1, 40),
    ],
)
def test_places_are_what_the_limit_leaves(limits: str, fitting: int, open_files: int) -> None:
    told = subprocess.run(
        ["sh", "-c", f'{limits} && exec "$0" -c "$1"', sys.executable, _ASK],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    *warnings, answer = told.splitlines()
    assert answer == f"{fitting} {open_files}"
    assert len(warnings) == (fitting < 500)
    assert all("fewer_in_flight" in line for line in warnings)
