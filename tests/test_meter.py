"""The meter against closed forms, against PyTorch's own counter, and against itself."""

import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from checker.judge.meter import Cost, Meter, measure, saved_bytes, unmetered


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    push = torch._C._autograd._push_saved_tensors_default_hooks
    disable = torch._C._autograd._saved_tensors_hooks_disable
    yield
    assert _get_current_dispatch_mode() is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert torch._C._autograd._push_saved_tensors_default_hooks is push
    assert torch._C._autograd._saved_tensors_hooks_disable is disable
    assert gc.isenabled()


def cost(fn, *args, **kwargs):
    return measure(fn, *args, **kwargs)[1]


def torch_flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def numbers(*shape, grad=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


# FLOPs of contractions


SIZES = st.integers(0, 9)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_matrix_products_of_any_size(b, m, k, n):
    assert cost(torch.mm, numbers(m, k), numbers(k, n)).flops == 2 * m * k * n
    assert cost(torch.bmm, numbers(b, m, k), numbers(b, k, n)).flops == 2 * b * m * k * n
    assert cost(torch.addmm, numbers(n), numbers(m, k), numbers(k, n)).flops == 2 * m * k * n
    assert cost(torch.baddbmm, numbers(n), numbers(b, m, k), numbers(b, k, n)).flops == 2 * b * m * k * n
    assert cost(torch.mv, numbers(m, k), numbers(k)).flops == 2 * m * k


MATRIX_CALLS = {
    "mm": lambda: numbers(3, 4) @ numbers(4, 5),
    "addmm": lambda: torch.addmm(numbers(5), numbers(3, 4), numbers(4, 5)),
    "addmm out": lambda: torch.addmm(numbers(5), numbers(3, 4), numbers(4, 5), out=torch.empty(3, 5)),
    "bmm": lambda: numbers(2, 3, 4) @ numbers(2, 4, 5),
    "baddbmm": lambda: torch.baddbmm(numbers(3, 5), numbers(2, 3, 4), numbers(2, 4, 5)),
    "linear": lambda: F.linear(numbers(2, 3, 4), numbers(5, 4), numbers(5)),
    "broadcast matmul": lambda: numbers(2, 1, 3, 4) @ numbers(7, 4, 5),
    "einsum": lambda: torch.einsum("bthd,bshd->bhts", numbers(2, 3, 4, 5), numbers(2, 6, 4, 5)),
    "einsum of three": lambda: torch.einsum("ij,jk,kl->il", numbers(3, 4), numbers(4, 5), numbers(5, 6)),
    "einsum to a number": lambda: torch.einsum("ij,ij->", numbers(3, 4), numbers(3, 4)),
}


@pytest.mark.parametrize("name", MATRIX_CALLS)
def test_torch_counts_the_same_for_matrices(name):
    flops = cost(MATRIX_CALLS[name]).flops
    assert flops == torch_flops(MATRIX_CALLS[name]) > 0


def test_a_matmul_is_one_call_and_nothing_else():
    _, got = measure(torch.mm, numbers(3, 4), numbers(4, 5))
    assert got == Cost(
        flops=2 * 3 * 4 * 5,
        calls=1,
        new_bytes=60,
        peak_bytes=60,
        ops=(("mm", 1),),
        shapes=frozenset({(3, 5)}),
        matmuls=1,
        largest=15,
    )


def test_products_that_torch_does_not_count():
    a, v, w = numbers(6, 7), numbers(7), numbers(6)
    assert cost(torch.mv, a, v).flops == cost(torch.addmv, w, a, v).flops == 2 * 6 * 7
    assert cost(numbers(3, 5).addmm_, numbers(3, 4), numbers(4, 5)).flops == 2 * 3 * 4 * 5
    assert cost(torch.dot, v, v).flops == cost(torch.vdot, v, v).flops == 2 * 7
    assert cost(torch.matmul, numbers(2, 6, 7), v).flops == 2 * 2 * 6 * 7
    assert cost(torch.addbmm, numbers(3, 5), numbers(2, 3, 4), numbers(2, 4, 5)).flops == 2 * 2 * 3 * 4 * 5
    assert cost(torch.cdist, numbers(30, 8), numbers(40, 8)).flops == 2 * 30 * 40 * 8
    assert cost(F.bilinear, numbers(3, 4), numbers(3, 5), numbers(6, 4, 5)).flops == 2 * 3 * 4 * 5 * 6
    assert torch_flops(lambda: (torch.mv(a, v), torch.dot(v, v))) == 0


def test_an_outer_product_is_elementwise():
    for outer in (torch.outer, lambda a, b: torch.einsum("i,j->ij", a, b)):
        got = cost(outer, numbers(5), numbers(6))
        assert (got.flops, got.elementwise, got.matmuls) == (0, 30, 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 3, 11), (5, 3, 4), {}),
        ((2, 4, 9, 8), (6, 4, 3, 2), {"stride": 2, "padding": 1}),
        ((2, 4, 9, 8), (6, 4, 3, 2), {"dilation": (2, 3)}),
        ((2, 4, 9, 8), (6, 2, 3, 3), {"groups": 2, "padding": 2}),
        ((1, 6, 7, 7), (6, 1, 3, 3), {"groups": 6}),
        ((1, 2, 5, 6, 7), (3, 2, 2, 3, 2), {"stride": (1, 2, 1)}),
        ((0, 3, 11), (5, 3, 4), {}),
    ],
)
def test_convolutions(x, w, options, bias):
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(x) - 2]

    def call():
        return convolve(numbers(*x), numbers(*w), numbers(w[0]) if bias else None, **options)

    out, got = measure(call)
    assert got.flops == torch_flops(call) == 2 * out.numel() * w[1] * int(np.prod(w[2:]))
    assert (got.matmuls, dict(got.ops)["convolution"]) == (1, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups):
    x, w = numbers(2, 4, 7, 6), numbers(4, 3, 3, 2)
    got = cost(F.conv_transpose2d, x, w, stride=2, groups=groups)
    assert got.flops == 2 * 2 * 7 * 6 * 4 * 3 * 3 * 2


