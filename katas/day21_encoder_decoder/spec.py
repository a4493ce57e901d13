"""Day 21: what the tasks promise."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    measure,
    noncontiguous,
    task,
    unchanged,
)

DOUBLE = torch.float64
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}
TIGHT = TOLERANCE[DOUBLE]
LOOSE = {"rtol": 1e-4, "atol": 1e-5}  # where tables of angles are float32
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
ORDERS = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
PAD, BOS, EOS, ZERO = 0, 1, 2, 3
HALF = [torch.float16, torch.bfloat16]


def randomize_(module, seed, scale=0.3):
    """Give every parameter numbers that no initialization has, so that nothing is hidden behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE) * scale
            parameter.copy_(values + 0.1)
    return module


def renamed(values, own="attention"):
    """The parameters (or gradients) of torch's layers under the names that they have here; `own` is self-attention's."""
    found = {}
    for name, value in values.items():
        kind = "weight" if name.endswith("weight") else "bias"
        stack = "self_attention" if name.startswith("decoder.") else own
        name = name.replace("self_attn.", stack + ".").replace("multihead_attn.", "cross_attention.")
        name = name.replace("linear1", "feed_forward.up_proj").replace("linear2", "feed_forward.down_proj")
        if "in_proj" in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = third
        else:
            found[name.replace("out_proj", "o_proj")] = value
    return found


def lower(t, device):
    return torch.ones(t, t, dtype=torch.bool, device=device).tril()


def lengths_of(device, *values):
    return torch.tensor(values, device=device)


def normed(x):
    """x through a LayerNorm that has not been trained."""
    return F.layer_norm(x.detach(), x.shape[-1:])


def gradients(module, inputs, weights):
    """The gradients of the weighted sum of module(*inputs) at the inputs and the parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    wanted = {f"input {i}": x for i, x in enumerate(leaves)} | dict(module.named_parameters())
    found = torch.autograd.grad((module(*leaves) * weights).sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


# shift_right


@task("shift_right")
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 2), (3, 3), (4, 7)], ids=str)
def test_bos_and_all_but_the_last(solution, randint, device, shape):
    tgt = randint(3, 50, shape)
    expected = torch.tensor([[1, *row[:-1]] for row in tgt.tolist()])
    assert_close(
        solution.shift_right(tgt, 1), expected, because="the decoder reads bos and what comes before its target"
    )


@task("shift_right")
@pytest.mark.parametrize("bos", [0, 2, 77])
def test_any_bos(solution, randint, bos):
    tgt = randint(3, 50, (2, 3))
    found = solution.shift_right(tgt, bos)[:, 0]
    assert_close(found, torch.tensor([bos, bos]), because=f"every row begins with {bos}")


@task("shift_right")
def test_place_by_place(solution, device):
    tgt = torch.tensor([[7, 8, 9, 2, 0], [5, 2, 0, 0, 0]], device=device)
    expected = torch.tensor([[1, 7, 8, 9, 2], [1, 5, 2, 0, 0]])
    found = solution.shift_right(tgt, 1)
    assert_close(found, expected, because="what is read at t is the target of t - 1; padding is a token like any other")


@task("shift_right")
@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0, 0)], ids=str)
def test_nothing_to_shift(solution, randint, shape):
    found = solution.shift_right(randint(3, 9, shape), 1)
    assert_close(found, torch.zeros(shape, dtype=torch.int64), because=f"tgt {shape}")


@task("shift_right")
@pytest.mark.parametrize("kind", [torch.int32, torch.uint8], ids=str)
def test_the_dtype_of_tokens_stays(solution, randint, kind):
    tgt = randint(3, 50, (2, 3)).to(kind)
    expected = torch.tensor([[1, *row[:-1]] for row in tgt.tolist()], dtype=kind)
    assert_close(solution.shift_right(tgt, 1), expected, because=f"{kind} in, {kind} out")


@task("shift_right")
def test_tokens_with_strides(solution, randint):
    tgt = randint(3, 50, (5, 3)).T
    expected = torch.tensor([[1, *row[:-1]] for row in tgt.tolist()])
    assert_close(solution.shift_right(tgt, 1), expected, because="strides do not matter")


# make_masks

PAIRS = [((3, 5), (2, 4), 5, 4), ((1, 2, 4), (4, 1, 3), 4, 4), ((3, 3, 2), (1, 2, 3), 6, 5), ((2,), (3,), 3, 7)]
PAIRS = pytest.mark.parametrize("src_lengths, tgt_lengths, ts, tt", PAIRS, ids=str)


def masks_of(solution, device, src_lengths, tgt_lengths, ts, tt):
    found = solution.make_masks(lengths_of(device, *src_lengths), lengths_of(device, *tgt_lengths), ts, tt)
    assert_that(isinstance(found, tuple) and len(found) == 3, "three masks in a tuple", value=type(found).__name__)
    return found


def keys_only(lengths, width):
    return torch.tensor([[j < n for j in range(width)] for n in lengths]).view(len(lengths), 1, 1, width)


@task("make_masks")
@PAIRS
def test_the_encoder_looks_at_source_tokens(solution, device, src_lengths, tgt_lengths, ts, tt):
    found = masks_of(solution, device, src_lengths, tgt_lengths, ts, tt)[0]
    because = f"(B, 1, 1, {ts}): True for each source token that is not padding, before and after"
    assert_close(found, keys_only(src_lengths, ts), because=because)


@task("make_masks")
@PAIRS
def test_the_decoder_looks_back(solution, device, src_lengths, tgt_lengths, ts, tt):
    expected = torch.zeros(len(tgt_lengths), 1, tt, tt, dtype=torch.bool)
    for b, n in enumerate(tgt_lengths):
        for i in range(tt):
            for j in range(tt):
                expected[b, 0, i, j] = j <= i and j < n
    found = masks_of(solution, device, src_lengths, tgt_lengths, ts, tt)[1]
    assert_close(found, expected, because=f"(B, 1, {tt}, {tt}): i may look at j <= i, if j is no padding")


@task("make_masks")
@PAIRS
def test_the_decoder_looks_across_at_source_tokens(solution, device, src_lengths, tgt_lengths, ts, tt):
    found = masks_of(solution, device, src_lengths, tgt_lengths, ts, tt)[2]
    because = f"(B, 1, 1, {ts}): the keys are source tokens, whoever asks"
    assert_close(found, keys_only(src_lengths, ts), because=because)


@task("make_masks")
@pytest.mark.parametrize("which", [0, 1, 2], ids=["src", "tgt", "cross"])
def test_lengths_of_zero_and_full_lengths(solution, device, which):
    found = masks_of(solution, device, (0, 3), (0, 2), 3, 2)[which]
    expected = torch.stack([torch.zeros(2, 2).bool(), torch.ones(2, 2).bool().tril()])[:, None]
    if which != 1:
        expected = torch.tensor([[False] * 3, [True] * 3]).view(2, 1, 1, 3)
    assert_close(found, expected, because="a row without tokens hides all, a full row nothing but the future")


@task("make_masks")
@pytest.mark.parametrize("lengths, ts, tt", [((), 3, 2), ((0, 0), 0, 0), ((0,), 0, 2), ((0,), 2, 0)], ids=str)
def test_masks_of_nothing(solution, device, lengths, ts, tt):
    B, empty = len(lengths), torch.tensor(lengths, dtype=torch.int64, device=device)
    found = solution.make_masks(empty, empty, ts, tt)
    expected = [(B, 1, 1, ts), (B, 1, tt, tt), (B, 1, 1, ts)]
    assert_equal([tuple(m.shape) for m in found], expected, because=f"{B} pairs of widths {ts} and {tt}")
    assert_equal([m.dtype for m in found], [torch.bool] * 3, because="masks are boolean")


@task("make_masks")
def test_masks_live_where_lengths_live(solution):
    lengths = torch.ones(2, dtype=torch.int64, device="meta")
    found = [m.device.type for m in solution.make_masks(lengths, lengths, 4, 3)]
    assert_equal(found, ["meta"] * 3, because="the device of the lengths")


@task("make_masks")
@pytest.mark.parametrize("src, tgt", [((1, 2), (1, 2, 3)), ((1, 2), (1,)), ((1,), (1, 2))], ids=str)
def test_as_many_sources_as_targets(solution, device, src, tgt):
    because = f"{len(src)} sources and {len(tgt)} targets"
    args = lengths_of(device, *src), lengths_of(device, *tgt)
    assert_raises(
        ValueError, solution.make_masks, *args, 4, 4, mentions=[f"({len(src)},)", f"({len(tgt)},)"], because=because
    )


# seq2seq_loss


def by_hand(logits, tgt, pad_id, smoothing=0.0):
    """The loss by its definition: a list of what each target costs, in float64."""
    logp = logits.detach().cpu().double().log_softmax(-1)
    costs = []
    for row, targets in zip(logp, tgt.tolist(), strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target != pad_id:
                costs.append(-(1 - smoothing) * scores[target] - smoothing * scores.mean())
    return sum(costs) / len(costs) if costs else torch.tensor(0.0, dtype=DOUBLE)


def padded(device, pad_id, rows=((3, 4, 5, 2), (5, 2), (4, 4, 2)), width=5):
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)


@task("seq2seq_loss")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("pad_id", [0, 1, 6, -100])
def test_every_token_counts_once(solution, device, dtype, randn, pad_id, smoothing):
    logits, tgt = randn(3, 5, 7, dtype=dtype, scale=2.0), padded(device, pad_id)
    expected = by_hand(logits, tgt, pad_id, smoothing).to(dtype)
    found = solution.seq2seq_loss(logits, tgt, pad_id, smoothing)
    because = f"the mean over the 9 targets that are not {pad_id}, smoothing {smoothing}"
    assert_close(found, expected, because=because, **TOLERANCE[dtype])


@task("seq2seq_loss")
def test_no_smoothing_by_default(solution, device, randn):
    logits, tgt = randn(3, 5, 7, dtype=DOUBLE, scale=2.0), padded(device, 0)
    expected = by_hand(logits, tgt, 0)
    assert_close(solution.seq2seq_loss(logits, tgt, 0), expected, because="label_smoothing is 0", **TIGHT)
    found = solution.seq2seq_loss(logits, tgt, pad_id=0, label_smoothing=0.0)
    assert_close(found, expected, because="the same by name", **TIGHT)


@task("seq2seq_loss")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_more_padding_changes_nothing(solution, device, randn, smoothing):
    logits, tgt = randn(3, 11, 7, dtype=DOUBLE), padded(device, 0, width=11)
    expected = by_hand(logits[:, :4], tgt[:, :4], 0, smoothing)
    found = solution.seq2seq_loss(logits, tgt, 0, smoothing)
    assert_close(found, expected, because="seven more columns of padding", **TIGHT)


@task("seq2seq_loss")
def test_a_short_row_does_not_weigh_more(solution, device):
    logits = torch.zeros(2, 4, 5, dtype=DOUBLE, device=device)
    logits[0, :, 3] = 100.0
    tgt = torch.tensor([[3, 3, 3, 3], [4, 0, 0, 0]], device=device)
    expected = torch.tensor(math.log(5) / 5, dtype=DOUBLE)
    because = "four targets that cost 0 and one that costs log 5: the mean is log(5) / 5"
    assert_close(solution.seq2seq_loss(logits, tgt, 0), expected, because=because, **TIGHT)


@task("seq2seq_loss")
def test_the_end_is_a_target(solution, device):
    logits = torch.zeros(1, 3, 5, dtype=DOUBLE, device=device)
    tgt = torch.tensor([[3, 4, 2]], device=device)
    logits[0, 0, 3] = logits[0, 1, 4] = 100.0
    expected = torch.tensor(math.log(5) / 3, dtype=DOUBLE)
    because = "eos is a target like any other, at the place where it stands"
    assert_close(solution.seq2seq_loss(logits, tgt, 0), expected, because=because, **TIGHT)


@task("seq2seq_loss")
def test_the_class_of_padding_takes_part(solution, device):
    logits = torch.zeros(1, 2, 4, dtype=DOUBLE, device=device)
    logits[..., 0] = math.log(5)
    tgt = torch.tensor([[2, 3]], device=device)
    expected = torch.tensor(math.log(8), dtype=DOUBLE)
    because = "a model that bets on padding pays for it: p = 1 / (5 + 1 + 1 + 1)"
    assert_close(solution.seq2seq_loss(logits, tgt, 0), expected, because=because, **TIGHT)


@task("seq2seq_loss")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_of_the_loss(solution, device, randn, smoothing):
    tgt = padded(device, 0)
    assert_gradients_close(
        lambda logits: solution.seq2seq_loss(logits, tgt, 0, smoothing),
        lambda logits: F.cross_entropy(
            logits.flatten(0, 1), tgt.flatten(), ignore_index=0, label_smoothing=smoothing, reduction="mean"
        ),
        [randn(3, 5, 7, dtype=DOUBLE)],
        because="zero at padding, and a ninth of each other target",
    )


@task("seq2seq_loss")
@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)], ids=str)
def test_a_loss_of_nothing(solution, device, randn, shape):
    logits, tgt = randn(*shape, 5).requires_grad_(), torch.full(shape, 4, device=device)
    loss = solution.seq2seq_loss(logits, tgt, 4)
    assert_close(loss.detach(), torch.tensor(0.0), because="all is padding, or there is nothing: 0, not NaN")
    (grad,) = torch.autograd.grad(loss, logits)
    assert_close(grad, torch.zeros(*shape, 5), because="and a gradient of 0")


@task("seq2seq_loss")
@pytest.mark.parametrize("half", HALF, ids=str)
def test_a_loss_in_half_precision(solution, device, randn, half):
    logits, tgt = randn(3, 5, 7).to(half), padded(device, 0)
    expected = by_hand(logits, tgt, 0).to(half)
    assert_close(solution.seq2seq_loss(logits, tgt, 0), expected, because="half in, half out", rtol=2e-2, atol=1e-3)


@task("seq2seq_loss")
@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 5, 7), (1, 5, 7), (3, 1, 7), (5, 3, 7), (15, 7)], ids=str)
def test_logits_that_do_not_fit(solution, device, randn, shape):
    because = f"logits {shape} for targets (3, 5)"
    args = randn(*shape), padded(device, 0), 0
    assert_raises(ValueError, solution.seq2seq_loss, *args, mentions=[str(shape), "(3, 5)"], because=because)


@cost_case("seq2seq_loss")
def loss_cost(module, randn, randint):
    logits, tgt = randn(8, 16, 100), randint(0, 100, (8, 16))
    return lambda: module.seq2seq_loss(logits, tgt, 0)


# Encoder

D, H, FF = 12, 3, 20


def torch_encoder(seed, device, dtype, n_layers=2, d_model=D, n_heads=H, d_ff=FF, **options):
    """The encoder of torch, with random parameters and without dropout; in training mode it takes no shortcuts."""
    layer = nn.TransformerEncoderLayer(d_model, n_heads, d_ff, dropout=0.0, batch_first=True, **options)
    stack = nn.TransformerEncoder(layer, n_layers, nn.LayerNorm(d_model), enable_nested_tensor=False)
    return randomize_(stack, seed).to(device, dtype)


def encoders(solution, seed, device, dtype, n_layers=2, d_model=D, n_heads=H, d_ff=FF, **options):
    """The learner's Encoder and that of torch with the same parameters."""
    in_torch = {**options, "activation": ACTIVATIONS[options.get("activation", "relu")]}
    theirs = torch_encoder(seed, device, dtype, n_layers, d_model, n_heads, d_ff, **in_torch)
    ours = solution.Encoder(d_model, n_heads, n_layers, d_ff, **options).to(device, dtype)
    ours.load_state_dict(renamed(theirs.state_dict()))
    return ours, theirs


