"""Fixtures: the toy track, and checks of toy learners on cold and warm workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from checker import request, verdict
from checker.run import Limits
from checker.track import Track
from checker.worker import Worker

HERE = Path(__file__).parent
TOY = HERE / "toy" / "katas"


@pytest.fixture(scope="session")
def toy() -> Track:
    return Track.load(TOY)


@pytest.fixture(scope="session")
def built_in() -> Track:
    return Track.load(HERE.parent / "katas")


@pytest.fixture(scope="session")
def warm_worker():
    with Worker(warm=True) as worker:
        yield worker


@pytest.fixture
def judged(toy, warm_worker):
    """check(source, ...) -> Verdict for a toy kata, on the session's warm worker."""

    def check(source, day="1", *, worker=None, limits=None, device="cpu", seed=5, only=None, others=None, **options):
        kata = toy.find(day)
        sources = {kata.slug: (f"/workspace/{kata.file_name}", source)}
        for slug, text in (others or {}).items():
            sources[slug] = (f"/workspace/{slug}.py", text)
        asked = request.check(toy, kata, sources, seed=seed, device=device, only=only, **options)
        run = (worker or warm_worker).run(asked, limits or Limits(total=kata.time_limit, import_=3.0))
        found = verdict.judge(kata, run, seed=seed, device=device, only=only)
        check.run = run
        return found

    return check


@pytest.fixture
def learner():
    """The source of a toy learner."""
    return lambda name: (HERE / "toy" / "learners" / f"{name}.py").read_text(encoding="utf-8")
