"""The store of what a learner did: one SQLite file per workspace, safe with several processes and kills."""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from progress import migrations, storefile
from progress.errors import StoreError, explain, read_only
from progress.records import (
    Attempt,
    Fetch,
    Hint,
    KataProgress,
    Snapshot,
    SolutionSeen,
    decode,
    did_run,
    encode,
    now,
    source_sha,
)

_ATTEMPT = "id, kata, started, duration, outcome, tasks, passed, seed, device, versions, snapshot, provenance"
_TABLES = ("attempts", "snapshots", "hints", "solutions", "fetches")
_ALL = -1  # what SQLite calls no limit


class Store:
    """What a learner did, kept in one file.

    Every method that writes is one transaction, or joins the one of `transaction()`. Times may be given, and
    are taken from the clock otherwise. `damaged_kept_at` says where a damaged file was moved when this store
    was opened, and `readonly` that nothing can be written. A store belongs to the thread and the process
    that opened it.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, *, readonly: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self.damaged_kept_at: Path | None = None
        self._db = db
        self._resources = ExitStack()
        self._writing = False

    # Opening and closing

    @classmethod
    def open(cls, path: Path, readonly_ok: bool = False) -> "Store":
        """Open the store at `path`, which is created if it is missing.

        A damaged file is moved aside, never deleted, and a new one is made. With `readonly_ok`, an existing
        file that cannot be written is opened for reading.
        """
        path = Path(path)
        try:
            if path.exists() and not storefile.is_writable(path):
                if readonly_ok:
                    return cls._open_readonly(path)
                raise read_only(path)
            return cls._open(path)
        except (sqlite3.Error, OSError) as error:
            raise explain(path, error) from error

    @classmethod
    def _open(cls, path):
        storefile.make_folder(path.parent)
        db, kept = storefile.open_sound(path)
        try:
            _refuse_strangers(path, db)
            migrations.migrate(db)
        except BaseException:
            db.close()
            raise
        store = cls(path, db)
        store.damaged_kept_at = kept
        return store

    @classmethod
    def _open_readonly(cls, path):
        resources = ExitStack()
        try:
            db = storefile.connect(path, "ro")
            resources.callback(db.close)
            try:
                damage = storefile.find_damage(db)
            except sqlite3.OperationalError:
                # The log can neither be read nor made in a folder that cannot be written.
                resources.close()
                db = storefile.connect(storefile.copy_for_reading(path, _temporary_folder(resources)))
                resources.callback(db.close)
                damage = storefile.find_damage(db)
            if damage:
                raise StoreError(f"{path} is damaged ({damage}) and cannot be moved aside: make its folder writable.")
            _refuse_strangers(path, db)
            if len(migrations.applied(db)) < len(migrations.MIGRATIONS):
                raise StoreError(
                    f"{path} was written by an older version of torch-katas and cannot be updated: "
                    "make the file and its folder writable."
                )
        except BaseException:
            resources.close()
            raise
        store = cls(path, db, readonly=True)
        store._resources = resources
        return store

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._db.close()
        self._resources.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def journal_mode(self) -> str:
        """How SQLite keeps transactions here: wal, or delete where the file system has no shared memory."""
        return self._ask("PRAGMA journal_mode")[0][0]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all writes in this block one: all of them are kept or, after any exception, none."""
        if self.readonly:
            raise read_only(self.path)
        if self._writing:
            yield
            return
        try:
            self._writing = True
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            finally:
                self._writing = False
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    # Attempts

    def record(self, attempt: Attempt, source: str) -> str:
        """Keep a check and the source that it ran, both or neither, and return the source's sha."""
        sha = source_sha(source)
        if attempt.snapshot not in (None, sha):
            raise ValueError(f"the attempt names the snapshot {attempt.snapshot}, its source is {sha}")
        with self.transaction():
            if self.add_attempt(replace(attempt, snapshot=sha)):
                self.add_snapshot(attempt.kata, source, "check", taken=attempt.started)
        return sha

    def add_attempt(self, attempt: Attempt) -> bool:
        """Keep a check, whether or not its snapshot is in the store. False if this id is kept already."""
        values = (
            attempt.id,
            attempt.kata,
            attempt.started,
            attempt.duration,
            attempt.outcome,
            json.dumps(attempt.tasks),
            attempt.passed,
            str(attempt.seed),
            attempt.device,
            json.dumps(attempt.versions),
            attempt.snapshot,
            json.dumps(attempt.provenance),
        )
        marks = ", ".join("?" * len(values))
        with self.transaction():
            return self._add(f"INSERT INTO attempts ({_ATTEMPT}) VALUES ({marks}) ON CONFLICT DO NOTHING", values)

    def attempts(self, kata: str | None = None, limit: int | None = None) -> list[Attempt]:
        """All checks, or those of one kata, newest first."""
        rows = self._ask(
            f"SELECT {_ATTEMPT} FROM attempts WHERE ? IS NULL OR kata = ? "
            "ORDER BY rtrim(started, 'Z') DESC, seq DESC LIMIT ?",
            (kata, kata, _ALL if limit is None else limit),
        )
        return [_attempt(row) for row in rows]

    def is_passed(self, kata: str) -> bool:
        """True where any check of this kata passed."""
        return bool(self._ask("SELECT 1 FROM attempts WHERE kata = ? AND passed LIMIT 1", (kata,)))

    def passed_katas(self) -> set[str]:
        """All katas of which any check passed."""
        return {kata for (kata,) in self._ask("SELECT DISTINCT kata FROM attempts WHERE passed")}

    def last_passed_source(self, kata: str) -> tuple[str, str] | None:
        """The sha and the source of the newest check that passed and whose source is in the store."""
        rows = self._ask(
            "SELECT sha, body FROM attempts JOIN sources ON sha = snapshot WHERE kata = ? AND passed "
            "ORDER BY rtrim(started, 'Z') DESC, seq DESC LIMIT 1",
            (kata,),
        )
        return (rows[0][0], self._unpack(*rows[0])) if rows else None

    # Snapshots

    def add_snapshot(self, kata: str, source: str, reason: str, taken: str | None = None) -> str:
        """Keep the source, once, and that it was taken now, for this reason; return its sha."""
        shot = Snapshot(source_sha(source), kata, taken or now(), reason, source)
        with self.transaction():
            if not self._ask("SELECT 1 FROM sources WHERE sha = ?", (shot.sha,)):
                self._add("INSERT INTO sources VALUES (?, ?)", (shot.sha, zlib.compress(encode(source))))
            self._add(
                "INSERT INTO snapshots (sha, kata, taken, reason) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (shot.sha, shot.kata, shot.taken, shot.reason),
            )
        return shot.sha

    def snapshot(self, sha: str) -> Snapshot:
        """The source with this sha, as it was last taken."""
        found = self._snapshots("sha = ?", (sha,), limit=1)
        if not found:
            raise StoreError(f"There is no snapshot {sha} in {self.path}: kata history lists those that there are.")
        return found[0]

    def find_snapshots(self, kata: str, prefix: str) -> list[Snapshot]:
        """The different sources of a kata whose sha begins so, each as it was last taken, newest first."""
        start = prefix.lower()
        found = self._snapshots("kata = ? AND substr(sha, 1, ?) = ?", (kata, len(start), start))
        newest: dict[str, Snapshot] = {}
        for shot in found:
            newest.setdefault(shot.sha, shot)
        return list(newest.values())

    def snapshots(self, kata: str | None = None, limit: int | None = None) -> list[Snapshot]:
        """Every time that a source of this kata (or of any) was taken, newest first."""
        return self._snapshots("? IS NULL OR kata = ?", (kata, kata), _ALL if limit is None else limit)

    def _snapshots(self, condition, values, limit=_ALL):
        rows = self._ask(
            f"SELECT sha, kata, taken, reason FROM snapshots WHERE {condition} "
            f"ORDER BY rtrim(taken, 'Z') DESC, seq DESC LIMIT {int(limit)}",
            values,
        )
        sources = {sha: self._source(sha) for sha in {row[0] for row in rows}}
        return [Snapshot(*row, sources[row[0]]) for row in rows]

    def _source(self, sha):
        rows = self._ask("SELECT body FROM sources WHERE sha = ?", (sha,))
        return self._unpack(sha, rows[0][0] if rows else b"")

    def _unpack(self, sha, body):
        try:
            source = decode(zlib.decompress(body))
        except (zlib.error, UnicodeDecodeError):
            source = None
        if source is None or source_sha(source) != sha:
            raise StoreError(f"The snapshot {sha[:12]} in {self.path} is damaged: choose another one.")
        return source

    # Hints and solutions

    def take_hint(self, kata: str, task: str, rung: int, taken: str | None = None) -> None:
        """Keep that this rung was shown; the earliest time stays."""
        hint = Hint(kata, task, rung, taken or now())
        with self.transaction():
            self._add(
                "INSERT INTO hints (kata, task, rung, taken) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
                "SET taken = excluded.taken WHERE rtrim(excluded.taken, 'Z') < rtrim(hints.taken, 'Z')",
                (hint.kata, hint.task, hint.rung, hint.taken),
            )

    def hints(self, kata: str | None = None) -> list[Hint]:
        """All hints that were taken, or those of one kata, oldest first."""
        rows = self._ask(
            "SELECT kata, task, rung, taken FROM hints WHERE ? IS NULL OR kata = ? "
            "ORDER BY rtrim(taken, 'Z'), kata, task, rung",
            (kata, kata),
        )
        return [Hint(*row) for row in rows]

    def hints_taken(self, kata: str) -> dict[str, int]:
        """The highest rung that was taken, per task."""
        return dict(self._ask("SELECT task, max(rung) FROM hints WHERE kata = ? GROUP BY task", (kata,)))

    def saw_solution(self, kata: str, gave_up: bool, seen: str | None = None) -> None:
        """Keep that the solution was looked at."""
        fact = SolutionSeen(kata, seen or now(), gave_up)
        with self.transaction():
            self._add(
                "INSERT INTO solutions VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (fact.kata, fact.seen, fact.gave_up),
            )

    def solution_history(self) -> list[SolutionSeen]:
        """Every time that a solution was looked at, oldest first."""
        rows = self._ask("SELECT kata, seen, gave_up FROM solutions ORDER BY rtrim(seen, 'Z'), kata, gave_up")
        return [SolutionSeen(kata, seen, bool(gave_up)) for kata, seen, gave_up in rows]

    def solutions_seen(self) -> dict[str, SolutionSeen]:
        """When each solution was first looked at, and whether any of the looks was giving up."""
        seen: dict[str, SolutionSeen] = {}
        for fact in self.solution_history():
            first = seen.setdefault(fact.kata, fact)
            seen[fact.kata] = replace(first, gave_up=first.gave_up or fact.gave_up)
        return seen

    # Which kata, since when

    def mark_started(self, kata: str, fetched: str | None = None) -> None:
        """Keep that the kata was fetched."""
        fact = Fetch(kata, fetched or now())
        with self.transaction():
            self._add("INSERT INTO fetches VALUES (?, ?) ON CONFLICT DO NOTHING", (fact.kata, fact.fetched))

    def fetches(self) -> list[Fetch]:
        """Every time that a kata was fetched, oldest first."""
        rows = self._ask("SELECT kata, fetched FROM fetches ORDER BY rtrim(fetched, 'Z'), rowid")
        return [Fetch(*row) for row in rows]

    def started(self, kata: str) -> str | None:
        """When the kata was first fetched."""
        rows = self._ask("SELECT fetched FROM fetches WHERE kata = ? ORDER BY rtrim(fetched, 'Z') LIMIT 1", (kata,))
        return rows[0][0] if rows else None

    def current(self) -> str | None:
        """The kata that was last fetched or checked."""
        rows = self._ask(
            "SELECT kata FROM (SELECT kata, rtrim(started, 'Z') AS at, 1 AS tie, seq FROM attempts "
            "UNION ALL SELECT kata, rtrim(fetched, 'Z'), 0, rowid FROM fetches) "
            "ORDER BY at DESC, tie DESC, seq DESC LIMIT 1"
        )
        return rows[0][0] if rows else None

    def first_day(self) -> str | None:
        """The date (UTC, YYYY-MM-DD) of the first fetch or check."""
        rows = self._ask(
            "SELECT min(at) FROM (SELECT started AS at FROM attempts UNION ALL SELECT fetched FROM fetches)"
        )
        return rows[0][0][:10] if rows[0][0] else None

    # Sums

    def total_seconds(self) -> float:
        """The duration of all checks."""
        return self._ask("SELECT total(duration) FROM attempts")[0][0]

    def progress(self) -> dict[str, KataProgress]:
        """Where the learner stands with every kata that was fetched or checked, in two queries."""
        rows = self._ask(
            "SELECT kata, started, duration, passed, tasks FROM attempts ORDER BY rtrim(started, 'Z') DESC, seq DESC"
        )
        of_kata: dict[str, list[tuple]] = {}
        for kata, *rest in rows:
            of_kata.setdefault(kata, []).append(rest)
        for (kata,) in self._ask("SELECT DISTINCT kata FROM fetches"):
            of_kata.setdefault(kata, [])
        return {kata: _progress(kata, newest_first) for kata, newest_first in sorted(of_kata.items())}

    def counts(self) -> dict[str, int]:
        """How many attempts, snapshots taken, hints, solutions seen and fetches are kept."""
        return {table: self._ask(f"SELECT count(*) FROM {table}")[0][0] for table in _TABLES}

    def _add(self, statement, values):
        return self._db.execute(statement, values).rowcount > 0

    def _ask(self, question, values=()):
        try:
            return self._db.execute(question, values).fetchall()
        except sqlite3.Error as error:
            raise explain(self.path, error) from error


