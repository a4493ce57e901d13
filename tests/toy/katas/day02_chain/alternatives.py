from checker.testing import alternative


@alternative("twice")
def twice(x, factor):
    return x * factor**2
