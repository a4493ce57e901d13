import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    noncontiguous,
    same_storage,
    task,
    unchanged,
)

NEAR = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}
DOUBLE = torch.float64


# conv_output_size


def windows(n, k, stride, padding, dilation):
    """Lay one window after the other, and count those that end inside."""
    return sum(1 for start in range(-padding, n + padding, stride) if start + dilation * (k - 1) < n + padding)


@task("conv_output_size")
@pytest.mark.parametrize(
    "n, k, options",
    [
        (9, 1, {}),
        (9, 4, {}),
        (7, 7, {}),
        (10, 3, {"stride": 2}),
        (9, 3, {"stride": 2}),
        (12, 5, {"padding": 2}),
        (4, 5, {"padding": 1}),
        (13, 3, {"dilation": 4}),
        (9, 3, {"dilation": 4}),
        (11, 2, {"stride": 4, "padding": 1, "dilation": 3}),
        (224, 7, {"stride": 2, "padding": 3}),
    ],
    ids=str,
)
def test_windows_are_counted(solution, n, k, options):
    expected = windows(n, k, *(options.get(name, int(name != "padding")) for name in ("stride", "padding", "dilation")))
    found = solution.conv_output_size(n, k, **options)
    assert_equal(found, expected, because=f"windows of {k} taps that fit into {n} places, {options}")


@task("conv_output_size")
def test_all_small_sizes(solution):
    for n, k, stride, padding, dilation in itertools.product(range(1, 8), range(1, 4), (1, 2, 3), (0, 1, 2), (1, 2)):
        expected = windows(n, k, stride, padding, dilation)
        if expected:
            found = solution.conv_output_size(n, k, stride, padding, dilation)
            because = f"n = {n}, k = {k}, stride = {stride}, padding = {padding}, dilation = {dilation}"
            assert_equal(found, expected, because=because)


@task("conv_output_size")
@pytest.mark.parametrize(
    "n, k, options",
    [
        (2, 3, {}),
        (1, 6, {}),
        (3, 4, {"stride": 3}),
        (4, 3, {"dilation": 2}),
        (4, 7, {"padding": 1, "stride": 2}),
        (0, 1, {}),
    ],
    ids=str,
)
def test_a_kernel_that_does_not_fit(solution, n, k, options):
    because = f"{k} taps do not fit into {n} places, {options}"
    assert_raises(ValueError, solution.conv_output_size, n, k, **options, mentions=[str(n), str(k)], because=because)


@task("conv_output_size")
@pytest.mark.parametrize("n, k, stride", [(3, 4, 3), (2, 4, 5), (1, 3, 2)], ids=str)
def test_a_kernel_that_is_a_little_too_large(solution, n, k, stride):
    try:
        found = solution.conv_output_size(n, k, stride)
    except ValueError:
        return
    assert_that(False, f"{k} taps do not fit into {n} places, whatever the stride ({stride})", value=found)


# pad2d


SIDES = [0, 1, 3, (1, 2, 3, 4), (2, 0, 0, 0), (0, 2, 0, 0), (0, 0, 2, 0), (0, 0, 0, 2)]


def framed(x, p, value):
    left, right, top, bottom = (p,) * 4 if isinstance(p, int) else p
    array = np.pad(x.cpu().numpy(), ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value)
    return torch.from_numpy(array)


@task("pad2d")
@pytest.mark.parametrize("p", SIDES, ids=str)
def test_zeros_around(solution, randn, p):
    x = randn(2, 3, 4, 5)
    expected = framed(x, p, 0.0)
    assert_equal(solution.pad2d(x, p), expected, because=f"{p}: one number for all sides, or left, right, top, bottom")


@task("pad2d")
@pytest.mark.parametrize("value", [1.5, -2, float("-inf")], ids=str)
def test_another_value_around(solution, randn, dtype, value):
    x = randn(2, 3, 4, 5, dtype=dtype)
    expected = framed(x, (1, 0, 2, 3), value)
    assert_equal(solution.pad2d(x, (1, 0, 2, 3), value), expected, because=f"a frame of {value}")


@task("pad2d")
def test_integers_and_half_precision_stay_what_they_are(solution, randn, randint):
    x, half = randint(0, 9, (1, 2, 3, 3)), randn(1, 2, 3, 3).bfloat16()
    expected, expected_half = framed(x, 2, 7), framed(half.float(), 1, 0.0).bfloat16()
    assert_equal(solution.pad2d(x, 2, 7), expected, because="int64 stays int64")
    assert_equal(solution.pad2d(half, 1), expected_half, because="bfloat16 stays bfloat16")


@task("pad2d")
def test_a_frame_around_other_strides(solution, randn):
    x = randn(2, 3, 4, 5)
    expected = framed(x, 1, 0.0)
    for other in (noncontiguous(x), x.to(memory_format=torch.channels_last)):
        assert_equal(solution.pad2d(other, 1), expected, because="strides do not matter")


@task("pad2d")
def test_no_images_to_pad(solution, randn):
    assert_equal(solution.pad2d(randn(0, 3, 4, 5), (1, 2, 3, 4)), torch.zeros(0, 3, 11, 8), because="B = 0")