@pytest.mark.parametrize("groups", [1, 3])
def test_the_backward_pass_of_a_convolution_costs_two_forward_passes(groups):
    x, w = numbers(2, 6, 9, 8, grad=True), numbers(9, 6 // groups, 3, 2, grad=True)

    def call():
        return F.conv2d(x, w, groups=groups, padding=1).sum().backward()

    forward = cost(F.conv2d, x, w, groups=groups, padding=1).flops
    assert cost(call).flops == 3 * forward
    if groups == 1:
        assert torch_flops(call) == 3 * forward


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("b", "h", "tq", "tk", "d", "dv"), [(2, 3, 4, 5, 8, 8), (1, 2, 7, 7, 16, 16), (2, 2, 3, 6, 8, 4)]
)
def test_fused_attention_costs_what_the_two_products_cost(b, h, tq, tk, d, dv, causal):
    q, k, v = numbers(b, h, tq, d), numbers(b, h, tk, d), numbers(b, h, tk, dv)
    closed_form = 2 * b * h * tq * tk * (d + dv)
    assert cost(F.scaled_dot_product_attention, q, k, v, is_causal=causal).flops == closed_form
    by_hand = cost(lambda: (q @ k.mT).softmax(-1) @ v)
    assert (by_hand.flops, by_hand.matmuls, dict(by_hand.ops)) == (closed_form, 2, {"bmm": 2, "_softmax": 1})


