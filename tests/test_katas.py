"""Every kata of the track: its proof is fresh, its reference passes with a seed of the day, its lesson's example runs."""

import secrets
from pathlib import Path

import pytest

from checker import authoring, proof, request, verdict
from checker.track import Track
from checker.verify import verify

TRACK = Track.load(Path(__file__).parent.parent / "katas")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("slug", TRACK.slugs)
def test_the_kata_is_proven(slug, warm_worker):
    kata = TRACK.kata(slug)
    report = verify(TRACK, kata, [warm_worker])
    assert report.ok, "\n".join(problem for step in report.steps for problem in step.problems)
    assert report.facts["score"] >= 0.95


@pytest.mark.parametrize("slug", TRACK.slugs)
def test_its_stored_proof_is_fresh(slug):
    assert proof.is_fresh(TRACK, TRACK.kata(slug)), f"prove it again with `kata verify {slug}`"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("slug", TRACK.slugs)
def test_the_reference_passes_with_fresh_values(slug, warm_worker):
    kata = TRACK.kata(slug)
    source = kata.reference_file.read_text(encoding="utf-8")
    seed = secrets.randbelow(1_000_000)
    asked = request.check(TRACK, kata, {slug: (f"/w/{slug}.py", source)}, seed=seed, trusted=True)
    found = verdict.judge(kata, warm_worker.run(asked, request.limits(kata)), seed=seed, device="cpu")
    bad = [(test.id, test.failure) for task in found.tasks for test in task.tests if test.state != "passed"]
    assert found.outcome == verdict.PASSED and not bad, (seed, found.message, bad)


@pytest.mark.parametrize("slug", TRACK.slugs)
def test_the_example_of_its_lesson_is_true(slug):
    space = {}
    for block in authoring.examples(TRACK.kata(slug)):
        exec(compile(block, f"{slug}/lesson.md", "exec"), space)


@pytest.mark.parametrize("slug", TRACK.slugs)
def test_a_lesson_is_short_and_hands_over_no_solution(slug):
    kata = TRACK.kata(slug)
    lesson = kata.text("lesson.md")
    assert len(lesson.splitlines()) <= 200
    for block in authoring.examples(kata):
        for task in kata.tasks:
            for name in task.names:
                assert f"def {name}(" not in block and f"class {name}(" not in block, name


def test_ids_are_unique_and_days_are_in_order():
    katas = list(TRACK)
    assert len({kata.id for kata in katas}) == len(katas)
    days = [kata.day for kata in katas]
    assert days == sorted(days) and len(set(days)) == len(days)
    for kata in katas:
        assert 4 <= len(kata.core) and sum(task.level == "stretch" for task in kata.tasks) >= 1
        assert all(
            slug in TRACK.slugs and TRACK.slugs.index(slug) < TRACK.slugs.index(kata.slug) for slug in kata.builds_on
        )
