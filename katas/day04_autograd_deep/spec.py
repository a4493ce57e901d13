import gc
import operator
import random
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradcheck,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    noncontiguous,
    same_storage,
    task,
    unchanged,
)

f64 = torch.float64


def leaf(x):
    """A fresh tensor with the values of x that requires grad."""
    return x.detach().clone().requires_grad_()


# --------------------------------------------------------------------------------------- matmul_vjp


def _product_gradients(a, b, grad):
    a, b = leaf(a), leaf(b)
    return torch.autograd.grad(a @ b, (a, b), grad)


@task("matmul_vjp")
def test_the_gradient_at_a_is_that_of_autograd(solution, randn):
    a, b, grad = randn(3, 4, dtype=f64), randn(4, 5, dtype=f64), randn(3, 5, dtype=f64)
    expected, _ = _product_gradients(a, b, grad)
    assert_close(solution.matmul_vjp(a, b, grad)[0], expected, because="a[n, k] meets b[k, m] for every m")


@task("matmul_vjp")
def test_the_gradient_at_b_is_that_of_autograd(solution, randn):
    a, b, grad = randn(3, 4, dtype=f64), randn(4, 5, dtype=f64), randn(3, 5, dtype=f64)
    _, expected = _product_gradients(a, b, grad)
    assert_close(solution.matmul_vjp(a, b, grad)[1], expected, because="b[k, m] meets a[n, k] for every n")


@task("matmul_vjp")
def test_square_matrices_where_shapes_reveal_nothing(solution, randn):
    a, b, grad = randn(4, 4), randn(4, 4), randn(4, 4)
    expected = _product_gradients(a, b, grad)
    assert_close(solution.matmul_vjp(a, b, grad), list(expected))


@task("matmul_vjp")
@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)], ids=str)
def test_sizes_of_zero_and_one(solution, randn, sizes):
    n, k, m = sizes
    a, b, grad = randn(n, k), randn(k, m), randn(n, m)
    expected = _product_gradients(a, b, grad)
    assert_close(solution.matmul_vjp(a, b, grad), list(expected))


@task("matmul_vjp")
def test_matrices_with_other_strides(solution, randn):
    a, b, grad = randn(4, 3).T, noncontiguous(randn(4, 5)), randn(1, 1).expand(3, 5)
    expected = _product_gradients(a, b, grad)
    assert_close(solution.matmul_vjp(a, b, grad), list(expected))


@task("matmul_vjp")
def test_two_products_are_enough(solution, randn):
    n, k, m = 6, 7, 8
    a, b, grad = randn(n, k), randn(k, m), randn(n, m)
    because = "the Jacobian of a matrix product is mostly zeros: it is never built"
    assert_cost(
        solution.matmul_vjp,
        a,
        b,
        grad,
        max_flops=4 * n * k * m,
        max_matmuls=2,
        no_larger_than=k * m,
        because=because,
    )


@task("matmul_vjp")
@pytest.mark.parametrize(
    "shapes",
    [((2, 3), (4, 5)), ((3,), (3, 5)), ((2, 3), (3,)), ((2, 2, 3), (3, 5)), ((2, 3), (2, 3, 5))],
    ids=str,
)
def test_operands_without_a_product_are_refused(solution, randn, shapes):
    a, b = randn(*shapes[0]), randn(*shapes[1])
    assert_raises(ValueError, solution.matmul_vjp, a, b, randn(2, 5), mentions=[str(shape) for shape in shapes])


@task("matmul_vjp")
@pytest.mark.parametrize("shape", [(5, 2), (2, 1), (1, 5), (5,), (1, 2, 5)], ids=str)
def test_a_gradient_of_another_shape_than_the_product_is_refused(solution, randn, shape):
    a, b = randn(2, 3), randn(3, 5)
    assert_raises(ValueError, solution.matmul_vjp, a, b, randn(*shape), mentions=["(2, 5)", str(shape)])


@cost_case("matmul_vjp")
def matmul_vjp_cost(module, randn):
    a, b, grad = randn(32, 16), randn(16, 8), randn(32, 8)
    return lambda: module.matmul_vjp(a, b, grad)


# -------------------------------------------------------------------------------------- unbroadcast

BROADCASTS = [  # (shape of the gradient, shape of the operand)
    ((4, 3), (3,)),
    ((5, 3, 4), (3, 4)),
    ((5, 3, 4), (4,)),
    ((1, 3), (3,)),
    ((3, 4), (3, 1)),
    ((3, 4), (1, 4)),
    ((3, 3), (1, 3)),
    ((3, 3), (3, 1)),
    ((5, 3, 4), (5, 1, 4)),
    ((5, 3, 4), (3, 1)),
    ((2, 5, 3, 4), (5, 1, 1)),
    ((2, 5, 3, 4), (1, 1, 3, 1)),
    ((5, 3, 4), (1, 1, 1)),
    ((2, 3), (1,)),
    ((2, 3), ()),
    ((4,), ()),
    ((0, 3), (3,)),
    ((0, 3), (1, 3)),
    ((2, 0), (2, 1)),
    ((0, 3), ()),
    ((2, 0), (0,)),
]


def _unbroadcast_oracle(grad, shape):
    operand = torch.zeros(shape, dtype=grad.dtype, device=grad.device, requires_grad=True)
    return torch.autograd.grad(operand + torch.zeros_like(grad), operand, grad)[0]


@task("unbroadcast")
@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
def test_it_is_the_gradient_of_a_broadcast_sum(solution, randn, shapes):
    grad = randn(*shapes[0], dtype=f64)
    expected = _unbroadcast_oracle(grad, shapes[1])
    assert_close(solution.unbroadcast(grad, shapes[1]), expected)


@task("unbroadcast")
@pytest.mark.parametrize("kind", [tuple, list, torch.Size], ids=lambda kind: kind.__name__)
def test_the_shape_may_be_a_tuple_a_list_or_a_size(solution, randn, kind):
    grad = randn(2, 3, 4)
    expected = _unbroadcast_oracle(grad, (3, 1))
    assert_close(solution.unbroadcast(grad, kind((3, 1))), expected)


@task("unbroadcast")
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (1, 1), (3,), (), (0, 3)], ids=str)
def test_where_nothing_was_broadcast_the_gradient_comes_back(solution, randn, shape):
    grad = randn(*shape)
    expected = grad.clone()
    assert_close(solution.unbroadcast(grad, shape), expected, because="there is nothing to sum")


@task("unbroadcast")
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1, 3), (3,), ()], ids=str)
def test_where_nothing_was_broadcast_nothing_is_copied(solution, randn, shape):
    grad = randn(*shape)
    because = "an operand that was not broadcast needs no new memory"
    result = assert_cost(solution.unbroadcast, grad, shape, max_new_bytes=0, because=because)
    assert_that(same_storage(result, grad), "the result is the gradient that was given")


