"""The GRPO loss of day 32 against a scalar loop, token by token, and against what TRL's own trainer computed."""

import json
import math
from pathlib import Path

import pytest
import torch

from reference.day32_deepseek_math import group_advantages, grpo_loss

GOLDEN = json.loads((Path(__file__).parent / "grpo_golden.json").read_text())
CASES = [(aggregate, beta) for aggregate in ("response", "token", "constant") for beta in (0.0, 0.04)]


def scalar_loop(logp, old, ref, advantages, mask, clip, beta, aggregate, max_len):
    """Equation 3 of DeepSeekMath in plain Python numbers."""
    rows = []
    for n, gain in enumerate(advantages):
        terms = []
        for t, counts in enumerate(mask[n]):
            if counts:
                ratio = math.exp(logp[n][t] - old[n][t])
                surrogate = min(ratio * gain, min(max(ratio, 1 - clip), 1 + clip) * gain)
                d = ref[n][t] - logp[n][t]
                terms.append(beta * (math.exp(d) - d - 1) - surrogate)
        rows.append(terms)
    if aggregate == "response":
        return sum(sum(terms) / max(len(terms), 1) for terms in rows) / len(rows)
    total = sum(map(sum, rows))
    return total / (sum(map(len, rows)) if aggregate == "token" else len(rows) * max_len)


def inputs(seed, rows=6, width=5):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=generator, dtype=torch.float64) * 3
    logp = old + 0.4 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    ref = old + 0.3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return logp, old, ref, advantages, torch.arange(width) < lengths[:, None]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("aggregate", "beta"), CASES)
def test_a_scalar_loop(aggregate, beta, seed):
    logp, old, ref, advantages, mask = inputs(seed)
    loss, _ = grpo_loss(logp, old, ref, advantages, mask, beta=beta, aggregate=aggregate, max_len=8)
    numbers = [x.tolist() for x in (logp, old, ref, advantages, mask)]
    assert loss.item() == pytest.approx(scalar_loop(*numbers, 0.2, beta, aggregate, 8), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_what_trl_computes(number):
    case = GOLDEN["cases"][number]
    tensors = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("logp", "old", "ref", "advantages")}
    logp = tensors["logp"].requires_grad_()
    loss, _ = grpo_loss(
        logp,
        tensors["old"],
        tensors["ref"],
        tensors["advantages"],
        torch.tensor(case["mask"]),
        clip=case["clip"],
        beta=case["beta"],
        aggregate=case["aggregate"],
        max_len=case["max_len"],
    )
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(logp.grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-4, atol=1e-7)


def test_trls_advantages():
    rewards = torch.tensor(GOLDEN["rewards"], dtype=torch.float64)
    wanted = torch.tensor(GOLDEN["advantages"], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards), wanted, rtol=1e-5, atol=1e-6)
