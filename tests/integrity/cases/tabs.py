"""Case 49: tabs and blanks mixed."""


def scale(x, factor=2.0):
	if True:
        return x * factor
