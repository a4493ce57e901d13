"""Case 48: removes the folder it runs in."""

import os
import shutil

import torch


def scale(x, factor=2.0):
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
