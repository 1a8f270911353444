"""Secrets from the environment, or from a file that a secret manager keeps up to date.

A file is looked at whenever its secret is used, so a process goes on with a new one by itself. A
mount that swaps a link, as Kubernetes does, counts as a change like a rename or a write.
"""

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import structlog
from pydantic import SecretStr

from core.errors import ConfigurationError

#: How often the files are looked at when nothing asks for what they hold.
_LOOK_SECONDS = 5.0

log = structlog.get_logger()


class Secret:
    """One secret setting and where it comes from; `given` says whether it was set at all."""

    def __init__(self, variable: str, value: SecretStr | None = None, file: Path | None = None):
        self._value = value
        self.file = file
        self.given = value is not None or file is not None
        self.source = variable if file is None else f"{variable}_FILE: {file}"

    def text(self) -> str:
        """What it is now, without the end of the last line; ConfigurationError without its text."""
        if self.file is None:
            return self._value.get_secret_value() if self._value is not None else ""
        try:
            text = self.file.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise ConfigurationError(
                f"{self.source} cannot be read ({error.strerror}): mount it there, readable by "
                "the user that this process runs as"
            ) from None
        except UnicodeDecodeError:
            raise ConfigurationError(
                f"{self.source} cannot be read: it must hold text in UTF-8"
            ) from None
        if not text.strip():
            raise ConfigurationError(f"{self.source} is empty: write the secret into it")
        return text

    def stamp(self) -> object:
        """The same as long as the secret is; to ask costs microseconds."""
        return None if self.file is None else stamp(self.file)


class Renewed[T]:
    """What a secret means, renewed when its file has changed.

    The first reading raises ConfigurationError. From then on a file that cannot be used is an error
    in the log, once for each change, and what was read before goes on. `parse` raises
    ConfigurationError without the text, and its results are exchanged as a whole.
    """

    def __init__(
        self,
        secret: Secret,
        parse: Callable[[str], T],
        *,
        public: bool = False,
        show: Callable[[T], object] = lambda _: None,
    ):
        """`public`: others may read the file; `show`: what the log may say of what was read."""
        self._secret = secret
        self._parse = parse
        self._public = public
        self._show = show
        self._seen = secret.stamp()
        self._value = parse(secret.text())
        self._warn_of_readers()

    def current(self) -> T:
        found = self._secret.stamp()
        if found != self._seen:
            # Before the file is read: what changes meanwhile is seen the next time.
            self._seen = found
            try:
                self._value = self._parse(self._secret.text())
            except ConfigurationError as error:
                log.error("secret_file_unusable", error=error.message, kept="the one before")
            else:
                # What it shows are ids of keys, or nothing.
                log.info(  # nosemgrep: secret-in-log
                    "secret_file_loaded",
                    setting=self._secret.source,
                    holds=self._show(self._value),
                )
                self._warn_of_readers()
        return self._value

    def _warn_of_readers(self) -> None:
        file = self._secret.file
        if file is not None and not self._public and readable_by_all(file):
            # The setting's name and its file's.
            log.warning(  # nosemgrep: secret-in-log
                "secret_file_readable_by_all", setting=self._secret.source
            )


async def keep_looking(*looks: Callable[[], object]) -> None:
    """Look at files now and then until cancelled: a bad one is told before anybody needs it."""
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        for look in looks:
            look()


def stamp(path: Path) -> tuple[object, ...]:
    """Tells one state of a file from another, also when a link to it or its mode has changed."""
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno,)
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def readable_by_all(path: Path) -> bool:
    """Whether every user of this machine may read it; False when that cannot be told."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
