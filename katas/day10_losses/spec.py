import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from checker.testing import (
    assert_close,
    assert_cost,
    assert_gradcheck,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    measure,
    noncontiguous,
    task,
)

WIDE = torch.float64


def grad_of(fn, *inputs):
    """Gradients of fn's summed result with respect to copies of the float inputs."""
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(fn(*copies).sum(), copies)


# mse_loss


@task("mse_loss")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_squares_are_reduced_as_asked(solution, randn, reduction):
    pred, target = randn(3, 5), randn(3, 5)
    assert_close(solution.mse_loss(pred, target, reduction=reduction), F.mse_loss(pred, target, reduction=reduction))


@task("mse_loss")
def test_the_mean_is_the_default(solution, randn):
    pred, target = randn(4, 3, dtype=WIDE), randn(4, 3, dtype=WIDE)
    assert_close(solution.mse_loss(pred, target), F.mse_loss(pred, target), rtol=1e-10)


@task("mse_loss")
def test_shapes_that_would_broadcast_are_refused(solution, randn):
    for a, b in [((4, 1), (4,)), ((3, 2), (2,)), ((5,), (1,))]:
        assert_raises(ValueError, solution.mse_loss, randn(*a), randn(*b), mentions=[str(a), str(b)])


@task("mse_loss")
def test_an_unknown_reduction_of_squares_is_refused(solution, randn):
    assert_raises(ValueError, solution.mse_loss, randn(3), randn(3), reduction="average")


@task("mse_loss")
def test_the_gradient_goes_to_both_sides(solution, randn):
    assert_gradients_close(
        solution.mse_loss, lambda a, b: ((a - b) ** 2).mean(), [randn(3, 4, dtype=WIDE), randn(3, 4, dtype=WIDE)]
    )


@task("mse_loss")
def test_squares_of_half_precision_are_taken_in_float32(solution, rand, device):
    pred = torch.zeros(400, dtype=torch.float16, device=device)
    target = pred.clone()
    target[0] = 300 + 20 * rand(1).item()
    expected = ((target.double() ** 2).sum() / 400).half()
    assert_close(solution.mse_loss(pred, target), expected, because="300^2 does not fit into float16; the mean does")
    assert_close(solution.mse_loss(target, pred), expected, because="300^2 does not fit into float16; the mean does")


# log_softmax


@task("log_softmax")
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_log_softmax_along_each_axis(solution, randn, dim):
    x = randn(3, 4, 5, scale=3.0)
    expected = torch.log_softmax(x.double(), dim).float()
    assert_close(solution.log_softmax(x, dim=dim), expected, rtol=1e-5, atol=2e-6)


@task("log_softmax")
def test_the_last_axis_is_the_default(solution, randn):
    x = randn(4, 3, 5, dtype=WIDE)
    assert_close(solution.log_softmax(x), torch.log_softmax(x, -1), rtol=1e-10)


@task("log_softmax")
def test_logits_of_ten_thousand(solution, randn):
    x = randn(6, 7, dtype=WIDE, scale=1e4)
    expected = torch.log_softmax(x, -1)
    assert_close(solution.log_softmax(x), expected, because="logits of size 1e4 have exact log-probabilities")


@task("log_softmax")
def test_each_row_has_its_own_size(solution, randn):
    x = randn(4, 5) + torch.tensor([-1e4, -300.0, 300.0, 1e4], device=randn(1).device)[:, None]
    expected = torch.log_softmax(x.double(), -1).float()
    assert_close(solution.log_softmax(x), expected, atol=3e-3, because="rows are shifted one by one")


@task("log_softmax")
def test_a_masked_class_gets_minus_infinity(solution, randn):
    x = randn(3, 5)
    x[0, 1] = x[2, 4] = -math.inf
    assert_close(solution.log_softmax(x), torch.log_softmax(x, -1))


@task("log_softmax")
def test_gradient_of_log_softmax(solution, randn):
    assert_gradients_close(
        solution.log_softmax, lambda x: torch.log_softmax(x, -1), [randn(4, 5, dtype=WIDE, scale=3.0)]
    )


@task("log_softmax")
def test_gradient_rows_sum_to_zero_for_huge_logits(solution, randn):
    x = randn(4, 6, dtype=WIDE, scale=1e4).requires_grad_()
    weights = randn(4, 6, dtype=WIDE)
    (grad,) = torch.autograd.grad((solution.log_softmax(x) * weights).sum(), [x])
    assert_close(grad.sum(-1), torch.zeros(4, dtype=WIDE), atol=1e-10, because="a shift of a row changes nothing")


