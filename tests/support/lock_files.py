"""The packages of a lock file."""

import re
from pathlib import Path

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")


def pinned(lock: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Version and hashes of each package."""
    pins = {}
    for entry in re.split(r"\n(?=\S)", lock.read_text()):
        if pin := _PIN.match(entry):
            pins[pin[1]] = (pin[2], frozenset(re.findall(r"sha256:[0-9a-f]+", entry)))
    return pins