@task("unbroadcast")
def test_a_gradient_with_other_strides(solution, randn):
    grad = randn(4, 3, 2, dtype=f64).transpose(0, 2)
    expected = _unbroadcast_oracle(grad, (3, 1))
    assert_close(solution.unbroadcast(grad, (3, 1)), expected)


@task("unbroadcast")
def test_half_precision_stays_half_precision(solution, randn):
    grad = randn(4, 3, dtype=torch.bfloat16)
    expected = _unbroadcast_oracle(grad, (3,))
    assert_close(solution.unbroadcast(grad, (3,)), expected)


@task("unbroadcast")
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (2,)),
        ((2, 3), (4, 3)),
        ((3,), (1, 3)),
        ((1, 3), (2, 3)),
        ((2, 0), (2, 3)),
        ((), (1,)),
        ((4, 6), (2, 3)),
    ],
    ids=str,
)
def test_a_shape_that_does_not_broadcast_to_the_gradient_is_refused(solution, randn, shapes):
    grad, shape = shapes
    assert_raises(ValueError, solution.unbroadcast, randn(*grad), shape, mentions=[str(grad), str(shape)])


@cost_case("unbroadcast")
def unbroadcast_cost(module, randn):
    grad = randn(16, 32, 8)
    return lambda: module.unbroadcast(grad, (32, 1))


# --------------------------------------------------------------------------------------- topo_order


class Spy:
    """A node that counts how often it is asked for its parents, and how often it is compared."""

    reads = comparisons = 0

    def __init__(self, name, parents=()):
        self.name, self._parents = name, tuple(parents)

    @property
    def parents(self):
        Spy.reads += 1
        return self._parents

    def __eq__(self, other):
        Spy.comparisons += 1
        return self is other

    def __hash__(self):
        return id(self)


@pytest.fixture
def spy():
    Spy.reads = Spy.comparisons = 0
    return Spy


def _names(order):
    assert_that(isinstance(order, list), "the result is a list of nodes", value=type(order).__name__)
    return [node.name for node in order]


def _early(order, nodes):
    """The names of the nodes that come before one of their parents; each of `nodes` is there once."""
    names = _names(order)
    expected = sorted(node.name for node in nodes)
    assert_equal(sorted(names), expected, because="each node that the root depends on is there once")
    position = {name: place for place, name in enumerate(names)}
    return [n.name for n in nodes if any(position[p.name] > position[n.name] for p in n.parents)]


@task("topo_order")
def test_a_node_without_parents_is_its_own_order(solution):
    root = solution.Node("a")
    assert_equal(_names(solution.topo_order(root)), ["a"])


@task("topo_order")
def test_a_chain_runs_from_the_oldest_node_to_the_root(solution):
    a = solution.Node("a")
    b = solution.Node("b", (a,))
    c = solution.Node("c", (b,))
    assert_equal(_names(solution.topo_order(c)), ["a", "b", "c"], because="c is made of b, and b of a")


@task("topo_order")
def test_nodes_that_the_root_does_not_depend_on_are_left_out(solution):
    a = solution.Node("a")
    b = solution.Node("b", (a,))
    solution.Node("c", (b, a))
    assert_equal(_names(solution.topo_order(b)), ["a", "b"])


@task("topo_order")
def test_a_diamond_has_its_tip_once(solution):
    a = solution.Node("a")
    b, c = solution.Node("b", (a,)), solution.Node("c", (a,))
    d = solution.Node("d", (b, c))
    order = solution.topo_order(d)
    early = _early(order, [a, b, c, d])
    assert_that(not early, f"{early} came before one of its parents", value=_names(order))


@task("topo_order")
def test_the_same_parent_twice_is_one_node(solution):
    a = solution.Node("a")
    b = solution.Node("b", (a, a))
    assert_equal(_names(solution.topo_order(b)), ["a", "b"], because="b = a * a has two parents and one node above it")


@task("topo_order")
@pytest.mark.parametrize("shortcut_first", [True, False], ids=["shortcut first", "shortcut last"])
def test_a_shortcut_does_not_overtake_the_long_way(solution, shortcut_first):
    a = solution.Node("a")
    b = solution.Node("b", (a,))
    c = solution.Node("c", (b,))
    d = solution.Node("d", (a, c) if shortcut_first else (c, a))
    e = solution.Node("e", (b, d) if shortcut_first else (d, b))
    assert_equal(_names(solution.topo_order(e)), ["a", "b", "c", "d", "e"], because="only one order is right here")


@task("topo_order")
def test_equal_names_are_different_nodes(solution):
    a, b = solution.Node("x"), solution.Node("x")
    root = solution.Node("root", (a, b))
    assert_equal(_names(solution.topo_order(root)), ["x", "x", "root"])


@task("topo_order")
def test_random_graphs(solution, spy, seed):
    rng = random.Random(seed)
    orders, wrong = [], 0
    for _ in range(20):
        nodes = []
        for i in range(rng.randint(2, 30)):
            parents = rng.choices(nodes, k=rng.randint(0, 3)) if nodes else []
            nodes.append(spy(f"n{i:02}", parents))
        root = nodes[-1]
        needed, todo = {root}, [root]
        while todo:
            new = set(todo.pop()._parents) - needed
            needed |= new
            todo += new
        order = solution.topo_order(root)
        wrong += bool(_early(order, needed))
        orders.append(_names(order))
    assert_that(not wrong, f"in {wrong} of 20 graphs a node came before one of its parents", value=orders)


@task("topo_order")
def test_nodes_are_left_as_they_were(solution):
    a = solution.Node("a")
    b, c = solution.Node("b", (a,)), solution.Node("c", (a,))
    solution.topo_order(b)
    because = "a mark on a node would still be there at the next call"
    assert_equal([sorted(vars(node)) for node in (a, b, c)], [["name", "parents"]] * 3, because=because)
    assert_that((a.parents, b.parents, c.parents) == ((), (a,), (a,)), "the parents are still those that were given")
    assert_equal(_names(solution.topo_order(c)), ["a", "c"], because=because)


@task("topo_order")
def test_fifty_thousand_nodes_in_a_row(solution, spy):
    node = spy(0)
    for i in range(1, 50_000):
        node = spy(i, (node,))
    try:
        order = solution.topo_order(node)
    except RecursionError:
        order = None
    assert_that(order is not None, "Python's stack ends long before this chain does", value="RecursionError")
    assert_that(_names(order) == list(range(50_000)), "a chain has only one order", value=len(order))


@task("topo_order")
def test_the_call_stack_does_not_grow_with_the_chain(solution, spy):
    depth = []

    class Deep(spy):
        @property
        def parents(self):
            frame, count = sys._getframe(), 0
            while frame is not None:
                frame, count = frame.f_back, count + 1
            depth.append(count)
            return ()

    here, frame = 0, sys._getframe()
    while frame is not None:
        frame, here = frame.f_back, here + 1
    node = Deep(0)
    for i in range(1, 400):
        node = spy(i, (node,))
    solution.topo_order(node)
    per_node = round((max(depth, default=here) - here) / 400)
    because = "the 400th node is reached through as many nested calls: a longer chain needs a larger stack"
    assert_that(per_node == 0, because, value=per_node)