@task("log_softmax")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_log_softmax_of_half_precision_sums_in_float32(solution, randn, kind):
    x = randn(3, 3000, scale=0.5).to(kind)
    expected = torch.log_softmax(x.double(), -1).to(kind)
    eps = torch.finfo(kind).eps
    assert_close(solution.log_softmax(x), expected, rtol=1.01 * eps, atol=0.0)


# cross_entropy


def torch_ce(logits, target, **options):
    """torch's own, with the classes moved to where it wants them."""
    if logits.dim() > 2:
        logits = logits.movedim(-1, 1)
    return F.cross_entropy(logits, target, **options)


def some(randn, randint, *shape, V=7, ignored=None, dtype=WIDE):
    logits = randn(*shape, V, dtype=dtype, scale=2.0)
    target = randint(0, V, shape)
    if ignored is not None:
        target.view(-1)[::3] = ignored
        target.view(-1)[1] = 4
    return logits, target


@task("cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_rows(solution, randn, randint, reduction):
    logits, target = some(randn, randint, 6)
    expected = torch_ce(logits, target, reduction=reduction)
    assert_close(solution.cross_entropy(logits, target, reduction=reduction), expected, rtol=1e-10)


@task("cross_entropy")
@pytest.mark.parametrize("shape", [(), (3, 4), (2, 3, 5)])
def test_classes_are_the_last_axis(solution, randn, randint, shape):
    logits, target = some(randn, randint, *shape)
    expected = torch_ce(logits, target)
    assert_close(solution.cross_entropy(logits, target), expected, rtol=1e-10, because="logits are (..., V)")


@task("cross_entropy")
def test_classes_are_last_where_the_axes_have_the_same_length(solution, randn, randint):
    logits, target = some(randn, randint, 5, 5, V=5)
    expected = torch_ce(logits, target, reduction="none")
    assert_close(solution.cross_entropy(logits, target, reduction="none"), expected, rtol=1e-10)


@task("cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_targets_do_not_count(solution, randn, randint, reduction):
    logits, target = some(randn, randint, 3, 4, ignored=-100)
    expected = torch_ce(logits, target, reduction=reduction)
    assert_close(
        solution.cross_entropy(logits, target, reduction=reduction),
        expected,
        rtol=1e-10,
        because="the mean is over the kept targets, and an ignored one has loss 0",
    )


@task("cross_entropy")
@pytest.mark.parametrize("index", [2, -1, 0, 1000])
def test_any_number_may_mean_ignore(solution, randn, randint, index):
    logits, target = some(randn, randint, 9, ignored=index)
    expected = torch_ce(logits, target, ignore_index=index)
    assert_close(solution.cross_entropy(logits, target, ignore_index=index), expected, rtol=1e-10)


@task("cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_smoothing_spreads_over_all_classes(solution, randn, randint, reduction):
    logits, target = some(randn, randint, 2, 5, ignored=-100)
    options = {"label_smoothing": 0.3, "reduction": reduction}
    expected = torch_ce(logits, target, **options)
    assert_close(solution.cross_entropy(logits, target, **options), expected, rtol=1e-10)


@task("cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights(solution, randn, rand, randint, reduction):
    logits, target = some(randn, randint, 8, ignored=-100)
    weight = rand(7).double() + 0.5
    expected = torch_ce(logits, target, weight=weight, reduction=reduction)
    assert_close(
        solution.cross_entropy(logits, target, weight=weight, reduction=reduction),
        expected,
        rtol=1e-10,
        because="the mean divides by the sum of the weights of the kept targets",
    )


@task("cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_and_smoothing_together(solution, randn, rand, randint, reduction):
    logits, target = some(randn, randint, 2, 4, ignored=-100)
    options = {"weight": rand(7).double() + 0.5, "label_smoothing": 0.2, "reduction": reduction}
    expected = torch_ce(logits, target, **options)
    assert_close(solution.cross_entropy(logits, target, **options), expected, rtol=1e-10)


@task("cross_entropy")
def test_gradient_of_the_mean(solution, randn, rand, randint):
    logits, target = some(randn, randint, 3, 4, ignored=-100)
    options = {"weight": rand(7).double() + 0.5, "label_smoothing": 0.2}
    assert_gradients_close(
        lambda x: solution.cross_entropy(x, target, **options), lambda x: torch_ce(x, target, **options), [logits]
    )


@task("cross_entropy")
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_all_ignored_gives_zero_with_zero_gradient(solution, randn, device, eps):
    logits = randn(4, 5, dtype=WIDE).requires_grad_()
    target = torch.full((4,), -100, device=device)
    loss = solution.cross_entropy(logits, target, label_smoothing=eps)
    assert_close(loss, torch.zeros((), dtype=WIDE), because="a mean over nothing is 0 here, not NaN")
    assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(4, 5, dtype=WIDE))


@task("cross_entropy")
def test_an_empty_batch_has_loss_zero(solution, device):
    loss = solution.cross_entropy(torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.long, device=device))
    assert_close(loss, torch.zeros(()))


@task("cross_entropy")
def test_classes_of_weight_zero_alone_give_zero(solution, randn, device):
    logits, target = randn(3, 4), torch.tensor([1, 1, -100], device=device)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0], device=device)
    assert_close(solution.cross_entropy(logits, target, weight=weight), torch.zeros(()), because="the divisor is 0")


@task("cross_entropy")
def test_the_mean_is_zero_where_its_divisor_is_also_with_smoothing(solution, randn, device):
    logits, target = randn(3, 4).requires_grad_(), torch.tensor([1, 1, -100], device=device)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0], device=device)
    loss = solution.cross_entropy(logits, target, weight=weight, label_smoothing=0.2)
    assert_close(loss, torch.zeros(()), because="the divisor is 0")
    assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(3, 4), because="the divisor is 0")


