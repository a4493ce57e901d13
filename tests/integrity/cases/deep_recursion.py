"""Case 42: recursion without end and without the interpreter's limit."""

import sys

import torch


def scale(x, factor=2.0):
    sys.setrecursionlimit(10**9)
    return scale(x, factor)


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