@task("Encoder")
@ORDERS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_encoder_layer_is_that_of_torch(solution, device, dtype, seed, randn, activation, norm_first):
    options = {"norm_first": norm_first, "activation": activation}
    in_torch = {**options, "activation": ACTIVATIONS[activation], "dropout": 0.0, "batch_first": True}
    theirs = randomize_(nn.TransformerEncoderLayer(D, H, FF, **in_torch), seed).to(device, dtype)
    ours = solution.EncoderLayer(D, H, FF, **options).to(device, dtype)
    ours.load_state_dict(renamed(theirs.state_dict()))
    x = randn(2, 5, D, dtype=dtype)
    expected = theirs(x).detach()
    assert_close(ours(x).detach(), expected, because="nn.TransformerEncoderLayer", **TOLERANCE[dtype])


@task("Encoder")
def test_an_encoder_layer_is_post_norm_by_default(solution, device, seed, randn):
    theirs = nn.TransformerEncoderLayer(D, H, FF, dropout=0.0, batch_first=True, norm_first=False)
    theirs = randomize_(theirs, seed).to(device, DOUBLE)
    ours = solution.EncoderLayer(D, H, FF).to(device, DOUBLE)
    ours.load_state_dict(renamed(theirs.state_dict()))
    x = randn(2, 5, D, dtype=DOUBLE)
    expected = theirs(x).detach()
    assert_close(ours(x).detach(), expected, because="norm_first=False and relu, without dropout", **TIGHT)


@task("Encoder")
def test_an_encoder_layer_with_a_mask(solution, device, seed, randn):
    theirs = nn.TransformerEncoderLayer(D, H, FF, dropout=0.0, batch_first=True)
    theirs = randomize_(theirs, seed).to(device, DOUBLE)
    ours = solution.EncoderLayer(D, H, FF).to(device, DOUBLE)
    ours.load_state_dict(renamed(theirs.state_dict()))
    x, keep = randn(2, 4, D, dtype=DOUBLE), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], device=device).bool()
    expected = theirs(x, src_key_padding_mask=~keep).detach()
    because = "True means may attend; in torch's own padding mask True means the opposite"
    assert_close(ours(x, keep[:, None, None]).detach(), expected, because=because, **TIGHT)


@task("Encoder")
def test_dropout_of_an_encoder_layer(solution, device, seed, randn):
    layer = randomize_(solution.EncoderLayer(D, H, FF, dropout=1.0), seed).to(device, DOUBLE)
    x = randn(2, 5, D, dtype=DOUBLE)
    expected = layer.norm2(layer.norm1(x)).detach()
    assert_close(layer(x).detach(), expected, because="with dropout 1 the branches are gone", **TIGHT)


@task("Encoder")
@pytest.mark.parametrize("n_layers", [1, 3])
def test_layers_one_after_the_other_and_a_norm(solution, device, dtype, seed, randn, n_layers):
    ours, theirs = encoders(solution, seed, device, dtype, n_layers)
    x = randn(2, 5, D, dtype=dtype)
    expected = theirs(x).detach()
    because = f"{n_layers} layers in their order, and the norm of the stack"
    assert_close(ours(x).detach(), expected, because=because, **TOLERANCE[dtype])


@task("Encoder")
def test_an_encoder_without_layers(solution, device, seed, randn):
    ours = randomize_(solution.Encoder(D, H, 0, FF), seed).to(device, DOUBLE)
    x = randn(2, 5, D, dtype=DOUBLE)
    expected = F.layer_norm(x, (D,), ours.norm.weight, ours.norm.bias).detach()
    assert_close(ours(x).detach(), expected, because="n_layers = 0: the norm alone", **TIGHT)


@task("Encoder")
@pytest.mark.parametrize("options", [{"norm_first": True}, {"activation": "gelu"}], ids=str)
def test_options_reach_every_layer(solution, device, seed, randn, options):
    ours, theirs = encoders(solution, seed, device, DOUBLE, **options)
    x = randn(2, 5, D, dtype=DOUBLE)
    expected = theirs(x).detach()
    assert_close(ours(x).detach(), expected, because=f"both layers have {options}", **TIGHT)


@task("Encoder")
def test_dropout_reaches_every_layer(solution, device, seed, randn):
    ours = randomize_(solution.Encoder(D, H, 2, FF, dropout=1.0), seed).to(device, DOUBLE)
    x = randn(2, 5, D, dtype=DOUBLE)
    expected = x
    for norm in (ours.layers[0].norm1, ours.layers[0].norm2, ours.layers[1].norm1, ours.layers[1].norm2, ours.norm):
        expected = norm(expected)
    assert_close(ours(x).detach(), expected.detach(), because="with dropout 1 only the norms are left", **TIGHT)


@task("Encoder")
def test_padding_is_hidden_in_every_layer(solution, device, seed, randn):
    ours, theirs = encoders(solution, seed, device, DOUBLE)
    x, keep = randn(2, 5, D, dtype=DOUBLE), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=device).bool()
    expected = theirs(x, src_key_padding_mask=~keep).detach()
    assert_close(ours(x, keep[:, None, None]).detach(), expected, because="a mask (B, 1, 1, Ts)", **TIGHT)
    assert_close(ours(x, mask=keep[:, None, None]).detach(), expected, because="the same by name", **TIGHT)


@task("Encoder")
def test_any_mask_of_the_encoder(solution, device, seed, randn):
    ours, theirs = encoders(solution, seed, device, DOUBLE)
    x, mask = randn(2, 5, D, dtype=DOUBLE), lower(5, device).mT | torch.eye(5, device=device).bool().flip(0)
    expected = theirs(x, mask=~mask).detach()
    assert_close(ours(x, mask).detach(), expected, because="a mask (Ts, Ts)", **TIGHT)


@task("Encoder")
def test_the_encoder_looks_both_ways(solution, device, seed, randn):
    ours, _ = encoders(solution, seed, device, DOUBLE, 1)
    x = randn(1, 4, D, dtype=DOUBLE).requires_grad_()
    (grad,) = torch.autograd.grad(ours(x)[:, 1].square().sum(), x)
    reached = (grad.abs().amax((0, 2)) > 0).tolist()
    assert_equal(reached, [True] * 4, because="which of four tokens have a part in what the second becomes")


@task("Encoder")
def test_as_many_rows_as_tokens_as_heads(solution, device, seed, randn):
    ours, theirs = encoders(solution, seed, device, DOUBLE, d_model=6)
    x, mask = randn(3, 3, 6, dtype=DOUBLE), lower(3, device)
    expected = theirs(x, mask=~mask).detach()
    assert_close(ours(x, mask).detach(), expected, because="B = Ts = H = 3", **TIGHT)


@task("Encoder")
@ORDERS
def test_gradients_of_the_encoder(solution, device, seed, randn, norm_first):
    ours, theirs = encoders(solution, seed, device, DOUBLE, norm_first=norm_first)
    x, weights = randn(2, 5, D, dtype=DOUBLE), randn(2, 5, D, dtype=DOUBLE)
    expected = renamed(gradients(theirs, [x], weights))
    found = gradients(ours, [x], weights)
    for name, grad in expected.items():
        assert_close(found[name], grad, because=f"the gradient of {name}", rtol=1e-7, atol=1e-9)


