"""Day 1: wrong solutions, each with the sentence for whoever wrote it."""

import torch

from checker.testing import misconception

# scalar


@misconception(
    "scalar",
    "torch.Tensor with a capital T is the class, and a number given to it is a size: torch.Tensor(3) is "
    "not the 3, it is three floats of uninitialized memory. The function torch.tensor takes values.",
)
def scalar__capital_tensor(value, *, dtype=torch.float32, device=None):
    return torch.Tensor(value)


@misconception(
    "scalar",
    "The brackets made an axis: a list with one number is a vector of shape (1,). A single number has no "
    "axis, and its shape is ().",
)
def scalar__list_of_one(value, *, dtype=torch.float32, device=None):
    return torch.tensor([value], dtype=dtype, device=device)


@misconception(
    "scalar",
    "You let torch guess: an int became int64, a float became float32, and the device is the default one. "
    "Here the caller decides: pass dtype and device on.",
)
def scalar__guessed(value, *, dtype=torch.float32, device=None):
    return torch.tensor(value)


@misconception(
    "scalar",
    "The dtype is right, but the tensor was made on the default device: device was taken as an argument "
    "and then forgotten.",
)
def scalar__device_forgotten(value, *, dtype=torch.float32, device=None):
    return torch.tensor(value, dtype=dtype)


@misconception(
    "scalar",
    "The device is right, but torch guessed the dtype from the number: an int became int64. The caller decides: "
    "dtype was taken as an argument and then forgotten.",
)
def scalar__dtype_forgotten(value, *, dtype=torch.float32, device=None):
    return torch.tensor(value, device=device)


# counting_table


@misconception(
    "counting_table",
    "Your table counts down the columns. Reshape fills the last axis first: the numbers run along a row, "
    "then on to the next row.",
)
def counting_table__by_columns(h, w, *, start=0, device=None):
    return torch.arange(start, start + h * w, device=device).reshape(w, h).T


@misconception(
    "counting_table",
    "The second number of arange is where to stop, not how many to make: with a start other than 0 yours "
    "has the wrong number of elements.",
)
def counting_table__stops_too_early(h, w, *, start=0, device=None):
    return torch.arange(start, h * w, device=device).reshape(h, w)


@misconception(
    "counting_table",
    "The numbers are right, but they are float32. Counting gives integers: arange of integers is int64 by "
    "itself, and torch.Tensor(...) always makes floats.",
)
def counting_table__floats(h, w, *, start=0, device=None):
    return torch.arange(start, start + h * w, dtype=torch.float32, device=device).reshape(h, w)


@misconception(
    "counting_table",
    "A -1 in reshape asks torch to work out a size from the number of elements. Without elements it "
    "cannot: 0 numbers in 0 rows fit any width. You know both sizes: say them.",
)
def counting_table__minus_one(h, w, *, start=0, device=None):
    return torch.arange(start, start + h * w, device=device).reshape(h, -1)


@misconception(
    "counting_table",
    "The table was made on the default device: device was taken as an argument and then forgotten.",
)
def counting_table__device_forgotten(h, w, *, start=0, device=None):
    return torch.arange(start, start + h * w).reshape(h, w)


@misconception(
    "counting_table",
    "The count does not begin at start: yours begins at 0 whatever the caller says.",
)
def counting_table__start_forgotten(h, w, *, start=0, device=None):
    return torch.arange(h * w, device=device).reshape(h, w)


# zero_rows


@misconception(
    "zero_rows",
    "Nothing was zeroed: indexing with a boolean (or with a list of integers) copies, so you wrote zeros "
    "into a temporary and threw it away. Only an assignment to one indexing expression reaches the "
    "tensor.",
)
def zero_rows__into_a_temporary(x, keep):
    out = x.clone()
    out[~keep].zero_()
    return out


@misconception(
    "zero_rows",
    "x itself lost its rows: a slice such as x[:] (and a plain out = x) is no copy, it is the same memory "
    "under another name.",
)
def zero_rows__through_a_slice(x, keep):
    out = x[:]
    out[~keep] = 0
    return out