@task("pad2d")
@pytest.mark.parametrize("p", [0, 2], ids=str)
def test_padded_images_have_their_own_memory(solution, randn, p):
    x = randn(2, 3, 4, 5)
    assert_that(not same_storage(solution.pad2d(x, p), x), "a change of the result must not reach x")


@task("pad2d")
def test_gradients_through_a_frame(solution, randn):
    inputs = [randn(2, 3, 4, 5, dtype=DOUBLE)]
    assert_gradients_close(
        lambda x: solution.pad2d(x, (1, 2, 0, 3), 4.0), lambda x: F.pad(x, (1, 2, 0, 3), value=4.0), inputs
    )


@task("pad2d")
@pytest.mark.parametrize("p", [-1, (1, 2), (1, 2, 3), (1, 2, 3, 4, 5), (0, -1, 0, 0), (1, 1, 1, -2)], ids=str)
def test_frames_that_make_no_sense(solution, randn, p):
    because = f"p = {p}: one number or four, none below 0"
    assert_raises(ValueError, solution.pad2d, randn(2, 3, 4, 5), p, mentions=[str(p)], because=because)


# im2col


COLUMNS = [  # x, kernel, stride, padding, dilation
    ((2, 3, 5, 6), 3, 1, 0, 1),
    ((2, 3, 5, 6), (2, 3), 1, 0, 1),
    ((1, 2, 7, 8), (3, 2), (2, 3), 0, 1),
    ((2, 2, 4, 5), 3, 1, (1, 0), 1),
    ((2, 2, 4, 5), 3, 1, (0, 1), 1),
    ((2, 3, 7, 6), 2, 1, 0, (3, 2)),
    ((3, 2, 6, 7), (3, 2), (1, 2), (2, 1), (2, 3)),
    ((2, 3, 4, 5), 1, 1, 0, 1),
    ((1, 1, 3, 4), (3, 4), 1, 0, 1),
    ((4, 4, 4, 4), 2, 2, 0, 1),
]


def unfolded(x, kernel, stride=1, padding=0, dilation=1):
    return F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)


@task("im2col")
@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_columns_are_patches(solution, randn, case):
    shape, *options = case
    x = randn(*shape, dtype=DOUBLE)
    expected = unfolded(x, *options)
    because = "x {}, kernel {}, stride {}, padding {}, dilation {}: as F.unfold has it".format(*case)
    assert_equal(solution.im2col(x, *options), expected, because=because)


@task("im2col")
def test_one_by_one_patches_touch(solution, randn, dtype):
    x = randn(2, 3, 5, 6, dtype=dtype)
    expected = unfolded(x, (2, 3))
    assert_equal(solution.im2col(x, (2, 3)), expected, because="stride 1, padding 0 and dilation 1 are the defaults")


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every other place": noncontiguous,
    "rows and columns exchanged": lambda x: x.mT,
    "images and channels exchanged": lambda x: x.transpose(0, 1),
    "a slice": lambda x: x[:, 1:, 1:, 2:],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@task("im2col")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [0, 1], ids=str)
def test_patches_of_other_layouts(solution, randn, layout, padding):
    x = LAYOUTS[layout](randn(2, 3, 5, 7))
    expected = unfolded(x.contiguous(), (2, 3), 2, padding)
    found = solution.im2col(x, (2, 3), 2, padding)
    assert_equal(found, expected, because=f"x is {layout}: its strides are not those of a new tensor")


@task("im2col")
def test_no_images_no_patches(solution, randn):
    assert_equal(solution.im2col(randn(0, 3, 5, 6), (3, 2), 2, 1), torch.zeros(0, 18, 12), because="B = 0")


@task("im2col")
@pytest.mark.parametrize("options", [(3, 1, 1, 1), ((3, 2), 2, (0, 1), (1, 2))], ids=str)
def test_gradients_add_up_where_patches_overlap(solution, randn, options):
    inputs = [randn(2, 3, 5, 6, dtype=DOUBLE)]
    assert_gradients_close(lambda x: solution.im2col(x, *options), lambda x: unfolded(x, *options), inputs)


@task("im2col")
@pytest.mark.parametrize("options", [(3, 1, 0, 1), ((2, 3), (2, 1), 0, (1, 2))], ids=str)
def test_patches_are_copied_once(solution, randn, options):
    x = randn(2, 3, 9, 8)
    limit = 4 * unfolded(x, *options).numel()
    assert_cost(solution.im2col, x, *options, max_new_bytes=limit, because="no memory but that of the result")


@task("im2col")
@pytest.mark.parametrize(
    "options", [((6, 2), 1, 0, 1), ((2, 6), 3, 0, 1), (3, 1, 0, (1, 3)), (3, 1, 0, (3, 1))], ids=str
)
def test_no_patch_fits(solution, randn, options):
    because = "kernel {}, stride {}, padding {}, dilation {} in an image of 5 x 5".format(*options)
    assert_raises(ValueError, solution.im2col, randn(2, 3, 5, 5), *options, because=because)


