import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch._dynamo  # the first optimizer imports it, which would be counted as the time of some test
from torch import nn

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_raises,
    assert_that,
    cost_case,
    measure,
    noncontiguous,
    task,
)

WIDE = torch.float64
ADAMS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "ForeachAdamW": torch.optim.AdamW}
TORCH = {"SGD": torch.optim.SGD, **ADAMS}
# settings under which everything that can be remembered is remembered
FULL = {
    "SGD": {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05},
    "Adam": {"lr": 0.1, "weight_decay": 0.3, "eps": 0.01},
    "AdamW": {"lr": 0.1, "weight_decay": 0.3, "eps": 0.01},
    "ForeachAdamW": {"lr": 0.1, "weight_decay": 0.3, "eps": 0.01},
}
each = pytest.mark.parametrize("name", [pytest.param(name, marks=task(name)) for name in TORCH])
each_adam = pytest.mark.parametrize("name", [pytest.param(name, marks=task(name)) for name in ADAMS])


# cosine_lr


def check_rates(solution, expected, because, **settings):
    """Compare the rate of each step with `expected`, a dict, call by call: the call that is shown is the wrong one."""
    for step, rate in expected.items():
        assert_close(solution.cosine_lr(step, **settings), rate, because=because)


@task("cosine_lr")
def test_the_whole_schedule_is_the_table_of_the_formula(solution, rand):
    top, low = (rand(2).double().cpu().numpy() * [2.0, 0.1] + [1.0, 0.05]).tolist()
    ramp = np.interp(np.arange(6), [-1, 6], [0.0, top])
    fall = top - (top - low) * np.sin(np.pi / 2 * np.arange(13) / 13) ** 2
    expected = dict(enumerate(np.concatenate([ramp, fall, np.full(4, low)]).tolist()))
    settings = {"lr_max": top, "lr_min": low, "warmup": 6, "total": 19}
    check_rates(solution, expected, "steps 0 to 22 with warmup 6 and total 19", **settings)


@task("cosine_lr")
def test_the_first_step_is_one_part_of_the_ramp(solution):
    check_rates(solution, {0: 0.1}, "0.9 / (8 + 1)", lr_max=0.9, lr_min=0.3, warmup=8, total=30)


@task("cosine_lr")
def test_step_warmup_is_the_first_with_the_full_rate(solution):
    expected = {3: 0.4, 4: 0.5, 5: 0.25 + 0.25 * math.cos(math.pi / 20)}
    check_rates(solution, expected, "the steps around warmup 4", lr_max=0.5, lr_min=0.0, warmup=4, total=24)


@task("cosine_lr")
def test_the_ramp_grows_by_equal_amounts(solution):
    settings = {"lr_max": 0.7, "lr_min": 0.2, "warmup": 6, "total": 9}
    before = solution.cosine_lr(0, **settings)
    for step in range(1, 7):
        rate = solution.cosine_lr(step, **settings)
        assert_close(rate - before, 0.1, because=f"the rate of step {step} less that of the step before it")
        before = rate


@task("cosine_lr")
def test_half_way_down_is_the_mean_of_both_rates(solution):
    quarter = 0.3 * math.cos(math.pi / 4)
    expected = {15: 0.5, 5: 0.8, 10: 0.5 + quarter, 20: 0.5 - quarter, 25: 0.2}
    because = "quarters of the way from step 5 to step 25"
    check_rates(solution, expected, because, lr_max=0.8, lr_min=0.2, warmup=5, total=25)


@task("cosine_lr")
def test_the_lowest_rate_is_reached_at_total_and_kept(solution):
    expected = dict.fromkeys([20, 21, 27, 35, 1000], 0.2)
    check_rates(solution, expected, "steps from total 20 on", lr_max=0.8, lr_min=0.2, warmup=5, total=20)


@task("cosine_lr")
def test_there_is_no_jump(solution):
    settings = {"lr_max": 1.0, "lr_min": 0.1, "warmup": 20, "total": 50}
    steepest = max(1 / 21, 0.9 * math.pi / 2 / 30)
    before = solution.cosine_lr(0, **settings)
    for step in range(1, 60):
        rate = solution.cosine_lr(step, **settings)
        jump = abs(rate - before)
        assert_that(jump <= steepest + 1e-12, f"the rate jumps from step {step - 1} to {step}", value=round(jump, 9))
        before = rate


@task("cosine_lr")
def test_without_warmup_the_first_step_has_the_full_rate(solution):
    expected = {0: 0.6, 5: 0.4, 10: 0.2}
    check_rates(solution, expected, "warmup 0, total 10", lr_max=0.6, lr_min=0.2, warmup=0, total=10)


@task("cosine_lr")
def test_warmup_may_take_all_of_the_time(solution):
    expected = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.05, 5: 0.05}
    check_rates(solution, expected, "warmup 4, total 4", lr_max=0.5, lr_min=0.05, warmup=4, total=4)


@task("cosine_lr")
def test_a_run_of_no_steps_has_the_lowest_rate(solution):
    expected = {0: 0.05, 1: 0.05}
    check_rates(solution, expected, "warmup 0, total 0: all is over", lr_max=0.5, lr_min=0.05, warmup=0, total=0)


@task("cosine_lr")
def test_a_rate_that_does_not_fall_still_has_a_ramp(solution):
    expected = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.3, 4: 0.3}
    check_rates(solution, expected, "lr_min equals lr_max", lr_max=0.3, lr_min=0.3, warmup=2, total=4)


@task("cosine_lr")
@pytest.mark.parametrize("step", [0, 2, 4, 6, 9])
def test_the_rate_is_a_python_float(solution, step):
    found = type(solution.cosine_lr(step, lr_max=0.5, lr_min=0.1, warmup=2, total=6)).__name__
    assert_equal(found, "float", because=f"the type of the rate of step {step}")


