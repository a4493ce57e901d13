"""The wheel has everything: installed into an environment away from the checkout, it fetches, checks and proves."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("checker", "progress", "reference", "katas", "torch_katas", "__editable__", "__pycache__")


@pytest.mark.timeout(400)
def test_the_wheel_works_away_from_the_checkout(tmp_path):
    def run(*words, ok=(0,)):
        done = subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, cwd=tmp_path, env=clean, check=False
        )
        assert done.returncode in ok, done.stdout + done.stderr
        return done.stdout

    clean = {key: value for key, value in os.environ.items() if not key.startswith(("KATA_", "PYTHON"))}
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", source
    )
    wheel = next((tmp_path / "dist").glob("*.whl"))
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    # the libraries it needs, by links, without this project's own editable install
    site = next((venv / "lib").glob("python*")) / "site-packages"
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(OURS) and entry.suffix != ".pth" and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        venv / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
    )
    kata = venv / "bin" / "kata"
    assert str(site) in run(venv / "bin" / "python", "-c", "import checker; print(checker.__file__)")
    assert "day01_tensor_basics.py" in run(kata, "next")
    assert "not written yet" in run(kata, "check", ok=(1,))
    assert "stored, and nothing it depends on has changed" in run(kata, "verify", "1")
    assert "proven" in run(kata, "verify", "1", "--fresh")