@cost_case("im2col")
def im2col_cost(module, randn):
    x = randn(2, 4, 16, 16)
    return lambda: module.im2col(x, 3, 1, 0, 1)


# conv2d


CONVOLUTIONS = [  # x, w, options
    ((2, 3, 5, 6), (4, 3, 3, 3), {}),
    ((2, 3, 5, 6), (4, 3, 2, 3), {"stride": 2}),
    ((2, 3, 5, 6), (4, 3, 3, 2), {"padding": 1}),
    ((1, 2, 7, 8), (3, 2, 2, 3), {"dilation": 2}),
    ((2, 4, 6, 7), (6, 2, 3, 2), {"groups": 2}),
    ((2, 4, 5, 6), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    ((2, 3, 5, 6), (6, 1, 2, 2), {"groups": 3}),
    ((3, 4, 8, 9), (6, 2, 3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3), "groups": 2}),
    ((3, 2, 9, 6), (4, 2, 3, 2), {"stride": (1, 3), "padding": (2, 0), "dilation": (3, 2)}),
    ((2, 3, 4, 5), (4, 3, 1, 1), {}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((0, 3, 5, 6), (4, 3, 3, 2), {"stride": 2}),
]


@task("conv2d")
@pytest.mark.parametrize("x, w, options", CONVOLUTIONS, ids=str)
def test_kernels_slide_over_images(solution, randn, x, w, options):
    because = f"x {x}, w {w}, {options}: as F.conv2d has it"
    x, w = randn(*x, dtype=DOUBLE), randn(*w, dtype=DOUBLE)
    expected = F.conv2d(x, w, **options)
    assert_close(solution.conv2d(x, w, **options), expected, because=because, **NEAR[DOUBLE])


@task("conv2d")
def test_nothing_is_flipped(solution, device):
    x = torch.zeros(1, 1, 3, 4, device=device)
    x[0, 0, 0, 0] = 1.0
    w = torch.arange(1.0, 7.0, device=device).reshape(1, 1, 2, 3)
    expected = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert_close(solution.conv2d(x, w), expected, because="the first place of the window meets the first tap")


@task("conv2d")
def test_a_bias_for_each_output_channel(solution, randn, dtype):
    x, w, b = randn(2, 3, 5, 6, dtype=dtype), randn(4, 3, 2, 3, dtype=dtype), randn(4, dtype=dtype)
    expected = F.conv2d(x, w, b)
    assert_close(solution.conv2d(x, w, b), expected, because="b[o] is added to all of channel o", **NEAR[dtype])


@task("conv2d")
def test_where_all_sizes_are_equal(solution, randn):
    x, w, b = (randn(*shape, dtype=DOUBLE) for shape in [(4, 4, 4, 4), (4, 4, 3, 3), (4,)])
    expected = F.conv2d(x, w, b, padding=1)
    found = solution.conv2d(x, w, b, padding=1)
    assert_close(found, expected, because="no shape tells channels from columns here", **NEAR[DOUBLE])


@task("conv2d")
def test_half_precision_images(solution, randn):
    x, w, b = randn(2, 3, 5, 6).bfloat16(), randn(4, 3, 2, 2).bfloat16(), randn(4).bfloat16()
    expected = F.conv2d(x.double(), w.double(), b.double()).bfloat16()
    assert_close(solution.conv2d(x, w, b), expected, rtol=2e-2, atol=2e-1, because="bfloat16 in, bfloat16 out")


@task("conv2d")
@pytest.mark.parametrize("layout", ["channels_last", "every other place"])
def test_images_and_kernels_of_other_layouts(solution, randn, layout):
    x, w = LAYOUTS[layout](randn(2, 4, 5, 6, dtype=DOUBLE)), LAYOUTS[layout](randn(6, 2, 3, 2, dtype=DOUBLE))
    expected = F.conv2d(x.contiguous(), w.contiguous(), groups=2)
    assert_close(solution.conv2d(x, w, groups=2), expected, because="strides do not matter", **NEAR[DOUBLE])


@task("conv2d")
@pytest.mark.parametrize("x, w, options", [CONVOLUTIONS[0], CONVOLUTIONS[5], CONVOLUTIONS[7]], ids=str)
def test_gradients_of_images_kernels_and_biases(solution, randn, x, w, options):
    inputs = [randn(*x, dtype=DOUBLE), randn(*w, dtype=DOUBLE), randn(w[0], dtype=DOUBLE)]
    assert_gradients_close(
        lambda x, w, b: solution.conv2d(x, w, b, **options), lambda x, w, b: F.conv2d(x, w, b, **options), inputs
    )


@task("conv2d")
def test_finite_differences_agree(solution, randn):
    inputs = [randn(1, 2, 3, 2), randn(2, 1, 2, 1), randn(2)]
    assert_gradcheck(lambda x, w, b: solution.conv2d(x, w, b, padding=(1, 0), groups=2), inputs)


@task("conv2d")
@pytest.mark.parametrize("x, w, options", [CONVOLUTIONS[1], CONVOLUTIONS[4], CONVOLUTIONS[8]], ids=str)
def test_a_convolution_is_matrix_products(solution, randn, x, w, options):
    x, w = randn(*x), randn(*w)
    B, O, Ho, Wo = F.conv2d(x, w, **options).shape  # noqa: E741
    flops = 2 * B * O * Ho * Wo * w[0].numel()
    assert_cost(solution.conv2d, x, w, **options, flops=flops, because=f"{options}: each tap meets each place once")


@task("conv2d")
@pytest.mark.parametrize("x, w, options", [CONVOLUTIONS[5], CONVOLUTIONS[6]], ids=str)
def test_groups_save_products(solution, randn, x, w, options):
    x, w = randn(*x), randn(*w)
    flops = 2 * F.conv2d(x, w, **options).numel() * w[0].numel()
    because = f"{options}: no output meets the channels of another group"
    assert_cost(solution.conv2d, x, w, **options, max_flops=flops, because=because)


@task("conv2d")
@pytest.mark.parametrize(
    "x, w, groups",
    [
        ((2, 3, 5, 6), (4, 2, 3, 3), 1),
        ((2, 4, 5, 6), (4, 4, 3, 3), 2),
        ((2, 4, 5, 6), (3, 2, 3, 3), 2),
        ((2, 2, 5, 6), (4, 1, 3, 3), 1),
    ],
    ids=str,
)
def test_kernels_that_do_not_fit(solution, randn, x, w, groups):
    because = f"x {x} and w {w} in {groups} groups"
    args = randn(*x), randn(*w)
    assert_raises(ValueError, solution.conv2d, *args, groups=groups, mentions=[str(x), str(w)], because=because)


@task("conv2d")
@pytest.mark.parametrize("b", [(3,), (1,), (), (4, 1, 1)], ids=str)
def test_a_bias_that_does_not_fit(solution, randn, b):
    args = randn(2, 3, 5, 6), randn(4, 3, 2, 3), randn(*b)
    because = f"b {b}: one number for each of 4 outputs is needed"
    assert_raises(ValueError, solution.conv2d, *args, mentions=[str(b), "(4, 3, 2, 3)"], because=because)


@task("conv2d")
def test_a_kernel_larger_than_the_image(solution, randn):
    because = "a kernel of 2 x 4 on an image of 5 x 3"
    assert_raises(ValueError, solution.conv2d, randn(2, 3, 5, 3), randn(4, 3, 2, 4), stride=2, because=because)


@cost_case("conv2d")
def conv2d_cost(module, randn):
    x, w = randn(2, 4, 16, 16), randn(8, 2, 3, 3)
    return lambda: module.conv2d(x, w, padding=1, groups=2)


# max_pool2d and avg_pool2d


POOLS = [  # x, then what F.max_pool2d takes
    ((3, 3, 4, 6), {"k": 2}),
    ((3, 1, 7, 8), {"k": 3}),
    ((3, 3, 6, 7), {"k": (2, 3), "stride": 1}),
    ((1, 3, 7, 9), {"k": (3, 2), "stride": (1, 3)}),
    ((3, 3, 5, 6), {"k": 3, "stride": 2, "padding": 1}),
    ((3, 3, 5, 6), {"k": (4, 2), "stride": 1, "padding": (2, 0)}),
    ((3, 3, 5, 6), {"k": (3, 2), "padding": (0, 1)}),
    ((3, 3, 3, 3), {"k": 2, "padding": 1}),
    ((0, 3, 4, 5), {"k": 2, "stride": 1}),
]


def named(options):
    return {"kernel_size" if name == "k" else name: value for name, value in options.items()}


@task("max_pool2d")
@pytest.mark.parametrize("shape, options", POOLS, ids=str)
def test_the_largest_of_each_window(solution, randn, shape, options):
    x = randn(*shape)
    expected = F.max_pool2d(x, **named(options))
    assert_equal(solution.max_pool2d(x, **options), expected, because=f"x {shape}, {options}")


@task("max_pool2d")
def test_padding_never_wins(solution, rand, dtype):
    x = -1.0 - rand(2, 3, 5, 6).to(dtype)
    expected = F.max_pool2d(x, 3, 2, 1)
    assert_equal(solution.max_pool2d(x, 3, 2, 1), expected, because="all values are below 0, so no result is 0")


@task("max_pool2d")
@pytest.mark.parametrize("layout", ["channels_last", "every other place", "a slice"])
def test_the_largest_in_other_layouts(solution, randn, layout):
    x = LAYOUTS[layout](randn(2, 3, 6, 7))
    expected = F.max_pool2d(x.contiguous(), (2, 3))
    assert_equal(solution.max_pool2d(x, (2, 3)), expected, because="strides do not matter")


@task("max_pool2d")
@pytest.mark.parametrize("options", [{"k": 2}, {"k": 3, "stride": 1, "padding": 1}], ids=str)
def test_gradients_go_to_the_largest(solution, randperm, options):
    inputs = [randperm(48).reshape(1, 2, 4, 6).to(DOUBLE)]
    assert_gradients_close(
        lambda x: solution.max_pool2d(x, **options), lambda x: F.max_pool2d(x, **named(options)), inputs
    )


@task("max_pool2d")
@pytest.mark.parametrize("value", [0.0, -3.0], ids=str)
def test_ties_have_one_winner(solution, device, value):
    x = torch.full((2, 3, 4, 6), value, device=device, dtype=DOUBLE, requires_grad=True)
    y = solution.max_pool2d(x, 2)
    assert_that(y.requires_grad, "the result has a graph")
    y.sum().backward()
    shares = x.grad.reshape(2, 3, 2, 2, 3, 2).transpose(3, 4).flatten(4).sort(dim=-1, descending=True).values
    expected = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=DOUBLE).expand(2, 3, 2, 3, 4)
    assert_equal(shares, expected.contiguous(), because="of four equal places one gets the whole gradient")