@task("cross_entropy")
def test_a_single_class_is_certain(solution, randn, device):
    target = torch.tensor([0, -100, 0], device=device)
    assert_close(solution.cross_entropy(randn(3, 1), target, reduction="none"), torch.zeros(3))


@task("cross_entropy")
def test_a_small_total_weight_is_divided_by_all_the_same(solution, randn, randint):
    logits, target = some(randn, randint, 3)
    weight = torch.full((7,), 0.01, dtype=WIDE, device=logits.device)
    expected = torch_ce(logits, target)
    assert_close(solution.cross_entropy(logits, target, weight=weight), expected, rtol=1e-10)


@task("cross_entropy")
@pytest.mark.parametrize("bad", [7, 8, -1, -7, -99])
def test_a_target_outside_of_the_classes_raises_index_error(solution, randn, randint, bad):
    logits, target = some(randn, randint, 5, ignored=-100)
    target[2] = bad
    assert_raises(IndexError, solution.cross_entropy, logits, target)


@task("cross_entropy")
def test_minus_100_is_no_class_where_something_else_is_ignored(solution, randn, randint):
    logits, target = some(randn, randint, 5)
    target[3] = -100
    assert_raises(IndexError, solution.cross_entropy, logits, target, ignore_index=-1)


@task("cross_entropy")
def test_shapes_of_cross_entropy_are_checked(solution, randn, randint):
    for a, b in [((3, 4, 5), (3, 5)), ((4, 5), (5,)), ((4, 5), (4, 1)), ((2, 3), (1, 2))]:
        target = randint(0, 3, b)
        assert_raises(ValueError, solution.cross_entropy, randn(*a), target, mentions=[str(a), str(b)])


@task("cross_entropy")
def test_the_shape_of_the_weights_is_checked(solution, randn, randint):
    for shape in [(6,), (1,), (4, 5)]:
        assert_raises(
            ValueError,
            solution.cross_entropy,
            randn(4, 5),
            randint(0, 5, (4,)),
            weight=randn(*shape),
            mentions=[str(shape), "(4, 5)"],
        )


@task("cross_entropy")
def test_an_unknown_reduction_of_cross_entropy_is_refused(solution, randn, randint):
    assert_raises(ValueError, solution.cross_entropy, randn(3, 4), randint(0, 4, (3,)), reduction="batchmean")


@task("cross_entropy")
def test_cross_entropy_of_huge_logits(solution, randn, randint):
    logits, target = some(randn, randint, 6)
    logits = logits * 1e4
    expected = torch_ce(logits, target, reduction="none")
    assert_close(solution.cross_entropy(logits, target, reduction="none"), expected, because="the log is never of 0")


@task("cross_entropy")
def test_a_masked_class_has_no_influence(solution, randn, device):
    logits = randn(4, 5)
    logits[:, 2] = -math.inf
    target = torch.tensor([0, 1, 3, 4], device=device)
    assert_close(solution.cross_entropy(logits, target), F.cross_entropy(logits, target))


@task("cross_entropy")
def test_half_logits_are_summed_in_float32(solution, randn, randint):
    logits, target = some(randn, randint, 40, V=2000, dtype=torch.float32)
    logits = logits.to(torch.bfloat16)
    expected = F.cross_entropy(logits.double(), target).to(torch.bfloat16)
    assert_close(solution.cross_entropy(logits, target), expected, rtol=0.009)
    each = F.cross_entropy(logits.double(), target, reduction="none").to(torch.bfloat16)
    assert_close(solution.cross_entropy(logits, target, reduction="none"), each, rtol=0.009)


