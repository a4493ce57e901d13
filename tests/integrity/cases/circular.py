"""Case 50: imports itself."""

from day01_scale import scale  # noqa: F401
