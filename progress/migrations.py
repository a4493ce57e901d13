"""The schema of the store as a list of steps; each is applied in one transaction together with its record.

A step never changes once it was released: a new wish is a new function at the end of `MIGRATIONS`.
A step must not call `executescript`, which would commit in its middle.

Every table is a set of facts, so that merging two stores is a union.
"""

import sqlite3
from collections.abc import Callable

from progress.records import now


def m001_initial(db: sqlite3.Connection) -> None:
    """Attempts, sources and when they were taken, hints, solutions seen, fetches."""
    # The seed is text: torch draws unsigned 64 bits, SQLite's integers are signed.
    db.execute(
        """
        CREATE TABLE attempts (
            seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kata TEXT NOT NULL, started TEXT NOT NULL,
            duration REAL NOT NULL, outcome TEXT NOT NULL, tasks TEXT NOT NULL, passed INTEGER NOT NULL,
            seed TEXT NOT NULL, device TEXT NOT NULL, versions TEXT NOT NULL, snapshot TEXT,
            provenance TEXT NOT NULL
        )
        """
    )
    db.execute("CREATE TABLE sources (sha TEXT PRIMARY KEY NOT NULL, body BLOB NOT NULL)")
    db.execute(
        """
        CREATE TABLE snapshots (
            seq INTEGER PRIMARY KEY, sha TEXT NOT NULL, kata TEXT NOT NULL, taken TEXT NOT NULL,
            reason TEXT NOT NULL, UNIQUE (kata, sha, taken, reason)
        )
        """
    )
    db.execute(
        """
        CREATE TABLE hints (
            kata TEXT NOT NULL, task TEXT NOT NULL, rung INTEGER NOT NULL, taken TEXT NOT NULL,
            PRIMARY KEY (kata, task, rung)
        )
        """
    )
    db.execute(
        """
        CREATE TABLE solutions (
            kata TEXT NOT NULL, seen TEXT NOT NULL, gave_up INTEGER NOT NULL,
            PRIMARY KEY (kata, seen, gave_up)
        )
        """
    )
    db.execute(
        "CREATE TABLE fetches (kata TEXT NOT NULL, fetched TEXT NOT NULL, PRIMARY KEY (kata, fetched))",
    )


def m002_indexes(db: sqlite3.Connection) -> None:
    """What is asked at every check stays quick after thousands of attempts."""
    # Without the Z, times with and without a fraction of a second sort together.
    db.execute("CREATE INDEX attempts_of_kata ON attempts (kata, rtrim(started, 'Z'))")
    db.execute("CREATE INDEX attempts_passed ON attempts (kata) WHERE passed")
    db.execute("CREATE INDEX snapshots_of_kata ON snapshots (kata, rtrim(taken, 'Z'))")
    db.execute("CREATE INDEX snapshots_of_source ON snapshots (sha)")


MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [m001_initial, m002_indexes]
"""All steps, oldest first."""


def applied(db: sqlite3.Connection) -> list[str]:
    """The names of the steps that this file has seen."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'migrations'").fetchone() is None:
        return []
    return [name for (name,) in db.execute("SELECT name FROM migrations ORDER BY seq")]


def is_foreign(db: sqlite3.Connection) -> bool:
    """True for a database that holds tables but none of ours: some other program's file."""
    return not applied(db) and db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None


def unknown(db: sqlite3.Connection) -> list[str]:
    """The steps in this file that this program does not know: a newer one wrote it."""
    names = {step.__name__ for step in MIGRATIONS}
    return [name for name in applied(db) if name not in names]


def migrate(db: sqlite3.Connection) -> None:
    """Apply what is missing. A kill at any moment leaves whole steps only, and the next call goes on."""
    done = set(applied(db))
    for step in MIGRATIONS:
        if step.__name__ not in done:
            _apply(db, step)


def _apply(db, step):
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute(
            "CREATE TABLE IF NOT EXISTS migrations "
            "(seq INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, applied TEXT NOT NULL)"
        )
        # Another process may have been quicker while this one waited for the lock.
        if step.__name__ not in applied(db):
            step(db)
            db.execute("INSERT INTO migrations (name, applied) VALUES (?, ?)", (step.__name__, now()))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
