"""The proof that a kata is sound: `kata verify`.

Its stub fails every task as not implemented; its reference passes on five seeds; each alternative passes; each misconception fails
and is then named as itself; mutants of the reference are killed; stub, reference, spec, lesson and hints agree; the time limit holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from checker import authoring, mutants, proof, request, verdict
from checker.run import Run
from checker.track import Kata, Track
from checker.worker import Worker

SEEDS = (11, 222, 3333, 44444, 555555)
WANTED_SCORE = 0.95
HEADROOM = 3.0  # the reference needs at most a third of the kata's time limit


@dataclass(frozen=True)
class Step:
    """One part of the proof: what was looked at, whether it holds, and what is wrong."""

    name: str
    ok: bool
    summary: str = ""
    problems: tuple[str, ...] = ()


@dataclass
class Report:
    """The steps of one kata's proof, and the facts that are stored when all of them hold."""

    kata: Kata
    steps: list[Step] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    cached: bool = False

    @property
    def ok(self) -> bool:
        """Whether every step holds."""
        return all(step.ok for step in self.steps)


def verify(
    track: Track,
    kata: Kata,
    workers: Sequence[Worker],
    *,
    fresh: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Report:
    """Prove one kata, or take the stored proof if nothing that it depends on has changed.

    The misconceptions are shared out to all `workers`; one does.
    """
    report = Report(kata)
    if not fresh and proof.is_fresh(track, kata):
        report.facts, report.cached = proof.stored(kata) or {}, True
        report.steps.append(Step("proof", True, "stored, and nothing it depends on has changed"))
        return report
    for step in _Proof(track, kata, workers, report).steps():
        report.steps.append(step)
        if on_step is not None:
            on_step(step)
    if report.ok:
        proof.save(track, kata, report.facts)
    return report


class _Proof:
    def __init__(self, track: Track, kata: Kata, workers: Sequence[Worker], report: Report) -> None:
        self.track, self.kata, self.workers, self.facts = track, kata, workers, report.facts
        self.path = f"/kata/{kata.file_name}"
        self.reference = kata.reference_file.read_text(encoding="utf-8") if kata.reference_file.is_file() else ""
        self.durations: dict[str, float] = {}

    def steps(self) -> Iterator[Step]:
        files = authoring.problems(self.kata)
        yield Step("files", not files, "stub, reference, lesson, hints and decorators agree", tuple(files))
        if any(
            "missing" in problem or "line" in problem or "has no" in problem
            for problem in files
            if "docstring" not in problem
        ):
            return
        yield self.stub()
        reference = self.of_reference()
        yield reference
        if not reference.ok:
            return
        yield self.alternatives()
        yield self.misconceptions()
        yield self.mutants()

    def run(self, source: str, worker: Worker | None = None, **options: Any) -> Run:
        options = {"seed": SEEDS[0], "cost": False, "trusted": True, **options}
        asked = request.check(self.track, self.kata, {self.kata.slug: (self.path, source)}, **options)
        return (worker or self.workers[0]).run(asked, request.limits(self.kata, diagnosis=60.0))

    def judged(self, source: str, **options: Any) -> tuple[verdict.Verdict, Run]:
        run = self.run(source, **options)
        return verdict.judge(
            self.kata, run, seed=options.get("seed", SEEDS[0]), device="cpu", only=options.get("only")
        ), run

    def stub(self) -> Step:
        found, run = self.judged(self.kata.text("stub.py"))
        problems = (
            [] if found.outcome == verdict.FAILED else [f"the stub's check ended as {found.outcome}: {found.message}"]
        )
        for task in found.tasks:
            for test in task.tests:
                if test.state != "open":
                    problems.append(f"{test.id} of {task.name} is {test.state!r} on the stub, not 'open'{_why(test)}")
        return Step("stub", not problems, f"fails {len(found.tasks)} tasks as not implemented", tuple(problems))

    def of_reference(self) -> Step:
        problems, slowest = [], 0.0
        for seed in SEEDS:
            found, run = self.judged(self.reference, seed=seed, cost=seed == SEEDS[0])
            problems += [f"seed {seed}: {text}" for text in _not_passed(found)]
            problems += [f"cost case of {event['task']}: {event['message']}" for event in run.of("no_cost")]
            seconds = sum(event["seconds"] for event in run.of("finish"))
            slowest = max(slowest, seconds)
            for event in run.of("finish"):
                self.durations[event["test"]] = max(event["seconds"], self.durations.get(event["test"], 0.0))
            if problems:
                break
        if slowest * HEADROOM > self.kata.time_limit:
            problems.append(
                f"the tests take {slowest:.1f} s; time_limit {self.kata.time_limit:g} must be three times that"
            )
        self.facts.update(tests=len(self.durations), seconds=round(slowest, 2), seeds=len(SEEDS))
        return Step(
            "reference",
            not problems,
            f"passes {len(self.durations)} tests on {len(SEEDS)} seeds in {slowest:.2f} s",
            tuple(problems),
        )

    def alternatives(self) -> Step:
        rounds = authoring.alternative_rounds(self.kata)
        problems = []
        for number in range(rounds):
            for seed in SEEDS[:2]:
                found, _ = self.judged(self.reference, variant={"alternatives": number}, seed=seed)
                problems += [f"round {number + 1}, seed {seed}: {text}" for text in _not_passed(found)]
                for task in found.tasks:
                    problems += [f"round {number + 1}: {task.name} is taken for {item['id']}" for item in task.named]
        names = {name for _, name in authoring.decorated(self.kata.text("alternatives.py"), "alternative")}
        self.facts.update(alternatives=rounds)
        return Step("alternatives", not problems, f"{len(names)} names in {rounds} rounds pass", tuple(problems))

    def misconceptions(self) -> Step:
        known = authoring.misconceptions(self.kata)
        todo = list(enumerate(known))
        problems: dict[int, str] = {}

        def work(worker: Worker) -> None:
            while True:
                try:
                    number, (identity, name) = todo.pop(0)
                except IndexError:
                    return
                problem = self.misconception(identity, name, worker)
                if problem:
                    problems[number] = problem

        with ThreadPoolExecutor(len(self.workers)) as pool:
            list(pool.map(work, self.workers))
        self.facts.update(misconceptions=[identity for identity, _ in known])
        found = tuple(problems[number] for number in sorted(problems))
        return Step(
            "misconceptions", not found, f"{len(known) - len(found)} of {len(known)} are named as themselves", found
        )

    def misconception(self, identity: str, name: str, worker: Worker) -> str:
        """What is wrong with one misconception, or ''."""
        task = next((task for task in self.kata.tasks if name in task.names), None)
        if task is None:
            return f"{identity} replaces {name}, which is no name of a task"
        found, _ = self.judged(self.reference, worker=worker, variant={"misconception": identity}, only=[task.name])
        if found.outcome not in (verdict.FAILED, verdict.PASSED):
            return f"{identity} ended as {found.outcome}: {found.message}"
        result = found.tasks[0]
        named = [item["id"] for item in result.named]
        if result.state == "passed":
            return f"{identity} passes every test of {task.name}"
        if named == [identity]:
            return ""
        failing = ", ".join(f"{test.id} ({test.state})" for test in result.failing) or result.state
        return f"{identity} is named as {', '.join(named) or 'nothing'}; it fails {failing}"

    def mutants(self) -> Step:
        names = [name for task in self.kata.tasks for name in task.names]
        made = mutants.generate(self.reference)
        reach = mutants.reachable(self.reference, names)
        every = [task.name for task in self.kata.tasks]
        jobs = []
        for mutant in made:
            reached = reach.get(mutant.top, set())
            tasks = [task.name for task in self.kata.tasks if reached.intersection(task.names)] or every
            jobs.append({"key": mutant.key, "source": mutant.source, "tasks": tasks})
        asked = request.check(
            self.track,
            self.kata,
            {self.kata.slug: (self.path, self.reference)},
            seed=SEEDS[0],
            cost=False,
            trusted=True,
        )
        asked.update(mode="mutants", mutants=jobs, durations=self.durations, jobs=os.cpu_count() or 1)
        run = self.workers[0].run(asked, request.limits(self.kata))
        killed = {event["key"]: event["killed_by"] for event in run.of("mutant")}
        problems = []
        if len(killed) != len(jobs):
            fault = run.first("fault") or {"message": run.output.text()[-300:]}
            problems.append(f"only {len(killed)} of {len(jobs)} mutants were tried ({run.ended}): {fault['message']}")
        survivors = [mutant for mutant in made if mutant.key in killed and killed[mutant.key] is None]
        for mutant in survivors:
            if mutant.key not in self.kata.equivalents:
                problems.append(f"line {mutant.line}: survives: {mutant.key}")
        alive = {mutant.key for mutant in survivors}
        for key in self.kata.equivalents:
            if key not in alive:
                problems.append(f"kata.toml explains a mutant that does not survive: {key}")
        score = 1.0 if not made else (len(made) - len(survivors)) / len(made)
        if score < WANTED_SCORE:
            problems.append(f"the mutation score is {score:.1%}, below {WANTED_SCORE:.0%}")
        self.facts.update(mutants=len(made), killed=len(made) - len(survivors), score=round(score, 4))
        summary = (
            f"{len(made) - len(survivors)} of {len(made)} killed ({score:.1%}), {len(survivors)} explained or alive"
        )
        return Step("mutants", not problems, summary, tuple(problems))


def _not_passed(found: verdict.Verdict) -> list[str]:
    problems = [] if found.outcome in (verdict.PASSED, verdict.FAILED) else [f"{found.outcome}: {found.message}"]
    for task in found.tasks:
        problems += [
            f"{test.id} of {task.name} is {test.state!r}{_why(test)}" for test in task.tests if test.state != "passed"
        ]
        if not task.tests and not problems:
            problems.append(f"{task.name} has no tests")
    return problems


def _why(test: verdict.TestResult) -> str:
    if not test.failure:
        return ""
    lines = "; ".join(f"{label} {text}" for label, text in test.failure["lines"])
    error = test.failure.get("error", "")
    return f": {error + ': ' if error else ''}{test.failure['message'][:300]} {lines[:400]}".rstrip()