def test_fused_attention_is_one_contraction_and_its_backward_five_products():
    q, k, v = (numbers(2, 3, 5, 8, grad=True) for _ in range(3))
    got = cost(F.scaled_dot_product_attention, q, k, v)
    assert (got.matmuls, got.calls) == (1, 1)
    product = 2 * 2 * 3 * 5 * 5 * 8
    both = cost(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both.flops == (2 + 5) * product


def test_the_backward_pass_of_a_linear_layer():
    x, layer = numbers(3, 4, grad=True), nn.Linear(4, 5)

    def call():
        layer(x).sum().backward()

    assert cost(call).flops == torch_flops(call) == 3 * 2 * 3 * 4 * 5


def test_recurrent_layers():
    steps, batch, inputs, hidden = 6, 2, 3, 4
    x = numbers(steps, batch, inputs)
    for layer, gates in (
        (nn.RNN(inputs, hidden), 1),
        (nn.GRU(inputs, hidden), 3),
        (nn.LSTM(inputs, hidden), 4),
    ):
        forward = 2 * steps * batch * gates * hidden * (inputs + hidden)
        assert cost(layer, x).flops == forward
        if gates == 4:  # fused, both ways; the others leave out what nobody asks for, such as the gradient of x
            assert cost(lambda layer=layer: layer(x)[0].sum().backward()).flops == 3 * forward


def test_fused_layers_of_the_inference_path():
    b, t, d, ff = 2, 5, 8, 16
    attention, layer = (
        nn.MultiheadAttention(d, 2, batch_first=True),
        nn.TransformerEncoderLayer(d, 2, ff, batch_first=True),
    )
    x = numbers(b, t, d)
    for module, inputs in ((attention, (x, x, x)), (layer, (x,))):
        slow = cost(module, *inputs)
        with torch.no_grad():
            fast = cost(module.eval(), *inputs)
        assert (fast.calls, fast.matmuls) == (1, 1)
        assert fast.flops == slow.flops
    assert slow.flops == 2 * b * t * (4 * d * d + 2 * d * ff) + 2 * b * t * t * 2 * d


def test_inference_mode_takes_nothing_away():
    x, w = numbers(2, 5, 8), numbers(8, 8)

    def work():
        y = torch.einsum("btd,ed->bte", x, w) + F.linear(x, w) + x @ w
        y = y.transpose(1, 2).reshape(2, 40).contiguous().view(2, 1, 5, 8)
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
        return F.rms_norm(y, (8,)).softmax(-1).to(torch.float64)

    with torch.no_grad():
        plain, expected = measure(work)
    with torch.inference_mode():
        same, got = measure(work)
    assert torch.equal(plain, same)
    assert got == expected
    assert got.matmuls == 4


# multiply-then-sum


A, B = (6, 7), (7, 5)
DISGUISED = {
    "sum": lambda a, b: (a[:, :, None] * b).sum(1),
    "sum, keepdim": lambda a, b: (a[:, :, None] * b).sum(1, keepdim=True)[:, 0],
    "mean": lambda a, b: (a[:, :, None] * b).mean(1) * 7,
    "expanded operands": lambda a, b: (a[:, :, None].expand(6, 7, 5) * b.expand(6, 7, 5)).sum(1),
    "in place": lambda a, b: a[:, :, None].repeat(1, 1, 5).mul_(b).sum(1),
    "out": lambda a, b: torch.sum(torch.mul(a[:, :, None], b, out=torch.empty(6, 7, 5)), 1, out=torch.empty(6, 5)),
    "transposed": lambda a, b: (a[:, None] * b.T).transpose(1, 2).sum(1),
    "permuted, then copied": lambda a, b: (a[:, None] * b.T).permute(2, 1, 0).reshape(7, 30).sum(0).view(5, 6).T,
    "scaled": lambda a, b: (2 * (a[:, :, None] * b) / 2).sum(1),
    "in another precision": lambda a, b: (a[:, :, None] * b).double().sum(1).float(),
    "through a buffer": lambda a, b: torch.empty(6, 7, 5).copy_(a[:, :, None] * b).sum(1),
    "masked": lambda a, b: (a[:, :, None] * b).masked_fill(torch.zeros(7, 1, dtype=torch.bool), 0).sum(1),
    "with a third factor": lambda a, b: (a[:, :, None] * b * torch.ones(6, 7, 5)).sum(1),
}


@pytest.mark.parametrize("name", DISGUISED)
def test_broadcast_and_sum_is_not_free(name):
    a, b = numbers(*A), numbers(*B)
    out, got = measure(DISGUISED[name], a, b)
    torch.testing.assert_close(out, a @ b)
    assert got.flops == 2 * 6 * 7 * 5
    assert got.matmuls == 0
    assert got.elementwise >= 6 * 7 * 5 + 6 * 5


def test_matrix_times_vector_in_disguise():
    assert cost(lambda a, v: (a * v).sum(-1), numbers(6, 7), numbers(7)).flops == 2 * 6 * 7


def test_gradients_of_broadcast_and_sum_cost_twice_as_much_again():
    a, b = numbers(*A, grad=True), numbers(*B, grad=True)
    grad = numbers(6, 5)
    assert cost(lambda: (a[:, :, None] * b).sum(1).backward(grad)).flops == 3 * 2 * 6 * 7 * 5
    assert cost(lambda: (a @ b).backward(grad)).flops == 3 * 2 * 6 * 7 * 5


NO_CONTRACTIONS = {
    "a number": lambda x, y: (x * 3).sum(),
    "a tensor with one value": lambda x, y: (x * x.new_full((), 2.0)).sum() + (x * x.new_ones(1, 1)).mean(),
    "one value, expanded": lambda x, y: (x * x.new_ones(()).expand(6, 7)).sum(),
    "a square": lambda x, y: (x * x).mean(-1),
    "two full tensors": lambda x, y: (x * y).sum(),
    "a boolean": lambda x, y: (x * (torch.arange(7) > 3)).sum(-1),
    "nothing is reduced": lambda x, y: (x[:, None] * y[:, :1, None]).sum(1),
    "cumsum": lambda x, y: (x[:, None] * y).cumsum(-1),
    "norm, std, var": lambda x, y: ((x[:, None] * y).norm(), (x * y[0]).std(), (x * y[0]).var()),
    "another tensor of the size": lambda x, y: ((x[:, None] * y).add(1)).sum(1),
    "overwritten": lambda x, y: (x[:, None] * y).fill_(1).sum(1),
    "added": lambda x, y: (x[:, None] * y).add_(1).sum(1),
}


@pytest.mark.parametrize("name", NO_CONTRACTIONS)
def test_what_is_not_a_multiply_then_sum(name):
    assert cost(NO_CONTRACTIONS[name], numbers(6, 7), numbers(6, 7).flip(0)).flops == 0


def test_a_product_is_forgotten_when_its_memory_is_freed():
    x, y = numbers(6, 7), numbers(7)

    def call():
        for _ in range(20):  # the allocator gives the same addresses again
            x * y
            (x + y).sum(-1)

    assert cost(call).flops == 0


def test_norms_written_by_hand_have_no_flops():
    w = numbers(8)

    def by_pow(x):
        return w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())

    def by_product(x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w

    for norm in (by_pow, by_product, lambda x: F.rms_norm(x, (8,), w), lambda x: F.layer_norm(x, (8,), w)):
        assert cost(norm, numbers(3, 4, 8)).flops == 0


# what is a call


def test_views_and_metadata_cost_nothing():
    x = numbers(4, 6)

    def views():
        y = x.view(2, 2, 6).transpose(0, 1)[0].unsqueeze(0).expand(3, 2, 6).detach().permute(2, 0, 1)
        (
            x.unfold(1, 2, 1),
            x.T,
            x.mT,
            x[1:, ::2],
            x.as_strided((3,), (2,)),
            x.chunk(2),
            x.unbind(),
            x.split(3, 1),
        )
        x.contiguous(), x.reshape(24), x.to(torch.float32), x.diagonal(), x.unflatten(1, (2, 3)), x.squeeze()
        (
            y.size(),
            y.stride(),
            y.is_contiguous(),
            y.numel(),
            x.data,
            torch.promote_types(x.dtype, torch.float64),
        )
        x.view(24).unsqueeze_(0).squeeze_(0).t_()
        return y

    assert cost(views) == Cost()


def test_allocation_has_bytes_and_is_no_call():
    def allocate():
        torch.empty(3, 4)
        torch.empty_like(torch.empty_strided((2, 3), (3, 1)))
        numbers_made_before.new_empty(5)
        return torch.tensor([1.0, 2.0])

    numbers_made_before = numbers(2)
    got = cost(allocate)
    assert got.new_bytes == 4 * (12 + 6 + 6 + 5 + 2)
    assert (got.calls, got.ops, got.elementwise, got.largest) == (0, (), 0, 12)
    assert got.shapes == {(3, 4), (2, 3), (5,), (2,)}


def test_copies_are_calls_with_bytes():
    x = numbers(4, 6)
    for copy in (
        x.clone,
        lambda: x.T.contiguous(),
        lambda: x.T.reshape(24),
        lambda: x.expand(1, 4, 6).repeat(1, 1, 1),
    ):
        got = cost(copy)
        assert (got.calls, got.elementwise, got.new_bytes) == (1, 24, 96)
    assert cost(x.double).new_bytes == 192


def test_in_place_out_and_foreach():
    x, y = numbers(4, 6), numbers(4, 6)
    in_place = cost(lambda: x.add_(y).clamp_(0).copy_(y))
    assert (in_place.calls, in_place.elementwise, in_place.new_bytes) == (3, 72, 0)
    out = torch.empty(4, 6)
    into = cost(torch.add, x, y, out=out)
    assert (into.calls, into.elementwise, into.new_bytes, into.shapes) == (1, 24, 0, {(4, 6)})
    foreach = cost(torch._foreach_add, [x, y[0]], 1)
    assert (foreach.calls, foreach.elementwise, foreach.new_bytes) == (1, 30, 120)
    foreach = cost(torch._foreach_mul_, [x, y[0]], 2)
    assert (foreach.calls, foreach.elementwise, foreach.new_bytes) == (1, 30, 0)


def test_a_result_that_outgrows_its_buffer_is_allocated():
    x = numbers(10)
    assert cost(lambda: torch.add(x, x, out=torch.empty(0))).new_bytes == 40
    small = torch.empty(3)
    got = cost(lambda: small.resize_(20))
    assert (got.calls, got.new_bytes, got.largest) == (0, 80, 20)
    assert cost(lambda: small.resize_(2).resize_(20)).new_bytes == 0


def test_reading_a_number_is_a_call_that_makes_nothing():
    got = cost(numbers(5)[2].item)
    assert (got.calls, got.elementwise, got.new_bytes) == (1, 0, 0)


def test_borrowed_and_meta_memory_has_no_bytes():
    array = np.ones(5, dtype=np.float32)
    assert cost(torch.from_numpy, array).new_bytes == 0
    got = cost(lambda: torch.empty(100, 10, device="meta") @ torch.ones(10, 7, device="meta"))
    assert (got.new_bytes, got.peak_bytes, got.flops) == (0, 0, 2 * 100 * 10 * 7)


def test_an_optimizer_step_can_be_counted():
    layer = nn.Linear(3, 2)
    layer(numbers(4, 3)).sum().backward()
    got = cost(torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False).step)
    assert (got.calls, got.new_bytes, got.ops) == (2, 0, (("add_", 2),))