@task("cosine_lr")
def test_a_warmup_that_does_not_fit_is_refused_with_both_numbers(solution):
    settings = {"lr_max": 0.5, "lr_min": 0.1}
    assert_raises(ValueError, solution.cosine_lr, 30, **settings, warmup=13, total=12, mentions=["13", "12"])
    assert_raises(ValueError, solution.cosine_lr, 3, **settings, warmup=-1, total=17, mentions=["-1", "17"])


# run


def quadratic(randn, n=3):
    """A well conditioned symmetric matrix A (n, n), eigenvalues from 1 to a few, and x^T A x / 2."""
    b = randn(n, n, dtype=WIDE, scale=0.5)
    a = b @ b.T + torch.eye(n, dtype=WIDE, device=b.device)
    return a, lambda x: x @ a.to(x) @ x / 2


def plain(lr, **settings):
    return lambda params: torch.optim.SGD(params, lr=lr, **settings)


@task("run")
def test_gradient_descent_on_a_quadratic_is_a_power_of_one_matrix(solution, randn):
    a, f = quadratic(randn)
    x0 = randn(3, dtype=WIDE)
    one = torch.eye(3, dtype=WIDE, device=a.device) - 0.05 * a
    expected = torch.stack([torch.linalg.matrix_power(one, k) @ x0 for k in range(8)])
    assert_close(solution.run(plain(0.05), f, x0, 7), expected, because="row k is (I - 0.05 A)^k x0", rtol=1e-9)


@task("run")
def test_momentum_on_a_quadratic_is_a_linear_recurrence_of_two(solution, randn):
    a, f = quadratic(randn)
    x0 = randn(3, dtype=WIDE)
    one = torch.eye(3, dtype=WIDE, device=a.device)
    pair = torch.cat([torch.cat([one - 0.05 * a, -0.05 * 0.7 * one], 1), torch.cat([a, 0.7 * one], 1)])
    start = torch.cat([x0, torch.zeros_like(x0)])
    expected = torch.stack([(torch.linalg.matrix_power(pair, k) @ start)[:3] for k in range(11)])
    found = solution.run(plain(0.05, momentum=0.7), f, x0, 10)
    assert_close(found, expected, because="powers of the matrix that takes (x, buffer) to the next", rtol=1e-9)


@task("run")
def test_the_first_row_is_the_start(solution, randn):
    _, f = quadratic(randn)
    x0 = randn(3, dtype=WIDE)
    assert_close(solution.run(plain(0.1), f, x0, 2)[0], x0.clone(), because="row 0 of the path")


@task("run")
def test_the_last_row_is_behind_the_last_step(solution, randn):
    x0 = randn(4, dtype=WIDE)
    found = solution.run(plain(0.5), lambda x: (x * x).sum() / 2, x0, 3)
    assert_close(found[-1], x0 / 8, because="three steps, each of half the way to 0")


@task("run")
@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(solution, randn, steps):
    x0 = randn(5)
    expected = torch.stack([x0, x0 / 2])[: steps + 1]
    found = solution.run(plain(0.5), lambda x: (x * x).sum() / 2, x0, steps)
    assert_close(found, expected, because="a path has one row more than steps")


@task("run")
def test_the_path_has_the_dtype_of_the_start(solution, randn):
    x0 = randn(2, dtype=WIDE)
    assert_close(solution.run(plain(0.25), lambda x: (x * x).sum(), x0, 1), torch.stack([x0, x0 / 2]))


@task("run")
def test_the_path_has_no_graph_and_the_start_no_gradient(solution, randn):
    x0 = randn(3, dtype=WIDE).requires_grad_()
    expected = torch.stack([x0.detach(), x0.detach() / 2])
    found = solution.run(plain(0.5), lambda x: (x * x).sum() / 2, x0, 1)
    assert_that(not found.requires_grad, "the path has a graph", value=found.requires_grad)
    assert_that(x0.grad is None, "x0 got a gradient")
    assert_close(found, expected)


@task("run")
def test_the_optimizer_is_made_once_of_one_leaf(solution, randn):
    x0, seen = randn(3), []

    def factory(params):
        seen.append((type(params).__name__, len(params), params[0].is_leaf, params[0].requires_grad))
        seen.append(params[0].data_ptr() == x0.data_ptr())
        return torch.optim.SGD(params, lr=0.1)

    solution.run(factory, lambda x: (x * x).sum(), x0, 3)
    assert_equal(seen, [("list", 1, True, True), False], because="what the factory was called with; memory of x0")


@task("run")
def test_the_function_is_evaluated_once_per_step(solution, randn):
    seen = []

    def f(x):
        seen.append(x.requires_grad)
        return (x * x).sum()

    solution.run(plain(0.1), f, randn(3), 4)
    assert_equal(seen, [True] * 4, because="one evaluation per step, each with gradients on")


@task("run")
def test_the_path_does_not_lead_back_to_the_start(solution, randn):
    x0 = randn(3, dtype=WIDE)
    before = x0.clone()
    solution.run(plain(0.5), lambda x: (x * x).sum() / 2, x0, 2).zero_()
    assert_close(x0, before, because="x0 after the path was overwritten", rtol=0, atol=0)


# Helpers of all optimizers


def flat(tensors):
    return torch.cat([t.detach().reshape(-1).clone() for t in tensors])


def things(randn, steps, *, dtype=WIDE, sizes=((3, 4), (5,), ())):
    """Values of some parameters, and for each step a gradient for each of them; some gradients are large."""
    start = [randn(*size, dtype=dtype) for size in sizes]
    return start, [[randn(*size, dtype=dtype) * 10.0 ** (i - 1) for i, size in enumerate(sizes)] for _ in range(steps)]


