"""The outcomes of a check, on the toy track, cold and warm alike."""

import json
import sys
from xml.etree import ElementTree

import pytest

from checker import verdict
from checker.run import Limits
from checker.worker import Worker

LEARNERS = ("passes", "fails", "hangs", "forbidden")


def facts(found):
    return (
        found.outcome,
        [
            (task.name, task.state, [item["id"] for item in task.named], [test.state for test in task.tests])
            for task in found.tasks
        ],
        found.message,
        found.costs,
        found.provenance,
    )


def test_a_right_solution_passes_and_its_cost_is_metered(judged, learner):
    found = judged(learner("passes"))
    assert found.outcome == verdict.PASSED
    assert found.counts() == {"core": (2, 2), "stretch": (1, 1)}
    assert found.costs["scale"]["yours"] == found.costs["scale"]["reference"]
    assert found.costs["scale"]["yours"]["new_bytes"] == 64 * 64 * 4
    assert found.versions["torch"].startswith("2.")


def test_a_stub_fails_and_every_task_is_open(judged, toy):
    found = judged(toy.find("1").text("stub.py"))
    assert found.outcome == verdict.FAILED
    assert {task.state for task in found.tasks} == {"open"}
    assert "scale is not written yet" in found.tasks[0].tests[0].failure["message"]


def test_a_wrong_solution_is_named_by_its_numbers_although_it_is_written_differently(judged, learner):
    found = judged(learner("fails"))
    named = {task.name: [item["id"] for item in task.named] for task in found.tasks}
    assert named == {"scale": ["scale__added"], "weights": ["weights__no_shift"], "halve": []}
    sentence = found.tasks[0].named[0]["sentence"]
    assert sentence == "The factor was added where it should multiply."


def test_an_unknown_mistake_is_not_named(judged, learner):
    found = judged(learner("passes").replace("x * factor", "x * factor + 1e-3"))
    task = found.tasks[0]
    assert task.state == "failed" and task.named == ()
    lines = dict(task.tests[0].failure["lines"])
    assert lines["called"] == "scale(x (2,3), factor=3)"
    assert "6 of 6 values differ, by up to 0.0010" in lines["returned"]


def test_a_mistake_that_explains_only_some_failures_is_not_named(judged, learner):
    source = learner("passes").replace(
        "    return x * factor", "    return x + factor if x.dtype is torch.float64 else x * factor * 1.5"
    )
    task = judged(source).tasks[0]
    assert task.state == "failed" and task.named == ()


def test_the_same_seed_draws_the_same_values_and_another_one_others(judged, learner):
    def first(seed):
        lines = judged(learner("fails"), seed=seed).tasks[0].tests[0].failure["lines"]
        return dict(lines)["first"]

    assert first(1) == first(1) != first(2)


def test_one_task_alone(judged, learner):
    found = judged(learner("fails"), only=["halve"])
    assert [task.name for task in found.tasks] == ["halve"]
    assert found.outcome == verdict.FAILED


def test_what_is_printed_is_kept_and_capped(judged, learner):
    found = judged(learner("passes").replace("    return x / 2", '    print("y" * 1_000_000)\n    return x / 2'))
    assert found.outcome == verdict.PASSED
    assert len(found.output) < 20_000 and "bytes left out" in found.output


def test_a_device_that_is_not_there_is_not_run_and_no_pass(judged, learner):
    import torch

    device = "mps" if torch.cuda.is_available() else "cuda"
    found = judged(learner("passes"), device=device)
    assert found.outcome == verdict.NOT_RUN and not found.passed
    assert {task.state for task in found.tasks} == {"not run"}


def test_an_earlier_day_is_the_learners_own_once_passed_else_the_reference(judged, learner):
    chain = "from day01_scale import scale\n\n\ndef twice(x, factor):\n    return scale(scale(x, factor), factor)\n"
    found = judged(chain, "2")
    assert found.outcome == verdict.PASSED and found.provenance == {"day01_scale": "reference"}
    found = judged(chain, "2", others={"day01_scale": learner("passes")})
    assert found.outcome == verdict.PASSED and found.provenance == {"day01_scale": "yours"}
    found = judged(chain, "2", others={"day01_scale": learner("fails")})
    assert found.outcome == verdict.FAILED


def test_a_helper_file_of_the_workspace_can_be_imported(judged):
    source = "from helper import double\n\n\ndef twice(x, factor):\n    return double(x, factor * factor)\n"
    found = judged(source, "2", helpers={"helper.py": "def double(x, f):\n    return x * f\n"})
    assert found.outcome == verdict.PASSED


def test_a_stray_file_does_not_steer_the_run(judged, learner):
    stray = {
        "conftest.py": "raise SystemExit(0)\n",
        "torch.py": "raise RuntimeError('not torch')\n",
        "random.py": "x = 1\n",
    }
    assert judged(learner("passes"), helpers=stray).outcome == verdict.PASSED


@pytest.mark.timeout(60)
def test_cold_and_warm_give_the_same_verdicts(judged, learner, toy):
    sources = [learner(name) for name in LEARNERS] + [toy.find("1").text("stub.py"), "import nothing_of_this_name\n"]
    with Worker() as cold:
        for source in sources:
            one, two = judged(source, worker=cold), judged(source)
            assert one.outcome == two.outcome
            # in which line of its endless loop it was stopped is chance
            if one.outcome != verdict.TIMEOUT:
                assert facts(one) == facts(two)


