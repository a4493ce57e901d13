import copy
import math
import weakref

import numpy as np
import pytest
import torch
import torch._dynamo  # the first optimizer imports it, which would be counted as the time of some test
import torch.nn.functional as F
from torch import nn

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    task,
)

WIDE = torch.float64


# Models and oracles


def filled(model, randn, dtype=WIDE, scale=0.5):
    """The model with parameters drawn from the check's seed, on the device under test."""
    model.to(randn(1).device, dtype)
    for parameter in model.parameters():
        parameter.data = randn(*parameter.shape, dtype=dtype, scale=scale)
    return model


def network(randn, dtype=WIDE):
    return filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), randn, dtype)


def normalized(randn):
    return filled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), randn)


class Gated(nn.Module):
    """Takes two inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a, b):
        return self.left(a) * torch.sigmoid(self.right(b))


class Lookup(nn.Module):
    """Takes the rows that are wanted, and a table to take them from."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, rows, table):
        return self.linear(table)[rows]


def lookups(randn, randint, *sizes):
    """Batches (rows, table, target) in which only the target tells how many examples there are."""
    return [(randint(0, 7, (n, 1)), randn(7, 3, dtype=WIDE), randn(n, 1, 2, dtype=WIDE)) for n in sizes]


def pairs(randn, *sizes, dtype=WIDE):
    return [(randn(n, 3, dtype=dtype), randn(n, 2, dtype=dtype)) for n in sizes]


def vector(tensors):
    """All numbers of these tensors in one."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def weights(model):
    return vector(model.parameters())


def held(model):
    """A copy of all that the model holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def descend(model, inputs, target, loss_fn, lr, max_norm=None):
    """One SGD step by hand on a copy: (the copy after it, the loss before it). Uses neither .grad nor an optimizer."""
    model = copy.deepcopy(model).train()
    parameters = list(model.parameters())
    loss = loss_fn(model(*inputs), target)
    grads = torch.autograd.grad(loss, parameters)
    factor = 1.0
    if max_norm is not None:
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
        factor = min(1.0, max_norm / norm)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.data = parameter.data - lr * factor * grad
    return model, loss.item()


def modes_during(model):
    """A list that collects, at each call of the model, the modes of all its modules."""
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append([m.training for m in module.modules()]))
    return seen


def steps_of(optimizer):
    """A list that collects the learning rate of each step."""
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(opt.param_groups[0]["lr"]))
    return seen


# weighted_mean


@task("weighted_mean")
def test_every_thing_counts_the_same_whatever_the_size_of_its_group(solution, rand):
    values = rand(5).tolist()
    counts = [7, 1, 4, 1, 30]
    expected = float(np.concatenate([np.full(n, v) for v, n in zip(values, counts, strict=True)]).mean())
    assert_close(solution.weighted_mean(values, counts), expected, because="a group of 30 counts 30 times")


@task("weighted_mean")
def test_groups_of_size_zero_have_no_influence(solution, rand):
    a, b = rand(2).tolist()
    expected = (2 * a + 3 * b) / 5
    found = solution.weighted_mean([a, math.nan, b], [2, 0, 3])
    assert_close(found, expected, because="the second group is empty: the mean of nothing is NaN and has no weight")


@task("weighted_mean")
def test_whole_numbers_give_a_float(solution):
    assert_equal(solution.weighted_mean([3, 5, 4], [2, 1, 1]), 3.75)
    assert_equal(solution.weighted_mean([6], [3]), 6.0)


@task("weighted_mean")
def test_lists_of_different_lengths_are_refused_with_both_lengths(solution):
    assert_raises(ValueError, solution.weighted_mean, [1.0, 2.0, 3.0], [1, 1], mentions=["3", "2"])
    assert_raises(ValueError, solution.weighted_mean, [1.0] * 4, [1] * 7, mentions=["4", "7"])


@task("weighted_mean")
def test_the_mean_of_nothing_is_refused(solution):
    assert_raises(ValueError, solution.weighted_mean, [], [])
    assert_raises(ValueError, solution.weighted_mean, [1.0, 2.0], [0, 0])


# clip_grad_norm_


def with_grads(*grads):
    made = []
    for grad in grads:
        parameter = nn.Parameter(torch.ones_like(grad))
        parameter.grad = grad.clone()
        made.append(parameter)
    return made


def some_grads(randn, scale=3.0, dtype=WIDE):
    return [
        randn(4, 3, dtype=dtype, scale=scale),
        randn(5, dtype=dtype, scale=scale),
        randn(2, 1, 3, dtype=dtype),
    ]


def joint_norm(grads):
    return float(np.linalg.norm(np.concatenate([g.double().cpu().numpy().ravel() for g in grads])))


def oracle(grads, max_norm):
    parameters = with_grads(*grads)
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return vector(p.grad for p in parameters)


@task("clip_grad_norm_")
def test_a_long_gradient_is_cut_to_the_limit_and_keeps_its_direction(solution, randn):
    grads = some_grads(randn)
    expected = oracle(grads, 0.75)
    parameters = with_grads(*grads)
    solution.clip_grad_norm_(parameters, 0.75)
    assert_close(
        vector(p.grad for p in parameters),
        expected,
        rtol=2e-5,
        because="one factor for all gradients together",
    )


@task("clip_grad_norm_")
def test_the_norm_before_clipping_is_returned(solution, randn):
    grads = some_grads(randn)
    expected = torch.tensor(joint_norm(grads), dtype=WIDE)
    found = solution.clip_grad_norm_(with_grads(*grads), 0.75)
    assert_close(found, expected, because="the joint norm of all gradients, as it was before")


