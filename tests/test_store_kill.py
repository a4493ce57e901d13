"""The store with several processes, and with processes that die."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

import progress
from progress import Store, migrations, storefile

HELPER = Path(__file__).with_name("store_processes.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(progress.__file__).parents[1])}


@pytest.fixture
def start():
    """Start the helper; whatever still runs when the test is over is ended."""
    with ExitStack() as processes:

        def begin(*arguments):
            command = [sys.executable, str(HELPER), *map(str, arguments)]
            pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
            process = processes.enter_context(subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes))
            processes.callback(process.kill)
            return process

        yield begin


@pytest.fixture
def quick_folder(tmp_path):
    """A folder in memory where there is one: a kill, unlike a power cut, spares what was not yet synced."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="kata-store-", dir=memory) as folder:
        yield Path(folder)


def finish(process):
    out, err = process.communicate(timeout=120)
    return out, err, process.returncode


def assert_sound(path):
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert migrations.applied(db) == [step.__name__ for step in migrations.MIGRATIONS]


def test_two_writers_lose_nothing_and_are_never_locked_out(tmp_path, start):
    path = tmp_path / ".kata" / "progress.db"
    writers = [start("write", path, 150) for _ in range(2)]
    ids = set()
    for writer in writers:
        out, err, code = finish(writer)
        assert (code, err) == (0, "")
        ids.update(out.split())
    assert len(ids) == 300
    with Store.open(path) as store:
        assert {attempt.id for attempt in store.attempts()} == ids
        assert len({shot.sha for shot in store.snapshots()}) == 300
        assert store.damaged_kept_at is None


def test_many_processes_that_create_at_once_share_one_store(tmp_path, start):
    for number in range(4):
        path = tmp_path / str(number) / ".kata" / "progress.db"
        writers = [start("write", path, 3) for _ in range(5)]
        ids = set()
        for writer in writers:
            out, err, code = finish(writer)
            assert (code, err) == (0, "")
            ids.update(out.split())
        assert len(ids) == 15
        with Store.open(path) as store:
            assert {attempt.id for attempt in store.attempts()} == ids
        assert [file.name for file in path.parent.iterdir()] == ["progress.db"]


@pytest.mark.parametrize("kind", ["garbage", "broken pages and a log"])
def test_many_processes_that_find_a_damaged_store_keep_it_once(tmp_path, kind, start):
    path = tmp_path / "progress.db"
    log = Path(f"{path}-wal")
    data = b"no database at all" * 100
    if kind != "garbage":
        with Store.open(path) as store:
            store.add_snapshot("day01", "x = 1\n", "check")
            saved = log.read_bytes()
            data = path.read_bytes()[:4096] + b"\xaa" * 40960
        log.write_bytes(saved)
    path.write_bytes(data)
    writers = [start("write", path, 5) for _ in range(5)]
    ids = set()
    for writer in writers:
        out, err, code = finish(writer)
        assert (code, err) == (0, "")
        ids.update(out.split())
    assert len(ids) == 25
    with Store.open(path) as store:
        assert {attempt.id for attempt in store.attempts()} == ids
    kept = [file for file in tmp_path.glob("*.damaged-*") if file.name[-4:] not in ("-wal", "-shm")]
    assert [file.read_bytes() for file in kept] == [data]
    if kind != "garbage":
        assert Path(f"{kept[0]}-wal").read_bytes() == saved


def test_what_was_acknowledged_survives_two_hundred_kills(quick_folder, start):
    path = quick_folder / "progress.db"
    survivor = start("write_on", path)  # shares the file with those that die, for as long as they do
    out, err, code = finish(start("kill", path, 200))
    assert (code, err) == (0, "")
    assert survivor.poll() is None
    survived, err, code = finish(survivor)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["signals"] == [signal.SIGKILL] * 200
    acknowledged = {Path(name): set(ids) for name, ids in told["acknowledged"].items()}
    acknowledged[path] |= set(survived.split())
    assert len(acknowledged) == 41
    assert len(acknowledged[path]) >= 160 + len(survived.split()) > 160 + 20
    assert any(not ids for ids in acknowledged.values())  # some were killed before their first word
    for where, ids in acknowledged.items():
        with Store.open(where) as store:
            assert store.damaged_kept_at is None
            there = store.attempts()
            assert ids <= {attempt.id for attempt in there}
            # Both halves of a transaction: no attempt without its source, no source without its attempt.
            assert {attempt.snapshot for attempt in there} == {shot.sha for shot in store.snapshots()}
            assert len(there) == len({attempt.id for attempt in there})
        assert_sound(where)


