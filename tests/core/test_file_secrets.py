"""Secrets from files: reading, reloading, unusable files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from cli.settings import BLOCKS, load
from core.encryption import ReloadedKeyRing, new_key
from core.errors import ConfigurationError
from core.file_secrets import ReloadedSecret, Secret, file_version
from core.settings import DatabaseSettings, SettingsBlock, variable_name

SECRETS = [(block, name) for block in BLOCKS for name in block.secret_names()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    return path


def write(path: Path, text: str) -> None:
    path.write_text(text)


def rename(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    os.replace(fresh, path)


def swap_link(path: Path, text: str) -> None:
    """Update as Kubernetes does: the name points through the symlink `..data`."""
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


def reloaded(path: Path) -> ReloadedSecret[str]:
    return ReloadedSecret(Secret("WEBHOOK_THING", file=path), refuse_broken)


def refuse_broken(text: str) -> str:
    if text.startswith("broken"):
        raise ConfigurationError("WEBHOOK_THING_FILE holds nonsense")
    return text


@pytest.mark.parametrize(("block", "name"), SECRETS, ids=[name for _, name in SECRETS])
def test_every_secret_has_exactly_one_source(
    block: type[SettingsBlock], name: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("from the file\n")
    monkeypatch.setenv("WEBHOOK_DATABASE_URL", "postgresql:///needed")
    monkeypatch.setenv("WEBHOOK_ENCRYPTION_KEYS", "needed")
    monkeypatch.delenv(variable_name(name), raising=False)
    monkeypatch.setenv(f"{variable_name(name)}_FILE", str(file))
    settings = load(block)
    assert settings.secret(name).text() == "from the file"
    assert "from the file" not in repr(settings)

    monkeypatch.setenv(variable_name(name), "canary")
    with pytest.raises(ConfigurationError) as caught:
        load(block)
    assert (
        caught.value.message == f"set {variable_name(name)} or {variable_name(name)}_FILE, not both"
    )


def test_secret_file_replaces_the_fallback(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_DATABASE_URL_FILE", str(file))
    settings = load(DatabaseSettings, database_url=SecretStr("postgresql:///fallback"))
    assert settings.database_url is None


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_secret_excludes_trailing_newlines(file: Path, end: str) -> None:
    file.write_bytes(f"two words {end}".encode())
    assert Secret("WEBHOOK_THING", file=file).text() == "two words "


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda path: path.unlink(), "cannot be read (No such file or directory): mount it there"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
        (lambda path: path.write_bytes(b"\xffcanary"), "cannot be read: it must hold text"),
        (lambda path: path.write_text(""), "is empty: write the secret into it"),
        (lambda path: path.write_text(" \n"), "is empty: write the secret into it"),
    ],
    ids=["absent", "directory", "no text", "empty", "blank"],
)
def test_unusable_file_at_start_is_an_error(
    file: Path, spoil: Callable[[Path], object], error: str
) -> None:
    spoil(file)
    with pytest.raises(ConfigurationError) as caught:
        reloaded(file)
    assert caught.value.message.startswith(f"WEBHOOK_THING_FILE: {file} {error}")
    assert "canary" not in caught.value.message


@pytest.mark.parametrize("change", [write, rename, swap_link])
def test_changed_file_is_read_at_the_next_use(
    file: Path, change: Callable[[Path, str], None], logged: list[Any]
) -> None:
    change(file, "one\n")
    setting = reloaded(file)
    assert setting.current() == "one"
    for text in ("second", "third"):
        change(file, f"{text}\n")
        assert [setting.current(), setting.current()] == [text, text]
    assert [entry["event"] for entry in logged] == ["secret_file_loaded"] * 2
    assert all(entry["setting"] == f"WEBHOOK_THING_FILE: {file}" for entry in logged)


@pytest.mark.parametrize("change", [write, rename, swap_link])
@pytest.mark.parametrize("bad", ["", "broken"])
def test_bad_file_keeps_the_value_and_is_logged_once(
    file: Path, change: Callable[[Path, str], None], bad: str, logged: list[Any]
) -> None:
    change(file, "good")
    setting = reloaded(file)
    change(file, bad)
    assert [setting.current(), setting.current()] == ["good", "good"]
    [entry] = logged
    assert (entry["event"], entry["log_level"]) == ("secret_file_unusable", "error")

    file.unlink()
    assert [setting.current(), setting.current()] == ["good", "good"]
    assert len(logged) == 2
    rename(file, "better")
    assert setting.current() == "better"


def test_changed_mode_is_a_new_version(file: Path) -> None:
    """A file that becomes readable changes nothing else."""
    before = file_version(file)
    file.chmod(0o640)
    assert file_version(file) != before


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_world_readable_file_is_logged(
    file: Path, mode: int, warned: bool, logged: list[Any]
) -> None:
    file.write_text("secret")
    file.chmod(mode)
    reloaded(file)
    assert [entry["event"] for entry in logged] == ["secret_file_readable_by_all"] * warned


def test_key_ring_reloads_its_file(file: Path, logged: list[Any]) -> None:
    row = UUID(int=1)
    old, new = new_key(), new_key()
    file.write_text(f"{old}\n")
    here, there = (ReloadedKeyRing(Secret("WEBHOOK_K", file=file)) for _ in range(2))
    before = here.encrypt("secret", row)

    rename(file, f"{new}\n{old}\n")
    after = here.encrypt("secret", row)
    assert after[0] == new.partition(":")[0]
    assert there.decrypt(*after, row) == there.decrypt(*before, row) == "secret"
    assert logged[-1]["holds"] == [new.partition(":")[0], old.partition(":")[0]]

    rename(file, f"{new},{old[:-4]}")
    assert here.decrypt(*before, row) == "secret"
    assert old.partition(":")[2][:8] not in str(logged)
