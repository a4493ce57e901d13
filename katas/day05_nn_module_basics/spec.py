"""What day 05 demands: modules whose state is registered."""

import copy
import inspect
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    task,
    unchanged,
)


def filled(module, randn):
    """The module on the device of the test, with values that come from its seed."""
    module = module.to(randn(1).device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(randn(*parameter.shape))
    return module


def linear(randn, n_in, n_out, bias=True):
    return filled(nn.Linear(n_in, n_out, bias=bias), randn)


def weighted(output, weights):
    """A scalar whose gradient at the output is `weights`."""
    return (output * weights).sum()


class Tied(nn.Module):
    """An embedding and a head that are one parameter, with a norm between them."""

    def __init__(self, rows=7, width=3):
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Own(nn.Module):
    """A parameter, a scalar and a buffer of its own around an inner layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.ones(5))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("offset", torch.zeros(11))


# count_parameters


@task("count_parameters")
def test_weights_and_biases_are_counted(solution):
    module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    assert_equal(
        solution.count_parameters(module),
        3 * 8 + 8 + 8 * 2,
        because="3x8 weights and 8 biases, then 8x2 weights without biases",
    )


@task("count_parameters")
def test_parameters_of_every_depth_are_counted(solution):
    module = nn.Sequential(Own(), nn.Sequential(nn.Sequential(nn.Linear(4, 1))))
    assert_equal(
        solution.count_parameters(module),
        (3 * 2 + 2) + 5 + 1 + (4 * 1 + 1),
        because="an inner layer (8), a parameter of 5, a scalar, and a layer three levels down (5)",
    )


@task("count_parameters")
def test_a_weight_with_two_names_counts_once(solution):
    module = nn.Sequential(Tied(7, 3), nn.BatchNorm1d(5))
    assert_equal(
        solution.count_parameters(module),
        (7 * 3 + 2 * 3) + 2 * 5,
        because="the embedding and the head are one 7x3 parameter; the norms have 2x3 and 2x5",
    )


@task("count_parameters")
def test_a_layer_in_three_places_counts_once(solution):
    layer = nn.Linear(4, 4)
    assert_equal(
        solution.count_parameters(nn.Sequential(layer, layer, nn.Sequential(layer))),
        4 * 4 + 4,
        because="three references, one layer",
    )


@task("count_parameters")
def test_equal_parameters_that_are_not_shared_count_each(solution):
    layer = nn.Linear(4, 4)
    assert_equal(
        solution.count_parameters(nn.Sequential(layer, copy.deepcopy(layer))),
        2 * (4 * 4 + 4),
        because="a copy has the same numbers but is not the same parameter",
    )


@task("count_parameters")
def test_buffers_do_not_count(solution):
    assert_equal(
        solution.count_parameters(nn.BatchNorm1d(7)),
        2 * 7,
        because="weight and bias; the running statistics are buffers",
    )


@task("count_parameters")
def test_trainable_only_leaves_out_the_frozen_ones(solution):
    module = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    module[0].weight.requires_grad_(False)
    assert_equal(
        solution.count_parameters(module, trainable_only=True),
        8 + 8 * 2 + 2,
        because="the first weight (24) is frozen",
    )


@task("count_parameters")
def test_frozen_parameters_count_by_default(solution):
    module = nn.Sequential(nn.Linear(3, 8).requires_grad_(False), nn.Linear(8, 2))
    assert_equal(
        solution.count_parameters(module),
        (3 * 8 + 8) + (8 * 2 + 2),
        because="frozen parameters are parameters",
    )


@task("count_parameters")
def test_no_parameters_make_zero(solution):
    count = solution.count_parameters(nn.Sequential(nn.ReLU(), nn.Flatten()))
    assert_equal(count, 0)


@task("count_parameters")
def test_the_count_is_a_python_int(solution):
    assert_equal(type(solution.count_parameters(nn.Linear(3, 2))).__name__, "int")


@task("count_parameters")
def test_modules_without_memory_are_counted_too(solution):
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(100_000, 70_000), nn.Linear(70_000, 100_000))
    assert_equal(
        solution.count_parameters(module),
        2 * 100_000 * 70_000 + 70_000 + 100_000,
        because="on the meta device every tensor has a shape and none has an address",
    )


@task("count_parameters")
def test_counting_allocates_nothing(solution):
    module = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20))
    assert_cost(solution.count_parameters, module, max_new_bytes=0, because="the count needs shapes, not the numbers")


# trainable_groups


def names_of(module, parameters):
    """The names of these objects in the module, to compare identities by something readable."""
    known = {id(p): name for name, p in module.named_parameters()}
    return [known.get(id(p), "not a parameter of the module") for p in parameters]


@task("trainable_groups")
def test_all_trainable_parameters_come_in_order(solution):
    module = nn.Sequential(Own(), nn.Linear(2, 4))
    expected = ["0.gain", "0.temperature", "0.inner.weight", "0.inner.bias", "1.weight", "1.bias"]
    groups = solution.trainable_groups(module)
    assert_equal(names_of(module, groups), expected, because="these are the names of the objects that came back")


@task("trainable_groups")
def test_frozen_parameters_stay_out(solution):
    module = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    module[0].weight.requires_grad_(False)
    module[1].bias.requires_grad_(False)
    groups = solution.trainable_groups(module)
    assert_equal(names_of(module, groups), ["0.bias", "1.weight"])


@task("trainable_groups")
def test_a_tied_weight_comes_once(solution):
    module = Tied()
    groups = solution.trainable_groups(module)
    assert_equal(
        names_of(module, groups),
        ["embed.weight", "norm.weight", "norm.bias"],
        because="the head has the embedding's weight, which an optimizer must step once",
    )


@task("trainable_groups")
def test_a_layer_in_two_places_comes_once(solution):
    layer = nn.Linear(4, 4)
    module = nn.Sequential(layer, nn.Sequential(layer))
    assert_equal(names_of(module, solution.trainable_groups(module)), ["0.weight", "0.bias"])


@task("trainable_groups")
def test_equal_parameters_both_come(solution):
    layer = nn.Linear(2, 2)
    module = nn.Sequential(layer, copy.deepcopy(layer))
    groups = solution.trainable_groups(module)
    assert_equal(names_of(module, groups), ["0.weight", "0.bias", "1.weight", "1.bias"])


@task("trainable_groups")
def test_buffers_are_no_parameters(solution):
    module = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    assert_equal(names_of(module, solution.trainable_groups(module)), ["0.weight", "0.bias"])


@task("trainable_groups")
def test_nothing_to_train_is_an_empty_list(solution):
    module = nn.Linear(3, 2).requires_grad_(False)
    assert_equal(names_of(module, solution.trainable_groups(module)), [])


@task("trainable_groups")
def test_the_groups_can_be_walked_twice(solution):
    groups = solution.trainable_groups(nn.Linear(3, 2))
    assert_equal(type(groups).__name__, "list", because="an iterator is empty after the optimizer has read it")


# MLP


def mlp_keys(n_layers):
    return [f"layers.{i}.{kind}" for i in range(n_layers) for kind in ("weight", "bias")]


def mlp(solution, randn, sizes, *activation, dtype=torch.float32):
    """The learner's MLP with values of the seed; its state is looked at first, the oracle needs it."""
    model = solution.MLP(list(sizes), *activation)
    assert_equal(
        list(model.state_dict()),
        mlp_keys(len(sizes) - 1),
        because="these keys are what saving, moving and training the model would find",
    )
    return filled(model, randn).to(dtype)


def mlp_by_hand(state, x, activation):
    """A chain of matrix products in numpy, in double precision."""
    state = {key: value.detach().cpu().double().numpy() for key, value in state.items()}
    h = x.detach().cpu().double().numpy()
    n_layers = len(state) // 2
    for i in range(n_layers):
        h = h @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        if i < n_layers - 1:
            h = activation(h)
    return torch.from_numpy(h).to(x.dtype)


def relu(h):
    return np.maximum(h, 0.0)


@task("MLP")
def test_the_chain_of_layers_is_computed(solution, randn, dtype):
    model = mlp(solution, randn, [3, 8, 5, 2], dtype=dtype)
    x = randn(6, 3, dtype=dtype)
    expected = mlp_by_hand(model.state_dict(), x, relu)
    assert_close(model(x), expected, because="layer 0, relu, layer 1, relu, layer 2, and no relu after the last")


@task("MLP")
def test_leading_axes_are_kept(solution, randn):
    model = mlp(solution, randn, [3, 7, 2])
    for leading in [(), (4,), (4, 5), (2, 1, 3), (0,), (2, 0, 4)]:
        x = randn(*leading, 3)
        expected = mlp_by_hand(model.state_dict(), x, relu)
        assert_close(model(x), expected, because=f"x {(*leading, 3)} gives {(*leading, 2)}")


@task("MLP")
def test_a_single_layer_is_linear(solution, randn):
    model = mlp(solution, randn, [4, 3])
    x = randn(5, 4)
    expected = mlp_by_hand(model.state_dict(), x, relu)
    assert_close(model(x), expected, because="the first layer is also the last, so nothing is activated")


@task("MLP")
def test_the_given_activation_is_used(solution, randn):
    model = mlp(solution, randn, [3, 8, 2], torch.tanh)
    x = randn(6, 3)
    expected = mlp_by_hand(model.state_dict(), x, np.tanh)
    assert_close(model(x), expected, because="the activation of this model is tanh")


@task("MLP")
def test_the_activation_runs_between_layers_only(solution, randn):
    seen = []

    def spy(h):
        seen.append(tuple(h.shape))
        return h

    model = mlp(solution, randn, [3, 4, 6, 2], spy)
    model(randn(5, 3))
    assert_equal(seen, [(5, 4), (5, 6)], because="three layers have two places between them")


@task("MLP")
def test_the_activation_may_be_a_module(solution, randn):
    model = solution.MLP([3, 8, 2], nn.Tanh())
    assert_equal(list(model.state_dict()), mlp_keys(2), because="Tanh has no state")
    model = filled(model, randn)
    x = randn(6, 3)
    expected = mlp_by_hand(model.state_dict(), x, np.tanh)
    assert_close(model(x), expected)


@task("MLP")
def test_layers_of_one_width_do_not_share(solution):
    model = solution.MLP([4, 4, 4, 4])
    parameters = [tuple(p.shape) for p in model.parameters()]
    assert_equal(parameters, [(4, 4), (4,)] * 3, because="three layers have three weights and three biases to train")


@task("MLP")
def test_weights_are_out_by_in(solution):
    model = solution.MLP([3, 8, 2])
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = {
        "layers.0.weight": (8, 3),
        "layers.0.bias": (8,),
        "layers.1.weight": (2, 8),
        "layers.1.bias": (2,),
    }
    assert_equal(shapes, expected)


@task("MLP")
def test_every_parameter_gets_its_gradient(solution, randn):
    model = mlp(solution, randn, [3, 6, 5, 2], torch.tanh)
    x, weights = randn(7, 3), randn(7, 2)
    copies = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    h = x
    for i in range(3):
        h = F.linear(h if i == 0 else torch.tanh(h), copies[f"layers.{i}.weight"], copies[f"layers.{i}.bias"])
    expected = dict(zip(copies, torch.autograd.grad(weighted(h, weights), list(copies.values())), strict=True))
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(weighted(model(x), weights), list(parameters.values()), allow_unused=True)
    actual = {
        key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(parameters.items(), grads, strict=True)
    }
    assert_close(actual, expected, rtol=1e-4, atol=1e-5, because="the gradients of the parameters")


@task("MLP")
def test_a_deep_copy_computes_with_its_own_parameters(solution, randn):
    model = mlp(solution, randn, [3, 5, 2])
    x = randn(4, 3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_close(twin(x), torch.zeros(4, 2), because="every parameter of the copy was set to zero")


@task("MLP")
def test_a_deep_copy_leaves_the_original_alone(solution, randn):
    model = mlp(solution, randn, [3, 5, 2])
    x = randn(4, 3)
    expected = mlp_by_hand(model.state_dict(), x, relu)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_close(model(x), expected, because="only the copy was changed")


@task("MLP")
def test_hooks_of_the_layers_run(solution, randn):
    model = mlp(solution, randn, [3, 4, 2])
    seen = []
    for name, module in model.named_modules():
        if name.startswith("layers.") and name.count(".") == 1:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(randn(5, 3))
    assert_equal(seen, ["layers.0", "layers.1"], because="every layer had a hook that notes its name")


@task("MLP")
def test_the_input_keeps_its_values(solution, randn):
    model = mlp(solution, randn, [3, 4, 2], torch.relu_)
    x = randn(5, 3)
    with torch.no_grad(), unchanged(x):
        model(x)


@task("MLP")
def test_one_matrix_product_per_layer(solution, randn):
    model = mlp(solution, randn, [3, 8, 5, 2])
    assert_cost(model, randn(6, 3), matmuls=3, because="three layers need three matrix products")


@task("MLP")
def test_one_size_is_no_network(solution):
    assert_raises(ValueError, solution.MLP, [3], mentions=["[3]"])


@task("MLP")
def test_no_size_is_no_network(solution):
    assert_raises(ValueError, solution.MLP, [], mentions=["[]"])


@task("MLP")
def test_a_wrong_width_is_refused_with_both_shapes(solution, randn):
    model = mlp(solution, randn, [3, 8, 2])
    assert_raises(ValueError, model, randn(4, 5), mentions=["(4, 5)", "(..., 3)"])
    assert_raises(ValueError, model, randn(2, 3, 8), mentions=["(2, 3, 8)", "(..., 3)"])


@cost_case("MLP")
def mlp_cost(module, randn):
    model = filled(module.MLP([64, 128, 128, 10]), randn)
    x = randn(32, 64)
    return lambda: model(x)


# Standardizer


def fresh(solution, device, n_features, dtype=None):
    module = solution.Standardizer(n_features).to(device)
    return module if dtype is None else module.to(dtype)


def statistics(x, dtype=torch.float32):
    """Mean and population standard deviation of the columns, by numpy in double precision."""
    values = x.detach().cpu().double().numpy()
    return torch.from_numpy(values.mean(0)).to(dtype), torch.from_numpy(values.std(0)).to(dtype)


def spread_out(randn, *shape, dtype=torch.float32):
    """Columns with different means and spreads."""
    d = shape[-1]
    steps = torch.arange(1, d + 1, device=randn(1).device, dtype=dtype)
    return randn(*shape, dtype=dtype) * steps + 3 * steps


@task("Standardizer")
def test_an_unfitted_one_changes_nothing(solution, device, randn):
    x = randn(4, 3)
    expected = x.cpu().clone()
    assert_close(fresh(solution, device, 3)(x), expected, because="mean 0 and std 1 until fit is called")


@task("Standardizer")
def test_fit_stores_the_mean_of_each_column(solution, device, randn, dtype):
    module = fresh(solution, device, 3, dtype)
    x = spread_out(randn, 9, 3, dtype=dtype)
    mean, _ = statistics(x, dtype)
    module.fit(x)
    assert_close(module.mean, mean)


@task("Standardizer")
def test_fit_stores_the_spread_of_each_column(solution, device, randn, dtype):
    module = fresh(solution, device, 3, dtype)
    x = spread_out(randn, 9, 3, dtype=dtype)
    _, std = statistics(x, dtype)
    module.fit(x)
    assert_close(module.std, std, because="the root of the mean squared distance from the mean, over 9 rows")


@task("Standardizer")
def test_new_data_are_measured_against_the_stored_numbers(solution, device, randn, dtype):
    module = fresh(solution, device, 3, dtype)
    x = spread_out(randn, 9, 3, dtype=dtype)
    mean, std = (value.numpy() for value in statistics(x, torch.float64))
    module.fit(x)
    for leading in [(), (5,), (2, 4), (0,)]:
        new = randn(*leading, 3, dtype=dtype)
        expected = torch.from_numpy((new.cpu().double().numpy() - mean) / std).to(dtype)
        assert_close(module(new), expected, rtol=1e-5, atol=1e-5, because="(x - mean) / std with what fit stored")


@task("Standardizer")
def test_the_state_dict_has_mean_and_std(solution, device, randn):
    module = fresh(solution, device, 3)
    module.fit(spread_out(randn, 9, 3))
    saved = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {"saved": saved, "buffers": [name for name, _ in module.named_buffers()]}
    expected = {"saved": {"mean": (3,), "std": (3,)}, "buffers": ["mean", "std"]}
    assert_equal(found, expected, because="what a checkpoint would hold, and what is registered as a buffer")


@task("Standardizer")
def test_a_saved_state_gives_the_same_outputs(solution, device, randn):
    module = fresh(solution, device, 3)
    x = spread_out(randn, 9, 3)
    module.fit(x)
    expected = module(x).detach().cpu().clone()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    other = fresh(solution, device, 3)
    other.load_state_dict(state, strict=True)
    assert_close(other(x), expected, because="a fresh module that loaded the state_dict")


@task("Standardizer")
def test_nothing_is_a_parameter(solution, device, randn):
    module = fresh(solution, device, 3)
    module.fit(spread_out(randn, 9, 3))
    parameters = [(name, p.requires_grad) for name, p in module.named_parameters()]
    assert_equal(parameters, [], because="the parameters, and whether they are trained")


@task("Standardizer")
def test_the_statistics_follow_the_module(solution, device, randn):
    module = fresh(solution, device, 3)
    module.fit(spread_out(randn, 9, 3))
    module.to(torch.float64)
    dtypes = [str(module.mean.dtype), str(module.std.dtype)]
    assert_equal(dtypes, ["torch.float64", "torch.float64"], because="after module.to(torch.float64)")


@task("Standardizer")
def test_the_dtype_of_the_module_survives_a_fit(solution, device, randn):
    module = fresh(solution, device, 3)
    module.fit(spread_out(randn, 9, 3, dtype=torch.float64))
    dtypes = [str(module.mean.dtype), str(module.std.dtype)]
    assert_equal(dtypes, ["torch.float32", "torch.float32"], because="float64 data, but a float32 module")


@task("Standardizer")
def test_fit_records_no_graph(solution, device, randn):
    module = fresh(solution, device, 3)
    x = spread_out(randn, 9, 3).requires_grad_()
    module.fit(x)
    tracked = [(type(held).__name__, held.requires_grad) for held in (module.mean, module.std)]
    expected = [("Tensor", False)] * 2
    assert_equal(tracked, expected, because="the types of mean and std, and whether they hang on the graph of x")


@task("Standardizer")
def test_a_second_fit_writes_into_the_same_tensors(solution, device, randn):
    module = fresh(solution, device, 3)
    first, second = spread_out(randn, 9, 3), spread_out(randn, 5, 3) + 10
    mean, std = statistics(second)
    held = (module.mean, module.std)
    module.fit(first)
    module.fit(second)
    assert_close(held, (mean, std), because="these two tensors were taken from the module before it was fitted")


@task("Standardizer")
def test_a_second_fit_forgets_the_first(solution, device, randn):
    module = fresh(solution, device, 3)
    first, second = spread_out(randn, 9, 3), spread_out(randn, 5, 3) - 20
    mean, std = statistics(second)
    module.fit(first)
    module.fit(second)
    assert_close([module.mean, module.std], [mean, std])


@task("Standardizer")
def test_a_column_of_equal_numbers_gets_std_one(solution, device, randn):
    module = fresh(solution, device, 64)
    x = randn(1, 64).expand(7, 64).clone()
    module.fit(x)
    assert_close(module.std, torch.ones(64), because="each of the 64 columns holds one number, seven times")


@task("Standardizer")
def test_a_column_of_equal_numbers_comes_out_as_zero(solution, device, randn):
    module = fresh(solution, device, 65)
    x = torch.cat([randn(1, 64).expand(7, 64), randn(7, 1)], dim=1)
    module.fit(x)
    output = module(x)[:, :64]
    expected = torch.zeros(7, 64)
    assert_close(output, expected, atol=1e-5, because="each of these columns holds one number, seven times")


@task("Standardizer")
def test_a_constant_column_does_not_disturb_its_neighbors(solution, device, randn):
    module = fresh(solution, device, 3)
    x = spread_out(randn, 9, 3)
    x[:, 1] = 0.1
    _, std = statistics(x)
    std[1] = 1.0
    module.fit(x)
    assert_close(module.std, std, because="only the middle column is constant")


@task("Standardizer")
def test_one_row_has_no_spread(solution, device, randn):
    module = fresh(solution, device, 3)
    x = randn(1, 3)
    expected = [x[0].cpu().clone(), torch.ones(3)]
    module.fit(x)
    assert_close([module.mean, module.std], expected, because="one row is its own mean, and its std is set to 1")


@task("Standardizer")
def test_a_far_away_mean_does_not_spoil_the_spread(solution, device, randn):
    module = fresh(solution, device, 3)
    x = randn(50, 3) + 10_000
    _, std = statistics(x)
    module.fit(x)
    assert_close(module.std, std, rtol=1e-3, atol=0, because="numbers around 10,000 with a spread of about 1")


@task("Standardizer")
def test_half_precision_is_measured_in_float32(solution, device, randn):
    module = fresh(solution, device, 3)
    x = spread_out(randn, 40, 3).to(torch.bfloat16)
    expected = list(statistics(x))
    module.fit(x)
    assert_close([module.mean, module.std], expected, rtol=1e-5, atol=1e-6, because="bfloat16 data")


@task("Standardizer")
def test_half_precision_comes_back_as_half_precision(solution, device, randn):
    module = fresh(solution, device, 3)
    fitted = spread_out(randn, 40, 3)
    mean, std = statistics(fitted, torch.float64)
    x = fitted.to(torch.bfloat16)
    expected = ((x.cpu().double() - mean) / std).to(torch.bfloat16)
    module.fit(fitted)
    assert_close(module(x), expected, rtol=2e-2, atol=1e-3, because="bfloat16 in, bfloat16 out")


@task("Standardizer")
def test_double_precision_comes_back_as_double_precision(solution, device, randn):
    module = fresh(solution, device, 3)
    module.fit(spread_out(randn, 9, 3))
    mean, std = module.mean.cpu().double(), module.std.cpu().double()
    x = spread_out(randn, 5, 3, dtype=torch.float64)
    expected = (x.cpu() - mean) / std
    assert_close(module(x), expected, rtol=1e-10, atol=1e-10, because="float64 data through a float32 module")


@task("Standardizer")
def test_the_input_gets_the_gradient_of_a_division(solution, device, randn):
    module = fresh(solution, device, 3)
    fitted = spread_out(randn, 9, 3)
    _, std = statistics(fitted)
    module.fit(fitted)
    x, weights = randn(4, 3).requires_grad_(), randn(4, 3)
    expected = weights.cpu() / std
    (grad,) = torch.autograd.grad(weighted(module(x), weights), x, allow_unused=True)
    assert_that(grad is not None, "the output does not hang on x", value=str(grad))
    assert_close(grad, expected, because="d out / d x is 1 / std")


@task("Standardizer")
def test_forward_learns_nothing(solution, device, randn):
    module = fresh(solution, device, 3)
    fitted = spread_out(randn, 9, 3)
    expected = list(statistics(fitted))
    module.fit(fitted)
    module.train()
    module(randn(20, 3))
    assert_close([module.mean, module.std], expected, because="forward ran in train mode on other data")


@task("Standardizer")
def test_fit_works_in_eval_mode(solution, device, randn):
    module = fresh(solution, device, 3).eval()
    x = spread_out(randn, 9, 3)
    expected = list(statistics(x))
    module.fit(x)
    assert_close([module.mean, module.std], expected)


@task("Standardizer")
def test_fit_returns_the_module(solution, device, randn):
    module = fresh(solution, device, 3)
    result = module.fit(randn(5, 3))
    assert_that(result is module, "fit returns the module itself", value=type(result).__name__)


@task("Standardizer")
def test_fit_and_forward_leave_their_input_alone(solution, device, randn):
    module = fresh(solution, device, 3)
    x = spread_out(randn, 9, 3)
    with unchanged(x):
        module.fit(x)
        module(x)


@task("Standardizer")
def test_fit_refuses_other_shapes_with_both(solution, device, randn):
    module = fresh(solution, device, 3)
    assert_raises(ValueError, module.fit, randn(4, 5), mentions=["(4, 5)", "(N, 3)"])
    assert_raises(ValueError, module.fit, randn(3), mentions=["(3,)", "(N, 3)"])
    assert_raises(ValueError, module.fit, randn(2, 4, 3), mentions=["(2, 4, 3)", "(N, 3)"])
    assert_raises(ValueError, module.fit, randn(2, 3, 5), mentions=["(2, 3, 5)", "(N, 3)"])


@task("Standardizer")
def test_fit_refuses_zero_rows(solution, device, randn):
    module = fresh(solution, device, 3)
    assert_raises(ValueError, module.fit, randn(0, 3), mentions=["(0, 3)", "(N, 3)"])


@task("Standardizer")
def test_a_refused_fit_changes_nothing(solution, device, randn):
    module = fresh(solution, device, 1)
    assert_raises(ValueError, module.fit, randn(4, 5))
    assert_close([module.mean, module.std], [torch.zeros(1), torch.ones(1)])


@task("Standardizer")
def test_forward_refuses_another_width_with_both_shapes(solution, device, randn):
    module = fresh(solution, device, 3)
    assert_raises(ValueError, module, randn(4, 1), mentions=["(4, 1)", "(..., 3)"])
    assert_raises(ValueError, module, randn(3, 5), mentions=["(3, 5)", "(..., 3)"])


# Residual


def residual(solution, inner, *scale):
    return solution.Residual(inner, *scale).to(next(inner.parameters()).device)


@task("Residual")
def test_the_scaled_update_is_added(solution, randn, dtype):
    inner = linear(randn, 3, 3).to(dtype)
    for leading in [(), (4,), (2, 5)]:
        x = randn(*leading, 3, dtype=dtype)
        expected = x + 0.25 * F.linear(x, inner.weight, inner.bias)
        module = residual(solution, inner, 0.25).to(dtype)
        assert_close(module(x), expected.detach(), because="x + 0.25 * inner(x)")


@task("Residual")
def test_the_scale_is_one_by_default(solution, randn):
    inner = linear(randn, 3, 3)
    x = randn(4, 3)
    expected = (x + F.linear(x, inner.weight, inner.bias)).detach()
    assert_close(residual(solution, inner)(x), expected, because="x + inner(x)")


@task("Residual")
def test_scale_and_inner_are_the_parameters(solution, randn):
    module = residual(solution, linear(randn, 3, 3), 0.5)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    expected = {"scale": (), "inner.weight": (3, 3), "inner.bias": (3,)}
    assert_equal(shapes, expected, because="what an optimizer would be given")


@task("Residual")
def test_scale_is_a_leaf_that_is_trained(solution, randn):
    scale = getattr(residual(solution, linear(randn, 3, 3), 0.5), "scale", None)
    kind = (type(scale).__name__, getattr(scale, "requires_grad", None), getattr(scale, "is_leaf", None))
    assert_equal(kind, ("Parameter", True, True), because="the type of .scale, its requires_grad and is_leaf")


@task("Residual")
def test_the_state_dict_has_scale_and_inner(solution, randn):
    module = residual(solution, linear(randn, 3, 3), 0.5)
    keys = sorted(module.state_dict())
    assert_equal(keys, ["inner.bias", "inner.weight", "scale"], because="what a checkpoint would hold")


@task("Residual")
def test_the_registered_scale_is_the_one_that_is_used(solution, randn):
    inner = linear(randn, 3, 3)
    module = residual(solution, inner, 0.5)
    x = randn(4, 3)
    expected = (x + 3.0 * F.linear(x, inner.weight, inner.bias)).detach()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "scale":
                parameter.fill_(3.0)
    assert_close(module(x), expected, because="the parameter `scale` was set to 3 after the module was made")


@task("Residual")
def test_scale_learns(solution, randn):
    inner = linear(randn, 3, 3)
    module = residual(solution, inner, 0.5)
    x, weights = randn(4, 3), randn(4, 3)
    expected = weighted(F.linear(x, inner.weight, inner.bias), weights).detach()
    scale = dict(module.named_parameters()).get("scale")
    assert_that(scale is not None, "there is a parameter `scale`", value=str(scale))
    (grad,) = torch.autograd.grad(weighted(module(x), weights), scale, allow_unused=True)
    assert_that(grad is not None, "the output does not hang on scale", value=str(grad))
    assert_close(grad, expected, rtol=1e-4, atol=1e-5, because="the gradient of scale")


@task("Residual")
def test_a_scale_of_zero_is_the_identity_and_can_learn(solution, randn):
    inner = linear(randn, 3, 3)
    module = residual(solution, inner, 0.0)
    x, weights = randn(4, 3), randn(4, 3)
    update = weighted(F.linear(x, inner.weight, inner.bias), weights).detach()
    output = module(x)
    assert_close(output.detach(), x.cpu(), because="0 * inner(x) adds nothing")
    parameters = list(module.parameters())
    grads = torch.autograd.grad(weighted(output, weights), parameters, allow_unused=True)
    scalars = [g for p, g in zip(parameters, grads, strict=True) if p.dim() == 0]
    assert_close(scalars, [update], rtol=1e-4, atol=1e-5, because="the gradient of scale where scale is 0")


@task("Residual")
def test_inner_learns(solution, randn):
    inner = linear(randn, 3, 3)
    module = residual(solution, inner, 0.5)
    x, weights = randn(4, 3), randn(4, 3)
    expected = [0.5 * weights.T @ x, 0.5 * weights.sum(0)]
    grads = torch.autograd.grad(weighted(module(x), weights), [inner.weight, inner.bias], allow_unused=True)
    grads = [torch.zeros_like(e) if g is None else g for g, e in zip(grads, expected, strict=True)]
    assert_close(grads, expected, rtol=1e-4, atol=1e-5, because="the gradients of inner's weight and bias")


@task("Residual")
def test_the_gradient_of_x_takes_both_roads(solution, randn):
    inner = linear(randn, 3, 3)
    module = residual(solution, inner, 0.5)
    x, weights = randn(4, 3).requires_grad_(), randn(4, 3)
    expected = weights + 0.5 * weights @ inner.weight.detach()
    (grad,) = torch.autograd.grad(weighted(module(x), weights), x)
    assert_close(grad, expected, rtol=1e-4, atol=1e-5, because="one part past inner, one part through it")


@task("Residual")
def test_a_whole_number_is_a_fine_scale(solution, randn):
    inner = linear(randn, 3, 3)
    x = randn(4, 3)
    expected = (x + 2 * F.linear(x, inner.weight, inner.bias)).detach()
    assert_close(residual(solution, inner, 2)(x), expected, because="x + 2 * inner(x)")


@task("Residual")
def test_scale_has_the_default_dtype(solution, randn):
    inner = linear(randn, 3, 3)
    scales = [getattr(residual(solution, inner, scale), "scale", None) for scale in (0.5, 2)]
    dtypes = [str(getattr(scale, "dtype", None)) for scale in scales]
    assert_equal(dtypes, ["torch.float32"] * 2, because="the dtype of .scale where 0.5 and where 2 was given")


@task("Residual")
def test_scale_follows_the_module(solution, randn):
    module = residual(solution, linear(randn, 3, 3), 0.5).to(torch.float64)
    dtype = str(getattr(getattr(module, "scale", None), "dtype", None))
    assert_equal(dtype, "torch.float64", because="the dtype of .scale after module.to(torch.float64)")


@task("Residual")
def test_half_precision_stays_half_precision(solution, randn):
    module = solution.Residual(nn.Tanh(), 0.5).to(randn(1).device)
    x = randn(4, 3).to(torch.bfloat16)
    expected = x + 0.5 * torch.tanh(x)
    assert_close(module(x).detach(), expected, rtol=2e-2, atol=1e-2, because="bfloat16 data, a float32 scale")


@task("Residual")
def test_inner_is_not_copied(solution, randn):
    inner = linear(randn, 3, 3)
    module = residual(solution, inner)
    kept = getattr(module, "inner", None)
    assert_that(kept is inner, "module.inner is the module that was given", value=type(kept).__name__)


@task("Residual")
def test_hooks_of_inner_run(solution, randn):
    inner = linear(randn, 3, 3)
    seen = []
    inner.register_forward_hook(lambda *_: seen.append("inner"))
    residual(solution, inner)(randn(4, 3))
    assert_equal(seen, ["inner"], because="inner had a hook that notes its calls")


@task("Residual")
def test_an_inner_of_another_shape_is_refused_with_both_shapes(solution, randn):
    assert_raises(
        ValueError,
        residual(solution, linear(randn, 3, 1)),
        randn(4, 3),
        mentions=["(4, 3)", "(4, 1)"],
        because="(4, 1) would broadcast without a word",
    )


@task("Residual")
def test_the_skipped_input_keeps_its_values(solution, randn):
    module = residual(solution, linear(randn, 3, 3))
    x = randn(4, 3)
    with torch.no_grad(), unchanged(x):
        module(x)


# freeze


def trainable_names(module):
    return [name for name, p in module.named_parameters() if p.requires_grad]


def three_layers():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))


