"""The time limit of a test's function, by the means of pytest_timeout but without its work around each test."""

from __future__ import annotations

import signal

import pytest
import pytest_timeout


class Timer:
    """`begin` before a test's function, `end` after it; where there are signals, the function then ends with pytest's Failed.

    The handler is set once: setting it anew for each test takes longer than many a test. Code that sets another one meets the
    limit of the worker, which is a little later and ends the whole check.
    """

    def __init__(self) -> None:
        self._test: tuple[pytest.Item, pytest_timeout.Settings] | None = None
        self._signals = pytest_timeout.DEFAULT_METHOD == "signal"
        if self._signals:
            signal.signal(signal.SIGALRM, self._late)

    def begin(self, item: pytest.Item, seconds: float) -> None:
        """Start to count for a test."""
        settings = pytest_timeout.Settings(seconds, pytest_timeout.DEFAULT_METHOD, True, True)
        self._test = item, settings
        if self._signals:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        else:
            pytest_timeout.pytest_timeout_set_timer(item, settings)

    def end(self) -> None:
        """The function has come back: a signal that comes now means nothing."""
        item, self._test = self._test[0], None
        if self._signals:
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            pytest_timeout.pytest_timeout_cancel_timer(item)

    def _late(self, number: int, frame: object) -> None:
        if self._test is not None:
            pytest_timeout.timeout_sigalrm(*self._test)
