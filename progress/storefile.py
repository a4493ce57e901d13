"""The file of the store: created without a race, checked for damage, moved aside, opened for reading only."""

import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from progress import migrations
from progress.errors import StoreError, is_damage

try:
    import fcntl
except ImportError:  # a system without flock: two processes may then move a damaged file aside at once
    fcntl = None

BUSY_SECONDS = 5
"""How long a process waits for another one's transaction."""

FOLDER = ".kata"
"""The folder of the store in a workspace; nobody but its owner may look into it."""

_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-")
_SIDECARS = ("-wal", "-shm", "-journal")
_STALE_SECONDS = 3600
_TRIES = 100


def connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """A connection without implicit transactions; `mode` as in SQLite's URIs (rw does not create)."""
    # Written here, since Path.as_uri imports urllib and ipaddress: 2 ms of every command.
    name = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in os.fsencode(path.absolute()))
    return sqlite3.connect(f"file:{name}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None)


def is_writable(path: Path) -> bool:
    """True where this user may change the file and put a journal beside it."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK | os.X_OK)


def make_folder(folder: Path) -> None:
    """Create the folder with mode 0700, and tighten one of ours that others may read."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif folder.name == FOLDER and folder.stat().st_mode & 0o077:
        with suppress(OSError):  # somebody else's folder, or a file system without modes
            folder.chmod(0o700)


def create(path: Path) -> None:
    """Make an empty store at `path` unless there is one; who comes second keeps the first one's."""
    if path.exists():
        return
    with _folder_lock(path.parent) as descriptor:
        if path.exists():
            return
        _sweep(path)
        # A log without its file would be replayed into the new one.
        _move(path, _SIDECARS, _aside(path))
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        try:
            _build(temporary)
            _put_in_place(temporary, path)
        finally:
            _remove(temporary)
        with suppress(OSError):
            os.fsync(descriptor)


def open_sound(path: Path) -> tuple[sqlite3.Connection, Path | None]:
    """A connection to a sound file, created if need be, and where a damaged one was moved for it."""
    kept = None
    for _ in range(_TRIES):
        create(path)
        # While this process looks at the file nobody moves it: who closes a file that has another name by
        # then would delete the log of the next one.
        with _folder_lock(path.parent, shared=True):
            if path.exists():
                damage = _damage_untouched(path)
                if damage is None:
                    return connect(path), kept
        kept = move_aside(path) or kept
    raise StoreError(f"{path} is damaged or removed as soon as it is made: end what does that and try again.")


def find_damage(db: sqlite3.Connection) -> str | None:
    """What is broken in this file, or None."""
    try:
        answer = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return str(error)
        raise
    return None if answer == "ok" else answer


def move_aside(path: Path) -> Path | None:
    """Keep a damaged file under another name, with its log; None where another process already did."""
    with _folder_lock(path.parent):
        if not path.exists() or _damage_untouched(path) is None:
            return None
        kept = _aside(path)
        # The log goes first: a kill between the two must not leave it to the next file of this name.
        _move(path, (*_SIDECARS, ""), kept)
        return kept


def copy_for_reading(path: Path, folder: Path) -> Path:
    """Copy the file and its log to where SQLite may write beside it, and return the copy."""
    for suffix in ("", "-wal", "-journal"):
        original = Path(f"{path}{suffix}")
        if original.exists():
            shutil.copyfile(original, folder / original.name)
    return folder / path.name


def _damage_untouched(path):
    """What is broken, found by a reader: the last writer to close a file would delete its log."""
    try:
        with closing(connect(path, "ro")) as db:
            return find_damage(db)
    except sqlite3.OperationalError:  # a killed process left a transaction that must be rolled back first
        with closing(connect(path)) as db:
            return find_damage(db)


def _build(path):
    try:
        _build_with(path, "WAL")
    except sqlite3.OperationalError:  # no shared memory here (a network file system); a full disk fails again
        _remove(path)
        _build_with(path, "DELETE")


def _build_with(path, journal_mode):
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with closing(connect(path)) as db:
        db.execute(f"PRAGMA journal_mode = {journal_mode}")  # without an error it may still say no
        migrations.migrate(db)


def _remove(path):
    for suffix in ("", *_SIDECARS):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _put_in_place(temporary, path):
    try:
        os.link(temporary, path)  # unlike a rename, this never replaces what another process made meanwhile
    except FileExistsError:
        return
    except OSError:  # no hard links here
        if not path.exists():
            os.replace(temporary, path)


def _aside(path):
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    kept, count = path.with_name(f"{path.name}.damaged-{stamp}"), 1
    while any(Path(f"{kept}{suffix}").exists() for suffix in ("", *_SIDECARS)):
        kept, count = path.with_name(f"{path.name}.damaged-{stamp}-{count}"), count + 1
    return kept


def _move(path, suffixes, kept):
    for suffix in suffixes:
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{kept}{suffix}")


def _sweep(path):
    """Remove what a process that was killed while creating has left."""
    for left in path.parent.glob(f".{path.name}.*.tmp*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


@contextmanager
def _folder_lock(folder: Path, shared: bool = False) -> Iterator[int]:
    """Keep others from creating or moving the file (shared), or be the only one who may."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            _wait_for_lock(descriptor, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor, folder, kind):
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError(
                    f"Another process keeps {folder} locked: wait until it has ended and try again."
                ) from None
            time.sleep(0.002)
        except OSError:  # a file system without locks
            return