@task("freeze")
def test_the_names_of_the_frozen_come_back_in_order(solution):
    frozen = solution.freeze(three_layers(), "bias")
    assert_equal(frozen, ["0.bias", "1.bias", "2.bias"])


@task("freeze")
def test_what_matches_is_frozen_and_the_rest_is_not(solution):
    module = three_layers()
    solution.freeze(module, "bias")
    assert_equal(trainable_names(module), ["0.weight", "1.weight", "2.weight"], because="what still trains")


@task("freeze")
def test_the_pattern_is_a_regular_expression(solution):
    module = three_layers()
    frozen = solution.freeze(module, r"^(0|2)\.w.*t$")
    assert_equal(frozen, ["0.weight", "2.weight"], because=r"the pattern is ^(0|2)\.w.*t$")


@task("freeze")
def test_the_match_may_lie_anywhere_in_the_name(solution):
    module = nn.Sequential(three_layers(), nn.Linear(2, 2))
    frozen = solution.freeze(module, r"1\.[wb]")
    expected = ["0.1.weight", "0.1.bias", "1.weight", "1.bias"]
    assert_equal(frozen, expected, because=r"the pattern is 1\.[wb], which is in the middle of 0.1.weight")


@task("freeze")
def test_an_anchor_keeps_layer_one_and_layer_ten_apart(solution):
    module = nn.ModuleList([nn.Linear(1, 1) for _ in range(12)])
    frozen = solution.freeze(module, r"^1\.")
    assert_equal(frozen, ["1.weight", "1.bias"], because=r"the pattern is ^1\. and there is a layer 10, too")


