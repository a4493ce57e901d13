"""`make bench`: how long things take, as ratios against a baseline of the same run. Prints a table and keeps it as JSON.

Usage: python -m tests.benchmarks [--runs N] [--days 1,2] [--parts start,checks,saves] [--json FILE]
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from checker import request
from checker.app import App
from checker.judge import processes
from checker.track import Track
from checker.watch import Watch
from checker.worker import Worker

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = (["--help"], ["next"], ["status"], ["hint"], ["lesson"])


def timed(command, runs, **options):
    """Wall seconds of each run of a command; it may fail."""
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, **options)
        taken.append(time.perf_counter() - started)
    return taken


def summary(values):
    """Median and 95th percentile in milliseconds."""
    ordered = sorted(values)
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "p95_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
    }


def start_up(runs, workspace):
    """Each quick command against `python -c ''`; the promise is four times that plus 60 ms."""
    # as after an ordinary installation: with bytecode, which the first run of each command writes
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    base = summary(timed([sys.executable, "-c", ""], runs, env=environment))
    rows = {"python -c ''": base}
    kata = str(Path(sys.executable).with_name("kata"))
    for words in QUICK:
        row = summary(timed([kata, *words], runs + 1, cwd=workspace, env=environment)[1:])
        row["allowed_ms"] = 4 * base["median_ms"] + 60
        row["of_allowed"] = row["median_ms"] / row["allowed_ms"]
        rows["kata " + " ".join(words)] = row
    return rows


def question(track, kata):
    """The request for a check of the reference."""
    source = kata.reference_file.read_text(encoding="utf-8")
    return request.check(track, kata, {kata.slug: (f"/w/{kata.file_name}", source)}, seed=11, trusted=True, cost=False)


def checks(track, katas, runs, worker):
    """Per kata: warm verdict, cold verdict and `python -m pytest` on the same spec, with the reference as solution.

    Bodies are the times in the functions of the tests. Above them lies all else: from the request to the last event, the collection of
    the spec, its fixtures, and what is done around each test.
    Yields (folder name, row), so that a long run that is stopped has kept what it measured.
    """
    for kata in katas:
        asked = question(track, kata)
        bodies, warm, above = [], [], []
        for number in range(runs + 1):
            time.sleep(0.3)  # as between two saves: the worker has a fork ready
            run = worker.run(dict(asked), request.limits(kata))
            if number:  # the first compiles the spec
                warm.append(run.seconds)
                bodies.append(sum(event["called"] for event in run.of("finish")))
                above.append(run.seconds - bodies[-1])
        cold = []
        for _ in range(runs):
            started = time.perf_counter()
            with Worker() as once:
                once.run(dict(asked), request.limits(kata))
            cold.append(time.perf_counter() - started)
        environment = {
            **os.environ,
            "KATA_BENCH_SLUG": kata.slug,
            "KATA_BENCH_DTYPES": ",".join(kata.dtypes),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.benchmarks.plain", "-p", "no:cacheprovider", "-c", os.devnull,
                   "--rootdir", str(ROOT), "--confcutdir", str(kata.folder), str(kata.folder / "spec.py")]  # fmt: skip
        plain = timed(command, runs, cwd=ROOT, env=environment)
        row = {
            "warm": summary(warm),
            "cold": summary(cold),
            "pytest": summary(plain),
            "tests": len(run.of("finish")),
            "bodies_ms": 1e3 * statistics.median(bodies),
            "above_bodies_ms": 1e3 * statistics.median(above),
        }
        row["warm_of_pytest"] = row["warm"]["median_ms"] / row["pytest"]["median_ms"]
        row["cold_minus_pytest_ms"] = row["cold"]["median_ms"] - row["pytest"]["median_ms"]
        shown = "   ".join(
            f"{name} {row[name]['median_ms']:6.0f} ({row[name]['p95_ms']:.0f})" for name in ("warm", "cold", "pytest")
        )
        print(
            f"  {kata.slug:<28} {shown} ms   bodies {row['bodies_ms']:5.0f}, above {row['above_bodies_ms']:4.0f}   "
            f"warm/pytest {row['warm_of_pytest']:.3f}, cold/pytest {row['cold']['median_ms'] / row['pytest']['median_ms']:.2f}",
            flush=True,
        )
        yield kata.slug, row


def promises(rows):
    """What a warm verdict promises: a tenth of pytest where the bodies are short, and little above the bodies everywhere."""
    short = [row["warm_of_pytest"] for row in rows.values() if row["bodies_ms"] < 200]
    ratio = f"{statistics.median(short):.3f} of pytest (promised 0.100)" if short else "none here"
    slug, most = max(rows.items(), key=lambda item: item[1]["above_bodies_ms"])
    print(f"  warm, bodies under 0.2 s: {ratio}")
    print(f"  most above the bodies: {most['above_bodies_ms']:.0f} ms, {slug} (promised 150)")


def resident(pid):
    """Resident memory of a process, in bytes; 0 if it is gone or this system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def own(pid):
    """Memory that a process shares with nobody, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def memory(track, kata, worker):
    """Resident memory of the warm process, and what its waiting fork and one check at most held for themselves, in bytes."""
    asked = question(track, kata)
    waiting = sum(own(pid) for pid in processes.descendants(worker.process.pid))
    most, ended = 0, threading.Event()

    def look():
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, sum(own(pid) for pid in processes.descendants(worker.process.pid)))

    watcher = threading.Thread(target=look)
    watcher.start()
    worker.run(asked, request.limits(kata))
    ended.set()
    watcher.join()
    return {
        "warm_process_bytes": resident(worker.process.pid),
        "waiting_fork_private_bytes": waiting,
        "check_private_bytes": most,
    }


class TimedWatch(Watch):
    """A watch that notes when a verdict is on the screen."""

    drawn = 0.0

    def on_told(self, message):
        super().on_told(message)
        if message.what == "verdict":
            self.drawn = time.perf_counter()


def saves(track, katas, runs):
    """Per kata: from a save of the learner's file to the verdict on the screen of `kata watch`."""

    async def one(kata, home):
        app = App(str(track.folder))
        subprocess.run([str(Path(sys.executable).with_name("kata")), "start", str(kata.day)], cwd=home, stdout=subprocess.DEVNULL, check=True)  # fmt: skip
        os.chdir(home)
        # as a learner would have written it, who imports the own earlier days
        source = re.sub(r"\breference\.(?=day)", "", kata.reference_file.read_text(encoding="utf-8"))
        taken, started = [], 0.0
        watch = TimedWatch(app, kata)
        async with watch.run_test(size=(100, 40)) as pilot:
            await pilot.press("x")
            file = app.workspace.file(kata)
            spare = file.with_suffix(".new")
            for number in range(runs + 2):
                while not watch.drawn > started:
                    await pilot.pause(0.005)
                if number:
                    taken.append(watch.drawn - started)
                await pilot.pause(0.6)  # the record is written, and the watcher waits again
                spare.write_text(f"{source}\n# {number}\n", encoding="utf-8")
                started = time.perf_counter()
                os.replace(spare, file)  # as many editors save: one change, not two
        return taken[1:]  # the first of them may still wait for what is loaded lazily

    back = Path.cwd()
    for kata in katas:
        with tempfile.TemporaryDirectory() as home:
            try:
                row = summary(asyncio.run(one(kata, home)))
            finally:
                os.chdir(back)
        print(f"  {kata.slug:<28} save to verdict {row['median_ms']:6.0f} ms (p95 {row['p95_ms']:.0f})", flush=True)
        yield kata.slug, row


