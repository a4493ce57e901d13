import torch

from checker.testing import assert_close, assert_cost, cost_case, task


@task("scale")
def test_every_element_is_multiplied(solution, randn, dtype):
    x = randn(2, 3, dtype=dtype)
    expected = torch.from_numpy(x.cpu().numpy() * 3)
    assert_close(solution.scale(x, 3), expected, because="scale(x, 3) is 3 * x")


@task("scale")
def test_the_factor_is_two_unless_said_otherwise(solution, randn):
    x = randn(4)
    assert_close(solution.scale(x), x + x)


@task("weights")
def test_they_are_those_of_softmax(solution, randn):
    x = randn(7)
    assert_close(solution.weights(x), torch.softmax(x, 0))


@task("weights")
def test_they_stay_finite_for_large_values(solution, randn):
    x = randn(5) + 1000
    assert_close(solution.weights(x), torch.softmax(x, 0), because="exp(1000) does not fit into a float")


@task("halve")
def test_it_is_half(solution, randn):
    x = randn(64)
    assert_close(assert_cost(solution.halve, x, max_new_bytes=256), x / 2)


@cost_case("scale")
def scale_cost(module, randn):
    x = randn(64, 64)
    return lambda: module.scale(x, 3.0)