def refuses(function, randn, k, padding):
    because = f"padding {padding} is more than half of a window of {k}"
    mentions = [str(padding), str(k)]
    assert_raises(ValueError, function, randn(2, 3, 6, 7), k, 1, padding, mentions=mentions, because=because)


@task("max_pool2d")
@pytest.mark.parametrize("k, padding", [(3, 2), ((2, 6), (2, 0)), ((6, 3), (0, 2))], ids=str)
def test_too_much_padding_for_a_maximum(solution, randn, k, padding):
    refuses(solution.max_pool2d, randn, k, padding)


@task("max_pool2d")
@pytest.mark.parametrize("k", [(5, 2), (2, 6)], ids=str)
def test_no_window_to_look_through(solution, randn, k):
    because = f"a window of {k} on an image of 4 x 5"
    assert_raises(ValueError, solution.max_pool2d, randn(2, 3, 4, 5), k, because=because)


@task("avg_pool2d")
@pytest.mark.parametrize("shape, options", POOLS, ids=str)
def test_the_mean_of_each_window(solution, randn, shape, options):
    x = randn(*shape, dtype=DOUBLE)
    expected = F.avg_pool2d(x, **named(options))
    found = solution.avg_pool2d(x, **options)
    assert_close(found, expected, because=f"x {shape}, {options}: padding counts", **NEAR[DOUBLE])


