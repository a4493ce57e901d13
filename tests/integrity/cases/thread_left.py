"""Case 47: a thread that goes on."""

import threading
import time

import torch


def scale(x, factor=2.0):
    threading.Thread(target=time.sleep, args=(60,), name="sleeper").start()
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
