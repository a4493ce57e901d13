from checker.testing import misconception


@misconception("twice", "The factor was doubled, not squared.")
def twice__doubled(x, factor):
    return x * (2 * factor)