@misconception(
    "zero_rows",
    "Multiplying by zero does not erase: 0 * NaN is NaN and 0 * inf is NaN. Choose between two values, or "
    "write over the old one.",
)
def zero_rows__multiplied(x, keep):
    return x * keep[:, None]


@misconception(
    "zero_rows",
    "The mask went along the columns. Shapes are lined up at their last axis, so a mask (N,) meets the D "
    "columns of x (N, D) unless you give it a second axis.",
)
def zero_rows__columns(x, keep):
    return torch.where(keep, x, 0)


@misconception(
    "zero_rows",
    "This is the opposite: the rows with keep == True are the ones that you zeroed.",
)
def zero_rows__inverted(x, keep):
    return torch.where(keep[:, None], 0, x)


@misconception(
    "zero_rows",
    "The dropped rows are gone instead of zero: indexing with a boolean picks, so the result has fewer rows than x.",
)
def zero_rows__picked(x, keep):
    return x[keep]


@misconception(
    "zero_rows",
    "Every row is the same: expand does not make N rows, it shows one row N times (stride 0), so each "
    "write landed in all of them.",
)
def zero_rows__expanded(x, keep):
    out = x.new_zeros(1, x.shape[1]).expand(x.shape)
    for n in range(len(x)):
        out[n] = x[n] if keep[n] else 0
    return out


# weighted_sum


@misconception(
    "weighted_sum",
    "torch.matmul does not mix dtypes: with int64 weights and float32 rows it refuses, where * and + "
    "would convert. Bring the weights to the dtype of the rows first.",
)
def weighted_sum__mixed_dtypes(weights, rows):
    return weights @ rows


@misconception(
    "weighted_sum",
    "You converted the rows to the dtype of the weights: with integer weights that cuts off everything "
    "behind the decimal point of the rows. Convert the weights instead.",
)
def weighted_sum__rows_converted(weights, rows):
    return weights @ rows.to(weights.dtype)


@misconception(
    "weighted_sum",
    "float() always means float32. Rows of another floating type do not fit it: take the dtype from the rows.",
)
def weighted_sum__always_float32(weights, rows):
    return weights.float() @ rows


@misconception(
    "weighted_sum",
    "The sum is right, but its dtype was decided by *: a product of two floating types has the wider one. "
    "Convert the weights to the dtype of the rows before you multiply.",
)
def weighted_sum__promoted(weights, rows):
    return (weights[:, None] * rows).sum(0)


@misconception(
    "weighted_sum",
    "You multiplied from the other side: rows @ weights sums along the columns of each row. In a square "
    "that goes unnoticed, in any other shape it does not fit.",
)
def weighted_sum__other_side(weights, rows):
    return rows @ weights.to(rows.dtype)


@misconception(
    "weighted_sum",
    "weights (N,) * rows (N, D) lines the weights up with the columns, not with the rows: they need a "
    "second axis of size 1 before they can be multiplied like that.",
)
def weighted_sum__columns(weights, rows):
    return (weights.to(rows.dtype) * rows).sum(0)


@misconception(
    "weighted_sum",
    "This is the average with these weights. The sum is not divided by anything.",
)
def weighted_sum__average(weights, rows):
    return weights.to(rows.dtype) @ rows / weights.to(rows.dtype).sum()


# make_grid


def _grid(h, w, dtype, device):
    rows = torch.arange(h, dtype=dtype, device=device)[:, None].expand(h, w)
    columns = torch.arange(w, dtype=dtype, device=device).expand(h, w)
    return rows, columns


@misconception(
    "make_grid",
    "Each pair is swapped: yours holds (column, row), as (x, y) would. The first number is i, which counts rows.",
)
def make_grid__swapped(h, w, *, dtype=torch.float32, device=None):
    rows, columns = _grid(h, w, dtype, device)
    return torch.stack((columns, rows), dim=-1)


@misconception(
    "make_grid",
    "The two coordinates are on the first axis: that is numpy.indices, shape (2, h, w). Here the pair "
    "belongs together on the last one.",
)
def make_grid__pair_first(h, w, *, dtype=torch.float32, device=None):
    return torch.stack(_grid(h, w, dtype, device))