@task("Encoder")
def test_each_encoder_layer_has_its_own_weights(solution):
    module = solution.Encoder(D, H, 3, FF)
    one = 4 * (D * D + D) + 2 * D * FF + FF + D + 4 * D
    total = sum(p.numel() for p in module.parameters())
    assert_equal(total, 3 * one + 2 * D, because="three layers and a norm")


@task("Encoder")
@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D)], ids=str)
def test_nothing_to_encode(solution, device, shape, randn):
    found = solution.Encoder(D, H, 2, FF).to(device)(randn(*shape))
    assert_close(found.detach(), torch.zeros(shape), because=f"x {shape}")


@task("Encoder")
def test_the_input_of_the_encoder_is_left_alone(solution, device, seed, randn):
    ours, theirs = encoders(solution, seed, device, DOUBLE)
    x = noncontiguous(randn(2, 5, D, dtype=DOUBLE))
    expected = theirs(x).detach()
    with unchanged(x):
        found = ours(x)
    assert_close(found.detach(), expected, because="strides do not matter", **TIGHT)


@task("Encoder")
def test_an_encoder_in_bfloat16(solution, device, seed, randn):
    ours, theirs = encoders(solution, seed, device, torch.bfloat16)
    x = randn(2, 5, D).bfloat16()
    expected = theirs.to(DOUBLE)(x.double()).detach().bfloat16()
    assert_close(ours(x).detach(), expected, because="bfloat16 in, bfloat16 out", rtol=0.1, atol=0.25)


@task("Encoder")
def test_the_price_of_encoding(solution, device, randn):
    module = solution.Encoder(D, H, 2, FF).to(device)
    flops = 2 * 2 * 5 * (2 * (4 * D**2 + 2 * D * FF) + 4 * 5 * D)
    assert_cost(module, randn(2, 5, D), flops=flops, because="2 layers, 2 * 5 tokens")


@cost_case("Encoder")
def encoder_cost(module, randn):
    x = randn(8, 16, 32)
    encoder = module.Encoder(32, 4, 2, 64).to(x.device)
    return lambda: encoder(x)


# Decoder


def torch_layer(seed, device, dtype, d_model=D, n_heads=H, d_ff=FF, **options):
    layer = nn.TransformerDecoderLayer(d_model, n_heads, d_ff, dropout=0.0, batch_first=True, **options)
    return randomize_(layer, seed).to(device, dtype)


def decoder_layers(solution, seed, device, dtype, d_model=D, n_heads=H, d_ff=FF, **options):
    """The learner's DecoderLayer and that of torch with the same parameters."""
    in_torch = {**options, "activation": ACTIVATIONS[options.get("activation", "relu")]}
    theirs = torch_layer(seed, device, dtype, d_model, n_heads, d_ff, **in_torch)
    ours = solution.DecoderLayer(d_model, n_heads, d_ff, **options).to(device, dtype)
    ours.load_state_dict(renamed(theirs.state_dict(), "self_attention"))
    return ours, theirs


def decoders(solution, seed, device, dtype, n_layers=2, **options):
    """The learner's Decoder and that of torch with the same parameters."""
    layer = nn.TransformerDecoderLayer(D, H, FF, dropout=0.0, batch_first=True, **options)
    theirs = randomize_(nn.TransformerDecoder(layer, n_layers, nn.LayerNorm(D)), seed).to(device, dtype)
    ours = solution.Decoder(D, H, n_layers, FF, **options).to(device, dtype)
    ours.load_state_dict(renamed(theirs.state_dict(), "self_attention"))
    return ours, theirs


@task("Decoder")
@ORDERS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_decoder_layer_is_that_of_torch(solution, device, dtype, seed, randn, activation, norm_first):
    ours, theirs = decoder_layers(solution, seed, device, dtype, activation=activation, norm_first=norm_first)
    y, memory = randn(2, 4, D, dtype=dtype), randn(2, 6, D, dtype=dtype)
    expected = theirs(y, memory).detach()
    assert_close(ours(y, memory).detach(), expected, because="nn.TransformerDecoderLayer", **TOLERANCE[dtype])


@task("Decoder")
def test_a_decoder_layer_is_post_norm_by_default(solution, device, seed, randn):
    theirs = torch_layer(seed, device, DOUBLE)
    ours = solution.DecoderLayer(D, H, FF).to(device, DOUBLE)
    ours.load_state_dict(renamed(theirs.state_dict(), "self_attention"))
    y, memory = randn(2, 4, D, dtype=DOUBLE), randn(2, 6, D, dtype=DOUBLE)
    expected = theirs(y, memory).detach()
    assert_close(ours(y, memory).detach(), expected, because="norm_first=False and relu, without dropout", **TIGHT)
    assert_equal(ours.norm_first, False, because="norm_first is an attribute")


@task("Decoder")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("memory_width, text", [(4, "as long as"), (1, "of one token beside")])
def test_a_memory_of_any_length(solution, device, seed, randn, memory_width, text, norm_first):
    ours, theirs = decoder_layers(solution, seed, device, DOUBLE, norm_first=norm_first)
    y, memory = randn(2, 4, D, dtype=DOUBLE), randn(2, memory_width, D, dtype=DOUBLE)
    expected = theirs(y, memory).detach()
    assert_close(ours(y, memory).detach(), expected, because=f"a memory {text} y", **TIGHT)


@task("Decoder")
@ORDERS
@pytest.mark.parametrize("kind", ["self", "cross", "both"])
def test_two_masks_for_two_attentions(solution, device, seed, randn, kind, norm_first):
    ours, theirs = decoder_layers(solution, seed, device, DOUBLE, norm_first=norm_first)
    y, memory = randn(2, 5, D, dtype=DOUBLE), randn(2, 5, D, dtype=DOUBLE)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], device=device).bool()
    back = lower(5, device)
    in_torch = {"tgt_mask": ~back, "memory_key_padding_mask": ~keep}
    masks = {"self_mask": back, "cross_mask": keep[:, None, None]}
    if kind != "both":
        in_torch.pop("memory_key_padding_mask" if kind == "self" else "tgt_mask")
        masks.pop("cross_mask" if kind == "self" else "self_mask")
    expected = theirs(y, memory, **in_torch).detach()
    because = f"{' and '.join(masks)}: one for y at y, one for y at the memory"
    assert_close(ours(y, memory, **masks).detach(), expected, because=because, **TIGHT)
    if kind == "both":
        found = ours(y, memory, back, keep[:, None, None]).detach()
        assert_close(found, expected, because="self_mask comes first", **TIGHT)


@task("Decoder")
def test_a_cross_mask_with_a_row_per_query(solution, device, seed, randn):
    ours, theirs = decoder_layers(solution, seed, device, DOUBLE)
    y, memory = randn(2, 4, D, dtype=DOUBLE), randn(2, 6, D, dtype=DOUBLE)
    mask = torch.ones(4, 6, device=device).bool().tril(1)
    expected = theirs(y, memory, memory_mask=~mask).detach()
    found = ours(y, memory, cross_mask=mask).detach()
    assert_close(found, expected, because="(Tt, Ts): rows are tokens of y, columns those of the memory", **TIGHT)


@task("Decoder")
def test_all_sizes_are_three(solution, device, seed, randn):
    ours, theirs = decoder_layers(solution, seed, device, DOUBLE, d_model=6)
    y, memory, back = randn(3, 3, 6, dtype=DOUBLE), randn(3, 3, 6, dtype=DOUBLE), lower(3, device)
    expected = theirs(y, memory, tgt_mask=~back).detach()
    assert_close(ours(y, memory, back).detach(), expected, because="B = Tt = Ts = H = 3", **TIGHT)


@task("Decoder")
@ORDERS
def test_nothing_leaks_from_later_targets(solution, device, seed, randn, norm_first):
    ours, _ = decoder_layers(solution, seed, device, DOUBLE, norm_first=norm_first)
    y = randn(2, 5, D, dtype=DOUBLE).requires_grad_()
    out = ours(y, randn(2, 6, D, dtype=DOUBLE), lower(5, device))
    (grad,) = torch.autograd.grad(out[:, 2].square().sum(), y)
    reached = (grad.abs().amax((0, 2)) > 0).tolist()
    because = "which of five tokens have a part in the third, under a causal self_mask"
    assert_equal(reached, [True, True, True, False, False], because=because)


@task("Decoder")
@ORDERS
def test_a_memory_that_is_hidden(solution, device, seed, randn, norm_first):
    ours, _ = decoder_layers(solution, seed, device, DOUBLE, norm_first=norm_first)
    y, memory = randn(2, 4, D, dtype=DOUBLE), randn(2, 6, D, dtype=DOUBLE)
    nothing = torch.zeros(6, device=device).bool()
    expected = ours(y, memory[:, :0]).detach()
    found = ours(y, memory, None, nothing).detach()
    assert_that(bool(found.isfinite().all()), because="a memory that nobody may look at makes no NaN")
    assert_close(found, expected, because="hidden completely, it is like a memory of no tokens", **TIGHT)


@task("Decoder")
@ORDERS
def test_gradients_of_a_decoder_layer(solution, device, seed, randn, norm_first):
    ours, theirs = decoder_layers(solution, seed, device, DOUBLE, norm_first=norm_first)
    inputs, weights = [randn(2, 4, D, dtype=DOUBLE), randn(2, 6, D, dtype=DOUBLE)], randn(2, 4, D, dtype=DOUBLE)
    expected = renamed(gradients(theirs, inputs, weights), "self_attention")
    found = gradients(ours, inputs, weights)
    for name, grad in expected.items():
        assert_close(found[name], grad, because=f"the gradient of {name}; input 1 is memory", rtol=1e-7, atol=1e-9)


def quiet(layer, loud):
    """All branches say 0, but one of them says 1 wherever it is asked."""
    with torch.no_grad():
        for part in (layer.self_attention, layer.cross_attention, layer.feed_forward):
            for parameter in part.parameters():
                parameter.zero_()
        last = layer.feed_forward.down_proj if loud == "feed_forward" else getattr(layer, loud).o_proj
        last.bias.fill_(1.0)
    return layer


@task("Decoder")
@pytest.mark.parametrize("branch", ["self_attention", "cross_attention", "feed_forward"])
def test_entries_of_each_branch_are_dropped(solution, device, branch):
    layer = solution.DecoderLayer(D, H, FF, norm_first=True, dropout=0.5)
    layer = quiet(layer, branch).to(device, DOUBLE)
    y = torch.zeros(20, 5, D, device=device, dtype=DOUBLE)
    values = sorted(set(layer(y, y).detach().flatten().tolist()))
    because = f"dropout 0.5: each entry of the {branch} branch is 0 or twice as large"
    assert_that(values == [0.0, 2.0], because=because, value=f"{min(len(values), 3)} different numbers or more")


@task("Decoder")
@pytest.mark.parametrize("branch", ["self_attention", "cross_attention", "feed_forward"])
def test_entries_of_each_branch_are_dropped_in_post_norm(solution, device, branch):
    layer = quiet(solution.DecoderLayer(D, H, FF, dropout=1.0), branch).to(device, DOUBLE)
    with torch.no_grad():
        last = layer.feed_forward.down_proj if branch == "feed_forward" else getattr(layer, branch).o_proj
        last.bias.copy_(torch.arange(D))
    y = torch.zeros(2, 5, D, device=device, dtype=DOUBLE)
    because = f"dropout 1: nothing is left of the {branch} branch"
    assert_close(layer(y, y).detach(), y, because=because, **TIGHT)


