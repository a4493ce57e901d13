"""The warm worker: fork safety, what works in a forked check, replacement, and other terminals."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from checker import request, verdict, warm
from checker.judge import processes
from checker.run import Limits
from checker.worker import environment

ROOT = Path(warm.__file__).parent.parent
MAIN = Path(processes.__file__).with_name("__main__.py")
# code for a process of its own that has the server's names in `space`, without having started it
SERVER = (
    f"source = open({str(MAIN)!r}).read().replace('\\nmain()\\n', '\\n')\n"
    "space = {'__name__': 'server'}\n"
    "exec(compile(source, 'server', 'exec'), space)\n"
)

PREFIX = "import torch\n"
REST = (
    "\n\ndef weights(x):\n    e = torch.exp(x - x.max())\n    return e / e.sum()\n\n\ndef halve(x):\n    return x / 2\n"
)


def scale(body):
    return PREFIX + f"\n\ndef scale(x, factor=2.0):\n{body}\n    return x * factor\n" + REST


IN_A_FORK = {
    "autograd": """
    w = torch.ones(1000, requires_grad=True)
    (w * w).sum().backward()
    assert w.grad.eq(2).all()""",
    "large operations": """
    y = torch.randn(600, 600) @ torch.randn(600, 600)
    y.exp().sum()
    torch.nn.functional.conv2d(torch.randn(8, 3, 64, 64), torch.randn(8, 3, 3, 3))""",
    "an optimizer": """
    p = torch.nn.Parameter(torch.ones(3))
    o = torch.optim.AdamW([p]); p.sum().backward(); o.step()""",
    "DataLoader workers": """
    from torch.utils.data import DataLoader
    assert len(list(DataLoader(list(range(8)), batch_size=2, num_workers=2))) == 4""",
    "multiprocessing": """
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, 2]) == [1, 2]""",
    "threads": """
    import concurrent.futures
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(abs, [-1, 2])) == [1, 2]""",
    "a compiled function": """
    torch.compile(lambda t: t + 1, backend="eager")(torch.ones(2))""",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", IN_A_FORK)
def test_it_works_in_a_forked_check(what, judged):
    found = judged(scale(IN_A_FORK[what]), limits=Limits(total=40), only=["scale"])
    failures = [test.failure for task in found.tasks for test in task.tests if test.failure]
    assert found.outcome == verdict.PASSED, (found.message, found.output, failures)


def test_cuda_works_in_a_forked_check(judged, learner):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    assert judged(learner("passes"), device="cuda").outcome == verdict.PASSED


def test_a_warm_worker_has_one_thread_before_every_fork(judged, warm_worker, learner):
    for _ in range(3):
        assert judged(learner("passes")).outcome == verdict.PASSED
        assert warm_worker.ready["threads"] == 1
        assert processes.threads(warm_worker.process.pid) == 1


def test_a_check_does_not_see_what_another_one_left(judged, learner):
    leaves = learner("passes").replace(
        "import torch\n", "import torch\ntorch.manual_seed(0)\ntorch.left_behind = 1\n", 1
    )
    judged(leaves)
    looks = learner("passes") + "\nassert not hasattr(torch, 'left_behind')\nprint(torch.rand(1).item())\n"
    first, second = judged(looks, seed=1), judged(looks, seed=2)
    assert first.outcome == second.outcome == verdict.PASSED
    assert first.output != second.output, "the random state is not the worker's"


def test_memory_and_files_do_not_grow_over_many_checks(judged, warm_worker, learner):
    def state():
        pid = warm_worker.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir("/proc/self/fd"))

    source = learner("passes")
    for _ in range(3):
        judged(source)
    before = state()
    for _ in range(int(os.environ.get("KATA_MANY_CHECKS", "25"))):
        assert judged(source).outcome == verdict.PASSED
    after = state()
    assert after[0] - before[0] < 4 << 20
    assert after[1:] == before[1:]
    assert len(processes.descendants(warm_worker.process.pid)) <= 1, "at most the fork for the next check"


def spare_of(worker):
    """The fork that waits for the next check, once it is at its socket; it sleeps nowhere else for so long."""
    deadline, asleep = time.monotonic() + 30, 0
    while asleep < 6:
        assert time.monotonic() < deadline, "no fork waits for a check"
        time.sleep(0.05)
        below = processes.children(worker.process.pid)
        state = Path(f"/proc/{below[0]}/stat").read_text().rpartition(")")[2].split()[0] if below else ""
        asleep = asleep + 1 if state == "S" else 0
    assert len(below) == 1
    return below[0]


@pytest.mark.timeout(60)
def test_a_fork_waits_for_the_next_check_and_knows_nothing_of_the_one_before(judged, warm_worker, learner):
    leaves = "import sys, torch\ntorch.manual_seed(0)\nsys.left_behind = True\nprint('first')\n" + learner("passes")
    judged(leaves, seed=1)
    looks = learner("passes") + "\nimport sys\nprint(hasattr(sys, 'left_behind'), torch.rand(1).item())\n"
    printed = []
    for _ in range(2):
        spare = spare_of(warm_worker)
        found = judged(looks, seed=1)
        assert found.outcome == verdict.PASSED
        assert judged.run.of("ready")[0]["pid"] == spare, "the check ran in the fork that waited"
        assert not Path(f"/proc/{spare}").exists(), "and that fork is gone with its check"
        printed.append(found.output)
    direct = judged(looks, seed=1)  # asked for in the next moment, before another fork waits
    assert direct.outcome == verdict.PASSED and judged.run.of("ready")[0]["pid"] != spare
    assert "False" in printed[0] and printed == [direct.output] * 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_waiting_fork_that_was_killed_costs_nothing(judged, warm_worker, learner, how):
    judged(learner("passes"))
    spare = spare_of(warm_worker)
    os.kill(spare, how)
    time.sleep(0.05)
    assert judged(learner("passes")).outcome == verdict.PASSED
    assert judged.run.of("ready")[0]["pid"] != spare
    assert not Path(f"/proc/{spare}").exists(), "it was collected"


@pytest.mark.timeout(60)
def test_a_waiting_fork_that_does_not_take_its_check_is_ended(judged, warm_worker, learner):
    judged(learner("passes"))
    spare = spare_of(warm_worker)
    os.kill(spare, signal.SIGSTOP)  # that is a check that does not start
    found = judged(learner("passes"), limits=Limits(total=10, start=1.0))
    assert found.outcome != verdict.PASSED
    assert judged(learner("passes")).outcome == verdict.PASSED
    assert not Path(f"/proc/{spare}").exists()


@pytest.mark.timeout(60)
def test_a_fork_at_its_rehearsal_is_not_waited_for():
    code = (
        "import os, time\n" + SERVER + "server = space['Server'](None)\n"
        "ours, theirs = space['socket'].socketpair()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    time.sleep(60)\n"
        "server.spare = pid, ours\n"
        "started = time.monotonic()\n"
        "assert server.hand_over({}, []) is None\n"
        "assert time.monotonic() - started < 5\n"
        "assert server.spare is None and not os.path.exists(f'/proc/{pid}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def asked_of(toy, source):
    kata = toy.find("1")
    return request.check(toy, kata, {kata.slug: ("/w/day01_scale.py", source)}, seed=3), request.limits(kata)


@pytest.fixture
def checks():
    found = warm.WarmChecks()
    yield found
    found.close()


@pytest.mark.timeout(60)
def test_it_restarts_when_the_program_changed(checks, toy, learner, monkeypatch):
    asked, limits = asked_of(toy, learner("passes"))
    assert checks.run(asked, limits).of("done")
    pid = checks._worker.process.pid
    assert checks.run(asked, limits).of("done") and checks._worker.process.pid == pid
    real = warm.program_key()
    monkeypatch.setattr(warm, "program_key", lambda: (*real, ("torch was upgraded", 1, 1)))
    assert checks.run(asked, limits).of("done")
    assert checks._worker.process.pid != pid and checks.restarts == 1


@pytest.mark.timeout(60)
def test_a_worker_that_may_not_fork_is_given_up_for_cold_checks(checks, toy, learner, monkeypatch):
    from checker.errors import OurFault

    asked, limits = asked_of(toy, learner("passes"))
    checks.start()

    def refuse(*args):
        raise OurFault("the worker has 3 threads; a fork would hang")

    monkeypatch.setattr(checks._worker, "run", refuse)
    assert checks.run(asked, limits).of("done")
    assert "3 threads" in checks.cold_because


@pytest.mark.timeout(90)
def test_another_terminal_uses_the_worker_of_a_watch(checks, toy, learner, tmp_path):
    asked, limits = asked_of(toy, learner("fails"))
    assert warm.through_watch(tmp_path, asked, limits) is None
    checks.start()
    door = warm.Door(tmp_path, checks)
    assert door.open()
    try:
        assert (tmp_path / "watch.sock").stat().st_mode & 0o077 == 0
        assert not warm.Door(tmp_path, checks).open(), "a second watch leaves the first one's socket alone"
        run = warm.through_watch(tmp_path, asked, limits)
        kata = toy.find("1")
        found = verdict.judge(kata, run, seed=3, device="cpu")
        assert [item["id"] for item in found.tasks[0].named] == ["scale__added"]
        assert "summing" in found.output
    finally:
        door.close()
    assert warm.through_watch(tmp_path, asked, limits) is None


@pytest.mark.timeout(60)
def test_a_busy_watch_sends_another_terminal_away(checks, toy, learner, tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "_BUSY", 0.1)
    door = warm.Door(tmp_path, checks)
    door.open()
    try:
        with checks._lock:
            asked, limits = asked_of(toy, learner("passes"))
            assert warm.through_watch(tmp_path, asked, limits) is None
    finally:
        door.close()


@pytest.mark.timeout(60)
def test_a_stale_socket_is_no_obstacle(checks, toy, learner, tmp_path):
    door = warm.Door(tmp_path, checks)
    door.open()
    listening, door._socket = door._socket, None
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    assert (tmp_path / "watch.sock").exists()
    asked, limits = asked_of(toy, learner("passes"))
    assert warm.through_watch(tmp_path, asked, limits) is None
    again = warm.Door(tmp_path, checks)
    assert again.open()
    again.close()


@pytest.mark.timeout(60)
def test_a_worker_ends_with_its_parent():
    code = (
        "import sys, time\nfrom checker.worker import Worker\nw = Worker()\nw.start()\n"
        "print(w.process.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and not processes._is_zombie(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(60)
def test_a_worker_runs_the_program_that_started_it(tmp_path):
    shutil.copytree(ROOT / "checker", tmp_path / "checker", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys\nfrom checker.worker import Worker\n"
        "with Worker() as worker:\n"
        "    while worker.ready is None:\n"
        "        worker.messages()\n"
        "    print(worker.ready['program'])\n"
    )
    found = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=found, capture_output=True, text=True, check=True)  # fmt: skip
    assert Path(done.stdout.strip()) == tmp_path / "checker" / "judge" / "__main__.py", "another checkout is installed"


@pytest.mark.timeout(60)
def test_checks_from_two_threads_wait_for_each_other(checks, toy, learner):
    asked, limits = asked_of(toy, learner("passes"))
    done = []
    threads = [threading.Thread(target=lambda: done.append(checks.run(asked, limits))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3 and all(run.of("done") for run in done)


@pytest.mark.timeout(60)
def test_a_server_with_threads_of_its_own_refuses_to_fork(tmp_path):
    code = (
        "import json, os, socket, sys, threading, time\n"
        + SERVER
        + "threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "ours, theirs = socket.socketpair()\n"
        "server = space['Server'](theirs)\n"
        "server.fds = list(os.pipe()) + [os.dup(1)]\n"
        "server.check({})\n"
        "print(ours.recv(1000).decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the worker has 2 threads; a fork would hang" in done.stdout


@pytest.mark.timeout(60)
def test_warming_leaves_only_libraries_behind():
    code = (
        "from checker.judge import warming\nwarming.preload()\n"
        "import random, sys, numpy, torch\n"
        "states = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())\n"
        "before = states()\n"
        "steps = [*warming.steps(), warming.rehearse]\n"
        "for step in steps:\n"
        "    step()\n"
        "from checker.judge import processes\n"
        "assert processes.threads() == 1\n"
        "assert states() == before, 'a random state was used'\n"
        "assert [finder for finder in sys.meta_path if 'pytest' in type(finder).__module__] == []\n"
        "assert 'pytest_timeout' in sys.modules and '_pytest.monkeypatch' in sys.modules, 'it was to be warm'\n"
        "left = [name for name in sys.modules if name == 'spec' or name.partition('.')[0] in ('reference', 'hypothesis')]\n"
        "assert left == [], left\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