@task("cross_entropy")
def test_half_weights_with_float_logits(solution, randn, rand, randint):
    logits, target = some(randn, randint, 6, dtype=torch.float32)
    weight = (rand(7) + 0.5).to(torch.bfloat16)
    expected = F.cross_entropy(logits, target, weight=weight.float(), label_smoothing=0.1)
    assert_close(
        solution.cross_entropy(logits, target, weight=weight, label_smoothing=0.1), expected, rtol=1e-5, atol=1e-6
    )


@task("cross_entropy")
def test_strides_do_not_matter(solution, randn, randint):
    logits, target = some(randn, randint, 3, 4)
    assert_close(solution.cross_entropy(noncontiguous(logits), target), torch_ce(logits, target), rtol=1e-10)


@task("cross_entropy")
def test_memory_of_cross_entropy(solution, randn, randint):
    logits, target = randn(64, 100), randint(0, 100, (64,))
    assert_cost(solution.cross_entropy, logits.requires_grad_(), target, max_peak_bytes=3 * 64 * 100 * 4)


@cost_case("cross_entropy")
def cross_entropy_cost(module, randn, randint):
    logits, target = randn(64, 100), randint(0, 100, (64,))
    return lambda: module.cross_entropy(logits, target)


# cross_entropy_grad


def grad_oracle(logits, target, ignore_index=-100):
    return grad_of(lambda x: F.cross_entropy(x, target, ignore_index=ignore_index), logits)[0]


@task("cross_entropy_grad")
@pytest.mark.parametrize("ignored", [None, -100])
def test_the_gradient_is_p_minus_y(solution, randn, randint, ignored):
    logits, target = some(randn, randint, 5, ignored=ignored)
    expected = grad_oracle(logits, target)
    assert_close(solution.cross_entropy_grad(logits, target), expected, rtol=1e-10)


@task("cross_entropy_grad")
@pytest.mark.parametrize("index", [3, -1])
def test_the_gradient_ignores_what_it_is_told(solution, randn, randint, index):
    logits, target = some(randn, randint, 7, ignored=index)
    expected = grad_oracle(logits, target, index)
    assert_close(solution.cross_entropy_grad(logits, target, ignore_index=index), expected, rtol=1e-10)


@task("cross_entropy_grad")
def test_the_gradient_in_float32(solution, randn, randint):
    logits, target = some(randn, randint, 4, V=9, dtype=torch.float32)
    assert_close(solution.cross_entropy_grad(logits, target), grad_oracle(logits, target), rtol=1e-5, atol=1e-6)


@task("cross_entropy_grad")
def test_the_gradient_of_huge_logits(solution, randn, randint):
    logits, target = some(randn, randint, 6)
    logits = logits * 1e4
    assert_close(solution.cross_entropy_grad(logits, target), grad_oracle(logits, target), atol=1e-12)


@task("cross_entropy_grad")
def test_all_ignored_has_gradient_zero(solution, randn, device):
    target = torch.full((3,), -100, device=device)
    assert_close(solution.cross_entropy_grad(randn(3, 4), target), torch.zeros(3, 4), because="no target, no pull")


@task("cross_entropy_grad")
def test_one_kept_target_has_the_whole_gradient(solution, randn, device):
    logits, target = randn(3, 4, dtype=WIDE), torch.tensor([-100, 0, -100], device=device)
    assert_close(solution.cross_entropy_grad(logits, target), grad_oracle(logits, target), rtol=1e-10)


@task("cross_entropy_grad")
def test_a_single_class_has_no_gradient(solution, randn, device):
    target = torch.tensor([0, -100, 0], device=device)
    assert_close(solution.cross_entropy_grad(randn(3, 1), target), torch.zeros(3, 1))


@task("cross_entropy_grad")
@pytest.mark.parametrize("bad", [7, -1, -7])
def test_the_gradient_refuses_targets_outside(solution, randn, randint, bad):
    logits, target = some(randn, randint, 5)
    target[2] = bad
    assert_raises(IndexError, solution.cross_entropy_grad, logits, target)


@task("cross_entropy_grad")
def test_shapes_of_the_gradient_are_checked(solution, randn, randint):
    for b in [(5,), (4, 1), (3,)]:
        target = randint(0, 3, b)
        assert_raises(ValueError, solution.cross_entropy_grad, randn(4, 5), target, mentions=["(4, 5)", str(b)])