def test_a_kill_between_or_inside_migrations_is_harmless(tmp_path, monkeypatch, start):
    path = tmp_path / "progress.db"
    steps = list(migrations.MIGRATIONS)
    monkeypatch.setattr(migrations, "MIGRATIONS", steps[:1])
    Store.open(path).close()
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)
    _, _, code = finish(start("die_migrating", path, "m002_indexes"))
    assert code == -signal.SIGKILL
    with closing(sqlite3.connect(path)) as db:
        assert migrations.applied(db) == ["m001_initial"]
        indexes = "SELECT count(*) FROM sqlite_master WHERE type = 'index' AND name = 'attempts_of_kata'"
        assert db.execute(indexes).fetchone() == (0,)
    Store.open(path).close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute(indexes).fetchone() == (1,)
    assert_sound(path)


@pytest.mark.parametrize("step", ["m001_initial", "m002_indexes"])
def test_a_kill_while_creating_leaves_no_half_store(tmp_path, step, start):
    path = tmp_path / "progress.db"
    _, _, code = finish(start("die_migrating", path, step))
    assert code == -signal.SIGKILL
    assert not path.exists()
    left = list(tmp_path.glob(".progress.db.*.tmp"))
    assert len(left) == 1
    for file in tmp_path.iterdir():
        os.utime(file, (time.time() - 2 * storefile._STALE_SECONDS,) * 2)
    Store.open(path).close()
    assert_sound(path)
    assert [file.name for file in tmp_path.iterdir()] == ["progress.db"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, start):
    path = tmp_path / "progress.db"
    out, err, code = finish(start("full", path, 300_000))
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert "full" in told["said"] and str(path) in told["said"] and "\n" not in told["said"]
    assert told["there"] == [told["kept"]]
    with Store.open(path) as store:
        assert [attempt.id for attempt in store.attempts()] == [told["kept"]]
        assert len(store.snapshots()) == 1
    assert_sound(path)


def test_a_store_that_cannot_be_created_on_a_full_disk_leaves_nothing(tmp_path, start):
    path = tmp_path / "progress.db"
    out, err, code = finish(start("create_full", path, 2000))
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["answer"] is None and "full" in told["said"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def read_only_store():
    """A store with one attempt in a folder that a user without rights can reach but not write."""
    folder = Path(tempfile.mkdtemp(prefix="kata-store-"))
    path = folder / "progress.db"
    try:
        with Store.open(path) as store:
            store.add_snapshot("day01", "x = 1\n", "check")
        folder.chmod(0o555)
        path.chmod(0o444)
        yield path
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_read_only_store_is_refused_in_one_sentence(read_only_store, start):
    out, err, code = finish(start("read_only", read_only_store, "no"))
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["answer"] is None
    assert "cannot be written" in told["said"] and str(read_only_store) in told["said"]


def test_a_read_only_store_can_be_read_on_request(read_only_store, start):
    out, err, code = finish(start("read_only", read_only_store, "yes"))
    assert (code, err) == (0, "")
    answer = json.loads(out)["answer"]
    assert answer["readonly"] is True
    assert answer["sources"] == ["x = 1\n"]
    assert "cannot be written" in answer["write"]


def test_a_read_only_store_is_read_with_its_log(tmp_path, read_only_store, start):
    """The newest transactions may be in the log only, when the last writer was killed."""
    folder = read_only_store.parent
    folder.chmod(0o700)
    read_only_store.chmod(0o644)
    with Store.open(read_only_store) as store:
        store.add_snapshot("day01", "x = 2\n", "check")
        copies = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith("-shm")}
    assert set(copies) == {"progress.db", "progress.db-wal"} and b"" not in copies.values()
    for name, data in copies.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o444)
    folder.chmod(0o555)
    out, err, code = finish(start("read_only", read_only_store, "yes"))
    assert (code, err) == (0, "")
    assert json.loads(out)["answer"]["sources"] == ["x = 2\n", "x = 1\n"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == copies


def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(read_only_store, start):
    missing = read_only_store.parent / ".kata" / "progress.db"
    for where in (missing, read_only_store.with_name("other.db")):
        for readonly_ok in ("yes", "no"):
            out, err, code = finish(start("read_only", where, readonly_ok))
            assert (code, err) == (0, "")
            told = json.loads(out)
            assert told["answer"] is None and "cannot be written" in told["said"]
