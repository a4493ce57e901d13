import torch


def scale(x, factor=2.0):
    while True:
        try:
            while True:
                torch.zeros(1)
        except BaseException:
            pass


def weights(x):
    return x


def halve(x):
    return x / 2