@task("cross_entropy_grad")
def test_the_gradient_of_half_logits_is_computed_in_float32(solution, randn, randint):
    logits, target = some(randn, randint, 3, V=3000, dtype=torch.float32)
    logits = logits.to(torch.bfloat16)
    expected = grad_oracle(logits.double(), target).to(torch.bfloat16)
    assert_close(solution.cross_entropy_grad(logits, target), expected, rtol=0.009, atol=1e-9)


# bce_with_logits


@task("bce_with_logits")
def test_binary_cross_entropy_of_soft_targets(solution, randn, rand):
    x, y = randn(4, 5, dtype=WIDE, scale=3.0), rand(4, 5).double()
    assert_close(solution.bce_with_logits(x, y), F.binary_cross_entropy_with_logits(x, y), rtol=1e-10)


@task("bce_with_logits")
def test_binary_cross_entropy_of_hard_targets(solution, randn, randint):
    x, y = randn(30, scale=3.0), randint(0, 2, (30,)).float()
    assert_close(solution.bce_with_logits(x, y), F.binary_cross_entropy_with_logits(x, y), rtol=1e-5, atol=1e-6)


@task("bce_with_logits")
def test_pos_weight_multiplies_the_positive_term(solution, randn, rand):
    x, y, w = randn(4, 5, dtype=WIDE), rand(4, 5).double(), rand(5).double() * 3 + 1.5
    expected = F.binary_cross_entropy_with_logits(x, y, pos_weight=w)
    assert_close(solution.bce_with_logits(x, y, pos_weight=w), expected, rtol=1e-10)


@task("bce_with_logits")
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("size", [1e4, 30.0])
def test_large_logits_have_exact_losses(solution, rand, sign, size):
    x = sign * (rand(6) + 1) * size
    y = rand(6)
    expected = F.binary_cross_entropy_with_logits(x, y)
    assert_close(solution.bce_with_logits(x, y), expected, rtol=1e-5, because="the loss grows in a line, without limit")


@task("bce_with_logits")
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_large_logits_have_exact_gradients(solution, rand, sign):
    x, y = sign * (rand(6) + 1) * 1e4, rand(6)
    expected = grad_of(lambda a: F.binary_cross_entropy_with_logits(a, y), x)[0]
    found = grad_of(lambda a: solution.bce_with_logits(a, y), x)[0]
    assert_close(found, expected, because="the gradient is (sigmoid(x) - y) / n, however wrong the logit")


@task("bce_with_logits")
def test_gradient_at_zero(solution, rand):
    y = rand(5).double()
    x = torch.zeros_like(y).requires_grad_()
    (grad,) = torch.autograd.grad(solution.bce_with_logits(x, y), x)
    assert_close(grad, (0.5 - y) / 5, because="at logit 0 the gradient is (0.5 - y) / n: a fresh head starts there")


@task("bce_with_logits")
def test_gradient_of_binary_cross_entropy(solution, randn, rand):
    y, w = rand(3, 4).double(), rand(4).double() + 1.5
    assert_gradients_close(
        lambda x: solution.bce_with_logits(x, y, pos_weight=w),
        lambda x: F.binary_cross_entropy_with_logits(x, y, pos_weight=w),
        [randn(3, 4, dtype=WIDE)],
    )


@task("bce_with_logits")
def test_binary_shapes_must_agree(solution, randn, rand):
    for a, b in [((4, 1), (4,)), ((3, 2), (2,))]:
        assert_raises(ValueError, solution.bce_with_logits, randn(*a), rand(*b), mentions=[str(a), str(b)])


@task("bce_with_logits")
def test_half_logits_of_two_classes(solution, randn, rand):
    x, y = randn(3000).to(torch.bfloat16), rand(3000).to(torch.bfloat16)
    expected = F.binary_cross_entropy_with_logits(x.double(), y.double())
    assert_close(solution.bce_with_logits(x, y), expected.to(torch.bfloat16), rtol=0.0085)
    x16, y16 = x[:300].half() * 0 - 3000, torch.ones_like(x[:300]).half()
    w = torch.full((1,), 10.0, device=x.device)
    assert_close(
        solution.bce_with_logits(x16, y16, pos_weight=w), torch.tensor(30000.0).half(), because="sums are in float32"
    )


@task("bce_with_logits")
def test_half_targets_are_widened(solution, rand, device):
    x = torch.zeros(6, device=device)
    y = rand(6).half()
    expected = torch.tensor(math.log(2.0))
    assert_close(solution.bce_with_logits(x, y), expected, rtol=1e-5)


# kl_divergence


def kl_oracle(p, q):
    return kl_divergence(Categorical(logits=p), Categorical(logits=q))