@task("topo_order")
def test_nodes_that_many_paths_lead_to_are_entered_once(solution, spy):
    nodes = [spy("b")]
    for i in range(12):  # 4096 paths
        left, right = spy(f"l{i}", nodes[-1:]), spy(f"r{i}", nodes[-1:])
        nodes += [left, right, spy(f"b{i}", (left, right))]
    order = solution.topo_order(nodes[-1])
    reads = spy.reads
    early = _early(order, nodes)
    assert_that(not early, f"{early} came before one of its parents", value=_names(order))
    because = "the nodes are visited once per path that leads to them, and every diamond doubles the paths"
    assert_that(reads <= 4 * (37 + 48), because, value=reads)


@task("topo_order")
def test_no_node_is_searched_for_in_a_list(solution, spy):
    leaves = [spy(i) for i in range(300)]
    root = spy("root", leaves)
    solution.topo_order(root)
    because = "looking for a node in a list compares it with the others there, and that for every node"
    assert_that(spy.comparisons <= 4 * 601, because, value=spy.comparisons)


# ---------------------------------------------------------------------------------------------- Var

UNARY = {
    "a + 2": lambda a: a + 2,
    "2 + a": lambda a: 2 + a,
    "a - 0.5": lambda a: a - 0.5,
    "0.5 - a": lambda a: 0.5 - a,
    "a * 3": lambda a: a * 3,
    "3 * a": lambda a: 3 * a,
    "a / 4": lambda a: a / 4,
    "4 / a": lambda a: 4 / a,
    "-a": lambda a: -a,
    "a ** 3": lambda a: a**3,
    "a ** 1": lambda a: a**1,
    "a ** 0": lambda a: a**0,
    "a ** -2": lambda a: a**-2,
    "a.exp()": lambda a: a.exp(),
    "a.log()": lambda a: a.log(),
    "a.relu()": lambda a: (a - 1).relu(),
    "a.sum()": lambda a: a.sum(),
    "a.sum(0)": lambda a: a.sum(0),
    "a.sum(1)": lambda a: a.sum(1),
    "a.sum(-1)": lambda a: a.sum(-1),
    "a.sum(dim=-2, keepdim=True)": lambda a: a.sum(dim=-2, keepdim=True),
    "a.sum(2, keepdim=True)": lambda a: a.sum(2, keepdim=True),
    "a.sum(None, True)": lambda a: a.sum(None, True),
    "a.reshape(4, 6)": lambda a: a.reshape(4, 6),
    "a.reshape(-1, 3)": lambda a: a.reshape(-1, 3),
}

BINARY = {
    "a + b": operator.add,
    "a - b": operator.sub,
    "a * b": operator.mul,
    "a / b": operator.truediv,
}

PAIRS = [
    ((2, 3), (2, 3)),
    ((3, 1), (4,)),
    ((), (2, 3)),
    ((4, 1, 3), (2, 1)),
    ((1, 3), (3,)),
    ((0, 3), (1, 3)),
    ((1,), ()),
]

PRODUCTS = [
    ((3, 4), (4, 5)),
    ((4, 4), (4, 4)),
    ((2, 3, 4), (2, 4, 5)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (5, 4, 2)),
    ((3, 0), (0, 2)),
]


def _positive(randn, *shape, dtype=f64):
    """Values between 0.5 and about 4: safe to divide by and to take the logarithm of."""
    return randn(*shape, dtype=dtype).abs() + 0.5


def _torch_gradients(f, tensors):
    """The value of f and the gradients of its weighted sum, by torch; and the weights."""
    leaves = [leaf(x) for x in tensors]
    out = f(*leaves)
    weights = torch.linspace(0.5, 2.0, max(out.numel(), 1), dtype=out.dtype, device=out.device)[: out.numel()]
    weights = weights.reshape(out.shape)
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    return out.detach(), list(grads), weights


def _var_gradients(solution, f, tensors, weights):
    leaves = [solution.Var(x.clone()) for x in tensors]
    (f(*leaves) * solution.Var(weights)).sum().backward()
    return [var.grad for var in leaves]


@task("Var")
@pytest.mark.parametrize("name", UNARY)
def test_values_of_one_operand(solution, randn, name):
    x = _positive(randn, 2, 3, 4)
    expected = UNARY[name](x)
    assert_close(UNARY[name](solution.Var(x)).data, expected)


@task("Var")
@pytest.mark.parametrize("name", UNARY)
def test_gradients_of_one_operand(solution, randn, name):
    x = _positive(randn, 2, 3, 4)
    _, expected, weights = _torch_gradients(UNARY[name], [x])
    assert_close(_var_gradients(solution, UNARY[name], [x], weights), expected)


@task("Var")
@pytest.mark.parametrize("name", BINARY)
def test_values_of_two_operands(solution, randn, name):
    x, y = _positive(randn, 3, 1), _positive(randn, 2, 1, 4)
    expected = BINARY[name](x, y)
    assert_close(BINARY[name](solution.Var(x), solution.Var(y)).data, expected)


@task("Var")
@pytest.mark.parametrize("shapes", PAIRS, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_gradients_of_two_operands_have_their_shapes(solution, randn, name, shapes):
    tensors = [_positive(randn, *shape) for shape in shapes]
    _, expected, weights = _torch_gradients(BINARY[name], tensors)
    assert_close(_var_gradients(solution, BINARY[name], tensors, weights), expected)


@task("Var")
@pytest.mark.parametrize("shapes", PRODUCTS, ids=str)
def test_values_of_matrix_products(solution, randn, shapes):
    x, y = (randn(*shape, dtype=f64) for shape in shapes)
    expected = x @ y
    assert_close((solution.Var(x) @ solution.Var(y)).data, expected)


@task("Var")
@pytest.mark.parametrize("shapes", PRODUCTS, ids=str)
def test_gradients_of_matrix_products(solution, randn, shapes):
    tensors = [randn(*shape, dtype=f64) for shape in shapes]
    _, expected, weights = _torch_gradients(operator.matmul, tensors)
    assert_close(_var_gradients(solution, operator.matmul, tensors, weights), expected)


@task("Var")
@pytest.mark.parametrize("name", ["a + a", "a * a", "a / a", "a @ a"])
def test_a_var_that_is_used_twice_gets_both_contributions(solution, randn, name):
    f = {"a + a": operator.add, "a * a": operator.mul, "a / a": operator.truediv, "a @ a": operator.matmul}[name]
    x = _positive(randn, 3, 3)
    _, expected, weights = _torch_gradients(lambda a: f(a, a), [x])
    because = "one contribution arrives for each use"
    grads = _var_gradients(solution, lambda a: f(a, a), [x], weights)
    assert_close(grads, expected, because=because)


@task("Var")
@pytest.mark.parametrize("order", ["near first", "far first"])
def test_a_rule_waits_until_all_uses_have_contributed(solution, randn, order):
    def f(a):
        b = a * a
        far = ((b + 1) * 0.5).log()
        return b + far if order == "near first" else far + b

    x = randn(3, dtype=f64)
    _, expected, weights = _torch_gradients(f, [x])
    because = "b is used at two depths: its gradient is complete only when both uses have been handled"
    assert_close(_var_gradients(solution, f, [x], weights), expected, because=because)


@task("Var")
def test_relu_has_slope_zero_at_zero(solution, randn):
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=f64, device=randn(1).device)
    var = solution.Var(x.clone())
    out = var.relu()
    out.sum().backward()
    assert_close(out.data, torch.tensor([0.0, 0.0, 2.0], dtype=f64))
    assert_close(var.grad, torch.tensor([0.0, 0.0, 1.0], dtype=f64))