@task("freeze")
def test_no_match_freezes_nothing(solution):
    module = three_layers()
    frozen = solution.freeze(module, "norm")
    assert_equal((frozen, len(trainable_names(module))), ([], 6), because="names returned, trainable left")


@task("freeze")
def test_upper_and_lower_case_are_different(solution):
    frozen = solution.freeze(three_layers(), "BIAS|Weight")
    assert_equal(frozen, [], because="the names are in lower case, the pattern is not")


@task("freeze")
def test_parameters_of_the_module_itself_are_found(solution):
    module = Own()
    frozen = solution.freeze(module, "^gain$")
    assert_equal((frozen, trainable_names(module)), (["gain"], ["temperature", "inner.weight", "inner.bias"]))


@task("freeze")
def test_what_was_frozen_before_is_not_reported_again(solution):
    module = three_layers()
    module[1].bias.requires_grad_(False)
    first = solution.freeze(module, "bias")
    assert_equal(first, ["0.bias", "2.bias"], because="1.bias was frozen already")


@task("freeze")
def test_what_was_frozen_before_stays_frozen(solution):
    module = three_layers()
    module[1].weight.requires_grad_(False)
    solution.freeze(module, "bias")
    assert_equal(trainable_names(module), ["0.weight", "2.weight"], because="1.weight was frozen already")


