"""Folders that appear on the disk whole or not at all."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{16}(\.old)?")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes ``target`` at the end; an older ``target`` is replaced.

    Everything in it is on the disk before its name changes. After an error nothing is left of it, and after a loss of
    power at most a folder beside ``target`` whose name begins with a dot. Raises ``OSError`` as writing does.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    made.mkdir(mode=0o700)  # what was learnt from somebody's text is in it
    try:
        yield made
        for file in (*made.iterdir(), made):
            _to_disk(file)
        if target.exists():
            old = target.parent / f".{target.name}.{secrets.token_hex(8)}.old"
            target.rename(old)
            try:
                made.rename(target)
            except BaseException:  # Ctrl-C comes between any two instructions
                if not target.exists():
                    old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            made.rename(target)
        _to_disk(target.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def clear_unfinished(folder: Path) -> None:
    """Removes what ``whole_folder`` left in ``folder`` when it was interrupted; what it was about to replace, and had
    not replaced yet, gets its name back.
    """
    for found in folder.glob(".*"):
        name = _UNFINISHED.fullmatch(found.name)
        if name is None or not found.is_dir():
            continue
        if name[2] and not (folder / name[1]).exists():
            found.rename(folder / name[1])
        else:
            shutil.rmtree(found, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Holds ``folder`` against other programs that do the same; false where one of them has it. Raises ``OSError``."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def check_writable(folder: Path) -> None:
    """Raises ``OSError`` unless a file can be made in ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{secrets.token_hex(8)}"
    with probe.open("xb") as file:
        file.write(b"\0")
        os.fsync(file.fileno())
    probe.unlink()


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a small file, whole or not at all, on the disk when it returns. Raises ``OSError``."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