@task("Decoder")
@ORDERS
def test_the_stream_of_the_decoder_is_never_dropped(solution, device, seed, randn, norm_first):
    layer = solution.DecoderLayer(D, H, FF, norm_first=norm_first, dropout=1.0)
    layer = randomize_(layer, seed).to(device, DOUBLE)
    y = randn(2, 5, D, dtype=DOUBLE)
    expected = y if norm_first else layer.norm3(layer.norm2(layer.norm1(y))).detach()
    found = layer(y, randn(2, 6, D, dtype=DOUBLE)).detach()
    assert_close(found, expected, because="with dropout 1 the branches are gone, and the stream passes by", **TIGHT)


@task("Decoder")
def test_dropout_inside_of_the_feed_forward(solution, device):
    layer = solution.DecoderLayer(8, 2, 8, norm_first=True, dropout=0.5)
    assert_equal(layer.feed_forward.dropout.p, 0.5, because="the feed-forward network has the same dropout")


@task("Decoder")
def test_no_dropout_in_eval(solution, device, seed, randn):
    layer = randomize_(solution.DecoderLayer(D, H, FF, dropout=0.9), seed).to(device, DOUBLE).eval()
    plain = randomize_(solution.DecoderLayer(D, H, FF), seed).to(device, DOUBLE)
    y, memory = randn(2, 4, D, dtype=DOUBLE), randn(2, 6, D, dtype=DOUBLE)
    expected = plain(y, memory).detach()
    assert_close(layer(y, memory).detach(), expected, because="dropout is for training", **TIGHT)


@task("Decoder")
def test_the_parts_of_a_decoder_layer(solution):
    shapes = {name: tuple(p.shape) for name, p in solution.DecoderLayer(D, H, FF).named_parameters()}
    theirs = nn.TransformerDecoderLayer(D, H, FF)
    expected = {name: tuple(p.shape) for name, p in renamed(theirs.state_dict(), "self_attention").items()}
    assert_equal(dict(sorted(shapes.items())), dict(sorted(expected.items())), because="names and shapes of parameters")


@task("Decoder")
@pytest.mark.parametrize("shape", [(3, 6, D), (1, 6, D)], ids=str)
def test_a_memory_of_another_batch(solution, device, randn, shape):
    layer = solution.DecoderLayer(D, H, FF).to(device)
    args = randn(2, 4, D), randn(*shape)
    assert_raises(
        ValueError, layer, *args, mentions=["(2, 4, 12)", str(shape)], because=f"y (2, 4, 12), memory {shape}"
    )


@task("Decoder")
@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D)], ids=str)
def test_nothing_to_decode(solution, device, shape, randn):
    found = solution.DecoderLayer(D, H, FF).to(device)(randn(*shape), randn(shape[0], 6, D))
    assert_close(found.detach(), torch.zeros(shape), because=f"y {shape}")


@task("Decoder")
def test_the_inputs_of_the_decoder_are_left_alone(solution, device, seed, randn):
    ours, theirs = decoder_layers(solution, seed, device, DOUBLE)
    y, memory = noncontiguous(randn(2, 4, D, dtype=DOUBLE)), noncontiguous(randn(2, 6, D, dtype=DOUBLE))
    expected = theirs(y, memory).detach()
    with unchanged(y, memory):
        found = ours(y, memory)
    assert_close(found.detach(), expected, because="strides do not matter", **TIGHT)


@task("Decoder")
def test_a_decoder_layer_in_bfloat16(solution, device, seed, randn):
    ours, theirs = decoder_layers(solution, seed, device, torch.bfloat16)
    y, memory = randn(2, 4, D).bfloat16(), randn(2, 6, D).bfloat16()
    expected = theirs.to(DOUBLE)(y.double(), memory.double()).detach().bfloat16()
    assert_close(ours(y, memory).detach(), expected, because="bfloat16 in, bfloat16 out", rtol=0.1, atol=0.25)


@task("Decoder")
def test_the_price_of_a_decoder_layer(solution, device, randn):
    layer = solution.DecoderLayer(D, H, FF).to(device)
    flops = 2 * 4 * (2 * (6 * D**2 + 2 * D * FF) + 4 * D * (4 + 7)) + 2 * 7 * 4 * D**2
    because = "2 rows: 4 tokens of y with six projections, 7 of the memory with two"
    assert_cost(layer, randn(2, 4, D), randn(2, 7, D), flops=flops, because=because)


@task("Decoder")
@pytest.mark.parametrize("n_layers", [1, 3])
def test_every_layer_looks_at_the_same_memory(solution, device, dtype, seed, randn, n_layers):
    ours, theirs = decoders(solution, seed, device, dtype, n_layers)
    y, memory = randn(2, 4, D, dtype=dtype), randn(2, 6, D, dtype=dtype)
    expected = theirs(y, memory).detach()
    because = f"{n_layers} layers in their order, one memory, and the norm of the stack"
    assert_close(ours(y, memory).detach(), expected, because=because, **TOLERANCE[dtype])


@task("Decoder")
@ORDERS
def test_both_masks_reach_every_layer(solution, device, seed, randn, norm_first):
    ours, theirs = decoders(solution, seed, device, DOUBLE, norm_first=norm_first)
    y, memory, back = randn(2, 5, D, dtype=DOUBLE), randn(2, 5, D, dtype=DOUBLE), lower(5, device)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], device=device).bool()
    expected = theirs(y, memory, tgt_mask=~back, memory_key_padding_mask=~keep).detach()
    cross = keep[:, None, None]
    assert_close(ours(y, memory, back, cross).detach(), expected, because="self_mask, cross_mask", **TIGHT)
    found = ours(y, memory, cross_mask=cross, self_mask=back).detach()
    assert_close(found, expected, because="the same by name", **TIGHT)


@task("Decoder")
def test_each_decoder_layer_has_its_own_weights(solution):
    module = solution.Decoder(D, H, 3, FF)
    one = 8 * (D * D + D) + 2 * D * FF + FF + D + 6 * D
    total = sum(p.numel() for p in module.parameters())
    assert_equal(total, 3 * one + 2 * D, because="three layers and a norm")


@cost_case("Decoder")
def decoder_cost(module, randn):
    y, memory = randn(8, 16, 32), randn(8, 24, 32)
    layer = module.DecoderLayer(32, 4, 64).to(y.device)
    return lambda: layer(y, memory)


# Transformer

SIZES = {"src_vocab": 11, "tgt_vocab": 9, "d_model": D, "n_heads": H, "n_enc": 1, "n_dec": 2, "d_ff": FF, "max_len": 10}


def model_of(solution, seed, device, dtype=DOUBLE, **changes):
    return randomize_(solution.Transformer(**{**SIZES, **changes}), seed).to(device, dtype)


def sines(t, dim):
    """Sinusoidal positions by their definition, in float64."""
    table = torch.zeros(t, dim, dtype=DOUBLE)
    for p in range(t):
        for i in range(0, dim, 2):
            angle = p * 10000.0 ** (-i / dim)
            table[p, i], table[p, i + 1] = math.sin(angle), math.cos(angle)
    return table


def expected_logits(model, src, tgt, src_lengths, tgt_lengths):
    """The logits of nn.Transformer with the weights of the model, in float64 and on the CPU."""
    sizes = SIZES | {"d_model": model.src_embedding.weight.shape[1]}
    theirs = nn.Transformer(
        sizes["d_model"], H, len(model.encoder.layers), len(model.decoder.layers), FF, 0.0, batch_first=True
    ).double()
    state = {name: p.detach().cpu().double() for name, p in model.state_dict().items()}
    own = dict(theirs.named_parameters())
    for name, parameter in own.items():
        names = renamed({name: parameter})
        parameter.data = torch.cat([state[n] for n in names])
    S, T = src.shape[1], tgt.shape[1]
    x = state["src_embedding.weight"][src.cpu()] * sizes["d_model"] ** 0.5 + sines(S, sizes["d_model"])
    y = state["tgt_embedding.weight"][tgt.cpu()] * sizes["d_model"] ** 0.5 + sines(T, sizes["d_model"])
    padding = torch.arange(S) >= src_lengths.cpu()[:, None]
    out = theirs(
        x,
        y,
        tgt_mask=~lower(T, "cpu"),
        src_key_padding_mask=padding,
        tgt_key_padding_mask=torch.arange(T) >= tgt_lengths.cpu()[:, None],
        memory_key_padding_mask=padding,
    )
    return (out @ state["head.weight"].T).detach()


def batch_of(randint, device, B=3, S=6, T=5):
    src, tgt = randint(0, 11, (B, S)), randint(0, 9, (B, T))
    return src, tgt, lengths_of(device, *[6, 3, 1][:B]), lengths_of(device, *[2, 5, 1][:B])


@task("Transformer")
@pytest.mark.parametrize("n_enc, n_dec", [(1, 2), (2, 1)])
def test_it_is_the_transformer_of_torch(solution, device, seed, randint, n_enc, n_dec):
    model = model_of(solution, seed, device, n_enc=n_enc, n_dec=n_dec)
    batch = batch_of(randint, device)
    expected = expected_logits(model, *batch)
    because = "nn.Transformer between sqrt(D) * rows + positions and the head, padded places included"
    assert_close(model(*batch).detach(), expected, because=because, **LOOSE)


@task("Transformer")
def test_it_is_the_transformer_of_torch_in_float32(solution, device, seed, randint):
    model = model_of(solution, seed, device, torch.float32)
    batch = batch_of(randint, device)
    expected = expected_logits(model, *batch).float()
    assert_close(model(*batch).detach(), expected, because="the same in float32", rtol=1e-3, atol=1e-3)


@task("Transformer")
def test_it_is_the_transformer_of_torch_without_ties(solution, device, seed, randint):
    model = model_of(solution, seed, device, tie_output=False)
    batch = batch_of(randint, device)
    expected = expected_logits(model, *batch)
    assert_close(model(*batch).detach(), expected, because="a head with weights of its own", **LOOSE)


@task("Transformer")
def test_it_is_the_transformer_of_torch_with_one_table(solution, device, seed, randint):
    model = model_of(solution, seed, device, tgt_vocab=11, share_embeddings=True)
    batch = batch_of(randint, device)
    expected = expected_logits(model, *batch)
    assert_close(model(*batch).detach(), expected, because="source and target share one table", **LOOSE)


@task("Transformer")
@pytest.mark.parametrize("T", [1, 6])
def test_a_target_of_one_token_and_one_as_long_as_the_source(solution, device, seed, randint, T):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, _ = batch_of(randint, device, T=T)
    full = lengths_of(device, T, T, T)
    expected = expected_logits(model, src, tgt, src_lengths, full)
    assert_close(model(src, tgt, src_lengths, full).detach(), expected, because=f"Ts = 6, Tt = {T}", **LOOSE)