@task("freeze")
def test_the_second_name_of_a_tied_weight_freezes_it(solution):
    module = Tied()
    frozen = solution.freeze(module, "head.weight")
    state = (frozen, module.embed.weight.requires_grad)
    assert_equal(state, (["head.weight"], False), because="names returned, and whether the embedding still trains")


@task("freeze")
def test_a_tied_weight_is_reported_once(solution):
    frozen = solution.freeze(Tied(), r"(embed|head)\.weight")
    assert_equal(frozen, ["embed.weight"], because="embed.weight and head.weight are one parameter")


@task("freeze")
def test_a_layer_in_two_places_is_reported_once(solution):
    layer = nn.Linear(2, 2)
    frozen = solution.freeze(nn.Sequential(layer, layer), "weight")
    assert_equal(frozen, ["0.weight"], because="0.weight and 1.weight are one parameter")


@task("freeze")
def test_the_others_get_the_gradients_that_they_got_before(solution, randn):
    module = filled(three_layers(), randn)
    x, weights = randn(6, 3), randn(6, 2)
    names = ["0.weight", "0.bias", "2.bias"]
    own = dict(module.named_parameters())
    wanted = [own[name] for name in names]
    expected = [g.clone() for g in torch.autograd.grad(weighted(module(x), weights), wanted)]
    solution.freeze(module, r"^1\.|2\.weight")
    weighted(module(x), weights).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
    assert_close(grads, expected, because="a frozen layer in the middle still passes gradients on")


