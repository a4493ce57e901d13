"""What a worker loads before it may fork, and what a warm one and its spare fork do while nobody asks."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_TRIVIAL = """
import pytest

@pytest.fixture
def one():
    return 1

@pytest.fixture
def two(one):
    return 2

@pytest.mark.parametrize("three", range(30))
def test_parameters(two, three):
    assert two == 2

def test_plain(one):
    assert one == 1
"""


def preload() -> None:
    """Import what every check needs. Nothing here may start a thread or touch a device: each fork would inherit a broken one."""
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import checker.judge.child
    import checker.judge.plugin
    import checker.testing  # noqa: F401

    torch.set_num_threads(1)


def steps() -> list[Callable[[], None]]:
    """What a warm worker does while nobody asks: it imports what torch loads late, step by step, so that no check pays for it.

    The first check does not wait for any of it, so a warm worker's first verdict comes when a cold one would have come.
    """
    return [_compiler, _libraries, _session, _freeze]


def rehearse() -> None:
    """What a fork does while it waits for its check: it copies the pages that every check writes to.

    Python counts references in the objects themselves, so a fork that only uses what the worker has loaded copies thousands of pages,
    at some microseconds each. Nothing of this touches a random state or stays in sys.modules.
    """
    from checker.judge import integrity

    _session()
    integrity.changed(integrity.snapshot())


def _compiler() -> None:
    import torch._dynamo  # noqa: F401


def _libraries() -> None:
    import torch.nn.utils
    import torch.optim
    import torch.testing
    import torch.utils.data
    import torch.utils.flop_counter  # noqa: F401

    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def _session() -> None:
    """A trivial session of pytest. Python writes into code that runs often; what was run here is not written again by a fork."""
    import pytest

    from checker.judge.child import pytest_arguments

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with (
        tempfile.TemporaryDirectory(prefix="kata-") as folder,
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        Path(folder, "spec.py").write_text(_TRIVIAL, encoding="utf-8")
        pytest.main(pytest_arguments(folder))
    sys.modules.pop("spec", None)


def _freeze() -> None:
    import gc

    gc.collect()
    gc.freeze()
