"""What a command works with: the track, the workspace and the store, each found when it is first asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import click

from checker.errors import NOT_PASSED, UserError
from checker.track import Kata, Track
from checker.workspace import Workspace
from progress import Store, StoreError


class App:
    """One run of the program; `track_folder` is what --track or KATA_TRACK named."""

    def __init__(self, track_folder: str | None = None) -> None:
        self.track_folder = track_folder

    @cached_property
    def track(self) -> Track:
        """The track that is worked on."""
        return Track.load(Path(self.track_folder).expanduser() if self.track_folder else built_in_track())

    @cached_property
    def workspace(self) -> Workspace:
        """The learner's folder; raises UserError if there is none."""
        found = Workspace.find()
        if found is None:
            named = os.environ.get("KATA_WORKSPACE")
            where = (
                f"KATA_WORKSPACE names {named}, which is none"
                if named
                else "neither here, nor above, nor in ./torch-katas"
            )
            raise UserError(f"There is no workspace ({where}); `kata next` makes one and fetches the first exercise.")
        return found

    @contextmanager
    def store(self) -> Iterator[Store]:
        """The progress store, open; its errors become UserErrors."""
        try:
            with Store.open(self.workspace.database) as store:
                if store.damaged_kept_at is not None:
                    click.echo(
                        f"kata: the progress file was damaged; it is kept as {store.damaged_kept_at}, and a new one was begun.",
                        err=True,
                    )
                yield store
        except StoreError as error:
            raise UserError(str(error), exit_code=NOT_PASSED) from None

    def kata(self, day: str | None) -> Kata:
        """The day that is meant: the one named, else the one whose file was saved last."""
        if day is not None:
            return self.track.find(day)
        slug = self.workspace.last_edited(self.track)
        if slug is None:
            raise UserError("No exercise is fetched yet; `kata next` fetches the first one.")
        return self.track.kata(slug)


def built_in_track() -> Path:
    """The folder katas/ that came with the program; raises UserError if another package took one of our names."""
    import katas

    folder = Path(next(iter(katas.__path__)))
    for name in ("katas", "reference", "checker", "progress"):
        if not _ours(name):
            raise UserError(
                f"Another installed package also provides {name!r}; install torch-katas into a virtual environment of its own."
            )
    return folder


def _ours(name: str) -> bool:
    """Whether an importable top-level package lies beside this program."""
    module = __import__(name)
    home = Path(__file__).resolve().parent.parent
    return any(Path(path).resolve().parent == home for path in module.__path__)


def intruders() -> dict[str, list[str]]:
    """Our top-level names that another distribution claims, too. Slow: for `kata doctor`."""
    import importlib.metadata

    owners = importlib.metadata.packages_distributions()
    names = ("katas", "reference", "checker", "progress")
    return {name: [owner for owner in owners.get(name, []) if owner != "torch-katas"] for name in names}