def test_composite_functions_count_as_what_they_run():
    got = cost(F.softmax, numbers(3, 4), -1)
    assert (got.calls, got.elementwise) == (1, 12)
    assert cost(F.rms_norm, numbers(3, 4), (4,)).calls > 3
    assert sum(count for _, count in got.ops) == got.calls


def test_shapes_show_what_was_produced():
    x, y = numbers(5, 8), numbers(6, 8)
    naive = cost(lambda: (x[:, None] - y).pow(2).sum(-1))
    thrifty = cost(lambda: x.pow(2).sum(-1, keepdim=True) - 2 * x @ y.T + y.pow(2).sum(-1))
    assert (5, 6, 8) in naive.shapes
    assert (5, 6, 8) not in thrifty.shapes
    assert thrifty.largest == 8 * 6
    assert (5, 1, 8) not in naive.shapes  # a view


# bytes


def test_growing_a_cache_by_cat_is_quadratic():
    steps, width = 128, 128
    row = 4 * width

    def by_cat():
        cache = torch.empty(0, width)
        for _ in range(steps):
            cache = torch.cat([cache, torch.ones(1, width)])
        return cache

    def preallocated():
        cache = torch.empty(steps, width)
        for t in range(steps):
            cache[t : t + 1] = torch.ones(1, width)
        return cache

    assert cost(by_cat).new_bytes == row * (steps * (steps + 1) // 2 + steps) == 4_292_608
    assert cost(preallocated).new_bytes == row * 2 * steps == 131_072
    assert cost(by_cat).peak_bytes == row * (steps - 1 + 1 + steps)
    assert cost(preallocated).peak_bytes == row * (steps + 1)


def test_repeated_heads_cost_bytes_and_grouped_ones_do_not():
    heads, groups, length, width = 8, 2, 64, 16
    q, k = numbers(1, heads, 1, width), numbers(1, groups, length, width)

    def repeated():
        return q @ k.repeat_interleave(heads // groups, dim=1).mT

    def grouped():
        return (q.view(1, groups, heads // groups, width) @ k.mT).view(1, heads, 1, length)

    a, one = measure(repeated)
    b, other = measure(grouped)
    torch.testing.assert_close(a, b)
    scores = 4 * heads * length
    assert one.flops == other.flops == 2 * heads * length * width
    assert one.new_bytes == scores + 4 * heads * length * width
    assert other.new_bytes == scores


def test_freed_temporaries_leave_the_live_count():
    a = numbers(20, 20)
    size = 4 * 400

    def chain():
        x = a @ a
        for _ in range(10):
            x = x @ a
        return x

    def keeping():
        found = [a @ a]
        for _ in range(10):
            found.append(found[-1] @ a)
        return found

    assert cost(chain).new_bytes == cost(keeping).new_bytes == 11 * size
    assert cost(chain).peak_bytes == 2 * size
    assert cost(keeping).peak_bytes == 11 * size
    with Meter() as meter:
        x = a @ a
        y = x[1:]
        assert meter.live_bytes == size
        del x
        assert meter.live_bytes == size  # the view holds the storage
        del y
        assert meter.live_bytes == 0
        z = a @ a
    assert z.shape == a.shape
    assert (meter.cost.peak_bytes, meter.live_bytes) == (size, 0)


def test_a_graph_holds_bytes_until_backward_has_run():
    x = numbers(100, grad=True)
    with Meter() as meter:
        loss = x.exp().exp().sum()
        assert meter.live_bytes == 400 + 400 + 4
        loss.backward()
        del loss
        assert meter.live_bytes == 400  # the gradient
        x.grad = None
        assert meter.live_bytes == 0


def test_what_was_made_before_is_not_new():
    x = numbers(100)
    with Meter() as meter:
        x.mul_(2).view(10, 10).t()
        del x
    assert (meter.cost.new_bytes, meter.cost.peak_bytes) == (0, 0)


def test_cycles_stay_live_until_they_are_collected():
    def make():
        for _ in range(50):
            holder = [torch.ones(10)]
            holder.append(holder)

    assert cost(make).peak_bytes == 50 * 40
    with Meter() as meter:
        make()
        gc.collect()
        assert meter.live_bytes == 0


def test_the_meter_keeps_no_tensor_alive():
    with Meter() as meter:
        x = numbers(5, grad=True)
        y = (x[:, None] * x).sum(0).exp()
        refs = [weakref.ref(thing) for thing in (x, y, x.untyped_storage(), y.untyped_storage())]
        del x, y
        assert not any(ref() is not None for ref in refs)
    assert meter.cost.calls == 4


def test_outputs_that_are_saved_do_not_hold_themselves():
    with Meter():
        y = numbers(5, grad=True).exp().sigmoid().tanh()
        ref = weakref.ref(y.untyped_storage())
        del y
        assert ref() is None


# saved bytes


X = numbers(1000, grad=True)
SAVED = {
    "relu": (torch.relu, 4000),
    "gelu": (F.gelu, 4000),
    "silu": (F.silu, 4000),
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), 8000),
    "x + 1": (lambda x: x + 1, 0),
    "2 x": (lambda x: 2 * x, 0),
    "sigmoid": (torch.sigmoid, 4000),
    "x * x": (lambda x: x * x, 4000),
    "x by x": (lambda x: torch.outer(x, x), 4000),
    "a slice keeps its whole storage": (lambda x: x[:10].exp() + x[:10] ** 2, 4000 + 40),
    "a parameter": (lambda x: F.linear(x, WEIGHT), 4000 + 8000),
    "a module": (nn.Sequential(nn.Linear(1000, 3), nn.Tanh()), 4000 + 12000 + 12),
}
WEIGHT = numbers(2, 1000, grad=True)


@pytest.mark.parametrize("name", SAVED)
def test_bytes_saved_for_backward(name):
    fn, expected = SAVED[name]
    assert saved_bytes(fn, X) == expected
    with torch.no_grad():
        assert saved_bytes(fn, X) == 0
    with Meter(saved=False) as meter:
        fn(X)
    assert meter.cost.saved_bytes == 0


def test_saved_bytes_of_graphs_that_come_and_go_are_those_of_the_largest():
    def steps(n):
        for _ in range(n):
            X.exp().sum().backward()
        X.grad = None

    assert saved_bytes(steps, 1) == saved_bytes(steps, 5) == 4000


def test_custom_functions_are_seen():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    x = numbers(6, grad=True)
    with Meter() as meter:
        Square.apply(x).sum().backward()
    assert meter.cost.saved_bytes == 24
    torch.testing.assert_close(x.grad, 2 * x.detach())
    x = x.detach().double().requires_grad_()
    with Meter():
        assert torch.autograd.gradcheck(Square.apply, x)


def test_hooks_of_the_code_inside_decide_what_is_kept():
    x = numbers(1000, grad=True)

    def halved():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.half(), "note"), lambda p: p[0].float()):
            y = x.exp()
        return y.exp()

    y, got = measure(halved)
    assert got.saved_bytes == 2000 + 4000
    y.sum().backward()
    torch.testing.assert_close(x.grad, (x.exp() * x.exp().exp()).detach(), rtol=1e-2, atol=1e-3)

    with torch.autograd.graph.save_on_cpu():
        assert saved_bytes(torch.exp, x) == 4000