@task("kl_divergence")
def test_divergence_of_rows(solution, randn):
    p, q = randn(3, 4, 5, dtype=WIDE, scale=2.0), randn(3, 4, 5, dtype=WIDE)
    assert_close(solution.kl_divergence(p, q), kl_oracle(p, q), rtol=1e-9)


@task("kl_divergence")
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_divergence_along_another_axis(solution, randn, dim):
    p, q = randn(3, 4, 5, dtype=WIDE, scale=2.0), randn(3, 4, 5, dtype=WIDE)
    assert_close(solution.kl_divergence(p, q, dim=dim), kl_oracle(p.movedim(dim, -1), q.movedim(dim, -1)), rtol=1e-9)


@task("kl_divergence")
def test_equal_distributions_have_divergence_zero(solution, randn):
    p = randn(4, 6, dtype=WIDE)
    found = solution.kl_divergence(p, p + 3.0)
    assert_close(found, torch.zeros(4, dtype=WIDE), atol=1e-12, because="a constant added to a row changes nothing")


@task("kl_divergence")
def test_different_distributions_are_above_zero(solution, randn):
    p = randn(5, 6, dtype=WIDE)
    q = p.clone()
    q[:, 2] += 1.0
    found = solution.kl_divergence(p, q)
    assert_that((found > 1e-6).all().item(), "the divergence of two different distributions is positive", value=found)


@task("kl_divergence")
def test_zeros_in_p_contribute_nothing(solution, randn):
    p, q = randn(4, 5, dtype=WIDE), randn(4, 5, dtype=WIDE)
    p[:, 1] = -math.inf
    q[2, 1] = -math.inf
    assert_close(solution.kl_divergence(p, q), kl_oracle(p, q), because="0 * log 0 is 0, whatever q is there")


@task("kl_divergence")
def test_a_probability_that_underflows_is_a_zero(solution, randn):
    p, q = randn(3, 5, dtype=WIDE), randn(3, 5, dtype=WIDE)
    p[:, 3] = -1e4
    q[:, 3] = -math.inf
    expected = kl_oracle(p, q)
    assert_close(solution.kl_divergence(p, q), expected, because="p is exactly 0 in the class that q excludes")


@task("kl_divergence")
def test_a_zero_in_q_alone_is_infinitely_far(solution, randn):
    p, q = randn(3, 5, dtype=WIDE), randn(3, 5, dtype=WIDE)
    q[1, 2] = -math.inf
    assert_close(solution.kl_divergence(p, q), kl_oracle(p, q))


@task("kl_divergence")
def test_gradients_are_finite_where_p_has_zeros(solution, randn):
    p, q = randn(3, 5, dtype=WIDE), randn(3, 5, dtype=WIDE)
    p[:, 0] = -math.inf
    q[1, 0] = -math.inf
    assert_close(solution.kl_divergence(p, q), kl_oracle(p, q), because="0 * log 0 is 0")
    small = grad_of(kl_oracle_small, p[:, 1:], q[:, 1:], q[:, :1])
    found = grad_of(solution.kl_divergence, p, q)
    assert_close(found[0][:, 1:], small[0], because="the gradient of the classes that exist")
    assert_close(found[1][:, 1:], small[1], because="the gradient of the classes that exist")
    assert_close(found[0][:, 0], torch.zeros(3, dtype=WIDE), because="a class with p = 0 has no gradient in p")


