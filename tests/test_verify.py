"""The proof of a kata finds what is wrong with it; the template of `kata new` is green."""

import shutil

import pytest
from click.testing import CliRunner

from checker import proof
from checker.cli import kata as command
from checker.track import Track
from checker.verify import verify


@pytest.fixture
def copy(tmp_path, toy):
    shutil.copytree(toy.folder.parent, tmp_path / "toy")
    for file in (tmp_path / "toy").rglob("proof.json"):
        file.unlink()
    return tmp_path / "toy" / "katas"


@pytest.fixture
def proven(copy, warm_worker):
    """Change a file of the toy kata, prove it, and give (report, problems by step)."""

    def prove(file=None, old="", new="", slug="day01_scale"):
        if file is not None:
            path = copy.parent / "reference" / f"{slug}.py" if file == "reference" else copy / slug / file
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))
        track = Track.load(copy)
        report = verify(track, track.kata(slug), [warm_worker])
        return report, {step.name: "\n".join(step.problems) for step in report.steps if not step.ok}

    return prove


@pytest.mark.timeout(120)
def test_a_sound_kata_is_proven_and_the_proof_is_kept_until_something_changes(proven, copy):
    report, problems = proven()
    assert report.ok and not problems and not report.cached
    assert report.facts["score"] == 1.0 and report.facts["misconceptions"][0] == "scale__added"
    assert proven()[0].cached
    for file in ("kata.toml", "spec.py", "lesson.md", "alternatives.py"):
        path = copy / "day01_scale" / file
        path.write_text(path.read_text() + "\n# changed\n" if file.endswith(".py") else path.read_text() + "\n")
        track = Track.load(copy)
        assert not proof.is_fresh(track, track.kata("day01_scale"))
        proven()
    reference = copy.parent / "reference" / "day01_scale.py"
    reference.write_text(reference.read_text() + "\n# changed\n")
    assert not proof.is_fresh(track, track.kata("day01_scale"))


CASES = [
    ("spec.py", "    assert_close(solution.scale(x), x + x)", "    assert solution.scale(x).shape == x.shape", "mutants", "survives: scale: factor=2.0"),
    ("misconceptions.py", "    return x + factor", "    return x * factor", "misconceptions", "scale__added passes every test"),
    ("misconceptions.py", "    return torch.exp(x - x.max())", "    return torch.exp(x) / torch.exp(x).sum()", "misconceptions", "is named as weights__no_shift, weights__not_normalized"),
    ("alternatives.py", "torch.mul(x, factor)", "torch.mul(x, factor + 1)", "alternatives", "round 1"),
    ("stub.py", "factor: float = 2.0", "factor: float = 3.0", "files", "the signature of scale is"),
    ("stub.py", '    """Half of x, without a new storage larger than x; same shape and dtype."""\n', "", "files", "halve has no docstring"),
    ("stub.py", "    raise NotImplementedError\n\n\ndef weights", "    return x\n\n\ndef weights", "stub", "is 'mismatch' on the stub"),
    ("hints.md", "3. One operator between the two arguments, and return it.\n", "", "files", "scale has 2 rungs"),
    ("lesson.md", "`halve`", "the last one", "files", "does not name the task `halve`"),
    ("reference", "return x * 0.5", "return x * 0.4", "reference", "test_it_is_half"),
    ("kata.toml", "time_limit = 20", "time_limit = 0.02", "reference", "must be three times that"),
]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("file", "old", "new", "step", "says"), CASES)
def test_what_is_wrong_is_found(proven, copy, file, old, new, step, says):
    report, problems = proven(file, old, new)
    assert not report.ok and says in problems.get(step, ""), problems
    assert not (copy / "day01_scale" / "proof.json").exists()


@pytest.mark.timeout(120)
def test_a_survivor_is_allowed_only_with_a_reason_and_only_if_it_survives(proven):
    report, problems = proven(
        "kata.toml",
        'summary = "multiply by a half"',
        'summary = "multiply by a half"\n\n[[equivalent]]\nmutant = "halve: nothing"\nreason = "none"',
    )
    assert not report.ok and "explains a mutant that does not survive: halve: nothing" in problems["mutants"]


@pytest.mark.timeout(120)
def test_a_new_kata_is_green(copy, warm_worker, monkeypatch):
    monkeypatch.setenv("KATA_TRACK", str(copy))
    result = CliRunner().invoke(command, ["new", "day03_my_topic"])
    assert result.exit_code == 0 and "Still to be written by you" in " ".join(result.output.split())
    track = Track.load(copy)
    report = verify(track, track.find("3"), [warm_worker])
    assert report.ok, [step for step in report.steps if not step.ok]
    again = CliRunner().invoke(command, ["new", "day03_my_topic"])
    assert "exists already" in str(again.exception)
    assert "is no name for a kata" in str(CliRunner().invoke(command, ["new", "My Topic"]).exception)


def test_stale_proofs_are_listed(copy, monkeypatch):
    monkeypatch.setenv("KATA_TRACK", str(copy))
    result = CliRunner().invoke(command, ["verify", "--stale"])
    assert result.exit_code == 1 and "day01_scale" in result.output