def leaves(start):
    return [value.clone().requires_grad_() for value in start]


def feed(optimizer, params, gradients):
    """Make a step for each list of gradients (None for none); all parameters after each, (steps, N)."""
    points = []
    for row in gradients:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        points.append(flat(params))
    return torch.stack(points)


def follow(make, start, gradients, **settings):
    params = leaves(start)
    return feed(make(params, **settings), params, gradients)


def remembered(optimizer):
    """All tensors in the state of an optimizer, as its state_dict has them."""
    states = optimizer.state_dict()["state"].values()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


# The plainest tests come first: the first that fails is the one that is shown

COMBINATIONS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov}
    for momentum, dampening, decay, nesterov in itertools.product((0.0, 0.9), (0.0, 0.4), (0.0, 0.1), (False, True))
    if not nesterov or (momentum and not dampening)
]


@task("SGD")
def test_the_defaults_are_plain_descent(solution, randn):
    x, g = randn(6, dtype=WIDE), randn(6, dtype=WIDE)
    found = follow(solution.SGD, [x], [[g], [g]], lr=0.25)
    assert_close(found, torch.stack([x - 0.25 * g, x - 0.5 * g]), because="p - lr * g, twice")


@task("SGD")
def test_the_first_momentum_step_is_the_plain_one(solution, randn):
    x, g = randn(6, dtype=WIDE), randn(6, dtype=WIDE)
    found = follow(solution.SGD, [x], [[g]], lr=0.5, momentum=0.9, dampening=0.4)
    assert_close(found, (x - 0.5 * g)[None], because="the buffer starts as the gradient itself")


@task("SGD")
@pytest.mark.parametrize(
    "settings", COMBINATIONS, ids=["-".join(key for key, value in s.items() if value) or "plain" for s in COMBINATIONS]
)
def test_twenty_steps_are_those_of_torch(solution, randn, settings):
    start, gradients = things(randn, 20, sizes=((2, 3), (4,)))
    expected = follow(torch.optim.SGD, start, gradients, lr=0.05, **settings)
    found = follow(solution.SGD, start, gradients, lr=0.05, **settings)
    assert_close(found, expected, because="20 steps", rtol=1e-9)


@each_adam
def test_the_first_step_has_the_same_size_everywhere(solution, randn, name):
    x = randn(4, dtype=WIDE)
    g = torch.tensor([1e-3, -1e-3, 1e3, -1e3], dtype=WIDE, device=x.device)
    found = follow(getattr(solution, name), [x], [[g]], lr=0.05, weight_decay=0.0)
    expected = (x - 0.05 * g.sign())[None]
    assert_close(found, expected, because="gradients of 0.001 and of 1000 both give a step of lr", rtol=0, atol=1e-6)


@each_adam
def test_a_constant_gradient_gives_steps_of_lr_from_the_start(solution, randn, name):
    x = randn(1, dtype=WIDE)
    found = follow(getattr(solution, name), [x], [[torch.full_like(x, -2.0)]] * 5, lr=0.1, weight_decay=0.0)
    expected = x + 0.1 * torch.arange(1, 6, dtype=WIDE, device=x.device)[:, None]
    assert_close(found, expected, because="the corrected means of a constant are that constant", rtol=0, atol=1e-7)


@each_adam
@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.1, "betas": (0.5, 0.7)}, {"lr": 0.1, "eps": 0.5}, {"lr": 0.1, "weight_decay": 0.2},
     {"lr": 0.1, "betas": (0.0, 0.9)}, {"lr": 0.1, "betas": (0.9, 0.0), "eps": 1e-3}],
    ids=["defaults", "betas", "eps", "decay", "no_mean", "no_square"],
)  # fmt: skip
def test_twenty_steps_are_torchs(solution, randn, name, settings):
    start, gradients = things(randn, 20, sizes=((2, 3), (4,)))
    expected = follow(TORCH[name], start, gradients, **settings)
    found = follow(getattr(solution, name), start, gradients, **settings)
    assert_close(found, expected, because="20 steps", rtol=1e-9)


# What all optimizers have in common


@each
def test_a_parameter_without_gradient_is_left_alone(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 4)
    for row in gradients:
        row[1] = None
    gradients[2][0] = None  # it has been updated twice before: no momentum, no decay now
    params = leaves(start)
    points = feed(make(params, **FULL[name]), params, gradients)
    moved = torch.stack([points[2][:12] - points[1][:12], points[1][:12] - points[0][:12]]).abs().amax(1)
    assert_close(params[1].detach(), start[1], because="a parameter that never had a gradient", rtol=0, atol=0)
    assert_that(moved[0] == 0 and moved[1] > 0, "a step without gradient must not move a parameter", value=moved)


@each
def test_skipped_steps_leave_no_trace(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 6)
    for k in (1, 2, 5):
        gradients[k][0] = None
    for k in (0, 1, 2, 3):
        gradients[k][2] = None
    expected = follow(TORCH[name], start, gradients, **FULL[name])
    found = follow(make, start, gradients, **FULL[name])
    assert_close(found, expected, because="parameters 0 and 2 sat out some of the six steps", rtol=1e-9)


@each
def test_groups_have_settings_of_their_own(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 5)
    other = {"lr": 0.02, "weight_decay": 0.0, **({"momentum": 0.3} if name == "SGD" else {"betas": (0.5, 0.6)})}

    def grouped(cls):
        params = leaves(start)
        groups = [{"params": params[:2]}, {"params": params[2:], **other}]
        return feed(cls(groups, **FULL[name]), params, gradients)

    assert_close(grouped(make), grouped(TORCH[name]), because="two groups with settings of their own", rtol=1e-9)


