"""SIGKILL at random moments of `kata check`: the store opens, no recorded attempt is lost, the learner's file is as it was."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from progress import Store

TOY = Path(__file__).parent / "toy" / "katas"
KILLS = int(os.environ.get("KATA_KILLS", "12"))


@pytest.mark.timeout(60 + 10 * KILLS)
def test_nothing_is_lost_when_a_check_is_killed(tmp_path, learner):
    environment = {**os.environ, "KATA_TRACK": str(TOY)}
    environment.pop("KATA_WORKSPACE", None)

    def kata(*words):
        return [sys.executable, "-m", "checker", *words]

    subprocess.run(kata("next"), cwd=tmp_path, env=environment, check=True, capture_output=True)
    workspace = tmp_path / "torch-katas"
    file, source = workspace / "day01_scale.py", learner("passes")
    file.write_text(source)
    started = time.monotonic()
    subprocess.run(kata("check"), cwd=workspace, env=environment, check=True, capture_output=True)
    whole = time.monotonic() - started
    recorded = {attempt.id for attempt in attempts(workspace)}
    assert len(recorded) == 1
    moments = random.Random(8)
    landed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            kata("check"), cwd=workspace, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # half of the kills fall into the end, where the verdict is shown and saved
        moment = moments.random() * whole if moments.random() < 0.5 else whole * (0.8 + 0.3 * moments.random())
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            landed += 1
        now = {attempt.id for attempt in attempts(workspace)}
        assert recorded <= now, "a recorded attempt is gone"
        recorded = now
        assert file.read_text() == source
    assert landed > 0
    assert not [name for name in os.listdir(workspace / ".kata") if "damaged" in name]
    subprocess.run(kata("check"), cwd=workspace, env=environment, check=True, capture_output=True)


def attempts(workspace):
    with Store.open(workspace / ".kata" / "progress.db") as store:
        return store.attempts()