def surroundings():
    """Date, machine and versions: what a figure is worth nothing without."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "pytest", "click", "rich")},
    }


def main():
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--days", default="", help="all by default")
    parser.add_argument("--parts", default="start,checks,saves")
    parser.add_argument("--json", default="", help="kept after each kata")
    options = parser.parse_args()
    parts = options.parts.split(",")
    track = Track.load(ROOT / "katas")
    katas = [track.find(day) for day in options.days.split(",") if day] or list(track)
    result = {**surroundings(), "runs": options.runs}

    def keep():
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if "start" in parts:
        with tempfile.TemporaryDirectory() as folder:
            kata = str(Path(sys.executable).with_name("kata"))
            subprocess.run([kata, "next"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
            result["start_up"] = start_up(options.runs, folder)
        for name, row in result["start_up"].items():
            allowed = f"   {row['of_allowed']:.2f} of what is allowed" if "of_allowed" in row else ""
            print(f"  {name:<16} {row['median_ms']:6.0f} ms (p95 {row['p95_ms']:.0f}){allowed}", flush=True)
        keep()
    if "checks" in parts:
        result["checks"] = {}
        with Worker(warm=True) as worker:
            for _ in range(6):  # it warms itself step by step between checks
                worker.run(question(track, katas[0]), request.limits(katas[0]))
                time.sleep(0.2)
            held = result["memory"] = memory(track, katas[0], worker)
            shown = ", ".join(
                f"{name.removesuffix('_bytes').replace('_', ' ')} {size / 1e6:.0f} MB" for name, size in held.items()
            )
            print(f"  memory: {shown}", flush=True)
            for slug, row in checks(track, katas, options.runs, worker):
                result["checks"][slug] = row
                keep()
        promises(result["checks"])
    if "saves" in parts:
        result["save_to_verdict"] = {}
        for slug, row in saves(track, katas, options.runs):
            result["save_to_verdict"][slug] = row
            keep()


main()