@each
def test_a_rate_changed_between_steps_holds_from_the_next_one(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 6)

    def scheduled(cls):
        params = leaves(start)
        optimizer = cls(params, **FULL[name])
        points = []
        for k, row in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 0.2 / (k + 1)
            points.append(feed(optimizer, params, [row])[0])
        return torch.stack(points)

    assert_close(scheduled(make), scheduled(TORCH[name]), because="lr is 0.2 / k in step k", rtol=1e-9)


@each
def test_the_settings_lie_in_param_groups(solution, randn, name):
    make = getattr(solution, name)
    optimizer = make(leaves([randn(2)]), **FULL[name])
    assert_that(isinstance(optimizer, torch.optim.Optimizer), "it is a torch.optim.Optimizer")
    found = {key: optimizer.param_groups[0].get(key) for key in FULL[name]}
    assert_equal(found, FULL[name], because="param_groups[0] has the arguments under their names")


@each
def test_a_state_dict_continues_the_run_bit_by_bit(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 6)
    gradients[0][2] = gradients[2][1] = None
    whole = follow(make, start, gradients, **FULL[name])
    params = leaves(start)
    first = make(params, **FULL[name])
    feed(first, params, gradients[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = leaves([p.detach() for p in params])
    second = make(resumed, lr=0.7)
    second.load_state_dict(torch.load(file, weights_only=True))
    found = feed(second, resumed, gradients[3:])
    assert_equal(found, whole[3:], because="steps 4 to 6 of a run that was saved after step 3")


@each
def test_a_loaded_state_is_not_shared(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 4)
    params = leaves(start)
    first = make(params, **FULL[name])
    feed(first, params, gradients[:2])
    twin_params = leaves([p.detach() for p in params])
    twin = make(twin_params, **FULL[name])
    twin.load_state_dict(copy.deepcopy(first.state_dict()))
    expected = feed(twin, twin_params, gradients[2:])
    assert_equal(feed(first, params, gradients[2:]), expected, because="two optimizers with one past")


@each
def test_a_closure_runs_once_before_the_update_with_gradients_on(solution, randn, name):
    make = getattr(solution, name)
    x0, seen = randn(4, dtype=WIDE), []
    old = x0.clone()
    p = x0.clone().requires_grad_()
    optimizer = make([p], lr=0.1)

    def closure():
        seen.append((torch.is_grad_enabled(), torch.equal(p.detach(), old)))
        p.grad = p.detach() * 2
        return "the loss"

    found = optimizer.step(closure)
    assert_equal(seen, [(True, True)], because="(gradients on, before the update), one entry per call")
    assert_equal(found, "the loss", because="step(closure) returns what the closure returned")
    assert_that(not torch.equal(p.detach(), old), "the gradient that the closure computes is used in the same step")


@each
def test_a_step_without_closure_returns_nothing(solution, randn, name):
    params = leaves([randn(3)])
    optimizer = getattr(solution, name)(params, lr=0.1)
    params[0].grad = randn(3)
    assert_equal(optimizer.step(), None)


@each
def test_the_parameters_stay_the_same_leaves_in_the_same_memory(solution, randn, name):
    start, gradients = things(randn, 2)
    params = leaves(start)
    optimizer = getattr(solution, name)(params, **FULL[name])
    views, before = [p.detach() for p in params], flat(start)
    found = feed(optimizer, params, gradients)[-1]
    assert_that(not torch.equal(found, before), "the parameters that were handed in have not moved")
    assert_equal(flat(views), found, because="views of the parameters, made before the steps")
    assert_that(all(p.is_leaf and p.requires_grad for p in params), "parameters are leaves that require grad")
    assert_that(all(not t.requires_grad for t in remembered(optimizer)), "what is remembered has no graph")


@each
def test_no_graph_is_kept_of_gradients_that_have_one(solution, randn, name):
    p = randn(4, dtype=WIDE).requires_grad_()
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    optimizer = getattr(solution, name)([p], **FULL[name])
    optimizer.step()
    p.grad = None
    assert_that(p.is_leaf and p.requires_grad, "the parameter is a leaf")
    assert_that(all(not t.requires_grad for t in remembered(optimizer)), "what is remembered has no graph")


@each
def test_gradients_are_not_changed(solution, randn, name):
    start, gradients = things(randn, 2)
    params = leaves(start)
    optimizer = getattr(solution, name)(params, **FULL[name])
    feed(optimizer, params, gradients)
    found = flat([p.grad for p in params])
    assert_close(found, flat(gradients[-1]), because=".grad after the step", rtol=0, atol=0)


@each
def test_gradients_that_are_overwritten_are_not_remembered(solution, randn, name):
    make = getattr(solution, name)
    settings = {**FULL[name], "weight_decay": 0.0}
    start, gradients = things(randn, 4)
    expected = follow(TORCH[name], start, gradients, **settings)
    params, points = leaves(start), []
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = make(params, **settings)
    for row in gradients:
        for p, g in zip(params, row, strict=True):
            p.grad.copy_(g)
        optimizer.step()
        points.append(flat(params))
    assert_close(torch.stack(points), expected, because="the same .grad tensors, filled anew each time", rtol=1e-9)


@each
def test_strides_do_not_matter(solution, randn, name):
    make = getattr(solution, name)
    start = [randn(4, 3, dtype=WIDE), randn(5, dtype=WIDE)]
    gradients = [[randn(4, 3, dtype=WIDE), randn(5, dtype=WIDE)] for _ in range(3)]
    expected = follow(TORCH[name], start, gradients, **FULL[name])
    params = [noncontiguous(start[0]).requires_grad_(), start[1].clone().requires_grad_()]
    optimizer = make(params, **FULL[name])
    for first, second in gradients:
        params[0].grad, params[1].grad = noncontiguous(first), second.clone()
        optimizer.step()
    assert_close(flat(params), expected[-1], because="a parameter and a gradient with gaps in memory", rtol=1e-9)


@each
def test_an_empty_parameter_does_no_harm(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 2, sizes=((0, 3), (2,)))
    expected = follow(TORCH[name], start, gradients, **FULL[name])
    assert_close(follow(make, start, gradients, **FULL[name]), expected, rtol=1e-9)


@each
def test_single_precision_stays_single_precision(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 3, dtype=torch.float32)
    expected = follow(TORCH[name], start, gradients, **FULL[name])
    assert_close(follow(make, start, gradients, **FULL[name]), expected, rtol=1e-4, atol=1e-5)


@each
def test_bfloat16_stays_bfloat16(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 3, dtype=torch.bfloat16, sizes=((3, 4), (5,)))
    wide = [[g.double() for g in row] for row in gradients]
    expected = follow(TORCH[name], [p.double() for p in start], wide, **FULL[name]).bfloat16()
    found = follow(make, start, gradients, **FULL[name])
    assert_close(found, expected, because="three steps in bfloat16", rtol=3e-2, atol=5e-2)


@each
def test_what_is_remembered_is_like_its_parameter(solution, randn, name):
    params = leaves([randn(3, 4, dtype=torch.bfloat16), randn(3, 4, dtype=WIDE)])
    optimizer = getattr(solution, name)([{"params": [p]} for p in params], **FULL[name])
    feed(optimizer, params, [[randn(3, 4, dtype=p.dtype) for p in params]])
    found = sorted({(str(t.dtype), t.device.type) for t in remembered(optimizer) if t.numel() == 12})
    expected = sorted((str(p.dtype), p.device.type) for p in params)
    assert_equal(found, expected, because="dtype and device of the tensors in state")


@each
def test_a_rate_of_zero_moves_nothing(solution, randn, name):
    make = getattr(solution, name)
    start, gradients = things(randn, 2)
    found = follow(make, start, gradients, **{**FULL[name], "lr": 0.0})
    assert_close(found[-1], flat(start), because="lr = 0", rtol=0, atol=0)


@each
def test_negative_settings_are_refused(solution, randn, name):
    make = getattr(solution, name)
    params = leaves([randn(2)])
    assert_raises(ValueError, make, params, lr=-0.125, mentions=["-0.125"])
    assert_raises(ValueError, make, params, lr=0.1, weight_decay=-0.25, mentions=["-0.25"])


def one_large(randn, optimizer_class, **settings):
    """A thunk for a step of an optimizer that has made one already, and the bytes of its largest parameter."""
    params = leaves([randn(50, 400), randn(7), randn(3, 5)])
    gradients = [[randn(*p.shape) for p in params] for _ in range(2)]
    optimizer = optimizer_class(params, **settings)
    feed(optimizer, params, gradients)
    return optimizer, params[0].nbytes


@each
def test_a_step_needs_little_memory(solution, randn, name):
    optimizer, largest = one_large(randn, getattr(solution, name), **FULL[name])
    assert_cost(optimizer.step, max_peak_bytes=4 * largest + 4096, because="at most 4 new tensors at the same time")


@each
def test_state_takes_little_memory(solution, randn, name):
    optimizer, _ = one_large(randn, getattr(solution, name), **FULL[name])
    size = sum(t.nbytes for t in remembered(optimizer))
    copies = 1 if name == "SGD" else 2
    allowed = copies * 4 * (20000 + 7 + 15) + 3 * 64
    assert_that(size <= allowed, f"{copies} numbers for each of 20,022, and 64 bytes per parameter", value=size)


# SGD


@task("SGD")
def test_momentum_that_is_switched_on_later_starts_as_the_gradient(solution, randn):
    x, g, h, i = (randn(4, dtype=WIDE) for _ in range(4))
    p = x.clone().requires_grad_()
    optimizer = solution.SGD([p], lr=0.5, dampening=0.25)
    points = [feed(optimizer, [p], [[g]])]
    optimizer.param_groups[0]["momentum"] = 0.8
    points.append(feed(optimizer, [p], [[h], [i]]))
    expected = x - 0.5 * torch.stack([g, g + h, g + h + 0.8 * h + 0.75 * i])
    assert_close(torch.cat(points), expected, because="momentum is 0 in step 1, and 0.8 in steps 2 and 3")


@task("SGD")
def test_a_constant_gradient_is_amplified_up_to_ten_times(solution):
    found = follow(
        solution.SGD, [torch.zeros(1, dtype=WIDE)], [[torch.ones(1, dtype=WIDE)]] * 200, lr=1.0, momentum=0.9
    )
    last = (found[-2] - found[-1]).item()
    assert_close(last, 10.0, because="1 + 0.9 + 0.9^2 + ... = 10", rtol=1e-6)


@task("SGD")
def test_gradients_of_zero_let_the_weights_decay(solution, randn):
    x = randn(6, dtype=WIDE)
    found = follow(solution.SGD, [x], [[torch.zeros_like(x)]] * 3, lr=0.5, weight_decay=0.2)
    assert_close(found, torch.stack([x * 0.9, x * 0.81, x * 0.729]), because="each step keeps 1 - 0.5 * 0.2")


@task("SGD")
def test_without_momentum_nothing_is_remembered(solution, randn):
    optimizer, _ = one_large(randn, solution.SGD, lr=0.1, weight_decay=0.1)
    size = sum(t.nbytes for t in remembered(optimizer))
    assert_that(size <= 3 * 64, "without momentum there is nothing to remember", value=size)


@task("SGD")
def test_a_step_takes_few_operations(solution, randn):
    optimizer, _ = one_large(randn, solution.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    assert_cost(optimizer.step, max_calls=3 * 12)


@task("SGD")
def test_nesterov_has_conditions(solution, randn):
    params = leaves([randn(2)])
    assert_raises(ValueError, solution.SGD, params, lr=0.1, nesterov=True)
    assert_raises(ValueError, solution.SGD, params, lr=0.1, momentum=0.9, dampening=0.5, nesterov=True)


@task("SGD")
def test_a_negative_momentum_is_refused(solution, randn):
    assert_raises(ValueError, solution.SGD, leaves([randn(2)]), lr=0.1, momentum=-0.375, mentions=["-0.375"])


@cost_case("SGD")
def sgd_cost(module, randn):
    return one_large(randn, module.SGD, lr=0.1, momentum=0.9)[0].step


# Adam, AdamW and ForeachAdamW


@each_adam
def test_eps_is_added_to_the_root(solution, randn, name):
    x = randn(3, dtype=WIDE)
    g = torch.tensor([0.1, -1.0, 4.0], dtype=WIDE, device=x.device)
    found = follow(getattr(solution, name), [x], [[g]], lr=1.0, eps=0.3, weight_decay=0.0)
    assert_close(found, (x - g / (g.abs() + 0.3))[None], because="the first step is g / (|g| + eps)")


@each_adam
def test_gradients_of_zero_alone_move_nothing(solution, randn, name):
    x = randn(3, dtype=WIDE)
    found = follow(getattr(solution, name), [x], [[torch.zeros_like(x)]] * 2, lr=0.1, weight_decay=0.0)
    assert_close(found, torch.stack([x, x]), because="no gradient, no decay: 0 / (0 + eps)", rtol=0, atol=0)


@each_adam
def test_a_late_parameter_begins_with_a_step_of_lr(solution, randn, name):
    start, gradients = things(randn, 5, sizes=((4,), (3,)))
    for row in gradients[:4]:
        row[1] = None
    gradients[4][1] = torch.full_like(start[1], 0.7)
    found = follow(getattr(solution, name), start, gradients, lr=0.1, weight_decay=0.0)[-1][4:]
    because = "the first gradient comes in step 5 of the optimizer"
    assert_close(found, start[1] - 0.1, because=because, rtol=0, atol=1e-7)


@each_adam
def test_a_group_that_joins_late_counts_its_own_updates(solution, randn, name):
    x, y = randn(4, dtype=WIDE), randn(3, dtype=WIDE)
    early, late = leaves([x, y])
    optimizer = getattr(solution, name)([early], lr=0.1, weight_decay=0.0)
    feed(optimizer, [early], [[torch.ones_like(x)]] * 3)
    optimizer.add_param_group({"params": [late]})
    feed(optimizer, [early, late], [[torch.ones_like(x), None], [torch.ones_like(x), torch.full_like(y, 0.7)]])
    because = "added before step 4, and its first gradient is in step 5"
    assert_close(late.detach(), y - 0.1, because=because, rtol=0, atol=1e-7)


@each_adam
def test_updates_are_counted_in_bfloat16_too(solution, randn, name):
    p = torch.zeros_like(randn(2, dtype=torch.bfloat16)).requires_grad_()
    optimizer = getattr(solution, name)([p], lr=0.5, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    for _ in range(399):
        optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()
    expected = torch.full_like(p.detach(), -0.5 * 0.1 / math.sqrt(0.001 / (1 - 0.999**400)))
    because = "399 updates with a gradient of 0, then one with a gradient of 1: t is 400"
    assert_close(p.detach(), expected, because=because, rtol=4e-2)


@each_adam
@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.25, 0.9), (0.9, -0.25)])
def test_betas_outside_of_their_range_are_refused(solution, randn, name, betas):
    wrong = next(str(beta) for beta in betas if beta != 0.9)
    assert_raises(ValueError, getattr(solution, name), leaves([randn(2)]), betas=betas, mentions=[wrong])


@each_adam
def test_eps_and_betas_may_be_zero_and_eps_not_negative(solution, randn, name):
    make = getattr(solution, name)
    x, g = randn(3, dtype=WIDE), torch.full((3,), 2.0, dtype=WIDE)
    g = g.to(x.device)
    found = follow(make, [x], [[g]], lr=0.5, eps=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    assert_close(found, (x - 0.5)[None], because="eps and both betas 0: the sign of the gradient times lr")
    assert_raises(ValueError, make, leaves([x]), eps=-0.125, mentions=["-0.125"])


@task("Adam")
def test_decay_is_a_part_of_the_gradient(solution, randn):
    x = torch.tensor([0.02, -0.02, 50.0], dtype=WIDE) + randn(3, dtype=WIDE).cpu() * 1e-3
    found = follow(solution.Adam, [x], [[torch.zeros_like(x)]], lr=0.01, weight_decay=0.1)
    expected = (x - 0.01 * x.sign())[None]
    assert_close(found, expected, because="a decay that goes through the root is a step of lr, too", rtol=0, atol=1e-6)


@task("Adam")
def test_a_step_of_adam_takes_few_operations(solution, randn):
    optimizer, _ = one_large(randn, solution.Adam, lr=0.1, weight_decay=0.1)
    assert_cost(optimizer.step, max_calls=3 * 16)


@cost_case("Adam")
def adam_cost(module, randn):
    return one_large(randn, module.Adam, weight_decay=0.1)[0].step


decoupled = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=task(name)) for name in ("AdamW", "ForeachAdamW")]
)


