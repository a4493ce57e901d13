"""The store in one process."""

import hashlib
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from dataclasses import FrozenInstanceError, replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

import progress
from progress import (
    Attempt,
    Hint,
    KataProgress,
    Snapshot,
    SolutionSeen,
    Store,
    StoreError,
    migrations,
    storefile,
    transfer,
)

DAY = "2025-10-03T08:00:00"


def at(second, fraction=""):
    return f"2025-10-03T08:00:{second:02}{fraction}Z"


def attempt(kata="day01", **changes):
    values = dict(
        id=uuid.uuid4().hex,
        kata=kata,
        started=at(0),
        duration=0.5,
        outcome="failed",
        tasks={"split": "passed", "merge": "failed"},
        passed=False,
        seed=4817,
        device="cpu",
        versions={"torch": "2.13.0"},
        provenance={"day00": "yours"},
    )
    return Attempt(**{**values, **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".kata" / "progress.db"


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened


def one_sentence(error):
    text = str(error.value)
    return text.endswith(".") and "\n" not in text and ". " not in text


# The file


def test_the_folder_and_the_file_belong_to_the_learner_alone(store, path):
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_may_read_is_tightened_but_only_ours(tmp_path):
    for name, mode in ((".kata", 0o700), ("other", 0o755)):
        folder = tmp_path / name
        folder.mkdir()
        folder.chmod(0o755)
        Store.open(folder / "progress.db").close()
        assert folder.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["a b", "50%", "%41", "why?mode=ro", "#1", "größe", "日", "\udcff", "a&b=c;d+e"])
def test_any_folder_name_will_do(tmp_path, name):
    file = tmp_path / name / "progress.db"
    try:
        file.parent.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such name")
    with Store.open(file) as store:
        store.add_attempt(attempt())
    assert [found.name for found in file.parent.iterdir()] == ["progress.db"]
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_closing_leaves_one_file(store, path):
    store.add_attempt(attempt())
    store.close()
    store.close()
    assert [file.name for file in path.parent.iterdir()] == ["progress.db"]


def test_the_log_is_written_ahead(store):
    assert store.journal_mode == "wal"


def test_where_the_log_is_refused_the_rollback_journal_does(path, monkeypatch):
    def without_shared_memory(file, mode="rw"):
        uri = f"{file.absolute().as_uri()}?mode={mode}&vfs=unix-dotfile"
        return sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)

    monkeypatch.setattr(storefile, "connect", without_shared_memory)
    one = attempt()
    with Store.open(path) as store:
        assert store.journal_mode == "delete"
        sha = store.record(one, "x = 1\n")
    with Store.open(path) as store:
        assert store.attempts() == [replace(one, snapshot=sha)]


def test_where_the_log_breaks_the_rollback_journal_does(path, monkeypatch):
    class Refusing(sqlite3.Connection):
        def execute(self, statement, *values):
            if statement == "PRAGMA journal_mode = WAL":
                super().execute(statement)
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(statement, *values)

    def connect(file, mode="rw"):
        uri = f"{file.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, isolation_level=None, factory=Refusing)

    monkeypatch.setattr(storefile, "connect", connect)
    with Store.open(path) as store:
        assert store.journal_mode == "delete"
        assert store.add_attempt(attempt())


def test_who_creates_second_keeps_what_the_first_one_wrote(path, monkeypatch):
    """Without any lock: the other process is quicker between the look and the link."""
    monkeypatch.setattr(storefile, "_wait_for_lock", lambda *_: None)
    build, one = storefile._build, attempt()

    def while_another_creates(temporary):
        monkeypatch.setattr(storefile, "_build", build)
        with Store.open(path) as other:
            other.add_attempt(one)
        build(temporary)

    monkeypatch.setattr(storefile, "_build", while_another_creates)
    with Store.open(path) as store:
        assert storefile._build is build
        assert store.attempts() == [one]
    assert [file.name for file in path.parent.iterdir()] == ["progress.db"]