@task("freeze")
def test_the_frozen_get_no_gradient(solution, randn):
    module = filled(three_layers(), randn)
    solution.freeze(module, r"^1\.")
    weighted(module(randn(6, 3)), randn(6, 2)).backward()
    with_gradient = [name for name, p in module.named_parameters() if p.grad is not None]
    assert_equal(with_gradient, ["0.weight", "0.bias", "2.weight", "2.bias"], because="who has a .grad afterwards")


@task("freeze")
def test_a_leftover_gradient_is_dropped_and_the_others_are_kept(solution, randn):
    module = filled(three_layers(), randn)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    solution.freeze(module, r"\d\.weight")
    with_gradient = [name for name, p in module.named_parameters() if p.grad is not None]
    state = (trainable_names(module), with_gradient)
    biases = ["0.bias", "1.bias", "2.bias"]
    assert_equal(state, (biases, biases), because="who still trains, and who still has the .grad of before")


@task("freeze")
def test_freezing_changes_no_number(solution, randn):
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), randn)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    solution.freeze(module, "weight")
    assert_close(dict(module.state_dict()), before)


@task("freeze")
def test_the_mode_is_not_touched(solution):
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4))
    module[2].eval()
    solution.freeze(module, r"^[02]\.")
    state = (trainable_names(module), [child.training for child in module.modules()])
    expected = ([], [True, True, True, False])
    assert_equal(state, expected, because="who still trains; the mode of the module and of its three children")


# summarize


def rows_of(rows):
    """Plain values of the rows."""
    return [(row.name, row.type, row.output_shape, row.params) for row in rows]