@decoupled
def test_gradients_of_zero_let_weights_decay_by_a_factor(solution, randn, name):
    x = randn(5, dtype=WIDE, scale=10.0)
    factor = 1 - 0.1 * 0.25
    expected = torch.stack([x * factor**k for k in range(1, 5)])
    found = follow(getattr(solution, name), [x], [[torch.zeros_like(x)]] * 4, lr=0.1, weight_decay=0.25)
    assert_close(found, expected, because="each step keeps 1 - lr * weight_decay of a weight")


@decoupled
def test_large_gradients_do_not_protect_from_decay(solution, randn, name):
    make = getattr(solution, name)
    x = randn(2, dtype=WIDE)
    g = torch.tensor([1e-2, 1e4], dtype=WIDE, device=x.device)
    found = follow(make, [x], [[g]], lr=0.1, weight_decay=0.5)
    assert_close(found, (x * 0.95 - 0.1)[None], because="decay of 5 % for both, then a step of lr", rtol=0, atol=1e-5)


@decoupled
def test_the_decay_comes_before_the_step(solution, randn, name):
    x = torch.zeros(3, dtype=WIDE)
    g = randn(3, dtype=WIDE).cpu().sign()
    found = follow(getattr(solution, name), [x], [[g]], lr=1.0, eps=0.0, weight_decay=0.5)
    assert_close(found, -g[None], because="a weight of 0 has nothing to decay before its first step")


