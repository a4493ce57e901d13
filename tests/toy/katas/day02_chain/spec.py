from checker.testing import assert_close, task


@task("twice")
def test_the_factor_is_squared(solution, randn):
    x = randn(3)
    assert_close(solution.twice(x, 3.0), x * 9.0)


@task("twice")
def test_a_negative_factor_cancels(solution, randn):
    x = randn(2, 3)
    assert_close(solution.twice(x, -2.0), 4 * x)