@misconception(
    "make_grid",
    "You joined the two tables side by side on an existing axis. A new axis for the pair is what is "
    "missing: cat joins, stack adds an axis.",
)
def make_grid__cat(h, w, *, dtype=torch.float32, device=None):
    return torch.cat(_grid(h, w, dtype, device), dim=-1)


@misconception(
    "make_grid",
    "Height and width changed places: your grid has w rows and h columns.",
)
def make_grid__transposed(h, w, *, dtype=torch.float32, device=None):
    return torch.stack(_grid(w, h, dtype, device), dim=-1)


@misconception(
    "make_grid",
    "repeat puts whole copies one behind the other, 0 1 2 0 1 2; the row numbers need each value w times "
    "in a row, 0 0 1 1 2 2.",
)
def make_grid__repeat(h, w, *, dtype=torch.float32, device=None):
    rows = torch.arange(h, dtype=dtype, device=device).repeat(w).reshape(h, w)
    return torch.stack((rows, _grid(h, w, dtype, device)[1]), dim=-1)


@misconception(
    "make_grid",
    "The numbers are right, but they are int64, which is what arange of integers makes: pass the dtype on.",
)
def make_grid__integers(h, w, *, dtype=torch.float32, device=None):
    return torch.stack(_grid(h, w, None, device), dim=-1)


@misconception(
    "make_grid",
    "The grid was made on the default device: device was taken as an argument and then forgotten.",
)
def make_grid__device_forgotten(h, w, *, dtype=torch.float32, device=None):
    return torch.stack(_grid(h, w, dtype, None), dim=-1)


# sequence_mask


def _width(lengths, max_len):
    return int(lengths.max()) if max_len is None else max_len


@misconception(
    "sequence_mask",
    "Each row has one True too many: places count from 0, so place number lengths[b] is the first one outside.",
)
def sequence_mask__one_too_many(lengths, max_len=None):
    return torch.arange(_width(lengths, max_len), device=lengths.device) <= lengths[:, None]


@misconception(
    "sequence_mask",
    "This is the padding: your mask is True behind the sequence. In this track True always means: this is "
    "data, it may be used.",
)
def sequence_mask__inverted(lengths, max_len=None):
    return torch.arange(_width(lengths, max_len), device=lengths.device) >= lengths[:, None]


@misconception(
    "sequence_mask",
    "A max_len of 0 is false in Python, so `max_len or ...` took the longest length instead. Only None "
    "means that nothing was said.",
)
def sequence_mask__zero_is_false(lengths, max_len=None):
    max_len = max_len or int(lengths.max())
    return torch.arange(max_len, device=lengths.device) < lengths[:, None]


@misconception(
    "sequence_mask",
    "max_len made your mask wider but never narrower: a max_len below the longest length cuts off.",
)
def sequence_mask__never_cut(lengths, max_len=None):
    longest = int(lengths.max())
    return torch.arange(max(longest, max_len or 0), device=lengths.device) < lengths[:, None]


@misconception(
    "sequence_mask",
    "max_len changed nothing: your mask is always as wide as the longest sequence.",
)
def sequence_mask__max_len_forgotten(lengths, max_len=None):
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


@misconception(
    "sequence_mask",
    "The values are right as numbers, but a mask is boolean: ~, &, indexing and masked_fill all mean "
    "something else for numbers.",
)
def sequence_mask__numbers(lengths, max_len=None):
    return (torch.arange(_width(lengths, max_len), device=lengths.device) < lengths[:, None]).float()


@misconception(
    "sequence_mask",
    "Your mask lies on its side: places along the first axis, sequences along the second. It is (B, T), "
    "one row per sequence.",
)
def sequence_mask__on_its_side(lengths, max_len=None):
    return torch.arange(_width(lengths, max_len), device=lengths.device)[:, None] < lengths


@misconception(
    "sequence_mask",
    "You made the places on the default device. Where the mask lives is decided by lengths.",
)
def sequence_mask__default_device(lengths, max_len=None):
    if max_len is None:
        max_len = max(lengths.tolist(), default=0)
    return torch.arange(max_len) < lengths[:, None]


