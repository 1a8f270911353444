"""Secrets from files: what is read, when it is read again, and what a bad file does."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from cli.settings import BLOCKS, load
from core.encryption import ConfiguredKeyRing, new_key
from core.errors import ConfigurationError
from core.file_secrets import Renewed, Secret, stamp
from core.settings import Block, DatabaseSettings, variable

SECRETS = [(block, name) for block in BLOCKS for name in block.secret_names()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    return path


def write(path: Path, text: str) -> None:
    """As a program does that nobody asks to be careful."""
    path.write_text(text)


def rename(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    os.replace(fresh, path)


def swap_link(path: Path, text: str) -> None:
    """As Kubernetes does: the name leads through `..data`, which then leads elsewhere."""
    mount = path.parent
    version = mount / f"..{len(list(mount.iterdir()))}"
    version.mkdir()
    (version / path.name).touch(mode=0o600)
    (version / path.name).write_text(text)
    (mount / "..new").symlink_to(version.name)
    os.replace(mount / "..new", mount / "..data")
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(Path("..data", path.name))


def kept(path: Path) -> Renewed[str]:
    return Renewed(Secret("WEBHOOK_THING", file=path), refuse_broken)


def refuse_broken(text: str) -> str:
    if text.startswith("broken"):
        raise ConfigurationError("WEBHOOK_THING_FILE holds nonsense")
    return text


@pytest.mark.parametrize(("block", "name"), SECRETS, ids=[name for _, name in SECRETS])
def test_every_secret_is_taken_from_its_file_and_never_from_two_places(
    block: type[Block], name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("from the file\n")
    monkeypatch.setenv("WEBHOOK_DATABASE_URL", "postgresql:///needed")
    monkeypatch.setenv("WEBHOOK_ENCRYPTION_KEYS", "needed")
    monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setenv(f"{variable(name)}_FILE", str(file))
    settings = load(block)
    assert settings.secret(name).text() == "from the file"
    assert "from the file" not in repr(settings)

    monkeypatch.setenv(variable(name), "canary")
    with pytest.raises(ConfigurationError) as caught:
        load(block)
    assert caught.value.message == f"set {variable(name)} or {variable(name)}_FILE, not both"


def test_a_file_stands_in_for_the_value_where_a_fallback_would(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBHOOK_DATABASE_URL_FILE", str(file))
    settings = load(DatabaseSettings, database_url=SecretStr("postgresql:///fallback"))
    assert settings.database_url is None


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_the_end_of_the_last_line_is_no_part_of_a_secret(file: Path, end: str) -> None:
    file.write_bytes(f"two words {end}".encode())
    assert Secret("WEBHOOK_THING", file=file).text() == "two words "


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "cannot be read (No such file or directory): mount it there"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
        (lambda path: path.write_bytes(b"\xffcanary"), "cannot be read: it must hold text"),
        (lambda path: path.write_text(""), "is empty: write the secret into it"),
        (lambda path: path.write_text(" \n"), "is empty: write the secret into it"),
    ],
    ids=["absent", "directory", "no text", "empty", "blank"],
)
def test_a_file_that_cannot_be_used_is_named_with_what_to_do(
    file: Path, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(file)
    with pytest.raises(ConfigurationError) as caught:
        kept(file)
    assert caught.value.message.startswith(f"WEBHOOK_THING_FILE: {file} {says}")
    assert "canary" not in caught.value.message


@pytest.mark.parametrize("change", [write, rename, swap_link])
def test_what_changed_is_read_at_the_next_use(
    file: Path, change: Callable[[Path, str], None], logged: list[Any]
) -> None:
    change(file, "one\n")
    setting = kept(file)
    assert setting.current() == "one"
    for text in ("second", "third"):
        change(file, f"{text}\n")
        assert [setting.current(), setting.current()] == [text, text]
    assert [entry["event"] for entry in logged] == ["secret_file_loaded"] * 2
    assert all(entry["setting"] == f"WEBHOOK_THING_FILE: {file}" for entry in logged)


@pytest.mark.parametrize("change", [write, rename, swap_link])
@pytest.mark.parametrize("bad", ["", "broken"])
def test_a_bad_file_keeps_what_was_there_and_is_told_once(
    file: Path, change: Callable[[Path, str], None], bad: str, logged: list[Any]
) -> None:
    change(file, "good")
    setting = kept(file)
    change(file, bad)
    assert [setting.current(), setting.current()] == ["good", "good"]
    [error] = logged
    assert (error["event"], error["log_level"]) == ("secret_file_unusable", "error")

    file.unlink()
    assert [setting.current(), setting.current()] == ["good", "good"]
    assert len(logged) == 2
    rename(file, "better")
    assert setting.current() == "better"


def test_a_changed_mode_counts_as_a_change(file: Path) -> None:
    # A file that could not be read, and now can, has changed in nothing else.
    before = stamp(file)
    file.chmod(0o640)
    assert stamp(file) != before


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_that_everybody_can_read_is_told(
    file: Path, mode: int, warned: bool, logged: list[Any]
) -> None:
    file.write_text("secret")
    file.chmod(mode)
    kept(file)
    assert [entry["event"] for entry in logged] == ["secret_file_readable_by_all"] * warned


def test_a_ring_has_a_new_key_as_soon_as_its_file_has(file: Path, logged: list[Any]) -> None:
    row = UUID(int=1)
    old, new = new_key(), new_key()
    file.write_text(f"{old}\n")
    here, there = (ConfiguredKeyRing(Secret("WEBHOOK_K", file=file)) for _ in range(2))
    before = here.encrypt("secret", row)

    rename(file, f"{new}\n{old}\n")
    after = here.encrypt("secret", row)
    assert after[0] == new.partition(":")[0]
    assert there.decrypt(*after, row) == there.decrypt(*before, row) == "secret"
    assert logged[-1]["holds"] == [new.partition(":")[0], old.partition(":")[0]]

    rename(file, f"{new},{old[:-4]}")
    assert here.decrypt(*before, row) == "secret"
    assert old.partition(":")[2][:8] not in str(logged)