@task("Var")
@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_powers_at_zero(solution, randn, exponent):
    x = randn(3, dtype=f64) * 0
    expected = torch.full_like(x, 1.0 if exponent == 1 else 0.0)
    var = solution.Var(x.clone())
    (var**exponent).sum().backward()
    assert_close(var.grad, expected, because="the derivative of x ** n at 0 is a finite number for every n >= 0")


@task("Var")
def test_a_second_backward_through_the_same_graph_adds(solution, randn):
    x, y = randn(3, dtype=f64), randn(2, 3, dtype=f64)
    a, b = solution.Var(x.clone()), solution.Var(y.clone())
    s, t = leaf(x), leaf(y)
    expected = torch.autograd.grad((s * t + s).exp().sum(), [s, t])
    out = (a * b + a).exp().sum()
    out.backward()
    out.backward()
    assert_close([a.grad, b.grad], [2 * grad for grad in expected], because="two passes give twice the gradient")


@task("Var")
def test_gradients_of_two_graphs_add_up(solution, randn):
    x = randn(2, 3, dtype=f64)
    a = solution.Var(x.clone())
    (a * a).sum().backward()
    a.exp().sum().backward()
    assert_close(a.grad, 2 * x + x.exp(), because="the second graph adds to what the first one left")


@task("Var")
def test_each_leaf_has_a_gradient_of_its_own(solution, randn):
    a, b = solution.Var(randn(2, 3)), solution.Var(randn(2, 3))
    (a + b).sum().backward()
    assert_that(not same_storage(a.grad, b.grad), "two leaves share the memory of their gradients")
    a.grad.zero_()
    assert_close(b.grad, torch.ones(2, 3), because="clearing the gradient of a changes nothing for b")


@task("Var")
def test_a_gradient_that_is_cleared_in_place_fills_up_again(solution, randn):
    x = randn(2, 3, dtype=f64)
    a, b = solution.Var(x.clone()), solution.Var(x.clone())
    out = (a + b).sum()
    for _ in range(3):
        out.backward()
        a.grad.zero_()
    out.backward()
    assert_close(a.grad, torch.ones(2, 3, dtype=f64))
    assert_close(b.grad, torch.full((2, 3), 4.0, dtype=f64))


@task("Var")
def test_a_leaf_without_influence_keeps_its_gradient(solution, randn):
    x = randn(2)
    a, b, c = (solution.Var(x.clone()) for _ in range(3))
    c.sum().backward()
    a.sum().backward()
    assert_that(b.grad is None, "no backward pass reached b", value=b.grad)
    assert_close(c.grad, torch.ones(2), because="the second pass did not reach c")


@task("Var")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_backward_from_a_leaf_with_one_number(solution, randn, shape):
    a = solution.Var(randn(*shape))
    a.backward()
    assert_close(a.grad, torch.ones(shape), because="a number changes by 1 with itself")


@task("Var")
@pytest.mark.parametrize("shape", [(2, 3), (2,), (0,)], ids=str)
def test_backward_from_more_or_less_than_one_number_is_refused(solution, randn, shape):
    a = solution.Var(randn(*shape))
    assert_raises(ValueError, (a * 2).backward, mentions=[str(shape)])


@task("Var")
@pytest.mark.parametrize("name", BINARY)
def test_operands_that_do_not_broadcast_are_refused(solution, randn, name):
    a, b = solution.Var(randn(2, 3)), solution.Var(randn(4))
    assert_raises(ValueError, BINARY[name], a, b, mentions=["(2, 3)", "(4,)"])
    c = solution.Var(randn(3, 2))
    assert_raises(ValueError, BINARY[name], c, a, mentions=["(3, 2)", "(2, 3)"])


@task("Var")
@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((3,), (3, 2)), ((2, 3), (3,)), ((2, 3, 4), (5, 4, 2))], ids=str)
def test_matrices_that_do_not_fit_are_refused(solution, randn, shapes):
    a, b = (solution.Var(randn(*shape)) for shape in shapes)
    assert_raises(ValueError, operator.matmul, a, b, mentions=[str(shape) for shape in shapes])


@task("Var")
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_the_dtype_is_that_of_the_data(solution, randn, kind):
    x = _positive(randn, 2, 3, dtype=kind)

    def f(a):
        return ((2 - a) * 0.1 + 1 / a) ** 2 / 3.5

    value, expected, weights = _torch_gradients(f, [x])
    assert_close(f(solution.Var(x)).data, value)
    assert_close(_var_gradients(solution, f, [x], weights), expected)


@task("Var")
def test_no_tensor_requires_grad(solution, randn):
    a, b = solution.Var(randn(2, 3)), solution.Var(randn(3, 4))
    c = (a @ b).relu()
    d = (c * c).sum()
    d.backward()
    flags = [t.requires_grad for t in (a.data, b.data, c.data, d.data, a.grad, b.grad)]
    assert_equal(flags, [False] * 6, because="the engine is yours, not torch's")


@task("Var")
def test_operands_are_left_alone(solution, randn):
    x, y = _positive(randn, 2, 3), _positive(randn, 3)
    with unchanged(x, y):
        a, b = solution.Var(x), solution.Var(y)
        c = (a / b + b).log().relu()
        ((a - c) ** 2 * 0.5).sum().backward()
        (c.reshape(-1).exp().sum()).backward()


@task("Var")
def test_a_value_in_the_middle_is_not_changed_by_backward(solution, randn):
    x = randn(2, 3, dtype=f64)
    a = solution.Var(x.clone())
    b = a + 1
    c = b.exp()
    (c * b).sum().backward()
    assert_close([b.data, c.data], [x + 1, (x + 1).exp()])


@task("Var")
def test_graphs_may_be_thousands_of_operations_deep(solution, randn):
    a = solution.Var(randn(2, dtype=f64))
    b = a
    for _ in range(1500):
        b = b + a
    try:
        b.sum().backward()
        grad = a.grad
    except RecursionError:
        grad = None
    assert_that(grad is not None, "Python's stack ends before this graph does", value="RecursionError")
    assert_close(grad, torch.full((2,), 1501.0, dtype=f64))