@task("clip_grad_norm_")
def test_below_the_limit_no_bit_changes(solution, randn):
    grads = some_grads(randn, dtype=torch.float32)
    expected = vector(grads)
    norm = joint_norm(grads)
    parameters = with_grads(*grads)
    found = solution.clip_grad_norm_(parameters, 1.01 * norm)
    assert_equal(vector(p.grad for p in parameters), expected, because="the norm is below the limit")
    assert_close(found, torch.tensor(norm, dtype=torch.float32))


@task("clip_grad_norm_")
def test_parameters_without_gradient_are_left_out(solution, randn):
    grads = some_grads(randn)
    expected = oracle(grads, 0.5)
    first, second, third = with_grads(*grads)
    idle = nn.Parameter(randn(3, dtype=WIDE))
    solution.clip_grad_norm_([idle, first, second, third], 0.5)
    assert_that(idle.grad is None, "a parameter without gradient gets none", value=idle.grad)
    assert_close(vector([first.grad, second.grad, third.grad]), expected, rtol=2e-5)


@task("clip_grad_norm_")
def test_without_any_gradient_the_norm_is_zero(solution, randn):
    assert_close(solution.clip_grad_norm_([], 1.0), torch.tensor(0.0), check_dtype=False)
    idle = [nn.Parameter(randn(3)), nn.Parameter(randn(2))]
    assert_close(solution.clip_grad_norm_(idle, 1.0), torch.tensor(0.0), check_dtype=False)


@task("clip_grad_norm_")
def test_a_gradient_of_zeros_stays_zeros(solution, device):
    parameters = with_grads(torch.zeros(3, 2, device=device), torch.zeros(4, device=device))
    found = solution.clip_grad_norm_(parameters, 1.0)
    assert_equal(vector(p.grad for p in parameters), torch.zeros(10), because="there is nothing to scale")
    assert_equal(found, torch.tensor(0.0))


@task("clip_grad_norm_")
def test_a_generator_of_parameters_will_do(solution, randn):
    grads = some_grads(randn)
    expected = oracle(grads, 0.75)
    parameters = with_grads(*grads)
    solution.clip_grad_norm_((p for p in parameters), 0.75)
    assert_close(
        vector(p.grad for p in parameters),
        expected,
        rtol=2e-5,
        because="model.parameters() can be gone through once",
    )


@task("clip_grad_norm_")
def test_gradients_are_scaled_in_place_and_parameters_stay(solution, randn):
    grads = some_grads(randn)
    expected = oracle(grads, 0.75)
    parameters = with_grads(*grads)
    before = [p.grad for p in parameters]
    solution.clip_grad_norm_(parameters, 0.75)
    assert_close(vector(before), expected, rtol=2e-5, because="the .grad tensors are the same objects as before")
    assert_equal(weights(nn.ParameterList(parameters)), torch.ones(23, dtype=WIDE), because="parameters do not change")


@task("clip_grad_norm_")
def test_the_norm_of_half_precision_gradients_does_not_overflow(solution, device):
    parameters = with_grads(torch.full((300, 300), 300.0, dtype=torch.float16, device=device))
    found = solution.clip_grad_norm_(parameters, 900.0)
    assert_close(found, torch.tensor(90000.0), rtol=1e-3, because="300 * 300 numbers of 300 have the norm 90000")
    assert_close(parameters[0].grad[:2, :2], torch.full((2, 2), 3.0, dtype=torch.float16))


@task("clip_grad_norm_")
def test_the_limit_zero_leaves_no_gradient(solution, randn):
    parameters = with_grads(*some_grads(randn))
    solution.clip_grad_norm_(parameters, 0.0)
    assert_equal(vector(p.grad for p in parameters).abs(), torch.zeros(23, dtype=WIDE))


# train_step