WAITS = """import signal
import torch


def wait():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    while True:
        torch.zeros(1)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("rest", "where"), [
    ("\n\ndef scale(x, factor=2.0):\n    wait()\n", "in the test"),
    ("\n\nwait()\n", "import"),
])  # fmt: skip
def test_code_that_does_not_come_back_is_told_with_its_line(judged, rest, where):
    found = judged(WAITS + rest, limits=Limits(total=20.0, import_=1.0), only=["scale"])
    assert found.outcome == verdict.TIMEOUT
    assert found.line in (7, 8), found.message
    assert where in found.message and f"line {found.line}" in found.message


def test_a_check_that_is_cancelled_ends_at_once(toy, warm_worker, learner):
    from checker import request

    kata = toy.find("1")
    asked = request.check(toy, kata, {kata.slug: ("/w/day01_scale.py", learner("hangs"))}, seed=1)
    seen = []
    run = warm_worker.run(
        asked, Limits(), on_event=seen.append, cancelled=lambda: any(e["event"] == "start" for e in seen)
    )
    assert run.ended == "cancelled" and run.seconds < 5
    assert verdict.judge(kata, run, seed=1, device="cpu").outcome == verdict.CANCELLED


def test_the_verdict_as_json_and_as_junit(judged, learner):
    found = judged(learner("fails").replace("summing", "\\x1b[2J\\x00summing"))
    data = json.loads(json.dumps(found.to_json()))
    assert data["passed"] is False and data["tasks"][0]["named"][0]["id"] == "scale__added"
    root = ElementTree.fromstring(verdict.to_junit([found]).split("\n", 1)[1])
    suite = root.find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("6", "5")
    assert len(suite.findall("testcase/failure")) == 5


def test_the_environment_does_not_reach_the_worker(monkeypatch, judged, learner, tmp_path):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_PLUGINS", "nothing_of_this_name")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(9)\n")
    with Worker() as cold:
        assert judged(learner("passes"), worker=cold).outcome == verdict.PASSED


def test_a_worker_that_was_killed_is_replaced(toy, judged, learner):
    with Worker() as worker:
        worker.process.kill()
        worker.process.wait()
        assert judged(learner("passes"), worker=worker).outcome == verdict.PASSED


def test_the_parent_never_imports_torch():
    import subprocess

    code = (
        "import sys, checker.cli, checker.commands.check, checker.verify, checker.worker; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_of_two_names_only_the_wrong_one_is_named(toy, warm_worker, tmp_path):
    """A round trip fails because of one of its two functions; a mistake in the other one is not named for it."""
    import shutil

    from checker import request
    from checker.track import Track

    shutil.copytree(toy.folder.parent, tmp_path / "toy")
    folder = tmp_path / "toy" / "katas" / "day02_chain"
    (tmp_path / "toy" / "reference" / "day02_chain.py").write_text(
        '"""Both ways."""\n\n\ndef there(x):\n    return x + 1\n\n\ndef back(x):\n    return x - 1\n'
    )
    file = folder / "kata.toml"
    file.write_text(file.read_text().replace('name = "twice"', 'name = "twice"\nnames = ["there", "back"]'))
    (folder / "stub.py").write_text(
        "def there(x):\n    raise NotImplementedError\n\n\ndef back(x):\n    raise NotImplementedError\n"
    )
    (folder / "spec.py").write_text(
        "from checker.testing import assert_equal, task\n\n\n"
        '@task("twice")\ndef test_there_and_back(solution):\n    assert_equal(solution.back(solution.there(3)), 3)\n'
    )
    (folder / "misconceptions.py").write_text(
        "from checker.testing import misconception\n\n\n"
        '@misconception("there", "You went too far.")\ndef there__too_far(x):\n    return x + 2\n\n\n'
        '@misconception("back", "You stayed in place.")\ndef back__right_here(x):\n    return x - 1\n'
    )
    track = Track.load(tmp_path / "toy" / "katas")
    kata = track.find("2")
    source = "def there(x):\n    return x + 2\n\n\ndef back(x):\n    return x - 1\n"
    run = warm_worker.run(
        request.check(track, kata, {kata.slug: ("/w/day02_chain.py", source)}, seed=1), request.limits(kata)
    )
    found = verdict.judge(kata, run, seed=1, device="cpu")
    assert [item["id"] for item in found.tasks[0].named] == ["there__too_far"]


def test_a_function_may_be_mapped_by_torch_func(judged, learner):
    source = learner("passes").replace("    return x * factor", "    return torch.vmap(lambda row: row * factor)(x)")
    assert judged(source, only=["scale"]).outcome == verdict.PASSED


def test_a_ban_on_one_context_manager_leaves_the_others(monkeypatch):
    import contextlib

    from checker.judge.forbidden import Ban, Guard

    @contextlib.contextmanager
    def other():
        yield 1

    space = {"other": other}
    exec(compile("def use():\n    with other() as x:\n        return x\n", "/w/mine.py", "exec"), space)
    guard = Guard({"/w/mine.py": "mine.py"})
    with guard.watch(Ban(["torch.nn.utils.stateless._reparametrize_module", "torch.optim.SGD"]), "t"):
        assert space["use"]() == 1