@decoupled
def test_the_default_decay_is_a_hundredth(solution, randn, name):
    make = getattr(solution, name)
    x = randn(3, dtype=WIDE)
    still = [[torch.zeros_like(x)]]
    found = torch.cat([follow(make, [x], still, lr=0.5), follow(make, [x], still, lr=0.5, weight_decay=0.1)])
    expected = torch.stack([x * (1 - 0.5 * 0.01), x * (1 - 0.5 * 0.1)])
    assert_close(found, expected, because="two rows: nothing said about weight_decay, and 0.1")


@decoupled
def test_the_decay_follows_the_rate_of_the_step(solution, randn, name):
    x = randn(3, dtype=WIDE)
    p = x.clone().requires_grad_()
    optimizer = getattr(solution, name)([p], lr=0.5, weight_decay=0.2)
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_close(p.detach(), x * 0.98, because="lr was lowered from 0.5 to 0.1 before the step")


@task("AdamW")
def test_a_step_of_adamw_takes_few_operations(solution, randn):
    optimizer, _ = one_large(randn, solution.AdamW, lr=0.1, weight_decay=0.1)
    assert_cost(optimizer.step, max_calls=3 * 14)


@cost_case("AdamW")
def adamw_cost(module, randn):
    return one_large(randn, module.AdamW)[0].step


