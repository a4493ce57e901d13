"""One run of `kata bench`: what was asked for, measured, as rows for a table and as plain data for JSON."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from checker.bench import attention, model
from checker.bench.attention import Row
from checker.bench.device import Device, Machine
from checker.bench.model import ModelRow

NAMES = {"mha": ["mha"], "gqa": ["gqa"], "mqa": ["mqa"], "mla": ["mla naive", "mla absorbed"]}
HEAD = ("attention", "cache/token", "step", "GB/s", "of copy", "FLOP/B", "of roof", "bytes", "time")


@dataclass(frozen=True)
class Report:
    """What one run measured."""

    machine: Machine
    rows: list[Row]
    model: ModelRow | None

    def lines(self) -> list[tuple[str, ...]]:
        """A row of text per variant; the last two columns say how many times less than MHA, counted and measured."""
        base = next((row for row in self.rows if row.variant == "mha"), None)
        return [self._line(row, base) for row in self.rows]

    def roof(self, row: Row) -> float:
        """The seconds of a step that only reads its cache at copy speed or only multiplies at full rate, whichever is more."""
        return max(row.bytes_read / self.machine.copy_bandwidth, row.flops / self.machine.matmul_rate)

    def _line(self, row: Row, base: Row | None) -> tuple[str, ...]:
        shape = row.shape
        fewer = f"/ {shape.elements('mha') / shape.elements(row.variant):.2f}"
        faster = f"/ {base.timing.median / row.timing.median:.2f}" if base else "-"
        return (
            row.variant,
            f"{row.bytes_read // (shape.batch * shape.length):,} B",
            f"{1e3 * row.timing.median:.3f} ms",
            f"{row.bandwidth / 1e9:.2f}",
            f"{100 * row.bandwidth / self.machine.copy_bandwidth:.0f} %",
            f"{row.intensity:.1f}",
            f"{100 * self.roof(row) / row.timing.median:.0f} %",
            fewer,
            faster,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, with the device, the versions and the date."""
        found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": asdict(self.machine),
            "attention": [
                asdict(row)
                | {"bytes_per_second": row.bandwidth, "flops_per_byte": row.intensity, "roof_seconds": self.roof(row)}
                for row in self.rows
            ],
        }
        if self.model is not None:
            found["model"] = asdict(self.model) | {
                "tokens_per_second": 1 / self.model.timing.median,
                "roofline_tokens_per_second": self.model.roofline(self.machine),
            }
        return found


def run(names: Sequence[str], device_name: str, seconds: float, on_row: Callable[[str], None]) -> Report:
    """Measure the device, then what `names` say (of NAMES, and "deepseek"); MHA is always measured beside a variant of attention."""
    device = Device(device_name, seconds)
    on_row("the device itself")
    machine = device.machine()
    wanted = [variant for name in names for variant in NAMES.get(name, [])]
    if wanted and "mha" not in wanted:
        wanted.insert(0, "mha")
    shape = attention.shape_for(device)
    rows = []
    for variant in wanted:
        on_row(variant)
        rows.append(attention.measure(device, shape, variant))
    found = None
    if "deepseek" in names:
        on_row("deepseek")
        found = model.measure(device)
    return Report(machine, rows, found)
