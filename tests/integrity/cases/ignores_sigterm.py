"""Case 58: ignores every signal that can be ignored."""

import signal

import torch


def scale(x, factor=2.0):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