@task("avg_pool2d")
@pytest.mark.parametrize("shape, options", [POOLS[1], *POOLS[4:]], ids=str)
def test_the_mean_of_what_is_inside(solution, randn, dtype, shape, options):
    x = randn(*shape, dtype=dtype)
    expected = F.avg_pool2d(x, **named(options), count_include_pad=False)
    found = solution.avg_pool2d(x, **options, count_include_pad=False)
    assert_close(found, expected, because=f"x {shape}, {options}: padding does not count", **NEAR[dtype])


@task("avg_pool2d")
@pytest.mark.parametrize("layout", ["channels_last", "every other place", "a slice"])
def test_the_mean_in_other_layouts(solution, randn, layout):
    x = LAYOUTS[layout](randn(2, 3, 6, 7, dtype=DOUBLE))
    expected = F.avg_pool2d(x.contiguous(), (2, 3))
    assert_close(solution.avg_pool2d(x, (2, 3)), expected, because="strides do not matter", **NEAR[DOUBLE])


@task("avg_pool2d")
@pytest.mark.parametrize("count", [True, False], ids=str)
def test_half_precision_means(solution, randn, count):
    x = randn(2, 3, 5, 6).bfloat16()
    expected = F.avg_pool2d(x.double(), 3, 2, 1, count_include_pad=count).bfloat16()
    found = solution.avg_pool2d(x, 3, 2, 1, count)
    assert_close(found, expected, rtol=2e-2, atol=2e-2, because="bfloat16 in, bfloat16 out")


@task("avg_pool2d")
@pytest.mark.parametrize("count", [True, False], ids=str)
def test_gradients_are_shared(solution, randn, count):
    assert_gradients_close(
        lambda x: solution.avg_pool2d(x, 3, 2, 1, count),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=count),
        [randn(3, 3, 5, 6, dtype=DOUBLE)],
    )


@task("avg_pool2d")
@pytest.mark.parametrize("k, padding", [(3, 2), ((2, 6), (2, 0)), ((6, 3), (0, 2))], ids=str)
def test_too_much_padding_for_a_mean(solution, randn, k, padding):
    refuses(solution.avg_pool2d, randn, k, padding)


# receptive_field


STACKS = [
    [],
    [(3, 1, 1)],
    [(2, 3, 1)],
    [(3, 1, 4)],
    [(3, 2, 1), (3, 1, 1)],
    [(3, 1, 1), (3, 2, 1)],
    [(3, 2, 1), (2, 2, 1), (3, 1, 2)],
    [(1, 3, 1), (2, 2, 3), (4, 1, 1)],
    [(2, 1, 1), (2, 1, 2), (2, 1, 4), (2, 1, 8)],
]


def reach(layers, device):
    """By the gradients of two neighbors in the middle: the first and the last place of the input that count."""
    x = torch.zeros(1, 1, 200, dtype=DOUBLE, device=device, requires_grad=True)
    y = x
    for k, s, d in layers:
        y = F.conv1d(y, torch.ones(1, 1, k, dtype=DOUBLE, device=device), stride=s, dilation=d)
    middle = y.shape[2] // 2
    ends = []
    for place in (middle, middle + 1):
        (grad,) = torch.autograd.grad(y[0, 0, place] * 1.0, x, retain_graph=True)
        seen = grad[0, 0].nonzero()
        ends.append((int(seen.min()), int(seen.max())))
    return ends[0][1] - ends[0][0] + 1, ends[1][0] - ends[0][0]