@task("Transformer")
def test_encode_and_then_decode(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, tgt_lengths = batch_of(randint, device)
    expected = expected_logits(model, src, tgt, src_lengths, tgt_lengths)
    memory = model.encode(src, src_lengths)
    assert_equal(tuple(memory.shape), (3, 6, D), because="the memory is (B, Ts, D)")
    found = model.decode(tgt, memory, src_lengths, tgt_lengths).detach()
    assert_close(found, expected, because="decode(tgt, encode(src)) is forward", **LOOSE)


@task("Transformer")
def test_decode_without_lengths_takes_all_tokens(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, _ = batch_of(randint, device)
    expected = expected_logits(model, src, tgt, src_lengths, lengths_of(device, 5, 5, 5))
    found = model.decode(tgt, model.encode(src, src_lengths), src_lengths).detach()
    assert_close(found, expected, because="tgt_lengths=None: all Tt tokens are real", **LOOSE)


@task("Transformer")
def test_the_memory_may_come_from_elsewhere(solution, device, seed, randn, randint):
    model = model_of(solution, seed, device)
    tgt, lengths = randint(0, 9, (2, 4)), lengths_of(device, 5, 2)
    memory = randn(2, 7, D, dtype=DOUBLE)
    expected = model.decode(tgt[1:], memory[1:, :2], lengths[1:]).detach()
    found = model.decode(tgt, memory, lengths).detach()[1:]
    assert_close(
        found, expected, because="decode looks at the first src_lengths of the memory that it is given", **LOOSE
    )


@task("Transformer")
def test_the_parts_of_a_transformer(solution):
    model = solution.Transformer(**SIZES)
    kinds = [type(part).__name__ for part in (model.encoder, model.decoder)]
    assert_equal(kinds, ["Encoder", "Decoder"], because="encoder and decoder")
    assert_equal((len(model.encoder.layers), len(model.decoder.layers)), (1, 2), because="n_enc and n_dec layers")
    outside = {n: tuple(p.shape) for n, p in model.state_dict().items() if not n.startswith(("encoder.", "decoder."))}
    expected = {"head.weight": (9, D), "src_embedding.weight": (11, D), "tgt_embedding.weight": (9, D)}
    assert_equal(dict(sorted(outside.items())), expected, because="what the state dict holds besides both stacks")


@task("Transformer")
@pytest.mark.parametrize("share", [False, True], ids=["two tables", "one table"])
@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_which_tables_are_one(solution, share, tie):
    model = solution.Transformer(**{**SIZES, "tgt_vocab": 11}, share_embeddings=share, tie_output=tie)
    shared = model.src_embedding.weight is model.tgt_embedding.weight
    assert_that(shared == share, because=f"share_embeddings={share}", value=shared)
    tied = model.head.weight is model.tgt_embedding.weight
    assert_that(tied == tie, because=f"tie_output={tie}: is the weight of the head that of tgt_embedding?", value=tied)
    tables = [p for n, p in model.named_parameters() if not n.startswith(("encoder.", "decoder."))]
    assert_equal(len(tables), 3 - share - tie, because="tables that are trained, each once")


@task("Transformer")
def test_two_tables_and_a_tied_head_by_default(solution):
    model = solution.Transformer(*SIZES.values())
    assert_that(model.head.weight is model.tgt_embedding.weight, because="tie_output is True by default")
    shapes = tuple(model.src_embedding.weight.shape), tuple(model.tgt_embedding.weight.shape)
    assert_equal(shapes, ((11, D), (9, D)), because="share_embeddings is False by default")
    widths = {tuple(p.shape) for p in model.encoder.layers[0].feed_forward.parameters()}
    assert_equal(widths, {(FF, D), (FF,), (D, FF), (D,)}, because="d_ff comes seventh")
    assert_equal(model.encoder.layers[0].attention.n_heads, H, because="n_heads comes fourth")


@task("Transformer")
def test_vocabularies_that_cannot_share(solution):
    options = {**SIZES, "share_embeddings": True}
    because = "one table for vocabularies of 11 and 9"
    assert_raises(ValueError, solution.Transformer, **options, mentions=["11", "9"], because=because)


@task("Transformer")
@pytest.mark.parametrize("options", [{}, {"tie_output": False}, {"tgt_vocab": 700, "share_embeddings": True}], ids=str)
def test_tables_start_small(solution, options):
    sizes = {**SIZES, "src_vocab": 700, "tgt_vocab": 800, "d_model": 48, **options}
    model = solution.Transformer(**sizes)
    for name in ("src_embedding", "tgt_embedding"):
        spread = getattr(model, name).weight.detach().double().square().mean().sqrt().item() * 48**0.5
        because = f"{name}: numbers of size 1 / sqrt(d_model), which is 0.144 for a width of 48"
        assert_that(0.95 < spread < 1.05, because=because, value=round(spread, 1))


@task("Transformer")
def test_a_head_of_its_own_starts_as_linear_does(solution):
    model = solution.Transformer(**{**SIZES, "tgt_vocab": 800, "d_model": 48}, tie_output=False)
    found = model.head.weight.detach().double().square().mean().sqrt().item() * 48**0.5
    assert_that(
        0.55 < found < 0.605, because="uniform within 1 / sqrt(48): 0.58 of the size of a table", value=found > 0.8
    )


@task("Transformer")
@pytest.mark.parametrize("place", [0, 2, 4])
def test_logits_do_not_know_what_comes_later(solution, device, seed, randint, place):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, _ = batch_of(randint, device)
    full = lengths_of(device, 5, 5, 5)
    before = model(src, tgt, src_lengths, full).detach()
    other = tgt.clone()
    other[:, place] = (other[:, place] + 1) % 9
    after = model(src, other, src_lengths, full).detach()
    moved = [bool((before[:, t] - after[:, t]).abs().max() > 1e-9) for t in range(5)]
    expected = [t >= place for t in range(5)]
    assert_equal(moved, expected, because=f"another token at place {place}: which logits change?")


@task("Transformer")
def test_every_source_token_reaches_every_logit(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, tgt_lengths = batch_of(randint, device)
    before = model(src, tgt, src_lengths, tgt_lengths).detach()[0]
    moved = []
    for place in range(6):
        other = src.clone()
        other[:, place] = (other[:, place] + 1) % 11
        after = model(other, tgt, src_lengths, tgt_lengths).detach()[0]
        moved.append(bool(((before - after).abs().amax(-1) > 1e-9).all()))
    assert_equal(moved, [True] * 6, because="another source token at place 0, 1, ...: do all logits change?")


@task("Transformer")
def test_padding_of_the_source_has_no_influence(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, tgt_lengths = batch_of(randint, device)
    wide = torch.cat([src, randint(0, 11, (3, 4))], 1)
    wide[1, 3:] = 10
    expected = model(src, tgt, src_lengths, tgt_lengths).detach()
    found = model(wide, tgt, src_lengths, tgt_lengths).detach()
    assert_close(found, expected, because="other padding, and four more columns of it", **LOOSE)


@task("Transformer")
def test_a_pair_by_itself(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, tgt_lengths = batch_of(randint, device)
    expected = model(src[1:2, :3], tgt[1:2], src_lengths[1:2], tgt_lengths[1:2]).detach()[0]
    found = model(src, tgt, src_lengths, tgt_lengths).detach()[1]
    assert_close(found, expected, because="the second pair of three, alone and without padding", **LOOSE)


@task("Transformer")
def test_order_matters_in_both_sequences(solution, device, seed):
    model = model_of(solution, seed, device)
    src, tgt = torch.tensor([[1, 2, 3]], device=device), torch.tensor([[1, 2, 3]], device=device)
    three = lengths_of(device, 3)
    last = model(src, tgt, three, three).detach()[0, -1]
    turned = model(src.flip(1), tgt, three, three).detach()[0, -1]
    assert_that(bool((last - turned).abs().max() > 1e-6), because="3 2 1 is another source than 1 2 3")
    tgt = torch.tensor([[2, 1, 3]], device=device)
    turned = model(src, tgt, three, three).detach()[0, -1]
    assert_that(bool((last - turned).abs().max() > 1e-6), because="2 1 3 is another target than 1 2 3")


@task("Transformer")
def test_a_source_of_length_zero(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, _, tgt_lengths = batch_of(randint, device)
    lengths = lengths_of(device, 6, 0, 1)
    found = model(src, tgt, lengths, tgt_lengths).detach()
    assert_that(bool(found.isfinite().all()), because="nothing to look at makes no NaN")
    src[1] = (src[1] + 1) % 11
    assert_close(model(src, tgt, lengths, tgt_lengths).detach()[1], found[1], because="only padding there", **LOOSE)


@task("Transformer")
@pytest.mark.parametrize("which", ["source", "target"])
def test_longer_than_max_len(solution, device, randint, which):
    model = solution.Transformer(**SIZES).to(device)
    S, T = (11, 3) if which == "source" else (3, 11)
    args = randint(0, 9, (2, S)), randint(0, 9, (2, T)), lengths_of(device, 1, 2), lengths_of(device, 1, 2)
    assert_raises(ValueError, model, *args, mentions=["11", "10"], because=f"a {which} of 11 tokens, max_len is 10")


@task("Transformer")
def test_as_long_as_max_len(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, full = randint(0, 11, (1, 10)), randint(0, 9, (1, 10)), lengths_of(device, 10)
    expected = expected_logits(model, src, tgt, full, full)
    assert_close(model(src, tgt, full, full).detach(), expected, because="max_len tokens are allowed", **LOOSE)


@task("Transformer")
@pytest.mark.parametrize("half", HALF, ids=str)
def test_a_transformer_of_half_precision(solution, device, seed, randint, half):
    model = model_of(solution, seed, device, half)
    batch = batch_of(randint, device)
    expected = expected_logits(model, *batch).to(half)
    assert_close(model(*batch).detach(), expected, because="half in, half out", rtol=0.15, atol=0.3)


@task("Transformer")
def test_float64_all_the_way(solution, device, seed, randint):
    model = model_of(solution, seed, device)
    src, tgt, src_lengths, tgt_lengths = batch_of(randint, device)
    kinds = []
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.register_forward_pre_hook(lambda layer, args: kinds.append(args[0].dtype))
    model(src, tgt, src_lengths, tgt_lengths)
    assert_equal(kinds, [DOUBLE] * 3, because="what each layer gets is float64")


@task("Transformer")
def test_both_tables_are_trained(solution, device, seed, randint, randn):
    model = model_of(solution, seed, device, tie_output=False)
    src, tgt, src_lengths, tgt_lengths = batch_of(randint, device)
    logits = model(src, tgt, src_lengths, tgt_lengths)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad((logits * randn(*logits.shape, dtype=DOUBLE)).sum(), list(parameters.values()))
    still = [name for name, grad in zip(parameters, grads, strict=True) if not grad.abs().max() > 0]
    still = [name for name in still if "k_proj.bias" not in name]
    assert_equal(still, [], because="parameters without a gradient")


@task("Transformer")
def test_shapes_on_the_meta_device(solution):
    with torch.device("meta"):
        model = solution.Transformer(37000, 37000, 512, 8, 6, 6, 2048, 100, share_embeddings=True)
        tokens, lengths = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    logits = model(tokens, tokens[:, :5], lengths, lengths)
    assert_equal(tuple(logits.shape), (2, 5, 37000), because="only shapes are computed there")
    total = sum(p.numel() for p in model.parameters())
    assert_equal(total, 63_084_544, because="the base model of the paper, and the last norms")


@task("Transformer")
@pytest.mark.parametrize("S, T", [(6, 4), (3, 5)])
def test_the_price_of_a_pair(solution, device, randint, S, T):
    model = solution.Transformer(**SIZES).to(device)
    src, tgt, lengths = randint(0, 11, (2, S)), randint(0, 9, (2, T)), lengths_of(device, 2, 3)
    encoder = S * (2 * (4 * D**2 + 2 * D * FF) + 4 * S * D)
    decoder = T * (2 * (6 * D**2 + 2 * D * FF) + 4 * D * (T + S)) + S * 4 * D**2
    flops = 2 * (encoder + 2 * decoder + T * 2 * D * 9)
    assert_cost(model, src, tgt, lengths, lengths, flops=flops, because="one encoder layer, two of the decoder, head")

    def step():
        model(src, tgt, lengths, lengths).sum().backward()

    _, cost = measure(step)
    ratio = cost.flops / flops
    because = "forward and backward: three times that, and a little for softmax and norms"
    assert_that(3.0 <= ratio < 3.2, because=because, value=round(ratio, 1))


@cost_case("Transformer")
def transformer_cost(module, randn, randint):
    model = module.Transformer(100, 100, 32, 4, 2, 2, 64, 40).to(randn(1).device)
    src, tgt = randint(0, 100, (8, 24)), randint(0, 100, (8, 16))
    lengths = torch.full((8,), 16, device=src.device)
    return lambda: model(src, tgt, lengths, lengths)


# greedy_decode


class Scripted(nn.Module):
    """Writes what a table says for the row of the source, the place, and the last token; at other places, nonsense.

    The first source token of a row says which row of the table it is. Calls are written down.
    """

    def __init__(self, table, seed=0):
        super().__init__()
        self.table = table  # (rows, places, V)
        self.weight = nn.Parameter(torch.ones((), dtype=DOUBLE, device=table.device))
        self.generator = torch.Generator().manual_seed(seed)
        self.encoded, self.read, self.lengths, self.graphs = [], [], [], []

    def encode(self, src, src_lengths):
        self.encoded.append((src.clone(), src_lengths.clone()))
        return src[..., None].double() * self.weight

    def decode(self, tgt, memory, src_lengths, tgt_lengths=None):
        self.read.append(tgt.tolist())
        self.lengths.append(src_lengths.tolist())
        B, T = tgt.shape
        V = self.table.shape[2]
        logits = torch.rand(B, T, V, generator=self.generator, dtype=DOUBLE).to(tgt.device) * 9 - 20
        rows = memory[:, 0, 0].round().long()
        token = self.table[rows, T - 1, tgt[:, -1]]
        best = logits[:, -1].amax(-1, keepdim=True) + 1
        logits[:, -1] = logits[:, -1].scatter(1, token[:, None], best)
        self.graphs.append(torch.is_grad_enabled())
        return logits * self.weight


def said(table, row, bos, eos, max_len):
    """What the table says for one row, token by token; the second number counts the calls that it takes."""
    tokens, last = [], bos
    for place in range(max_len):
        last = int(table[row, place, last])
        if last == eos:
            return tokens, place + 1
        tokens.append(last)
    return tokens, max_len


def fixed(device, *rows, V=8):
    """A table that says the same whatever was written."""
    table = torch.zeros(len(rows), len(rows[0]), V, dtype=torch.int64, device=device)
    for i, row in enumerate(rows):
        table[i] = torch.tensor(row)[:, None]
    return table


def sources(device, n, width=3):
    src = torch.arange(n, device=device)[:, None].repeat(1, width)
    return src, torch.arange(n, device=device) % width + 1


def decoded(solution, model, n, bos=1, eos=2, max_len=6):
    src, lengths = sources(model.table.device, n)
    return solution.greedy_decode(model, src, lengths, bos, eos, max_len)


@task("greedy_decode")
@pytest.mark.parametrize("bos, eos, max_len", [(1, 2, 6), (0, 7, 9), (5, 0, 12), (3, 3, 7)])
def test_it_writes_what_the_model_says(solution, device, seed, randint, bos, eos, max_len):
    table = randint(0, 8, (5, 12, 8))
    expected = [said(table, row, bos, eos, max_len)[0] for row in range(5)]
    found = decoded(solution, Scripted(table, seed), 5, bos, eos, max_len)
    assert_equal(found, expected, because=f"the next token depends on the last; bos {bos}, eos {eos}")


@task("greedy_decode")
def test_a_row_ends_before_its_first_eos(solution, device):
    table = fixed(device, [4, 2, 5, 5, 5, 5], [6, 6, 6, 6, 2, 6])
    found = decoded(solution, Scripted(table), 2)
    assert_equal(found, [[4], [6, 6, 6, 6]], because="what the first row says after its eos does not count")


@task("greedy_decode")
def test_a_row_that_says_eos_twice(solution, device):
    table = fixed(device, [4, 2, 5, 2, 5, 5], [6, 6, 6, 6, 6, 2])
    found = decoded(solution, Scripted(table), 2)
    assert_equal(found, [[4], [6, 6, 6, 6, 6]], because="finished is finished")


@task("greedy_decode")
def test_eos_at_once(solution, device):
    table = fixed(device, [2, 2, 2], [2, 5, 5])
    assert_equal(decoded(solution, Scripted(table), 2, max_len=3), [[], []], because="nothing comes before eos")


@task("greedy_decode")
@pytest.mark.parametrize("max_len", [1, 2, 5])
def test_max_len_without_eos(solution, device, max_len):
    table = fixed(device, [4, 5, 6, 7, 3], [3, 3, 3, 3, 3])
    expected = [[4, 5, 6, 7, 3][:max_len], [3] * max_len]
    found = decoded(solution, Scripted(table), 2, max_len=max_len)
    assert_equal(found, expected, because=f"no eos: exactly {max_len} tokens")


@task("greedy_decode")
def test_a_max_len_of_zero(solution, device):
    model = Scripted(fixed(device, [4], [5]))
    assert_equal(decoded(solution, model, 2, max_len=0), [[], []], because="nothing may be written")
    assert_equal(len(model.read), 0, because="calls of the decoder")


@task("greedy_decode")
def test_no_rows_to_decode(solution, device):
    table = fixed(device, [4, 2])
    src = torch.zeros(0, 3, dtype=torch.int64, device=device)
    found = solution.greedy_decode(Scripted(table), src, src[:, 0], 1, 2, 2)
    assert_equal(found, [], because="B = 0")


@task("greedy_decode")
def test_bos_and_eos_are_one_token(solution, device):
    table = fixed(device, [4, 2, 5], [5, 6, 2])
    found = decoded(solution, Scripted(table), 2, bos=2, eos=2, max_len=3)
    assert_equal(found, [[4], [5, 6]], because="the first eos that was written ends a row, not the bos before it")


@task("greedy_decode")
def test_the_encoder_is_called_once(solution, device):
    model = Scripted(fixed(device, [4, 5, 2, 5, 5, 5], [6, 6, 6, 2, 6, 6]))
    src, lengths = sources(device, 2)
    solution.greedy_decode(model, src, lengths, 1, 2, 6)
    assert_equal(len(model.encoded), 1, because="calls of the encoder: its output does not change")
    assert_equal(model.encoded[0][0].tolist(), src.tolist(), because="the source as it is")
    assert_equal(model.encoded[0][1].tolist(), lengths.tolist(), because="the lengths as they are")


@task("greedy_decode")
@pytest.mark.parametrize("rows, calls", [([[4, 5, 2, 5, 5, 5], [6, 2, 6, 6, 6, 6]], 3), ([[2] * 6] * 2, 1)], ids=str)
def test_the_decoder_is_called_once_per_token(solution, device, rows, calls):
    model = Scripted(fixed(device, *rows))
    decoded(solution, model, 2)
    because = f"the longest row has {calls} tokens with its eos; the decoder has read 1 token, then 2, ..."
    assert_equal([len(read[0]) for read in model.read], list(range(1, calls + 1)), because=because)


@task("greedy_decode")
def test_rows_that_have_ended_do_not_come_back(solution, device):
    model = Scripted(fixed(device, [2, 5, 2, 5, 5, 5], [6, 2, 6, 6, 6, 6]))
    decoded(solution, model, 2)
    assert_equal(len(model.read), 2, because="after two tokens both rows have said eos, though not at once")


@task("greedy_decode")
def test_what_the_decoder_reads(solution, device):
    model = Scripted(fixed(device, [4, 5, 6]))
    decoded(solution, model, 1, bos=7, max_len=3)
    assert_equal(model.read, [[[7]], [[7, 4]], [[7, 4, 5]]], because="bos, and then what was written")
    assert_equal(model.lengths, [[1], [1], [1]], because="with the lengths of the sources")


@task("greedy_decode")
def test_lists_of_integers(solution, device):
    found = decoded(solution, Scripted(fixed(device, [4, 5, 2], [3, 2, 3])), 2, max_len=3)
    kinds = type(found).__name__, [type(row).__name__ for row in found], type(found[0][0]).__name__
    assert_equal(kinds, ("list", ["list", "list"], "int"), because="a list of lists of plain integers")


@task("greedy_decode")
def test_no_graph_and_no_other_mode(solution, device):
    model = Scripted(fixed(device, [4, 5, 2], [3, 2, 3]))
    model.part = nn.Linear(1, 1).eval()
    decoded(solution, model, 2, max_len=3)
    assert_equal(sorted(set(model.graphs)), [False], because="decoding needs no graph")
    assert_equal((model.training, model.part.training), (True, False), because="modes are left as they are")


@task("greedy_decode")
def test_nothing_is_drawn(solution, device):
    model = Scripted(fixed(device, [4, 5, 2], [3, 2, 3]))
    with global_rng_untouched():
        decoded(solution, model, 2, max_len=3)


@task("greedy_decode")
def test_a_batch_is_its_rows(solution, reference, device, seed, randint):
    model = randomize_(reference.Transformer(11, 9, 12, 3, 1, 1, 20, 12), seed, 0.6).to(device, DOUBLE).eval()
    src, lengths = randint(0, 11, (6, 7)), lengths_of(device, 7, 1, 3, 5, 2, 6)
    one_by_one = []
    for row in range(6):
        tokens, one = [1], src[row : row + 1, : lengths[row]]
        with torch.no_grad():
            while len(tokens) < 9 and 2 not in tokens:
                n = lengths_of(device, one.shape[1])
                logits = model.decode(torch.tensor([tokens], device=device), model.encode(one, n), n)
                tokens.append(int(logits[0, -1].argmax()))
        one_by_one.append(tokens[1:-1] if tokens[-1] == 2 else tokens[1:])
    found = solution.greedy_decode(model, src, lengths, 1, 2, 8)
    assert_equal(found, one_by_one, because="six rows together, and each by itself without padding")


# reversal_batch


def on(device, seed):
    return torch.Generator(device=device).manual_seed(seed)


def exercises(n, generator):
    """What the docstring of reversal_batch describes, row by row."""
    device = generator.device
    lengths = torch.randint(3, 9, (n,), generator=generator, device=device).tolist()
    digits = torch.randint(0, 10, (n, 8), generator=generator, device=device).tolist()
    src, tgt = [], []
    for k, row in zip(lengths, digits, strict=True):
        tokens = [3 + c for c in row[:k]]
        src.append(tokens + [0] * (8 - k))
        tgt.append(tokens[::-1] + [2] + [0] * (8 - k))
    shapes = (n, 8), (n,), (n, 9), (n,)
    values = src, lengths, tgt, [k + 1 for k in lengths]
    return tuple(torch.tensor(v, dtype=torch.int64, device=device).view(s) for v, s in zip(values, shapes, strict=True))


@task("reversal_batch")
@pytest.mark.parametrize("part", range(4), ids=["src", "src_lengths", "tgt", "tgt_lengths"])
def test_digits_and_the_same_backwards(solution, device, seed, part):
    expected = exercises(50, on(device, seed))[part]
    found = solution.reversal_batch(50, generator=on(device, seed))
    assert_that(isinstance(found, tuple) and len(found) == 4, "four tensors in a tuple", value=type(found).__name__)
    because = ["3 to 8 digits, then PAD", "how many digits", "the digits backwards, EOS, PAD", "one more, for EOS"][
        part
    ]
    assert_close(found[part], expected, because=because)


@task("reversal_batch")
def test_every_target_ends_and_none_begins(solution, device, seed):
    _, _, tgt, tgt_lengths = solution.reversal_batch(200, generator=on(device, seed))
    last = tgt.gather(1, tgt_lengths[:, None] - 1)
    assert_that(bool((last == 2).all()), because="the last real token of each target is EOS")
    assert_equal(int((tgt == 1).sum()), 0, because="BOS is never a target")
    assert_equal(int((tgt == 2).sum()), 200, because="one EOS per target")


@task("reversal_batch")
def test_no_exercises(solution, device, seed):
    found = solution.reversal_batch(0, generator=on(device, seed))
    assert_equal([tuple(x.shape) for x in found], [(0, 8), (0,), (0, 9), (0,)], because="shapes for n = 0")


@task("reversal_batch")
def test_two_draws_and_no_more(solution, device, seed):
    generator, other = on(device, seed), on(device, seed)
    exercises(7, other)
    with global_rng_untouched():
        solution.reversal_batch(7, generator=generator)
    assert_equal(generator.get_state(), other.get_state(), because="the state of the generator after two draws")


# exact_match


def writing(device, *rows):
    """A model that writes these rows, whatever it has read, and targets around them."""
    return Scripted(fixed(device, *rows, V=13))


def matched(solution, device, written, wanted):
    src, lengths = sources(device, len(written))
    return solution.exact_match(writing(device, *written), src, lengths, torch.tensor(wanted, device=device))


@task("exact_match")
@pytest.mark.parametrize(
    "written, expected",
    [
        ([[5, 6, 7, 2], [8, 2, 9, 9]], 1.0),
        ([[5, 6, 4, 2], [8, 2, 9, 9]], 0.5),
        ([[5, 6, 2, 2], [8, 2, 9, 9]], 0.5),
        ([[5, 6, 7, 2], [8, 9, 2, 9]], 0.5),
        ([[5, 6, 7, 7], [2, 8, 2, 9]], 0.0),
        ([[5, 6, 7, 2], [8, 0, 2, 9]], 0.5),
    ],
    ids=["right", "last digit", "too short", "too long", "never ends, ends at once", "padding written"],
)
def test_a_row_is_right_or_it_is_not(solution, device, written, expected):
    found = matched(solution, device, written, [[5, 6, 7, 2], [8, 2, 0, 0]])
    assert_close(found, expected, because="two rows, 5 6 7 and 8: which share is written exactly?")


@task("exact_match")
def test_one_of_four(solution, device):
    rows = [[5, 2, 2], [5, 2, 2], [5, 2, 2], [5, 2, 2]]
    found = matched(solution, device, rows, [[5, 2, 0], [5, 5, 2], [6, 2, 0], [2, 0, 0]])
    assert_close(found, 0.25, because="one row of four")


class Peeking(nn.Module):
    """Says at each place what it has read at the next: it needs a look ahead, and is lost without."""

    def encode(self, src, src_lengths):
        return src[..., None].double()

    def decode(self, tgt, memory, src_lengths, tgt_lengths=None):
        ahead = torch.cat([tgt[:, 1:], torch.full_like(tgt[:, :1], 2)], 1)
        return F.one_hot(ahead, 13).double()

    def forward(self, src, tgt, src_lengths, tgt_lengths):
        return self.decode(tgt, self.encode(src, src_lengths), src_lengths, tgt_lengths)


@task("exact_match")
def test_the_model_must_write_by_itself(solution, device):
    src, lengths = sources(device, 2)
    tgt = torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]], device=device)
    found = solution.exact_match(Peeking(), src, lengths, tgt)
    assert_close(found, 0.0, because="a model that needs to be told the next token writes nothing by itself")


@task("exact_match")
def test_how_the_model_is_asked(solution, device):
    model = writing(device, [5, 6, 7, 7], [8, 8, 8, 8])
    src, lengths = sources(device, 2)
    solution.exact_match(model, src, lengths, torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]], device=device))
    reads = [[row[0] for row in read] for read in model.read]
    assert_equal(reads, [[1, 1]] * 4, because="it begins with BOS and may write as many tokens as tgt is wide")
    assert_equal(model.encoded[0][1].tolist(), lengths.tolist(), because="the lengths of the sources are handed on")


# train_reversal


class Pairs(nn.Module):
    """Scores the next token by the last one alone, and writes down how it was called."""

    def __init__(self, device, generator, scale):
        super().__init__()
        self.scores = nn.Parameter(torch.randn(13, 13, generator=generator, dtype=DOUBLE).to(device))
        self.scale, self.calls, self.modes = scale, [], []

    def forward(self, src, read, src_lengths, tgt_lengths):
        self.calls.append([x.clone() for x in (src, read, src_lengths, tgt_lengths)])
        self.modes.append(self.training)
        return self.scores[read] * self.scale


def written_out(model, steps, batch, lr, generator):
    """The losses and the scores after training, with each formula written out."""
    scores = model.scores.detach().clone().requires_grad_()
    mean = square = torch.zeros_like(scores)
    warmup, losses = steps // 10, []
    for step in range(steps):
        _, _, tgt, _ = exercises(batch, generator)
        read = torch.cat([torch.ones_like(tgt[:, :1]), tgt[:, :-1]], 1)
        loss = F.cross_entropy((scores[read] * model.scale).flatten(0, 1), tgt.flatten(), ignore_index=0)
        (grad,) = torch.autograd.grad(loss, scores)
        grad = grad / max(float(grad.norm()), 1.0)
        rate = (step + 1) / (warmup + 1)
        if step >= warmup:
            rate = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        mean, square = 0.9 * mean + 0.1 * grad, 0.98 * square + 0.02 * grad**2
        step_mean, step_square = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.98 ** (step + 1))
        scores = (scores - lr * rate * step_mean / (step_square.sqrt() + 1e-8)).detach().requires_grad_()
        losses.append(loss.item())
    return losses, scores.detach()


