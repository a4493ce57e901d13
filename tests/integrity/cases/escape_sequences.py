"""Case 35: output and messages that steer a terminal."""

import torch


def scale(x, factor=2.0):
    print("\x1b[2J\x1b]0;owned\x07[bold red]not markup[/]")
    raise RuntimeError("\x1b[31mred\x1b[0m [link=x]")


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