@task("receptive_field")
@pytest.mark.parametrize("layers", STACKS, ids=str)
def test_gradients_show_what_is_seen(solution, device, layers):
    expected = reach(layers, device)
    because = f"size and jump of {layers}, from the gradients of two neighboring outputs"
    assert_equal(solution.receptive_field(list(layers)), expected, because=because)


@task("receptive_field")
def test_a_deep_stack(solution):
    assert_equal(solution.receptive_field([(3, 2, 1)] * 7), (255, 128), because="seven layers of 3 with stride 2")


# Conv2d


LAYERS = [
    ((4, 6, 3), {}),
    ((4, 6, (2, 3)), {"stride": (2, 1)}),
    ((4, 6, 3), {"padding": (1, 2)}),
    ((4, 6, 2), {"dilation": (2, 3)}),
    ((4, 6, (3, 1)), {"groups": 2}),
    ((4, 6, 2), {"bias": False}),
    ((4, 8, 2, 2, 1, 2, 4, False), {}),
]


def like_pytorch(args, options, device, dtype=DOUBLE):
    return nn.Conv2d(*args, **options, device=device, dtype=dtype)


@task("Conv2d")
@pytest.mark.parametrize("args, options", LAYERS, ids=str)
def test_a_layer_with_weights_of_pytorch(solution, randn, device, args, options):
    theirs = like_pytorch(args, options, device)
    for parameter in theirs.parameters():
        parameter.data = randn(*parameter.shape, dtype=DOUBLE)
    x = randn(2, 4, 7, 8, dtype=DOUBLE)
    expected = theirs(x).detach()
    layer = solution.Conv2d(*args, **options, device=device, dtype=DOUBLE)
    layer.load_state_dict(theirs.state_dict())
    with unchanged(x), torch.no_grad():
        found = layer(x)
    assert_close(found, expected, because=f"Conv2d{args} with {options}", **NEAR[DOUBLE])


@task("Conv2d")
@pytest.mark.parametrize("args, options", [LAYERS[1], LAYERS[4], LAYERS[5]], ids=str)
def test_its_weights_load_into_pytorch(solution, device, args, options):
    layer, theirs = solution.Conv2d(*args, **options, device=device), like_pytorch(args, options, device, torch.float32)
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert_equal(found, expected, because="names and shapes of the state dict")
    trained = sorted(name for name, parameter in layer.named_parameters() if parameter.requires_grad)
    assert_equal(trained, sorted(expected), because="all of them are parameters")


@task("Conv2d")
def test_a_layer_without_bias(solution):
    assert_that(solution.Conv2d(4, 6, 3, bias=False).bias is None, "bias is None with bias=False")


