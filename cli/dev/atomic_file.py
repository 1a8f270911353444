"""Files that are there whole or not at all, and never open to others, not even briefly."""

import os
import tempfile
from pathlib import Path


def create_file(path: Path, content: bytes) -> None:
    """Make it with mode 0600, and never over a file that somebody else made meanwhile."""
    temporary = _write_beside(path, content)
    try:
        # Unlike a rename, a link fails when the name is taken.
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Make it, or put it in the place of the one that is there."""
    temporary = _write_beside(path, content)
    temporary.chmod(mode)
    temporary.replace(path)


def _write_beside(path: Path, content: bytes) -> Path:
    # mkstemp makes the file with mode 0600, so a key is never readable by others, even briefly.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)