def hooks_of(module):
    return [
        sum(len(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))
        for m in module.modules()
    ]


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("the forward gave up")


@task("summarize")
def test_one_row_per_module_and_the_module_itself_last(solution, randn):
    module = filled(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), randn)
    expected = [
        ("0", "Linear", (5, 8), 32),
        ("1", "ReLU", (5, 8), 0),
        ("2", "Linear", (5, 2), 18),
        ("", "Sequential", (5, 2), 50),
    ]
    assert_equal(rows_of(solution.summarize(module, randn(5, 3))), expected)


@task("summarize")
def test_the_rows_are_rows(solution, randn):
    rows = solution.summarize(linear(randn, 3, 2), randn(5, 3))
    kind = (type(rows).__name__, [type(row).__name__ for row in rows], [row._fields for row in rows])
    expected = ("list", ["Row"], [("name", "type", "output_shape", "params")])
    assert_equal(kind, expected)


@task("summarize")
def test_children_come_before_their_parent(solution, randn):
    inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    module = filled(nn.Sequential(inner, nn.Linear(3, 2)), randn)
    names = [row.name for row in solution.summarize(module, randn(5, 3))]
    assert_equal(names, ["0.0", "0.1", "0", "1", ""], because="a parent finishes after its children")


class OutOfOrder(nn.Module):
    """Calls what it registered last first, one layer twice, and one not at all."""

    def __init__(self):
        super().__init__()
        self.late = nn.Linear(4, 4)
        self.never = nn.Linear(4, 9)
        self.early = nn.Linear(3, 4)

    def forward(self, x):
        return self.late(self.late(self.early(x)))


@task("summarize")
def test_rows_follow_the_calls_not_the_registration(solution, randn):
    module = filled(OutOfOrder(), randn)
    names = [row.name for row in solution.summarize(module, randn(5, 3))]
    expected = ["early", "late", "late", ""]
    assert_equal(names, expected, because="early runs first, late runs twice, never is not called")


@task("summarize")
def test_a_module_with_two_names_goes_by_the_first(solution, randn):
    layer = nn.Linear(3, 3)
    module = filled(nn.Sequential(layer, layer), randn)
    names = [row.name for row in solution.summarize(module, randn(5, 3))]
    assert_equal(names, ["0", "0", ""], because="one layer, registered as 0 and as 1, called twice")


@task("summarize")
def test_params_are_those_of_count_parameters(solution):
    module = Tied(7, 3)
    module.norm.weight.requires_grad_(False)
    rows = solution.summarize(module, torch.tensor([1, 4]))
    counts = {row.name: row.params for row in rows}
    expected = {"embed": 21, "norm": 6, "head": 21, "": 27}
    assert_equal(counts, expected, because="the embedding and the head are one parameter; frozen ones count")


@task("summarize")
def test_buffers_are_not_among_the_params(solution, randn):
    module = nn.Sequential(nn.BatchNorm1d(3)).to(randn(1).device)
    counts = [row.params for row in solution.summarize(module, randn(5, 3))]
    assert_equal(counts, [6, 6])


class Several(nn.Module):
    """Takes two inputs and returns something that is not a tensor."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, a, b):
        return self.make(a, b)


@task("summarize")
def test_a_tuple_of_outputs_gives_a_tuple_of_shapes(solution, randn):
    rows = solution.summarize(Several(lambda a, b: (a, [b, a * 1])), randn(5, 3), randn(2))
    expected = ((5, 3), ((2,), (5, 3)))
    assert_equal(rows[-1].output_shape, expected, because="the output was (a, [b, a]) with a (5, 3), b (2,)")


@task("summarize")
def test_the_shape_of_something_else_is_none(solution, randn):
    rows = solution.summarize(Several(lambda a, b: {"loss": a}), randn(5, 3), randn(2))
    assert_equal(rows_of(rows), [("", "Several", None, 0)], because="the output was a dict")


@task("summarize")
def test_a_scalar_has_the_empty_shape(solution, randn):
    rows = solution.summarize(Several(lambda a, b: (a.sum(), 3)), randn(5, 3), randn(2))
    assert_equal(rows[-1].output_shape, ((), None), because="the output was (scalar tensor, 3)")


@task("summarize")
def test_no_hook_stays(solution, randn):
    module = filled(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), randn)
    solution.summarize(module, randn(5, 3))
    assert_equal(hooks_of(module), [0, 0, 0], because="hooks on the module and its two children afterwards")


@task("summarize")
def test_no_hook_stays_when_the_forward_raises(solution, randn):
    good = filled(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), randn)
    bad = filled(nn.Sequential(nn.Linear(3, 3), Raises()), randn)
    solution.summarize(good, randn(5, 3))
    assert_raises(RuntimeError, solution.summarize, bad, randn(5, 3), mentions=["the forward gave up"])
    found = {"returned": hooks_of(good), "raised": hooks_of(bad)}
    expected = {"returned": [0, 0, 0], "raised": [0, 0, 0]}
    assert_equal(found, expected, because="hooks on a module that returned and on one that raised")


@task("summarize")
def test_hooks_of_others_stay(solution, randn):
    module = filled(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), randn)
    module[0].register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    solution.summarize(module, randn(5, 3))
    assert_equal(hooks_of(module), [1, 1, 0], because="two hooks were there before the summary")


@task("summarize")
def test_hooks_of_others_run_once(solution, randn):
    module = filled(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), randn)
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module[1].register_forward_hook(lambda *_: seen.append("tanh"))
    solution.summarize(module, randn(5, 3))
    assert_equal(seen, ["before", "tanh"], because="one hook before the module, one after its Tanh")


class Watched(nn.Module):
    """Three stages; the last notes whether the output of the first is still alive."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.alive = []

    def forward(self, x):
        x = self.first(x * 2)
        ghost = weakref.ref(x)
        x = self.second(x + 1)
        self.alive.append(ghost() is not None)
        return x


@task("summarize")
def test_no_output_is_kept_alive_during_the_forward(solution, randn):
    module = Watched()
    with torch.no_grad():
        solution.summarize(module, randn(5, 3))
    assert_equal(module.alive, [False], because="whether the first stage's output outlived its last use")


@task("summarize")
def test_no_graph_is_recorded(solution, randn):
    tracked = []
    module = linear(randn, 3, 3)
    module.register_forward_hook(lambda _module, _args, output: tracked.append(output.requires_grad))
    solution.summarize(module, randn(5, 3))
    assert_equal(tracked, [False], because="requires_grad of the output inside the forward")


@task("summarize")
def test_gradients_are_recorded_again_afterwards(solution, randn):
    module = nn.Sequential(Raises())
    assert_raises(RuntimeError, solution.summarize, module, randn(5, 3))
    assert_equal(torch.is_grad_enabled(), True, because="whether gradients are recorded after the exception")


@task("summarize")
def test_the_mode_is_the_one_it_is_in(solution, randn):
    module = nn.Sequential(nn.Dropout(), nn.Identity())
    modes = []
    module[0].register_forward_hook(lambda child, _args, _output: modes.append(child.training))
    solution.summarize(module.train(), randn(5, 3))
    solution.summarize(module.eval(), randn(5, 3))
    assert_equal(modes, [True, False], because="training inside the forward, in train and in eval mode")


@task("summarize")
def test_the_mode_is_left_as_it_was(solution, randn):
    module = nn.Sequential(nn.Dropout(), nn.Identity())
    module[1].eval()
    solution.summarize(module, randn(5, 3))
    assert_equal([child.training for child in module.modules()], [True, True, False])


# functional_apply


def chain(randn):
    return filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), randn)


def stand_ins(module, randn, *names):
    own = module.state_dict()
    return {name: randn(*own[name].shape) for name in names or own}


def oracle(module, tensors, *args):
    """PyTorch's own answer, on a copy that the learner's code never sees."""
    return torch.func.functional_call(copy.deepcopy(module), tensors, args)