@task("Conv2d")
def test_gradients_reach_the_parameters(solution, randn, device):
    theirs, layer = like_pytorch((4, 6, 3), {}, device), solution.Conv2d(4, 6, 3, device=device, dtype=DOUBLE)
    layer.load_state_dict(theirs.state_dict())
    x, weights = randn(2, 4, 5, 6, dtype=DOUBLE), randn(2, 6, 3, 4, dtype=DOUBLE)
    (theirs(x) * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    (layer(x) * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert_close(found, expected, because="gradients of weight and bias", **NEAR[DOUBLE])


@task("Conv2d")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_first_weights_stay_within_their_bound(solution, name):
    layer = solution.Conv2d(8, 256, (3, 5), groups=2)  # 4 channels and 15 taps meet in one output
    values = getattr(layer, name).detach().double() * 60**0.5
    largest, positive = float(values.abs().max()), float((values > 0).double().mean())
    spread = float(values.square().mean()) * 3
    because = f"the largest of {name}, in units of 1 / sqrt(fan_in)"
    assert_that(0.9 < largest < 1.00001, because, value=round(largest, 1))
    assert_that(0.25 < positive < 0.75, f"about half of {name} is above 0", value=round(positive, 1))
    limit = 0.1 if name == "weight" else 0.5
    assert_that(abs(spread - 1) < limit, f"{name} is spread evenly", value=round(spread, 1))


@task("Conv2d")
def test_parameters_are_where_they_should_be(solution, device):
    layer = solution.Conv2d(4, 6, 3, device=device, dtype=DOUBLE)
    found = [(str(parameter.dtype), parameter.device.type) for parameter in layer.parameters()]
    assert_equal(found, [("torch.float64", device.type)] * 2, because="dtype and device of both parameters")
    nowhere = [parameter.device.type for parameter in solution.Conv2d(4, 6, 3, device="meta").parameters()]
    assert_equal(nowhere, ["meta"] * 2, because='on device="meta" nothing is allocated')


@task("Conv2d")
@pytest.mark.parametrize("c, o", [(4, 6), (6, 4), (3, 5)], ids=str)
def test_groups_that_do_not_divide(solution, c, o):
    because = f"4 groups of {c} channels and {o} outputs"
    assert_raises(ValueError, solution.Conv2d, c, o, 3, groups=4, mentions=[str(c), str(o)], because=because)


# SmallCNN


def bar_images(n, size, device, generator):
    """Noisy images with a bar, and which way it lies: what the stub ships."""
    labels = torch.randint(0, 4, (n,), generator=generator)
    centers = torch.randint(3, size - 3, (n, 1, 2), generator=generator)
    directions = torch.tensor([[0, 1], [1, 0], [1, 1], [1, -1]])
    places = centers + torch.arange(-2, 3)[:, None] * directions[labels][:, None]
    images = 0.3 * torch.randn(n, 1, size, size, generator=generator)
    images[torch.arange(n)[:, None], 0, places[..., 0], places[..., 1]] += 1.0
    return images.to(device), labels.to(device)


def shapes_of(n_classes):
    return {
        "conv1.weight": (8, 1, 3, 3),
        "conv1.bias": (8,),
        "conv2.weight": (16, 8, 3, 3),
        "conv2.bias": (16,),
        "head.weight": (n_classes, 16),
        "head.bias": (n_classes,),
    }


def logits(weights, x):
    x = F.conv2d(x, weights["conv1.weight"], weights["conv1.bias"], padding=1)
    x = F.max_pool2d(F.relu(x), 2)
    x = F.relu(F.conv2d(x, weights["conv2.weight"], weights["conv2.bias"], padding=1))
    return F.linear(F.adaptive_max_pool2d(x, 1).flatten(1), weights["head.weight"], weights["head.bias"])


def small_cnn(solution, randn, device, n_classes=4):
    """The learner's network in float64 with random weights, and these weights."""
    weights = {name: randn(*shape, dtype=DOUBLE, scale=0.5) for name, shape in shapes_of(n_classes).items()}
    model = solution.SmallCNN(n_classes).to(device, DOUBLE)
    model.load_state_dict(weights)
    return model, weights


@task("SmallCNN")
@pytest.mark.parametrize("n_classes", [4, 3], ids=str)
def test_what_the_network_holds(solution, n_classes):
    found = {name: tuple(value.shape) for name, value in solution.SmallCNN(n_classes).state_dict().items()}
    assert_equal(found, shapes_of(n_classes), because="names and shapes of the state dict")


@task("SmallCNN")
@pytest.mark.parametrize("size", [(12, 12), (20, 16), (7, 9), (2, 5), (2, 2)], ids=str)
def test_logits_for_images_of_any_size(solution, randn, device, size):
    model, weights = small_cnn(solution, randn, device)
    x = randn(3, 1, *size, dtype=DOUBLE)
    expected = logits(weights, x)
    with unchanged(x), torch.no_grad():
        found = model(x)
    assert_close(found, expected, because=f"images of {size}: the network that is described", **NEAR[DOUBLE])


@task("SmallCNN")
def test_no_images_no_logits(solution, randn, device):
    model, _ = small_cnn(solution, randn, device)
    found = model(randn(0, 1, 8, 8, dtype=DOUBLE))
    assert_equal(tuple(found.shape), (0, 4), because="B = 0")


@task("SmallCNN")
def test_gradients_reach_all_weights(solution, randn, device):
    model, weights = small_cnn(solution, randn, device)
    x, factors = randn(3, 1, 8, 9, dtype=DOUBLE), randn(3, 4, dtype=DOUBLE)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    (logits(leaves, x) * factors).sum().backward()
    expected = {name: leaf.grad for name, leaf in leaves.items()}
    (model(x) * factors).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(found, expected, because="gradients of all weights", **NEAR[DOUBLE])


def adam(model, batches, lr=0.01):
    """Plain Adam: torch's own would import a compiler first, which takes longer than the whole training."""
    parameters = list(model.parameters())
    means = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]
    for step, (x, y) in enumerate(batches, 1):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        with torch.no_grad():
            for parameter, grad, (mean, square) in zip(parameters, grads, means, strict=True):
                mean.lerp_(grad, 0.1)
                square.lerp_(grad.square(), 0.001)
                parameter -= lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)


@task("SmallCNN")
def test_bars_are_told_apart_also_in_larger_images(solution, device):
    generator = torch.Generator().manual_seed(1)  # the same in every run
    model = solution.SmallCNN(4).to(device)
    for name, parameter in model.named_parameters():
        bound = {"conv1": 9, "conv2": 72, "head": 16}[name.split(".")[0]] ** -0.5
        parameter.data = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator).to(device)
    with global_rng_untouched():
        adam(model, (bar_images(64, 12, device, generator) for _ in range(100)))
    for size in (12, 20):
        x, y = bar_images(400, size, device, generator)
        with torch.no_grad():
            right = float((model(x).argmax(dim=1) == y).double().mean())
        assert_that(right >= 0.95, f"the share of right answers on images of {size} x {size}", value=round(right, 1))


# conv_transpose2d


