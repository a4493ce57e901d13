"""The roofline as a picture. Needs matplotlib, which the extra `plots` installs."""

from __future__ import annotations

from pathlib import Path

from checker.bench.attention import Row
from checker.bench.device import Machine
from checker.errors import UserError


def check() -> None:
    """Raise UserError where matplotlib is missing, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "A picture needs matplotlib: install it with pip install 'torch-katas[plots]', or leave out --png."
        ) from None


def roofline(machine: Machine, rows: list[Row], file: Path) -> None:
    """Draw every variant at (FLOPs per byte of cache, FLOP/s) under the measured roof; bytes are those of the cache, read once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ridge = machine.matmul_rate / machine.copy_bandwidth
    left = min([row.intensity for row in rows] + [0.3]) / 2
    right = max([row.intensity for row in rows] + [ridge]) * 4
    axes.loglog(
        [left, ridge, right],
        [left * machine.copy_bandwidth / 1e9, machine.matmul_rate / 1e9, machine.matmul_rate / 1e9],
        color="black",
        label=f"measured: {machine.copy_bandwidth / 1e9:,.0f} GB/s, {machine.matmul_rate / 1e9:,.0f} GFLOP/s",
    )
    for row, marker in zip(rows, "osD^v", strict=False):
        axes.loglog(
            row.intensity,
            row.flops / row.timing.median / 1e9,
            marker,
            markersize=9,
            linestyle="none",
            label=row.variant,
        )
    axes.set_xlabel("FLOPs per byte of the cache")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"One decoding step of attention, {machine.name}, {machine.dtype}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right", fontsize="small")
    FigureCanvasAgg(figure).print_png(str(file))
