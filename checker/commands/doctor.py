"""`kata doctor`: the installation, the devices, and which protections are active on this machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import checker
from checker import render
from checker.app import App, intruders
from checker.errors import NOT_PASSED, PASSED, UserError
from checker.judge import processes
from checker.worker import can_fork, environment
from checker.workspace import Workspace

_LOOK = """
import json, sys
sys.path.append(sys.argv[1])
facts = {}
try:
    import torch
    facts["torch"] = torch.__version__
    facts["cuda"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    facts["mps"] = bool(torch.backends.mps.is_available())
    import numpy, pytest, pytest_timeout
    facts["numpy"], facts["pytest"] = numpy.__version__, pytest.__version__
except Exception as error:
    facts["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(facts))
"""


def doctor(app: App) -> int:
    """Print what was found; 0 if a check can run here."""
    where, bad = render.console(), []
    facts = _facts()
    rows = [
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("system", f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"),
        ("torch", facts.get("torch") or f"does not import: {facts.get('error', 'no answer')}"),
        ("pytest", facts.get("pytest", "missing")),
        ("cuda", facts.get("cuda") or "none: `--device cuda` answers 'not run'"),
        ("mps", "yes" if facts.get("mps") else "none: `--device mps` answers 'not run'"),
    ]
    if "error" in facts or "torch" not in facts:
        bad.append("torch or pytest does not import: install torch-katas into a virtual environment of its own")
    for name, owners in intruders().items():
        if owners:
            bad.append(
                f"the package {name!r} also belongs to {', '.join(owners)}: use a virtual environment of its own"
            )
    rows += _workspace(bad)
    rows += [
        ("process tree", "every process that your code leaves behind is found and ended" if processes.adopt_orphans()
         else "only the check's own process group is ended: a process that detaches itself can survive"),
        ("warm checks", "forked from a process that has loaded torch" if can_fork() else "not safe on this system: every check starts cold"),
        ("memory limit", "active" if processes.LINUX else "not available on this system"),
        ("scratch", f"{shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.1f} GB free in {tempfile.gettempdir()}"),
    ]  # fmt: skip
    render.table(("what", "found"), rows, where)
    for text in bad:
        render.say(where, "", f"  mend: {text}")
    if not bad:
        render.say(where, "", "  a check can run here")
    return NOT_PASSED if bad else PASSED


def _facts() -> dict[str, object]:
    root = str(Path(checker.__file__).resolve().parent.parent)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _LOOK, root],
            capture_output=True,
            text=True,
            timeout=180,
            env=environment(),
            check=False,
        )
        return json.loads(done.stdout.strip().split("\n")[-1])
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}


def _workspace(bad: list[str]) -> list[tuple[str, str]]:
    try:
        found = Workspace.find()
    except UserError as error:
        bad.append(str(error))
        return [("workspace", "two of them")]
    if found is None:
        return [("workspace", "none yet: `kata next` makes one")]
    if not os.access(found.root, os.W_OK):
        bad.append(f"{found.root} cannot be written")
    shadows = [
        file.name
        for file in found.root.glob("*.py")
        if file.stem in sys.stdlib_module_names or file.stem in ("torch", "numpy")
    ]
    if shadows:
        bad.append(
            f"{', '.join(shadows)} in the workspace carries the name of a library; checks ignore it, other tools may not: rename it"
        )
    return [("workspace", str(found.root))]