@task("train_reversal")
@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["small gradients", "large gradients"])
@pytest.mark.parametrize("steps", [3, 21])
def test_each_step_written_out(solution, device, seed, generator, steps, scale):
    model = Pairs(device, generator, scale)
    expected, scores = written_out(model, steps, 5, 0.1, on(device, seed))
    losses = solution.train_reversal(model, steps, batch=5, lr=0.1, generator=on(device, seed))
    assert_equal(len(losses), steps, because="one loss per step")
    first = torch.tensor(losses[:1], dtype=DOUBLE), torch.tensor(expected[:1], dtype=DOUBLE)
    assert_close(*first, because="the loss before the first update: nothing but the pairing", rtol=1e-6, atol=1e-8)
    both = torch.tensor(losses, dtype=DOUBLE), torch.tensor(expected, dtype=DOUBLE)
    assert_close(*both, because="loss, clipping, Adam, and the rate of each step", rtol=1e-6, atol=1e-8)
    assert_close(model.scores.detach(), scores, because="the weights after the last step", rtol=1e-5, atol=1e-7)


@task("train_reversal")
def test_the_defaults_of_the_training(solution, device, seed, generator):
    model = Pairs(device, generator, 1.0)
    expected, scores = written_out(model, 2, 32, 4e-3, on(device, seed))
    losses = solution.train_reversal(model, 2, generator=on(device, seed))
    assert_equal([len(call[0]) for call in model.calls], [32, 32], because="batch is 32 by default")
    assert_close(losses, expected, because="two steps with the defaults", rtol=1e-6, atol=1e-8)
    assert_close(model.scores.detach(), scores, because="lr is 4e-3 by default", rtol=1e-5, atol=1e-7)


