"""A bare pytest plugin with the fixtures of a spec, so that `python -m pytest` can run it on the reference: the baseline."""

import importlib
import os
from pathlib import Path

import pytest
import torch

from checker.judge.given import Given

SLUG = os.environ["KATA_BENCH_SLUG"]
DTYPES = os.environ["KATA_BENCH_DTYPES"].split(",")


def reference():
    return importlib.import_module(f"reference.{SLUG}")


def pytest_configure(config):
    config.addinivalue_line("markers", "task(name): the task of a test")
    given = Given(11, "cpu", Path(config.args[0]).parent, {"solution": reference, "reference": reference})
    config.pluginmanager.register(given, "given")


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [getattr(torch, name) for name in DTYPES], ids=DTYPES)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.config.pluginmanager.get_plugin("given").begin(item.name)