# param_groups


class Embedding(nn.Module):
    """A table that does not come from torch.nn."""

    def __init__(self, n, d):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, d))


class Tokens(nn.Embedding):
    """An embedding under another name."""


class InputEmbedding(nn.Module):
    """Has a table of its own, an embedding, and a layer."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(6, 4))
        self.tokens = nn.Embedding(5, 4)
        self.project = nn.Linear(4, 3)


class Net(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def names_of(model, groups):
    """The names of the parameters in each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "not a parameter of the model") for p in group["params"]] for group in groups]


def split(solution, model):
    return names_of(model, solution.param_groups(model, 0.1))


@task("param_groups")
def test_matrices_decay_and_vectors_do_not(solution):
    model = Net(a=nn.Linear(3, 4), norm=nn.LayerNorm(4), b=nn.Linear(4, 2, bias=False))
    expected = [["a.weight", "b.weight"], ["a.bias", "norm.weight", "norm.bias"]]
    assert_equal(split(solution, model), expected, because="[decayed, not decayed] of Linear, LayerNorm, Linear")


@task("param_groups")
def test_the_decay_is_given_to_the_first_group_only(solution):
    groups = solution.param_groups(nn.Linear(2, 3), 0.25)
    assert_equal([group["weight_decay"] for group in groups], [0.25, 0.0], because="weight_decay of both groups")
    assert_equal([type(group["params"]).__name__ for group in groups], ["list", "list"], because="params are lists")


@task("param_groups")
def test_filters_decay_and_single_numbers_do_not(solution):
    model = Net(filters=nn.Conv2d(2, 3, 2), scale=nn.Parameter(torch.ones(())), line=nn.Conv1d(2, 3, 2, bias=False))
    expected = [["filters.weight", "line.weight"], ["scale", "filters.bias"]]
    assert_equal(split(solution, model), expected, because="parameters of 4, 3, 1 and 0 dimensions")


@task("param_groups")
def test_a_matrix_with_one_row_is_a_matrix(solution):
    model = Net(row=nn.Parameter(torch.ones(1, 4)), column=nn.Parameter(torch.ones(4, 1)))
    assert_equal(split(solution, model), [["row", "column"], []])


@task("param_groups")
def test_embeddings_do_not_decay(solution):
    model = Net(tokens=nn.Embedding(7, 4), bag=nn.EmbeddingBag(5, 4), layer=nn.Linear(4, 4))
    expected = [["layer.weight"], ["tokens.weight", "bag.weight", "layer.bias"]]
    assert_equal(split(solution, model), expected)


@task("param_groups")
def test_embeddings_of_ones_own_do_not_decay(solution):
    model = Net(inner=nn.Sequential(Embedding(7, 4), Tokens(3, 4)), layer=nn.Linear(4, 4, bias=False))
    expected = [["layer.weight"], ["inner.0.weight", "inner.1.weight"]]
    assert_equal(split(solution, model), expected, because="a class named Embedding, and a subclass of nn.Embedding")


@task("param_groups")
def test_a_layer_inside_an_embedding_is_a_layer(solution):
    model = Net(first=InputEmbedding())
    expected = [["first.project.weight"], ["first.positions", "first.tokens.weight", "first.project.bias"]]
    assert_equal(split(solution, model), expected, because="a module with a table, an embedding and a linear layer")