@task("train_step")
def test_one_step_is_the_step_made_by_hand(solution, randn):
    model, (batch,) = network(randn), pairs(randn, 6)
    expected, _ = descend(model, batch[:1], batch[1], F.mse_loss, 0.1)
    solution.train_step(model, batch, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(weights(model), weights(expected), because="weights after one step of SGD with this batch")


@task("train_step")
def test_gradients_from_before_have_no_influence(solution, randn):
    model, (batch,) = network(randn), pairs(randn, 6)
    expected, _ = descend(model, batch[:1], batch[1], F.mse_loss, 0.1)
    for parameter in model.parameters():
        parameter.grad = randn(*parameter.shape, dtype=WIDE)
    solution.train_step(model, batch, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(weights(model), weights(expected), because=".grad was not empty before this step")


@task("train_step")
def test_the_loss_from_before_the_update_is_returned_as_a_float(solution, randn):
    model, (batch,) = network(randn), pairs(randn, 6)
    _, expected = descend(model, batch[:1], batch[1], F.mse_loss, 0.1)
    found = solution.train_step(model, batch, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(found, expected)


@task("train_step")
def test_the_model_is_called_once_in_train_mode(solution, randn):
    model, (batch,) = network(randn), pairs(randn, 6)
    model.eval()
    seen = modes_during(model)
    solution.train_step(model, batch, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_equal(seen, [[True] * 4], because="one call of the model, every module of it in train mode")


@task("train_step")
def test_the_optimizer_steps_once_and_its_memory_goes_on(solution, randn):
    model, batches = network(randn), pairs(randn, 6, 4, 5)
    expected = copy.deepcopy(model)
    momentum = [torch.zeros_like(p) for p in expected.parameters()]
    for x, y in batches:
        grads = torch.autograd.grad(F.mse_loss(expected(x), y), list(expected.parameters()))
        for p, m, g in zip(expected.parameters(), momentum, grads, strict=True):
            m.mul_(0.9).add_(g)
            p.data = p.data - 0.1 * m
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = steps_of(optimizer)
    for batch in batches:
        solution.train_step(model, batch, F.mse_loss, optimizer)
    assert_equal(len(seen), 3, because="three calls are three optimizer steps")
    assert_close(weights(model), weights(expected), because="weights after three steps with momentum")


@task("train_step")
def test_max_norm_limits_the_update_and_zero_is_a_limit(solution, randn):
    start, (batch,) = network(randn), pairs(randn, 6)
    expected, found = [], []
    for max_norm in (0.0, 0.01, 1e6):
        expected.append(weights(descend(start, batch[:1], batch[1], F.mse_loss, 0.5, max_norm)[0]))
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        solution.train_step(model, batch, F.mse_loss, optimizer, max_norm=max_norm)
        found.append(weights(model))
    assert_close(
        torch.stack(found),
        torch.stack(expected),
        rtol=1e-6,
        because="one row of weights for max_norm 0, 0.01 and 1e6",
    )


@task("train_step")
def test_all_but_the_last_of_a_batch_go_into_the_model(solution, randn):
    model = filled(Gated(), randn)
    batch = [randn(5, 3, dtype=WIDE), randn(5, 4, dtype=WIDE), randn(5, 2, dtype=WIDE)]
    expected, _ = descend(model, batch[:2], batch[2], F.mse_loss, 0.1)
    solution.train_step(model, batch, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(weights(model), weights(expected), because="a batch (a, b, target) means loss_fn(model(a, b), target)")


@task("train_step")
def test_neither_output_nor_loss_is_kept_alive(solution, randn):
    model, (batch,) = network(randn), pairs(randn, 6)
    made = []

    def loss_fn(output, target):
        loss = F.mse_loss(output, target)
        made.extend([weakref.ref(output), weakref.ref(loss)])
        return loss

    solution.train_step(model, batch, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1))
    alive = [name for name, ref in zip(("output", "loss"), made, strict=True) if ref() is not None]
    assert_equal(alive, [], because="with the loss its whole graph would stay in memory")


@cost_case("train_step")
def train_step_cost(module, randn):
    model, (batch,) = network(randn), pairs(randn, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda: module.train_step(model, batch, F.mse_loss, optimizer, max_norm=1.0)


# evaluate


def dropping(randn):
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 2)))
    return filled(model, randn)


def modes(model):
    return [module.training for module in model.modules()]


def in_modes(model, root, child):
    """The model in the mode `root`, its third part and what is in it in the mode `child`."""
    model.train(root)
    model[2].train(child)
    return model


@task("evaluate")
def test_every_example_counts_the_same_in_a_short_last_batch_too(solution, randn):
    model, batches = network(randn), pairs(randn, 4, 4, 1)
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        expected = {"loss": F.mse_loss(model(x), y).item()}
    found = solution.evaluate(model, batches, F.mse_loss)
    assert_close(found, expected, because="the loss of one big batch with all nine examples")


@task("evaluate")
def test_dropout_is_off_in_every_submodule(solution, randn, seed):
    model, batches = in_modes(dropping(randn), True, True), pairs(randn, 3, 5)
    seen = modes_during(model)
    torch.manual_seed(seed)
    solution.evaluate(model, batches, F.mse_loss)
    assert_equal(seen, [[False] * 6] * 2, because="two calls of the model, every module of it in eval mode")


@task("evaluate")
def test_each_submodule_is_back_in_its_own_mode(solution, randn, seed):
    torch.manual_seed(seed)
    batches, found, expected = pairs(randn, 2), [], []
    for root, child in ((True, False), (False, True), (False, False)):
        model = in_modes(dropping(randn), root, child)
        expected.append(modes(model))
        solution.evaluate(model, batches, F.mse_loss)
        found.append(modes(model))
    assert_equal(found, expected, because="the modes of all six modules of three models, True for train")


@task("evaluate")
def test_modes_are_back_when_the_loss_raises(solution, randn, seed):
    torch.manual_seed(seed)
    model, calm = (in_modes(dropping(randn), True, False) for _ in range(2))
    before = modes(model)

    def broken(output, target):
        raise ArithmeticError("broken")

    assert_raises(ArithmeticError, solution.evaluate, model, pairs(randn, 2), broken)
    solution.evaluate(calm, pairs(randn, 2), F.mse_loss)
    assert_equal(
        [modes(calm), modes(model)], [before, before],
        because="the modes of all modules, True for train, without an exception and after one",
    )  # fmt: skip


@task("evaluate")
def test_nothing_is_saved_for_a_backward_pass(solution, randn, seed):
    torch.manual_seed(seed)
    model, batches = network(randn), pairs(randn, 4, 4)
    assert_cost(solution.evaluate, model, batches, F.mse_loss, max_saved_bytes=0, because="no graph is needed here")


@task("evaluate")
def test_weights_buffers_and_gradients_do_not_change(solution, randn):
    model, batches = normalized(randn), pairs(randn, 4, 3)
    for parameter in model.parameters():
        parameter.grad = randn(*parameter.shape, dtype=WIDE)
    before, grads = held(model), vector(p.grad for p in model.parameters())
    solution.evaluate(model, batches, F.mse_loss)
    assert_close(held(model), before, rtol=0, atol=0, because="measuring is no training")
    grads_after = [p.grad for p in model.parameters() if p.grad is not None]
    assert_that(len(grads_after) == len(list(model.parameters())), ".grad is still there", value=len(grads_after))
    assert_equal(vector(grads_after), grads, because=".grad is as it was")


@task("evaluate")
def test_a_dict_of_losses_gives_a_dict_of_means(solution, randn):
    model, batches = network(randn), pairs(randn, 5, 2, 1)
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        gap = (model(x) - y).double()
        expected = {"squared": gap.square().mean().item(), "below": (gap < 0).double().mean().item()}

    def losses(output, target):
        return {"squared": F.mse_loss(output, target), "below": (output < target).double().mean()}

    assert_close(solution.evaluate(model, batches, losses), expected, because="each mean over all eight examples")


@task("evaluate")
def test_a_loader_that_can_be_gone_through_once_will_do(solution, randn):
    model, batches = network(randn), pairs(randn, 3, 2)
    with torch.no_grad():
        total = sum(F.mse_loss(model(x), y, reduction="sum").item() for x, y in batches)
    found = solution.evaluate(model, iter(batches), F.mse_loss)
    assert_close(found, {"loss": total / 10})


@task("evaluate")
def test_a_loader_without_batches_is_refused(solution, randn):
    model = network(randn)
    assert_raises(ValueError, solution.evaluate, model, [], F.mse_loss)
    assert_equal(modes(model), [True] * 4, because="the modes after that, True for train")


@task("evaluate")
def test_examples_are_the_rows_of_the_target(solution, randn, randint):
    model, batches = filled(Lookup(), randn), lookups(randn, randint, 5, 1)
    with torch.no_grad():
        total = sum(F.mse_loss(model(rows, table), y, reduction="sum").item() for rows, table, y in batches)
    found = solution.evaluate(model, batches, F.mse_loss)
    assert_close(found, {"loss": total / 12}, because="batches (rows, table, target) with five targets and with one")


# train_step_accum


def counted(batches):
    return [(batch, len(batch[-1])) for batch in batches]


def token_loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def tokens(randn, randint, rows, kept):
    """A batch of `rows` sequences of length 4 of which `kept` tokens count, and that number."""
    target = randint(0, 6, (rows, 4))
    target.view(-1)[kept:] = -100
    return (randn(rows, 4, 3, dtype=WIDE), target), kept


@task("train_step_accum")
def test_the_update_is_that_of_the_concatenation(solution, randn):
    model, batches = network(randn), pairs(randn, 5, 2, 1)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected, _ = descend(model, [x], y, F.mse_loss, 0.1)
    solution.train_step_accum(model, counted(batches), F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(
        weights(model),
        weights(expected),
        rtol=1e-12,
        atol=1e-12,
        because="weights after one step with all eight rows",
    )


@task("train_step_accum")
def test_the_mean_loss_from_before_the_update_is_returned(solution, randn):
    model, batches = network(randn), pairs(randn, 5, 2, 1)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    _, expected = descend(model, [x], y, F.mse_loss, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert_close(solution.train_step_accum(model, counted(batches), F.mse_loss, optimizer), expected)


@task("train_step_accum")
def test_the_given_counts_are_the_weights(solution, randn, randint):
    model = filled(nn.Linear(3, 6), randn)
    micro_batches = [tokens(randn, randint, 3, 12), tokens(randn, randint, 2, 1)]
    x, y = (torch.cat(parts) for parts in zip(*(batch for batch, _ in micro_batches), strict=True))
    expected, _ = descend(model, [x], y, token_loss, 0.5)
    solution.train_step_accum(model, micro_batches, token_loss, torch.optim.SGD(model.parameters(), lr=0.5))
    assert_close(
        weights(model),
        weights(expected),
        because="3 rows with 12 tokens that count, then 2 rows with only one",
    )


@task("train_step_accum")
def test_a_micro_batch_that_counts_nothing_has_no_influence(solution, randn, randint):
    model = filled(nn.Linear(3, 6), randn)
    full, empty, other = (tokens(randn, randint, 2, kept) for kept in (7, 0, 3))
    x, y = (torch.cat([full[0][i], other[0][i]]) for i in (0, 1))
    expected, loss = descend(model, [x], y, token_loss, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = solution.train_step_accum(model, [full, empty, other], token_loss, optimizer)
    assert_close(weights(model), weights(expected), because="all labels of the second micro-batch are ignored")
    assert_close(found, loss)


@task("train_step_accum")
def test_the_optimizer_makes_one_step(solution, randn):
    model, batches = network(randn), pairs(randn, 3, 2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = steps_of(optimizer)
    solution.train_step_accum(model, counted(batches), F.mse_loss, optimizer)
    assert_equal(len(seen), 1, because="steps of the optimizer for three micro-batches")


@task("train_step_accum")
def test_gradients_from_before_do_not_count(solution, randn):
    model, batches = network(randn), pairs(randn, 2, 4)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected, _ = descend(model, [x], y, F.mse_loss, 0.1)
    for parameter in model.parameters():
        parameter.grad = randn(*parameter.shape, dtype=WIDE)
    solution.train_step_accum(model, counted(batches), F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(weights(model), weights(expected), because=".grad was not empty before this step")


@task("train_step_accum")
def test_every_micro_batch_meets_the_model_in_train_mode(solution, randn):
    model, batches = network(randn), pairs(randn, 2, 4)
    model.eval()
    seen = modes_during(model)
    solution.train_step_accum(model, counted(batches), F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_equal(seen, [[True] * 4] * 2, because="two calls of the model, every module of it in train mode")


@task("train_step_accum")
def test_micro_batches_with_several_inputs(solution, randn):
    model = filled(Gated(), randn)
    batches = [[randn(n, width, dtype=WIDE) for width in (3, 4, 2)] for n in (4, 1)]
    a, b, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected, _ = descend(model, [a, b], y, F.mse_loss, 0.1)
    solution.train_step_accum(model, counted(batches), F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    assert_close(weights(model), weights(expected))


def wide(randn):
    return filled(nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2)), randn, scale=0.1)


@task("train_step_accum")
def test_memory_does_not_grow_with_the_number_of_micro_batches(solution, randn):
    model, batches = wide(randn), pairs(randn, 40, 96, 64, 96, 80, 96)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other, (x, y) = copy.deepcopy(model), batches[1]
    _, cost = measure(lambda: F.mse_loss(other(x), y).backward())
    bound = cost.peak_bytes + 2 * weights(model).numel() * 8 + 4096
    micro_batches = counted(batches)
    assert_cost(
        solution.train_step_accum, model, micro_batches, F.mse_loss, optimizer, max_peak_bytes=bound,
        because="the peak of the largest micro-batch alone, and two copies of the gradients",
    )  # fmt: skip


@task("train_step_accum")
def test_nothing_to_count_is_refused_and_changes_nothing(solution, randn, randint):
    model = filled(nn.Linear(3, 6), randn)
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    assert_raises(ValueError, solution.train_step_accum, model, [], token_loss, optimizer)
    nothing = [tokens(randn, randint, 2, 0), tokens(randn, randint, 1, 0)]
    model.weight.grad = torch.ones_like(model.weight)
    model.bias.grad = torch.ones_like(model.bias)
    model.eval()
    assert_raises(ValueError, solution.train_step_accum, model, nothing, token_loss, optimizer)
    assert_equal(weights(model), before, because="the weights are as they were")
    grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    assert_equal(grads, [[[1.0] * 3] * 6, [1.0] * 6], because=".grad is as it was")
    assert_equal(model.training, False, because="the mode is as it was")


@cost_case("train_step_accum")
def train_step_accum_cost(module, randn):
    model, batches = wide(randn), pairs(randn, 96, 96, 96, 96)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda: module.train_step_accum(model, counted(batches), F.mse_loss, optimizer)


# fit


class PerEpoch:
    """A loader with other batches in each epoch; tells `on_pass` when a pass begins."""

    def __init__(self, epochs, on_pass=lambda: None):
        self.epochs, self.on_pass, self.passes = epochs, on_pass, 0

    def __iter__(self):
        self.on_pass()
        batches = self.epochs[min(self.passes, len(self.epochs) - 1)]
        self.passes += 1
        return iter(batches)


def scripted_loss(output, target):
    """Columns of the target: how much the output counts, and a number to add."""
    return (output.mean(1) * target[:, 0] + target[:, 1]).mean()


class Run:
    """A call of fit whose validation losses are given: training moves the weights, validation reads the script."""

    def __init__(self, solution, randn, losses, *, epochs=None, patience=None, model=None):
        self.model = normalized(randn) if model is None else model
        self.before = held(self.model)
        self.after_epoch = []
        train = [self._batch(randn, 4, 1.0, 0.0), self._batch(randn, 3, 1.0, 0.0)]
        script = PerEpoch(
            [[self._batch(randn, 2, 0.0, loss)] for loss in losses],
            lambda: self.after_epoch.append(held(self.model)),
        )
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.history = solution.fit(
            self.model,
            train,
            script,
            scripted_loss,
            optimizer,
            epochs=epochs or len(losses),
            patience=patience,
        )

    @staticmethod
    def _batch(randn, rows, share, number):
        x = randn(rows, 3, dtype=WIDE)
        return x, torch.tensor([[share, number]] * rows, dtype=WIDE).to(x)


@task("fit")
def test_losses_and_updates_are_those_of_a_loop_by_hand(solution, randn):
    model, train, val = network(randn), pairs(randn, 4, 4, 1), pairs(randn, 3, 2)
    x, y = (torch.cat(parts) for parts in zip(*val, strict=True))
    copied, train_losses, val_losses = copy.deepcopy(model), [], []
    for _ in range(3):
        total = 0.0
        for batch in train:
            copied, loss = descend(copied, batch[:1], batch[1], F.mse_loss, 0.05)
            total += loss * len(batch[1])
        train_losses.append(total / 9)
        with torch.no_grad():
            val_losses.append(F.mse_loss(copied(x), y).item())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = solution.fit(model, train, val, F.mse_loss, optimizer, epochs=3)
    assert_close(found.val_loss, val_losses, because="the validation loss after each of three epochs")
    assert_close(found.train_loss, train_losses, because="the mean over the nine examples of each epoch")


@task("fit")
def test_each_example_of_an_epoch_counts_the_same_in_train_loss(solution, randn):
    model, train = network(randn), pairs(randn, 5, 1)
    expected = sum(F.mse_loss(model(x), y).item() * len(y) for x, y in train) / 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = solution.fit(model, train, pairs(randn, 2), F.mse_loss, optimizer, epochs=1)
    assert_close(found.train_loss, [expected], because="a batch of five and a batch of one, at learning rate 0")


@task("fit")
def test_examples_of_an_epoch_are_the_rows_of_its_targets(solution, randn, randint):
    model, train = filled(Lookup(), randn), lookups(randn, randint, 5, 1)
    expected = sum(F.mse_loss(model(rows, table), y).item() * len(y) for rows, table, y in train) / 6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = solution.fit(model, train, lookups(randn, randint, 2), F.mse_loss, optimizer, epochs=1)
    assert_close(found.train_loss, [expected], because="batches (rows, table, target) with five targets and with one")


@task("fit")
def test_the_weights_of_the_best_epoch_are_back_at_the_end(solution, randn):
    run = Run(solution, randn, [4.0, 2.5, 3.0, 2.75])
    names = [name for name, _ in run.model.named_parameters()]
    found, expected = held(run.model), run.after_epoch[1]
    assert_close(
        vector(found[n] for n in names), vector(expected[n] for n in names), rtol=0, atol=0,
        because="the validation losses are 4, 2.5, 3, 2.75: the weights after the second epoch",
    )  # fmt: skip


@task("fit")
def test_the_buffers_of_the_best_epoch_are_back_too(solution, randn):
    run = Run(solution, randn, [4.0, 2.5, 3.0, 2.75])
    names = [name for name, _ in run.model.named_buffers()]
    found, expected = held(run.model), run.after_epoch[1]
    assert_close(
        vector(found[n].double() for n in names), vector(expected[n].double() for n in names), rtol=0, atol=0,
        because="running mean, variance and count of the batch norm, as they were after the second epoch",
    )  # fmt: skip


@task("fit")
def test_the_best_epoch_is_the_first_with_the_lowest_loss(solution, randn):
    run = Run(solution, randn, [4.0, 2.5, 3.0, 2.5])
    assert_equal(run.history.best_epoch, 1, because="the validation losses are 4, 2.5, 3, 2.5; epochs count from 0")
    assert_equal(run.history.val_loss, [4.0, 2.5, 3.0, 2.5], because="one entry per epoch")


@task("fit")
def test_the_last_epoch_can_be_the_best(solution, randn):
    run = Run(solution, randn, [4.0, 3.0, 2.0])
    assert_equal(run.history.best_epoch, 2)
    assert_close(held(run.model), run.after_epoch[2], rtol=0, atol=0)


@task("fit")
def test_training_stops_when_patience_is_over(solution, randn):
    losses = [5.0, 4.0, 4.5, 4.2, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1, 2.0]
    run = Run(solution, randn, losses, patience=3)
    assert_equal(
        run.history.val_loss, losses[:8],
        because="patience 3: after the best loss, 3.0, come three epochs that are not better",
    )  # fmt: skip


@task("fit")
def test_after_an_early_stop_the_best_weights_are_back(solution, randn):
    run = Run(solution, randn, [3.0, 2.0, 2.5, 1.0], patience=1)
    assert_equal(len(run.history.train_loss), 3, because="epochs run with patience 1 and losses 3, 2, 2.5")
    assert_close(held(run.model), run.after_epoch[1], rtol=0, atol=0)


@task("fit")
def test_an_equal_loss_is_no_improvement(solution, randn):
    run = Run(solution, randn, [2.0, 2.0, 2.0, 2.0, 2.0], patience=2)
    assert_equal(
        [len(run.history.val_loss), run.history.best_epoch],
        [3, 0],
        because="epochs run, and the best of them",
    )


@task("fit")
def test_nan_is_no_improvement(solution, randn):
    run = Run(solution, randn, [2.0, math.nan, 1.0, math.nan, math.nan, 0.5], patience=2)
    assert_equal(
        [len(run.history.val_loss), run.history.best_epoch],
        [5, 2],
        because="epochs run, and the best of them",
    )


@task("fit")
def test_a_run_without_any_number_gives_back_what_it_came_with(solution, randn):
    run = Run(solution, randn, [math.nan, math.inf, math.nan])
    assert_equal(run.history.best_epoch, -1)
    assert_close(held(run.model), run.before, rtol=0, atol=0)


@task("fit")
def test_without_patience_all_epochs_are_run(solution, randn):
    run = Run(solution, randn, [1.0] + [2.0] * 11)
    assert_equal([len(run.history.train_loss), len(run.after_epoch)], [12, 12], because="epochs and validations")


@task("fit")
def test_the_scheduler_steps_after_the_updates_of_each_epoch(solution, randn):
    model, train, val = network(randn), pairs(randn, 2, 2), pairs(randn, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    seen = steps_of(optimizer)
    solution.fit(model, train, val, F.mse_loss, optimizer, epochs=3, scheduler=scheduler)
    expected = torch.tensor([0.8, 0.8, 0.4, 0.4, 0.2, 0.2])
    assert_close(torch.tensor(seen), expected, because="learning rates of three epochs with two updates each")


@task("fit")
def test_the_scheduler_also_steps_in_the_last_epoch(solution, randn):
    model, train = network(randn), pairs(randn, 2, 2)
    val = PerEpoch([[(x, y + far)] for far in (0.0, 100.0, 200.0) for x, y in pairs(randn, 2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    solution.fit(model, train, val, F.mse_loss, optimizer, epochs=3, scheduler=scheduler, patience=1)
    assert_equal(scheduler.last_epoch, 2, because="two epochs were run before patience was over")


# EMA


def moved(model, randn):
    """Change all parameters in place, as an optimizer does; their new values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(randn(*parameter.shape, dtype=WIDE))
    return weights(model)


@task("EMA")
def test_n_updates_give_the_closed_form(solution, randn):
    model, decay, n = network(randn), 0.8, 6
    expected = decay**n * weights(model)
    ema = solution.EMA(model, decay)
    for k in range(n):
        expected = expected + (1 - decay) * decay ** (n - 1 - k) * moved(model, randn)
        ema.update()
    with ema.swap():
        found = weights(model)
    assert_close(found, expected, because="0.8^6 of the first weights, and (1 - 0.8) * 0.8^k of those k updates ago")


@task("EMA")
def test_one_update_mixes_old_and_new(solution, randn):
    model = network(randn)
    old = weights(model)
    ema = solution.EMA(model, 0.9)
    new = moved(model, randn)
    ema.update()
    with ema.swap():
        found = weights(model)
    assert_close(found, 0.9 * old + 0.1 * new, because="decay 0.9 keeps nine tenths of the old average")


@task("EMA")
def test_before_the_first_update_the_average_is_the_model_as_it_was(solution, randn):
    model = network(randn)
    expected = weights(model)
    ema = solution.EMA(model, 0.9)
    moved(model, randn)
    with ema.swap():
        found = weights(model)
    assert_equal(found, expected, because="the model has moved on since the EMA was made, without an update")


@task("EMA")
def test_the_models_own_weights_are_back_after_the_block(solution, randn):
    model = normalized(randn)
    ema = solution.EMA(model, 0.9)
    moved(model, randn)
    model(randn(5, 3, dtype=WIDE))
    ema.update()
    model(randn(5, 3, dtype=WIDE))
    expected = held(model)
    with ema.swap():
        inside = weights(model)
    assert_that(not torch.equal(inside, weights(model)), "inside the block the model holds the average")
    assert_close(held(model), expected, rtol=0, atol=0, because="parameters and buffers, bit by bit")


@task("EMA")
def test_the_models_own_weights_are_back_after_an_exception(solution, randn):
    model = network(randn)
    ema = solution.EMA(model, 0.9)
    expected = moved(model, randn)

    def use():
        with ema.swap():
            raise ArithmeticError("inside")

    with ema.swap():
        pass
    found = [weights(model)]
    assert_raises(ArithmeticError, use)
    found.append(weights(model))
    assert_equal(
        torch.stack(found), torch.stack([expected, expected]),
        because="two rows: the weights after a block, and after a block that raised",
    )  # fmt: skip


@task("EMA")
def test_buffers_are_those_of_the_last_update(solution, randn):
    model = normalized(randn)
    ema = solution.EMA(model, 0.9)
    model(randn(5, 3, dtype=WIDE) * 3 + 1)
    model(randn(4, 3, dtype=WIDE) * 3 + 1)
    expected = vector(b.double() for b in model.buffers())
    ema.update()
    model(randn(6, 3, dtype=WIDE))
    with ema.swap():
        found = vector(b.double() for b in model.buffers())
    assert_close(found, expected, because="running mean, variance and count as they were at the update")


@task("EMA")
def test_what_the_block_writes_does_not_reach_the_average(solution, randn):
    model = normalized(randn)
    ema = solution.EMA(model, 0.5)
    moved(model, randn)
    ema.update()
    with ema.swap():
        first = held(model)
        moved(model, randn)
        model(randn(5, 3, dtype=WIDE))
    moved(model, randn)
    with ema.swap():
        second = held(model)
    assert_close(second, first, rtol=0, atol=0, because="the average, before and after writes to the model")


@task("EMA")
def test_tied_weights_count_as_one(solution, randn):
    model = filled(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), randn)
    model[1].weight = model[0].weight
    old = weights(model)
    ema = solution.EMA(model, 0.75)
    new = moved(model, randn)
    ema.update()
    found = []
    for _ in range(2):
        with ema.swap():
            found.append(weights(model))
    expected = 0.75 * old + 0.25 * new
    assert_close(
        found,
        [expected, expected],
        because="the average of a model with a weight under two names, seen twice",
    )
    assert_equal(weights(model), new, because="the model's own weights, after that")


@task("EMA")
def test_an_update_changes_nothing_in_the_model_and_records_no_graph(solution, randn):
    model = network(randn)
    ema = solution.EMA(model, 0.9)
    F.mse_loss(model(randn(4, 3, dtype=WIDE)), randn(4, 2, dtype=WIDE)).backward()
    before, grads = weights(model), vector(p.grad for p in model.parameters())
    assert_cost(ema.update, max_saved_bytes=0, because="an update is no part of a graph")
    assert_equal(weights(model), before, because="the weights of the model")
    assert_equal(vector(p.grad for p in model.parameters()), grads, because="the gradients of the model")
    assert_that(all(p.requires_grad and p.is_leaf for p in model.parameters()), "the parameters are still leaves")


@task("EMA")
def test_an_optimizer_goes_on_with_the_same_parameters(solution, randn):
    model = network(randn)
    ids = [id(p) for p in model.parameters()]
    ema = solution.EMA(model, 0.9)
    F.mse_loss(model(randn(4, 3, dtype=WIDE)), randn(4, 2, dtype=WIDE)).backward()
    grads = vector(p.grad for p in model.parameters())
    moved(model, randn)
    with ema.swap():
        inside = [id(p) for p in model.parameters()]
        assert_that(all(p.requires_grad for p in model.parameters()), "gradients can be computed inside")
        loss = F.mse_loss(model(randn(4, 3, dtype=WIDE)), randn(4, 2, dtype=WIDE))
        assert_that(loss.requires_grad, "gradients can be computed inside")
    after = [id(p) for p in model.parameters()]
    assert_that([inside, after] == [ids, ids], "the Parameter objects are the same inside and after")
    assert_equal(vector(p.grad for p in model.parameters()), grads, because=".grad is left alone")


@task("EMA")
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_may_be_zero_or_one(solution, randn, decay):
    model = network(randn)
    old = weights(model)
    ema = solution.EMA(model, decay)
    new = moved(model, randn)
    ema.update()
    with ema.swap():
        found = weights(model)
    assert_close(found, decay * old + (1 - decay) * new)


@task("EMA")
def test_a_decay_outside_of_zero_and_one_is_refused(solution, randn):
    model = network(randn)
    assert_raises(ValueError, solution.EMA, model, -0.01)
    assert_raises(ValueError, solution.EMA, model, 1.01)


# checkpoint


class Training:
    """Everything that a run on the CPU needs; its data and start are the same for each of the same seed."""

    def __init__(self, seed):
        values = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(12, 3, generator=values), torch.randn(12, 2, generator=values)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=values)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=3, gamma=0.5)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.seen, self.rates, self.losses = [], [], []

    def parts(self):
        return self.model, self.optimizer, self.scheduler

    def run(self, steps):
        for _ in range(steps):
            rows = torch.randperm(12, generator=self.generator)[:5]
            self.seen += rows.tolist()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.zero_grad()
            loss = F.mse_loss(self.model(self.x[rows]), self.y[rows])
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
        return self


def stopped_and_resumed(solution, seed, path):
    """(ten steps in one go, the second five of a run that was stopped, saved and loaded into fresh objects)."""
    torch.manual_seed(seed)
    whole = Training(seed).run(10)
    torch.manual_seed(seed)
    first = Training(seed).run(5)
    solution.save_checkpoint(path, *first.parts(), 5, first.generator)
    first.run(2)  # what comes after the save is no part of it
    torch.manual_seed(seed + 7)
    fresh = Training(seed + 3)
    fresh.x, fresh.y = whole.x, whole.y
    step = solution.load_checkpoint(path, *fresh.parts(), fresh.generator)
    assert_equal(step, 5, because="load_checkpoint returns the number that was saved")
    return whole, fresh.run(5)


@task("checkpoint")
def test_ten_steps_are_five_and_five_more_bit_by_bit(solution, seed, tmp_path):
    whole, resumed = stopped_and_resumed(solution, seed, tmp_path / "run.pt")
    assert_equal(weights(resumed.model), weights(whole.model), because="weights after ten steps")
    assert_equal(vector(b.double() for b in resumed.model.buffers()), vector(b.double() for b in whole.model.buffers()))


@task("checkpoint")
def test_the_losses_of_the_second_half_are_the_same(solution, seed, tmp_path):
    whole, resumed = stopped_and_resumed(solution, seed, tmp_path / "run.pt")
    assert_equal(resumed.losses, whole.losses[5:], because="the losses of steps 6 to 10, dropout and shuffling on")


@task("checkpoint")
def test_the_data_come_in_the_same_order(solution, seed, tmp_path):
    whole, resumed = stopped_and_resumed(solution, seed, tmp_path / "run.pt")
    assert_equal(resumed.seen, whole.seen[25:], because="the rows of steps 6 to 10, five each")


@task("checkpoint")
def test_the_learning_rate_goes_on_where_it_was(solution, seed, tmp_path):
    whole, resumed = stopped_and_resumed(solution, seed, tmp_path / "run.pt")
    assert_equal(resumed.rates, whole.rates[5:], because="the learning rates of steps 6 to 10")


@task("checkpoint")
def test_saving_disturbs_nothing(solution, seed, tmp_path):
    torch.manual_seed(seed)
    whole = Training(seed).run(6)
    torch.manual_seed(seed)
    saved = Training(seed).run(3)
    drawn = saved.generator.get_state()
    with global_rng_untouched():
        solution.save_checkpoint(str(tmp_path / "run.pt"), *saved.parts(), 3, saved.generator)
    assert_equal(saved.generator.get_state(), drawn, because="the state of the generator")
    assert_equal(saved.run(3).losses, whole.losses, because="six losses, saved after the third")


@task("checkpoint")
def test_the_file_needs_no_trust(solution, seed, tmp_path):
    torch.manual_seed(seed)
    training = Training(seed).run(2)
    solution.save_checkpoint(tmp_path / "run.pt", *training.parts(), 2, training.generator)
    assert_that((tmp_path / "run.pt").is_file(), "the checkpoint lies where it was asked for")
    try:
        torch.load(tmp_path / "run.pt", weights_only=True)
    except Exception as error:
        assert_that(False, "torch.load reads the file with weights_only=True", value=type(error).__name__)


class Unsavable:
    """A scheduler with a state that no file can hold."""

    def state_dict(self):
        return {"rule": lambda step: step}


@task("checkpoint")
def test_a_save_that_fails_leaves_the_old_checkpoint_whole(solution, seed, tmp_path):
    path = tmp_path / "run.pt"
    torch.manual_seed(seed)
    training = Training(seed).run(2)
    solution.save_checkpoint(path, *training.parts(), 2, training.generator)
    expected = weights(training.model)
    training.run(2)
    try:
        solution.save_checkpoint(path, training.model, training.optimizer, Unsavable(), 4, training.generator)
        failed = False
    except NotImplementedError:
        raise
    except Exception:
        failed = True
    assert_that(failed, "the exception of a save that fails is passed on", value=failed)
    fresh = Training(seed + 3)
    try:
        step = solution.load_checkpoint(path, *fresh.parts(), fresh.generator)
    except NotImplementedError:
        raise
    except Exception as error:
        assert_that(False, "the earlier checkpoint can still be loaded", value=type(error).__name__)
    assert_equal(step, 2, because="the earlier checkpoint is the one of step 2")
    assert_equal(weights(fresh.model), expected, because="the weights of the earlier checkpoint")


@task("checkpoint")
def test_a_checkpoint_can_be_loaded_twice(solution, seed, tmp_path):
    path = tmp_path / "run.pt"
    torch.manual_seed(seed)
    training = Training(seed).run(4)
    solution.save_checkpoint(path, *training.parts(), 4, training.generator)
    one, two = Training(seed), Training(seed)
    solution.load_checkpoint(path, *one.parts(), one.generator)
    one.run(3)
    solution.load_checkpoint(path, *two.parts(), two.generator)
    assert_equal(two.run(3).losses, one.losses[-3:], because="two runs from one file")
