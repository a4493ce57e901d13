"""Case 29: kills the process that started it."""

import os
import signal

import torch


def scale(x, factor=2.0):
    os.kill(os.getppid(), signal.SIGKILL)
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