@task("Var")
def test_each_rule_runs_once_however_many_paths_there_are(solution, randn):
    a = solution.Var(randn(1, dtype=f64))
    b = a
    for _ in range(12):
        b = b + b
    because = "the work grows with the number of paths (4096 here), not with that of operations (12)"
    assert_cost(b.backward, max_calls=150, because=because)
    assert_close(a.grad, torch.full((1,), 4096.0, dtype=f64))


def _program(rng, leaves, weight):
    """A random expression: the same choices for tensors and for Vars, because only shapes decide."""
    pool = list(leaves)
    for _ in range(9):
        a, b = rng.choice(pool), rng.choice(pool)
        ndim = a.data.ndim
        steps = [
            lambda a, b: a + b,
            lambda a, b: a - b * 0.5,
            lambda a, b: a * b / (a * a + 1),
            lambda a, b: (a * a * -0.1).exp() + b,
            lambda a, b: (b**2 + 1).log() - a,
            lambda a, b: (a - 0.1).relu() + 2,
            lambda a, b: (a * a + 1) ** -1 * 3 - b,
            lambda a, b: 1 - a / 2,
        ]
        if ndim:
            dim, keepdim = rng.randrange(-ndim, ndim), rng.random() < 0.5
            steps += [lambda a, b: a.sum(dim, keepdim) * 0.5] * 2  # noqa: B023 - used in this round only
            steps += [lambda a, b: a.reshape(-1)]
        if ndim >= 2 and a.data.shape[-1] == weight.data.shape[0]:
            steps += [lambda a, b: a @ weight] * 3
        try:
            pool.append(rng.choice(steps)(a, b))
        except (RuntimeError, ValueError):  # shapes that do not broadcast: the same for both
            pool.append(a * 0.5)
    total = pool[-1].sum()
    for value in pool[-4:-1]:
        total = total + value.sum()
    return total


@task("Var")
@pytest.mark.parametrize("round_number", range(6))
def test_random_expressions(solution, randn, seed, round_number):
    tensors = [randn(*shape, dtype=f64) for shape in [(), (4,), (3, 1), (2, 3, 4), (4, 4)]]
    leaves = [leaf(x) for x in tensors]
    total = _program(random.Random(seed), leaves, leaves[-1])
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    mine = [solution.Var(x.clone()) for x in tensors]
    out = _program(random.Random(seed), mine, mine[-1])
    out.backward()
    size = max(1.0, *(g.abs().max().item() for g in grads))
    assert_close(out.data, total.detach(), rtol=1e-9)
    got = [torch.zeros_like(x) if var.grad is None else var.grad for var, x in zip(mine, tensors, strict=True)]
    assert_close(got, list(grads), rtol=1e-9, atol=1e-10 * size)


@cost_case("Var")
def var_cost(module, randn):
    x, w, b = randn(8, 16), randn(16, 4), randn(4)

    def run():
        out = ((module.Var(x) @ module.Var(w) + module.Var(b)).relu() ** 2).sum()
        out.backward()

    return run


# --------------------------------------------------------------------------------------------- silu


def _silu_value_and_gradients(f, x, grad):
    """Value, gradient, and the gradient of the gradient's square."""
    x = leaf(x)
    y = f(x)
    (g,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    return y.detach(), g.detach(), h


@task("silu")
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (1,)], ids=str)
def test_silu_has_the_values_of_torch(solution, randn, dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    expected = F.silu(x)
    assert_close(solution.silu(x), expected)


@task("silu")
def test_silu_has_the_gradients_of_torch(solution, randn, dtype):
    x, grad = leaf(randn(3, 4, dtype=dtype, scale=3.0)), randn(3, 4, dtype=dtype)
    (expected,) = torch.autograd.grad(F.silu(x), x, grad)
    y = solution.silu(x)
    assert_that(y.requires_grad, "the result is connected to its input")
    atol = 4e-2 if dtype == torch.bfloat16 else None
    assert_close(torch.autograd.grad(y, x, grad)[0], expected, atol=atol)


@task("silu")
def test_the_function_itself_can_be_applied(solution, randn):
    x, grad = leaf(randn(3, 4, dtype=f64)), randn(3, 4, dtype=f64)
    (expected,) = torch.autograd.grad(F.silu(x), x, grad)
    function = solution.SiLUFunction
    assert_that(issubclass(function, torch.autograd.Function), "SiLUFunction is a torch.autograd.Function")
    y = function.apply(x)
    assert_close(y.detach(), F.silu(x.detach()))
    assert_close(torch.autograd.grad(y, x, grad)[0], expected)


@task("silu")
def test_silu_is_differentiated_by_a_function_of_your_own(solution, randn):
    y = solution.silu(leaf(randn(3)))
    own = isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
    assert_that(own, "silu(x) applies SiLUFunction", value=type(y.grad_fn).__name__)


@task("silu")
def test_the_gradient_agrees_with_finite_differences(solution, randn):
    assert_gradcheck(solution.silu, [randn(2, 3)])


@task("silu")
@pytest.mark.parametrize("value", [1e4, -1e4, 100.0, -100.0])
def test_huge_inputs_have_finite_values_and_gradients(solution, randn, value):
    x = leaf(randn(2).abs() + value)
    expected = F.silu(x.detach())
    y = solution.silu(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    slope = torch.full((2,), 1.0 if value > 0 else 0.0)
    assert_close([y, grad], [expected, slope], because="far out, silu is x on the right and 0 on the left")


@task("silu")
def test_inputs_with_other_strides(solution, randn):
    x, grad = noncontiguous(randn(3, 4)).T, randn(4, 3)
    z = x.clone().requires_grad_()
    expected = F.silu(z)
    (slope,) = torch.autograd.grad(expected, z, grad)
    x.requires_grad_()
    y = solution.silu(x)
    assert_close([y, torch.autograd.grad(y, x, grad)[0]], [expected.detach(), slope])


@task("silu")
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_with_other_strides(solution, randn, kind):
    x = leaf(randn(3, 4))
    grad = randn(1, 1).expand(3, 4) if kind == "expanded" else randn(4, 3).T
    (expected,) = torch.autograd.grad(F.silu(x), x, grad)
    assert_close(torch.autograd.grad(solution.silu(x), x, grad)[0], expected)


@task("silu")
def test_the_gradient_that_arrives_is_not_changed(solution, randn):
    x, grad = leaf(randn(3, 4)), randn(3, 4)
    y = solution.silu(x)
    with unchanged(grad):
        torch.autograd.grad(y, x, grad)


@task("silu")
def test_the_gradient_can_be_differentiated_again(solution, randn):
    x, grad = randn(3, 4, dtype=f64), randn(3, 4, dtype=f64)
    _, _, expected = _silu_value_and_gradients(F.silu, x, grad)
    x = leaf(x)
    (slope,) = torch.autograd.grad(solution.silu(x), x, grad, create_graph=True)
    assert_that(slope.requires_grad, "the gradient is connected to x, so that it has a gradient in turn")
    (again,) = torch.autograd.grad(slope.square().sum(), x)
    assert_close(again, expected, because="the second derivative")


@task("silu")
def test_the_second_gradient_reaches_the_gradient_that_arrives(solution, randn):
    x, grad = leaf(randn(3, 4, dtype=f64)), leaf(randn(3, 4, dtype=f64))
    (slope,) = torch.autograd.grad(F.silu(x), x, grad, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), grad)
    (mine,) = torch.autograd.grad(solution.silu(x), x, grad, create_graph=True)
    assert_that(mine.requires_grad, "the gradient is connected to grad_output")
    assert_close(torch.autograd.grad(mine.square().sum(), grad)[0], expected)


@task("silu")
def test_only_the_input_is_saved(solution, randn, seed):
    n = 1000 + seed % 17
    x = leaf(randn(n))
    _, cost = measure(solution.silu, x)
    because = f"for {n} floats the input takes {4 * n} bytes, and it is enough"
    assert_equal(cost.saved_bytes, 4 * n, because=because)


@task("silu")
def test_nothing_is_kept_where_no_gradient_is_wanted(solution, randn):
    y, cost = measure(solution.silu, randn(10))
    assert_equal((y.requires_grad, cost.saved_bytes), (False, 0))


@task("silu")
def test_a_write_to_the_input_before_backward_is_caught(solution, randn):
    x = leaf(randn(5)) * 1
    y = solution.silu(x)
    x.add_(1)
    because = "x is no longer what silu saw: a gradient computed from it would be silently wrong"
    assert_raises(RuntimeError, y.sum().backward, because=because)


@task("silu")
def test_no_gradient_is_computed_that_nobody_wants(solution, randn):
    x, grad = leaf(randn(5)), randn(5)
    context = solution.SiLUFunction.apply(x).grad_fn

    class Unwanted:
        needs_input_grad = (False,)

        def __getattr__(self, name):
            return getattr(context, name)

    result = solution.SiLUFunction.backward(Unwanted(), grad)
    result = result[0] if isinstance(result, tuple) else result
    assert_that(result is None, "ctx.needs_input_grad[0] is False: the answer is None", value=result)


@cost_case("silu")
def silu_cost(module, randn):
    x = leaf(randn(64, 16))
    return lambda: module.silu(x).sum().backward()


# -------------------------------------------------------------------------------------- saved_bytes

SAVES = {  # how many times the bytes of x are kept
    "relu": (torch.relu, 1),
    "exp": (torch.exp, 1),
    "gelu": (F.gelu, 1),
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), 2),
    "x + 1": (lambda x: x + 1, 0),
    "exp(relu(x + 1))": (lambda x: torch.exp(torch.relu(x + 1)), 2),
    "tanh of tanh of tanh": (lambda x: torch.tanh(torch.tanh(torch.tanh(x))), 3),
}


