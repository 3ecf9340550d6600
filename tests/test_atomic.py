"""What is written whole or not at all. Kills are tested where something is saved: test_killed_saving.py, and merges."""

import os
from pathlib import Path

import pytest

from oplora.files import atomic


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_in_part(path: Path) -> None:
    path.write_text("ne")
    raise KeyboardInterrupt


def never(new: Path, old: Path) -> bool:
    return False


def test_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with atomic.file(tmp_path / "a") as new:
        new.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert tree(tmp_path) == {"a": "new"}


def test_folder_of_the_file_is_made(tmp_path: Path) -> None:
    with atomic.file(tmp_path / "b" / "c" / "a") as new:
        new.write_text("new")
    assert tree(tmp_path) == {"b/c/a": "new"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_others_may_read_as_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic.file(tmp_path / "file") as new:
            private(new)
        with atomic.files_in(tmp_path / "folder", "a", lambda *_: False) as new:
            private(new / "a")
        with atomic.folder(tmp_path / "whole") as new:
            (new / "inner").mkdir()
            private(new / "inner/a")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder/a", "whole/inner/a")]
    assert modes == 3 * [0o666 & ~umask]


def private(path: Path) -> None:
    """As safetensors writes: a file of its own, which takes the name."""
    other = path.with_name("other")
    other.touch(0o600)
    other.rename(path)


@pytest.mark.parametrize("kind", ["file", "folder", "files_in"])
def test_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, kind: str) -> None:
    target = tmp_path / ("a" if kind == "file" else "b")
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "seal").write_text("old")
    writers = {
        "file": lambda: atomic.file(target),
        "folder": lambda: atomic.folder(target, overwrite=True),
        "files_in": lambda: atomic.files_in(target, "seal", never),
    }
    with pytest.raises(KeyboardInterrupt), writers[kind]() as new:
        write_in_part(new if kind == "file" else new / "seal")
    assert tree(tmp_path) == {"a": "old", "b/seal": "old"}


def test_folder_takes_no_filled_ones_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(OSError), atomic.folder(tmp_path / "a") as new:
        (new / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"a/mine": "mine"}


def test_overwriting_folder_keeps_nothing_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with atomic.folder(tmp_path / "a", overwrite=True) as new:
        (new / "new").write_text("new")
    assert tree(tmp_path) == {"a/new": "new"}


def test_files_go_in_beside_those_of_others(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    with atomic.files_in(tmp_path, "seal", never) as new:
        (new / "other").mkdir()
        (new / "other" / "seal").write_text("sealed")
        (new / "seal").write_text("sealed")
    assert tree(tmp_path) == {"other/mine": "mine", "other/seal": "sealed", "seal": "sealed"}


def test_writers_remove_what_killed_ones_left_of_their_own_name_alone(tmp_path: Path) -> None:
    lefts = [tmp_path / f".oplora-{name}-0123abcd.partial" for name in ("a", "a-b", "b")]
    for left in lefts:
        left.touch()
        os.utime(left, (0, 0))
    with atomic.file(tmp_path / "a") as new:
        new.touch()
    assert [left.exists() for left in lefts] == [False, True, True]