@task("train_reversal")
@pytest.mark.parametrize("part", range(4), ids=["src", "read", "src_lengths", "tgt_lengths"])
def test_what_the_model_is_called_with(solution, device, seed, generator, part):
    model, other = Pairs(device, generator, 1.0), on(device, seed)
    expected = []
    for _ in range(2):
        src, src_lengths, tgt, tgt_lengths = exercises(4, other)
        read = torch.cat([torch.ones_like(tgt[:, :1]), tgt[:, :-1]], 1)
        expected.append((src, read, src_lengths, tgt_lengths)[part])
    solution.train_reversal(model, 2, batch=4, generator=on(device, seed))
    because = "model(src, read, src_lengths, tgt_lengths), where read is BOS and then the targets before"
    assert_close([call[part] for call in model.calls], expected, because=because)


@task("train_reversal")
def test_only_the_generator_is_asked(solution, device, seed, generator):
    model, ours, other = Pairs(device, generator, 1.0).eval(), on(device, seed), on(device, seed)
    for _ in range(3):
        exercises(4, other)
    with global_rng_untouched():
        solution.train_reversal(model, 3, batch=4, generator=ours)
    assert_equal(ours.get_state(), other.get_state(), because="one batch per step, and nothing else is drawn")
    assert_equal(model.modes, [True] * 3, because="a step is taken in training mode")


@task("train_reversal")
def test_no_steps(solution, device, seed, generator):
    model = Pairs(device, generator, 1.0)
    before = model.scores.detach().clone()
    assert_equal(solution.train_reversal(model, 0, generator=on(device, seed)), [], because="no steps, no losses")
    assert_close(model.scores.detach(), before, because="and no change")


def by_itself(model, src, lengths):
    """What a model writes for each row; the spec's own loop."""
    with torch.no_grad():
        memory = model.encode(src, lengths)
        tokens = torch.full_like(src[:, :1], BOS)
        for _ in range(9):
            tokens = torch.cat([tokens, model.decode(tokens, memory, lengths)[:, -1:].argmax(-1)], 1)
    rows = tokens[:, 1:].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def share_right(model, src, lengths, shown):
    """Which share of the rows of src is written backwards when the model is shown something else, or the same."""
    written = by_itself(model, shown, lengths)
    wanted = [row[:n][::-1] for row, n in zip(src.tolist(), lengths.tolist(), strict=True)]
    return sum(found == row for found, row in zip(written, wanted, strict=True)) / len(wanted)


@task("train_reversal")
def test_it_learns_to_reverse_what_it_reads(solution, reference, device):
    model = reference.Transformer(13, 13, 64, 4, 2, 2, 128, 9)
    start = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # matrices and tables: a start that is the same in every run
                values = torch.randn(parameter.shape, generator=start)
                parameter.copy_(values * (64**-0.5 if "embedding" in name else (3 * parameter.shape[1]) ** -0.5))
            elif "norm" not in name:
                parameter.zero_()
    model.to(device)
    seen = set()
    model.register_forward_pre_hook(lambda model, args: seen.update(map(tuple, args[0].tolist())))
    solution.train_reversal(model, 250, generator=on(device, 1))
    model.eval()
    src, lengths, _, _ = exercises(300, on(device, 2))
    fresh = torch.tensor([tuple(row) not in seen for row in src.tolist()], device=device)
    src, lengths = src[fresh], lengths[fresh]
    right = share_right(model, src, lengths, src)
    because = "after 250 steps at least 85 % of the strings that it has never seen are written backwards"
    assert_that(right >= 0.85, because, value=round(right, 1))
    blank = torch.where(src > 0, ZERO, PAD)
    blind = share_right(model, src, lengths, blank)
    assert_that(
        blind < 0.2, "with all digits replaced by 0 below 20 %: it knows only from the source", value=round(blind, 1)
    )


