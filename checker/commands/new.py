"""`kata new`: a kata from a template that is green except for what its author must still write."""

from __future__ import annotations

import re
from pathlib import Path

from checker import render
from checker.app import App
from checker.errors import UserError
from checker.track import day_of
from checker.workspace import write_whole

FILES = {
    "kata.toml": """\
id = "{id}"
title = "{title}"
minutes = 60
concepts = ["what was learned, in a few words"]
builds_on = []
devices = ["cpu", "cuda", "mps"]
dtypes = ["float32"]
time_limit = 30

[[task]]
name = "scale"
level = "core"
minutes = 5
summary = "multiply by a number"
""",
    "stub.py": '''\
"""Day {day}: {title}."""

from torch import Tensor


def scale(x: Tensor, factor: float) -> Tensor:
    """Multiply every element of x (any shape) by `factor`; the result has the shape, dtype and device of x."""
    raise NotImplementedError
''',
    "spec.py": """\
import torch

from checker.testing import assert_close, cost_case, task


@task("scale")
def test_every_element_is_multiplied(solution, randn):
    x = randn(2, 3)
    expected = torch.from_numpy(x.cpu().numpy() * 3.0)
    assert_close(solution.scale(x, 3.0), expected, because="scale(x, 3) is 3 * x")


@cost_case("scale")
def scale_cost(module, randn):
    x = randn(64, 64)
    return lambda: module.scale(x, 3.0)
""",
    "misconceptions.py": """\
from checker.testing import misconception


@misconception("scale", "The factor was added where it should multiply.")
def scale__added(x, factor):
    return x + factor
""",
    "alternatives.py": """\
import torch

from checker.testing import alternative


@alternative("scale")
def scale(x, factor):
    return torch.mul(x, factor)
""",
    "hints.md": """\
# Hints

## scale

1. Look at what one element becomes.
2. A tensor times a number is elementwise.
3. One operator between the two arguments, and return the result.
""",
    "lesson.md": """\
# {title}

`scale` multiplies every element of a tensor by a number.

```python
import torch

x = torch.tensor([1.0, 2.0])
assert (x * 3).tolist() == [3.0, 6.0]
```
""",
}
REFERENCE = '''\
"""{title}."""

from torch import Tensor


def scale(x: Tensor, factor: float) -> Tensor:
    """x times factor."""
    return x * factor
'''


def new(app: App, slug: str) -> None:
    """Write the folder and the reference module, put the kata into track.toml, and say what is to be written."""
    if day_of(slug) is None or slug != slug.lower():
        raise UserError(f"{slug!r} is no name for a kata; use dayNN_words_in_lower_case, for instance day33_my_topic.")
    track = app.track
    folder, reference = track.folder / slug, track.reference / f"{slug}.py"
    for there in (folder, reference):
        if there.exists():
            raise UserError(f"{there} exists already; choose another name, nothing was changed.")
    words = slug.partition("_")[2]
    title = words.replace("_", " ").capitalize()
    values = {"id": words.replace("_", "-"), "title": title, "day": day_of(slug)}
    try:
        folder.mkdir()
        reference.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}.") from None
    for name, text in FILES.items():
        write_whole(folder / name, _fill(text, values))
    write_whole(reference, _fill(REFERENCE, values))
    listed = _list(track.folder / "track.toml", slug)
    render.say(
        render.console(),
        f"{folder} and {reference} are there; `kata verify {slug}` is green for them as they are.",
        "" if listed else f"Add {slug!r} to a phase of {track.folder / 'track.toml'}.",
        "They are about a function `scale`. Still to be written by you: the lesson, the tasks in kata.toml, their stubs with every promise, "
        "the reference, a spec with independent oracles, hints, the mistakes that you know, and one other solution. "
        "CONTRIBUTING.md has the format and the checklist.",
    )


def _fill(text: str, values: dict[str, object]) -> str:
    return re.sub(r"\{(id|title|day)\}", lambda match: str(values[match[1]]), text)


def _list(file: Path, slug: str) -> bool:
    """Add the kata to the last phase of track.toml; False if its form is not the usual one."""
    text = file.read_text(encoding="utf-8")
    lists = list(re.finditer(r"^katas\s*=\s*\[(.*?)\]", text, re.S | re.M))
    if not lists:
        return False
    last = lists[-1]
    inner = last[1].rstrip().rstrip(",")
    if "\n" in last[1]:
        changed = f'katas = [{inner},\n    "{slug}",\n]' if inner.strip() else f'katas = [\n    "{slug}",\n]'
    else:
        changed = f'katas = [{inner}, "{slug}"]' if inner.strip() else f'katas = ["{slug}"]'
    write_whole(file, text[: last.start()] + changed + text[last.end() :])
    return True