@misconception(
    "sequence_mask",
    "An empty batch has no largest length: max of nothing raises. Decide what the width is then: 0.",
)
def sequence_mask__empty_batch(lengths, max_len=None):
    return torch.arange(_width(lengths, max_len), device=lengths.device) < lengths[:, None]


# split_heads


@misconception(
    "split_heads",
    "view and reshape never move a number, they only draw the axes differently: with (H, T, Dh) written "
    "straight over (T, H*Dh) you cut the tokens into heads, and each head got pieces of several tokens. "
    "Split the last axis first, then swap.",
)
def split_heads__straight_view(x, n_heads):
    B, T, width = x.shape
    return x.view(B, n_heads, T, width // n_heads)


@misconception(
    "split_heads",
    "The numbers are right, but they were copied. Swapping axes only swaps two strides, so the heads can "
    "stay in the memory of x: contiguous, clone, stack and cat all make new memory.",
)
def split_heads__contiguous(x, n_heads):
    *lead, T, width = x.shape
    return x.reshape(*lead, T, n_heads, width // n_heads).transpose(-3, -2).contiguous()


@misconception(
    "split_heads",
    "Your heads take turns: head h got the features h, h + H, h + 2H and so on. Each head is one "
    "connected block of Dh features.",
)
def split_heads__taking_turns(x, n_heads):
    *lead, T, width = x.shape
    return x.unflatten(-1, (width // n_heads, n_heads)).movedim(-1, -3)


@misconception(
    "split_heads",
    "The last axis is split as it should be, but the heads still stand behind the tokens: (..., T, H, "
    "Dh). They belong in front.",
)
def split_heads__not_swapped(x, n_heads):
    return x.unflatten(-1, (n_heads, x.shape[-1] // n_heads))


@misconception(
    "split_heads",
    "n_heads is how many heads there are; you used it as the width of one.",
)
def split_heads__width_for_number(x, n_heads):
    return x.unflatten(-1, (x.shape[-1] // n_heads, n_heads)).transpose(-3, -2)


@misconception(
    "split_heads",
    "This works for exactly one batch axis. The dots in (..., T, H*Dh) stand for any number of axes, also "
    "none: count axes from the end.",
)
def split_heads__one_batch_axis(x, n_heads):
    B, T, width = x.shape
    return x.view(B, T, n_heads, width // n_heads).transpose(1, 2)


# merge_heads


@misconception(
    "merge_heads",
    "reshape joins axes that stand beside each other, in the order in which they stand. With H still in "
    "front of T you glued rows of different tokens together: bring each token's heads next to its Dh "
    "first.",
)
def merge_heads__not_swapped(x):
    *lead, H, T, Dh = x.shape
    return x.reshape(*lead, T, H * Dh)


@misconception(
    "merge_heads",
    "view joins two axes only if one stride can walk through both. After the swap that is not so, unless "
    "x happens to come from split_heads. Adding contiguous everywhere is not the lesson: say reshape "
    "where a copy is fine, and know that it is one.",
)
def merge_heads__view(x):
    *lead, H, T, Dh = x.shape
    return x.transpose(-3, -2).view(*lead, T, H * Dh)


@misconception(
    "merge_heads",
    "You wove the heads into each other: feature 0 of all heads, then feature 1 of all heads. Each head "
    "stays one connected block.",
)
def merge_heads__woven(x):
    return x.movedim(-3, -1).flatten(-2)


@misconception(
    "merge_heads",
    "This works for exactly one batch axis. The dots in (..., H, T, Dh) stand for any number of axes, "
    "also none: count axes from the end.",
)
def merge_heads__one_batch_axis(x):
    B, H, T, Dh = x.shape
    return x.transpose(1, 2).reshape(B, T, H * Dh)


@misconception(
    "merge_heads",
    "A -1 in reshape asks torch to work out a size from the number of elements. With T = 0 there are "
    "none, and it cannot. You know the width: it is H * Dh.",
)
def merge_heads__minus_one(x):
    *lead, H, T, Dh = x.shape
    return x.transpose(-3, -2).reshape(*lead, T, -1)


@misconception(
    "merge_heads",
    "The heads are added up instead of put side by side: the result has the width of one head.",
)
def merge_heads__summed(x):
    return x.sum(-3)


# gather_last


@misconception(
    "gather_last",
    "You took the row behind the last one: a sequence of length 3 has rows 0, 1 and 2.",
)
def gather_last__one_too_far(x, lengths):
    return x[torch.arange(len(x), device=x.device), lengths]


@misconception(
    "gather_last",
    "x[:, -1] is the last row of the padded tensor: for every sequence that is shorter than T you took padding.",
)
def gather_last__last_column(x, lengths):
    return x[:, -1]


@misconception(
    "gather_last",
    "A colon and a list of indices combine freely: you got row lengths[j] - 1 of every sequence b, all B "
    "* B pairs. For pairs that belong together both axes need an index.",
)
def gather_last__all_pairs(x, lengths):
    return x[:, lengths - 1]


@misconception(
    "gather_last",
    "Multiplying the other rows by 0 and adding up does not remove them: 0 * NaN is NaN. Pick by index instead.",
)
def gather_last__masked_sum(x, lengths):
    chosen = torch.arange(x.shape[1], device=x.device) == lengths[:, None] - 1
    return (x * chosen[..., None]).sum(1).to(x.dtype)


@misconception(
    "gather_last",
    "The values are right, but the way back is cut: detach, .data and no_grad leave x without a gradient.",
)
def gather_last__detached(x, lengths):
    return x.detach()[torch.arange(len(x), device=x.device), lengths - 1]


@misconception(
    "gather_last",
    "Right for lengths that fit, but others are left to the indexing: a single length is broadcast, and every sequence "
    "is read at the same place without a word. Compare the shapes before you index.",
)
def gather_last__unchecked(x, lengths):
    return x[torch.arange(len(x), device=x.device), lengths - 1]


# pad_stack


def _sizes(seqs):
    rest = seqs[0].shape[1:]
    lengths = [len(seq) for seq in seqs]
    return lengths, (len(seqs), max(lengths), *rest)


@misconception(
    "pad_stack",
    "torch.empty is not zeros: it is whatever lay in memory before (the tests make that visible by "
    "filling fresh memory with NaN). What nobody writes must be filled.",
)
def pad_stack__empty(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = seqs[0].new_empty(shape)
    for b, seq in enumerate(seqs):
        out[b, : len(seq)] = seq
    return out, torch.tensor(lengths, device=seqs[0].device)


@misconception(
    "pad_stack",
    "The padding is always 0 in yours; the caller may ask for another value.",
)
def pad_stack__always_zero(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = seqs[0].new_zeros(shape)
    for b, seq in enumerate(seqs):
        out[b, : len(seq)] = seq
    return out, torch.tensor(lengths, device=seqs[0].device)


@misconception(
    "pad_stack",
    "torch.zeros(...) decided two things for the caller: the padding is always 0, and the stack is always float32.",
)
def pad_stack__plain_zeros(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = torch.zeros(shape)
    for b, seq in enumerate(seqs):
        out[b, : len(seq)] = seq
    return out, torch.tensor(lengths)


@misconception(
    "pad_stack",
    "All rows hold the same, a pile of everything that you wrote: expand does not make B rows, it shows "
    "one row B times (stride 0).",
)
def pad_stack__expanded(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = seqs[0].new_full((1, *shape[1:]), value).expand(shape)
    for b, seq in enumerate(seqs):
        out[b, : len(seq)] = seq
    return out, torch.tensor(lengths, device=seqs[0].device)


@misconception(
    "pad_stack",
    "The padding stands in front of your sequences. Here each one begins at place 0 and the filling follows.",
)
def pad_stack__in_front(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = seqs[0].new_full(shape, value)
    for b, seq in enumerate(seqs):
        out[b, shape[1] - len(seq) :] = seq
    return out, torch.tensor(lengths, device=seqs[0].device)


@misconception(
    "pad_stack",
    "The lengths are float32: torch.Tensor makes floats of whatever list it gets. Lengths are used as "
    "indices and must be integers.",
)
def pad_stack__float_lengths(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = seqs[0].new_full(shape, value)
    for b, seq in enumerate(seqs):
        out[b, : len(seq)] = seq
    return out, torch.Tensor(lengths).to(seqs[0].device)


@misconception(
    "pad_stack",
    "Your stack is always float32, whatever the sequences are: a new tensor has the default dtype unless "
    "it takes it from its source.",
)
def pad_stack__default_dtype(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = torch.full(shape, float(value), device=seqs[0].device)
    for b, seq in enumerate(seqs):
        out[b, : len(seq)] = seq
    return out, torch.tensor(lengths, device=seqs[0].device)


@misconception(
    "pad_stack",
    "Your stack has time first, (Tmax, B, ...), which is what torch's own function makes by default. Here "
    "the batch comes first.",
)
def pad_stack__time_first(seqs, value=0):
    lengths, shape = _sizes(seqs)
    out = seqs[0].new_full((shape[1], shape[0], *shape[2:]), value)
    for b, seq in enumerate(seqs):
        out[: len(seq), b] = seq
    return out, torch.tensor(lengths, device=seqs[0].device)


@misconception(
    "pad_stack",
    "The numbers are right, but everything was allocated twice: first each sequence was padded on its "
    "own, then all were copied once more into the stack. Make the stack first and write into it.",
)
def pad_stack__padded_one_by_one(seqs, value=0):
    lengths, shape = _sizes(seqs)
    rows = [torch.cat((seq, seq.new_full((shape[1] - len(seq), *shape[2:]), value))) for seq in seqs]
    return torch.stack(rows), torch.tensor(lengths, device=seqs[0].device)


# sliding_windows


def _whole(x, size, step):
    return (x.shape[1] - size) // step + 1


@misconception(
    "sliding_windows",
    "These strides are those of a contiguous tensor of this shape. x may be transposed, sliced or "
    "expanded: ask it for its own strides.",
)
def sliding_windows__hard_coded(x, size, step=1):
    B, T, *rest = x.shape
    inner = [1]
    for axis_size in reversed(rest):
        inner.insert(0, inner[0] * axis_size)
    over_time, over_rest = inner[0], inner[1:]
    stride = (T * over_time, step * over_time, over_time, *over_rest)
    return x.as_strided((B, _whole(x, size, step), size, *rest), stride)


@misconception(
    "sliding_windows",
    "The windows begin at the start of the storage instead of at the start of x: a slice lies somewhere "
    "inside its parent, and storage_offset says where.",
)
def sliding_windows__offset_zero(x, size, step=1):
    over_batch, over_time, *over_rest = x.stride()
    shape = (x.shape[0], _whole(x, size, step), size, *x.shape[2:])
    return x.as_strided(shape, (over_batch, step * over_time, over_time, *over_rest), 0)


@misconception(
    "sliding_windows",
    "The last window is missing: from T - size + 1 starting places there is one more than T - size.",
)
def sliding_windows__last_one_missing(x, size, step=1):
    over_batch, over_time, *over_rest = x.stride()
    n = _whole(x, size, step) - 1
    return x.as_strided((x.shape[0], n, size, *x.shape[2:]), (over_batch, step * over_time, over_time, *over_rest))


@misconception(
    "sliding_windows",
    "You counted the windows as if step were 1. as_strided does not know where an axis ends, so the "
    "surplus windows read on into the next sequence, or beyond the storage.",
)
def sliding_windows__step_not_counted(x, size, step=1):
    over_batch, over_time, *over_rest = x.stride()
    shape = (x.shape[0], x.shape[1] - size + 1, size, *x.shape[2:])
    return x.as_strided(shape, (over_batch, step * over_time, over_time, *over_rest))


@misconception(
    "sliding_windows",
    "A window that is only partly filled is in your result: you rounded up. as_strided does not know "
    "where an axis ends, so its end was read from the next sequence, or from beyond the storage.",
)
def sliding_windows__rounded_up(x, size, step=1):
    over_batch, over_time, *over_rest = x.stride()
    n = -(-(x.shape[1] - size) // step) + 1
    return x.as_strided((x.shape[0], n, size, *x.shape[2:]), (over_batch, step * over_time, over_time, *over_rest))


@misconception(
    "sliding_windows",
    "Your step runs inside the windows: they hold every step-th place and still begin one place apart. "
    "The step is the distance from one window to the next.",
)
def sliding_windows__step_inside(x, size, step=1):
    over_batch, over_time, *over_rest = x.stride()
    shape = (x.shape[0], _whole(x, size, step), size, *x.shape[2:])
    return x.as_strided(shape, (over_batch, over_time, step * over_time, *over_rest))


@misconception(
    "sliding_windows",
    "The two new axes are the wrong way round: (B, size, N, ...). First comes which window, then which place in it.",
)
def sliding_windows__place_first(x, size, step=1):
    over_batch, over_time, *over_rest = x.stride()
    shape = (x.shape[0], size, _whole(x, size, step), *x.shape[2:])
    return x.as_strided(shape, (over_batch, over_time, step * over_time, *over_rest))


@misconception(
    "sliding_windows",
    "The numbers are right, but each window is a copy: stack, cat and indexing with integers all make new "
    "memory, so a place that is in k windows is now stored k times.",
)
def sliding_windows__copied(x, size, step=1):
    n = _whole(x, size, step)
    places = torch.arange(n, device=x.device)[:, None] * step + torch.arange(size, device=x.device)
    return x[:, places]


@misconception(
    "sliding_windows",
    "For a sequence shorter than a window the number of windows came out negative: it is 0 then.",
)
def sliding_windows__negative_number(x, size, step=1):
    over_batch, over_time, *over_rest = x.stride()
    shape = (x.shape[0], _whole(x, size, step), size, *x.shape[2:])
    return x.as_strided(shape, (over_batch, step * over_time, over_time, *over_rest))


# can_view


def _row_major(shape):
    stride = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        stride[axis] = stride[axis + 1] * shape[axis + 1]
    return tuple(stride)


def _same_number(shape, new_shape):
    n, m = 1, 1
    for size in shape:
        n *= size
    for size in new_shape:
        m *= size
    if n != m:
        raise ValueError(f"{tuple(shape)} is not {tuple(new_shape)}")


@misconception(
    "can_view",
    "These are the strides of a new contiguous tensor: the stride that was given plays no part in them.",
)
def can_view__always_contiguous(shape, stride, new_shape):
    _same_number(shape, new_shape)
    return _row_major(new_shape)


@misconception(
    "can_view",
    "You gave up on every tensor that is not contiguous. A view needs less: only the axes that are joined "
    "must be walkable with one stride.",
)
def can_view__only_contiguous(shape, stride, new_shape):
    _same_number(shape, new_shape)
    if 0 not in shape and tuple(stride) != _row_major(shape):
        return None
    return _row_major(new_shape)


@misconception(
    "can_view",
    "An axis of size 1 kept two others apart: its stride is never used, so whatever number stands there "
    "must not decide.",
)
def can_view__ones_in_the_way(shape, stride, new_shape):
    _same_number(shape, new_shape)
    if 0 in shape:
        return (0,) * len(new_shape)
    runs = []
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if runs and step == runs[-1][0] * runs[-1][1]:
            runs[-1][0] *= size
        else:
            runs.append([size, step])
    runs = [run for run in runs if run[0] != 1]
    result, left, step = [], 1, 1
    for size in reversed(new_shape):
        if left == 1 and size != 1:
            left, step = runs.pop(0)
        if left % size:
            return None
        result.append(step)
        left, step = left // size, step * size
    return tuple(reversed(result))


@misconception(
    "can_view",
    "Your walk is fine for axes that are cut, but it never joins two: neighboring axes whose strides fit "
    "each other can become one.",
)
def can_view__never_joins(shape, stride, new_shape):
    _same_number(shape, new_shape)
    if 0 in shape:
        return (0,) * len(new_shape)
    runs = [(size, step) for size, step in zip(reversed(shape), reversed(stride), strict=True) if size != 1]
    result, left, step = [], 1, 1
    for size in reversed(new_shape):
        if left == 1 and size != 1:
            left, step = runs.pop(0)
        if left % size:
            return None
        result.append(step)
        left, step = left // size, step * size
    return tuple(reversed(result))
