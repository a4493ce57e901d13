import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    measure,
    noncontiguous,
    task,
    unchanged,
)

HALVES = [torch.float16, torch.bfloat16]
SUMS = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}
MARGIN = 1e-3
HALF_MARGIN = 2e-5  # for what float32 decides and half precision does not


def array(x):
    """The values of a tensor as numpy has them, in float64."""
    return x.detach().cpu().double().numpy()


def like(values, x):
    """Values from numpy as a tensor of the dtype of x."""
    return torch.as_tensor(np.ascontiguousarray(values)).to(x.dtype)


def rounded(number):
    """Two digits: what is random in a statistic is left out, so that a known mistake looks the same at every draw."""
    return float(f"{number:.2g}")


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def squash(x):
    return 1 / (1 + np.exp(-x))


def bell(x):
    """silu in numpy."""
    return x * squash(x)


def gated(x, gate, up, down):
    """SwiGLU in numpy."""
    return (bell(x @ gate.T) * (x @ up.T)) @ down.T


# SwiGLU


def swiglu_of(solution, randn, d_model, d_ff, dtype=torch.float64):
    """A layer with random weights, and the same weights in numpy: gate, up, down."""
    layer = solution.SwiGLU(d_model, d_ff).to(randn(1).device, dtype)
    state = {
        "gate_proj.weight": randn(d_ff, d_model, dtype=dtype),
        "up_proj.weight": randn(d_ff, d_model, dtype=dtype),
        "down_proj.weight": randn(d_model, d_ff, dtype=dtype),
    }
    layer.load_state_dict(state)
    return layer, [array(value) for value in state.values()]


@task("SwiGLU")
def test_the_names_of_the_three_layers(solution):
    layer = solution.SwiGLU(4, 6)
    wanted = {"gate_proj.weight": (6, 4), "up_proj.weight": (6, 4), "down_proj.weight": (4, 6)}
    assert_equal(shapes(layer.state_dict()), wanted, because="the state dict of SwiGLU(4, 6)")
    found = sorted(name for name, _ in layer.named_parameters())
    assert_equal(found, sorted(wanted), because="all of it is trained")


@task("SwiGLU")
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=str)
def test_it_is_down_of_silu_of_gate_times_up(solution, randn, dtype, lead):
    layer, weights = swiglu_of(solution, randn, 4, 6, dtype)
    x = randn(*lead, 4, dtype=dtype)
    expected = like(gated(array(x), *weights), x)
    assert_close(layer(x).detach(), expected, because="down(silu(gate(x)) * up(x))", **SUMS[dtype])


@task("SwiGLU")
def test_it_where_both_widths_are_equal(solution, randn):
    layer, weights = swiglu_of(solution, randn, 4, 4)
    x = randn(3, 4, dtype=torch.float64)
    expected = like(gated(array(x), *weights), x)
    assert_close(layer(x).detach(), expected, because="nothing is transposed, nothing exchanged")


@task("SwiGLU")
def test_the_gradients_of_the_layer(solution, randn):
    layer, weights = swiglu_of(solution, randn, 4, 6)
    x, w = randn(5, 4, dtype=torch.float64), randn(5, 4, dtype=torch.float64)
    leaves = [torch.from_numpy(value).to(x.device).requires_grad_() for value in weights]
    gate, up, down = leaves
    expected = torch.autograd.grad((((F.silu(x @ gate.T) * (x @ up.T)) @ down.T) * w).sum(), leaves)
    (layer(x) * w).sum().backward()
    for name, grad in zip(["gate_proj", "up_proj", "down_proj"], expected, strict=True):
        found = getattr(layer, name).weight.grad
        assert_that(found is not None, f"{name}.weight gets a gradient")
        assert_close(found, grad, because=f"the gradient of {name}.weight")


@task("SwiGLU")
def test_a_half_precision_layer_stays_half_precision(solution, randn):
    layer, weights = swiglu_of(solution, randn, 4, 6, torch.bfloat16)
    x = randn(5, 4).bfloat16()
    expected = like(gated(array(x), *weights), x)
    assert_close(layer(x).detach(), expected, because="bfloat16 in, bfloat16 out", rtol=5e-2, atol=0.5)


@task("SwiGLU")
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_weights_start_like_those_of_a_linear_layer(solution, seed, name):
    torch.manual_seed(seed)
    values = getattr(solution.SwiGLU(100, 100), name).weight.detach()
    largest = values.abs().max().item()
    assert_that(0.095 < largest <= 0.1 + 1e-6, f"{name}, from U(-0.1, 0.1): its largest", value=rounded(largest))


@task("SwiGLU")
def test_three_products_are_the_work(solution, randn):
    layer, _ = swiglu_of(solution, randn, 4, 6)
    x = randn(2, 5, 4, dtype=torch.float64)
    assert_cost(layer, x, flops=6 * 10 * 4 * 6, because="6 N D F FLOPs")


@cost_case("SwiGLU")
def swiglu_cost(module, randn):
    layer, x = module.SwiGLU(32, 64).to(randn(1).device), randn(128, 32)
    return lambda: layer(x)


# What both gates share: a loop over tokens that is obviously right, and tokens whose choice is not a close one


def pick(scores, choice, k, G, M, n_best, scaling, normalize, tiny):
    """One token's weights {expert: weight}, from lists of scores and of what is compared, by sorting."""
    size = len(choice) // G
    members = [range(g * size, (g + 1) * size) for g in range(G)]
    strength = [sum(sorted((choice[e] for e in group), reverse=True)[:n_best]) for group in members]
    opened = sorted(range(G), key=lambda g: strength[g], reverse=True)[:M]
    inside = [e for g in opened for e in members[g]]
    chosen = sorted(inside, key=lambda e: choice[e], reverse=True)[:k]
    total = sum(scores[e] for e in chosen) + tiny if normalize else 1.0
    return {e: scores[e] / total * scaling for e in chosen}


def softmax_by_hand(row, k, G, M, scaling=1.0, normalize=False):
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    total = sum(exps)
    p = [value / total for value in exps]
    return pick(p, p, k, G or 1, M or 1, 1, scaling, normalize, 0.0)


def sigmoid_by_hand(row, bias, k, G, M, scaling=2.5, normalize=True):
    s = [1 / (1 + math.exp(-value)) for value in row]
    choice = [one + two for one, two in zip(s, bias, strict=True)]
    return pick(s, choice, k, G or 1, M or 1, 2, scaling, normalize, 1e-20)


def as_table(picked, E):
    """A list of {expert: weight} as an array (N, E), zero where an expert was not chosen."""
    table = np.zeros((len(picked), E))
    for row, weights in zip(table, picked, strict=True):
        for e, weight in weights.items():
            row[e] = weight
    return table


def who(picked):
    """A list of {expert: weight} as sorted numbers (N, K)."""
    return torch.tensor([sorted(weights) for weights in picked])


def spread(weights, indices, E):
    """What a gate returned as a table (N, E), so that the order within a row does not count."""
    assert_equal(indices.dtype, torch.int64, because="the dtype of the indices")
    assert_equal(tuple(weights.shape), tuple(indices.shape), because="weights and indices have the same shape")
    table = torch.zeros(len(weights), E, dtype=weights.dtype, device=weights.device)
    return table.scatter(1, indices, weights.detach())


