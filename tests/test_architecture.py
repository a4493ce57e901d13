"""The shape of the program: who may import what, how long a module may be, and that README and CI agree."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "checker").rglob("*.py"))
# Modules above 400 lines, with the reason.
LONG = {
    "judge/meter.py": "one table of what each operation costs, beside the mode that reads it",
    "mutants.py": "one small function per mutation operator",
    "watch.py": "one screen",
}


def imports(file):
    """(top-level package, whether it is at the module's top) of every import."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            yield name.partition(".")[0], node in tree.body


def name_of(file):
    return file.relative_to(ROOT / "checker").as_posix()


def test_only_the_judge_the_bench_and_testing_import_torch():
    users = {name_of(file) for file in MODULES if any(name == "torch" for name, _ in imports(file))}
    assert {name for name in users if not name.startswith(("judge/", "bench/")) and name != "testing.py"} == set()
    assert users


def test_only_render_imports_rich_and_only_watch_textual():
    assert {name_of(file) for file in MODULES if any(name == "rich" for name, _ in imports(file))} == {"render.py"}
    assert {
        name_of(file) for file in MODULES if any(name in ("textual", "watchfiles") for name, _ in imports(file))
    } == {"watch.py"}


def test_modules_are_short_or_say_why():
    long = {name_of(file) for file in MODULES if len(file.read_text(encoding="utf-8").splitlines()) > 400}
    assert long <= set(LONG)


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```sh\n(.*)\n```", readme, re.M)
    setup, test = commands[0], commands[1]
    assert setup.startswith("python3 -m venv .venv && ") and setup.endswith("kata next && .venv/bin/kata check")
    assert test.startswith("python3 -m venv .venv && ") and test.endswith("-m pytest")
    assert "\n" not in setup and "\n" not in test
    assert test in (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("\n")


def test_the_docs_name_no_file_that_is_not_there():
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([\w./-]+)\)", (ROOT / document).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), target
