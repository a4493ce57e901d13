"""A bare pytest plugin with the fixtures of a spec, so that `python -m pytest` can run it on the reference: the baseline."""

import importlib
import os
from pathlib import Path

import pytest
import torch

from checker.judge.given import Values, derive

SLUG = os.environ["KATA_BENCH_SLUG"]
DTYPES = os.environ["KATA_BENCH_DTYPES"].split(",")


def pytest_configure(config):
    config.addinivalue_line("markers", "task(name): the task of a test")


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [getattr(torch, name) for name in DTYPES], ids=DTYPES)


@pytest.fixture
def reference():
    return importlib.import_module(f"reference.{SLUG}")


@pytest.fixture
def solution(reference):
    return reference


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.fixture
def seed(request):
    return derive(11, request.node.name)


@pytest.fixture
def data_dir(request):
    return Path(request.fspath).parent / "data"


@pytest.fixture
def _values(seed, device):
    return Values(seed, device)


for _name in ("randn", "rand", "randint", "randperm"):

    def _make(name):
        @pytest.fixture(name=name)
        def fixture(_values):
            return getattr(_values, name)

        return fixture

    globals()[f"fixture_{_name}"] = _make(_name)


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed + 1)