def firm(choice, k, G, M, n_best, margin=MARGIN):
    """Which rows of choice (N, E) are decided by more than a margin, in groups and in experts."""
    N, E = choice.shape
    G, M = G or 1, M or 1
    strength = np.sort(choice.reshape(N, G, E // G), axis=-1)[..., -n_best:].sum(-1)
    padded = np.concatenate([-np.sort(-strength, axis=-1), np.full((N, 1), -np.inf)], axis=-1)
    gap = padded[:, M - 1] - padded[:, M]
    opened = np.zeros((N, G), dtype=bool)
    np.put_along_axis(opened, np.argsort(-strength, axis=-1)[:, :M], True, axis=-1)
    inside = np.where(np.repeat(opened, E // G, axis=1), choice, -np.inf)
    padded = np.concatenate([-np.sort(-inside, axis=-1), np.full((N, 1), -np.inf)], axis=-1)
    return np.minimum(gap, padded[:, k - 1] - padded[:, k]) > margin


def softmax_of(x):
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def softmax_tokens(randn, n, k, G, M, dtype=torch.float64, E=16, margin=MARGIN):
    """Logits (n, E) whose experts are not a close choice."""
    logits = randn(4 * n + 100, E, dtype=torch.float64, scale=1.5).to(dtype)
    keep = np.flatnonzero(firm(softmax_of(array(logits)), k, G, M, 1, margin))[:n]
    return logits[torch.from_numpy(keep).to(logits.device)]


BIASES = {
    "no bias": lambda noise: noise * 0,
    "a small bias": lambda noise: noise * 0.3,
    "a wide bias": lambda noise: noise * 1.5 - 1,
    "a bias around -12": lambda noise: noise * 0.3 - 12,
}


def sigmoid_tokens(randn, n, k, G, M, kind="a small bias", dtype=torch.float64, E=16, margin=MARGIN):
    """Logits (n, E) and a bias (E,) for which experts are not a close choice."""
    bias = BIASES[kind](randn(E))
    logits = randn(6 * n + 200, E, dtype=torch.float64, scale=1.5).to(dtype)
    keep = np.flatnonzero(firm(squash(array(logits)) + array(bias), k, G, M, 2, margin))[:n]
    return logits[torch.from_numpy(keep).to(logits.device)], bias


def golden(data_dir, device, case):
    """The tensors of a case and its configuration."""
    with safe_open(data_dir / "moe.safetensors", "pt") as file:
        tensors = {name[len(case) + 1 :]: file.get_tensor(name) for name in file.keys() if name.startswith(f"{case}.")}
        config = json.loads(file.metadata()["configs"])[case]
    return {name: tensor.to(device) for name, tensor in tensors.items()}, SimpleNamespace(**config)


GROUPINGS = [(None, None), (1, 1), (4, 2), (8, 3), (2, 1), (4, 4), (16, 5)]


# softmax_gate


@task("softmax_gate")
@pytest.mark.parametrize("G, M", [(None, None), (4, 2), (8, 3)], ids=str)
def test_the_experts_of_a_thousand_tokens(solution, randn, dtype, G, M):
    logits = softmax_tokens(randn, 1000, 3, G, M, dtype)
    expected = who([softmax_by_hand(row, 3, G, M) for row in array(logits).tolist()])
    assert_equal(len(expected), 1000, because="a thousand tokens")
    _, indices = solution.softmax_gate(logits, 3, n_group=G, topk_group=M)
    found = indices.sort(dim=1).values
    assert_equal(found, expected, because=f"who is chosen, sorted, with n_group {G} and topk_group {M}")


@task("softmax_gate")
@pytest.mark.parametrize("G, M", GROUPINGS, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_weights_are_probabilities_among_all_experts(solution, randn, k, G, M):
    logits = softmax_tokens(randn, 20, k, G, M)
    expected = like(as_table([softmax_by_hand(row, k, G, M) for row in array(logits).tolist()], 16), logits)
    weights, indices = solution.softmax_gate(logits, k, n_group=G, topk_group=M)
    assert_equal(tuple(indices.shape), (20, k), because="the shape of the indices")
    assert_close(spread(weights, indices, 16), expected, because="the weights, as a table (N, E)")


@task("softmax_gate")
@pytest.mark.parametrize("scaling", [1.0, 16.0])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_scaling_and_normalizing(solution, randn, dtype, scaling, normalize):
    logits = softmax_tokens(randn, 20, 3, 4, 2, dtype)
    picked = [softmax_by_hand(row, 3, 4, 2, scaling, normalize) for row in array(logits).tolist()]
    expected = like(as_table(picked, 16), logits)
    options = {"n_group": 4, "topk_group": 2, "scaling": scaling, "normalize": normalize}
    weights, indices = solution.softmax_gate(logits, 3, **options)
    because = f"scaling {scaling}, normalize {normalize}"
    assert_close(spread(weights, indices, 16), expected, because=because, **SUMS[dtype])


@task("softmax_gate")
def test_the_groups_compete_with_their_best(solution, device):
    p = torch.tensor([[0.30, 0.01, 0.01, 0.15, 0.14, 0.13, 0.13, 0.13]], dtype=torch.float64, device=device)
    _, indices = solution.softmax_gate(p.log(), 2, n_group=4, topk_group=1)
    found = sorted(indices[0].tolist())
    assert_equal(found, [0, 1], because="0.30 is the best of all, so its group is open; 0.27 in two parts is not")


@task("softmax_gate")
def test_all_experts_of_the_open_groups(solution, randn):
    logits = softmax_tokens(randn, 20, 8, 4, 2)
    expected = like(as_table([softmax_by_hand(row, 8, 4, 2) for row in array(logits).tolist()], 16), logits)
    weights, indices = solution.softmax_gate(logits, 8, n_group=4, topk_group=2)
    assert_close(spread(weights, indices, 16), expected, because="k may be as large as the open groups are")


@task("softmax_gate")
def test_closed_groups_stay_closed_when_nothing_is_left(solution, device):
    logits = torch.tensor([[5.0, -300, -300, -300, 4, 3, 2, 1], [4, 3, 2, 1, 5, -300, -300, -300]], device=device)
    _, indices = solution.softmax_gate(logits, 4, n_group=2, topk_group=1)
    found = indices.sort(dim=1).values
    expected = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert_equal(found, expected, because="k is all of the open group, though three of its probabilities round to 0")


@task("softmax_gate")
def test_nobody_is_chosen_twice(solution, randn):
    logits = randn(50, 16)
    logits[:, 2:] = -1000.0  # their probabilities are all 0
    _, indices = solution.softmax_gate(logits, 6)
    found = sorted({len(set(row)) for row in indices.tolist()})
    assert_equal(found, [6], because="the number of different experts in a row, where most probabilities are 0")


@task("softmax_gate")
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_half_precision_is_decided_in_float32(solution, randn, kind):
    logits = softmax_tokens(randn, 1000, 3, 4, 2, kind, margin=HALF_MARGIN)
    picked = [softmax_by_hand(row, 3, 4, 2) for row in array(logits).tolist()]
    expected, people = like(as_table(picked, 16), logits), who(picked)
    weights, indices = solution.softmax_gate(logits, 3, n_group=4, topk_group=2)
    assert_equal(indices.sort(dim=1).values, people, because=f"who is chosen from logits in {kind}")
    assert_close(spread(weights, indices, 16), expected, because=f"weights in {kind}", rtol=2e-2, atol=1e-3)


@task("softmax_gate")
@pytest.mark.parametrize("G, M", [(None, None), (4, 2)], ids=str)
def test_no_tokens_no_choice(solution, randn, G, M):
    weights, indices = solution.softmax_gate(randn(0, 16), 3, n_group=G, topk_group=M)
    found = tuple(weights.shape), tuple(indices.shape), weights.dtype, indices.dtype
    wanted = (0, 3), (0, 3), torch.float32, torch.int64
    assert_equal(found, wanted, because="shapes and dtypes with N = 0")


@task("softmax_gate")
def test_huge_logits(solution, device):
    logits = torch.tensor([[1000.0, 999.0, -1000.0, 0.0]], device=device)
    expected = like(as_table([softmax_by_hand(row, 2, 1, 1) for row in array(logits).tolist()], 4), logits)
    weights, indices = solution.softmax_gate(logits, 2)
    assert_close(spread(weights, indices, 4), expected, because="logits of 1000", rtol=1e-3, atol=1e-6)


@task("softmax_gate")
def test_logits_with_other_strides(solution, randn):
    logits = softmax_tokens(randn, 20, 3, 4, 2)
    expected = like(as_table([softmax_by_hand(row, 3, 4, 2) for row in array(logits).tolist()], 16), logits)
    for strided in (noncontiguous(logits), logits.T.contiguous().T):
        weights, indices = solution.softmax_gate(strided, 3, n_group=4, topk_group=2)
        assert_close(spread(weights, indices, 16), expected, because="strides do not matter")


def weighted(gate, mixture):
    """A function of the logits whose gradient shows that of the weights, whatever their order."""

    def total(logits):
        weights, indices = gate(logits)
        return (weights * mixture.gather(1, indices)).sum(dim=1)

    return total


@task("softmax_gate")
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_gradients_go_through_the_softmax(solution, randn, normalize):
    logits, mixture = softmax_tokens(randn, 5, 3, 4, 2), randn(5, 16, dtype=torch.float64)
    chosen = who([softmax_by_hand(row, 3, 4, 2) for row in array(logits).tolist()]).to(logits.device)

    def oracle(logits):
        p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        w = p.gather(1, chosen)
        return w / w.sum(dim=1, keepdim=True) * 3.0 if normalize else w * 3.0, chosen

    def ours(logits):
        return solution.softmax_gate(logits, 3, scaling=3.0, normalize=normalize, n_group=4, topk_group=2)

    because = "the gradient of the logits"
    assert_gradients_close(weighted(ours, mixture), weighted(oracle, mixture), [logits], because=because)


@task("softmax_gate")
@pytest.mark.parametrize("case", ["v2_greedy", "v2_groups"])
def test_the_router_of_deepseek_v2(solution, data_dir, device, case):
    data, cfg = golden(data_dir, device, case)
    expected, people = spread(data["weights"], data["indices"], 8), data["indices"].sort(dim=1).values
    options = {"n_group": cfg.n_group, "topk_group": cfg.topk_group, "scaling": cfg.routed_scaling_factor}
    weights, indices = solution.softmax_gate(data["logits"], 3, **options)
    assert_equal(indices.sort(dim=1).values, people, because="who DeepSeek-V2's own router chooses")
    assert_close(spread(weights, indices, 8), expected, because="and with which weights", rtol=1e-5, atol=1e-6)


SHAPES = [((16,), ["(16,)"]), ((2, 3, 16), ["(2, 3, 16)"])]
CLASHES = [
    ({"n_group": 3, "topk_group": 1}, 2, ["16", "3"]),
    ({"n_group": 4, "topk_group": None}, 2, ["4", "None"]),
    ({"n_group": None, "topk_group": 2}, 2, ["None", "2"]),
    ({"n_group": 4, "topk_group": 5}, 2, ["5", "4"]),
    ({"n_group": 4, "topk_group": 0}, 2, ["0", "4"]),
    ({"n_group": 4, "topk_group": 2}, 9, ["9", "8"]),
    ({"n_group": 4, "topk_group": 1}, 5, ["5", "4"]),
    ({"n_group": None, "topk_group": None}, 17, ["17", "16"]),
    ({"n_group": 1, "topk_group": 1}, 0, ["0", "16"]),
]


@task("softmax_gate")
@pytest.mark.parametrize("shape, mentions", SHAPES, ids=str)
def test_logits_are_a_table(solution, randn, shape, mentions):
    because = f"logits of shape {shape}"
    assert_raises(ValueError, solution.softmax_gate, randn(*shape), 2, mentions=mentions, because=because)


@task("softmax_gate")
@pytest.mark.parametrize("options, k, mentions", CLASHES, ids=str)
def test_numbers_that_do_not_fit(solution, randn, options, k, mentions):
    because = f"16 experts, k = {k}, {options}"
    assert_raises(ValueError, solution.softmax_gate, randn(2, 16), k, **options, mentions=mentions, because=because)


@cost_case("softmax_gate")
def softmax_gate_cost(module, randn):
    logits = randn(256, 16)
    return lambda: module.softmax_gate(logits, 3, n_group=4, topk_group=2)


# sigmoid_gate


@task("sigmoid_gate")
@pytest.mark.parametrize("kind", list(BIASES))
def test_a_thousand_tokens_choose_with_the_bias(solution, randn, dtype, kind):
    logits, bias = sigmoid_tokens(randn, 1000, 3, 4, 2, kind, dtype)
    numbers = array(bias).tolist()
    expected = who([sigmoid_by_hand(row, numbers, 3, 4, 2) for row in array(logits).tolist()])
    assert_equal(len(expected), 1000, because="a thousand tokens")
    _, indices = solution.sigmoid_gate(logits, bias, 3, n_group=4, topk_group=2)
    found = indices.sort(dim=1).values
    assert_equal(found, expected, because=f"who is chosen, sorted, with {kind}")


@task("sigmoid_gate")
@pytest.mark.parametrize("G, M", GROUPINGS, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_weights_come_from_the_sigmoid_alone(solution, randn, k, G, M):
    logits, bias = sigmoid_tokens(randn, 20, k, G, M)
    numbers = array(bias).tolist()
    picked = [sigmoid_by_hand(row, numbers, k, G, M) for row in array(logits).tolist()]
    expected = like(as_table(picked, 16), logits)
    weights, indices = solution.sigmoid_gate(logits, bias, k, n_group=G, topk_group=M)
    assert_equal(tuple(indices.shape), (20, k), because="the shape of the indices")
    assert_close(spread(weights, indices, 16), expected, because="the weights, as a table (N, E)")


@task("sigmoid_gate")
@pytest.mark.parametrize("scaling", [1.0, 2.0])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_scaling_and_normalizing_sigmoids(solution, randn, dtype, scaling, normalize):
    logits, bias = sigmoid_tokens(randn, 20, 3, 4, 2, "a wide bias", dtype)
    numbers = array(bias).tolist()
    picked = [sigmoid_by_hand(row, numbers, 3, 4, 2, scaling, normalize) for row in array(logits).tolist()]
    expected = like(as_table(picked, 16), logits)
    options = {"n_group": 4, "topk_group": 2, "scaling": scaling, "normalize": normalize}
    weights, indices = solution.sigmoid_gate(logits, bias, 3, **options)
    because = f"scaling {scaling}, normalize {normalize}"
    assert_close(spread(weights, indices, 16), expected, because=because, **SUMS[dtype])


@task("sigmoid_gate")
def test_the_bias_moves_nobodys_weight(solution, randn):
    logits = randn(30, 16, dtype=torch.float64)
    for kind in BIASES:
        bias = BIASES[kind](randn(16))
        weights, indices = solution.sigmoid_gate(logits, bias, 3, n_group=4, topk_group=2, scaling=1.0, normalize=False)
        expected = like(squash(array(logits)), logits).gather(1, indices.cpu())
        assert_close(weights, expected, because=f"with {kind}, whoever is chosen has the weight s")


@task("sigmoid_gate")
def test_the_groups_compete_with_their_two_best(solution, device):
    s = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.6, 0.55, 0.1, 0.1]], dtype=torch.float64, device=device)
    bias = torch.zeros(8, device=device)
    _, indices = solution.sigmoid_gate((s / (1 - s)).log(), bias, 2, n_group=2, topk_group=1)
    found = sorted(indices[0].tolist())
    assert_equal(found, [4, 5], because="0.6 + 0.55 is more than 0.9 + 0.1")


@task("sigmoid_gate")
def test_all_experts_of_the_open_groups_are_taken(solution, randn):
    logits, bias = sigmoid_tokens(randn, 20, 8, 4, 2, "a bias around -12")
    numbers = array(bias).tolist()
    expected = who([sigmoid_by_hand(row, numbers, 8, 4, 2) for row in array(logits).tolist()])
    _, indices = solution.sigmoid_gate(logits, bias, 8, n_group=4, topk_group=2)
    assert_equal(indices.sort(dim=1).values, expected, because="k is all of the open groups")


@task("sigmoid_gate")
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("middle", [-18.5, -40.0])
def test_tiny_sigmoids_are_exact(solution, randn, dtype, normalize, middle):
    logits = (middle + randn(20, 16, dtype=torch.float64)).to(dtype)
    bias = torch.arange(16, device=logits.device) * 0.5 - 4.0  # decides alone: 13, 14 and 15
    numbers = array(bias).tolist()
    picked = [sigmoid_by_hand(row, numbers, 3, 1, 1, 1.0, normalize) for row in array(logits).tolist()]
    large = 1.0 if normalize else math.exp(-middle)
    expected = like(as_table(picked, 16) * large, logits)
    options = {"n_group": 1, "topk_group": 1, "scaling": 1.0, "normalize": normalize}
    weights, indices = solution.sigmoid_gate(logits, bias, 3, **options)
    found = spread(weights, indices, 16) * large
    because = f"s around exp({middle}){'' if normalize else ', times its inverse'}"
    assert_close(found, expected, because=because, **SUMS[dtype])


@task("sigmoid_gate")
def test_the_little_number_in_the_sum(solution, randn, dtype):
    logits = -46.0 + randn(10, 8, dtype=torch.float64, scale=0.3).to(dtype)  # s is about 1e-20
    bias = torch.arange(8, device=logits.device) * 0.5
    numbers = array(bias).tolist()
    picked = [sigmoid_by_hand(row, numbers, 2, 1, 1) for row in array(logits).tolist()]
    expected = like(as_table(picked, 8), logits)
    weights, indices = solution.sigmoid_gate(logits, bias, 2, n_group=1, topk_group=1)
    because = "s about 1e-20: the sum plus 1e-20 is what they are divided by"
    assert_close(spread(weights, indices, 8), expected, because=because, **SUMS[dtype])


@task("sigmoid_gate")
def test_sigmoids_of_zero(solution, device):
    logits = torch.full((2, 8), -300.0, device=device)
    weights, _ = solution.sigmoid_gate(logits, torch.zeros(8, device=device), 2, n_group=2, topk_group=1)
    assert_equal(weights, torch.zeros(2, 2), because="nothing divided by nothing is 0 here")


@task("sigmoid_gate")
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_half_precision_chooses_in_float32(solution, randn, kind):
    logits, bias = sigmoid_tokens(randn, 400, 3, 4, 2, dtype=kind, margin=HALF_MARGIN)
    numbers = array(bias).tolist()
    picked = [sigmoid_by_hand(row, numbers, 3, 4, 2) for row in array(logits).tolist()]
    expected, people = like(as_table(picked, 16), logits), who(picked)
    weights, indices = solution.sigmoid_gate(logits, bias, 3, n_group=4, topk_group=2)
    assert_equal(indices.sort(dim=1).values, people, because=f"who is chosen from logits in {kind}")
    assert_close(spread(weights, indices, 16), expected, because=f"weights in {kind}", rtol=2e-2, atol=1e-3)


@task("sigmoid_gate")
def test_no_tokens_no_weights(solution, randn):
    weights, indices = solution.sigmoid_gate(randn(0, 16), randn(16), 3, n_group=4, topk_group=2)
    found = tuple(weights.shape), tuple(indices.shape), weights.dtype, indices.dtype
    wanted = (0, 3), (0, 3), torch.float32, torch.int64
    assert_equal(found, wanted, because="shapes and dtypes with N = 0")


@task("sigmoid_gate")
def test_logits_of_any_strides(solution, randn):
    logits, bias = sigmoid_tokens(randn, 20, 3, 4, 2)
    numbers = array(bias).tolist()
    expected = like(as_table([sigmoid_by_hand(row, numbers, 3, 4, 2) for row in array(logits).tolist()], 16), logits)
    for strided in (noncontiguous(logits), logits.T.contiguous().T):
        weights, indices = solution.sigmoid_gate(strided, noncontiguous(bias), 3, n_group=4, topk_group=2)
        assert_close(spread(weights, indices, 16), expected, because="strides do not matter")


@task("sigmoid_gate")
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_gradients_go_through_the_weights_only(solution, randn, normalize):
    logits, bias = sigmoid_tokens(randn, 5, 3, 4, 2)
    mixture = randn(5, 16, dtype=torch.float64)
    numbers = array(bias).tolist()
    chosen = who([sigmoid_by_hand(row, numbers, 3, 4, 2) for row in array(logits).tolist()]).to(logits.device)

    def oracle(logits):
        w = (1 / (1 + (-logits).exp())).gather(1, chosen)
        return w / w.sum(dim=1, keepdim=True) * 3.0 if normalize else w * 3.0, chosen

    def ours(logits):
        return solution.sigmoid_gate(logits, bias, 3, scaling=3.0, normalize=normalize, n_group=4, topk_group=2)

    because = "the gradient of the logits"
    assert_gradients_close(weighted(ours, mixture), weighted(oracle, mixture), [logits], because=because)


@task("sigmoid_gate")
def test_the_bias_gets_no_gradient(solution, randn):
    logits, bias = randn(5, 16).requires_grad_(), randn(16).requires_grad_()
    weights, _ = solution.sigmoid_gate(logits, bias, 3, n_group=4, topk_group=2, normalize=False)
    found = torch.autograd.grad(weights.sum(), [logits, bias], allow_unused=True)[1]
    assert_that(found is None or not found.any(), "weights do not depend on the bias", value=found)


@task("sigmoid_gate")
@pytest.mark.parametrize("case", ["v3_groups", "v3_raw"])
def test_the_router_of_deepseek_v3(solution, data_dir, device, case):
    data, cfg = golden(data_dir, device, case)
    expected, people = spread(data["weights"], data["indices"], 8), data["indices"].sort(dim=1).values
    options = {"n_group": cfg.n_group, "topk_group": cfg.topk_group, "normalize": cfg.norm_topk_prob}
    bias = data["layer.gate.e_score_correction_bias"]
    weights, indices = solution.sigmoid_gate(data["logits"], bias, 3, **options)
    assert_equal(indices.sort(dim=1).values, people, because="who DeepSeek-V3's own router chooses")
    assert_close(spread(weights, indices, 8), expected, because="and with which weights", rtol=1e-5, atol=1e-6)


@task("sigmoid_gate")
@pytest.mark.parametrize("shape, bias, mentions", [((16,), (), ["(16,)"]), ((2, 3, 16), (16,), ["(2, 3, 16)"]),
                                                   ((2, 16), (1,), ["(1,)", "(2, 16)"]), ((2, 16), (8,), ["(8,)", "(2, 16)"]),
                                                   ((2, 16), (2, 16), ["(2, 16)"]), ((2, 16), (), ["()", "(2, 16)"])], ids=str)  # fmt: skip
def test_logits_and_bias_that_do_not_fit(solution, randn, shape, bias, mentions):
    args = randn(*shape), randn(*bias), 2
    because = f"logits {shape}, bias {bias}"
    options = {"n_group": 1, "topk_group": 1}
    assert_raises(ValueError, solution.sigmoid_gate, *args, **options, mentions=mentions, because=because)


@task("sigmoid_gate")
@pytest.mark.parametrize("options, k, mentions", CLASHES, ids=str)
def test_numbers_that_clash(solution, randn, options, k, mentions):
    because = f"16 experts, k = {k}, {options}"
    args = randn(2, 16), randn(16), k
    assert_raises(ValueError, solution.sigmoid_gate, *args, **options, mentions=mentions, because=because)


@cost_case("sigmoid_gate")
def sigmoid_gate_cost(module, randn):
    logits, bias = randn(256, 16), randn(16)
    return lambda: module.sigmoid_gate(logits, bias, 3, n_group=4, topk_group=2)


# dispatch


class Expert:
    """tanh(x A) that remembers what it was called with."""

    def __init__(self, matrix):
        self.matrix, self.seen = matrix, []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return torch.tanh(x @ self.matrix)


def assignments(randn, N, E, K, dtype=torch.float64):
    """Weights and, without repetitions in a row, indices (N, K)."""
    return randn(N, K, dtype=dtype), randn(N, E).argsort(dim=1)[:, :K]


def mixed(x, weights, indices, functions):
    """The weighted sum by loops, in numpy; functions take one row."""
    out = np.zeros(x.shape)
    for n, row in enumerate(x):
        for weight, e in zip(weights[n], indices[n], strict=True):
            out[n] += weight * functions[e](row)
    return out


def tanhs(matrices):
    return [lambda row, matrix=matrix: np.tanh(row @ array(matrix)) for matrix in matrices]


@task("dispatch")
@pytest.mark.parametrize("N, E, K", [(7, 5, 2), (1, 4, 3), (12, 3, 3), (5, 6, 1), (3, 20, 2), (4, 4, 4)], ids=str)
def test_the_weighted_sum_over_experts(solution, randn, dtype, N, E, K):
    x, matrices = randn(N, 6, dtype=dtype), [randn(6, 6, dtype=dtype) for _ in range(E)]
    weights, indices = assignments(randn, N, E, K, dtype)
    expected = like(mixed(array(x), array(weights), indices.tolist(), tanhs(matrices)), x)
    found = solution.dispatch(x, weights, indices, [Expert(matrix) for matrix in matrices])
    assert_close(
        found, expected, because="the sum over i of weights[n, i] * experts[indices[n, i]](x[n])", **SUMS[dtype]
    )


@task("dispatch")
def test_a_row_that_names_an_expert_twice(solution, randn, device):
    x, matrices, weights = randn(4, 5, dtype=torch.float64), randn(3, 5, 5, dtype=torch.float64), randn(4, 3).double()
    indices = torch.tensor([[1, 1, 0], [2, 2, 2], [0, 1, 0], [2, 0, 2]], device=device)
    expected = like(mixed(array(x), array(weights), indices.tolist(), tanhs(matrices)), x)
    found = solution.dispatch(x, weights, indices, [Expert(matrix) for matrix in matrices])
    assert_close(found, expected, because="both weights count where a row names an expert twice")


@task("dispatch")
def test_an_expert_sees_its_tokens_once_and_no_others(solution, randn, device):
    x = torch.arange(30, device=device, dtype=torch.float64)[:, None] * torch.ones(2, device=device).double()
    weights, indices = assignments(randn, 30, 5, 2)
    wanted = [[float(n) for n, row in enumerate(indices.tolist()) if e in row] for e in range(5)]
    experts = [Expert(randn(2, 2, dtype=torch.float64)) for _ in range(5)]
    solution.dispatch(x, weights, indices, experts)
    calls = [len(expert.seen) for expert in experts]
    assert_equal(calls, [1 if tokens else 0 for tokens in wanted], because="how often each expert is called")
    seen = [sorted(value for rows in expert.seen for value in rows[:, 0].tolist()) for expert in experts]
    assert_equal(seen, wanted, because="the numbers of the tokens that each expert saw")


@task("dispatch")
def test_idle_experts_are_left_alone(solution, randn, device):
    x, weights = randn(4, 3), randn(4, 2)
    indices = torch.tensor([[5, 1], [1, 5], [5, 1], [5, 1]], device=device)
    experts = [Expert(randn(3, 3)) for _ in range(7)]
    solution.dispatch(x, weights, indices, experts)
    found = [len(expert.seen) for expert in experts]
    assert_equal(found, [0, 1, 0, 0, 0, 1, 0], because="calls, where only experts 1 and 5 are named")


@task("dispatch")
def test_no_tokens_call_nobody(solution, randn, dtype):
    experts = [Expert(randn(3, 3, dtype=dtype)) for _ in range(4)]
    indices = torch.zeros(0, 2, dtype=torch.int64, device=randn(1).device)
    found = solution.dispatch(randn(0, 3, dtype=dtype), randn(0, 2, dtype=dtype), indices, experts)
    assert_close(found, torch.zeros(0, 3, dtype=dtype), because="N = 0")
    assert_equal([len(expert.seen) for expert in experts], [0, 0, 0, 0], because="calls with N = 0")


@task("dispatch")
def test_the_numbering_of_experts_does_not_matter(solution, randn, randperm):
    x, matrices = randn(8, 5, dtype=torch.float64), randn(6, 5, 5, dtype=torch.float64)
    weights, indices = assignments(randn, 8, 6, 3)
    expected = like(mixed(array(x), array(weights), indices.tolist(), tanhs(matrices)), x)
    new = randperm(6)  # new[e] is what expert e is called now
    renamed = [Expert(matrices[old]) for old in new.argsort()]
    found = solution.dispatch(x, weights, new[indices], tuple(renamed))
    assert_close(found, expected, because="the same experts under other numbers")


@task("dispatch")
def test_modules_as_experts(solution, randn, device):
    experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(4)).to(device)
    experts.load_state_dict({name: randn(*value.shape) for name, value in experts.state_dict().items()})
    x = randn(7, 5)
    weights, indices = assignments(randn, 7, 4, 2, torch.float32)
    functions = [lambda row, layer=layer: array(layer.weight) @ row + array(layer.bias) for layer in experts]
    expected = like(mixed(array(x), array(weights), indices.tolist(), functions), x)
    found = solution.dispatch(x, weights, indices, experts)
    assert_close(found.detach(), expected, because="an nn.ModuleList of layers", **SUMS[torch.float32])


@task("dispatch")
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_half_precision_is_rounded_once(solution, randn, device, kind):
    said = randn(9, 6).to(kind)  # expert e answers this row, whatever it is asked
    weights, indices = randn(40, 4), randn(40, 9).argsort(dim=1)[:, :4]
    experts = [lambda x, row=row: row.expand(x.shape) for row in said]
    functions = [lambda x, row=row: row for row in array(said)]
    x = randn(40, 6).to(kind)
    expected = mixed(array(x), array(weights), indices.tolist(), functions)
    found = solution.dispatch(x, weights, indices, experts)
    assert_equal(found.dtype, kind, because="the dtype of the result")
    step = torch.finfo(kind).eps / 2
    because = f"weighted and added in float32, and rounded to {kind} once"
    assert_close(found.double(), torch.from_numpy(expected), rtol=step * 1.01, atol=2e-6, because=because)


@task("dispatch")
def test_gradients_reach_tokens_weights_and_experts(solution, randn):
    x, matrices = randn(7, 5, dtype=torch.float64), randn(4, 5, 5, dtype=torch.float64)
    weights, indices = assignments(randn, 7, 4, 2)

    def oracle(x, weights, matrices):
        said = torch.tanh(torch.einsum("nd,edf->nef", x, matrices))
        return torch.einsum("nk,nkf->nf", weights, said[torch.arange(7, device=x.device)[:, None], indices])

    def ours(x, weights, matrices):
        return solution.dispatch(x, weights, indices, [Expert(matrix) for matrix in matrices])

    assert_gradients_close(ours, oracle, [x, weights, matrices])


@task("dispatch")
def test_inputs_of_any_strides(solution, randn):
    x, matrices = randn(7, 5, dtype=torch.float64), [randn(5, 5, dtype=torch.float64) for _ in range(4)]
    weights, indices = assignments(randn, 7, 4, 2)
    expected = like(mixed(array(x), array(weights), indices.tolist(), tanhs(matrices)), x)
    strided = [value.T.contiguous().T for value in (x, weights, indices)]
    found = solution.dispatch(*strided, [Expert(matrix) for matrix in matrices])
    assert_close(found, expected, because="strides do not matter")


def swiglu_experts(randn, E, D, width):
    """E functions with the work of SwiGLU."""
    made = []
    for _ in range(E):
        gate, up, down = randn(D, width), randn(D, width), randn(width, D)
        made.append(lambda x, gate=gate, up=up, down=down: (F.silu(x @ gate) * (x @ up)) @ down)
    return made


@task("dispatch")
@pytest.mark.parametrize("N, E, K", [(20, 8, 2), (6, 12, 3)], ids=str)
def test_the_work_is_that_of_the_chosen_experts(solution, randn, N, E, K):
    x, experts = randn(N, 16), swiglu_experts(randn, E, 16, 12)
    weights, indices = assignments(randn, N, E, K, torch.float32)
    most = N * K * 6 * 16 * 12 + 2 * N * K * 16
    assert_cost(solution.dispatch, x, weights, indices, experts, max_flops=most, because="N K 6 D F FLOPs, and 2 N K D")


@task("dispatch")
def test_there_is_no_table_of_all_tokens_for_all_experts(solution, randn):
    x, experts = randn(20, 16), swiglu_experts(randn, 8, 16, 12)
    weights, indices = assignments(randn, 20, 8, 2, torch.float32)
    because = "no tensor of N E D numbers"
    assert_cost(solution.dispatch, x, weights, indices, experts, no_larger_than=20 * 8 * 16 - 1, because=because)


@task("dispatch")
@pytest.mark.parametrize("x, weights, indices", [((4, 3), (4, 2), (4, 1)), ((4, 3), (4, 1), (4, 2)), ((4, 3), (5, 2), (5, 2)),
                                                 ((4, 3), (4, 2), (2, 2)), ((5, 3), (1, 2), (1, 2))], ids=str)  # fmt: skip
def test_rows_that_do_not_fit(solution, randn, randint, x, weights, indices):
    experts = [Expert(randn(3, 3)) for _ in range(4)]
    args = randn(*x), randn(*weights), randint(0, 4, indices), experts
    mentions = [str(shape) for shape in (x, weights, indices)]
    because = f"x {x}, weights {weights}, indices {indices}"
    assert_raises(ValueError, solution.dispatch, *args, mentions=mentions, because=because)


@cost_case("dispatch")
def dispatch_cost(module, randn):
    x, experts = randn(128, 32), swiglu_experts(randn, 8, 32, 16)
    weights, indices = randn(128, 2), torch.arange(256, device=randn(1).device).reshape(128, 2) % 8
    return lambda: module.dispatch(x, weights, indices, experts)


# MoE

SMALL = {
    "hidden_size": 8,
    "moe_intermediate_size": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
}
STYLES = {
    "V2 greedy": {"scoring_func": "softmax", "n_group": None, "topk_group": None, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "V2-Lite": {"scoring_func": "softmax", "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "V2": {"scoring_func": "softmax", "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 16.0},
    "V2 normalized": {"scoring_func": "softmax", "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.0},
    "V3": {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "V3 raw": {"scoring_func": "sigmoid", "n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
}  # fmt: skip


def config(style, **changes):
    return SimpleNamespace(**(SMALL | STYLES[style] | changes))


def names_of(cfg):
    """The state dict that a configuration asks for, as {name: shape}."""
    D, width, E = cfg.hidden_size, cfg.moe_intermediate_size, cfg.n_routed_experts
    wanted = {"gate.weight": (E, D)}
    if cfg.scoring_func == "sigmoid":
        wanted["gate.e_score_correction_bias"] = (E,)
    layers = {f"experts.{e}": width for e in range(E)}
    if cfg.n_shared_experts:
        layers["shared_experts"] = cfg.n_shared_experts * width
    for name, hidden in layers.items():
        wanted |= {f"{name}.{part}_proj.weight": (hidden, D) for part in ("gate", "up")}
        wanted[f"{name}.down_proj.weight"] = (D, hidden)
    return wanted


def moe_of(solution, randn, cfg, dtype=torch.float64):
    """A layer with widely spread weights, and the same weights in numpy."""
    layer = solution.MoE(cfg).to(randn(1).device, dtype)
    state = {}
    for name, shape in names_of(cfg).items():
        value = randn(*shape, dtype=torch.float64)
        value = value * 1.5 - 2.0 if name.endswith("bias") else value * shape[-1] ** -0.5
        state[name] = value.to(dtype)
    layer.load_state_dict(state)
    return layer, {name: array(value) for name, value in state.items()}


def logits_of(rows, state):
    return rows @ state["gate.weight"].T


def moe_tokens(randn, n, cfg, state, dtype=torch.float64):
    """Tokens (n, D) whose experts are not a close choice."""
    x = randn(8 * n + 200, cfg.hidden_size, dtype=torch.float64, scale=1.5).to(dtype)
    logits = logits_of(array(x), state)
    if cfg.scoring_func == "softmax":
        choice, n_best = softmax_of(logits), 1
    else:
        choice, n_best = squash(logits) + state["gate.e_score_correction_bias"], 2
    keep = np.flatnonzero(firm(choice, cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group, n_best))[:n]
    return x[torch.from_numpy(keep).to(x.device)]


def moe_by_hand(rows, cfg, state):
    """The layer by a loop over tokens in numpy, rows (N, D)."""
    out = np.zeros(rows.shape)
    how = cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group, cfg.routed_scaling_factor, cfg.norm_topk_prob

    def run(name, row):
        return gated(row, *(state[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")))

    for n, row in enumerate(rows):
        logits = logits_of(row, state).tolist()
        if cfg.scoring_func == "softmax":
            picked = softmax_by_hand(logits, *how)
        else:
            picked = sigmoid_by_hand(logits, state["gate.e_score_correction_bias"].tolist(), *how)
        for e, weight in picked.items():
            out[n] += weight * run(f"experts.{e}", row)
        if cfg.n_shared_experts:
            out[n] += run("shared_experts", row)
    return out


@task("MoE")
@pytest.mark.parametrize("style", ["V2", "V3"])
@pytest.mark.parametrize("shared", [2, 1, 0, None])
def test_the_names_of_the_checkpoints(solution, style, shared):
    cfg = config(style, n_shared_experts=shared)
    layer = solution.MoE(cfg)
    assert_equal(
        shapes(layer.state_dict()), names_of(cfg), because=f"the state dict, {style}, n_shared_experts {shared}"
    )
    trained = sorted(name for name, _ in layer.named_parameters())
    wanted = sorted(name for name in names_of(cfg) if not name.endswith("bias"))
    assert_equal(trained, wanted, because="what is trained: all but the bias, which is a buffer")


@task("MoE")
@pytest.mark.parametrize("shared", [0, None])
def test_no_shared_experts_is_none(solution, shared):
    layer = solution.MoE(config("V2", n_shared_experts=shared))
    assert_equal(layer.shared_experts, None, because=f"shared_experts with n_shared_experts {shared}")


@task("MoE")
@pytest.mark.parametrize("style", list(STYLES))
def test_the_layer_by_a_loop_over_tokens(solution, randn, dtype, style):
    cfg = config(style)
    layer, state = moe_of(solution, randn, cfg, dtype)
    x = moe_tokens(randn, 12, cfg, state, dtype)
    expected = like(moe_by_hand(array(x), cfg, state), x)
    assert_close(layer(x).detach(), expected, because=f"a layer in the style of {style}", **SUMS[dtype])


@task("MoE")
@pytest.mark.parametrize("style", ["V2", "V3"])
@pytest.mark.parametrize("shared", [1, 0, None])
def test_other_numbers_of_shared_experts(solution, randn, style, shared):
    cfg = config(style, n_shared_experts=shared, num_experts_per_tok=1)
    layer, state = moe_of(solution, randn, cfg)
    x = moe_tokens(randn, 6, cfg, state)
    expected = like(moe_by_hand(array(x), cfg, state), x)
    assert_close(layer(x).detach(), expected, because=f"{style} with n_shared_experts {shared}, k = 1")


@task("MoE")
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (1, 2, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(solution, randn, lead):
    cfg = config("V3")
    layer, state = moe_of(solution, randn, cfg)
    rows = moe_tokens(randn, math.prod(lead), cfg, state)
    x = rows.reshape(*lead, 8)
    expected = like(moe_by_hand(array(rows), cfg, state), x).reshape(*lead, 8)
    with unchanged(x):
        out = layer(x)
    assert_close(out.detach(), expected, because=f"x {(*lead, 8)}")


@task("MoE")
def test_tokens_with_other_strides(solution, randn):
    cfg = config("V2")
    layer, state = moe_of(solution, randn, cfg)
    rows = moe_tokens(randn, 6, cfg, state)
    expected = like(moe_by_hand(array(rows), cfg, state), rows).reshape(2, 3, 8)
    x = rows.reshape(2, 3, 8).transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(layer(x).detach(), expected, because="strides do not matter")


@task("MoE")
@pytest.mark.parametrize("case", ["v2_greedy", "v2_groups", "v3_groups", "v3_raw"])
def test_the_layers_of_deepseek(solution, data_dir, device, case):
    data, cfg = golden(data_dir, device, case)
    layer = solution.MoE(cfg).to(device)
    layer.load_state_dict({name[6:]: value for name, value in data.items() if name.startswith("layer.")})
    out = layer(data["x"]).detach()
    assert_close(out, data["out"], because=f"the output of DeepSeek's own layer, {case}", rtol=1e-4, atol=1e-5)


@task("MoE")
@pytest.mark.parametrize("style", ["V2 normalized", "V3"])
def test_half_precision_layers(solution, randn, style):
    cfg = config(style)
    layer, state = moe_of(solution, randn, cfg, torch.bfloat16)
    x = moe_tokens(randn, 12, cfg, state, torch.bfloat16)
    expected = like(moe_by_hand(array(x), cfg, state), x)
    out = layer(x).detach()
    assert_close(out, expected, because="bfloat16 in, bfloat16 out", rtol=5e-2, atol=0.15)


@task("MoE")
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_router_of_half_precision_weights_works_in_float32(solution, randn, device, kind):
    style = {"softmax": "V2 normalized", "sigmoid": "V3"}[kind]
    changes = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "n_shared_experts": 0}
    cfg = config(style, **changes)
    layer, state = moe_of(solution, randn, cfg, torch.bfloat16)
    weight = torch.zeros(2, 8)
    weight[0, :3], weight[1, :3] = torch.tensor([1.0, 0.002, 0.003]), torch.tensor([1.0, 0.003, 0.002])
    state["gate.weight"] = array(weight.bfloat16())
    state["gate.e_score_correction_bias"] = np.zeros(2)
    with torch.no_grad():
        layer.gate.weight.copy_(weight)
        for buffer in layer.gate.buffers():
            buffer.zero_()
    x = torch.zeros(2, 8, dtype=torch.bfloat16, device=device)
    x[:, 0], x[0, 1], x[1, 2] = 1.0, 1.0, 1.0
    expected = like(moe_by_hand(array(x), cfg, state), x)
    scale = np.abs(array(expected)).max()
    because = "logits of 1.002 and 1.003: rounded to bfloat16 they are equal, and both tokens would get the same expert"
    found, wanted = layer(x).detach() / scale, expected / scale
    assert_close(found, wanted.to(found.device), because=because, rtol=5e-2, atol=5e-2)


@task("MoE")
def test_the_bias_is_float32_whatever_the_default_is(solution):
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = solution.MoE(config("V3"))
    finally:
        torch.set_default_dtype(torch.float32)
    found = layer.gate.e_score_correction_bias.dtype, layer.gate.weight.dtype
    assert_equal(found, (torch.float32, torch.bfloat16), because="dtypes of bias and gate.weight, default bfloat16")


@task("MoE")
def test_the_bias_starts_at_zero(solution):
    found = solution.MoE(config("V3")).gate.e_score_correction_bias
    assert_equal(found, torch.zeros(8), because="the bias at the start")


@task("MoE")
def test_the_router_starts_like_a_linear_layer(solution, seed):
    torch.manual_seed(seed)
    cfg = config("V2", hidden_size=100, n_routed_experts=40, moe_intermediate_size=1, n_shared_experts=1)
    largest = solution.MoE(cfg).gate.weight.detach().abs().max().item()
    assert_that(0.095 < largest <= 0.1 + 1e-6, "gate.weight, from U(-0.1, 0.1): its largest", value=rounded(largest))


@task("MoE")
@pytest.mark.parametrize("style", ["V2", "V3"])
def test_the_scaling_is_for_the_routed_experts_only(solution, randn, style):
    layer, state = moe_of(solution, randn, config(style, routed_scaling_factor=1.0))
    larger = solution.MoE(config(style, routed_scaling_factor=3.0)).to(randn(1).device, torch.float64)
    larger.load_state_dict(layer.state_dict())
    x = moe_tokens(randn, 5, config(style), state)
    shared = like(gated(array(x), *(state[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down"))), x)
    expected = shared.to(x.device)
    found = (3.0 * layer(x) - larger(x)).detach() / 2
    assert_close(
        found, expected, because="3 times the layer with scaling 1, less that with scaling 3: twice the shared experts"
    )


@task("MoE")
@pytest.mark.parametrize("style", ["V2", "V3"])
def test_gradients_reach_what_was_used(solution, randn, style):
    cfg = config(style)
    layer, state = moe_of(solution, randn, cfg)
    x = moe_tokens(randn, 1, cfg, state).requires_grad_()
    numbers = state.get("gate.e_score_correction_bias", np.zeros(8)).tolist()
    logits = logits_of(array(x), state)[0].tolist()
    chosen = softmax_by_hand(logits, 3, 4, 2) if style == "V2" else sigmoid_by_hand(logits, numbers, 3, 4, 2)
    layer(x).square().sum().backward()
    reached = [name for name, p in layer.named_parameters() if p.grad is not None and bool(p.grad.any())]
    wanted = [name for name in names_of(cfg) if not name.endswith("bias")]
    wanted = [name for name in wanted if not name.startswith("experts") or int(name.split(".")[1]) in chosen]
    assert_equal(sorted(reached), sorted(wanted), because="gradients for router, shared and chosen experts alone")
    assert_that(x.grad is not None and x.grad.any(), "and for the token", value=None if x.grad is None else x.grad)


@task("MoE")
@pytest.mark.parametrize("style", ["V2", "V3"])
@pytest.mark.parametrize("shared", [2, 0])
def test_the_work_of_the_layer(solution, randn, style, shared):
    cfg = config(style, n_shared_experts=shared)
    layer, _ = moe_of(solution, randn, cfg)
    x = randn(2, 5, 8, dtype=torch.float64)
    most = 2 * 10 * 8 * 8 + 10 * 3 * 6 * 8 * 6 + 10 * 6 * 8 * 6 * shared + 2 * 10 * 3 * 8
    assert_cost(layer, x, max_flops=most, because="router, k routed experts a token, and the shared ones")


@task("MoE")
@pytest.mark.parametrize("word", ["tanh", "Softmax", None])
def test_other_scoring_functions(solution, word):
    because = f"scoring_func {word!r}"
    assert_raises(ValueError, solution.MoE, config("V2", scoring_func=word), mentions=[str(word)], because=because)


@task("MoE")
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 16), (1,)], ids=str)
def test_tokens_of_another_width(solution, randn, shape):
    layer = solution.MoE(config("V2")).to(randn(1).device)
    mentions = [str(shape), "(8, 8)"]
    assert_raises(ValueError, layer, randn(*shape), mentions=mentions, because=f"x {shape} for hidden_size 8")


@cost_case("MoE")
def moe_cost(module, randn):
    layer = module.MoE(config("V3", hidden_size=32, moe_intermediate_size=16)).to(randn(1).device)
    x = randn(4, 16, 32)
    return lambda: layer(x)


# update_bias


@task("update_bias")
@pytest.mark.parametrize("rate", [0.001, 0.5])
@pytest.mark.parametrize("kind", [torch.int64, torch.float32], ids=str)
def test_each_expert_is_nudged_towards_the_mean(solution, randn, device, dtype, rate, kind):
    bias = randn(6, dtype=dtype)
    counts = torch.tensor([0, 9, 4, 5, 4, 2], device=device).to(kind)  # the mean is 4
    expected = like(array(bias) + rate * np.array([1, -1, 0, -1, 0, 1]), bias)
    found = solution.update_bias(bias, counts, rate)
    assert_close(found, expected, because="counts 0, 9, 4, 5, 4, 2 with mean 4")


@task("update_bias")
def test_a_mean_that_is_no_integer(solution, device):
    bias, counts = torch.zeros(4, device=device), torch.tensor([1, 2, 2, 2], device=device)
    expected = torch.tensor([0.5, -0.5, -0.5, -0.5])
    assert_close(solution.update_bias(bias, counts, 0.5), expected, because="counts 1, 2, 2, 2 have the mean 1.75")


@task("update_bias")
@pytest.mark.parametrize("count", [0, 7])
def test_equal_counts_change_nothing(solution, randn, device, count):
    bias = randn(5)
    found = solution.update_bias(bias, torch.full((5,), count, device=device), 0.25)
    assert_equal(found, bias.cpu(), because=f"all experts got {count} tokens")


@task("update_bias")
def test_random_counts(solution, randn, randint):
    bias, counts = randn(64, dtype=torch.float64), randint(0, 100, (64,))
    numbers = counts.tolist()
    mean = sum(numbers) / 64
    steps = [(mean > count) - (mean < count) for count in numbers]
    expected = like(array(bias) + 0.01 * np.array(steps), bias)
    assert_close(solution.update_bias(bias, counts, 0.01), expected, because="64 experts with random counts")


@task("update_bias")
@pytest.mark.parametrize("bias, counts", [((4,), (5,)), ((4,), (1,)), ((1,), (4,)), ((4,), (4, 1))], ids=str)
def test_counts_that_do_not_fit(solution, randn, randint, bias, counts):
    args = randn(*bias), randint(0, 9, counts), 0.1
    because = f"bias {bias}, counts {counts}"
    assert_raises(ValueError, solution.update_bias, *args, mentions=[str(bias), str(counts)], because=because)


# balance_loss


def balance_by_hand(scores, indices, alpha, mask=None):
    """By loops over the tokens that count: scores (N, E) and indices (N, K) as arrays."""
    keep = [n for n in range(len(scores)) if mask is None or mask[n]]
    E, K = scores.shape[1], indices.shape[1]
    total = 0.0
    for e in range(E):
        count = sum(1 for n in keep for i in range(K) if indices[n, i] == e)
        share = sum(scores[n, e] for n in keep)
        if keep:
            total += count * E / (K * len(keep)) * share / len(keep)
    return alpha * total


def probabilities(randn, *shape, dtype=torch.float64):
    return like(softmax_of(array(randn(*shape, dtype=torch.float64))), randn(1, dtype=dtype)).to(randn(1).device)


def crowd(randint, *shape):
    """Indices that prefer small numbers, below 6."""
    return torch.minimum(randint(0, 6, shape), randint(0, 6, shape))


def scalar(value, x):
    return torch.tensor(value, dtype=x.dtype)


@task("balance_loss")
@pytest.mark.parametrize("alpha", [1.0, 0.003])
@pytest.mark.parametrize("N, K", [(20, 2), (7, 3), (1, 1)], ids=str)
def test_load_times_mean_score(solution, randn, randint, dtype, alpha, N, K):
    scores, indices = probabilities(randn, N, 6, dtype=dtype), crowd(randint, N, K)
    expected = scalar(balance_by_hand(array(scores), indices.cpu().numpy(), alpha), scores)
    assert_close(solution.balance_loss(scores, indices, alpha), expected, because="alpha * sum of f P", **SUMS[dtype])


@task("balance_loss")
def test_perfect_balance_costs_alpha(solution, device):
    scores = torch.full((32, 16), 1 / 16, device=device)
    indices = torch.arange(64, device=device).reshape(32, 2) % 16
    assert_close(solution.balance_loss(scores, indices, 0.5), torch.tensor(0.5), because="uniform: f = 1, P = 1 / 16")


@task("balance_loss")
def test_collapse_costs_e_over_k_times_alpha(solution, device):
    scores = torch.zeros(32, 16, device=device)
    scores[:, :2] = 0.5
    indices = torch.tensor([[0, 1]] * 32, device=device)
    found = solution.balance_loss(scores, indices, 1.0)
    assert_close(found, torch.tensor(8.0), because="16 experts, and all tokens choose the same two: 16 / 2")


@task("balance_loss")
def test_padding_is_not_there(solution, randn, randint, dtype):
    scores, indices = probabilities(randn, 12, 6, dtype=dtype), crowd(randint, 12, 2)
    mask = torch.arange(12, device=scores.device) % 3 != 0
    expected = scalar(balance_by_hand(array(scores), indices.cpu().numpy(), 2.0, mask.tolist()), scores)
    found = solution.balance_loss(scores, indices, 2.0, mask=mask)
    assert_close(found, expected, because="every third token is padding", **SUMS[dtype])


@task("balance_loss")
def test_no_tokens_cost_nothing(solution, randn, randint):
    scores, indices = probabilities(randn, 5, 6), crowd(randint, 5, 2)
    found = solution.balance_loss(scores, indices, 1.0, mask=torch.zeros(5, dtype=torch.bool, device=scores.device))
    assert_equal(found, torch.tensor(0.0, dtype=torch.float64), because="all tokens are padding")
    found = solution.balance_loss(scores[:0], indices[:0], 1.0)
    assert_equal(found, torch.tensor(0.0, dtype=torch.float64), because="N = 0")


@task("balance_loss")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
def test_gradients_flow_through_the_mean_score(solution, randn, randint, masked):
    scores, indices = probabilities(randn, 9, 6), crowd(randint, 9, 2)
    mask = torch.arange(9, device=scores.device) < (6 if masked else 9)
    n = int(mask.sum())
    load = torch.bincount(indices[mask].flatten(), minlength=6).double() * 6 / (2 * n)
    expected = 3.0 * load / n * mask[:, None]
    leaf = scores.clone().requires_grad_()
    solution.balance_loss(leaf, indices, 3.0, mask=mask if masked else None).backward()
    assert_that(leaf.grad is not None, "the scores get a gradient")
    assert_close(leaf.grad, expected, because="alpha f_e / N for each token that counts")


@task("balance_loss")
def test_counts_beyond_what_half_precision_can_count(solution, randn, device):
    scores = probabilities(randn, 1500, 4, dtype=torch.bfloat16)
    indices = torch.tensor([[0, 1]], device=device).expand(1500, 2)
    expected = scalar(balance_by_hand(array(scores), indices.cpu().numpy(), 1.0), scores)
    found = solution.balance_loss(scores, indices, 1.0)
    assert_close(found, expected, because="1500 tokens in bfloat16, which counts up to 256", rtol=1e-2, atol=0)


MISFITS = [((5, 6), (4, 2), None), ((5, 6), (5, 2), (4,)), ((5, 6), (5, 2), (1,)), ((5, 6), (1, 2), None)]


@task("balance_loss")
@pytest.mark.parametrize("scores, indices, mask", MISFITS, ids=str)
def test_choices_that_do_not_fit(solution, randn, randint, scores, indices, mask):
    args = randn(*scores), randint(0, 6, indices), 1.0
    options = {} if mask is None else {"mask": torch.ones(mask, dtype=torch.bool, device=randn(1).device)}
    mentions = [str(scores), str(indices if mask is None else mask)]
    because = f"scores {scores}, indices {indices}, mask {mask}"
    assert_raises(ValueError, solution.balance_loss, *args, **options, mentions=mentions, because=because)


# sequence_balance_loss


def sequences_by_hand(scores, indices, alpha, mask=None):
    losses = []
    for b in range(len(scores)):
        rows = np.array([[value / (sum(row) + 1e-20) for value in row] for row in scores[b]]).reshape(scores[b].shape)
        counted = None if mask is None else mask[b]
        if len(rows) and (mask is None or any(counted)):
            losses.append(balance_by_hand(rows, indices[b], alpha, counted))
    return sum(losses) / len(losses) if losses else 0.0


def sigmoids(randn, *shape, dtype=torch.float64):
    return like(squash(array(randn(*shape, dtype=torch.float64, scale=2.0))), randn(1, dtype=dtype)).to(randn(1).device)


@task("sequence_balance_loss")
@pytest.mark.parametrize("alpha", [1.0, 0.0001])
@pytest.mark.parametrize("B, T, K", [(3, 8, 2), (1, 5, 3), (4, 1, 1)], ids=str)
def test_each_sequence_by_itself(solution, randn, randint, dtype, alpha, B, T, K):
    scores, indices = sigmoids(randn, B, T, 6, dtype=dtype), crowd(randint, B, T, K)
    expected = scalar(sequences_by_hand(array(scores), indices.cpu().numpy(), alpha), scores)
    found = solution.sequence_balance_loss(scores, indices, alpha) / alpha
    because = "the loss of each sequence, with normalized scores, averaged (divided by alpha)"
    assert_close(found, expected / alpha, because=because, **SUMS[dtype])


@task("sequence_balance_loss")
def test_two_sequences_that_balance_each_other(solution, device):
    scores = torch.zeros(2, 4, 8, device=device)
    scores[0, :, :4], scores[1, :, 4:] = 0.3, 0.9
    indices = torch.tensor([[[0, 1, 2, 3]] * 4, [[4, 5, 6, 7]] * 4], device=device)
    found = solution.sequence_balance_loss(scores, indices, 1.0)
    because = "together all experts are busy, but each sequence uses half of them: 8 / 4"
    assert_close(found, torch.tensor(2.0), because=because)


@task("sequence_balance_loss")
def test_padding_in_sequences(solution, randn, randint, dtype):
    scores, indices = sigmoids(randn, 3, 8, 6, dtype=dtype), crowd(randint, 3, 8, 2)
    lengths = torch.tensor([[8], [3], [5]], device=scores.device)
    mask = torch.arange(8, device=scores.device) < lengths
    expected = scalar(sequences_by_hand(array(scores), indices.cpu().numpy(), 1.0, mask.tolist()), scores)
    found = solution.sequence_balance_loss(scores, indices, 1.0, mask=mask)
    assert_close(found, expected, because="sequences of 8, 3 and 5 tokens", **SUMS[dtype])


@task("sequence_balance_loss")
def test_a_sequence_of_padding_alone(solution, randn, randint):
    scores, indices = sigmoids(randn, 3, 4, 6), crowd(randint, 3, 4, 2)
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4], device=scores.device)
    expected = scalar(sequences_by_hand(array(scores), indices.cpu().numpy(), 1.0, mask.tolist()), scores)
    found = solution.sequence_balance_loss(scores, indices, 1.0, mask=mask)
    assert_close(found, expected, because="a sequence without tokens is left out of the average")
    found = solution.sequence_balance_loss(scores, indices, 1.0, mask=torch.zeros_like(mask))
    assert_equal(found, torch.tensor(0.0, dtype=torch.float64), because="nothing but padding")


@task("sequence_balance_loss")
@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)], ids=str)
def test_empty_batches_and_sequences(solution, randn, randint, B, T):
    found = solution.sequence_balance_loss(randn(B, T, 6), randint(0, 6, (B, T, 2)), 1.0)
    assert_equal(found, torch.tensor(0.0), because=f"B = {B}, T = {T}")


@task("sequence_balance_loss")
def test_tokens_without_any_score(solution, device):
    scores = torch.zeros(1, 2, 4, dtype=torch.float64, device=device)
    scores[0, 0] = torch.tensor([3e-20, 1e-20, 0, 0])
    indices = torch.tensor([[[0], [1]]], device=device)
    expected = scalar(sequences_by_hand(array(scores), indices.cpu().numpy(), 1.0), scores)
    found = solution.sequence_balance_loss(scores, indices, 1.0)
    assert_close(found, expected, because="scores of 0 and of 1e-20: each row is divided by its sum plus 1e-20")


@task("sequence_balance_loss")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "some"])
def test_gradients_flow_through_the_normalized_scores(solution, randn, randint, masked):
    scores, indices = sigmoids(randn, 2, 5, 6), crowd(randint, 2, 5, 2)
    mask = torch.arange(5, device=scores.device) < torch.tensor([[5], [3 if masked else 5]], device=scores.device)
    counts = (indices[..., None] == torch.arange(6, device=scores.device)) & mask[:, :, None, None]
    sizes = mask.sum(dim=1)[:, None]
    load = counts.sum(dim=(1, 2)).double() * 6 / (2 * sizes)

    def oracle(scores):
        shares = scores / scores.sum(dim=-1, keepdim=True) * mask[..., None]
        return (load * shares.sum(dim=1) / sizes).sum(dim=1).mean()

    def ours(scores):
        return solution.sequence_balance_loss(scores, indices, 1.0, mask=mask if masked else None)

    assert_gradients_close(ours, oracle, [scores], because="the loss, and the gradient of the scores")


@task("sequence_balance_loss")
def test_long_sequences_in_half_precision(solution, randn, device):
    scores = sigmoids(randn, 1, 1500, 4, dtype=torch.bfloat16)
    indices = torch.tensor([[[0, 1]]], device=device).expand(1, 1500, 2)
    expected = scalar(sequences_by_hand(array(scores), indices.cpu().numpy(), 1.0), scores)
    found = solution.sequence_balance_loss(scores, indices, 1.0)
    assert_close(found, expected, because="1500 tokens in bfloat16, which counts up to 256", rtol=1e-2, atol=0)


@task("sequence_balance_loss")
@pytest.mark.parametrize("scores, indices, mask", [((2, 5, 6), (2, 4, 2), None), ((2, 5, 6), (2, 5, 2), (2, 4)),
                                                   ((2, 5, 6), (2, 5, 2), (5,)), ((2, 5, 6), (1, 5, 2), None)], ids=str)  # fmt: skip
def test_sequences_that_do_not_fit(solution, randn, randint, scores, indices, mask):
    args = randn(*scores), randint(0, 6, indices), 1.0
    options = {} if mask is None else {"mask": torch.ones(mask, dtype=torch.bool, device=randn(1).device)}
    mentions = [str(scores), str(indices if mask is None else mask)]
    because = f"scores {scores}, indices {indices}, mask {mask}"
    assert_raises(ValueError, solution.sequence_balance_loss, *args, **options, mentions=mentions, because=because)


# simulate

GRID = 0.0437  # sigmoids differ by multiples of it, biases by multiples of 2 * rate: no choice is a close one


def graded_tokens(randn, N):
    """A router and tokens (float64) whose sigmoids are, in each row, 16 different multiples of GRID plus 0.1."""
    ranks = array(randn(N, 16)).argsort(axis=1)
    ranks[:, :2] = np.sort(ranks[:, :2], axis=1)
    s = 0.1 + GRID * ranks
    gate_w, _ = np.linalg.qr(array(randn(16, 16)))
    data = np.log(s / (1 - s)) @ gate_w  # logits = data gate_w^T
    make = randn(1, dtype=torch.float64)
    return like(gate_w, make).to(make.device), like(data, make).to(make.device)


def replay(gate_w, data, steps, k, rate):
    """The bias and the violations, by loops."""
    s = squash(array(data) @ array(gate_w).T)
    E = s.shape[1]
    bias, violations = [0.0] * E, []
    for step in range(steps + 1):
        counts = [0] * E
        for row in s:
            for e in sorted(range(E), key=lambda e: row[e] + bias[e], reverse=True)[:k]:
                counts[e] += 1
        mean = sum(counts) / E
        violations.append(max(counts) / mean - 1)
        if step < steps:
            bias = [b + rate * ((mean > count) - (mean < count)) for b, count in zip(bias, counts, strict=True)]
    return np.array(bias), np.array(violations)


@task("simulate")
@pytest.mark.parametrize("part", [0, 1], ids=["bias", "violations"])
@pytest.mark.parametrize(
    "N, steps, options", [(16, 8, {}), (4, 1, {}), (16, 0, {}), (16, 6, {"k": 3, "rate": 0.02})], ids=str
)
def test_the_simulation_by_loops(solution, randn, part, N, steps, options):
    gate_w, data = graded_tokens(randn, N)
    made = replay(gate_w, data, steps, **({"k": 2, "rate": 0.01} | options))[part]
    expected = like(made, data)
    found = solution.simulate(gate_w, data, steps, **options)
    assert_equal(len(found), 2, because="(bias, violations)")
    because = f"{['the bias', 'the violations'][part]} after {steps} steps, {options or 'by default'}"
    assert_close(found[part], expected, because=because)


@task("simulate")
def test_a_crowded_router_finds_its_balance(solution):
    generator = torch.Generator().manual_seed(3)
    gate_w = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    logits = torch.randn(1024, 16, generator=generator)
    logits[:, 3] += 3.0
    logits[:, 8] += 3.0
    logits[:, 15] -= 6.0  # nobody comes at first
    bias, violations = solution.simulate(gate_w, logits @ gate_w, 400)
    found = rounded(violations[0].item())
    assert_that(violations[0] > 3.0, "at first, two experts get far more than the mean: the violation", value=found)
    worst = rounded(violations[-50:].max().item())
    assert_that(worst < 0.5, "after 350 steps no expert gets 1.5 times the mean: the violation", value=worst)
    found = bias.argsort()[:2].sort().values
    assert_equal(found, torch.tensor([3, 8]), because="the two lowest biases belong to the two crowded experts")


@task("simulate")
def test_no_graph_and_the_dtype_of_the_data(solution, randn):
    gate_w, data = randn(8, 5).requires_grad_(), randn(20, 5).requires_grad_()
    bias, violations = solution.simulate(gate_w, data, 3)
    found = bias.requires_grad, violations.requires_grad, bias.dtype, violations.dtype
    assert_equal(
        found, (False, False, torch.float32, torch.float32), because="gradients and dtypes, bias and violations"
    )
    assert_equal((tuple(bias.shape), tuple(violations.shape)), ((8,), (4,)), because="shapes after 3 steps")


# devices_touched


@task("devices_touched")
@pytest.mark.parametrize("n_devices, n_experts", [(4, 16), (16, 16), (1, 16), (3, 12), (8, 24)], ids=str)
def test_different_devices_of_each_token(solution, randint, n_devices, n_experts):
    indices = randint(0, n_experts, (40, 5))
    size = n_experts // n_devices
    expected = torch.tensor([len({e // size for e in row}) for row in indices.tolist()])
    found = solution.devices_touched(indices, n_devices, n_experts=n_experts)
    assert_equal(found, expected, because=f"{n_experts} experts on {n_devices} devices")


@task("devices_touched")
def test_blocks_and_not_turns(solution, device):
    indices = torch.tensor([[0, 1, 2], [0, 3, 6], [2, 3, 8], [6, 7, 8]], device=device)
    found = solution.devices_touched(indices, 3, n_experts=9)
    assert_equal(found, torch.tensor([1, 3, 3, 1]), because="9 experts on 3 devices: 0-2, 3-5 and 6-8")


@task("devices_touched")
def test_nobody_touches_nothing(solution, device):
    indices = torch.zeros(0, 3, dtype=torch.int64, device=device)
    found = solution.devices_touched(indices, 2, n_experts=4)
    assert_equal(found, torch.zeros(0, dtype=torch.int64), because="N = 0")


@task("devices_touched")
@pytest.mark.parametrize("n_devices, n_experts", [(3, 16), (5, 4)], ids=str)
def test_devices_that_cannot_share_evenly(solution, randint, n_devices, n_experts):
    args = randint(0, 4, (2, 3)), n_devices
    mentions = [str(n_devices), str(n_experts)]
    because = f"{n_experts} experts on {n_devices} devices"
    assert_raises(ValueError, solution.devices_touched, *args, n_experts=n_experts, mentions=mentions, because=because)


# grouped_dispatch


def stacked(randn, E, width, D, dtype=torch.float64):
    return [
        randn(E, width, D, dtype=dtype),
        randn(E, width, D, dtype=dtype),
        randn(E, D, width, dtype=dtype),
    ]


def swiglus(weights):
    gate, up, down = (array(weight) for weight in weights)
    return [lambda row, e=e: gated(row, gate[e], up[e], down[e]) for e in range(len(gate))]


@task("grouped_dispatch")
@pytest.mark.parametrize("N, E, K", [(7, 5, 2), (1, 4, 3), (12, 3, 3), (3, 20, 2), (9, 1, 1)], ids=str)
def test_grouped_experts_by_loops(solution, randn, dtype, N, E, K):
    x, experts = randn(N, 4, dtype=dtype), stacked(randn, E, 6, 4, dtype)
    weights, indices = assignments(randn, N, E, K, dtype)
    expected = like(mixed(array(x), array(weights), indices.tolist(), swiglus(experts)), x)
    found = solution.grouped_dispatch(x, weights, indices, *experts)
    assert_close(found, expected, because="the numbers of a loop over tokens and experts", **SUMS[dtype])


@task("grouped_dispatch")
def test_repeated_idle_and_crowded_experts(solution, randn, device):
    x, experts, weights = randn(4, 5, dtype=torch.float64), stacked(randn, 6, 3, 5), randn(4, 3).double()
    indices = torch.tensor([[4, 4, 1], [4, 4, 4], [1, 4, 1], [4, 3, 4]], device=device)
    expected = like(mixed(array(x), array(weights), indices.tolist(), swiglus(experts)), x)
    found = solution.grouped_dispatch(x, weights, indices, *experts)
    assert_close(found, expected, because="experts 0, 2 and 5 get nothing, expert 4 most, some tokens twice")


@task("grouped_dispatch")
def test_no_tokens_for_groups(solution, randn, dtype):
    indices = torch.zeros(0, 2, dtype=torch.int64, device=randn(1).device)
    args = randn(0, 4, dtype=dtype), randn(0, 2, dtype=dtype), indices, *stacked(randn, 3, 6, 4, dtype)
    assert_close(solution.grouped_dispatch(*args), torch.zeros(0, 4, dtype=dtype), because="N = 0")


@task("grouped_dispatch")
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_half_precision_groups(solution, randn, kind):
    x, experts = randn(20, 4).to(kind), [weight.to(kind) / 2 for weight in stacked(randn, 5, 6, 4)]
    weights, indices = assignments(randn, 20, 5, 3, torch.float32)
    expected = like(mixed(array(x), array(weights), indices.tolist(), swiglus(experts)), x)
    found = solution.grouped_dispatch(x, weights, indices, *experts)
    assert_close(found, expected, because=f"{kind} in, {kind} out", rtol=5e-2, atol=0.2)


@task("grouped_dispatch")
@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_groups_are_added_in_float32(solution, randn, device, kind):
    """Experts whose answers are exact: silu(60) is 60 and the other weights are powers of two."""
    E, D = 9, 6
    w_gate, w_up = (
        torch.full((E, 1, D), 10.0, dtype=kind, device=device),
        torch.full((E, 1, D), 0.5, dtype=kind, device=device),
    )
    w_down = 2.0 ** torch.randint(-6, 3, (E, D, 1), generator=torch.Generator().manual_seed(5)).to(device)
    w_down = (w_down * torch.where(randn(E, D, 1) > 0, 1.0, -1.0)).to(kind)
    x = torch.ones(40, D, dtype=kind, device=device)
    weights, indices = randn(40, 4), randn(40, E).argsort(dim=1)[:, :4]
    said = 180.0 * array(w_down)[:, :, 0]
    expected = mixed(array(x), array(weights), indices.tolist(), [lambda x, row=row: row for row in said])
    found = solution.grouped_dispatch(x, weights, indices, w_gate, w_up, w_down)
    assert_equal(found.dtype, kind, because="the dtype of the result")
    step = torch.finfo(kind).eps / 2
    because = f"weighted and added in float32, and rounded to {kind} once"
    assert_close(found.double(), torch.from_numpy(expected), rtol=step * 1.01, atol=2e-3, because=because)


@task("grouped_dispatch")
def test_gradients_reach_the_stacked_weights(solution, randn):
    x, experts = randn(7, 4, dtype=torch.float64), stacked(randn, 5, 3, 4)
    weights, indices = assignments(randn, 7, 5, 2)

    def oracle(x, weights, gate, up, down):
        hidden = F.silu(torch.einsum("nd,efd->nef", x, gate)) * torch.einsum("nd,efd->nef", x, up)
        said = torch.einsum("nef,edf->ned", hidden, down)
        return torch.einsum("nk,nkd->nd", weights, said[torch.arange(7, device=x.device)[:, None], indices])

    def ours(x, weights, gate, up, down):
        return solution.grouped_dispatch(x, weights, indices, gate, up, down)

    assert_gradients_close(ours, oracle, [x, weights, *experts])


@task("grouped_dispatch")
def test_three_products_for_all_experts(solution, randn):
    args = randn(24, 4), *assignments(randn, 24, 8, 2, torch.float32), *stacked(randn, 8, 6, 4, torch.float32)
    assert_cost(solution.grouped_dispatch, *args, max_matmuls=3, because="at most three matrix products")


@task("grouped_dispatch")
def test_padding_up_to_the_longest_group(solution, randn):
    weights, indices = assignments(randn, 24, 8, 2, torch.float32)
    args = randn(24, 4), weights, indices, *stacked(randn, 8, 6, 4, torch.float32)
    longest = int(torch.bincount(indices.flatten()).max())
    most = 8 * longest * 6 * 4 * 6 + 2 * 24 * 2 * 4
    assert_cost(
        solution.grouped_dispatch, *args, max_flops=most, because="at most E L 6 D F FLOPs, L the longest group"
    )


@task("grouped_dispatch")
def test_weights_are_not_copied_for_each_token(solution, randn, device):
    indices = torch.arange(48, device=device).reshape(24, 2) % 8
    args = randn(24, 5), randn(24, 2), indices, *stacked(randn, 8, 6, 5, torch.float32)
    because = "no tensor of N K F D numbers"
    assert_cost(solution.grouped_dispatch, *args, no_larger_than=24 * 2 * 6 * 5 - 1, because=because)


@task("grouped_dispatch")
def test_calls_do_not_grow_with_the_number_of_experts(solution, randn):
    found = []
    for E in (4, 24):
        weights, indices = assignments(randn, 24, E, 2, torch.float32)
        args = randn(24, 4), weights, indices, *stacked(randn, E, 6, 4, torch.float32)
        _, cost = measure(solution.grouped_dispatch, *args)
        found.append(cost.calls)
    assert_that(found[0] == found[1], "ATen calls with 4 experts and with 24", value=found)


@task("grouped_dispatch")
@pytest.mark.parametrize("x, weights, indices", [((4, 3), (4, 2), (4, 1)), ((4, 3), (5, 2), (5, 2)), ((5, 3), (1, 2), (1, 2))],
                         ids=str)  # fmt: skip
def test_groups_that_do_not_fit(solution, randn, randint, x, weights, indices):
    args = randn(*x), randn(*weights), randint(0, 4, indices), *stacked(randn, 4, 6, 3, torch.float32)
    mentions = [str(shape) for shape in (x, weights, indices)]
    because = f"x {x}, weights {weights}, indices {indices}"
    assert_raises(ValueError, solution.grouped_dispatch, *args, mentions=mentions, because=because)


@cost_case("grouped_dispatch")
def grouped_dispatch_cost(module, randn):
    x, experts = randn(128, 32), stacked(randn, 8, 16, 32, torch.float32)
    weights, indices = randn(128, 2), torch.arange(256, device=randn(1).device).reshape(128, 2) % 8
    return lambda: module.grouped_dispatch(x, weights, indices, *experts)
