"""What the store says when it cannot do its work: one sentence, what is wrong and what to do."""

import errno
import sqlite3
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class StoreError(Exception):
    """The store cannot do what was asked; the message is one sentence for the learner."""


def is_damage(error: BaseException) -> bool:
    """True where SQLite says that the file itself is broken, not that the disk or a lock is in the way."""
    # Only for a broken file the module raises this very class; error codes came with Python 3.11.
    return type(error) is sqlite3.DatabaseError


def read_only(path: Path) -> StoreError:
    """The error for a file or folder that cannot be written."""
    return StoreError(
        f"{path} cannot be written, so progress is not saved: "
        f"make the file and the folder {path.parent} writable for you."
    )


def explain(path: Path, error: Exception) -> StoreError:
    """Put an error of SQLite or of the operating system into one sentence."""
    code = error.errno if isinstance(error, OSError) else None
    words = str(error).lower()
    if code in _FULL or "disk is full" in words:
        return StoreError(f"The disk is full, so {path} cannot be written: free some space and try again.")
    if code in _READ_ONLY or "readonly" in words:
        return read_only(path)
    if "locked" in words or "busy" in words:
        return StoreError(f"Another process keeps {path} locked: wait until it has ended and try again.")
    if "disk i/o error" in words:
        return StoreError(f"{path} cannot be read or written (disk I/O error): the disk is full or failing, make room.")
    if is_damage(error):
        return StoreError(
            f"{path} is damaged ({error}): run the command again, which moves it aside and begins a new one."
        )
    if code is not None:
        return StoreError(f"{path} cannot be used ({error.strerror}): check the folder {path.parent}.")
    return StoreError(f"{path} cannot be used ({error}): check that it is the progress file of torch-katas.")
