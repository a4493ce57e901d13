"""`kata bench`: its counts are exact, its table and files say what was measured, and a missing device is one sentence."""

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner

from checker.bench import attention, device, model, report
from checker.cli import kata
from checker.judge.meter import measure


@pytest.fixture
def small(monkeypatch):
    """A CPU whose budget is a megabyte."""
    monkeypatch.setattr(device.Device, "budget", lambda self: 1 << 20)
    monkeypatch.setattr(model, "_CONTEXT", 8)
    threads = torch.get_num_threads()
    yield device.Device("cpu", seconds=0.01)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", attention.VARIANTS)
def test_counts_are_those_of_the_meter(small, variant):
    shape = attention.Shape(batch=2, length=24, heads=4, head_dim=8, groups=2, latent=16, rope=4)
    step, cache = attention._MAKERS[variant](small, shape)
    with torch.no_grad():
        assert measure(step)[1].flops == shape.flops(variant)
    assert cache.nbytes == shape.batch * shape.length * shape.elements(variant) * 4
    assert cache.length == shape.length
    row = attention.measure(small, shape, variant)
    assert row.bytes_read == row.cache_bytes and row.timing.median > 0


def test_the_default_shape_is_the_one_of_the_claim():
    shape = attention.Shape(1, 1)
    assert round(shape.elements("mha") / shape.elements("mla absorbed"), 2) == 28.44
    assert shape.elements("gqa") * 8 == shape.elements("mqa") * 64 == shape.elements("mha")


def test_latent_orders_agree(small):
    shape = attention.Shape(batch=1, length=16, heads=3, head_dim=8, latent=12, rope=4)
    outputs = []
    for variant in ("mla naive", "mla absorbed"):
        torch.manual_seed(3)
        step, _ = attention._MAKERS[variant](small, shape)
        outputs.append(step())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_everything_as_table_and_json(small, tmp_path):
    file = tmp_path / "bench.json"
    done = CliRunner().invoke(kata, ["bench", "--seconds", "0.05", "--json", str(file)])
    assert done.exit_code == 0, done.output
    for variant in attention.VARIANTS:
        assert variant in done.output
    assert "28.44" in done.output and "tokens per second" in done.output
    found = json.loads(file.read_text())
    assert [row["variant"] for row in found["attention"]] == list(attention.VARIANTS)
    assert found["machine"]["copy_bandwidth"] > 0 and found["versions"]["torch"] == torch.__version__
    assert found["model"]["tokens_per_second"] > 0 and found["model"]["bytes_read"] > found["model"]["cache_bytes"]
    for row in found["attention"]:
        assert row["bytes_per_second"] == pytest.approx(row["bytes_read"] / row["timing"]["median"])


def test_a_part_is_measured_beside_mha(small):
    done = CliRunner().invoke(kata, ["bench", "mqa", "--seconds", "0.05"])
    assert done.exit_code == 0, done.output
    assert "mqa" in done.output and "mha" in done.output
    assert "gqa" not in done.output and "tokens per second" not in done.output


def test_what_cannot_be_measured_is_one_sentence(tmp_path):
    if not torch.cuda.is_available():
        done = CliRunner().invoke(kata, ["bench", "--device", "cuda"])
        assert done.exit_code != 0 and "no cuda device" in str(done.exception)
    done = CliRunner().invoke(kata, ["bench", "--json", str(tmp_path / "nowhere" / "x.json")])
    assert done.exit_code != 0 and "is not there" in str(done.exception)
    assert CliRunner().invoke(kata, ["bench", "nonsense"]).exit_code == 2


def test_a_picture_needs_its_extra(small, tmp_path):
    file = tmp_path / "roof.png"
    done = CliRunner().invoke(kata, ["bench", "mla", "--seconds", "0.05", "--png", str(file)])
    if importlib.util.find_spec("matplotlib") is None:
        assert "torch-katas[plots]" in str(done.exception) and not file.exists()
    else:
        assert done.exit_code == 0 and file.read_bytes().startswith(b"\x89PNG")


def test_the_ratio_is_left_open_without_mha(small):
    machine = device.Machine("x", "cpu", "float32", 1, 1, 1e9, 1e9)
    shape = attention.Shape(1, 16, heads=2, head_dim=4, latent=8, rope=2)
    rows = [attention.measure(small, shape, "mqa")]
    assert report.Report(machine, rows, None).lines()[0][-1] == "-"