@task("functional_apply")
def test_all_parameters_can_be_replaced(solution, randn):
    module = chain(randn)
    tensors, x = stand_ins(module, randn), randn(4, 3)
    expected = oracle(module, tensors, x).detach()
    assert_close(solution.functional_apply(module, tensors, x), expected)


@task("functional_apply")
def test_what_is_not_named_is_the_modules_own(solution, randn):
    module = chain(randn)
    tensors, x = stand_ins(module, randn, "0.bias", "2.weight"), randn(4, 3)
    expected = oracle(module, tensors, x).detach()
    output = solution.functional_apply(module, tensors, x).detach()
    assert_close(output, expected, because="only 0.bias and 2.weight are replaced")


@task("functional_apply")
def test_no_stand_ins_are_a_plain_call(solution, randn):
    module, x = chain(randn), randn(4, 3)
    expected = copy.deepcopy(module)(x).detach()
    assert_close(solution.functional_apply(module, {}, x).detach(), expected)


@task("functional_apply")
def test_buffers_can_be_replaced(solution, randn, rand):
    module = filled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), randn).eval()
    tensors = {"1.running_mean": randn(4), "1.running_var": rand(4) + 0.5}
    x = randn(6, 3)
    expected = oracle(module, tensors, x).detach()
    output = solution.functional_apply(module, tensors, x).detach()
    assert_close(output, expected, rtol=1e-4, atol=1e-5, because="the statistics of the norm are stand-ins")


@task("functional_apply")
def test_several_arguments_are_passed_on(solution, randn):
    module = filled(nn.Bilinear(3, 4, 2), randn)
    tensors, a, b = stand_ins(module, randn), randn(5, 3), randn(5, 4)
    expected = oracle(module, tensors, a, b)
    assert_close(solution.functional_apply(module, tensors, a, b), expected, rtol=1e-4, atol=1e-5)


@task("functional_apply")
def test_gradients_flow_to_the_stand_ins(solution, randn):
    module = chain(randn).to(torch.float64)
    names = list(module.state_dict())
    shapes = [value.shape for value in module.state_dict().values()]
    tensors = [randn(*shape, dtype=torch.float64) for shape in shapes]
    x = randn(4, 3, dtype=torch.float64)

    def run(*given):
        return solution.functional_apply(module, dict(zip(names, given, strict=True)), x)

    def expected(*given):
        return oracle(module, dict(zip(names, given, strict=True)), x)

    assert_gradients_close(run, expected, tensors, because="the gradients of the stand-ins")


@task("functional_apply")
def test_parameters_are_welcome_as_stand_ins(solution, randn):
    module, x = chain(randn), randn(4, 3)
    other = dict(chain(randn).named_parameters())
    expected = oracle(module, other, x).detach()
    assert_close(solution.functional_apply(module, other, x).detach(), expected)


@task("functional_apply")
def test_the_module_can_be_run_under_vmap(solution, randn):
    module, x = chain(randn), randn(4, 3)
    models = [stand_ins(module, randn) for _ in range(3)]
    expected = torch.stack([oracle(module, tensors, x) for tensors in models]).detach()
    stacked = {name: torch.stack([tensors[name] for tensors in models]) for name in models[0]}
    apply = inspect.unwrap(solution.functional_apply)  # inside vmap there are no numbers to note down
    outputs = torch.func.vmap(lambda tensors: apply(module, tensors, x))(stacked)
    assert_close(outputs, expected, rtol=1e-4, atol=1e-5, because="three models at once, one call")


@task("functional_apply")
def test_one_name_of_a_tied_weight_replaces_all(solution, randn, randint):
    module = filled(Tied(7, 3), randn)
    ids = randint(0, 7, (4,))
    for name in ("embed.weight", "head.weight"):
        tensors = {name: randn(7, 3)}
        expected = oracle(module, tensors, ids).detach()
        output = solution.functional_apply(module, tensors, ids).detach()
        assert_close(output, expected, rtol=1e-4, atol=1e-5, because=f"{name} is one of two names of a weight")


@task("functional_apply")
def test_both_names_of_a_tied_weight_may_be_given(solution, randn, randint):
    module = filled(Tied(7, 3), randn)
    ids, weight = randint(0, 7, (4,)), randn(7, 3)
    tensors = {"head.weight": weight, "embed.weight": weight}
    expected = oracle(module, tensors, ids).detach()
    output = solution.functional_apply(module, tensors, ids).detach()
    assert_close(output, expected, rtol=1e-4, atol=1e-5)


@task("functional_apply")
def test_two_tensors_for_one_tied_weight_are_refused(solution, randn, randint):
    module = filled(Tied(7, 3), randn)
    tensors = {"embed.weight": randn(7, 3), "head.weight": randn(7, 3)}
    ids = randint(0, 7, (4,))
    assert_raises(ValueError, solution.functional_apply, module, tensors, ids, mentions=[".weight"])


@task("functional_apply")
def test_a_layer_in_two_places_is_replaced_in_both(solution, randn):
    layer = nn.Linear(3, 3)
    module = filled(nn.Sequential(layer, nn.Tanh(), layer), randn)
    x = randn(4, 3)
    for name in ("0.weight", "2.weight"):
        tensors = {name: randn(3, 3)}
        expected = oracle(module, tensors, x).detach()
        output = solution.functional_apply(module, tensors, x).detach()
        assert_close(output, expected, rtol=1e-4, atol=1e-5, because=f"{name} names a layer that runs twice")


def portrait(module):
    """Who is where: names in order, with the identity of each object, and what is saved."""
    members = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return [(name, id(tensor)) for name, tensor in members], list(module.state_dict())


def differences(before, after):
    """Readable and repeatable: the names that moved or are other objects now."""
    names = [name for name, _ in after[0]]
    replaced = [name for name, key in after[0] if (name, key) not in before[0]]
    return {"names": names, "replaced": replaced, "saved": after[1]}


