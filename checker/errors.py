"""Errors that are somebody's to mend: one sentence that says what is wrong and what to do."""

from __future__ import annotations

PASSED, NOT_PASSED, USAGE, FAULT, INTERRUPTED = 0, 1, 2, 3, 130


class UserError(Exception):
    """What the person at the keyboard can mend: shown as one sentence, without a traceback.

    `exit_code` is 2 (usage) unless said otherwise.
    """

    def __init__(self, message: str, *, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TrackError(UserError):
    """A mistake in a track, kata or its files: names file, key and line."""


class OurFault(Exception):
    """The program or a spec broke; never charged to the learner (exit code 3)."""