@task("saved_bytes")
@pytest.mark.parametrize("name", SAVES)
def test_what_elementwise_functions_keep(solution, randn, seed, name):
    f, times = SAVES[name]
    n = 1000 + seed % 17
    x = leaf(randn(n))
    assert_equal(solution.saved_bytes(f, x), times * 4 * n)


@task("saved_bytes")
def test_double_precision_takes_twice_the_bytes(solution, randn):
    assert_equal(solution.saved_bytes(torch.exp, leaf(randn(3, 5, dtype=f64))), 8 * 15)


@task("saved_bytes")
def test_a_tensor_that_is_saved_twice_counts_once(solution, randn):
    x = leaf(randn(7, 3))
    because = "x * x keeps x for both factors, but there is only one x in memory"
    assert_equal(solution.saved_bytes(lambda x: x * x, x), 4 * 21, because=because)


@task("saved_bytes")
def test_tensors_of_equal_values_are_still_two(solution, randn):
    x = leaf(randn(7, 3))
    y = leaf(x)
    assert_equal(solution.saved_bytes(torch.mul, x, y), 2 * 4 * 21)


@task("saved_bytes")
def test_two_views_of_one_storage_count_once(solution, randn):
    x = leaf(randn(20))
    because = "both halves are kept, twice each, and they live in one storage"
    assert_equal(solution.saved_bytes(lambda x: x[:10] * x[10:] + x[10:] * x[:10], x), 4 * 20, because=because)


@task("saved_bytes")
def test_a_slice_keeps_its_whole_storage(solution, randn):
    x = leaf(randn(1000))
    because = "a slice of 10 keeps all 1000 floats from being freed"
    assert_equal(solution.saved_bytes(lambda x: x[:10] * x[5:15], x), 4 * 1000, because=because)


@task("saved_bytes")
def test_an_expanded_tensor_is_as_small_as_its_storage(solution, randn):
    x = leaf(randn(10))
    because = "expand repeats a view, not the memory"
    assert_equal(solution.saved_bytes(lambda x: x.expand(50, 10) * x.expand(50, 10), x), 4 * 10, because=because)


@task("saved_bytes")
def test_parameters_count(solution, randn, device):
    layer = torch.nn.Linear(6, 3).to(device)
    x = leaf(randn(5, 6))
    because = "the weight is needed for the gradient of x, and x for that of the weight"
    assert_equal(solution.saved_bytes(layer, x), 4 * (5 * 6 + 6 * 3), because=because)


@task("saved_bytes")
def test_what_needs_no_gradient_is_not_kept(solution, randn):
    x, y = randn(7), randn(7)
    assert_equal(solution.saved_bytes(lambda x, y: (x * y).exp(), x, y), 0, because="nothing requires grad")
    with torch.no_grad():
        assert_equal(solution.saved_bytes(torch.exp, leaf(x)), 0, because="under no_grad nothing is recorded")


@task("saved_bytes")
def test_f_is_called_once_with_its_arguments(solution, randn):
    seen = []
    x, y = leaf(randn(4)), randn(4)
    result = solution.saved_bytes(lambda *args: seen.append(args) or args[0] * args[1], x, y, 3)
    assert_equal(len(seen), 1, because="f may be slow, or random")
    assert_that(len(seen[0]) == 3 and seen[0][0] is x and seen[0][1] is y, "f gets the arguments as they are")
    assert_equal(result, 4 * 4, because="only y is needed for the gradient of x")


@task("saved_bytes")
def test_f_may_run_backward_itself(solution, randn):
    x = leaf(randn(9, dtype=f64))
    grads = []

    def f(x):
        (grad,) = torch.autograd.grad((x.exp() * x).sum(), x)
        grads.append(grad)
        return x.relu()

    expected = (x.exp() * (x + 1)).detach()
    assert_equal(solution.saved_bytes(f, x), 3 * 8 * 9, because="x, exp(x) and relu(x)")
    assert_close(grads[0], expected, because="the backward pass inside f gets what was saved")


