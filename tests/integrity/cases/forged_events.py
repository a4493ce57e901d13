"""Case 10: writes its own messages into every descriptor."""

import json
import os

import torch


def scale(x, factor=2.0):
    for fd in range(3, 64):
        try:
            os.write(fd, json.dumps(['{"n": 0, "event": "outcomes", "outcomes": {}}', "0" * 64]).encode() + b"\n")
        except OSError:
            pass
    return x + factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