def test_hooks_around_the_meter_still_work():
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.detach().half()

    x = numbers(1000, grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda p: p.float()):
        with Meter() as outer, Meter() as inner:
            x.exp()
    assert packed == [(1000,)]
    assert outer.cost.saved_bytes == inner.cost.saved_bytes == 2000


def test_checkpoint_saves_the_input_and_pays_twice():
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    x = numbers(5, 8, grad=True)

    def body(h):
        for layer in layers:
            h = layer(h).tanh()
        return h

    plain, got = measure(body, x)
    thrifty, saved = measure(checkpoint, body, x, use_reentrant=False)
    assert torch.equal(plain, thrifty)
    assert saved.saved_bytes == 4 * 5 * 8 < got.saved_bytes
    _, once = measure(lambda: body(x).sum().backward())
    _, twice = measure(lambda: checkpoint(body, x, use_reentrant=False).sum().backward())
    assert twice.flops - once.flops == got.flops


def test_overwriting_a_saved_tensor_is_still_an_error():
    x = numbers(5, grad=True)
    with Meter():
        y = x.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation.*version 1; expected version 0"):
            y.sum().backward()
        z = x * 2
        w = z * z
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()


def test_gradients_do_not_change_under_a_meter():
    def gradients():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 1))
        x = numbers(3, 4, grad=True)
        (gx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gx.pow(2).sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    for plain, metered in zip(gradients(), measure(gradients)[0], strict=True):
        assert torch.equal(plain, metered)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
def test_functional_transforms_run_under_a_meter():
    got, spent = measure(lambda: torch.func.hessian(lambda x: (x**3).sum())(torch.ones(2)))
    torch.testing.assert_close(got, 6 * torch.eye(2))
    assert spent.calls > 0
    out, spent = measure(torch.func.vmap(torch.dot), numbers(3, 4), numbers(3, 4))
    assert (out.shape, spent.flops) == ((3,), 2 * 3 * 4)
    assert saved_bytes(torch.exp, X) == 4000


# meters


def test_inner_meters_count_for_outer_ones():
    a = numbers(3, 3, grad=True)
    with Meter() as outer:
        a @ a
        with Meter() as inner:
            kept = (a @ a).exp()
        a + 1
    assert inner.cost.flops == 54
    assert outer.cost.flops == 108
    assert (inner.cost.calls, outer.cost.calls) == (2, 4)
    assert inner.cost.saved_bytes == outer.cost.saved_bytes == 36 + 36
    assert outer.cost.new_bytes == 4 * 36
    assert kept.shape == (3, 3)


def test_a_meter_entered_twice_counts_once_and_starts_again_later():
    a = numbers(3, 3)
    meter = Meter()
    assert meter.cost == Cost()
    with meter:
        a @ a
        with meter:
            a @ a
            assert meter.cost.flops == 108
        a @ a
        assert meter.cost.flops == 162
    assert meter.cost.flops == 162
    with meter:
        a @ a
    assert meter.cost.flops == 54


def test_pause_hides_from_one_meter_and_unmetered_from_all():
    a = numbers(3, 3, grad=True)
    with Meter() as outer, Meter() as inner:
        with inner.pause():
            a @ a
        with unmetered():
            hidden = (a @ a).exp()
            with Meter() as own:
                a + 1
        with unmetered(), unmetered():
            pass
        visible = hidden.mul_(2)
    assert (outer.cost.calls, inner.cost.calls, own.cost.calls) == (2, 1, 1)
    assert (outer.cost.new_bytes, inner.cost.new_bytes) == (36, 0)
    assert (outer.cost.saved_bytes, inner.cost.saved_bytes) == (36, 0)
    assert visible is hidden
    with unmetered(), Meter().pause():
        pass


def test_an_exception_leaves_everything_as_it_was():
    a, wrong = numbers(3, 3, grad=True), numbers(4, 4)
    meter = Meter()
    with pytest.raises(ZeroDivisionError), Meter() as outer, meter, unmetered():
        raise ZeroDivisionError
    assert _get_current_dispatch_mode() is None
    with meter:
        a.exp()
        with pytest.raises(RuntimeError):
            a @ wrong
        with contextlib.suppress(KeyError), meter.pause():
            raise KeyError
        a @ a
    assert outer.cost == Cost()
    assert meter.cost.ops == (("exp", 1), ("mm", 1))


def test_two_runs_cost_the_same_to_the_last_byte():
    def training():
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.randn(2, 5, 16)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
        return loss.detach()

    loss, first = measure(training)
    garbage = []
    for _ in range(1000):  # other history, other addresses, other moments for the garbage collector
        garbage.append([torch.ones(7), garbage])
    again, second = measure(training)
    assert torch.equal(loss, again)
    assert first == second
    assert first.peak_bytes < first.new_bytes
    with Meter(saved=False) as meter:
        training()
    assert {**vars(meter.cost), "saved_bytes": first.saved_bytes} == vars(first)


def test_the_first_run_in_a_process_costs_what_later_runs_cost():
    code = """
import sys, torch
from checker.judge.meter import measure
from torch.utils.checkpoint import checkpoint
def work():
    w = torch.ones(4, 4, requires_grad=True)
    y = checkpoint(lambda x: torch.einsum("ij,jk,kl->il", x, w, w).softmax(-1), w, use_reentrant=False)
    torch.nn.functional.rms_norm(y, (4,)).sum().backward()
    torch.optim.AdamW([w]).step()
measure(lambda: torch.ones(3) + 1)
assert "torch._dynamo" not in sys.modules, "the first call imports the compiler"
costs = [measure(work)[1] for _ in range(3)]
assert costs[0] == costs[1] == costs[2], costs
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[1])


def test_other_modes_see_the_same_under_a_meter():
    x = numbers(4, grad=True)

    def seen(around):
        log = []

        class Calls(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                log.append(func)
                return func(*args, **(kwargs or {}))

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                log.append(func)
                return func(*args, **(kwargs or {}))

        with around, Calls(), Ops():
            y = (x[:, None] * x).sum(0).exp()
            with torch.no_grad():
                y * 2
        # To save its own result an op detaches it, for the hooks of a meter too, but unseen there.
        return [func for func in log if func is not torch.ops.aten.detach.default]

    plain = seen(contextlib.nullcontext())
    assert seen(Meter()) == plain
    assert len(plain) > 5


def test_hidden_saves_of_other_threads_are_left_alone():
    x = numbers(1000, grad=True)

    def elsewhere():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            x.exp()

    with Meter() as meter:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert meter.cost == Cost()


def test_sparse_tensors_pass_through():
    got = cost(lambda: torch.eye(3).to_sparse().to_dense() + 1)
    assert got.calls > 0


def test_the_overhead_is_small():
    x = torch.ones(4)

    def loop():
        for _ in range(2000):
            x + x

    def seconds():
        start = time.perf_counter()
        loop()
        return time.perf_counter() - start

    with Meter():
        best = min(seconds() for _ in range(5))
    assert best / 2000 < 200e-6  # about 10 microseconds here; the promise is 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_same_on_cuda():
    def work(device):
        a = numbers(8, 8).to(device).requires_grad_()
        b = (a[:, :, None] * (a @ a)).sum(1).exp()
        b.sum().backward()
        return a.grad

    here, there = cost(work, "cpu"), cost(work, "cuda")
    assert (here.flops, here.matmuls, here.saved_bytes) == (there.flops, there.matmuls, there.saved_bytes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        a = torch.ones(4, 4, device="cuda", requires_grad=True)
        got = cost(lambda: (a[:, :, None] * a).sum(1).exp())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got.flops, got.new_bytes) == (2 * 64, 4 * (64 + 16 + 16))
