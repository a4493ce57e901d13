"""Day 16: known wrong solutions, each with the sentence for whoever wrote it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from checker.testing import misconception
from reference.day02_tensor_operations import masked_softmax

# causal_mask


def _places(tq, tk, device):
    return torch.arange(tq, device=device)[:, None], torch.arange(tk, device=device)


@misconception(
    "causal_mask",
    "Your mask starts at the top left whatever the sizes are. With a cache, one new query comes with many old keys, and it "
    "would see only the oldest of them: by default the last query belongs to the last key.",
)
def causal_mask__top_left(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key <= query + (0 if offset is None else offset)


@misconception(
    "causal_mask",
    "The diagonal is missing: no place sees itself, and the first one sees nothing at all. A place may look at itself.",
)
def causal_mask__not_itself(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key < query + (tk - tq if offset is None else offset)


@misconception(
    "causal_mask",
    "True stands where attention is forbidden. This is the convention of nn.MultiheadAttention; here True means may attend.",
)
def causal_mask__true_forbids(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key > query + (tk - tq if offset is None else offset)


@misconception(
    "causal_mask",
    "Your queries look forward: the allowed triangle is above the diagonal, where the future is.",
)
def causal_mask__looks_forward(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key >= query + (tk - tq if offset is None else offset)


@misconception(
    "causal_mask",
    "offset=0 gave what None gives: 0 counts as false, so `offset or ...` passes over it. Ask whether it is None.",
)
def causal_mask__zero_is_none(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key <= query + (offset or tk - tq)


@misconception(
    "causal_mask",
    "The offset has the wrong sign: it says how many keys are older than the first query, so a larger one shows more keys.",
)
def causal_mask__wrong_sign(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key <= query - (tk - tq if offset is None else offset)


@misconception(
    "causal_mask",
    "Negative offsets were cut off at 0. They are meant: queries that come before every key have empty rows.",
)
def causal_mask__never_negative(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key <= query + max(0, tk - tq if offset is None else offset)


@misconception(
    "causal_mask",
    "The default is added to the offset that was given. An offset replaces it.",
)
def causal_mask__on_top_of_the_default(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return key <= query + tk - tq + (offset or 0)


@misconception(
    "causal_mask",
    "These are numbers, 0 and 1. A mask is boolean: ~ on an integer flips bits, and a float mask would be added to the scores.",
)
def causal_mask__numbers(tq, tk, *, offset=None, device=None):
    return torch.ones(tq, tk, device=device).tril(tk - tq if offset is None else offset)


@misconception(
    "causal_mask",
    "This is a mask to be added to the scores, 0 and -inf. Here a mask says yes or no, and the softmax does the rest.",
)
def causal_mask__to_be_added(tq, tk, *, offset=None, device=None):
    return torch.full((tq, tk), -torch.inf, device=device).triu((tk - tq if offset is None else offset) + 1)


@misconception(
    "causal_mask",
    "The shape is (tk, tq): queries are the rows, keys the columns.",
)
def causal_mask__keys_first(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, device)
    return (key <= query + (tk - tq if offset is None else offset)).T


@misconception(
    "causal_mask",
    "The mask is on the default device, not on the one that was asked for.",
)
def causal_mask__forgets_the_device(tq, tk, *, offset=None, device=None):
    query, key = _places(tq, tk, "cpu")
    return key <= query + (tk - tq if offset is None else offset)


# combine_masks


def _present(masks):
    """The masks that are there; checks that they broadcast."""
    present = [mask for mask in masks if mask is not None]
    try:
        torch.broadcast_shapes(*(mask.shape for mask in present))
    except RuntimeError as error:
        raise ValueError(f"{' and '.join(str(tuple(mask.shape)) for mask in present)} do not broadcast") from error
    return present


@misconception(
    "combine_masks",
    "You allow what any mask allows. A place hidden by one mask would be shown by another: all of them have to agree.",
)
def combine_masks__any(*masks):
    result = None
    for mask in _present(masks):
        result = mask if result is None else result | mask
    return result


@misconception(
    "combine_masks",
    "One None made the whole result None, so what the other masks hide is shown. None has no say; it does not overrule.",
)
def combine_masks__none_wins(*masks):
    result = None
    for mask in _present(masks):
        result = mask if result is None else result & mask
    return None if any(mask is None for mask in masks) else result


@misconception(
    "combine_masks",
    "Where nothing is forbidden you made a mask of True. Its shape is a guess, and None would have let attention skip the work.",
)
def combine_masks__all_true_for_none(*masks):
    result = torch.ones((), dtype=torch.bool)
    for mask in _present(masks):
        result = result.to(mask.device) & mask
    return result


@misconception(
    "combine_masks",
    "The first mask was changed: &= writes into it, and it belongs to the caller.",
)
def combine_masks__in_place(*masks):
    result = None
    for mask in _present(masks):
        if result is None:
            result = mask
        elif torch.broadcast_shapes(result.shape, mask.shape) == result.shape:
            result &= mask
        else:
            result = result & mask
    return result


@misconception(
    "combine_masks",
    "None among the masks ends in an error. It stands for: everything is allowed.",
)
def combine_masks__none_is_an_error(*masks):
    if not masks:
        return None
    result = masks[0]
    for mask in masks[1:]:
        _present([result, mask])
        result = torch.logical_and(result, mask)
    return result


@misconception(
    "combine_masks",
    "Only the first two masks have a say.",
)
def combine_masks__only_two(*masks):
    present = _present(masks)
    return (present[0] & present[1]) if len(present) > 1 else next(iter(present), None)


@misconception(
    "combine_masks",
    "The sum of masks is a table of counts, not a mask.",
)
def combine_masks__sums(*masks):
    present = _present(masks)
    return sum(mask.long() for mask in present) if present else None


@misconception(
    "combine_masks",
    "Your masks are stacked, and stacking wants equal shapes: a mask of keys (B, 1, 1, Tk) and a causal one (Tq, Tk) have to "
    "broadcast first.",
)
def combine_masks__stacked(*masks):
    present = _present(masks)
    return torch.stack(present).all(0) if present else None


@misconception(
    "combine_masks",
    "Masks that do not fit end in torch's own error, which is no ValueError. Ask whether the shapes broadcast before you "
    "combine, and name both.",
)
def combine_masks__torchs_error(*masks):
    result = None
    for mask in masks:
        if mask is not None:
            result = mask if result is None else result & mask
    return result


# attention


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _fits(q, k, v, mask=None):
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{tuple(q.shape)} {tuple(k.shape)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"{tuple(k.shape)} {tuple(v.shape)}")
    if mask is not None:
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        scores = (*lead, q.shape[-2], k.shape[-2])
        try:
            mask.expand(scores)
        except RuntimeError as error:
            raise ValueError(f"{tuple(mask.shape)} {scores}") from error


def _scores(q, k, scale):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _wide(q) @ _wide(k).mT * scale


def _factors(like, p, generator):
    device = like.device if generator is None else generator.device
    kept = (torch.rand(like.shape, generator=generator, device=device) >= p).to(like)
    return kept / (1 - p) if p < 1 else kept * 0


def _finish(q, v, weights, p, generator):
    if p > 0:
        weights = weights * _factors(weights, p, generator)
    return (weights @ _wide(v)).to(q.dtype), weights.to(q.dtype)


def _attend(q, k, v, mask, scale, p, generator):
    _fits(q, k, v, mask)
    return _finish(q, v, masked_softmax(_scores(q, k, scale), mask), p, generator)


@misconception(
    "attention",
    "Your scores are divided by D. Their variance is D, so their spread is sqrt(D): divided by D they are nearly equal, and "
    "every query gets the average of all values.",
)
def attention__divides_by_the_width(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(q, k, v, mask, 1 / q.shape[-1] if scale is None else scale, dropout_p, generator)


@misconception(
    "attention",
    "The scale was taken from all heads together. The dot product of one head has as many terms as the head is wide.",
)
def attention__scale_of_the_whole_model(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    heads = q.shape[-3] if q.dim() > 2 else 1
    return _attend(q, k, v, mask, (heads * q.shape[-1]) ** -0.5 if scale is None else scale, dropout_p, generator)


@misconception(
    "attention",
    "The scale was taken from the width of the values. Values take no part in the scores; the dot products run over D.",
)
def attention__scale_of_the_values(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(q, k, v, mask, v.shape[-1] ** -0.5 if scale is None else scale, dropout_p, generator)


@misconception(
    "attention",
    "The scale was taken from the number of keys. It belongs to the last axis, over which the dot products run.",
)
def attention__scale_of_the_number_of_keys(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(q, k, v, mask, max(1, k.shape[-2]) ** -0.5 if scale is None else scale, dropout_p, generator)


@misconception(
    "attention",
    "The scores are not scaled. At width D they spread by sqrt(D), and the softmax puts nearly all weight on one key.",
)
def attention__no_scale(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(q, k, v, mask, 1.0 if scale is None else scale, dropout_p, generator)


@misconception(
    "attention",
    "Your scale divides. It is a factor: D ** -0.5, not D ** 0.5.",
)
def attention__divides_by_the_scale(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    wanted = None if scale is None else (math.inf if scale == 0 else 1 / scale)
    return _attend(q, k, v, mask, wanted, dropout_p, generator)


@misconception(
    "attention",
    "The scale that was given is applied on top of D ** -0.5. It replaces it.",
)
def attention__both_scales(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    default = q.shape[-1] ** -0.5
    return _attend(q, k, v, mask, default if scale is None else scale * default, dropout_p, generator)


@misconception(
    "attention",
    "The scale that was given is not used.",
)
def attention__ignores_the_scale(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(q, k, v, mask, None, dropout_p, generator)


@misconception(
    "attention",
    "scale=0 gave what None gives: 0 counts as false, so `scale or ...` passes over it. Ask whether it is None.",
)
def attention__zero_is_none(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(q, k, v, mask, scale or None, dropout_p, generator)


@misconception(
    "attention",
    "It is the columns of your weights that sum to 1: every key spreads itself over the queries. Each query has one unit of "
    "attention to spread, over the last axis.",
)
def attention__softmax_over_queries(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    return _finish(q, v, masked_softmax(_scores(q, k, scale), mask, -2), dropout_p, generator)


@misconception(
    "attention",
    "This is what comes out when the mask is applied after the softmax: the weights that are kept no longer sum to 1, because "
    "the hidden keys had taken their share before.",
)
def attention__mask_after_softmax(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    weights = masked_softmax(_scores(q, k, scale), None)
    return _finish(q, v, weights if mask is None else weights.masked_fill(~mask, 0.0), dropout_p, generator)


@misconception(
    "attention",
    "Your queries attend to just those keys that are hidden. Here True means may attend (nn.MultiheadAttention means the "
    "opposite by it).",
)
def attention__true_hides(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    return _attend(q, k, v, None if mask is None else ~mask, scale, dropout_p, generator)


@misconception(
    "attention",
    "The mask is not used: hidden keys have weights like all others.",
)
def attention__ignores_the_mask(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    return _attend(q, k, v, None, scale, dropout_p, generator)


@misconception(
    "attention",
    "The scores of hidden keys were multiplied by 0. A score of 0 is an ordinary score, exp(0) = 1: hidden keys have to be left "
    "out, not made average.",
)
def attention__mask_times_scores(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scores = _scores(q, k, scale)
    return _finish(q, v, masked_softmax(scores if mask is None else scores * mask, None), dropout_p, generator)


@misconception(
    "attention",
    "The mask was added to the scores as it is: True adds 1 and False adds 0, so hidden keys only weigh e times less.",
)
def attention__mask_plus_scores(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scores = _scores(q, k, scale)
    return _finish(q, v, masked_softmax(scores if mask is None else scores + mask, None), dropout_p, generator)


@misconception(
    "attention",
    "-1e9 is a score like any other. A query with nothing allowed has only such scores and averages over all forbidden keys, and "
    "an allowed score below -1e9 loses against them.",
)
def attention__minus_a_billion(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scores = _scores(q, k, scale)
    weights = masked_softmax(scores if mask is None else scores.masked_fill(~mask, -1e9), None)
    return _finish(q, v, weights, dropout_p, generator)


@misconception(
    "attention",
    "A query with nothing allowed has only scores of -inf, and its softmax is 0/0. One NaN row is enough to make every "
    "gradient NaN: define the row as zeros.",
)
def attention__nan_rows(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scores = _scores(q, k, scale)
    weights = torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1)
    return _finish(q, v, weights, dropout_p, generator)


@misconception(
    "attention",
    "The NaN was replaced after it had been made. Forward looks right, but backward still goes through the softmax of a row of "
    "-inf, 0 times NaN is NaN, and nothing stops it before it reaches q and k.",
)
def attention__nan_repaired_too_late(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scores = _scores(q, k, scale)
    if mask is not None:
        scores = scores + torch.zeros(mask.shape).to(scores).masked_fill(~mask, -torch.inf)
    return _finish(q, v, torch.softmax(scores, -1).nan_to_num(0.0), dropout_p, generator)


@misconception(
    "attention",
    "exp of a large score is inf, and inf/inf is NaN. A softmax does not change when the largest score of the row is taken away "
    "first.",
)
def attention__overflows(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    exponentials = _scores(q, k, scale).exp()
    if mask is not None:
        exponentials = exponentials.masked_fill(~mask, 0.0)
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0, 1.0)
    return _finish(q, v, weights, dropout_p, generator)


@misconception(
    "attention",
    "The product of half queries and keys was rounded before it became float32: in bfloat16 257 is 256, and float16 ends at "
    "65,504. Make float32 of q and k first.",
)
def attention__half_scores(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _wide((q @ k.mT) * scale)
    return _finish(q, v, masked_softmax(scores, mask), dropout_p, generator)


@misconception(
    "attention",
    "float64 went through float32 on its way: .float() makes half inputs wider and double inputs narrower.",
)
def attention__always_float32(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    out, weights = _attend(q.float(), k.float(), v.float(), mask, scale, dropout_p, generator)
    return out.to(q.dtype), weights.to(q.dtype)


@misconception(
    "attention",
    "Half inputs came back as float32. The wide numbers are for the way; the result has the dtype of q.",
)
def attention__stays_wide(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(_wide(q), _wide(k), _wide(v), mask, scale, dropout_p, generator)


@misconception(
    "attention",
    "Parts of the output were dropped. It is the weights that are dropped, so that a query misses a key as a whole.",
)
def attention__drops_the_output(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    out, weights = _attend(q, k, v, mask, scale, 0.0, None)
    if dropout_p > 0:
        out = out * _factors(out, dropout_p, generator)
    return out, weights


@misconception(
    "attention",
    "out is right, but the weights that came with it are those before dropout: they are not what v was multiplied by.",
)
def attention__returns_the_whole_weights(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    out, _ = _attend(q, k, v, mask, scale, dropout_p, generator)
    return out, _attend(q, k, v, mask, scale, 0.0, None)[1]


@misconception(
    "attention",
    "Dropped keys got a score of 0 or -inf before the softmax, so the others share their weight exactly. Dropout comes after "
    "the softmax, and the sum of the weights may change.",
)
def attention__drops_keys_before_the_softmax(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scores = _scores(q, k, scale)
    if dropout_p > 0:
        kept = _factors(scores, dropout_p, generator) > 0
        mask = kept if mask is None else kept & mask
    return _finish(q, v, masked_softmax(scores, mask), 0.0, None)


@misconception(
    "attention",
    "The weights that were kept did not grow. Divide them by 1 - dropout_p, and they have the right size on average, so that "
    "nothing has to change when dropout is off.",
)
def attention__kept_weights_do_not_grow(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    weights = masked_softmax(_scores(q, k, scale), mask)
    if dropout_p > 0:
        weights = weights * (_factors(weights, dropout_p, generator) > 0)
    return _finish(q, v, weights, 0.0, None)


@misconception(
    "attention",
    "dropout_p is the probability to drop, and you keep with this probability.",
)
def attention__keeps_with_p(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    weights = masked_softmax(_scores(q, k, scale), mask)
    if dropout_p > 0:
        kept = _factors(weights, 1 - dropout_p, generator) > 0
        weights = weights * kept / (1 - dropout_p) if dropout_p < 1 else weights * 0
    return _finish(q, v, weights, 0.0, None)


@misconception(
    "attention",
    "Your dropout asks torch's global generator, so the one that was given has no say and nobody can repeat the run.",
)
def attention__global_dropout(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    weights = F.dropout(masked_softmax(_scores(q, k, scale), mask), dropout_p)
    return _finish(q, v, weights, 0.0, None)


@misconception(
    "attention",
    "With dropout_p=1 you divide by zero: 0/0 is NaN where 0 was promised.",
)
def attention__dropout_of_one_is_nan(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    weights = masked_softmax(_scores(q, k, scale), mask)
    if dropout_p > 0:
        weights = weights * (_factors(weights, dropout_p, generator) > 0) / torch.tensor(1 - dropout_p).to(weights)
    return _finish(q, v, weights, 0.0, None)


@misconception(
    "attention",
    "One draw per query decided over its whole row. Each weight is dropped by itself.",
)
def attention__drops_whole_rows(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    weights = masked_softmax(_scores(q, k, scale), mask)
    if dropout_p > 0:
        weights = weights * _factors(weights[..., :1], dropout_p, generator)
    return _finish(q, v, weights, 0.0, None)


@misconception(
    "attention",
    "Dropout is off where no generator is given. Then torch's global one is to be used.",
)
def attention__no_dropout_without_generator(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _attend(q, k, v, mask, scale, 0.0 if generator is None else dropout_p, generator)


@misconception(
    "attention",
    "Shapes that do not fit end in torch's own error, somewhere in the middle. Compare them at the door, and name both.",
)
def attention__torchs_errors(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    return _finish(q, v, masked_softmax(_scores(q, k, scale), mask), dropout_p, generator)


@misconception(
    "attention",
    "You swapped axes 1 and 2 of k, counted from the front. With heads these are heads and keys: count from the end.",
)
def attention__axes_from_the_front(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _wide(q) @ _wide(k).transpose(1, 2) * scale
    return _finish(q, v, masked_softmax(scores, mask), dropout_p, generator)


@misconception(
    "attention",
    "The numbers are right, but the heads were done one after the other. A matrix product takes any number of leading axes at "
    "once.",
)
def attention__one_head_at_a_time(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    if not lead or 0 in lead:
        return _attend(q, k, v, mask, scale, dropout_p, generator)
    q2, k2 = (x.expand(*lead, *x.shape[-2:]).flatten(0, -3) for x in (q, k))
    scores = torch.stack([_scores(one, two, scale) for one, two in zip(q2, k2, strict=True)])
    scores = scores.reshape(*lead, *scores.shape[-2:])
    return _finish(q, v, masked_softmax(scores, mask), dropout_p, generator)


@misconception(
    "attention",
    "The numbers are right, but far more tables of the size of the scores are alive than needed: results that nobody needs any "
    "more still have a name.",
)
def attention__keeps_every_step(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    _fits(q, k, v, mask)
    raw = _wide(q) @ _wide(k).mT
    scaled = raw * (q.shape[-1] ** -0.5 if scale is None else scale)
    lowered = scaled - scaled.amax(-1, keepdim=True) if k.shape[-2] else scaled
    weights = masked_softmax(lowered, mask)
    return _finish(q, v, weights, dropout_p, generator)


# attention_grads


def _fits_backward(dout, q, k, v, weights):
    for found, wanted in ((dout, (*q.shape[:-1], v.shape[-1])), (weights, (*q.shape[:-1], k.shape[-2]))):
        if found.shape != wanted:
            raise ValueError(f"{tuple(found.shape)} {tuple(wanted)}")


def _softmax_part(weights, dweights):
    return weights * (dweights - (weights * dweights).sum(-1, keepdim=True))


def _backward(dout, q, k, v, weights, scale, softmax_part=_softmax_part, scales=(1, 1), wide=_wide):
    _fits_backward(dout, q, k, v, weights)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    dout, q, k, v, weights = (wide(x) for x in (dout, q, k, v, weights))
    dscores = softmax_part(weights, dout @ v.mT)
    dq, dk = dscores @ k * scale ** scales[0], dscores.mT @ q * scale ** scales[1]
    return dq.to(dtype), dk.to(dtype), (weights.mT @ dout).to(dtype)


@misconception(
    "attention_grads",
    "Your softmax passes each weight's gradient on by itself, P * dP. But the weights of a row sum to 1: raising one score "
    "lowers all other weights, and this share has to be taken off.",
)
def attention_grads__no_sharing(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, lambda p, dp: p * dp)


@misconception(
    "attention_grads",
    "P * (1 - P) is only the diagonal of the Jacobian of a softmax. It is right for a sigmoid, where each output has its own "
    "input.",
)
def attention_grads__sigmoid(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, lambda p, dp: p * (1 - p) * dp)


@misconception(
    "attention_grads",
    "The mean of dP was taken off without weights. What has to be subtracted is the average of dP under the weights of the row.",
)
def attention_grads__plain_mean(dout, q, k, v, weights, scale):
    def part(p, dp):
        return p * (dp - (dp.mean(-1, keepdim=True) if dp.shape[-1] else 0))

    return _backward(dout, q, k, v, weights, scale, part)


@misconception(
    "attention_grads",
    "The sum runs over the queries. Each row of the weights is a softmax of its own, so it runs over the keys, the last axis.",
)
def attention_grads__sum_over_queries(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, lambda p, dp: p * (dp - (p * dp).sum(-2, keepdim=True)))


@misconception(
    "attention_grads",
    "One sum was taken over the whole table. Each row of the weights is a softmax of its own.",
)
def attention_grads__sum_over_everything(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, lambda p, dp: p * (dp - (p * dp).sum((-2, -1), keepdim=True)))


@misconception(
    "attention_grads",
    "There is no softmax in your backward: dP was taken for the gradient of the scores.",
)
def attention_grads__no_softmax(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, lambda p, dp: dp)


@misconception(
    "attention_grads",
    "The minus is a plus: what the other weights lose has to be taken off.",
)
def attention_grads__adds_the_share(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, lambda p, dp: p * (dp + (p * dp).sum(-1, keepdim=True)))


@misconception(
    "attention_grads",
    "The scale is missing: the scores were multiplied by it on the way forward, so their gradient is on the way back.",
)
def attention_grads__no_scale(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, scales=(0, 0))


@misconception(
    "attention_grads",
    "dq is scaled, dk is not. Both come out of the same scaled product.",
)
def attention_grads__keys_not_scaled(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, scales=(1, 0))


@misconception(
    "attention_grads",
    "The scale is in there twice.",
)
def attention_grads__scaled_twice(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, scales=(2, 2))


@misconception(
    "attention_grads",
    "scale=0 gave what None gives: 0 counts as false. Ask whether it is None.",
)
def attention_grads__zero_is_none(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale or None)


@misconception(
    "attention_grads",
    "dq and dk are the wrong way round: the gradient of the queries is a mixture of keys, that of the keys a mixture of queries.",
)
def attention_grads__queries_and_keys_swapped(dout, q, k, v, weights, scale):
    dq, dk, dv = _backward(dout, q, k, v, weights, scale)
    return dk, dq, dv


@misconception(
    "attention_grads",
    "dv was computed from the gradient of the scores. out is weights times v, so v only meets the weights.",
)
def attention_grads__values_from_scores(dout, q, k, v, weights, scale):
    dq, dk, _ = _backward(dout, q, k, v, weights, scale)
    wide = [_wide(x) for x in (dout, v, weights)]
    dscores = _softmax_part(wide[2], wide[0] @ wide[1].mT)
    return dq, dk, (dscores.mT @ wide[0]).to(q.dtype)


@misconception(
    "attention_grads",
    "The products were rounded to half precision on the way. dP minus its average is a small difference of large numbers, and "
    "half precision has no digits left for it.",
)
def attention_grads__in_half(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, wide=lambda x: x)


@misconception(
    "attention_grads",
    "float64 went through float32 on its way: .float() makes half inputs wider and double inputs narrower.",
)
def attention_grads__always_float32(dout, q, k, v, weights, scale):
    return _backward(dout, q, k, v, weights, scale, wide=lambda x: x.float())


@misconception(
    "attention_grads",
    "Half inputs got float32 gradients. A gradient has the dtype of what it belongs to.",
)
def attention_grads__stays_wide(dout, q, k, v, weights, scale):
    _fits_backward(dout, q, k, v, weights)
    return _backward(*(_wide(x) for x in (dout, q, k, v, weights)), scale)


@misconception(
    "attention_grads",
    "A dout or weights of another shape was broadcast or ended in torch's own error. Compare the shapes at the door, and name "
    "the one that came and the one that is needed.",
)
def attention_grads__never_looks_at_shapes(dout, q, k, v, weights, scale):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = [_wide(x) for x in (dout, q, k, v, weights)]
    dscores = _softmax_part(wide[4], wide[0] @ wide[3].mT)
    grads = dscores @ wide[2] * scale, dscores.mT @ wide[1] * scale, wide[4].mT @ wide[0]
    return tuple(x.to(q.dtype) for x in grads)


@misconception(
    "attention_grads",
    "The weights were computed again from q and k, although they were given: two products more, and without the mask, which "
    "only the given weights know.",
)
def attention_grads__weights_again(dout, q, k, v, weights, scale):
    _fits_backward(dout, q, k, v, weights)
    again = masked_softmax(_scores(q, k, scale), None)
    return _backward(dout, q, k, v, again.to(q.dtype), scale)


# attention_flops


@misconception(
    "attention_flops",
    "You counted multiplications only. Each is followed by an addition, and both are operations.",
)
def attention_flops__multiplications_only(b, h, tq, tk, d, dv):
    return b * h * tq * tk * (d + dv)


@misconception(
    "attention_flops",
    "This is the product of queries and keys alone. Weights times values is a second one.",
)
def attention_flops__scores_only(b, h, tq, tk, d, dv):
    return 2 * b * h * tq * tk * d


@misconception(
    "attention_flops",
    "Both products were counted with width d. The second one makes values, and they have a width of their own.",
)
def attention_flops__one_width(b, h, tq, tk, d, dv):
    return 4 * b * h * tq * tk * d


@misconception(
    "attention_flops",
    "The heads are missing: each of them has its own table of scores.",
)
def attention_flops__one_head(b, h, tq, tk, d, dv):
    return 2 * b * tq * tk * (d + dv)


@misconception(
    "attention_flops",
    "The softmax is in your count. Only the two matrix products are asked for.",
)
def attention_flops__softmax_too(b, h, tq, tk, d, dv):
    return 2 * b * h * tq * tk * (d + dv) + 5 * b * h * tq * tk


@misconception(
    "attention_flops",
    "You took half, as if the mask saved something. The products are computed for all pairs and masked afterwards.",
)
def attention_flops__causal_half(b, h, tq, tk, d, dv):
    return b * h * tq * tk * (d + dv) // 1 if tq == tk else b * h * tq * (2 * tk - tq + 1) * (d + dv)


@misconception(
    "attention_flops",
    "The count is a float. Floats are exact up to 2**53 only, and one forward pass of a large model is beyond that.",
)
def attention_flops__float(b, h, tq, tk, d, dv):
    return 2.0 * b * h * tq * tk * (d + dv)


@misconception(
    "attention_flops",
    "The number of queries is squared. Queries and keys need not be as many: with a cache one query meets all keys.",
)
def attention_flops__squared(b, h, tq, tk, d, dv):
    return 2 * b * h * tq * tq * (d + dv)


# logit_spread


def _draw(d, n, generator):
    first = torch.randn(n, d, generator=generator, device=generator.device)
    return first, torch.randn(n, d, generator=generator, device=generator.device)


def _entropy(scores, dim=-1):
    return torch.special.entr(torch.softmax(scores, dim)).sum(dim).mean().item()


def _default(scale, d):
    return d**-0.5 if scale is None else scale


@misconception(
    "logit_spread",
    "This is the variance. The spread is its root, and it is the spread that has to be about 1.",
)
def logit_spread__variance(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.var(correction=0).item(), _entropy(scores)


@misconception(
    "logit_spread",
    "torch.std divides by one less than the number of scores unless told otherwise; a single score then has a spread of NaN.",
)
def logit_spread__corrected(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std().item(), _entropy(scores)


@misconception(
    "logit_spread",
    "The spread is that of the scores before they were scaled.",
)
def logit_spread__spread_before_scale(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    return (q @ k.T).std(correction=0).item(), _entropy(q @ k.T * _default(scale, d))


@misconception(
    "logit_spread",
    "The entropy is that of the scores before they were scaled.",
)
def logit_spread__entropy_before_scale(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    return (q @ k.T * _default(scale, d)).std(correction=0).item(), _entropy(q @ k.T)


@misconception(
    "logit_spread",
    "Each query's spread was taken by itself, then averaged. It is asked over all scores together, about their common mean.",
)
def logit_spread__row_by_row(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std(-1, correction=0).mean().item(), _entropy(scores)


@misconception(
    "logit_spread",
    "The entropy is NaN: a weight that underflowed to 0 has the logarithm -inf, and 0 times -inf is NaN. The limit of p * log(p) "
    "is 0.",
)
def logit_spread__zero_times_infinity(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    p = torch.softmax(scores, -1)
    return scores.std(correction=0).item(), -(p * p.log()).sum(-1).mean().item()


@misconception(
    "logit_spread",
    "Your entropy is counted in bits, with log2. Here it is the natural logarithm.",
)
def logit_spread__bits(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0).item(), _entropy(scores) / math.log(2)


@misconception(
    "logit_spread",
    "The entropies of all queries were added up. The mean is asked, so that it can be compared with log(n).",
)
def logit_spread__summed(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0).item(), _entropy(scores) * n


@misconception(
    "logit_spread",
    "The terms p * log(p) were averaged over the keys as well. Within one query they are added.",
)
def logit_spread__averaged_over_keys(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0).item(), _entropy(scores) / n


@misconception(
    "logit_spread",
    "Your entropy is negative: a sign is missing.",
)
def logit_spread__negative(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0).item(), -_entropy(scores)


@misconception(
    "logit_spread",
    "Your softmax runs over the queries, or, which comes to the same, the keys were drawn before the queries. First q, then k, and "
    "each query spreads its weight over the keys.",
)
def logit_spread__over_queries(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0).item(), _entropy(scores, 0)


@misconception(
    "logit_spread",
    "Queries and keys are the same vectors. Then each query meets itself, with a score of about d, and takes nearly all the "
    "weight.",
)
def logit_spread__queries_are_keys(d, n, scale, *, generator):
    q, _ = _draw(d, n, generator)
    scores = q @ q.T * _default(scale, d)
    return scores.std(correction=0).item(), _entropy(scores)


@misconception(
    "logit_spread",
    "The numbers were drawn from torch's global generator, so nobody can repeat them and everybody's next draw has changed.",
)
def logit_spread__global_numbers(d, n, scale, *, generator):
    q, k = torch.randn(n, d), torch.randn(n, d)
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0).item(), _entropy(scores)


@misconception(
    "logit_spread",
    "The numbers are uniform between 0 and 1, not normal: they are all positive, and so are the dot products.",
)
def logit_spread__uniform(d, n, scale, *, generator):
    q, k = (torch.rand(n, d, generator=generator) for _ in range(2))
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0).item(), _entropy(scores)


@misconception(
    "logit_spread",
    "Without a scale given, you used none. None means d ** -0.5.",
)
def logit_spread__none_is_one(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * (1.0 if scale is None else scale)
    return scores.std(correction=0).item(), _entropy(scores)


@misconception(
    "logit_spread",
    "scale=0 gave what None gives: 0 counts as false. Ask whether it is None.",
)
def logit_spread__zero_is_none(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * (scale or d**-0.5)
    return scores.std(correction=0).item(), _entropy(scores)


@misconception(
    "logit_spread",
    "These are tensors of one element. The caller was promised plain floats.",
)
def logit_spread__tensors(d, n, scale, *, generator):
    q, k = _draw(d, n, generator)
    scores = q @ k.T * _default(scale, d)
    return scores.std(correction=0), torch.special.entr(torch.softmax(scores, -1)).sum(-1).mean()


# flash_attention


class _Flash(torch.autograd.Function):
    """A right flash attention, unless `flaw` says where it goes wrong."""

    @staticmethod
    def forward(ctx, q, k, v, causal, block_q, block_k, flaw):
        ctx.rest = (causal, block_q, block_k, flaw)
        wide = (lambda x: x) if flaw == "in_half" else _wide
        lead, (Tq, _), (Tk, Dv) = q.shape[:-2], q.shape[-2:], v.shape[-2:]
        out, lse = wide(q).new_zeros(*lead, Tq, Dv), wide(q).new_full((*lead, Tq, 1), torch.inf)
        for i in range(0, Tq, block_q):
            rows = slice(i, min(i + block_q, Tq))
            top = total = mixture = None
            for j in _Flash.columns(rows, Tq, Tk, causal, block_k, flaw):
                columns = slice(j, min(j + block_k, Tk))
                if flaw == "last_block" and j + block_k > Tk:
                    continue
                scores = _Flash.scores(q, k, rows, columns, causal, flaw)
                values = wide(v[..., columns, :])
                if top is None:
                    top = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
                    total, mixture = torch.zeros_like(top), scores.new_zeros(*scores.shape[:-1], Dv)
                highest = torch.maximum(top, scores.amax(-1, keepdim=True))
                if flaw == "no_maximum":
                    highest = torch.zeros_like(highest)
                if flaw == "first_maximum" and j > 0:
                    highest = top
                shift = highest if flaw == "nan_rows" else highest.masked_fill(highest == -torch.inf, 0.0)
                weights, decay = (scores - shift).exp(), (top - shift).exp()
                if flaw in ("no_maximum", "first_maximum") and j > 0:
                    decay = torch.ones_like(decay)
                if flaw == "average_of_blocks":
                    weights = torch.softmax(scores.masked_fill(highest == -torch.inf, 0.0), -1)
                    decay = torch.ones_like(decay)
                total = total * (1 if flaw == "total_not_decayed" else decay) + weights.sum(-1, keepdim=True)
                mixture = mixture * (1 if flaw == "mixture_not_decayed" else decay) + weights @ values
                top = highest
            if top is not None:
                empty = total == 0
                if flaw == "nan_rows":
                    empty = torch.zeros_like(empty)
                if flaw == "not_divided":
                    out[..., rows, :] = mixture
                else:
                    out[..., rows, :] = mixture / total.masked_fill(empty, 1.0)
                lse[..., rows, :] = (top + total.log()).masked_fill(empty, torch.inf)
        out = out if flaw == "stays_wide" else out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *([q.double()] if flaw == "saves_more" else []))
        return out

    @staticmethod
    def backward(ctx, dout):
        causal, block_q, block_k, flaw = ctx.rest
        q, k, v, out, lse = ctx.saved_tensors[:5]
        wide = (lambda x: x) if flaw == "in_half" else _wide
        Tq, Tk = q.shape[-2], k.shape[-2]
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = (torch.zeros_like(wide(x)) for x in (q, k, v))
        if flaw == "half_sums":
            dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for i in range(0, Tq, block_q):
            rows = slice(i, min(i + block_q, Tq))
            d_rows = wide(dout[..., rows, :])
            mean = (d_rows * wide(out[..., rows, :])).sum(-1, keepdim=True)
            for j in _Flash.columns(rows, Tq, Tk, causal, block_k, flaw):
                columns = slice(j, min(j + block_k, Tk))
                weights = (_Flash.scores(q, k, rows, columns, causal, flaw) - lse[..., rows, :]).exp()
                dweights = d_rows @ wide(v[..., columns, :]).mT
                if flaw == "mean_of_the_block":
                    mean = (weights * dweights).sum(-1, keepdim=True)
                if flaw == "no_mean":
                    mean = torch.zeros_like(mean)
                dscores = weights * (dweights - mean) * (1.0 if flaw == "backward_not_scaled" else scale)
                dq[..., rows, :] += (dscores @ wide(k[..., columns, :])).to(dq.dtype)
                if flaw == "overwrites":
                    dk[..., columns, :] = dscores.mT @ wide(q[..., rows, :])
                    dv[..., columns, :] = weights.mT @ d_rows
                    continue
                dk[..., columns, :] += (dscores.mT @ wide(q[..., rows, :])).to(dk.dtype)
                dv[..., columns, :] += (weights.mT @ d_rows).to(dv.dtype)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None, None

    @staticmethod
    def columns(rows, Tq, Tk, causal, block_k, flaw):
        offset = 0 if flaw == "top_left" else Tk - Tq
        seen = Tk if not causal or flaw in ("every_block", "not_causal") else min(rows.stop + offset, Tk)
        return range(0, seen, block_k)

    @staticmethod
    def scores(q, k, rows, columns, causal, flaw):
        wide = (lambda x: x) if flaw == "in_half" else _wide
        scores = wide(q[..., rows, :]) @ wide(k[..., columns, :]).mT
        if flaw != "not_scaled":
            scores = scores * q.shape[-1] ** -0.5
        if causal and flaw != "not_causal":
            offset = 0 if flaw == "top_left" else k.shape[-2] - q.shape[-2]
            query = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            key = torch.arange(columns.start, columns.stop, device=q.device)
            hidden = key >= query + offset if flaw == "not_itself" else key > query + offset
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores


def _flash(q, k, v, causal, block_q, block_k, flaw):
    if flaw != "never_looks":
        _fits(q, k, v)
    return _Flash.apply(q, k, v, causal, block_q, block_k, flaw)


@misconception(
    "flash_attention",
    "The numbers are right, but the whole table of scores was made. Look at a block of keys at a time, and keep only what the "
    "next block needs to know.",
)
def flash_attention__the_table(q, k, v, *, causal=False, block_q=64, block_k=64):
    _fits(q, k, v)
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    mask = mask.tril(k.shape[-2] - q.shape[-2]) if causal else mask
    return _attend(q, k, v, mask, None, 0.0, None)[0]


@misconception(
    "flash_attention",
    "Forward makes no table, but autograd keeps every block of weights for backward, and together they are the table. Say "
    "yourself what is saved, and compute the blocks again.",
)
def flash_attention__autograd_keeps_the_blocks(q, k, v, *, causal=False, block_q=64, block_k=64):
    _fits(q, k, v)
    (Tq, D), (Tk, Dv) = q.shape[-2:], v.shape[-2:]
    parts = []
    for i in range(0, Tq, block_q):
        rows = _wide(q[..., i : i + block_q, :]) * D**-0.5
        top = rows.new_full((*rows.shape[:-1], 1), -torch.inf)
        total, mixture = torch.zeros_like(top), rows.new_zeros(*rows.shape[:-1], Dv)
        for j in range(0, min(i + rows.shape[-2] + Tk - Tq, Tk) if causal else Tk, block_k):
            scores = rows @ _wide(k[..., j : j + block_k, :]).mT
            if causal:
                query = torch.arange(i, i + rows.shape[-2], device=q.device)[:, None] + Tk - Tq
                hidden = torch.arange(j, j + scores.shape[-1], device=q.device) > query
                scores = scores.masked_fill(hidden, -torch.inf)
            highest = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
            shift = highest.masked_fill(highest == -torch.inf, 0.0)
            weights, decay = (scores - shift).exp(), (top - shift).exp()
            total = total * decay + weights.sum(-1, keepdim=True)
            mixture = mixture * decay + weights @ _wide(v[..., j : j + block_k, :])
            top = highest
        parts.append(mixture / total.masked_fill(total == 0, 1.0))
    return (torch.cat(parts, -2) if parts else q[..., :1] @ v[..., :1, :]).to(q.dtype)


@misconception(
    "flash_attention",
    "When a later block raised the maximum, the mixture so far was not scaled down with it: it stands for weights relative to "
    "the old maximum.",
)
def flash_attention__mixture_not_decayed(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "mixture_not_decayed")


@misconception(
    "flash_attention",
    "When a later block raised the maximum, the sum so far was not scaled down with it, so the weights no longer sum to 1.",
)
def flash_attention__total_not_decayed(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "total_not_decayed")


@misconception(
    "flash_attention",
    "No maximum is taken away before exp, so large scores give inf/inf and very low ones 0/0.",
)
def flash_attention__no_maximum(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "no_maximum")


@misconception(
    "flash_attention",
    "The maximum of the first block is kept for all. A later block may be higher by more than exp can bear.",
)
def flash_attention__first_maximum(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "first_maximum")


@misconception(
    "flash_attention",
    "Each block has a softmax of its own, and the results were averaged: a block of poor keys counts as much as one of good "
    "keys.",
)
def flash_attention__average_of_blocks(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "average_of_blocks")


@misconception(
    "flash_attention",
    "The mixture was not divided by the sum of the weights at the end.",
)
def flash_attention__not_divided(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "not_divided")


@misconception(
    "flash_attention",
    "The last block of keys is only looked at if it is full. Tk need not be a multiple of block_k.",
)
def flash_attention__last_block_missing(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "last_block")


@misconception(
    "flash_attention",
    "The scores are not scaled by D ** -0.5.",
)
def flash_attention__not_scaled(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "not_scaled")


@misconception(
    "flash_attention",
    "causal=True shows the future as well.",
)
def flash_attention__not_causal(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "not_causal")


@misconception(
    "flash_attention",
    "Your causal triangle starts at the top left. The last query belongs to the last key, however many there are.",
)
def flash_attention__top_left(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "top_left")


@misconception(
    "flash_attention",
    "With causal=True no place sees itself.",
)
def flash_attention__not_itself(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "not_itself")


@misconception(
    "flash_attention",
    "A query that sees nothing has a maximum of -inf, and -inf minus -inf is NaN. Its row is zeros, and so is its gradient.",
)
def flash_attention__nan_rows(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "nan_rows")


@misconception(
    "flash_attention",
    "The numbers are right, but blocks that lie wholly in the future were multiplied and then masked. They are nearly half of "
    "all; leave them out.",
)
def flash_attention__every_block(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "every_block")


@misconception(
    "flash_attention",
    "Half inputs were summed up in half precision. Each of many blocks then rounds what all blocks before it had found.",
)
def flash_attention__in_half(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "in_half")


@misconception(
    "flash_attention",
    "Forward is right. In backward the gradients of half inputs are added up in half precision: beside a large sum, what a "
    "further block brings is rounded away.",
)
def flash_attention__half_sums(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "half_sums")


@misconception(
    "flash_attention",
    "Half inputs came back as float32. The result has the dtype of q.",
)
def flash_attention__stays_wide(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "stays_wide")


@misconception(
    "flash_attention",
    "Forward is right. In backward the scale is missing: dq and dk are too large by sqrt(D).",
)
def flash_attention__backward_not_scaled(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "backward_not_scaled")


@misconception(
    "flash_attention",
    "Forward is right. In backward each block takes off its own average of dP; the softmax goes over all blocks of a row, and so "
    "does the average. It is known before the first block: sum(dout * out).",
)
def flash_attention__mean_of_the_block(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "mean_of_the_block")


@misconception(
    "flash_attention",
    "Forward is right. In backward the softmax passes P * dP on and takes nothing off, as if the weights of a row were free to "
    "grow all together.",
)
def flash_attention__no_mean(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "no_mean")


@misconception(
    "flash_attention",
    "Forward is right. In backward each block of queries overwrites what the one before had sent to the keys and values. Add.",
)
def flash_attention__overwrites(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "overwrites")


@misconception(
    "flash_attention",
    "The numbers are right, but more is saved for backward than q, k, v, out and one number per query.",
)
def flash_attention__saves_more(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "saves_more")


@misconception(
    "flash_attention",
    "Shapes that do not fit end in torch's own error, or in a result that should not exist. Compare them at the door.",
)
def flash_attention__never_looks_at_shapes(q, k, v, *, causal=False, block_q=64, block_k=64):
    return _flash(q, k, v, causal, block_q, block_k, "never_looks")
