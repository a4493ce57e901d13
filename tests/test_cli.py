"""The command line, through click's runner: screens, exit codes, and what bad input gets."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from checker.app import App
from checker.cli import kata
from checker.commands.check import _after
from checker.errors import UserError
from checker.workspace import Workspace
from progress import Store

TOY = Path(__file__).parent / "toy" / "katas"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KATA_TRACK", str(TOY))
    monkeypatch.delenv("KATA_WORKSPACE", raising=False)
    return tmp_path


@pytest.fixture
def say(home):
    """say('check', '1') -> (exit code, output); a UserError is its sentence and exit code, as main() does it."""

    def run(*words, input=None):
        result = CliRunner().invoke(kata, list(words), input=input)
        if isinstance(result.exception, UserError):
            return result.exception.exit_code, str(result.exception)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def fetched(say, home):
    code, _ = say("next")
    assert code == 0
    return home / "torch-katas" / "day01_scale.py"


def test_next_makes_a_workspace_fetches_the_first_day_and_shows_its_lesson(say, home):
    code, text = say("next")
    file = home / "torch-katas" / "day01_scale.py"
    assert code == 0 and file.read_text() == (TOY / "day01_scale" / "stub.py").read_text()
    assert "Scaling" in text and "torch-katas/day01_scale.py" in text and "kata check" in text


def test_next_leaves_what_was_written_alone(say, fetched):
    fetched.write_text("# mine\n")
    code, text = say("next")
    assert code == 0 and fetched.read_text() == "# mine\n" and "as you left it" in text


def test_a_whole_day(say, fetched, learner):
    code, text = say("check")
    assert code == 1 and "open" in text and "not written yet" in text and "kata hint scale" in text
    fetched.write_text(learner("fails"))
    code, text = say("check")
    assert code == 1
    named, numbers = text.index("The factor was added"), text.index("called")
    assert named < numbers < text.index("next"), "the named mistake before the numbers, the next step last"
    assert re.search(r"seed \d+", text)
    for rung in (1, 2, 3, 3):
        code, text = say("hint", "scale")
        assert code == 0 and f"hint {rung} of 3" in text
    code, text = say("solution", "1")
    assert code == 1 and "--give-up" in text
    code, text = say("diff", "1")
    assert code == 1 and "not passed yet" in text
    fetched.write_text(learner("passes"))
    code, text = say("check")
    assert code == 0 and "passed" in text and "FLOPs" not in text and "calls" in text and "kata next: day 2" in text
    code, text = say("status")
    assert code == 0 and "1 of 2 days" in text and "day 2, Chaining" in text
    code, text = say("solution", "1")
    assert code == 0 and "x times factor" in text
    code, text = say("diff", "1")
    assert code == 0 and "+++ reference" in text
    code, text = say("next")
    assert code == 0 and "Day 2 is fetched" in text
    code, text = say("check")
    assert code == 1 and "day 2" in text, "the day that was fetched last is checked"


def test_what_follows_a_day_out_of_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KATA_WORKSPACE", raising=False)
    Workspace.create(tmp_path)
    app = App(None)
    step = _after(app, app.track.find("3"))
    assert step.startswith("kata start 4: ") and step.endswith("; `kata next` goes back to day 1")
    assert _after(app, app.track.find("1")).startswith("kata next: day 2, ")
    last = app.track.kata(app.track.slugs[-1])
    assert _after(app, last).startswith("kata next: day 1, ")
    ids = {app.track.id_of(slug) for slug in app.track.slugs}
    monkeypatch.setattr(Store, "passed_katas", lambda self: ids - {last.id})
    assert _after(app, last) == "all days are passed; `kata status` shows the whole track"


def test_history_restore_and_reset_lose_nothing(say, fetched, learner):
    fetched.write_text(learner("fails"))
    say("check")
    fetched.write_text("# a third thing\n")
    code, text = say("reset", "1")
    assert code == 0 and "is the stub again" in text
    assert fetched.read_text() == (TOY / "day01_scale" / "stub.py").read_text()
    kept = re.search(r"kata restore (\w+)", text)[1]
    code, text = say("history", "1")
    assert code == 0 and "before reset" in text and "failed" in text
    code, text = say("restore", kept, "--day", "1")
    assert code == 0 and fetched.read_text() == "# a third thing\n"
    code, text = say("restore", "ffff0000")
    assert code == 2 and "none of day 1" in text


def test_progress_moves_to_another_machine(say, fetched, learner, home, monkeypatch):
    fetched.write_text(learner("passes"))
    say("check")
    assert say("export", "mine.json")[0] == 0
    other = home / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    say("next")
    code, text = say("import", "../mine.json")
    assert code == 0 and "Merged 1 attempts" in text
    assert "1 of 2 days" in say("status")[1]
    code, text = say("import", "../mine.json")
    assert code == 0 and "Merged 0 attempts" in text
    (other / "wrong.json").write_text("{}")
    code, text = say("import", "wrong.json")
    assert code == 1 and "was not imported" in text
    (other / "wrong.json").write_text("no json")
    assert say("import", "wrong.json")[0] == 2


def test_json_and_junit(say, fetched, home):
    code, text = say("check", "--json", "--junit", "out.xml", "--seed", "12")
    data = json.loads(text)
    assert code == 1 and data["seed"] == 12 and data["outcome"] == "failed"
    assert "testsuite" in (home / "out.xml").read_text()


def test_all_days_at_once(say, fetched, learner):
    fetched.write_text(learner("passes"))
    say("start", "2")
    code, text = say("check", "--all")
    assert code == 1 and "1 of 2 days passed" in text
    assert say("check", "--all", "1")[0] == 2


def test_built_on_the_learners_own_day(say, fetched, learner):
    fetched.write_text(learner("passes"))
    say("check")
    say("next")
    file = fetched.with_name("day02_chain.py")
    file.write_text(
        "from day01_scale import scale\n\n\ndef twice(x, factor):\n    return scale(scale(x, factor), factor)\n"
    )
    code, text = say("check")
    assert code == 0 and "day 1 (yours)" in text


def test_for_a_task_that_was_not_passed_with_its_day_the_reference_stands_in(say, fetched, learner):
    fetched.write_text(learner("passes").replace("    return x / 2", "    raise NotImplementedError"))
    code, text = say("check")
    assert code == 0 and "stretch open" in text
    say("next")
    file = fetched.with_name("day02_chain.py")
    file.write_text("from day01_scale import halve\n\n\ndef twice(x, factor):\n    return 2 * halve(x) * factor**2\n")
    code, text = say("check")
    assert code == 0 and "day 1 (yours, but halve of the reference)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["check"], 2, "There is no workspace"),
        (["hint"], 2, "There is no workspace"),
        (["start", "77"], 2, "days 1 to 2"),
        (["lesson", "scael"], 2, "did you mean scale?"),
        (["chekc"], 2, "did you mean `kata check`?"),
        (["check", "--device", "tpu"], 2, "'tpu' is not one of"),
        (["--track", "nowhere", "status"], 2, "has no track.toml"),
    ],
)
def test_bad_input_gets_one_sentence(say, words, code, says):
    got, text = say(*words)
    assert got == code and says in text


def test_a_day_that_is_not_fetched(say, fetched):
    code, text = say("check", "2")
    assert code == 2 and "kata start 2" in text


def test_an_unknown_task_gets_the_nearest(say, fetched):
    code, text = say("check", "--task", "halv")
    assert code == 2 and "did you mean halve?" in text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xfex\x00", "UTF-16"),
        (b"x = 1\ny = '\xe9'\n", "line 2 is not UTF-8"),
        (b"x = 1\0\n", "line 1 has a NUL"),
        (b"def scale(x:\n", "line 1"),
        (b"\xef\xbb\xbfimport torch\r\n", "has no scale"),
    ],
)
def test_a_file_that_is_no_python(say, fetched, data, says):
    fetched.write_bytes(data)
    code, text = say("check")
    assert code == 1 and says in " ".join(text.split())
    assert fetched.read_bytes() == data


def test_a_folder_in_place_of_the_file(say, fetched):
    fetched.unlink()
    fetched.mkdir()
    code, text = say("check")
    assert code == 1 and "is not a file" in " ".join(text.split())


def test_two_workspaces(say, fetched, home, monkeypatch):
    monkeypatch.chdir(fetched.parent)
    monkeypatch.setenv("KATA_WORKSPACE", str(home / "other"))
    code, text = say("status")
    assert code == 2 and "Two workspaces" in text
    monkeypatch.delenv("KATA_WORKSPACE")
    code, text = say("init", "inner")
    assert code == 2 and "lies inside the workspace" in text


def test_a_damaged_store_is_kept_aside_and_the_learner_told(say, fetched, learner):
    database = fetched.parent / ".kata" / "progress.db"
    for extra in database.parent.glob("progress.db-*"):
        extra.unlink()
    database.write_bytes(b"this is no database" * 100)
    fetched.write_text(learner("passes"))
    code, text = say("check")
    assert code == 0 and "damaged" in " ".join(text.split())
    kept = list(database.parent.glob("progress.db.damaged-*"))
    assert len(kept) >= 1 and any(file.read_bytes().startswith(b"this is no database") for file in kept)


def test_a_full_disk_does_not_hide_the_verdict(say, fetched, learner, monkeypatch):
    from progress import Store, StoreError

    def full(*args):
        raise StoreError("The disk is full.")

    monkeypatch.setattr(Store, "record", full)
    fetched.write_text(learner("passes"))
    code, text = say("check")
    assert code == 0 and "this attempt was not saved: The disk is full." in text


def test_every_command_is_in_the_readme_and_has_help(say):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name, command in kata.commands.items():
        assert f"`kata {name}" in readme, name
        assert command.help and command.help.strip().endswith((".", "`.", ")."))
        code, text = say(name, "--help")
        assert code == 0 and "Usage" in text


@pytest.mark.parametrize("words", [["--help"], ["next"], ["status"], ["hint"], ["lesson"]])
def test_quick_commands_import_no_torch(words, fetched):
    code = (
        "import sys; sys.argv = ['kata', *sys.argv[1:]]\n"
        "import atexit; atexit.register(lambda: print('TORCH', 'torch' in sys.modules, file=sys.stderr))\n"
        "from checker.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=fetched.parent, check=False
    )
    assert done.returncode == 0 and "TORCH False" in done.stderr, done.stderr


def test_a_bug_of_ours_goes_to_a_log_file(fetched, tmp_path):
    code = (
        "import checker.commands.status as s\n"
        "def broken(app): raise KeyError('a bug')\n"
        "s.status = broken\n"
        "import sys; sys.argv = ['kata', 'status']\n"
        "from checker.cli import main; main()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    log = Path(re.search(r"are in (\S+);", done.stderr)[1])
    assert "KeyError: 'a bug'" in log.read_text()


@pytest.mark.timeout(60)
def test_ctrl_c_ends_a_check_with_130_and_leaves_nothing(fetched, learner):
    import signal

    from checker.judge import processes

    fetched.write_text(learner("hangs"))
    process = subprocess.Popen(
        [sys.executable, "-m", "checker", "check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 40
    while not processes.descendants(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    below = processes.descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert below and not [pid for pid in below if Path(f"/proc/{pid}").exists() and not processes._is_zombie(pid)]


def test_a_place_that_cannot_be_a_workspace_or_be_written(say, home, fetched, monkeypatch):
    (home / "file").write_text("x")
    code, text = say("init", "file/inner")
    assert code == 2 and "cannot be made a workspace" in text
    real = os.replace

    def full(source, target, **options):
        if str(target).endswith("day01_scale.py"):
            raise OSError(28, "No space left on device")
        return real(source, target, **options)

    fetched.write_text("# mine\n")
    monkeypatch.setattr(os, "replace", full)
    code, text = say("reset", "1")
    assert code == 1 and "No space left on device" in text and "nothing was changed" in text
    assert fetched.read_text() == "# mine\n"
    assert sorted(file.name for file in fetched.parent.iterdir()) == [".kata", "day01_scale.py"]