class Counting(nn.Module):
    """Three kinds of state: a parameter, a saved buffer that forward replaces, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("offset", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.steps = self.steps + 1
        return self.layer(x) + self.offset * self.steps


@task("functional_apply")
def test_afterwards_the_module_holds_what_it_held(solution, randn):
    module = filled(Counting(), randn)
    tensors = {"layer.weight": randn(2, 3), "steps": randn(1)[0], "offset": randn(2)}
    before = portrait(module)
    solution.functional_apply(module, tensors, randn(4, 3))
    expected = differences(before, before)
    assert_equal(differences(before, portrait(module)), expected, because="the names in order, and who is new")


@task("functional_apply")
def test_stand_ins_for_buffers_are_read(solution, randn):
    module = filled(Counting(), randn)
    tensors = {"steps": randn(1)[0], "offset": randn(2)}
    x = randn(4, 3)
    own = module.layer
    expected = (F.linear(x, own.weight, own.bias) + tensors["offset"] * (tensors["steps"] + 1)).detach()
    output = solution.functional_apply(module, tensors, x).detach()
    assert_close(output, expected, rtol=1e-4, atol=1e-5)


@task("functional_apply")
def test_a_tied_module_is_whole_again_afterwards(solution, randn, randint):
    module = filled(Tied(7, 3), randn)
    before = portrait(module)
    solution.functional_apply(module, {"head.weight": randn(7, 3)}, randint(0, 7, (4,)))
    assert_equal(differences(before, portrait(module)), differences(before, before))


@task("functional_apply")
def test_a_layer_in_two_places_is_whole_again_afterwards(solution, randn):
    layer = nn.Linear(3, 3)
    module = filled(nn.Sequential(layer, layer), randn)
    before = portrait(module)
    solution.functional_apply(module, {"0.weight": randn(3, 3)}, randn(4, 3))
    assert_equal(differences(before, portrait(module)), differences(before, before))


@task("functional_apply")
def test_values_and_gradients_of_the_module_stay(solution, randn):
    module = chain(randn)
    for parameter in module.parameters():
        parameter.grad = randn(*parameter.shape)
    before = [(p.detach().clone(), p.grad.clone()) for p in module.parameters()]
    tensors = {name: t.requires_grad_() for name, t in stand_ins(module, randn).items()}
    solution.functional_apply(module, tensors, randn(4, 3)).sum().backward()
    assert_close([(p.detach(), p.grad) for p in module.parameters()], before)


@task("functional_apply")
def test_an_exception_leaves_the_module_whole(solution, randn):
    good, bad = chain(randn), filled(nn.Sequential(nn.Linear(3, 3), Raises()), randn)
    tensors, before = stand_ins(bad, randn), (portrait(good), portrait(bad))
    solution.functional_apply(good, stand_ins(good, randn), randn(4, 3))
    gave_up = ["the forward gave up"]
    assert_raises(RuntimeError, solution.functional_apply, bad, tensors, randn(4, 3), mentions=gave_up)
    after = [differences(before[0], portrait(good)), differences(before[1], portrait(bad))]
    expected = [differences(one, one) for one in before]
    assert_equal(after, expected, because="a module that returned, and one that raised")


@task("functional_apply")
def test_hooks_run_under_stand_ins(solution, randn):
    module = chain(randn)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("module"))
    solution.functional_apply(module, stand_ins(module, randn), randn(4, 3))
    assert_equal(seen, ["module"], because="the module had a hook that notes its calls")


@task("functional_apply")
def test_no_parameter_is_copied(solution, randn):
    module = filled(nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 1)), randn)
    tensors = stand_ins(module, randn, "0.weight")
    assert_cost(
        solution.functional_apply,
        module,
        tensors,
        randn(1, 50),
        max_new_bytes=1_000,
        because="the results of the two layers have 204 bytes, the first weight has 10,000",
    )


@task("functional_apply")
def test_an_unknown_name_is_refused(solution, randn):
    module = chain(randn)
    tensors = {"0.weight": randn(5, 3), "1.weight": randn(5, 5)}
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append("called"))
    before = portrait(module)
    assert_raises(KeyError, solution.functional_apply, module, tensors, randn(4, 3), mentions=["1.weight"])
    state = (seen, differences(before, portrait(module)))
    assert_equal(state, ([], differences(before, before)), because="the Tanh at 1 has no weight: nothing may run")


@task("functional_apply")
def test_a_bias_that_was_left_out_is_an_unknown_name(solution, randn):
    module = linear(randn, 3, 2, bias=False)
    tensors = {"bias": randn(2)}
    assert_raises(KeyError, solution.functional_apply, module, tensors, randn(4, 3), mentions=["bias"])


@task("functional_apply")
def test_another_shape_is_refused_with_both_shapes(solution, randn):
    module = chain(randn)
    tensors = {"0.bias": randn(5), "2.bias": randn(1)}
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append("called"))
    before = portrait(module)
    assert_raises(
        ValueError,
        solution.functional_apply,
        module,
        tensors,
        randn(4, 3),
        mentions=["2.bias", "(2,)", "(1,)"],
        because="a bias (1,) would broadcast without a word",
    )
    state = (seen, differences(before, portrait(module)))
    assert_equal(state, ([], differences(before, before)), because="nothing may run")


# functional_apply: per_sample_grads


def half_squared_error(prediction, target):
    return 0.5 * (prediction - target).square().sum()


def one_by_one(module, loss_fn, x, y):
    """N backward passes on a copy."""
    module = copy.deepcopy(module)
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(loss_fn(module(x[i : i + 1]), y[i : i + 1]), list(own.values())) for i in range(len(x))]
    return {name: torch.stack(grads) for name, grads in zip(own, zip(*rows, strict=True), strict=True)}


@task("functional_apply")
def test_a_linear_model_has_gradients_in_closed_form(solution, randn):
    module = linear(randn, 3, 1)
    x, y = randn(6, 3), randn(6, 1)
    error = (x @ module.weight.detach().T + module.bias.detach()) - y  # (N, 1)
    expected = {"weight": (error * x)[:, None, :], "bias": error}
    grads = solution.per_sample_grads(module, half_squared_error, x, y)
    assert_close(grads, expected, rtol=1e-4, atol=1e-5, because="(prediction - target) * x for each sample")


@task("functional_apply")
def test_per_sample_gradients_are_those_of_n_backward_passes(solution, randn):
    module = chain(randn)
    x, y = randn(6, 3), randn(6, 2)
    expected = one_by_one(module, half_squared_error, x, y)
    grads = solution.per_sample_grads(module, half_squared_error, x, y)
    assert_equal(list(grads), list(expected), because="the names in the module's order")
    assert_close(grads, expected, rtol=1e-4, atol=1e-5)


@task("functional_apply")
def test_one_sample_is_enough_for_per_sample_gradients(solution, randn):
    module = chain(randn)
    x, y = randn(1, 3), randn(1, 2)
    expected = one_by_one(module, half_squared_error, x, y)
    grads = solution.per_sample_grads(module, half_squared_error, x, y)
    assert_close(grads, expected, rtol=1e-4, atol=1e-5)


@task("functional_apply")
def test_samples_reach_the_loss_as_batches_of_one(solution, randn):
    module = chain(randn)
    x, y = randn(6, 4, 3), randn(6, 4, 2)

    def loss_fn(prediction, target):
        return (2 * prediction - target).square().mean(dim=(0, 1))[0]

    expected = one_by_one(module, loss_fn, x, y)
    grads = solution.per_sample_grads(module, loss_fn, x, y)
    assert_close(grads, expected, rtol=1e-4, atol=1e-5, because="the loss reduces axes 0 and 1 of (1, 4, 2)")


@task("functional_apply")
def test_frozen_parameters_have_no_per_sample_gradient(solution, randn):
    module = chain(randn)
    module[0].weight.requires_grad_(False)
    x, y = randn(6, 3), randn(6, 2)
    expected = one_by_one(module, half_squared_error, x, y)
    grads = solution.per_sample_grads(module, half_squared_error, x, y)
    assert_equal(list(grads), ["0.bias", "2.weight", "2.bias"], because="0.weight is frozen")
    assert_close(grads, expected, rtol=1e-4, atol=1e-5)


@task("functional_apply")
def test_a_tied_weight_collects_both_contributions(solution, randn):
    layer = nn.Linear(3, 3)
    module = filled(nn.Sequential(layer, nn.Tanh(), layer), randn)
    x, y = randn(6, 3), randn(6, 3)
    expected = one_by_one(module, half_squared_error, x, y)
    grads = solution.per_sample_grads(module, half_squared_error, x, y)
    assert_equal(list(grads), ["0.weight", "0.bias"], because="the layer at 0 and at 2 is one")
    assert_close(grads, expected, rtol=1e-4, atol=1e-5)


@task("functional_apply")
def test_the_module_is_called_once_for_all_samples(solution, randn):
    module = chain(randn)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("called"))
    solution.per_sample_grads(module, half_squared_error, randn(6, 3), randn(6, 2))
    assert_equal(seen, ["called"], because="six samples, one call of the module")


@task("functional_apply")
def test_per_sample_gradients_leave_the_module_alone(solution, randn):
    module = chain(randn)
    module[0].weight.grad = randn(5, 3)
    before = (module[0].weight.grad.clone(), portrait(module))
    solution.per_sample_grads(module, half_squared_error, randn(6, 3), randn(6, 2))
    assert_close(module[0].weight.grad, before[0], because="the .grad of 0.weight from before")
    others = [name for name, p in module.named_parameters() if p.grad is not None]
    state = (others, differences(before[1], portrait(module)))
    assert_equal(state, (["0.weight"], differences(before[1], before[1])), because="who has a .grad; who is new")


@task("functional_apply")
def test_different_numbers_of_samples_are_refused(solution, randn):
    module = chain(randn)
    assert_raises(
        ValueError,
        solution.per_sample_grads,
        module,
        half_squared_error,
        randn(6, 3),
        randn(5, 2),
        mentions=["(6, 3)", "(5, 2)"],
    )
