"""Writing so that a file or a folder is whole or not there at all, whenever the process is killed.

What is new is written beside its target as `.oplora-NAME-XXXXXXXX.partial`, reaches the disk and takes the target's
name by renaming. What a killed process has left is removed by the next that writes under the same NAME, an hour after
the last byte: until then it may be that of a process that is writing now.

Errors are the OSErrors that occur; nothing is left of what was written then.
"""

import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["file", "files_in", "folder", "put_right"]

STALE_SECONDS: Final = 3600  # nothing was written for so long: the process was killed


@contextmanager
def file(path: Path) -> Iterator[Path]:
    """Where to write what then takes the place of the file `path`."""
    new = _free_name(path.parent, path.name)
    try:
        new.touch()
        mode = new.stat().st_mode
        yield new
        _set_mode(new, mode)
        _sync(new)
        os.replace(new, path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which then becomes `path`.

    overwrite: `path` may be a folder that is not empty. It is away for a moment, of two system calls; a process that is
    killed in it leaves it to put_right.
    """
    with _new_folder(path.parent, path.name) as new:
        yield new
        _sync_all(new)
        swapped = overwrite and path.is_dir()
        if swapped:
            _swap(new, path)
        else:
            new.rename(path)  # over an empty folder too, but never over a filled one
    _sync(path.parent)
    if swapped:
        shutil.rmtree(_old(path), ignore_errors=True)


def put_right(path: Path, is_whole: Callable[[Path], bool]) -> None:
    """After processes that were killed in `folder`: what `path` was is in its place, and nothing of theirs beside it.

    is_whole: whether a folder is one that was written to its end; what `path` was is removed for no other.
    """
    if (old := _old(path)).exists():
        with suppress(OSError):  # `path` is there and not empty
            old.rename(path)
        if is_whole(path):
            shutil.rmtree(old, ignore_errors=True)
    _remove_left(path.parent, path.name)


@contextmanager
def files_in(path: Path, seal: str, is_same: Callable[[Path, Path], bool]) -> Iterator[Path]:
    """A folder to fill, whose files then go into the folder `path`, beside those of others; into subfolders too.

    No file system moves two files at once. So `seal` is the file without which nobody reads a folder: unless
    is_same(new folder, old folder) says that it stays what it is, it goes first and comes last.
    """
    with _new_folder(path if path.exists() else path.parent, seal) as new:
        yield new
        _sync_all(new)
        _move_files(new, path, seal, is_same)


@contextmanager
def _new_folder(place: Path, name: str) -> Iterator[Path]:
    new = _free_name(place, name)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _free_name(place: Path, name: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    _remove_left(place, name)
    return place / f".oplora-{name}-{secrets.token_hex(4)}.partial"


def _old(path: Path) -> Path:
    return path.with_name(f".oplora-{path.name}-old")


def _remove_left(place: Path, name: str) -> None:
    for left in place.glob(f".oplora-{glob.escape(name)}-{8 * '[0-9a-f]'}.partial"):
        with suppress(OSError):  # another process is removing it, or it is another user's
            if max(path.stat().st_mtime for path in (left, *left.rglob("*"))) > time.time() - STALE_SECONDS:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _swap(new: Path, path: Path) -> None:
    old = _old(path)
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise


def _move_files(new: Path, path: Path, seal: str, is_same: Callable[[Path, Path], bool]) -> None:
    if new.parent != path:
        with suppress(OSError):  # by now another process may have made it
            new.rename(path)
            _sync(path.parent)
            return
    for source, _, names in os.walk(new):
        target = path / Path(source).relative_to(new)
        target.mkdir(exist_ok=True)
        if seal in names and not is_same(Path(source), target):
            (target / seal).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == seal):
            os.replace(Path(source, name), target / name)
        _sync(target)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _set_mode(path, folder.stat().st_mode & 0o666)
        _sync(path)
    _sync(folder)


def _set_mode(path: Path, mode: int) -> None:
    """What open() would have given it: safetensors (0.8) makes files that nobody but their owner may read."""
    with suppress(OSError):  # some file systems have no modes
        path.chmod(mode)


def _sync(path: Path) -> None:
    """A kill does not need it; after a power cut a name could be that of no bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot, and keep names safe by themselves or not at all
            raise
    finally:
        os.close(descriptor)