TRANSPOSED = [  # y, w, options
    ((2, 4, 3, 5), (4, 3, 3, 2), {}),
    ((2, 4, 3, 4), (4, 3, 2, 3), {"stride": 2}),
    ((2, 4, 3, 4), (4, 3, 2, 3), {"stride": (3, 2), "output_padding": (2, 0)}),
    ((2, 4, 3, 4), (4, 3, 2, 3), {"stride": (3, 2), "output_padding": (0, 1)}),
    ((2, 4, 5, 4), (4, 3, 3, 2), {"padding": (2, 1)}),
    ((1, 4, 3, 4), (4, 2, 3, 2), {"dilation": (2, 3)}),
    ((2, 4, 3, 2), (4, 1, 2, 2), {"groups": 4}),
    ((3, 4, 3, 2), (4, 3, 2, 3), {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}),
    ((2, 3, 1, 1), (3, 2, 3, 3), {"padding": 1}),
    ((0, 4, 3, 2), (4, 3, 2, 3), {}),
]


@task("conv_transpose2d")
@pytest.mark.parametrize("y, w, options", TRANSPOSED, ids=str)
def test_the_adjoint_of_a_convolution(solution, randn, y, w, options):
    because = f"y {y}, w {w}, {options}: as F.conv_transpose2d has it"
    y, w = randn(*y, dtype=DOUBLE), randn(*w, dtype=DOUBLE)
    expected = F.conv_transpose2d(y, w, **options)
    assert_close(solution.conv_transpose2d(y, w, **options), expected, because=because, **NEAR[DOUBLE])


@task("conv_transpose2d")
@pytest.mark.parametrize("y, w, options", [TRANSPOSED[0], TRANSPOSED[3], TRANSPOSED[7]], ids=str)
def test_both_sides_of_the_identity(solution, randn, y, w, options):
    y, w = randn(*y, dtype=DOUBLE), randn(*w, dtype=DOUBLE)
    found = solution.conv_transpose2d(y, w, **options)
    x = randn(*found.shape, dtype=DOUBLE)
    forward = {name: value for name, value in options.items() if name != "output_padding"}
    there, back = float((F.conv2d(x, w, **forward) * y).sum()), float((x * found).sum())
    assert_close(back, there, because="<x, A^T y> is <A x, y>", rtol=1e-9, atol=1e-9)


@task("conv_transpose2d")
def test_the_adjoint_of_other_layouts(solution, randn):
    y, w = noncontiguous(randn(2, 4, 3, 5)), noncontiguous(randn(4, 3, 2, 2))
    expected = F.conv_transpose2d(y.contiguous(), w.contiguous())
    assert_close(solution.conv_transpose2d(y, w), expected, because="strides do not matter", rtol=1e-4, atol=1e-5)


@task("conv_transpose2d")
@pytest.mark.parametrize("y, w, options", [TRANSPOSED[0], TRANSPOSED[7]], ids=str)
def test_gradients_of_the_adjoint(solution, randn, y, w, options):
    assert_gradients_close(
        lambda y, w: solution.conv_transpose2d(y, w, **options),
        lambda y, w: F.conv_transpose2d(y, w, **options),
        [randn(*y, dtype=DOUBLE), randn(*w, dtype=DOUBLE)],
    )


@task("conv_transpose2d")
@pytest.mark.parametrize("y, w, groups", [((2, 4, 3, 3), (3, 2, 2, 2), 1), ((2, 3, 3, 3), (3, 2, 2, 2), 2)], ids=str)
def test_weights_that_do_not_fit_the_adjoint(solution, randn, y, w, groups):
    args = randn(*y), randn(*w)
    because = f"y {y} and w {w} in {groups} groups"
    assert_raises(
        ValueError, solution.conv_transpose2d, *args, groups=groups, mentions=[str(y), str(w)], because=because
    )


@task("conv_transpose2d")
@pytest.mark.parametrize("stride, extra", [(2, 2), ((3, 2), (0, 2)), ((2, 3), (2, 0)), (1, 1)], ids=str)
def test_an_image_that_no_convolution_would_map_here(solution, randn, stride, extra):
    because = f"output_padding {extra}, stride {stride}: one more output would fit"
    options = {"stride": stride, "output_padding": extra, "dilation": 4, "mentions": [str(stride), str(extra)]}
    assert_raises(
        ValueError, solution.conv_transpose2d, randn(2, 4, 3, 3), randn(4, 2, 2, 2), **options, because=because
    )


@task("conv_transpose2d")
@pytest.mark.parametrize(
    "w, padding", [((4, 2, 2, 4), 1), ((4, 2, 4, 2), 1), ((4, 2, 1, 4), 1), ((4, 2, 4, 1), 1)], ids=str
)
def test_nothing_would_be_left(solution, randn, w, padding):
    because = f"y (1, 4, 1, 1), w {w}, padding {padding}"
    assert_raises(ValueError, solution.conv_transpose2d, randn(1, 4, 1, 1), randn(*w), padding=padding, because=because)


@cost_case("conv_transpose2d")
def conv_transpose2d_cost(module, randn):
    y, w = randn(2, 8, 8, 8), randn(8, 4, 3, 3)
    return lambda: module.conv_transpose2d(y, w, stride=2, padding=1, output_padding=1)
