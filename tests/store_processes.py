"""What the tests of the store let other processes do: python store_processes.py VERB PATH [ARGUMENT]."""

import fcntl  # noqa: F401  what is imported on demand must be here before the rights are dropped
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import urllib.parse  # noqa: F401
import uuid
from pathlib import Path

from progress import Attempt, Store, StoreError, migrations, now


def attempt(kata="day01", **changes):
    values = dict(
        id=uuid.uuid4().hex,
        kata=kata,
        started=now(),
        duration=0.25,
        outcome="failed",
        tasks={"split": "passed", "merge": "failed"},
        passed=False,
        seed=7,
        device="cpu",
    )
    return Attempt(**{**values, **changes})


def write(path, count):
    """Open, record, close, over and over, like checks in two terminals."""
    for _ in range(int(count)):
        print(_write_one(path), flush=True)


def write_on(path):
    """The same until standard input ends; what was written is told then."""
    ids = []
    while not select.select([sys.stdin], [], [], 0)[0]:
        ids.append(_write_one(path))
    print(*ids)


def _write_one(path):
    one = attempt()
    with Store.open(path) as store:
        store.record(one, f"x = {one.id!r}\n" * 20)
    return one.id


def kill(path, rounds):
    """Kill a writer at random moments; print what it acknowledged, per store, and how it ended."""
    random.seed(4)
    acknowledged = {}
    signals = []
    for number in range(int(rounds)):
        # Every fifth store is young: the kill comes while it is created.
        young = number % 5 == 0
        where = path.with_name(f"young-{number}.db") if young else path
        ids, ended_by = _one_kill(where, random.random() * (0.012 if young else 0.04), wait=not young)
        acknowledged.setdefault(str(where), []).extend(ids)
        signals.append(ended_by)
    print(json.dumps({"acknowledged": acknowledged, "signals": signals}))


def _one_kill(path, seconds, wait):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            while True:
                one = attempt()
                with Store.open(path) as store:
                    store.record(one, f"x = {one.id!r}\n" * 200)
                os.write(writer, one.id.encode() + b"\n")
        finally:
            os._exit(99)
    os.close(writer)
    if wait:
        select.select([reader], [], [], 10)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        ids = [line.decode() for line in pipe.read().split(b"\n") if len(line) == 32]
    return ids, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def die_migrating(path, step):
    """Die inside the given step, after its statements and before its commit."""
    original = getattr(migrations, step)

    def deadly(db):
        original(db)
        os.kill(os.getpid(), signal.SIGKILL)

    deadly.__name__ = step
    migrations.MIGRATIONS[:] = [deadly if one is original else one for one in migrations.MIGRATIONS]
    Store.open(path)


def full(path, limit):
    """Record until no file may grow any more, then say what happened."""
    with Store.open(path) as store:
        kept = attempt()
        store.record(kept, "small = 1\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        try:
            store.record(attempt(), os.urandom(4 * int(limit)).hex())
        except StoreError as error:
            said = str(error)
        else:
            said = None
        print(json.dumps({"said": said, "kept": kept.id, "there": [one.id for one in store.attempts()]}))


def create_full(path, limit):
    """Create a store where hardly anything may be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    _say(lambda: Store.open(path).close())


def read_only(path, readonly_ok):
    """Open as a user who may not write here, and read, and try to write."""
    tempfile.gettempdir()
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    def look():
        with Store.open(path, readonly_ok=readonly_ok == "yes") as store:
            answer = {"readonly": store.readonly, "ids": [one.id for one in store.attempts()]}
            answer["sources"] = [shot.source for shot in store.snapshots("day01")]
            try:
                store.add_attempt(attempt())
            except StoreError as error:
                answer["write"] = str(error)
            return answer

    _say(look)


def _say(action):
    try:
        print(json.dumps({"answer": action(), "said": None}))
    except StoreError as error:
        print(json.dumps({"answer": None, "said": str(error)}))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
