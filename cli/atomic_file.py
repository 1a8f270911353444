"""Writes files atomically, and keeps keys unreadable for other users from the start."""

import os
import tempfile
from pathlib import Path


def create_file(path: Path, content: bytes) -> None:
    """Create a file with mode 0600. A file that exists by then is kept."""
    temporary = _write_beside(path, content)
    try:
        # Unlike a rename, a link fails if the name exists.
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Create or replace a file."""
    temporary = _write_beside(path, content)
    temporary.chmod(mode)
    temporary.replace(path)


def _write_beside(path: Path, content: bytes) -> Path:
    # mkstemp creates the file with mode 0600.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)