@task("saved_bytes")
def test_arguments_keep_their_gradients(solution, randn):
    x, y = leaf(randn(4)), leaf(randn(4))
    x.grad = randn(4)
    with unchanged(x, y):
        solution.saved_bytes(torch.mul, x, y)


@task("saved_bytes")
def test_nothing_is_alive_after_the_call(solution, randn):
    made = []

    def f(x):
        y = torch.exp(x)  # exp keeps its own result
        made.append(weakref.ref(y))
        return y

    enabled = gc.isenabled()
    gc.disable()
    try:
        solution.saved_bytes(f, leaf(randn(4)))
        alive = made[0]() is not None
    finally:
        if enabled:
            gc.enable()
    because = "the graph holds its own result in a circle, and only the garbage collector would find it"
    assert_that(not alive, because, value=alive)


@task("saved_bytes")
def test_recording_ends_with_the_call(solution, randn):
    x = leaf(randn(4))
    solution.saved_bytes(torch.exp, x)
    y = torch.exp(x)
    assert_that(same_storage(y.grad_fn._saved_result, y), "operations after the call are saved as always")
    assert_equal(solution.saved_bytes(torch.exp, x), 16, because="each call counts from zero")


# ------------------------------------------------------------------------------- intermediate_grads


def _chain(fns, x):
    """The same by a graph of its own: the gradients at all outputs."""
    h, outputs = leaf(x), []
    for fn in fns:
        h = fn(h)
        outputs.append(h)
    return list(torch.autograd.grad(h, outputs, allow_unused=True, materialize_grads=True))


@task("intermediate_grads")
def test_one_gradient_per_function(solution, randn):
    w = randn(4, 3, dtype=f64)
    fns = [lambda h: h @ w, torch.tanh, lambda h: h.square().sum(0), lambda h: h.exp().sum()]
    x = randn(5, 4, dtype=f64)
    expected = _chain(fns, x)
    assert_close(solution.intermediate_grads(fns, x), expected)


@task("intermediate_grads")
def test_a_single_function_has_gradient_one(solution, randn):
    assert_close(solution.intermediate_grads([torch.sum], randn(3)), [torch.tensor(1.0)])


@task("intermediate_grads")
def test_no_functions_give_no_gradients(solution, randn):
    assert_equal(solution.intermediate_grads([], randn(3)), [])


@task("intermediate_grads")
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_the_end_may_have_dimensions_if_it_is_one_number(solution, randn, shape):
    fns = [torch.exp, lambda h: h.sum().reshape(shape)]
    x = randn(3)
    expected = [torch.ones(3), torch.ones(shape)]
    assert_close(solution.intermediate_grads(fns, x), expected)


@task("intermediate_grads")
def test_one_function_several_times(solution, randn):
    fns = [torch.tanh, torch.tanh, torch.tanh, torch.sum]
    x = randn(3, dtype=f64)
    expected = _chain(fns, x)
    assert_close(solution.intermediate_grads(fns, x), expected)


@task("intermediate_grads")
def test_a_function_that_returns_what_it_got(solution, randn):
    fns = [torch.exp, lambda h: h, lambda h: h.square().sum()]
    x = randn(3, dtype=f64)
    expected = [2 * x.exp(), 2 * x.exp(), torch.tensor(1.0, dtype=f64)]
    assert_close(solution.intermediate_grads(fns, x), expected)


@task("intermediate_grads")
def test_an_output_that_is_ignored_has_gradient_zero(solution, randn):
    w = leaf(randn(4))
    fns = [torch.exp, lambda h: w * 3, torch.sum]
    expected = [torch.zeros(3), torch.ones(4), torch.tensor(1.0)]
    because = "the second function does not look at the first one's output"
    assert_close(solution.intermediate_grads(fns, randn(3)), expected, because=because)


@task("intermediate_grads")
def test_each_function_is_called_once(solution, randn):
    calls = []
    fns = [lambda h: calls.append("first") or h.exp(), lambda h: calls.append("second") or h.sum()]
    solution.intermediate_grads(fns, randn(3))
    assert_equal(calls, ["first", "second"])


@task("intermediate_grads")
def test_no_grad_attribute_changes(solution, randn):
    x, w = leaf(randn(3)), leaf(randn(3))
    x.grad = randn(3)
    with unchanged(x, w):
        solution.intermediate_grads([lambda h: h * w, torch.exp, torch.sum], x)


@task("intermediate_grads")
def test_x_does_not_become_a_part_of_the_graph(solution, randn):
    x = randn(3)
    with unchanged(x):
        solution.intermediate_grads([torch.exp, torch.sum], x)


@task("intermediate_grads")
def test_x_may_be_the_result_of_a_computation(solution, randn):
    a = leaf(randn(3, dtype=f64))
    x = a * 2
    fns = [torch.sin, torch.sum]
    expected = [torch.ones(3, dtype=f64), torch.tensor(1.0, dtype=f64)]
    assert_close(solution.intermediate_grads(fns, x), expected)
    assert_that(a.grad is None, "the graph behind x is not part of the question", value=a.grad)
    (grad,) = torch.autograd.grad(x.sum(), a)
    assert_close(grad, torch.full((3,), 2.0, dtype=f64), because="the graph behind x still works")


@task("intermediate_grads")
def test_no_hooks_are_left_behind(solution, randn):
    outputs = []

    def keep(fn):
        return lambda h: outputs.append(fn(h)) or outputs[-1]

    fns = [keep(lambda h: h + 1), keep(lambda h: h * 2), keep(torch.sum)]
    grads = solution.intermediate_grads(fns, randn(3))
    expected = [grad.clone() for grad in grads]
    assert_that(all(not h._backward_hooks for h in outputs), "hooks are still registered on the outputs")
    torch.autograd.grad((outputs[0] * 5).sum(), outputs[0])
    assert_close(grads, expected, because="a later backward pass must not change what was returned")


@task("intermediate_grads")
@pytest.mark.parametrize("shape", [(3,), (2, 1), (0,)], ids=str)
def test_an_end_of_several_numbers_is_refused(solution, randn, shape):
    fns = [torch.exp, torch.tanh]
    assert_raises(ValueError, solution.intermediate_grads, fns, randn(*shape), mentions=[str(shape)])


# --------------------------------------------------------------------------------------- checkpoint


def _generators(device):
    return [device] if device.type == "cuda" else []


def _with_gradients(f, tensors, seed, device):
    """Value and gradients of f on fresh leaves; random numbers are drawn from `seed` on, and some in between."""
    leaves = [leaf(x) for x in tensors]
    with torch.random.fork_rng(devices=_generators(device)):
        torch.manual_seed(seed)
        y = f(*leaves)
        torch.rand(7, device=device)
        y.backward(torch.linspace(1.0, 2.0, y.numel(), dtype=y.dtype, device=device).reshape(y.shape))
    return [y.detach(), *(x.grad for x in leaves)]


