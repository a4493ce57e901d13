"""Code that a warm worker keeps of the references: used only while the file says the same."""

import importlib
import sys

import pytest

from checker.judge import compiled, modules


@pytest.fixture
def load(tmp_path):
    """load(name) imports a module anew from a folder of references."""
    finder = compiled.Sources({"day02_b": ("/w/day02_b.py", "value = 'yours'\n")}, tmp_path, ["day01_a", "day02_b"])
    finder.install()

    def forget():
        for known in ("day01_a", "day02_b", "reference", "reference.day01_a"):
            sys.modules.pop(known, None)

    def fresh(name):
        forget()
        return importlib.import_module(name)

    yield fresh
    sys.meta_path.remove(finder)
    forget()


def compile_all(folder):
    for step in compiled.steps(folder):
        step()


def test_a_compiled_file_is_run_anew_but_not_compiled_again(tmp_path, load, monkeypatch):
    (tmp_path / "day01_a.py").write_text("import itertools\nvalue = [1]\n\n\ndef line():\n    return 1 / 0\n")
    compile_all(tmp_path)
    monkeypatch.setattr(modules, "compile", lambda *_, **__: pytest.fail("it was compiled again"), raising=False)
    first = load("day01_a")
    first.value.append(2)
    second = load("reference.day01_a")
    assert second.value == [1]
    with pytest.raises(ZeroDivisionError) as raised:
        second.line()
    assert str(raised.traceback[-1].statement).strip() == "return 1 / 0"


def test_a_changed_file_is_noticed_even_before_it_is_compiled_again(tmp_path, load):
    file = tmp_path / "day01_a.py"
    file.write_text("value = 1\n")
    compile_all(tmp_path)
    file.write_text("value = 2\n")
    assert load("day01_a").value == 2
    compile_all(tmp_path)
    assert load("day01_a").value == 2


def test_a_broken_file_fails_where_it_is_needed(tmp_path, load):
    file = tmp_path / "day01_a.py"
    file.write_text("value = 1\n")
    compile_all(tmp_path)
    file.write_text("value = \n")
    compile_all(tmp_path)
    with pytest.raises(SyntaxError):
        load("day01_a")
    file.unlink()
    compile_all(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        load("day01_a")


def test_the_code_of_a_learner_is_never_kept(tmp_path, load):
    (tmp_path / "day02_b.py").write_text("value = 'reference'\n")
    compile_all(tmp_path)
    assert load("day02_b").value == "yours"
