"""Comparisons of the references with the classes of transformers, run offline on one thread."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for `tiny`
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20)
    yield
    torch.set_num_threads(before)
