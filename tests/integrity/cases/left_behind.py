"""Case 32: a process that detaches itself and ignores SIGTERM."""

import os
import signal
import time

import torch


def scale(x, factor=2.0):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            time.sleep(120)
        os._exit(0)
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