def test_without_hard_links_the_store_is_created_too(path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(storefile.os, "link", link)
    with Store.open(path) as store:
        assert store.add_attempt(attempt())


def test_the_log_of_a_deleted_store_is_not_replayed_into_the_new_one(path):
    with Store.open(path) as store:
        store.record(attempt(), "x = 1\n")
        log = Path(f"{path}-wal").read_bytes()
    assert log
    path.unlink()
    Path(f"{path}-wal").write_bytes(log)
    with Store.open(path) as store:
        assert store.attempts() == []
        assert store.add_attempt(attempt())
    assert [kept.read_bytes() for kept in path.parent.glob("*.damaged-*-wal")] == [log]


def test_an_empty_file_is_an_empty_store(path):
    path.parent.mkdir()
    path.touch()
    with Store.open(path) as store:
        assert store.add_attempt(attempt())
        assert store.damaged_kept_at is None


def garbage(data):
    return b"this is not a database" * 400


def truncated(data):
    return data[: len(data) // 2]


def overwritten(data):
    return data[:4096] + b"\xaa" * (len(data) - 4096)


def header_broken(data):
    return b"\0" * 100 + data[100:]


@pytest.mark.parametrize("damage", [garbage, truncated, overwritten, header_broken])
def test_a_damaged_store_is_kept_aside_and_a_new_one_is_made(path, damage):
    with Store.open(path) as store:
        for number in range(50):
            store.record(attempt(), f"x = {number}\n")
    data = damage(path.read_bytes())
    path.write_bytes(data)
    with Store.open(path) as store:
        kept = store.damaged_kept_at
        assert kept.parent == path.parent and kept.name.startswith("progress.db.damaged-")
        datetime.strptime(kept.name, "progress.db.damaged-%Y%m%dT%H%M%SZ")
        assert kept.read_bytes() == data
        assert store.attempts() == []
        assert store.add_attempt(attempt())
    with Store.open(path) as store:
        assert store.damaged_kept_at is None
        assert len(store.attempts()) == 1


def test_the_log_of_a_damaged_store_is_kept_with_it(path):
    path.parent.mkdir()
    path.write_bytes(garbage(b""))
    Path(f"{path}-wal").write_bytes(b"log")
    with Store.open(path) as store:
        assert Path(f"{store.damaged_kept_at}-wal").read_bytes() == b"log"


def test_a_log_with_the_newest_work_is_kept_with_its_damaged_store(path):
    with Store.open(path) as store:
        store.record(attempt(), "x = 1\n" * 100)
        files = {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal")}
    files[""] = files[""][:4096] + b"\xaa" * (len(files[""]) - 4096)
    assert files["-wal"]
    for suffix, data in files.items():
        Path(f"{path}{suffix}").write_bytes(data)
    with Store.open(path) as store:
        kept = store.damaged_kept_at
        assert {suffix: Path(f"{kept}{suffix}").read_bytes() for suffix in files} == files
        assert store.attempts() == []


def test_a_transaction_that_a_kill_left_open_is_no_damage(path, monkeypatch):
    """With the rollback journal, the next writer must undo it first, which a reader may not."""
    monkeypatch.setattr(storefile, "_build", lambda file: storefile._build_with(file, "DELETE"))
    one = attempt()
    with Store.open(path) as store:
        store.add_attempt(one)
        store._db.execute("PRAGMA cache_size = 1")
        store._db.execute("BEGIN IMMEDIATE")
        for number in range(200):
            store._add("INSERT INTO sources VALUES (?, ?)", (str(number), bytes(4000)))
        torn = {suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-journal")}
        store._db.execute("ROLLBACK")
    for suffix, data in torn.items():
        Path(f"{path}{suffix}").write_bytes(data)
    with Store.open(path) as store:
        assert store.damaged_kept_at is None
        assert store.attempts() == [one]
        assert store._db.execute("SELECT count(*) FROM sources").fetchone() == (0,)


def test_two_damaged_stores_in_one_second_are_both_kept(path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2025, 10, 3, 8, tzinfo=timezone.utc)

    monkeypatch.setattr(storefile, "datetime", Clock)
    path.parent.mkdir()
    for word in (b"first", b"second"):
        path.write_bytes(word * 1000)
        with Store.open(path) as store:
            assert store.damaged_kept_at.read_bytes() == word * 1000
    assert len(list(path.parent.glob("*.damaged-20251003T080000Z*"))) == 2


def test_a_store_of_a_newer_version_is_refused_and_left_alone(path, monkeypatch):
    def m999_from_the_future(db):
        db.execute("CREATE TABLE future (x)")

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, m999_from_the_future])
        Store.open(path).close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer version of torch-katas") as error:
        Store.open(path)
    assert one_sentence(error) and str(path) in str(error.value)
    assert path.read_bytes() == before


def test_the_database_of_another_program_is_refused_and_left_alone(path):
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE cookies (name)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program") as error:
        Store.open(path)
    assert one_sentence(error)
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", range(1, len(migrations.MIGRATIONS)))
def test_an_old_schema_is_brought_up_to_date_with_all_that_is_in_it(path, monkeypatch, step):
    one = attempt()
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:step])
        with Store.open(path) as store:
            sha = store.record(one, "x = 1\n")
            assert len(migrations.applied(store._db)) == step
    with Store.open(path) as store:
        assert migrations.applied(store._db) == [one.__name__ for one in migrations.MIGRATIONS]
        assert store.attempts() == [replace(one, snapshot=sha)]
        assert store.snapshot(sha).source == "x = 1\n"


