"""Secrets from the environment or from files that a secret manager updates.

A file is checked whenever its secret is used, so a process picks up a new secret without a restart.
A changed symlink counts as a change, because Kubernetes updates mounted secrets that way.
"""

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import structlog
from pydantic import SecretStr

from core.errors import ConfigurationError

_RELOAD_SECONDS = 5.0

log = structlog.get_logger()


class Secret:
    """A secret setting and its source. `given` is False if neither value nor file is set."""

    def __init__(self, variable: str, value: SecretStr | None = None, file: Path | None = None):
        self._value = value
        self.file = file
        self.given = value is not None or file is not None
        self.source = variable if file is None else f"{variable}_FILE: {file}"

    def text(self) -> str:
        """Read the current secret, without trailing newlines.

        Raises ConfigurationError, whose message never holds the secret.
        """
        if self.file is None:
            return self._value.get_secret_value() if self._value is not None else ""
        try:
            text = self.file.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise ConfigurationError(
                f"{self.source} cannot be read ({error.strerror}): mount it there, readable by "
                "the user of this process"
            ) from None
        except UnicodeDecodeError:
            raise ConfigurationError(
                f"{self.source} cannot be read: it must hold text in UTF-8"
            ) from None
        if not text.strip():
            raise ConfigurationError(f"{self.source} is empty: write the secret into it")
        return text

    def version(self) -> object:
        """Return a value that changes with the file. Costs microseconds."""
        return None if self.file is None else file_version(self.file)


class ReloadedSecret[T]:
    """The parsed value of a secret, parsed again when its file changes.

    The constructor raises ConfigurationError. Later an unusable file is logged once per change and
    the previous value stays. `parse` raises ConfigurationError without the text of the secret.
    """

    def __init__(
        self,
        secret: Secret,
        parse: Callable[[str], T],
        *,
        public: bool = False,
        show: Callable[[T], object] = lambda _: None,
    ):
        """`public`: other users may read the file. `show`: the part of a value to log."""
        self._secret = secret
        self._parse = parse
        self._public = public
        self._show = show
        self._version = secret.version()
        self._value = parse(secret.text())
        self._warn_if_world_readable()

    def current(self) -> T:
        version = self._secret.version()
        if version != self._version:
            # Stored before the file is read, so that a change during the read is seen next time.
            self._version = version
            try:
                self._value = self._parse(self._secret.text())
            except ConfigurationError as error:
                log.error("secret_file_unusable", error=error.message, kept="the previous value")
            else:
                # `show` returns key ids or nothing.
                log.info(  # nosemgrep: secret-in-log
                    "secret_file_loaded",
                    setting=self._secret.source,
                    holds=self._show(self._value),
                )
                self._warn_if_world_readable()
        return self._value

    def _warn_if_world_readable(self) -> None:
        file = self._secret.file
        if file is not None and not self._public and is_world_readable(file):
            # The source is the name of the setting and of its file.
            log.warning(  # nosemgrep: secret-in-log
                "secret_file_readable_by_all", setting=self._secret.source
            )


async def reload_periodically(*reloads: Callable[[], object]) -> None:
    """Call these every 5 s until cancelled, so that a bad file is logged before it is needed."""
    while True:
        await asyncio.sleep(_RELOAD_SECONDS)
        for reload in reloads:
            reload()


def file_version(path: Path) -> tuple[object, ...]:
    """Return a value that changes with the content, the mode or the symlink target of a file."""
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno,)
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def is_world_readable(path: Path) -> bool:
    """Whether every user of this machine may read the file. False if it cannot be inspected."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