def _attempt(row):
    id, kata, started, duration, outcome, tasks, passed, seed, device, versions, snapshot, provenance = row
    return Attempt(
        id=id,
        kata=kata,
        started=started,
        duration=duration,
        outcome=outcome,
        tasks=json.loads(tasks),
        passed=bool(passed),
        seed=int(seed),
        device=device,
        versions=json.loads(versions),
        snapshot=snapshot,
        provenance=json.loads(provenance),
    )


def _progress(kata, newest_first):
    states: dict[str, str] = {}
    ever_passed = set()
    for _, _, _, tasks in newest_first:
        for task, state in json.loads(tasks).items():
            # "not run: no GPU here" must not hide what an earlier check found.
            if task not in states or (did_run(state) and not did_run(states[task])):
                states[task] = state
            if state == "passed":
                ever_passed.add(task)
    passes = [started for started, _, passed, _ in newest_first if passed]
    return KataProgress(
        kata=kata,
        passed_at=passes[-1] if passes else None,
        attempts=len(newest_first),
        tasks=states,
        ever_passed=frozenset(ever_passed),
        seconds=sum(duration for _, duration, _, _ in newest_first),
        last=newest_first[0][0] if newest_first else None,
    )


def _refuse_strangers(path, db):
    if migrations.is_foreign(db):
        raise StoreError(f"{path} is the database of another program: move it away and try again.")
    if migrations.unknown(db):
        raise StoreError(
            f"{path} was written by a newer version of torch-katas: "
            "update the program (pip install --upgrade torch-katas)."
        )


def _temporary_folder(resources):
    import tempfile  # only for a store that cannot be written; the import is not free

    return Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="kata-progress-")))
