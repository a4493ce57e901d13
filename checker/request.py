"""What the worker is asked: one plain record per check, with every source text in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from checker.run import Limits
from checker.track import Kata, Track


def check(
    track: Track,
    kata: Kata,
    sources: Mapping[str, tuple[str, str]],
    *,
    seed: int,
    device: str = "cpu",
    only: list[str] | None = None,
    cost: bool = True,
    variant: dict[str, Any] | None = None,
    trusted: bool = False,
    helpers: Mapping[str, str] | None = None,
    lent: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """A request for one check of `kata`.

    `variant` and `trusted` (may import the references) are for `kata verify`;
    `lent` are names of earlier days that the learner has not passed, for which the reference stands in;
    `helpers` are other files of the workspace by name, for a file that imports them. `sources` maps folder names of the track to (path, source): the day's own file, and the files of earlier days that are passed.
    """
    return {
        "mode": "check",
        "kata": {
            "slug": kata.slug,
            "folder": str(kata.folder),
            "tasks": [task.to_json() for task in kata.tasks],
            "dtypes": list(kata.dtypes),
        },
        "sources": {slug: {"path": path, "source": source} for slug, (path, source) in sources.items()},
        "reference": str(track.reference),
        "days": track.slugs if kata.slug in track.slugs else [*track.slugs, kata.slug],
        "device": device,
        "seed": seed,
        "only": only,
        "cost": cost,
        "variant": variant,
        "trusted": trusted,
        "helpers": dict(helpers or {}),
        "lent": dict(lent or {}),
    }


def limits(kata: Kata, *, device: str = "cpu", diagnosis: float = 6.0) -> Limits:
    """The limits of a check: the kata's time, and no limit on address space where a GPU maps more than any limit allows."""
    memory = Limits.memory
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = min(memory, int(0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return Limits(total=kata.time_limit, diagnosis=diagnosis, memory=memory if device == "cpu" else 0)