# beam_search

V = 4


class Tree(nn.Module):
    """Scores the next token by all that was written, from a table; the source must be the one it was made for."""

    def __init__(self, device, generator, width=V, depth=5, scale=2.0):
        super().__init__()
        self.width = width
        self.tables = [
            (torch.randn(width**t, width, generator=generator, dtype=DOUBLE) * scale).to(device) for t in range(depth)
        ]
        self.weight = nn.Parameter(torch.ones((), dtype=DOUBLE, device=device))
        self.encoded, self.read, self.graphs = [], [], []

    def encode(self, src, src_lengths):
        self.encoded.append((src.tolist(), src_lengths.tolist()))
        return (src[..., None].double() + torch.arange(3, device=src.device)) * self.weight

    def decode(self, tgt, memory, src_lengths, tgt_lengths=None):
        n = len(tgt)
        self.read.append(tgt.tolist())
        self.graphs.append(torch.is_grad_enabled())
        src, lengths = self.encoded[0]
        wanted = torch.tensor(src, device=tgt.device)[..., None].double() + torch.arange(3, device=tgt.device)
        assert memory.shape[0] == n, f"a memory of {memory.shape[0]} rows for {n} hypotheses"
        assert src_lengths.tolist() == lengths * n, f"lengths {src_lengths.tolist()} for {n} hypotheses of a source"
        assert (memory == wanted).all(), "the memory is not that of the source"
        place = torch.zeros(n, dtype=torch.int64, device=tgt.device)
        for column in tgt[:, 1:].unbind(1):
            place = place * self.width + column
        noise = torch.zeros(n, tgt.shape[1], self.width, dtype=DOUBLE, device=tgt.device)
        noise[:, -1] = self.tables[tgt.shape[1] - 1][place]
        return noise * self.weight

    def logp(self, prefix):
        place = 0
        for token in prefix:
            place = place * self.width + token
        return self.tables[len(prefix)][place].log_softmax(-1).tolist()


def everything(tree, eos, max_len, penalty):
    """All that can be written in max_len tokens, with scores, best first."""
    found, alive = [], [((), 0.0)]
    for t in range(max_len):
        following = []
        for prefix, total in alive:
            for token, logp in enumerate(tree.logp(prefix)):
                if token == eos:
                    found.append((list(prefix), (total + logp) / (t + 1) ** penalty))
                else:
                    following.append(((*prefix, token), total + logp))
        alive = following
    found += [(list(prefix), total / max_len**penalty) for prefix, total in alive]
    return sorted(found, key=lambda pair: -pair[1])


def slow_beam(tree, beam, eos, max_len, penalty):
    """The docstring, one hypothesis at a time."""
    found, alive = [], [((), 0.0)]
    for t in range(max_len):
        candidates = [
            ((*prefix, token), total + logp) for prefix, total in alive for token, logp in enumerate(tree.logp(prefix))
        ]
        best = sorted(candidates, key=lambda pair: -pair[1])[:beam]
        alive = []
        for tokens, total in best:
            if tokens[-1] == eos or t == max_len - 1:
                text = tokens[:-1] if tokens[-1] == eos else tokens
                found.append((list(text), total / (t + 1) ** penalty))
            else:
                alive.append((tokens, total))
    return sorted(found, key=lambda pair: -pair[1])[:beam]


def source(device):
    return torch.tensor([5, 3, 9], device=device)


def same_list(found, expected, because):
    assert_equal([list(tokens) for tokens, _ in found], [tokens for tokens, _ in expected], because=because)
    scores = torch.tensor([[score for _, score in pairs] for pairs in (found, expected)], dtype=DOUBLE)
    assert_close(scores[0], scores[1], because=f"{because}: the scores", rtol=1e-6, atol=1e-8)


@task("beam_search")
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_a_beam_that_is_wide_enough_finds_everything(solution, device, generator, penalty):
    tree = Tree(device, generator)
    expected = everything(tree, 2, 5, penalty)
    found = solution.beam_search(tree, source(device), 1024, bos=1, eos=2, max_len=5, length_penalty=penalty)
    same_list(found, expected, f"all {len(expected)} hypotheses of 5 tokens over a vocabulary of 4, best first")


@task("beam_search")
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_a_narrow_beam(solution, device, generator, beam, penalty):
    tree = Tree(device, generator)
    expected = slow_beam(tree, beam, 0, 5, penalty)
    found = solution.beam_search(tree, source(device), beam, bos=3, eos=0, max_len=5, length_penalty=penalty)
    same_list(found, expected, f"a beam of {beam}, length penalty {penalty}")


@task("beam_search")
@pytest.mark.parametrize("max_len", [1, 2, 4])
def test_beams_of_any_depth(solution, device, generator, max_len):
    tree = Tree(device, generator)
    expected = slow_beam(tree, 3, 1, max_len, 1.0)
    found = solution.beam_search(tree, source(device), 3, bos=0, eos=1, max_len=max_len, length_penalty=1.0)
    same_list(found, expected, f"max_len {max_len}")


@task("beam_search")
def test_no_penalty_by_default(solution, device, generator):
    tree = Tree(device, generator)
    expected = slow_beam(tree, 2, 2, 5, 0.0)
    same_list(solution.beam_search(tree, source(device), 2, bos=1, eos=2, max_len=5), expected, "length_penalty is 0")


def likely(tree, *paths):
    """Make these paths likely, the first the most; all else nearly impossible."""
    for table in tree.tables:
        table.mul_(0.5).sub_(30.0)  # without ties
    for rank, path in enumerate(paths):
        for t, token in enumerate(path):
            place = 0
            for before in path[:t]:
                place = place * tree.width + before
            tree.tables[t][place, token] = torch.maximum(
                tree.tables[t][place, token], torch.tensor(5.0 - rank, dtype=DOUBLE, device=tree.weight.device)
            )


@task("beam_search")
def test_a_finished_hypothesis_is_kept(solution, device, generator):
    tree = Tree(device, generator)
    likely(tree, (2,), (3, 3, 3, 2), (0, 0, 2))
    found = solution.beam_search(tree, source(device), 3, bos=1, eos=2, max_len=5)
    expected = slow_beam(tree, 3, 2, 5, 0.0)
    same_list(found, expected, "what ends at once, and what ends after three and four tokens")


@task("beam_search")
def test_it_goes_on_after_the_first_end(solution, device, generator):
    tree = Tree(device, generator)
    likely(tree, (2,), (3, 3, 3, 3, 2))
    found = solution.beam_search(tree, source(device), 2, bos=1, eos=2, max_len=5, length_penalty=1.0)
    because = "with a length penalty the longer one, found later, is better"
    assert_equal([tokens for tokens, _ in found], [[3, 3, 3, 3], []], because=because)


@task("beam_search")
def test_no_two_hypotheses_are_the_same(solution, device, generator):
    tree = Tree(device, generator)
    found = solution.beam_search(tree, source(device), 6, bos=1, eos=2, max_len=4)
    texts = [tuple(tokens) for tokens, _ in found]
    assert_equal(len(texts), len(set(texts)), because=f"{len(texts)} hypotheses, how many different ones?")


@task("beam_search")
def test_a_beam_of_one_is_greedy(solution, device, generator):
    tree = Tree(device, generator)
    tokens, total = [], 0.0
    for _ in range(5):
        logp = tree.logp(tokens)
        best = max(range(V), key=lambda token: logp[token])
        total += logp[best]
        if best == 2:
            break
        tokens.append(best)
    found = solution.beam_search(tree, source(device), 1, bos=1, eos=2, max_len=5)
    same_list(found, [(tokens, total)], "a beam of one takes the likeliest token each time")


@task("beam_search")
def test_a_beam_wider_than_the_vocabulary(solution, device, generator):
    tree = Tree(device, generator, width=3)
    expected = slow_beam(tree, 7, 2, 3, 0.0)
    found = solution.beam_search(tree, source(device), 7, bos=1, eos=2, max_len=3)
    same_list(found, expected, "3 continuations at first, a beam of 7")


@task("beam_search")
def test_bos_and_eos_of_a_beam_are_one_token(solution, device, generator):
    tree = Tree(device, generator)
    expected = slow_beam(tree, 3, 1, 4, 0.0)
    found = solution.beam_search(tree, source(device), 3, bos=1, eos=1, max_len=4)
    same_list(found, expected, "bos = eos = 1")


@task("beam_search")
def test_a_beam_without_room(solution, device, generator):
    tree = Tree(device, generator)
    assert_equal(solution.beam_search(tree, source(device), 3, bos=1, eos=2, max_len=0), [], because="max_len is 0")


@task("beam_search")
def test_what_a_beam_costs(solution, device, generator):
    tree = Tree(device, generator)
    likely(tree, (0, 2), (0, 3, 2))
    solution.beam_search(tree, source(device), 2, bos=1, eos=2, max_len=5)
    assert_equal(tree.encoded, [([[5, 3, 9]], [3])], because="the encoder is called once, with one row")
    widths = [len(read[0]) for read in tree.read]
    assert_equal(widths, [*range(1, len(widths) + 1)], because="the decoder is called once per round")
    assert_that(all(row[0] == 1 for read in tree.read for row in read), because="every hypothesis begins with bos")
    rows = [len(read) for read in tree.read]
    assert_equal(
        rows, [len(x) for x in alive_per_round(tree, 2, 2, 5)], because="how many hypotheses live in each round"
    )


def alive_per_round(tree, beam, eos, max_len):
    rounds, alive = [], [((), 0.0)]
    for t in range(max_len):
        if not alive:
            break
        rounds.append(alive)
        candidates = [((*p, token), total + logp) for p, total in alive for token, logp in enumerate(tree.logp(p))]
        best = sorted(candidates, key=lambda pair: -pair[1])[:beam]
        alive = [pair for pair in best if pair[0][-1] != eos and t < max_len - 1]
    return rounds


@task("beam_search")
def test_a_beam_stops_when_nothing_lives(solution, device, generator):
    tree = Tree(device, generator)
    likely(tree, (2,), (3, 2))
    solution.beam_search(tree, source(device), 1, bos=1, eos=2, max_len=5)
    assert_equal(len(tree.read), 1, because="the one hypothesis ended in the first round")


@task("beam_search")
def test_a_beam_changes_nothing(solution, device, generator):
    tree = Tree(device, generator)
    tree.part = nn.Linear(1, 1).eval()
    src = source(device)
    with unchanged(src), global_rng_untouched():
        found = solution.beam_search(tree, src, 2, bos=1, eos=2, max_len=5)
    assert_equal(sorted(set(tree.graphs)), [False], because="decoding needs no graph")
    assert_equal((tree.training, tree.part.training), (True, False), because="modes are left as they are")
    kinds = [type(found).__name__, type(found[0][0]).__name__, type(found[0][1]).__name__]
    assert_equal(kinds, ["list", "list", "float"], because="a list of (list of integers, float)")


@task("beam_search")
@pytest.mark.parametrize("beam", [0, -1])
def test_a_beam_of_nothing(solution, device, generator, beam):
    tree = Tree(device, generator)
    options = {"bos": 1, "eos": 2, "max_len": 5}
    assert_raises(ValueError, solution.beam_search, tree, source(device), beam, **options, mentions=[str(beam)])