@task("checkpoint")
def test_checkpoint_has_values_and_gradients_of_f(solution, randn):
    def f(x, y):
        return torch.tanh(x @ y).exp() * y.sum()

    inputs = [randn(3, 4, dtype=f64), randn(4, 2, dtype=f64)]
    assert_gradients_close(lambda *xs: solution.checkpoint(f, *xs), f, inputs)


@task("checkpoint")
def test_the_gradient_that_arrives_is_passed_on(solution, randn, seed, device):
    tensors = [randn(3, 4, dtype=f64), randn(4, dtype=f64)]
    expected = _with_gradients(lambda x, y: (x * y).exp(), tensors, seed, device)
    result = _with_gradients(lambda x, y: solution.checkpoint(lambda a, b: (a * b).exp(), x, y), tensors, seed, device)
    assert_close(result, expected)


@task("checkpoint")
def test_parameters_inside_f_get_their_gradients(solution, randn):
    x, w = leaf(randn(3, 4, dtype=f64)), leaf(randn(4, 2, dtype=f64))
    expected = torch.autograd.grad(torch.tanh(x @ w).sum(), [x, w])
    y = solution.checkpoint(lambda x: torch.tanh(x @ w), x)
    y.sum().backward()
    assert_close([x.grad, w.grad], list(expected))


@task("checkpoint")
def test_dropout_repeats_its_mask(solution, randn, seed, device):
    def f(x):
        return F.dropout(torch.sin(x), 0.5)

    tensors = [randn(64, dtype=f64)]
    expected = _with_gradients(f, tensors, seed, device)
    result = _with_gradients(lambda x: solution.checkpoint(f, x), tensors, seed, device)
    because = "an element that was dropped has gradient 0, and one that was kept has not"
    assert_close(result, expected, because=because)


@task("checkpoint")
def test_backward_leaves_the_random_generators_alone(solution, randn, seed, device):
    with torch.random.fork_rng(devices=_generators(device)):
        torch.manual_seed(seed)
        y = solution.checkpoint(lambda x: F.dropout(x, 0.5), leaf(randn(8)))
        before = torch.rand(3, device=device)
        with global_rng_untouched():
            y.sum().backward()
        after = torch.rand(3, device=device)
        torch.manual_seed(seed)
        F.dropout(randn(8), 0.5)
        expected = torch.rand(3, device=device), torch.rand(3, device=device)
    because = "whoever draws numbers next gets those that would have come without the backward pass"
    assert_close((before, after), expected, because=because)


@task("checkpoint")
def test_a_long_chain_keeps_no_more_than_its_input(solution, randn):
    n = 20_000

    def f(x):
        for _ in range(10):
            x = torch.tanh(x)
        return x

    x = leaf(randn(n))
    because = f"ten tanh in a row keep {10 * 4 * n} bytes; the input alone is {4 * n}"
    assert_cost(solution.checkpoint, f, x, max_saved_bytes=4 * n + 16_000, because=because)


@task("checkpoint")
def test_the_price_is_one_more_forward_pass(solution, randn):
    x, w = leaf(randn(8, 6)), randn(6, 6)

    def f(x):
        return torch.tanh(torch.tanh(x @ w) @ w)

    forward = 2 * (2 * 8 * 6 * 6)
    assert_cost(
        lambda: solution.checkpoint(f, x).sum().backward(),
        flops=3 * forward,
        because="forward, forward again, backward",
    )


@task("checkpoint")
def test_f_runs_once_forward_and_once_more_backward(solution, randn):
    calls = []

    def f(x):
        calls.append(torch.is_grad_enabled())
        return x.exp()

    y = solution.checkpoint(f, leaf(randn(3)))
    assert_equal(len(calls), 1, because="the forward pass runs f once")
    y.sum().backward()
    assert_equal(len(calls), 2, because="the backward pass runs it once more")


@task("checkpoint")
def test_under_no_grad_it_is_f(solution, randn):
    calls = []
    x = leaf(randn(3))
    expected = x.detach().exp()
    with torch.no_grad():
        y = solution.checkpoint(lambda x: calls.append(1) or x.exp(), x)
    assert_close(y, expected)
    assert_equal((y.requires_grad, len(calls)), (False, 1))


@task("checkpoint")
def test_inputs_without_gradients(solution, randn, randint):
    table, index, scale = leaf(randn(5, 3, dtype=f64)), randint(0, 5, (7,)), randn(3, dtype=f64)

    def f(table, index, scale):
        return (table[index] * scale).exp()

    (expected,) = torch.autograd.grad(f(table, index, scale).sum(), table)
    y = solution.checkpoint(f, table, index, scale)
    y.sum().backward()
    assert_close(table.grad, expected)
    assert_that(scale.grad is None and not scale.requires_grad, "scale asked for no gradient", value=scale.grad)


@task("checkpoint")
def test_only_the_gradients_that_were_asked_for_change(solution, randn):
    x, y = leaf(randn(3)), leaf(randn(3))
    out = solution.checkpoint(lambda x, y: (x * y).exp(), x, y).sum()
    with unchanged(x, y):
        torch.autograd.grad(out, [x, y])


@task("checkpoint")
def test_gradients_add_up_over_two_passes(solution, randn):
    x = leaf(randn(3, dtype=f64))
    expected = 2 * x.detach().exp()
    for _ in range(2):
        solution.checkpoint(torch.exp, x).sum().backward()
    assert_close(x.grad, expected)


@task("checkpoint")
def test_the_graph_before_and_after_goes_on(solution, randn):
    x = leaf(randn(3, dtype=f64))
    (expected,) = torch.autograd.grad((torch.sin(x * 2) ** 2).exp().sum(), x)
    y = solution.checkpoint(lambda h: torch.sin(h) ** 2, x * 2).exp().sum()
    y.backward()
    assert_close(x.grad, expected)


@task("checkpoint")
def test_a_write_to_an_input_is_caught(solution, randn):
    x = leaf(randn(5)) * 1
    y = solution.checkpoint(torch.sin, x)
    x.add_(1)
    because = "f would run on other numbers than before, and the gradient would be silently wrong"
    assert_raises(RuntimeError, y.sum().backward, because=because)


@task("checkpoint")
def test_checkpoints_inside_checkpoints(solution, randn, seed, device):
    def inner(x):
        return F.dropout(torch.tanh(x), 0.5)

    def plain(x):
        return inner(inner(x) * 2).exp()

    def nested(x):
        return solution.checkpoint(inner, solution.checkpoint(inner, x) * 2).exp()

    tensors = [randn(32, dtype=f64)]
    expected = _with_gradients(plain, tensors, seed, device)
    result = _with_gradients(lambda x: solution.checkpoint(nested, x), tensors, seed, device)
    assert_close(result, expected)


@cost_case("checkpoint")
def checkpoint_cost(module, randn):
    x, w = leaf(randn(32, 16)), randn(16, 16)

    def f(x):
        for _ in range(4):
            x = torch.tanh(x @ w)
        return x

    return lambda: module.checkpoint(f, x).sum().backward()