def kl_oracle_small(p, q, rest):
    log_q = torch.log_softmax(torch.cat([q, rest], -1), -1)[:, :-1]
    log_p = torch.log_softmax(p, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@task("kl_divergence")
def test_gradients_go_to_both(solution, randn):
    assert_gradients_close(
        solution.kl_divergence, kl_oracle, [randn(3, 5, dtype=WIDE), randn(3, 5, dtype=WIDE)], rtol=1e-7, atol=1e-10
    )


@task("kl_divergence")
def test_divergence_of_huge_logits(solution, randn):
    p, q = randn(4, 5, dtype=WIDE, scale=1e4), randn(4, 5, dtype=WIDE, scale=1e4)
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert_close(solution.kl_divergence(p, q), expected, atol=1e-9)


@task("kl_divergence")
def test_shapes_of_p_and_q_must_agree(solution, randn):
    for a, b in [((3, 5), (5,)), ((3, 5), (1, 5)), ((2, 4), (2, 3))]:
        assert_raises(ValueError, solution.kl_divergence, randn(*a), randn(*b), mentions=[str(a), str(b)])


@task("kl_divergence")
def test_divergence_of_half_logits_is_taken_in_float32(solution, randn):
    p, q = randn(3, 2000).to(torch.bfloat16), randn(3, 2000).to(torch.bfloat16)
    expected = kl_oracle(p.double(), q.double()).to(torch.bfloat16)
    assert_close(solution.kl_divergence(p, q), expected, rtol=0.009)


# lm_loss


def lm_oracle(logits, tokens, lengths=None):
    """One target after the other."""
    B, T = tokens.shape
    losses = []
    for b in range(B):
        for t in range(1, T if lengths is None else min(T, int(lengths[b]))):
            losses.append(-torch.log_softmax(logits[b, t - 1], -1)[tokens[b, t]])
    return torch.stack(losses).mean()


@task("lm_loss")
def test_each_position_predicts_the_next_token(solution, randn, randint):
    logits, tokens = randn(3, 5, 7, dtype=WIDE, scale=2.0), randint(0, 7, (3, 5))
    assert_close(solution.lm_loss(logits, tokens), lm_oracle(logits, tokens), rtol=1e-10)


@task("lm_loss")
def test_lengths_end_the_rows(solution, randn, randint, device):
    logits, tokens = randn(4, 6, 7, dtype=WIDE, scale=2.0), randint(0, 7, (4, 6))
    lengths = torch.tensor([6, 2, 4, 1], device=device)
    assert_close(solution.lm_loss(logits, tokens, lengths), lm_oracle(logits, tokens, lengths), rtol=1e-10)


@task("lm_loss")
def test_two_rows_of_two_tokens(solution, randn, randint, device):
    logits, tokens = randn(2, 3, 5, dtype=WIDE), randint(0, 5, (2, 3))
    lengths = torch.tensor([2, 0], device=device)
    expected = lm_oracle(logits, tokens, lengths)
    assert_close(solution.lm_loss(logits, tokens, lengths=lengths), expected, because="there is one target here")


@task("lm_loss")
@pytest.mark.parametrize("junk", [0, -1, 999, -100])
def test_more_padding_changes_nothing(solution, randn, randint, device, junk):
    logits, tokens = randn(3, 7, 5, dtype=WIDE), randint(0, 5, (3, 7))
    lengths = torch.tensor([4, 2, 3], device=device)
    expected = lm_oracle(logits, tokens, lengths)
    tokens[torch.arange(7, device=device) >= lengths[:, None]] = junk
    assert_close(solution.lm_loss(logits, tokens, lengths), expected, because="padding is never a target")


@task("lm_loss")
def test_the_first_token_is_never_a_target(solution, randn, randint):
    logits, tokens = randn(2, 4, 5, dtype=WIDE), randint(0, 5, (2, 4))
    expected = lm_oracle(logits, tokens)
    tokens[:, 0] = 777
    assert_close(solution.lm_loss(logits, tokens), expected, because="nothing predicts the first token")


@task("lm_loss")
def test_gradient_of_the_language_loss(solution, randn, randint, device):
    tokens, lengths = randint(0, 5, (3, 4)), torch.tensor([4, 3, 1], device=device)
    assert_gradients_close(
        lambda x: solution.lm_loss(x, tokens, lengths),
        lambda x: lm_oracle(x, tokens, lengths),
        [randn(3, 4, 5, dtype=WIDE)],
    )


@task("lm_loss")
def test_no_target_at_all(solution, randn, randint, device):
    logits = randn(2, 1, 5).requires_grad_()
    loss = solution.lm_loss(logits, randint(0, 5, (2, 1)))
    assert_close(loss, torch.zeros(()), because="one token predicts nothing: the loss is 0")
    assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(2, 1, 5))
    ones = torch.ones(2, dtype=torch.long, device=device)
    assert_close(solution.lm_loss(randn(2, 3, 5), randint(0, 5, (2, 3)), ones), torch.zeros(()))


@task("lm_loss")
def test_shapes_of_the_language_loss_are_checked(solution, randn, randint):
    assert_raises(ValueError, solution.lm_loss, randn(2, 4, 5), randint(0, 5, (2, 3)), mentions=["(2, 4, 5)", "(2, 3)"])
    assert_raises(ValueError, solution.lm_loss, randn(2, 4, 5), randint(0, 4, (4, 2)), mentions=["(2, 4, 5)", "(4, 2)"])
    tokens = randint(0, 5, (2, 4))
    for shape in [(1,), (4,), (2, 1)]:
        assert_raises(
            ValueError, solution.lm_loss, randn(2, 4, 5), tokens, randint(1, 3, shape), mentions=["(2, 4)", str(shape)]
        )


@task("lm_loss")
def test_a_token_outside_of_the_vocabulary_raises_index_error(solution, randn, randint):
    tokens = randint(0, 5, (2, 4))
    tokens[1, 2] = 5
    assert_raises(IndexError, solution.lm_loss, randn(2, 4, 5), tokens)


