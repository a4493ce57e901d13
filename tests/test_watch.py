"""`kata watch`: by Textual's pilot, and as a real program in a terminal (tmux)."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checker.app import App
from checker.commands.fetch import under_way
from checker.judge import processes
from checker.watch import Watch

TOY = Path(__file__).parent / "toy" / "katas"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KATA_TRACK", str(TOY))
    monkeypatch.delenv("KATA_WORKSPACE", raising=False)
    return tmp_path


def screen_of(home):
    app = App(str(TOY))
    kata = under_way(app)
    return Watch(app, kata)


async def until(pilot, condition, seconds=40.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await pilot.pause(0.05)


def text_of(watch, name):
    return str(watch.parts[name.removeprefix("#")].render()) if watch.is_mounted else ""


@pytest.mark.timeout(120)
def test_a_day_worked_through(home, learner):
    async def story():
        watch = screen_of(home)
        file = home / "torch-katas" / "day01_scale.py"
        async with watch.run_test(size=(80, 30)) as pilot:
            await pilot.press("x")  # the lesson closes
            await until(pilot, lambda: watch.count == 1)
            assert {task.state for task in watch.found.tasks} == {"open"}
            file.write_text(learner("fails"))
            await until(pilot, lambda: watch.count == 2)
            screen = text_of(watch, "#text")
            assert screen.index("The factor was added") < screen.index("called")
            await pilot.press("h")
            await pilot.pause(0.3)
            assert "hint 1 of 3" in str(watch.screen.query_one("#page").render())
            await pilot.press("x")
            await pilot.press("t")
            await until(pilot, lambda: watch.count == 3)
            assert [task.name for task in watch.found.tasks] == ["scale"]
            await pilot.press("d")
            await pilot.pause(0.2)
            assert "not passed yet" in watch.notice
            file.write_text(learner("passes"))
            await until(pilot, lambda: watch.count == 4)
            await pilot.press("a")
            await until(pilot, lambda: watch.count == 5)
            assert "day 1 is passed: multiplication, softmax" in watch.notice
            await until(pilot, lambda: "1/2" in text_of(watch, "#headline"))
            assert "yours" in text_of(watch, "#text") and "press n: day 2" in text_of(watch, "#text")
            await pilot.press("d")
            await pilot.pause(0.3)
            assert "reference" in str(watch.screen.query_one("#page").render())
            await pilot.press("x")
            await pilot.press("r")
            await until(pilot, lambda: watch.count == 6)
            assert "is passed" in watch.notice or watch.notice == "", "it is said once"
            await pilot.press("n")
            await until(pilot, lambda: (home / "torch-katas" / "day02_chain.py").exists())
            await pilot.press("x")
            await until(pilot, lambda: watch.found is not None and watch.found.slug == "day02_chain")
            for key in ("s", "question_mark", "l"):
                await pilot.press(key)
                await pilot.pause(0.2)
                assert len(watch.screen_stack) == 2
                await pilot.press("x")
            await pilot.press("q")

    before = set(processes.descendants(os.getpid()))
    asyncio.run(story())
    assert processes.descendants(os.getpid(), before) == []
    assert not (home / "torch-katas" / ".kata" / "watch.sock").exists()


@pytest.mark.timeout(120)
def test_accidents_do_not_end_it(home, learner):
    async def story():
        watch = screen_of(home)
        file = home / "torch-katas" / "day01_scale.py"
        async with watch.run_test(size=(60, 24)) as pilot:
            await pilot.press("x")
            await until(pilot, lambda: watch.count == 1)
            file.write_text("def scale(x, fac")
            await until(pilot, lambda: watch.count == 2)
            assert watch.found.outcome == "error"
            # a save during a check cancels it and starts the newest
            file.write_text(learner("hangs"))
            await until(pilot, lambda: watch.running and "scale" in watch.tests.values())
            file.write_text(learner("passes"))
            await until(pilot, lambda: watch.count == 3)
            assert watch.found.outcome == "passed"
            # a save every 50 ms
            for number in range(30):
                file.write_text(learner("passes") + f"\n# {number}\n")
                await pilot.pause(0.05)
            await pilot.pause(0.5)
            await until(pilot, lambda: not watch.running)
            assert watch.found.outcome == "passed"
            count = watch.count
            # an editor that replaces the file
            other = file.with_suffix(".tmp")
            other.write_text(learner("fails"))
            os.replace(other, file)
            await until(pilot, lambda: watch.count > count)
            assert watch.found.outcome == "failed"
            file.unlink()
            await pilot.press("r")
            await until(pilot, lambda: "not fetched" in watch.notice or "not there" in text_of(watch, "#text"))
            await pilot.resize_terminal(120, 40)
            await pilot.pause(0.2)
            shutil.rmtree(home / "torch-katas")
            await pilot.press("r")
            await until(pilot, lambda: "gone" in watch.notice)
            assert watch.is_running
            await pilot.press("q")

    asyncio.run(story())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.timeout(3600 if "KATA_MANY_CHECKS" in os.environ else 120)
def test_a_long_session_does_not_grow(home, learner):
    many = int(os.environ.get("KATA_MANY_CHECKS", "15"))

    def held(pid):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")), processes.threads(pid)

    async def story():
        watch = screen_of(home)
        file = home / "torch-katas" / "day01_scale.py"
        sources = [learner("passes"), learner("fails")]
        async with watch.run_test(size=(80, 30)) as pilot:
            await pilot.press("x")
            await until(pilot, lambda: watch.count == 1)

            async def session(checks):
                for number in range(checks):
                    file.write_text(sources[number % 2])
                    before = watch.count
                    await pilot.press("r")
                    await until(pilot, lambda seen=before: watch.count > seen)
                await until(pilot, lambda: not watch.running)
                await pilot.pause(0.5)
                worker = watch.warm._worker.process.pid
                return [held(pid) for pid in (os.getpid(), worker)], processes.descendants(worker)

            before, _ = await session(15)
            after, left = await session(many)
            print(f"{many} checks: {before} -> {after}")
            assert len(left) == 1, "the fork that waits for the next check"
            for (bytes_before, *before_it), (bytes_after, *after_it) in zip(before, after, strict=True):
                assert bytes_after - bytes_before < 16 << 20
                assert after_it == before_it
            await pilot.press("q")

    asyncio.run(story())


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.timeout(120)
def test_in_a_real_terminal(home, learner):
    socket = str(home / "tmux.sock")

    def tmux(*words):
        return subprocess.run(["tmux", "-S", socket, *words], capture_output=True, text=True, check=False).stdout

    def wait_for(words, seconds=45):
        deadline = time.monotonic() + seconds
        while words not in (screen := tmux("capture-pane", "-p").replace("\N{NO-BREAK SPACE}", " ")):
            assert time.monotonic() < deadline, f"{words!r} is not in\n{screen}"
            time.sleep(0.1)
        return screen

    environment = [f"KATA_TRACK={TOY}", "NO_COLOR=1", "TERM=screen"]
    command = f"cd {home} && env -u COLUMNS -u LINES {' '.join(environment)} {sys.executable} -m checker watch; echo ended with $?; stty -a | grep -o ' echo '; exec sh"
    tmux("new-session", "-d", "-x", "60", "-y", "24", command)
    try:
        wait_for("any key closes")
        tmux("send-keys", "x")
        wait_for("not written yet")
        screen = wait_for("q quit")
        assert "n next" in screen and max(len(line) for line in screen.split("\n")) <= 60
        file = home / "torch-katas" / "day01_scale.py"
        file.write_text(learner("fails"))
        wait_for("The factor was added")
        tmux("resize-window", "-x", "100", "-y", "30")
        file.write_text(learner("passes"))
        screen = wait_for("day 1 is passed")
        tmux("send-keys", "q")
        screen = wait_for("ended with 0")
        assert "\n echo" in wait_for("\n echo"), "the terminal echoes what is typed again, as it did"
    finally:
        tmux("kill-server")
