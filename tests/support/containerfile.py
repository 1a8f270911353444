"""Executes the steps of the Containerfile in an empty directory, as an ordinary user.

Only the instructions in the file are supported. Others fail, so that no step is skipped. A copy of
the Python that runs the tests replaces the base image, and one directory replaces the root
directories. All stages use the same directory, because installed files contain its path.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.support.paths import ROOT

#: The user of the image. Tests execute the steps as the current user.
UID = 65532
_IMAGE_PATH = "/usr/local/bin:/usr/bin:/bin"
_OWN_ROOTS = re.compile(r"(?<![\w.$/-])/(?=(?:build|opt|usr/local)\b)")
#: Prefixes of variables that package downloads need on the test machine.
_NETWORK = (
    "PIP_",
    "UV_",
    "SSL_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
)


@dataclass(frozen=True)
class Step:
    """An instruction with its arguments, on one line."""

    instruction: str
    value: str


def steps(text: str) -> Iterator[Step]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, _, value = line.partition(" ")
        yield Step(instruction, value.strip())


@dataclass
class Image:
    """A build stage with its root directory and metadata."""

    base: str
    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _IMAGE_PATH})
    working_directory: str = "/"
    labels: dict[str, str] = field(default_factory=dict)
    exec_forms: dict[str, list[str]] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)

    def place(self, path: str) -> Path:
        """The path on this machine for a path of the image."""
        return self.root / PurePosixPath(self.working_directory, path).relative_to("/")

    def translate(self, text: str) -> str:
        return _OWN_ROOTS.sub(f"{self.root}/", text)

    def variables(self) -> dict[str, str]:
        """The environment of a process in the stage, with the library path of the copied Python."""
        return {
            **{name: self.translate(value) for name, value in self.environment.items()},
            "LD_LIBRARY_PATH": str(self.root / "usr/local/lib"),
        }

    def program(self, *arguments: str) -> list[str]:
        """The command line of the entry point with these arguments, for an unprivileged user."""
        [name] = self.exec_forms["ENTRYPOINT"]
        found = shutil.which(name, path=self.variables()["PATH"])
        assert found, f"{name} is not on the PATH of the image"
        return [*as_ordinary_user(), found, *arguments]


def as_ordinary_user() -> list[str]:
    """The prefix that runs a command without privileges."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all"]


def visible(path: PurePosixPath, ignore: Sequence[str]) -> bool:
    """Whether .containerignore leaves a file in the build context."""
    shown = True
    for line in ignore:
        pattern = line.removeprefix("!")
        if any(_matches(pattern, part) for part in (path, *path.parents)):
            shown = line.startswith("!")
    return shown


def _matches(pattern: str, path: PurePosixPath) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.name, pattern.removeprefix("**/"))
    wanted = pattern.split("/")
    return len(wanted) == len(path.parts) and all(map(fnmatch.fnmatch, path.parts, wanted))


class Build:
    """The executed steps. `image` is the current stage and finally the result."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._stages: dict[str, Path] = {}
        self._user = as_ordinary_user()
        ignored = (ROOT / ".containerignore").read_text().splitlines()
        self._ignore = [line for line in ignored if line and not line.startswith("#")]
        self._own(directory)
        self.image = Image("", directory / "none")

    def take(self, step: Step) -> None:
        match step.instruction:
            case "FROM":
                self._from(*step.value.split())
            case "ENV" | "LABEL":
                kept = self.image.environment if step.instruction == "ENV" else self.image.labels
                for pair in shlex.split(step.value):
                    name, _, value = pair.partition("=")
                    kept[name] = value.replace("$PATH", self.image.environment["PATH"])
            case "WORKDIR":
                self.image.working_directory = step.value
                self._make(self.image.place("."))
            case "COPY":
                self._copy(*step.value.split())
            case "RUN":
                self._run(step.value)
            case "ENTRYPOINT" | "CMD":
                self.image.exec_forms[step.instruction] = json.loads(step.value)
            case "HEALTHCHECK":
                self.image.exec_forms["HEALTHCHECK"] = json.loads(step.value.partition("CMD ")[2])
            case "USER" | "EXPOSE" | "STOPSIGNAL":
                self.image.other[step.instruction] = step.value
            case _:
                raise AssertionError(f"no test knows what {step.instruction} does")

    def _from(self, base: str, _: str = "AS", name: str = "final") -> None:
        root = self._directory / "root"
        for stage, path in self._stages.items():
            if path == root:
                self._stages[stage] = root.rename(self._directory / f"stage-{stage}")
        self._stages[name] = root
        self.image = Image(base, root)
        _copy_python(root / "usr/local")
        self._own(root)

    def _copy(self, *words: str) -> None:
        *sources, request_template = words
        to = self.image.place(request_template)
        if sources[0].startswith("--from="):
            stage = self._stages[sources.pop(0).removeprefix("--from=")]
            for source in sources:
                shutil.copytree(stage / source.lstrip("/"), to, symlinks=True)
        else:
            for source in sources:
                self._copy_from_context(source, to, into=request_template.endswith("/"))
        self._own(self.image.root)

    def _copy_from_context(self, source: str, to: Path, *, into: bool) -> None:
        files = [path for path in self._context() if path.is_relative_to(source)]
        assert files, f"{source} is not in the checkout, or .containerignore hides it"
        for file in files:
            below = file.relative_to(source)
            target = to / (below if below.parts else file.name if into else "")
            self._make(target.parent)
            shutil.copy(ROOT / file, target)

    def _context(self) -> Iterator[PurePosixPath]:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for line in listed.stdout.splitlines():
            path = PurePosixPath(line)
            if visible(path, self._ignore) and (ROOT / path).exists():
                yield path

    def _run(self, script: str) -> None:
        environment = {
            **{n: v for n, v in os.environ.items() if n.startswith(_NETWORK)},
            **self.image.variables(),
            "HOME": str(self._directory),
        }
        done = subprocess.run(
            [*self._user, "/bin/sh", "-ec", self.image.translate(script)],
            cwd=self.image.place("."), env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"

    def _make(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)

    def _own(self, directory: Path) -> None:
        if self._user:
            subprocess.run(["chown", "-R", f"{UID}:{UID}", directory], check=True)


def build(containerfile: Mapping[str, str] | str, directory: Path) -> Image:
    """Execute all instructions of a Containerfile."""
    work = Build(directory)
    for step in steps(str(containerfile)):
        work.take(step)
    return work.image


def _copy_python(to: Path) -> None:
    """A copy of the Python that runs the tests, without files that no image has."""
    base = Path(sys.base_prefix)
    version = f"python3.{sys.version_info.minor}"
    (to / "bin").mkdir(parents=True)
    shutil.copy(base / "bin" / version, to / "bin" / version)
    for name in ("python", "python3"):
        (to / "bin" / name).symlink_to(version)
    without = shutil.ignore_patterns(
        "test", "idlelib", "config-*", "site-packages", "EXTERNALLY-MANAGED"
    )
    shutil.copytree(base / "lib" / version, to / "lib" / version, ignore=without)
    pip = base / "lib" / version / "site-packages"
    for part in pip.glob("pip*"):
        shutil.copytree(part, to / "lib" / version / "site-packages" / part.name)
    for library in (base / "lib").glob("libpython3*.so*"):
        shutil.copy(library, to / "lib" / library.name)