def test_a_migration_that_fails_changes_nothing(path, monkeypatch):
    def m003_fails(db):
        db.execute("CREATE TABLE half (x)")
        raise sqlite3.OperationalError("no such thing")

    one = attempt()
    with Store.open(path) as store:
        store.add_attempt(one)
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, m003_fails])
        with pytest.raises(StoreError, match="no such thing"):
            Store.open(path)
    with Store.open(path) as store:
        assert store.attempts() == [one]
        assert not store._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchall()


def test_a_path_that_cannot_be_a_store_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "progress.db", tmp_path / "folder"):
        with pytest.raises(StoreError) as error:
            Store.open(path)
        assert one_sentence(error) and str(path) in str(error.value)


def test_a_store_that_another_process_keeps_locked_is_one_sentence(path, monkeypatch):
    monkeypatch.setattr(storefile, "BUSY_SECONDS", 0.05)
    with Store.open(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked") as error:
            store.add_attempt(attempt())
        assert one_sentence(error)
        other.execute("ROLLBACK")
        assert store.add_attempt(attempt())


@pytest.mark.parametrize("there", [True, False])
def test_who_creates_or_moves_the_file_is_waited_for(path, monkeypatch, there):
    monkeypatch.setattr(storefile, "BUSY_SECONDS", 0.05)
    path.parent.mkdir()
    if there:
        Store.open(path).close()
    with storefile._folder_lock(path.parent):
        with pytest.raises(StoreError, match="locked") as error:
            Store.open(path)
        assert one_sentence(error)
    assert path.exists() == there
    Store.open(path).close()


def test_who_only_looks_at_the_file_is_not_waited_for(path):
    Store.open(path).close()
    with storefile._folder_lock(path.parent, shared=True), Store.open(path) as store:
        assert store.add_attempt(attempt())


def test_a_step_that_another_process_has_just_applied_is_left_alone(path, monkeypatch):
    Store.open(path).close()
    applied, looks = migrations.applied, []

    def stale_at_first(db):
        looks.append(applied(db))
        return [] if len(looks) == 1 else looks[-1]

    with closing(storefile.connect(path)) as db:
        monkeypatch.setattr(migrations, "applied", stale_at_first)
        migrations.migrate(db)
        assert len(looks) == 1 + len(migrations.MIGRATIONS)
        assert db.execute("SELECT count(*) FROM migrations").fetchone() == (len(migrations.MIGRATIONS),)


def test_a_writer_waits_five_seconds(store):
    assert store._db.execute("PRAGMA busy_timeout").fetchone() == (5000,)


def test_a_full_database_is_one_sentence_and_the_attempt_alone_may_still_fit(store):
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    one = attempt()
    source = "".join(hashlib.sha256(bytes([number])).hexdigest() for number in range(256))
    with pytest.raises(StoreError, match="disk is full") as error:
        store.record(one, source)
    assert one_sentence(error)
    assert store.counts() == dict.fromkeys(store.counts(), 0)
    lost = replace(one, snapshot=progress.source_sha(source))
    assert store.add_attempt(lost)
    assert store.attempts() == [lost]


def test_importing_the_package_is_cheap():
    code = (
        "import sys, progress; "
        "print(sorted({'torch', 'numpy', 'rich', 'click', 'pytest', 'tempfile'} & set(sys.modules)))"
    )
    root = str(Path(progress.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Attempts


def test_an_attempt_comes_back_as_it_was(store):
    one = attempt(seed=2**64 - 1, snapshot="ab" * 32, tasks={"z": "passed", "a": "open", "ä": "error"})
    assert store.add_attempt(one) is True
    assert store.attempts() == [one]
    assert list(store.attempts()[0].tasks) == ["z", "a", "ä"]


def test_the_same_attempt_twice_is_one_row(store):
    one = attempt()
    assert store.add_attempt(one) is True
    assert store.add_attempt(replace(one, outcome="passed")) is False
    assert store.attempts() == [one]
    sha = store.record(other := attempt(), "x = 1\n")
    assert store.record(other, "x = 1\n") == sha
    assert len(store.attempts()) == 2 and len(store.snapshots("day01")) == 1


def test_a_check_and_its_source_are_kept_together(store):
    one = attempt(started=at(7))
    sha = store.record(one, "x = 1\n")
    assert sha == hashlib.sha256(b"x = 1\n").hexdigest()
    assert store.attempts() == [replace(one, snapshot=sha)]
    assert store.snapshots("day01") == [Snapshot(sha, "day01", at(7), "check", "x = 1\n")]


def test_an_attempt_of_another_source_is_refused(store):
    with pytest.raises(ValueError, match="names the snapshot"):
        store.record(attempt(snapshot="0" * 64), "x = 1\n")
    assert store.counts() == dict.fromkeys(store.counts(), 0)


def test_attempts_come_newest_first_and_may_be_limited(store):
    # A whole second comes before its fractions, and the later one of two equal times was written later.
    times = [at(2), at(1, ".5"), at(1), at(1), at(3), at(1, ".25")]
    ids = [f"attempt{number}" for number in range(6)]
    for id, started in zip(ids, times, strict=True):
        store.add_attempt(attempt(id=id, started=started, kata="day02" if started == at(3) else "day01"))
    order = [ids[number] for number in (4, 0, 1, 5, 3, 2)]
    assert [one.id for one in store.attempts()] == order
    assert [one.id for one in store.attempts(limit=2)] == order[:2]
    assert [one.id for one in store.attempts("day01")] == order[1:]
    assert [one.id for one in store.attempts("day01", 1)] == [ids[0]]
    assert store.attempts("day03") == []


def test_a_day_is_passed_when_any_attempt_passed(store):
    store.add_attempt(attempt("day01", passed=True, started=at(1)))
    store.add_attempt(attempt("day01", started=at(2)))
    store.add_attempt(attempt("day02"))
    assert store.is_passed("day01") and not store.is_passed("day02") and not store.is_passed("day03")
    assert store.passed_katas() == {"day01"}


def test_the_last_passed_source_is_that_of_the_newest_pass(store):
    assert store.last_passed_source("day01") is None
    store.record(attempt(started=at(1)), "failed = 1\n")
    assert store.last_passed_source("day01") is None
    store.record(attempt(started=at(3), passed=True), "new = 1\n")
    store.record(attempt(started=at(2), passed=True), "old = 1\n")
    store.record(attempt(started=at(4)), "failed = 2\n")
    store.record(attempt("day02", started=at(5), passed=True), "other = 1\n")
    sha = hashlib.sha256(b"new = 1\n").hexdigest()
    assert store.last_passed_source("day01") == (sha, "new = 1\n")
    # The disk was full when this one was kept.
    store.add_attempt(attempt(started=at(6), passed=True, snapshot="0" * 64))
    assert store.last_passed_source("day01") == (sha, "new = 1\n")


# Snapshots


def test_the_same_source_is_stored_once_and_every_taking_is_kept(store):
    first = store.add_snapshot("day01", "x = 1\n", "fetch", taken=at(1))
    store.add_snapshot("day01", "x = 2\n", "check", taken=at(2))
    assert store.add_snapshot("day01", "x = 1\n", "reset", taken=at(3)) == first
    assert [(shot.source, shot.reason) for shot in store.snapshots("day01")] == [
        ("x = 1\n", "reset"),
        ("x = 2\n", "check"),
        ("x = 1\n", "fetch"),
    ]
    assert store._db.execute("SELECT count(*) FROM sources").fetchone() == (2,)
    assert store.snapshot(first) == Snapshot(first, "day01", at(3), "reset", "x = 1\n")


def test_the_time_of_a_snapshot_is_now(store):
    before = progress.now()
    store.add_snapshot("day01", "x = 1\n", "check")
    assert before <= store.snapshots("day01")[0].taken <= progress.now()


def test_a_source_is_found_by_the_beginning_of_its_sha(store):
    shas = [store.add_snapshot("day01", f"x = {number}\n", "check", taken=at(number)) for number in range(40)]
    store.add_snapshot("day01", "x = 0\n", "check", taken=at(50))
    store.add_snapshot("day02", "x = 7\n", "check", taken=at(51))
    assert [shot.sha for shot in store.find_snapshots("day01", shas[7][:12])] == [shas[7]]
    assert [shot.sha for shot in store.find_snapshots("day01", shas[7].upper())] == [shas[7]]
    assert [shot.sha for shot in store.find_snapshots("day01", "")] == [shas[0], *shas[:0:-1]]
    letter = shas[7][0]
    same = [sha for sha in [shas[0], *shas[:0:-1]] if sha[0] == letter]
    assert len(same) > 1
    assert [shot.sha for shot in store.find_snapshots("day01", letter)] == same
    assert [shot.sha for shot in store.find_snapshots("day02", shas[7][:12])] == [shas[7]]
    assert store.find_snapshots("day02", shas[8][:12]) == []
    assert store.find_snapshots("day01", "%") == store.find_snapshots("day01", "_") == []


def test_a_snapshot_that_is_not_there_is_one_sentence(store):
    with pytest.raises(StoreError, match="no snapshot") as error:
        store.snapshot("0" * 64)
    assert one_sentence(error)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "\r\n",
        "x = 1\r\ny = 2\nz = 3\r",
        "\ufeffx = 1\n",
        "\x00\x1a",
        "größe = '分' # \U0001f525\n",
        "e\u0301 \u00e9 \u2028\n",
        b"caf\xe9 = 1\n".decode("utf-8", "surrogateescape"),
    ],
)
def test_a_source_comes_back_to_the_byte(path, source):
    with Store.open(path) as store:
        sha = store.add_snapshot("day01", source, "check")
    with Store.open(path) as store:
        assert store.snapshot(sha).source == source
        if "\udce9" not in source:
            assert sha == hashlib.sha256(source.encode()).hexdigest()


def test_a_source_of_ten_megabytes_is_kept_compressed(store, path):
    source = "x = 'ä'\n" * 1_200_000
    assert len(source.encode()) > 10_000_000
    sha = store.record(attempt(passed=True), source)
    assert store.last_passed_source("day01") == (sha, source)
    store.close()
    assert path.stat().st_size < 1_000_000


def test_a_rotten_snapshot_is_never_given_out(store):
    sha = store.add_snapshot("day01", "x = 1\n", "check")
    other = store.add_snapshot("day01", "x = 2\n", "check")
    body = store._db.execute("SELECT body FROM sources WHERE sha = ?", (other,)).fetchone()[0]
    for rotten in (body, b"rotten"):
        store._db.execute("UPDATE sources SET body = ? WHERE sha = ?", (rotten, sha))
        with pytest.raises(StoreError, match=f"{sha[:12]} in .* is damaged") as error:
            store.snapshot(sha)
        assert one_sentence(error)
    assert store.snapshot(other).source == "x = 2\n"


# Hints, solutions, what was started


def test_the_highest_rung_counts(store):
    for task, rung in (("split", 1), ("split", 3), ("split", 2), ("merge", 1), ("split", 3)):
        store.take_hint("day01", task, rung)
    store.take_hint("day02", "split", 4)
    assert store.hints_taken("day01") == {"split": 3, "merge": 1}
    assert store.hints_taken("day03") == {}


def test_a_hint_taken_again_keeps_its_first_time(store):
    for second in (2, 1, 3):
        store.take_hint("day01", "split", 1, taken=at(second))
    assert store.hints() == [Hint("day01", "split", 1, at(1))]


def test_solutions_seen_tell_the_first_look_and_whether_it_was_giving_up(store):
    assert store.solutions_seen() == {}
    store.saw_solution("day01", False, seen=at(1))
    store.saw_solution("day02", True, seen=at(2))
    store.saw_solution("day02", False, seen=at(3))
    assert store.solutions_seen() == {
        "day01": SolutionSeen("day01", at(1), False),
        "day02": SolutionSeen("day02", at(2), True),
    }
    assert len(store.solution_history()) == 3


def test_the_current_kata_is_the_one_last_fetched_or_checked(store):
    assert store.current() is None
    store.mark_started("day01", fetched=at(1))
    assert store.current() == "day01"
    store.mark_started("day02", fetched=at(2))
    assert store.current() == "day02"
    store.add_attempt(attempt("day01", started=at(3)))
    assert store.current() == "day01"
    store.mark_started("day02", fetched=at(3, ".5"))
    assert store.current() == "day02"
    store.add_attempt(attempt("day01", started=at(2)))
    assert store.current() == "day02"


def test_a_kata_was_started_when_it_was_first_fetched(store):
    assert store.started("day01") is None
    for second in (4, 2, 3):
        store.mark_started("day01", fetched=at(second))
    assert store.started("day01") == at(2)


def test_the_first_day_is_that_of_the_first_trace(store):
    assert store.first_day() is None
    store.add_attempt(attempt(started="2025-11-02T23:59:59Z"))
    assert store.first_day() == "2025-11-02"
    store.mark_started("day01", fetched="2025-10-31T00:00:00.5Z")
    assert store.first_day() == "2025-10-31"


# Sums


def test_progress_tells_the_newest_state_and_what_ever_passed(store):
    store.mark_started("day03", fetched=at(9))
    store.add_attempt(attempt(started=at(1), tasks={"a": "passed", "b": "failed"}, duration=1))
    store.add_attempt(attempt(started=at(2), tasks={"a": "passed", "b": "passed"}, passed=True, duration=2))
    store.add_attempt(attempt(started=at(3), tasks={"a": "passed", "b": "passed"}, passed=True, duration=4))
    store.add_attempt(attempt(started=at(4), tasks={"a": "failed"}, duration=8))
    store.add_attempt(attempt(started=at(5), tasks={"a": "not run", "c": "not run"}, duration=16))
    store.add_attempt(attempt("day02", started=at(6), tasks={}, duration=0.5))
    assert store.progress() == {
        "day01": KataProgress(
            kata="day01",
            passed_at=at(2),
            attempts=5,
            tasks={"a": "failed", "b": "passed", "c": "not run"},
            ever_passed=frozenset({"a", "b"}),
            seconds=31.0,
            last=at(5),
        ),
        "day02": KataProgress("day02", None, 1, {}, frozenset(), 0.5, at(6)),
        "day03": KataProgress("day03", None, 0, {}, frozenset(), 0, None),
    }
    assert store.total_seconds() == 31.5


def test_the_number_of_queries_does_not_grow_with_the_progress(store):
    def queries(question):
        seen = []
        store._db.set_trace_callback(seen.append)
        question()
        store._db.set_trace_callback(None)
        return len(seen)

    for number in range(30):
        store.add_attempt(attempt(f"day{number:02}", passed=True))
    assert len(store.progress()) == len(store.passed_katas()) == 30
    assert queries(store.progress) == 2
    assert queries(store.passed_katas) == 1


# Transactions


def test_every_write_takes_the_lock_before_it_looks(store):
    """A transaction that reads before it writes may be refused at once, without any waiting."""
    writes = [
        lambda: store.add_attempt(attempt()),
        lambda: store.record(attempt(), "x = 1\n"),
        lambda: store.add_snapshot("day01", "x = 2\n", "check"),
        lambda: store.take_hint("day01", "split", 1),
        lambda: store.saw_solution("day01", True),
        lambda: store.mark_started("day01"),
        lambda: transfer.import_json(store, transfer.export_json(store)),
    ]
    for write in writes:
        seen = []
        store._db.set_trace_callback(seen.append)
        write()
        store._db.set_trace_callback(None)
        first = next(number for number, text in enumerate(seen) if text.startswith(("BEGIN", "INSERT")))
        assert seen[first] == "BEGIN IMMEDIATE" and seen[-1] == "COMMIT"
        assert sum(text.startswith(("BEGIN", "COMMIT")) for text in seen) == 2


def test_a_transaction_that_fails_keeps_nothing(store):
    with pytest.raises(ZeroDivisionError):
        with store.transaction():
            store.record(attempt(), "x = 1\n")
            store.take_hint("day01", "split", 1)
            assert store.counts()["attempts"] == 1
            raise ZeroDivisionError
    assert store.counts() == dict.fromkeys(store.counts(), 0)
    assert store.add_attempt(attempt())


def test_an_error_in_the_middle_of_record_keeps_neither_half(store, monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "add_snapshot", fails)
    with pytest.raises(KeyboardInterrupt):
        store.record(attempt(), "x = 1\n")
    assert store.counts() == dict.fromkeys(store.counts(), 0)


# Records


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("id", ""),
        ("id", 3),
        ("kata", None),
        ("kata", "\ud800"),
        ("started", "2025-10-03 08:00:00Z"),
        ("started", "2025-10-03T08:00:00+00:00"),
        ("started", "2025-13-03T08:00:00Z"),
        ("started", "2025-10-03T08:00:00Z\n"),
        ("duration", -1),
        ("duration", float("nan")),
        ("duration", float("inf")),
        ("duration", "1"),
        ("duration", True),
        ("outcome", ""),
        ("tasks", {"a": 1}),
        ("tasks", [("a", "passed")]),
        ("passed", 1),
        ("seed", 1.0),
        ("seed", True),
        ("seed", 2**64),
        ("device", None),
        ("versions", None),
        ("snapshot", "abc"),
        ("provenance", {1: "yours"}),
    ],
)
def test_an_attempt_that_is_wrong_cannot_be_made(field, wrong):
    attempt()
    with pytest.raises(ValueError, match=rf"Attempt\.{field} must be"):
        attempt(**{field: wrong})


def test_hints_solutions_and_snapshots_are_checked_before_they_are_kept(store):
    for call in (
        lambda: store.take_hint("day01", "split", 0),
        lambda: store.take_hint("day01", "", 1),
        lambda: store.saw_solution("day01", "yes"),
        lambda: store.mark_started(""),
        lambda: store.add_snapshot("day01", "x", "because"),
        lambda: store.add_snapshot("day01", b"x", "check"),
    ):
        with pytest.raises((ValueError, AttributeError)):
            call()
    assert store.counts() == dict.fromkeys(store.counts(), 0)


def test_records_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        attempt().passed = True
