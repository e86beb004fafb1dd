"""Folders that appear on the disk whole or not at all."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}(\.old)?")


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
            except OSError:
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
    """Removes what ``whole_folder`` left in ``folder`` when it was interrupted."""
    for found in folder.glob(".*"):
        if _UNFINISHED.fullmatch(found.name) and found.is_dir():
            shutil.rmtree(found, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
