"""`kata bench`: what a decoding step of each kind of attention, and of a DeepSeek model, takes on the device at hand."""

from __future__ import annotations

import json
from pathlib import Path

import click

from checker import render
from checker.errors import UserError


def bench(names: tuple[str, ...], *, device: str, seconds: float, json_file: str | None, png_file: str | None) -> None:
    """Measure, print a table, and write the files that are asked for."""
    from checker.bench import plot, report  # they load torch
    from checker.bench.device import prepare

    prepare(device)
    if png_file:
        plot.check()
    for file in (json_file, png_file):
        if file and not Path(file).absolute().parent.is_dir():
            raise UserError(f"The folder of {file} is not there; make it, or name another file.")
    found = report.run(names, device, seconds, lambda what: click.echo(f"measuring {what} ...", err=True))
    _print(found)
    if json_file:
        Path(json_file).write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if png_file and found.rows:
        plot.roofline(found.machine, found.rows, Path(png_file))


def _print(found) -> None:
    from checker.bench import report

    where, machine = render.console(), found.machine
    render.say(
        where,
        f"{machine.name}, {machine.dtype}: copies {machine.copy_bandwidth / 1e9:.1f} GB/s (read plus written), "
        f"multiplies {machine.matmul_rate / 1e9:,.0f} GFLOP/s.",
        "",
    )
    if found.rows:
        shape = found.rows[0].shape
        render.table(report.HEAD, found.lines(), where)
        render.say(
            where,
            "",
            f"One query per row on {shape.batch} x {shape.length} cached tokens of one layer with {shape.heads} heads. GB/s counts the cache, read once; "
            "the roof is its reading at copy speed, or the FLOPs at full rate if that takes longer. The last two columns are beside MHA: "
            "the bytes as they are counted, the time as it was measured.",
        )
    if found.model is not None:
        model = found.model
        render.say(
            where,
            "",
            f"{model.name}: {model.parameters / 1e6:,.0f} M parameters, {model.active / 1e6:,.0f} M of them active; {1 / model.timing.median:.1f} tokens per second, "
            f"{100 / model.timing.median / model.roofline(machine):.0f} % of the {model.roofline(machine):.1f} at which its bytes would be read as fast as they are copied.",
        )
