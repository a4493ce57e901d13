"""Runs the spec against many mutants of the reference: one process collects once and forks for each mutant.

A mutant is killed by the first test that fails, by its time limit, or by ending its process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any

from checker.judge import modules

if TYPE_CHECKING:
    from checker.judge.plugin import Judge


def run(judge: Judge) -> None:
    """Send a 'mutant' event for each mutant of the request, with the test that killed it or None for a survivor."""
    judge.source = judge.request["mutants"][0]["source"] if judge.request["mutants"] else judge.source
    durations = judge.request["durations"]
    todo = list(judge.request["mutants"])
    running: dict[int, dict[str, Any]] = {}
    jobs = judge.request.get("jobs", 2)
    while todo or running:
        while todo and len(running) < jobs:
            mutant = todo.pop(0)
            items = [item for item in judge.items if item.kata_task in mutant["tasks"]]
            items.sort(key=lambda item: durations.get(item.nodeid.partition("::")[2], 0.0))
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _mutant(judge, mutant, items, writer)
            os.close(writer)
            expected = sum(durations.get(item.nodeid.partition("::")[2], 0.0) for item in items)
            limit = time.monotonic() + 3.0 + 6 * expected
            running[reader] = {"pid": pid, "mutant": mutant, "limit": limit, "text": b""}
        ready, _, _ = select.select(list(running), [], [], 0.2)
        now = time.monotonic()
        for reader in list(running):
            job = running[reader]
            if reader in ready:
                chunk = os.read(reader, 65536)
                job["text"] += chunk
                if chunk:
                    continue
            elif now < job["limit"]:
                continue
            else:
                job["text"] = b""
            _finish(judge, reader, running.pop(reader), timed_out=now >= job["limit"] and not job["text"])
    judge.send("done")


def _finish(judge: Judge, reader: int, job: dict[str, Any], *, timed_out: bool) -> None:
    os.kill(job["pid"], signal.SIGKILL)
    os.waitpid(job["pid"], 0)
    os.close(reader)
    try:
        killed_by = json.loads(job["text"])["killed_by"]
    except (ValueError, KeyError):
        killed_by = "its time limit" if timed_out else "the end of its process"
    judge.send("mutant", key=job["mutant"]["key"], killed_by=killed_by)


def _mutant(judge: Judge, mutant: dict[str, Any], items: list[Any], writer: int) -> None:
    """In the fork: run the tests until one fails, say which, and end."""
    killed_by = None
    try:
        judge.source = mutant["source"]
        judge.sources.learner[judge.slug] = (judge.path, mutant["source"])
        try:
            judge.module = modules.fresh(judge.slug, mutant["source"], judge.path)
            judge.use(judge.module)
            judge.check_names()
        except BaseException as error:
            killed_by = f"import: {type(error).__name__}"
        if killed_by is None:
            for item in items:
                if judge.run(item) is not None:
                    killed_by = item.nodeid.partition("::")[2]
                    break
        os.write(writer, json.dumps({"killed_by": killed_by}).encode())
    finally:
        os._exit(0)