@task("param_groups")
def test_the_model_itself_may_be_an_embedding(solution):
    assert_equal(split(solution, nn.Embedding(3, 2)), [[], ["weight"]])


@task("param_groups")
def test_names_of_attributes_have_no_say(solution):
    model = Net(
        embedding=nn.Linear(3, 4, bias=False), norm_bias=nn.Parameter(torch.ones(2, 2)),
        weight=nn.Parameter(torch.ones(3)), table=nn.Embedding(3, 2),
    )  # fmt: skip
    expected = [["norm_bias", "embedding.weight"], ["weight", "table.weight"]]
    assert_equal(split(solution, model), expected, because="names that say something else than what is behind them")


@task("param_groups")
def test_frozen_parameters_are_in_no_group(solution):
    model = Net(a=nn.Linear(3, 4), b=nn.Linear(4, 2), e=nn.Embedding(3, 4))
    for p in (model.a.weight, model.b.bias, model.e.weight):
        p.requires_grad_(False)
    assert_equal(split(solution, model), [["b.weight"], ["a.bias"]], because="a.weight, b.bias and e.weight are frozen")


@task("param_groups")
def test_shared_matrices_are_there_once(solution):
    model = Net(a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    assert_equal(split(solution, model), [["a.weight", "c.weight"], ["a.bias", "c.bias"]], because="a and b share all")


@task("param_groups")
def test_a_module_under_two_names_is_there_once(solution):
    layer = nn.Linear(3, 3)
    assert_equal(split(solution, nn.Sequential(layer, nn.ReLU(), layer)), [["0.weight"], ["0.bias"]])


@task("param_groups")
def test_a_head_tied_to_an_embedding_is_an_embedding(solution):
    found = []
    for order in (["tokens", "inner", "head"], ["head", "inner", "tokens"]):
        parts = {
            "tokens": nn.Embedding(5, 4),
            "head": nn.Linear(4, 5, bias=False),
            "inner": nn.Linear(4, 4, bias=False),
        }
        parts["head"].weight = parts["tokens"].weight
        found.append(split(solution, Net(places=nn.Embedding(6, 4), **{name: parts[name] for name in order})))
    expected = [
        [["inner.weight"], ["places.weight", "tokens.weight"]],
        [["inner.weight"], ["places.weight", "head.weight"]],
    ]
    assert_equal(found, expected, because="tokens and head share a matrix: two models, with tokens first or head first")


@task("param_groups")
def test_an_optimizer_takes_the_groups(solution, randn):
    model = Net(norm=nn.LayerNorm(3))
    groups = solution.param_groups(model, 0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    assert_equal([len(group["params"]) for group in optimizer.param_groups], [0, 2], because="a model without matrices")


@task("param_groups")
def test_a_model_without_parameters_has_two_empty_groups(solution):
    expected = [{"params": [], "weight_decay": 0.3}, {"params": [], "weight_decay": 0.0}]
    assert_equal(solution.param_groups(nn.ReLU(), 0.3), expected)


@task("param_groups")
def test_the_model_is_as_before(solution):
    model = Net(a=nn.Linear(3, 4), e=Embedding(3, 4), n=nn.LayerNorm(4)).eval()
    model.a.bias.requires_grad_(False)
    before = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    solution.param_groups(model, 0.1)
    after = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    assert_that(after == before and not model.training, "the model was changed")


# ForeachAdamW


def many(randn, optimizer_class, n):
    """An optimizer of n tensors that has made one step."""
    params = leaves([randn(2 + i % 3, 3) for i in range(n)])
    optimizer = optimizer_class(params, lr=0.1)
    feed(optimizer, params, [[randn(*p.shape) for p in params]])
    return optimizer


@task("ForeachAdamW")
def test_a_hundred_tensors_cost_as_many_operations_as_three(solution, randn):
    few, lots = (measure(many(randn, solution.ForeachAdamW, n).step)[1].calls for n in (3, 100))
    assert_equal(lots - few, 0, because="operations of a step with 100 tensors, less those with 3")


@task("ForeachAdamW")
def test_the_number_of_operations_is_small(solution, randn):
    assert_cost(many(randn, solution.ForeachAdamW, 40).step, max_calls=30)


@task("ForeachAdamW")
def test_together_is_bit_for_bit_as_alone(solution, randn):
    sizes = ((33, 7), (5,), (64, 3), (1,), (17,))
    start, gradients = things(randn, 6, dtype=torch.float32, sizes=sizes)
    gradients[0][1] = gradients[2][1] = gradients[3][4] = None
    alone = [
        follow(solution.ForeachAdamW, [start[i]], [[row[i]] for row in gradients], **FULL["ForeachAdamW"])
        for i in range(len(sizes))
    ]
    together = follow(solution.ForeachAdamW, start, gradients, **FULL["ForeachAdamW"])
    assert_equal(together, torch.cat(alone, 1), because="five tensors in one optimizer, and in five")


@task("ForeachAdamW")
def test_a_group_without_any_gradient_is_left_alone(solution, randn):
    x = randn(3, dtype=WIDE)
    p, q = x.clone().requires_grad_(), x.clone().requires_grad_()
    optimizer = solution.ForeachAdamW([{"params": [p]}, {"params": [q]}], lr=0.5, weight_decay=0.2)
    optimizer.step()
    q.grad = torch.zeros_like(q)
    optimizer.step()
    assert_close(
        torch.stack([p.detach(), q.detach()]), torch.stack([x, x * 0.9]), because="only q had a gradient, once"
    )


@cost_case("ForeachAdamW")
def foreach_cost(module, randn):
    return many(randn, module.ForeachAdamW, 50).step