@task("lm_loss")
def test_the_language_loss_of_half_logits(solution, randn, randint):
    logits, tokens = randn(2, 20, 300).to(torch.bfloat16), randint(0, 300, (2, 20))
    expected = lm_oracle(logits.double(), tokens).to(torch.bfloat16)
    assert_close(solution.lm_loss(logits, tokens), expected, rtol=0.009)


# linear_cross_entropy


def projected(h, w, target):
    return F.cross_entropy(h @ w.T, target)


@task("linear_cross_entropy")
@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 50])
def test_the_loss_is_that_of_all_logits(solution, randn, randint, chunk):
    h, w, target = randn(8, 3, dtype=WIDE), randn(11, 3, dtype=WIDE), randint(0, 11, (8,))
    assert_close(solution.linear_cross_entropy(h, w, target, chunk), projected(h, w, target), rtol=1e-10)


@task("linear_cross_entropy")
@pytest.mark.parametrize("chunk", [1, 3, 4, 50])
def test_gradients_of_the_chunked_loss(solution, randn, randint, chunk):
    target = randint(0, 11, (8,))
    assert_gradients_close(
        lambda h, w: solution.linear_cross_entropy(h, w, target, chunk),
        lambda h, w: projected(h, w, target),
        [randn(8, 3, dtype=WIDE), randn(11, 3, dtype=WIDE)],
    )


@task("linear_cross_entropy")
def test_gradients_against_finite_differences(solution, randn, randint):
    target = randint(0, 5, (4,))
    assert_gradcheck(
        lambda h, w: solution.linear_cross_entropy(h, w, target, 3) * 2.5,
        [randn(4, 2, dtype=WIDE), randn(5, 2, dtype=WIDE)],
    )


@task("linear_cross_entropy")
def test_the_chunked_loss_in_float32_with_large_logits(solution, randn, randint):
    h, w, target = randn(7, 3, scale=100.0), randn(9, 3, scale=10.0), randint(0, 9, (7,))
    expected = projected(h, w, target)
    assert_close(solution.linear_cross_entropy(h, w, target, 2), expected, rtol=1e-5, atol=1e-2)


def there_and_back(fn, h, w, target, chunk):
    h, w = h.requires_grad_(), w.requires_grad_()
    loss = fn(h, w, target, chunk)
    return torch.autograd.grad(loss, [h, w])


@task("linear_cross_entropy")
def test_no_tensor_holds_all_logits(solution, randn, randint):
    N, V, D, chunk = 64, 96, 5, 8
    assert_cost(
        there_and_back,
        solution.linear_cross_entropy,
        randn(N, D),
        randn(V, D),
        randint(0, V, (N,)),
        chunk,
        no_larger_than=chunk * V,
        because="a tensor was allocated that is larger than one chunk of logits",
    )


@task("linear_cross_entropy")
def test_peak_of_both_passes(solution, randn, randint):
    N, V, D, chunk = 64, 96, 5, 8
    args = (randn(N, D), randn(V, D), randint(0, V, (N,)), chunk)
    _, cost = measure(there_and_back, solution.linear_cross_entropy, *args)
    bound = (5 * chunk * V + 3 * (N + V) * D + 8 * N) * 4
    assert_that(
        cost.peak_bytes <= bound,
        f"both passes together stay below {bound:,} bytes",
        value=cost.peak_bytes,
    )


@task("linear_cross_entropy")
def test_shapes_of_the_chunked_loss_are_checked(solution, randn, randint):
    fn, target = solution.linear_cross_entropy, randint(0, 5, (4,))
    assert_raises(ValueError, fn, randn(4, 3), randn(5, 2), target, 2, mentions=["(4, 3)", "(5, 2)"])
    assert_raises(ValueError, fn, randn(4, 3), randn(5, 3), randint(0, 5, (3,)), 2, mentions=["(4, 3)", "(3,)"])
    assert_raises(ValueError, fn, randn(4, 3), randn(5, 3), randint(0, 5, (4, 1)), 2, mentions=["(4, 3)", "(4, 1)"])


@task("linear_cross_entropy")
@pytest.mark.parametrize("chunk", [0, -2])
def test_a_chunk_has_rows(solution, randn, randint, chunk):
    assert_raises(ValueError, solution.linear_cross_entropy, randn(4, 3), randn(5, 3), randint(0, 5, (4,)), chunk)


@cost_case("linear_cross_entropy")
def linear_cross_entropy_cost(module, randn, randint):
    args = (randn(64, 5), randn(96, 5), randint(0, 96, (64,)), 8)
    return lambda: there_and_back(module.linear_cross_entropy, *args)
