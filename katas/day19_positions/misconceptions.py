"""Day 19: known wrong solutions, each with the sentence for whoever wrote it."""

import math

import torch
from torch import nn

from checker.testing import misconception
from reference import day19_positions as right
from reference.day16_scaled_dot_product import attention, causal_mask
from reference.day19_positions import apply_rope, rope_tables

# sinusoidal


def _even(dim):
    if dim % 2:
        raise ValueError(f"dim {dim} is odd")


def _angles(positions, dim, base=10000.0, step=2.0, start=0.0):
    """Angles in float64, with frequencies base ** (-(step * i + start) / dim)."""
    i = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    return positions[..., None].double() * base ** (-(step * i + start) / dim)


def _kind(positions):
    return torch.promote_types(positions.dtype, torch.float32)


def _waves(angles):
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


@misconception(
    "sinusoidal",
    "Your frequencies fall only half as far as they should: pair i has base ** (-i / dim). There are dim/2 pairs, so the "
    "exponent has to run to nearly 1, or only the fast half of the waves is in use and far positions repeat.",
)
def sinusoidal__half_the_exponent(positions, dim, base=10000.0):
    _even(dim)
    return _waves(_angles(positions, dim, base, step=1.0)).to(_kind(positions))


@misconception(
    "sinusoidal",
    "All sines come first and all cosines behind them. The numbers are right, their columns are not: the two of a pair are "
    "neighbors here.",
)
def sinusoidal__halves(positions, dim, base=10000.0):
    _even(dim)
    angles = _angles(positions, dim, base)
    return torch.cat((angles.sin(), angles.cos()), -1).to(_kind(positions))


@misconception(
    "sinusoidal",
    "Sine and cosine changed places: position 0 begins with 1, where it should begin with sin(0) = 0.",
)
def sinusoidal__cosine_first(positions, dim, base=10000.0):
    _even(dim)
    angles = _angles(positions, dim, base)
    return torch.stack((angles.cos(), angles.sin()), -1).flatten(-2).to(_kind(positions))


@misconception(
    "sinusoidal",
    "Every column has a frequency of its own. Sine and cosine of a pair share one, otherwise a shift is no rotation.",
)
def sinusoidal__a_frequency_per_column(positions, dim, base=10000.0):
    _even(dim)
    sine, cosine = _angles(positions, dim, base).sin(), _angles(positions, dim, base, start=1.0).cos()
    return torch.stack((sine, cosine), -1).flatten(-2).to(_kind(positions))


@misconception(
    "sinusoidal",
    "The waves get faster from pair to pair: the exponent has lost its minus sign, and the last pair turns thousands of times "
    "between two tokens.",
)
def sinusoidal__faster_and_faster(positions, dim, base=10000.0):
    _even(dim)
    return _waves(_angles(positions, dim, 1 / base)).to(_kind(positions))


@misconception(
    "sinusoidal",
    "Near positions are right and far ones drift: the angles were made in float32, which keeps 24 bits. At position 100,000, 17 "
    "of them are spent on whole radians.",
)
def sinusoidal__angles_in_float32(positions, dim, base=10000.0):
    _even(dim)
    w = base ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    return _waves(positions[..., None].to(_kind(positions)) * w.to(_kind(positions)))


@misconception(
    "sinusoidal",
    "Float64 positions went in, and float32 came out.",
)
def sinusoidal__always_float32(positions, dim, base=10000.0):
    _even(dim)
    return _waves(_angles(positions, dim, base)).float()


@misconception(
    "sinusoidal",
    "The dtype of your table is torch's default dtype. In a model that was built in bfloat16 it has 8 bits, and neighbors "
    "become the same.",
)
def sinusoidal__default_dtype(positions, dim, base=10000.0):
    _even(dim)
    wide = positions.dtype == torch.float64
    return _waves(_angles(positions, dim, base)).to(torch.float64 if wide else torch.get_default_dtype())


@misconception(
    "sinusoidal",
    "Half positions gave a half table. Half of the bits of a sine are not enough to tell neighbors apart.",
)
def sinusoidal__dtype_of_the_positions(positions, dim, base=10000.0):
    _even(dim)
    kind = positions.dtype if positions.is_floating_point() else torch.float32
    return _waves(_angles(positions, dim, base)).to(kind)


@misconception(
    "sinusoidal",
    "Positions were cut down to whole numbers. A wave has a value between two tokens as well.",
)
def sinusoidal__whole_positions(positions, dim, base=10000.0):
    _even(dim)
    return _waves(_angles(positions.long(), dim, base)).to(_kind(positions))


@misconception(
    "sinusoidal",
    "Your table starts one place too late: what stands in row 0 belongs to position 1.",
)
def sinusoidal__counts_from_one(positions, dim, base=10000.0):
    _even(dim)
    return _waves(_angles(positions + 1, dim, base)).to(_kind(positions))


@misconception(
    "sinusoidal",
    "An odd width gave a table of another width, without a word. A pair has two columns, so this deserves a ValueError.",
)
def sinusoidal__odd_is_fine(positions, dim, base=10000.0):
    return _waves(_angles(positions, dim, base)).to(_kind(positions))


# LearnedPositions


class _Learned(right.LearnedPositions):
    """The right module, whose parts can be replaced."""

    def check(self, x, offset):
        length, (max_len, dim) = x.shape[-2], self.weight.shape
        if x.shape[-1] != dim:
            raise ValueError(f"x {tuple(x.shape)} and weight {tuple(self.weight.shape)}")
        if offset < 0 or offset + length > max_len:
            raise IndexError(f"{offset} + {length} > {max_len}")

    def forward(self, x, *, offset=0):
        self.check(x, offset)
        return (x + self.weight[offset : offset + x.shape[-2]]).to(x.dtype)


@misconception(
    "LearnedPositions",
    "The offset is ignored: each chunk of a text starts at position 0 again. A token that comes after 50 others stands at 50.",
)
class LearnedPositions__ignores_the_offset(_Learned):
    def forward(self, x, *, offset=0):
        self.check(x, offset)
        return (x + self.weight[: x.shape[-2]]).to(x.dtype)


@misconception(
    "LearnedPositions",
    "Nothing asks whether the rows exist. A slice past the end is short or empty: no error where one is due, or one that speaks "
    "of something else.",
)
class LearnedPositions__slices_anything(_Learned):
    def check(self, x, offset):
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x {tuple(x.shape)} and weight {tuple(self.weight.shape)}")
        if offset < 0:
            raise IndexError(f"{offset} < 0")


@misconception(
    "LearnedPositions",
    "Negative positions were taken from the end of the table, as Python's indices are. There is no token before position 0.",
)
class LearnedPositions__negative_from_the_end(_Learned):
    def forward(self, x, *, offset=0):
        places = torch.arange(x.shape[-2], device=x.device) + offset
        self.check(x, max(offset, 0))
        return (x + self.weight[places]).to(x.dtype)


@misconception(
    "LearnedPositions",
    "Positions past the end found a row that is not theirs: begun anew, or held at the last one. The model would take one token "
    "for another; an IndexError is honest.",
)
class LearnedPositions__wraps_around(_Learned):
    def check(self, x, offset):
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x {tuple(x.shape)} and weight {tuple(self.weight.shape)}")
        if offset < 0:
            raise IndexError(f"{offset} < 0")

    def forward(self, x, *, offset=0):
        self.check(x, offset)
        places = (torch.arange(x.shape[-2], device=x.device) + offset) % len(self.weight)
        return (x + self.weight[places]).to(x.dtype)


@misconception(
    "LearnedPositions",
    "The bound is one too low: the last row can never be used.",
)
class LearnedPositions__one_row_too_few(_Learned):
    def check(self, x, offset):
        super().check(x, offset)
        if x.shape[-2] and offset + x.shape[-2] >= len(self.weight):
            raise IndexError(f"{offset} + {x.shape[-2]}")


@misconception(
    "LearnedPositions",
    "x was multiplied by sqrt(dim). The original transformer does that to its embeddings, so that positions do not drown them; "
    "here x comes as it should be.",
)
class LearnedPositions__scales_x(_Learned):
    def forward(self, x, *, offset=0):
        self.check(x, offset)
        return (x * math.sqrt(x.shape[-1]) + self.weight[offset : offset + x.shape[-2]]).to(x.dtype)


@misconception(
    "LearnedPositions",
    "The rows went to the batch axis: all tokens of a text got the same row. With B = T nothing complains.",
)
class LearnedPositions__a_row_per_text(_Learned):
    def forward(self, x, *, offset=0):
        self.check(x, offset)
        return (x + self.weight[offset : offset + x.shape[0], None]).to(x.dtype)


@misconception(
    "LearnedPositions",
    "Only the rows came back, without x.",
)
class LearnedPositions__rows_alone(_Learned):
    def forward(self, x, *, offset=0):
        self.check(x, offset)
        return self.weight[offset : offset + x.shape[-2]].expand(x.shape).to(x.dtype)


@misconception(
    "LearnedPositions",
    "The rows do not learn: there is no parameter `weight`, only a buffer that the optimizer never sees.",
)
class LearnedPositions__a_buffer(_Learned):
    def __init__(self, max_len, dim):
        nn.Module.__init__(self)
        self.register_buffer("weight", torch.randn(max_len, dim) * 0.02)


@misconception(
    "LearnedPositions",
    "Your rows start with a spread of 1, as those of nn.Embedding do. Next to token embeddings of 0.02 the model would see "
    "places and hardly any words.",
)
class LearnedPositions__spread_of_one(_Learned):
    def __init__(self, max_len, dim):
        super().__init__(max_len, dim)
        nn.init.normal_(self.weight)


@misconception(
    "LearnedPositions",
    "All rows start as zeros here. They are promised to be random, with a standard deviation of 0.02.",
)
class LearnedPositions__zeros(_Learned):
    def __init__(self, max_len, dim):
        super().__init__(max_len, dim)
        nn.init.zeros_(self.weight)


@misconception(
    "LearnedPositions",
    "A half x came back wider than it went in: adding float32 rows widens it.",
)
class LearnedPositions__widens(_Learned):
    def forward(self, x, *, offset=0):
        self.check(x, offset)
        return x + self.weight[offset : offset + x.shape[-2]]


@misconception(
    "LearnedPositions",
    "The rows were rounded to half before the sum, and the sum was rounded again. Add first, round once.",
)
class LearnedPositions__rounds_twice(_Learned):
    def forward(self, x, *, offset=0):
        self.check(x, offset)
        return x + self.weight[offset : offset + x.shape[-2]].to(x.dtype)


@misconception(
    "LearnedPositions",
    "x itself was changed: += writes into the caller's tensor.",
)
class LearnedPositions__in_place(_Learned):
    def forward(self, x, *, offset=0):
        self.check(x, offset)
        if x.requires_grad:
            return super().forward(x, offset=offset)
        with torch.no_grad():
            x += self.weight[offset : offset + x.shape[-2]]
        return x


@misconception(
    "LearnedPositions",
    "A width that does not fit was stretched by broadcasting, or ended in torch's own error. Compare the widths and name both "
    "shapes.",
)
class LearnedPositions__any_width(_Learned):
    def check(self, x, offset):
        if offset < 0 or offset + x.shape[-2] > len(self.weight):
            raise IndexError(f"{offset} + {x.shape[-2]}")


# rope_tables


def _given(positions, dim, base, inv_freq, step=2.0):
    """Angles in float64, with the checks of the reference."""
    if inv_freq is None:
        _even(dim)
        return _angles(positions, dim, base, step)
    if dim % 2 or inv_freq.shape != (dim // 2,):
        raise ValueError(f"inv_freq {tuple(inv_freq.shape)}, dim {dim}")
    return positions[..., None].double() * inv_freq.double()


def _tables(angles, kind):
    return angles.cos().to(kind), angles.sin().to(kind)


@misconception(
    "rope_tables",
    "Your frequencies use i / dim where pair i needs 2i / dim: only the fast half of them exists, and the slowest pair turns a "
    "hundred times too fast.",
)
def rope_tables__half_the_exponent(positions, dim, base=10000.0, *, inv_freq=None):
    return _tables(_given(positions, dim, base, inv_freq, step=1.0), _kind(positions))


@misconception(
    "rope_tables",
    "Your tables are dim wide, each angle twice. One column per pair is enough: dim/2.",
)
def rope_tables__each_angle_twice(positions, dim, base=10000.0, *, inv_freq=None):
    angles = _given(positions, dim, base, inv_freq)
    return _tables(torch.cat((angles, angles), -1), _kind(positions))


@misconception(
    "rope_tables",
    "Positions went through bfloat16, which has 8 bits: 257 became 256 and 259 became 260, so neighbors share an angle.",
)
def rope_tables__positions_in_bfloat16(positions, dim, base=10000.0, *, inv_freq=None):
    rounded = positions if positions.dtype == torch.float64 else positions.bfloat16()
    return _tables(_given(rounded, dim, base, inv_freq), _kind(positions))


@misconception(
    "rope_tables",
    "The tables took torch's default dtype. Build the model in bfloat16, and its angles have 8 bits.",
)
def rope_tables__default_dtype(positions, dim, base=10000.0, *, inv_freq=None):
    kind = torch.float64 if positions.dtype == torch.float64 else torch.get_default_dtype()
    return _tables(_given(positions, dim, base, inv_freq), kind)


@misconception(
    "rope_tables",
    "The frequencies were made in torch's default dtype. With bfloat16 as the default they have 8 bits, and what is wrong in "
    "the frequency grows with every position.",
)
def rope_tables__frequencies_in_default_dtype(positions, dim, base=10000.0, *, inv_freq=None):
    if inv_freq is None and positions.dtype != torch.float64:
        _even(dim)
        inv_freq = base ** (-torch.arange(0.0, dim, 2, device=positions.device) / dim)
    return _tables(_given(positions, dim, base, inv_freq), _kind(positions))


@misconception(
    "rope_tables",
    "inv_freq had no effect: the tables are those of the base. A model with stretched frequencies would read with the wrong "
    "ones.",
)
def rope_tables__ignores_inv_freq(positions, dim, base=10000.0, *, inv_freq=None):
    _given(positions, dim, base, inv_freq)
    return _tables(_given(positions, dim, base, None), _kind(positions))


@misconception(
    "rope_tables",
    "inv_freq was multiplied by the frequencies of the base. It takes their place.",
)
def rope_tables__inv_freq_on_top(positions, dim, base=10000.0, *, inv_freq=None):
    if inv_freq is not None and dim % 2 == 0 and inv_freq.shape == (dim // 2,):
        inv_freq = inv_freq.double() * _angles(torch.ones((), device=positions.device), dim, base)
    return _tables(_given(positions, dim, base, inv_freq), _kind(positions))


@misconception(
    "rope_tables",
    "You divided by inv_freq. `inv` says that the division has been done: it holds frequencies, not wavelengths.",
)
def rope_tables__divides_by_inv_freq(positions, dim, base=10000.0, *, inv_freq=None):
    return _tables(_given(positions, dim, base, None if inv_freq is None else 1 / inv_freq.double()), _kind(positions))


@misconception(
    "rope_tables",
    "The exponent has lost its minus sign: the last pair should be the slowest and is the fastest.",
)
def rope_tables__faster_and_faster(positions, dim, base=10000.0, *, inv_freq=None):
    return _tables(_given(positions, dim, 1 / base, inv_freq), _kind(positions))


@misconception(
    "rope_tables",
    "Sine and cosine came in the wrong order: the first of the two is 1 at position 0.",
)
def rope_tables__sine_first(positions, dim, base=10000.0, *, inv_freq=None):
    cos, sin = _tables(_given(positions, dim, base, inv_freq), _kind(positions))
    return sin, cos


@misconception(
    "rope_tables",
    "Float64 positions gave float32 tables. Whoever asks for float64 wants to compare exactly.",
)
def rope_tables__always_float32(positions, dim, base=10000.0, *, inv_freq=None):
    return _tables(_given(positions, dim, base, inv_freq), torch.float32)


@misconception(
    "rope_tables",
    "Your tables are float64 for ordinary positions: they would widen every query and key that they meet.",
)
def rope_tables__always_float64(positions, dim, base=10000.0, *, inv_freq=None):
    return _tables(_given(positions, dim, base, inv_freq), torch.float64)


@misconception(
    "rope_tables",
    "The dtype of inv_freq decided over the tables. Only positions may widen them, and nothing may narrow them.",
)
def rope_tables__dtype_of_inv_freq(positions, dim, base=10000.0, *, inv_freq=None):
    kind = _kind(positions) if inv_freq is None else inv_freq.dtype
    return _tables(_given(positions, dim, base, inv_freq), kind)


@misconception(
    "rope_tables",
    "Half positions gave half tables, and 8 or 11 bits are too few for an angle.",
)
def rope_tables__dtype_of_the_positions(positions, dim, base=10000.0, *, inv_freq=None):
    kind = positions.dtype if positions.is_floating_point() else torch.float32
    return _tables(_given(positions, dim, base, inv_freq), kind)


@misconception(
    "rope_tables",
    "Positions were counted, not read: whatever was handed in, the tables begin at 0. In a cache, the next token stands at 57 "
    "and would be turned by 0.",
)
def rope_tables__counts_for_itself(positions, dim, base=10000.0, *, inv_freq=None):
    length = positions.shape[-1] if positions.dim() else 1
    counted = torch.arange(length, device=positions.device).expand(positions.shape).to(positions.dtype)
    return _tables(_given(counted, dim, base, inv_freq), _kind(positions))


@misconception(
    "rope_tables",
    "Fractions of a position were cut off. Stretched contexts put tokens between the old positions.",
)
def rope_tables__whole_positions(positions, dim, base=10000.0, *, inv_freq=None):
    return _tables(_given(positions.long(), dim, base, inv_freq), _kind(positions))


@misconception(
    "rope_tables",
    "An odd width was accepted, although one column would have no partner.",
)
def rope_tables__odd_is_fine(positions, dim, base=10000.0, *, inv_freq=None):
    if inv_freq is not None:
        return _tables(_given(positions, dim, base, inv_freq), _kind(positions))
    return _tables(_angles(positions, dim, base), _kind(positions))


@misconception(
    "rope_tables",
    "Nobody compared inv_freq with dim. A single frequency is stretched over all pairs, and a wrong number of them makes "
    "tables of a wrong width.",
)
def rope_tables__any_inv_freq(positions, dim, base=10000.0, *, inv_freq=None):
    if inv_freq is None:
        return _tables(_given(positions, dim, base, None), _kind(positions))
    return _tables(positions[..., None].double() * inv_freq.double(), _kind(positions))


# apply_rope

_aligned = right._aligned


def _pairs(x):
    return x[..., 0::2], x[..., 1::2]


def _interleave(even, odd, x):
    return torch.stack((even, odd), -1).flatten(-2).to(x.dtype)


def _turn(x, cos, sin):
    even, odd = _pairs(x)
    return _interleave(even * cos - odd * sin, even * sin + odd * cos, x)


@misconception(
    "apply_rope",
    "You turn x_i together with x_{i + D/2}. This is the layout of Llama; today's pairs are neighbors. Weights that were "
    "trained with one of them load without error under the other, and the model speaks gibberish.",
)
def apply_rope__pairs_of_halves(x, cos, sin):
    return right.apply_rope_half(x, cos, sin)


@misconception(
    "apply_rope",
    "The right pairs were turned, but they did not go back to their places: all first numbers come before all second ones. "
    "Scores would survive, everything that reads a column would not.",
)
def apply_rope__written_as_halves(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    even, odd = _pairs(x)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), -1).to(x.dtype)


@misconception(
    "apply_rope",
    "Your pairs turn the other way round: the minus sign stands in the other row of the rotation.",
)
def apply_rope__backwards(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    return _turn(x, cos, -sin)


@misconception(
    "apply_rope",
    "This is a reflection, not a rotation: exactly one of the four products has a minus sign, in the first row. Turning back "
    "by the negative angle does not undo it.",
)
def apply_rope__reflects(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    even, odd = _pairs(x)
    return _interleave(even * cos + odd * sin, even * sin - odd * cos, x)


@misconception(
    "apply_rope",
    "There is no minus sign at all, so lengths are not kept.",
)
def apply_rope__no_minus(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    even, odd = _pairs(x)
    return _interleave(even * cos + odd * sin, even * sin + odd * cos, x)


@misconception(
    "apply_rope",
    "Each number was scaled by cos + sin. A rotation mixes the two of a pair: the partner is what the sine belongs to.",
)
def apply_rope__without_a_partner(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    even, odd = _pairs(x)
    return _interleave(even * cos + even * sin, odd * cos + odd * sin, x)


@misconception(
    "apply_rope",
    "Neighbors are turned, but with tables laid out for halves: the two of a pair get different angles.",
)
def apply_rope__tables_of_halves(x, cos, sin):
    cos, sin = (torch.cat((table, table), -1) for table in _aligned(x, cos, sin))
    even, odd = _pairs(x)
    return (x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin).to(x.dtype)


@misconception(
    "apply_rope",
    "Tables with one row per text were left to broadcasting, which counts axes from the end: the B of the tables met the heads "
    "of x. With B = H that runs through, by luck of shapes.",
)
def apply_rope__rows_meet_heads(x, cos, sin):
    _aligned(x, cos, sin)
    return _turn(x, cos, sin)


@misconception(
    "apply_rope",
    "Your tables run along the axis of the heads. x is (B, H, T, D): the positions are on the last axis but one, and with "
    "T = H no shape complains.",
)
def apply_rope__along_the_heads(x, cos, sin):
    _aligned(x, cos, sin)
    if x.dim() < 3:
        return _turn(x, cos, sin)
    if cos.dim() > 2:
        return _turn(x, *_aligned(x, cos, sin))
    return _turn(x, cos[:, None], sin[:, None])


@misconception(
    "apply_rope",
    "All rows of the batch were turned by the tables of the first one.",
)
def apply_rope__first_row_for_all(x, cos, sin):
    _aligned(x, cos, sin)
    while cos.dim() > 2:
        if not len(cos):
            return x.clone()
        cos, sin = cos[0], sin[0]
    return _turn(x, cos, sin)


@misconception(
    "apply_rope",
    "The tables were rounded to the half dtype of x before they were used. Multiply in float32, and round the result once.",
)
def apply_rope__half_tables(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    half = x.dtype in (torch.float16, torch.bfloat16)
    return _turn(x, cos.to(x.dtype), sin.to(x.dtype)) if half else _turn(x, cos, sin)


@misconception(
    "apply_rope",
    "float64 went through float32: only half inputs need another precision.",
)
def apply_rope__always_float32(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    return _turn(x.float(), cos.float(), sin.float()).to(x.dtype)


@misconception(
    "apply_rope",
    "The result has the dtype of the tables. It has to go back to that of x.",
)
def apply_rope__dtype_of_the_tables(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    even, odd = _pairs(x)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@misconception(
    "apply_rope",
    "No gradient reaches x.",
)
def apply_rope__cut_off(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    return _turn(x.detach(), cos, sin)


@misconception(
    "apply_rope",
    "Whatever broadcasts was taken: a table for one position turned five tokens alike, one for two texts made two out of one, "
    "and what does not broadcast ended in torch's own error.",
)
def apply_rope__no_questions(x, cos, sin):
    if cos.dim() == 3 and x.dim() > 3:
        cos, sin = (
            table[:, None].flatten(0, 1).reshape(len(table), *[1] * (x.dim() - 3), *table.shape[1:])
            for table in (cos, sin)
        )
    return _turn(x, cos, sin)


@misconception(
    "apply_rope",
    "Cosine and sine were never compared with each other: a sine for one position, or for other texts, was stretched or came "
    "to grief in a product.",
)
def apply_rope__only_the_cosine_is_checked(x, cos, sin):
    cos, _ = _aligned(x, cos, cos)
    missing = x.dim() - sin.dim()
    return _turn(x, cos, sin.reshape(*sin.shape[:-2], *[1] * missing, *sin.shape[-2:]))


@misconception(
    "apply_rope",
    "You go through the pairs one by one. Each of them costs several calls; all of them together cost the same few.",
)
def apply_rope__pair_by_pair(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    out = []
    for i in range(x.shape[-1] // 2):
        a, b, c, s = x[..., 2 * i], x[..., 2 * i + 1], cos[..., i], sin[..., i]
        out += [a * c - b * s, a * s + b * c]
    return torch.stack(out, -1).to(x.dtype)


@misconception(
    "apply_rope",
    "The first numbers of the pairs were overwritten before the second ones were computed from them.",
)
def apply_rope__overwrites_too_early(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    even, odd = _pairs(x)
    even = even * cos - odd * sin
    odd = even * sin + odd * cos
    return _interleave(even, odd, x)


# rotary_attention


def _visible(query_positions, key_positions):
    return key_positions[..., None, None, :] <= query_positions[..., None, :, None]


def _rotary(q, k, v, query_positions, key_positions, base=10000.0, mask="positions", scale=None):
    D = q.shape[-1]
    if mask == "positions":
        mask = _visible(query_positions, key_positions)
    q = apply_rope(q, *rope_tables(query_positions, D, base))
    k = apply_rope(k, *rope_tables(key_positions, D, base))
    return attention(q, k, v, mask, scale)[0]


@misconception(
    "rotary_attention",
    "The values were turned as well. Only scores should know where something stands: what is mixed into the output would "
    "depend on absolute positions.",
)
def rotary_attention__turns_the_values(q, k, v, query_positions, key_positions, base=10000.0):
    if v.shape[-1] % 2 == 0:
        v = apply_rope(v, *rope_tables(key_positions, v.shape[-1], base))
    return _rotary(q, k, v, query_positions, key_positions, base)


@misconception(
    "rotary_attention",
    "Your queries start at position 0 in every call. The query at position 57 has to be turned by 57, or its distance to all "
    "cached keys is wrong.",
)
def rotary_attention__queries_restart(q, k, v, query_positions, key_positions, base=10000.0):
    mask = _visible(query_positions, key_positions)
    return _rotary(q, k, v, query_positions - query_positions[..., :1], key_positions, base, mask)


@misconception(
    "rotary_attention",
    "The keys were turned by where they are stored, not by their positions. Move them about in memory, and the answer changes.",
)
def rotary_attention__keys_by_storage(q, k, v, query_positions, key_positions, base=10000.0):
    mask = _visible(query_positions, key_positions)
    if key_positions.shape[-1] != k.shape[-2]:
        raise ValueError(f"{tuple(key_positions.shape)} {tuple(k.shape)}")
    stored = torch.arange(k.shape[-2], device=k.device).to(key_positions.dtype)
    return _rotary(q, k, v, query_positions, stored, base, mask)


@misconception(
    "rotary_attention",
    "Only the queries were turned. The scores then depend on where the query stands, and not at all on where the key does.",
)
def rotary_attention__turns_only_queries(q, k, v, query_positions, key_positions, base=10000.0):
    D = q.shape[-1]
    apply_rope(k, *rope_tables(key_positions, D, base))
    q = apply_rope(q, *rope_tables(query_positions, D, base))
    return attention(q, k, v, _visible(query_positions, key_positions))[0]


@misconception(
    "rotary_attention",
    "Only the keys were turned. A shift of all positions changes your scores, and it must not.",
)
def rotary_attention__turns_only_keys(q, k, v, query_positions, key_positions, base=10000.0):
    D = q.shape[-1]
    apply_rope(q, *rope_tables(query_positions, D, base))
    k = apply_rope(k, *rope_tables(key_positions, D, base))
    return attention(q, k, v, _visible(query_positions, key_positions))[0]


@misconception(
    "rotary_attention",
    "Queries and keys are turned in opposite directions, so the scores know the sum of two positions. Turned alike, they know "
    "the difference.",
)
def rotary_attention__opposite_directions(q, k, v, query_positions, key_positions, base=10000.0):
    D = q.shape[-1]
    q = apply_rope(q, *rope_tables(query_positions, D, base))
    cos, sin = rope_tables(key_positions, D, base)
    return attention(q, apply_rope(k, cos, -sin), v, _visible(query_positions, key_positions))[0]


@misconception(
    "rotary_attention",
    "Nothing is turned here: without positions, attention sees its past as a bag of words.",
)
def rotary_attention__no_positions(q, k, v, query_positions, key_positions, base=10000.0):
    apply_rope(q, *rope_tables(query_positions, q.shape[-1], base))
    apply_rope(k, *rope_tables(key_positions, q.shape[-1], base))
    return attention(q, k, v, _visible(query_positions, key_positions))[0]


@misconception(
    "rotary_attention",
    "Your mask counts places in memory. What is past and what is future is decided by positions, which may be stored in any "
    "order and begin anywhere.",
)
def rotary_attention__mask_by_storage(q, k, v, query_positions, key_positions, base=10000.0):
    mask = causal_mask(q.shape[-2], k.shape[-2], device=q.device)
    return _rotary(q, k, v, query_positions, key_positions, base, mask)


@misconception(
    "rotary_attention",
    "No query sees its own place. key < query leaves it out.",
)
def rotary_attention__not_itself(q, k, v, query_positions, key_positions, base=10000.0):
    mask = key_positions[..., None, None, :] < query_positions[..., None, :, None]
    return _rotary(q, k, v, query_positions, key_positions, base, mask)


@misconception(
    "rotary_attention",
    "Every query sees every key, those of the future as well.",
)
def rotary_attention__sees_the_future(q, k, v, query_positions, key_positions, base=10000.0):
    return _rotary(q, k, v, query_positions, key_positions, base, None)


@misconception(
    "rotary_attention",
    "Your queries look forward only: the comparison of key and query position points the wrong way.",
)
def rotary_attention__looks_forward(q, k, v, query_positions, key_positions, base=10000.0):
    mask = key_positions[..., None, None, :] >= query_positions[..., None, :, None]
    return _rotary(q, k, v, query_positions, key_positions, base, mask)


@misconception(
    "rotary_attention",
    "The mask of each row of the batch was left without an axis for the heads, so broadcasting handed rows to heads.",
)
def rotary_attention__rows_meet_heads(q, k, v, query_positions, key_positions, base=10000.0):
    mask = key_positions[..., None, :] <= query_positions[..., :, None]
    return _rotary(q, k, v, query_positions, key_positions, base, mask)


@misconception(
    "rotary_attention",
    "The base did not reach the tables.",
)
def rotary_attention__forgets_the_base(q, k, v, query_positions, key_positions, base=10000.0):
    return _rotary(q, k, v, query_positions, key_positions)


@misconception(
    "rotary_attention",
    "The scale is too large: there are D/2 pairs, but a score still sums D products.",
)
def rotary_attention__scale_of_pairs(q, k, v, query_positions, key_positions, base=10000.0):
    return _rotary(q, k, v, query_positions, key_positions, base, scale=(q.shape[-1] / 2) ** -0.5)


# apply_rope_half


@misconception(
    "apply_rope_half",
    "These are the pairs of neighbors again, so foreign weights would load without error and speak gibberish. Here x_i and "
    "x_{i + D/2} belong together.",
)
def apply_rope_half__neighbors(x, cos, sin):
    return apply_rope(x, cos, sin)


@misconception(
    "apply_rope_half",
    "The halves turn backwards: the minus sign belongs to the second half on its way into the first.",
)
def apply_rope_half__backwards(x, cos, sin):
    return right.apply_rope_half(x, cos, -sin)


@misconception(
    "apply_rope_half",
    "The right pairs were turned, and then written as neighbors. Each half goes back to where it came from.",
)
def apply_rope_half__written_as_neighbors(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    a, b = x.chunk(2, -1)
    return _interleave(a * cos - b * sin, a * sin + b * cos, x)


@misconception(
    "apply_rope_half",
    "The two halves changed places and the sign is missing: x cos + swapped(x) sin keeps no lengths.",
)
def apply_rope_half__no_minus(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, a * sin + b * cos), -1).to(x.dtype)


@misconception(
    "apply_rope_half",
    "One row of tables per text was left to broadcasting, and met the heads. Align them as in apply_rope.",
)
def apply_rope_half__rows_meet_heads(x, cos, sin):
    _aligned(x, cos, sin)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


@misconception(
    "apply_rope_half",
    "Half inputs met tables that had been rounded to half. The products belong in float32.",
)
def apply_rope_half__half_tables(x, cos, sin):
    if x.dtype in (torch.float16, torch.bfloat16):
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return right.apply_rope_half(x, cos, sin)


@misconception(
    "apply_rope_half",
    "The result has the dtype of the tables, not that of x.",
)
def apply_rope_half__dtype_of_the_tables(x, cos, sin):
    cos, sin = _aligned(x, cos, sin)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


# interleaved_to_half


def _whole_pairs(w, n_heads):
    if w.shape[0] % (2 * n_heads):
        raise ValueError(f"{tuple(w.shape)} {n_heads}")


@misconception(
    "interleaved_to_half",
    "The rows were reordered over the whole matrix, so heads were mixed. Every head has its own even and odd rows.",
)
def interleaved_to_half__across_heads(w, n_heads):
    _whole_pairs(w, n_heads)
    return torch.cat((w[0::2], w[1::2]))


@misconception(
    "interleaved_to_half",
    "This is the way back: it takes halves and makes neighbors of them.",
)
def interleaved_to_half__the_way_back(w, n_heads):
    _whole_pairs(w, n_heads)
    return w.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@misconception(
    "interleaved_to_half",
    "The columns were reordered. They belong to what goes in; a head's numbers are made by rows.",
)
def interleaved_to_half__columns(w, n_heads):
    _whole_pairs(w, n_heads)
    if w.dim() < 2:
        return w.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return torch.cat((w[:, 0::2], w[:, 1::2]), 1)


@misconception(
    "interleaved_to_half",
    "The weights came back as they were. The other layout reads other rows, so the scores change.",
)
def interleaved_to_half__unchanged(w, n_heads):
    _whole_pairs(w, n_heads)
    return w.clone()


@misconception(
    "interleaved_to_half",
    "The odd rows come first. The first of each pair belongs into the first half, or the rotation runs backwards.",
)
def interleaved_to_half__odd_first(w, n_heads):
    _whole_pairs(w, n_heads)
    return w.unflatten(0, (n_heads, -1, 2)).flip(2).transpose(1, 2).flatten(0, 2)


@misconception(
    "interleaved_to_half",
    "Rows that do not make whole pairs for each head ended in an error of reshape, or in a wrong order. Check it first, and "
    "name the shape and the number of heads.",
)
def interleaved_to_half__no_questions(w, n_heads):
    return w.reshape(n_heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


# alibi_bias


def _bias(slopes, tq, tk, offset, device, distance=None):
    if offset is None:
        offset = tk - tq
    steps = (torch.arange(tq, device=device)[:, None] + offset) - torch.arange(tk, device=device)
    steps = steps.abs() if distance is None else distance(steps)
    return -torch.tensor(slopes, dtype=torch.float32, device=device)[:, None, None] * steps


_slopes = right._alibi_slopes


@misconception(
    "alibi_bias",
    "The bias grows with the distance: far keys are preferred. It has to be a penalty.",
)
def alibi_bias__rewards_distance(n_heads, tq, tk, *, offset=None, device=None):
    return -_bias(_slopes(n_heads), tq, tk, offset, device)


@misconception(
    "alibi_bias",
    "Your slopes start at 1. The first of 8 heads has 1/2: the powers are counted from one.",
)
def alibi_bias__slopes_from_one(n_heads, tq, tk, *, offset=None, device=None):
    n = 2 ** int(math.log2(n_heads))
    return _bias([slope * 2 ** (8 / n) for slope in _slopes(n_heads)], tq, tk, offset, device)


@misconception(
    "alibi_bias",
    "All heads have the slopes 1/2, 1/4, 1/8, ... of the case of eight. With n heads the ratio is 2 ** (-8 / n).",
)
def alibi_bias__always_halved(n_heads, tq, tk, *, offset=None, device=None):
    return _bias([2.0 ** -(h + 1) for h in range(n_heads)], tq, tk, offset, device)


@misconception(
    "alibi_bias",
    "2 ** (-8 / n) was used for a number of heads that is no power of two. The models that were trained use another rule "
    "there: the slopes of the power below, and then every other slope of the power above.",
)
def alibi_bias__one_formula(n_heads, tq, tk, *, offset=None, device=None):
    return _bias([2 ** (-8 * (h + 1) / n_heads) for h in range(n_heads)], tq, tk, offset, device)


@misconception(
    "alibi_bias",
    "The additional heads were sorted in among the others. They come at the end.",
)
def alibi_bias__sorted(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(sorted(_slopes(n_heads), reverse=True), tq, tk, offset, device)


@misconception(
    "alibi_bias",
    "The additional heads took the second, fourth, ... slope of twice as many heads. Those exist already: take the first, "
    "third, ...",
)
def alibi_bias__repeats_slopes(n_heads, tq, tk, *, offset=None, device=None):
    n = 2 ** int(math.log2(n_heads))
    return _bias(_slopes(n) + _slopes(n)[: n_heads - n], tq, tk, offset, device)


@misconception(
    "alibi_bias",
    "The additional heads continue the series beyond its end, with slopes that hardly see a distance.",
)
def alibi_bias__goes_on(n_heads, tq, tk, *, offset=None, device=None):
    n = 2 ** int(math.log2(n_heads))
    return _bias([2 ** (-8 * (h + 1) / n) for h in range(n_heads)], tq, tk, offset, device)


@misconception(
    "alibi_bias",
    "Your distance has a sign, so keys of the future are rewarded.",
)
def alibi_bias__signed(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(_slopes(n_heads), tq, tk, offset, device, lambda steps: steps)


@misconception(
    "alibi_bias",
    "Keys of the future have no bias here. The distance counts on either side; hiding the future is another function's work.",
)
def alibi_bias__past_only(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(_slopes(n_heads), tq, tk, offset, device, lambda steps: steps.clamp(min=0))


@misconception(
    "alibi_bias",
    "The future is hidden with -inf. This is a bias; the mask of day 16 hides.",
)
def alibi_bias__masks_too(n_heads, tq, tk, *, offset=None, device=None):
    seen = causal_mask(tq, tk, offset=offset, device=device)
    return _bias(_slopes(n_heads), tq, tk, offset, device).masked_fill(~seen, -torch.inf)


@misconception(
    "alibi_bias",
    "Your distances begin at the top left, whatever the sizes are. With fewer queries than keys, the last query stands at the "
    "last key.",
)
def alibi_bias__top_left(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(_slopes(n_heads), tq, tk, 0 if offset is None else offset, device)


@misconception(
    "alibi_bias",
    "offset=0 gave what None gives: 0 counts as false. Ask whether it is None.",
)
def alibi_bias__zero_is_none(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(_slopes(n_heads), tq, tk, offset or None, device)


@misconception(
    "alibi_bias",
    "The offset moves the keys. It says where query 0 stands, so it is added to the queries.",
)
def alibi_bias__moves_the_keys(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(_slopes(n_heads), tq, tk, None if offset is None else -offset, device)


@misconception(
    "alibi_bias",
    "Every query has the same distances, counted from the key at 0. A softmax would forgive that; a promise of 0 at a query's "
    "own place does not.",
)
def alibi_bias__from_the_first_key(n_heads, tq, tk, *, offset=None, device=None):
    slopes = torch.tensor(_slopes(n_heads), dtype=torch.float32, device=device)
    return (slopes[:, None, None] * torch.arange(tk, device=device)).expand(n_heads, tq, tk).clone()


@misconception(
    "alibi_bias",
    "The bias is on the default device, not on the one that was asked for.",
)
def alibi_bias__forgets_the_device(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(_slopes(n_heads), tq, tk, offset, "cpu")


@misconception(
    "alibi_bias",
    "The bias has torch's default dtype. In bfloat16 a distance of 257 is one of 256.",
)
def alibi_bias__default_dtype(n_heads, tq, tk, *, offset=None, device=None):
    return _bias(_slopes(n_heads), tq, tk, offset, device).to(torch.get_default_dtype())


# relative_bucket


def _bucket(rel, num_buckets=32, max_distance=128, bidirectional=True, floor=torch.floor, last=True, log=True):
    first = torch.zeros_like(rel)
    if bidirectional:
        num_buckets //= 2
        first, distance = (rel > 0) * num_buckets, rel.abs()
    else:
        distance = (-rel).clamp(min=0)
    exact = num_buckets // 2
    ratio = distance.clamp(min=exact).double() / exact
    if log:
        steps = ratio.log2() / math.log2(max_distance / exact) * (num_buckets - exact)
    else:
        steps = (ratio - 1) / (max_distance / exact - 1) * (num_buckets - exact)
    far = exact + floor(steps).long()
    if last:
        far = far.clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


@misconception(
    "relative_bucket",
    "The sign of the distance is turned round: rel is key minus query, so keys of the past are negative.",
)
def relative_bucket__query_minus_key(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(-rel, num_buckets, max_distance, bidirectional)


@misconception(
    "relative_bucket",
    "The query's own place was counted as future: rel = 0 belongs to the lower half.",
)
def relative_bucket__zero_is_later(rel, num_buckets=32, max_distance=128, bidirectional=True):
    buckets = _bucket(rel, num_buckets, max_distance, bidirectional)
    return torch.where(rel == 0, num_buckets // 2, buckets) if bidirectional else buckets


@misconception(
    "relative_bucket",
    "With both directions each of them has half of the buckets, and half of that half is exact. You gave each all of them, so "
    "bucket numbers run past the end.",
)
def relative_bucket__does_not_share(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel, num_buckets * 2 if bidirectional else num_buckets, max_distance, bidirectional)


@misconception(
    "relative_bucket",
    "Steps were rounded to the nearest bucket. A bucket begins where its number is reached: round down.",
)
def relative_bucket__rounds(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel, num_buckets, max_distance, bidirectional, floor=torch.round)


@misconception(
    "relative_bucket",
    "Beyond max_distance the buckets go on, into the other direction's half or past the end. All of that belongs in the last "
    "one.",
)
def relative_bucket__never_ends(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel, num_buckets, max_distance, bidirectional, last=False)


@misconception(
    "relative_bucket",
    "Far buckets are all equally wide. They should grow: each covers the same ratio of distances, not the same number.",
)
def relative_bucket__linear(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel, num_buckets, max_distance, bidirectional, log=False)


@misconception(
    "relative_bucket",
    "There are no coarse buckets: distances are counted one by one and then cut off, so everything from a few places on is the "
    "same.",
)
def relative_bucket__only_cuts(rel, num_buckets=32, max_distance=128, bidirectional=True):
    n = num_buckets // 2 if bidirectional else num_buckets
    first = (rel > 0) * n if bidirectional else 0
    return first + (rel.abs() if bidirectional else (-rel).clamp(min=0)).clamp(max=n - 1)


@misconception(
    "relative_bucket",
    "With one direction only, keys of the future got the buckets of the past: |rel| does not know the side. They are in bucket "
    "0.",
)
def relative_bucket__future_as_past(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel if bidirectional else -rel.abs(), num_buckets, max_distance, bidirectional)


@misconception(
    "relative_bucket",
    "bidirectional=False was not looked at.",
)
def relative_bucket__always_both(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel, num_buckets, max_distance)


@misconception(
    "relative_bucket",
    "max_distance has no effect: your coarse buckets end at 128 whatever was asked for.",
)
def relative_bucket__always_128(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel, num_buckets, 128, bidirectional)


@misconception(
    "relative_bucket",
    "The logarithms are taken of the distance itself, not of how many times it exceeds the exact part, so the coarse buckets "
    "do not begin where the exact ones end.",
)
def relative_bucket__log_of_the_distance(rel, num_buckets=32, max_distance=128, bidirectional=True):
    n = num_buckets // 2 if bidirectional else num_buckets
    first = (rel > 0) * n if bidirectional else 0
    distance = rel.abs() if bidirectional else (-rel).clamp(min=0)
    steps = distance.clamp(min=1).double().log() / math.log(max_distance) * (n - n // 2)
    far = (n // 2 + steps.long()).clamp(max=n - 1)
    return first + torch.where(distance < n // 2, distance, far)


@misconception(
    "relative_bucket",
    "The buckets are floats. They will be used as indices: whole numbers, dtype long.",
)
def relative_bucket__floats(rel, num_buckets=32, max_distance=128, bidirectional=True):
    return _bucket(rel, num_buckets, max_distance, bidirectional).float()


# RelativeBias


class _RelativeBias(right.RelativeBias):
    """The right module, whose parts can be replaced."""

    def buckets(self, rel):
        return _bucket(rel, len(self.weight), self.max_distance, self.bidirectional)

    def forward(self, query_positions, key_positions):
        rel = key_positions[..., None, :] - query_positions[..., :, None]
        return self.weight[self.buckets(rel)].movedim(-1, -3)


@misconception(
    "RelativeBias",
    "Past and future are exchanged: rel is the position of the key minus that of the query.",
)
class RelativeBias__query_minus_key(_RelativeBias):
    def buckets(self, rel):
        return super().buckets(-rel)


@misconception(
    "RelativeBias",
    "The heads are the last axis of your bias. Scores are (..., H, T, S), and with H = T = S nothing complains.",
)
class RelativeBias__heads_last(_RelativeBias):
    def forward(self, query_positions, key_positions):
        return super().forward(query_positions, key_positions).movedim(-3, -1)


@misconception(
    "RelativeBias",
    "Queries and keys changed axes: rows belong to queries, columns to keys.",
)
class RelativeBias__transposed(_RelativeBias):
    def forward(self, query_positions, key_positions):
        return super().forward(query_positions, key_positions).mT


@misconception(
    "RelativeBias",
    "Positions were counted, not read: you take the first query to stand at the first key.",
)
class RelativeBias__counts_for_itself(_RelativeBias):
    def forward(self, query_positions, key_positions):
        counted = (torch.arange(p.shape[-1], device=p.device).expand(p.shape) for p in (query_positions, key_positions))
        return super().forward(*counted)


@misconception(
    "RelativeBias",
    "Your positions are aligned at their ends. They were handed in, and may begin and end anywhere.",
)
class RelativeBias__ends_together(_RelativeBias):
    def forward(self, query_positions, key_positions):
        moved = (
            query_positions - query_positions[..., -1:] + key_positions[..., -1:]
            if query_positions.shape[-1]
            else query_positions
        )
        return super().forward(moved if key_positions.shape[-1] else query_positions, key_positions)


@misconception(
    "RelativeBias",
    "The weight starts with random numbers. A new bias should change nothing yet: zeros.",
)
class RelativeBias__random_start(_RelativeBias):
    def __init__(self, n_heads, num_buckets=32, max_distance=128, bidirectional=True):
        super().__init__(n_heads, num_buckets, max_distance, bidirectional)
        nn.init.ones_(self.weight)


@misconception(
    "RelativeBias",
    "max_distance and bidirectional were not passed on: the module always counts both ways up to 128.",
)
class RelativeBias__keeps_the_defaults(_RelativeBias):
    def buckets(self, rel):
        return _bucket(rel, len(self.weight))


@misconception(
    "RelativeBias",
    "The bias does not learn: no gradient arrives at the weight.",
)
class RelativeBias__cut_off(_RelativeBias):
    def forward(self, query_positions, key_positions):
        found = super().forward(query_positions, key_positions).detach()
        return found + self.weight.sum() * 0


# ntk_base


def _enough_pairs(dim):
    if dim % 2 or dim < 4:
        raise ValueError(f"dim {dim}")


@misconception(
    "ntk_base",
    "The base was multiplied by the factor. The last pair does not have the exponent 1, so it is slowed down by less than "
    "was asked for.",
)
def ntk_base__times_the_factor(base, dim, factor):
    _enough_pairs(dim)
    return float(base * factor)


@misconception(
    "ntk_base",
    "Your exponent is the wrong way up: you raised the factor to (dim - 2) / dim, which makes the stretch smaller still.",
)
def ntk_base__exponent_upside_down(base, dim, factor):
    _enough_pairs(dim)
    return float(base * factor ** ((dim - 2) / dim))


@misconception(
    "ntk_base",
    "The last pair turns faster, not slower: the factor went in as its inverse.",
)
def ntk_base__faster(base, dim, factor):
    _enough_pairs(dim)
    return float(base * factor ** (-dim / (dim - 2)))


@misconception(
    "ntk_base",
    "The last pair was taken to be number dim/2, but pairs are counted from 0: its exponent is (dim - 2) / dim, and not "
    "(dim - 1) / dim.",
)
def ntk_base__last_column(base, dim, factor):
    _enough_pairs(dim)
    return float(base * factor ** (dim / (dim - 1)))


@misconception(
    "ntk_base",
    "A width of one pair, or an odd one, went through or divided by zero: the first pair cannot stay where it is also the last.",
)
def ntk_base__any_width(base, dim, factor):
    return float(base * factor ** (dim / (dim - 2)))


@misconception(
    "ntk_base",
    "What you return is a frequency. A base is asked for, which `rope_tables` takes.",
)
def ntk_base__a_frequency(base, dim, factor):
    _enough_pairs(dim)
    return float(base ** (-(dim - 2) / dim) / factor)


# local_resolution


def _steps(dim, base, interpolation):
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) / interpolation


@misconception(
    "local_resolution",
    "This is the length of the arc, that is the angle itself. The distance goes straight through.",
)
def local_resolution__arc(dim, base=10000.0, *, interpolation=1.0):
    return _steps(dim, base, interpolation).abs().mean().item()


@misconception(
    "local_resolution",
    "Positions were multiplied by the interpolation. It squeezes them: it divides.",
)
def local_resolution__multiplies(dim, base=10000.0, *, interpolation=1.0):
    return (2 * (_steps(dim, base, 1 / interpolation) / 2).sin().abs()).mean().item()


@misconception(
    "local_resolution",
    "interpolation has no effect.",
)
def local_resolution__ignores_interpolation(dim, base=10000.0, *, interpolation=1.0):
    return (2 * (_steps(dim, base, 1.0) / 2).sin().abs()).mean().item()


@misconception(
    "local_resolution",
    "You divided the result. Divide the positions first: a chord does not shrink in proportion to its angle.",
)
def local_resolution__divides_the_result(dim, base=10000.0, *, interpolation=1.0):
    return (2 * (_steps(dim, base, 1.0) / 2).sin().abs()).mean().item() / interpolation


@misconception(
    "local_resolution",
    "The pairs were added up. An average is asked for, so that widths can be compared.",
)
def local_resolution__sum(dim, base=10000.0, *, interpolation=1.0):
    return (2 * (_steps(dim, base, interpolation) / 2).sin().abs()).sum().item()


@misconception(
    "local_resolution",
    "Lengths came out negative: the sine of half of a large turn is below zero, the chord is not.",
)
def local_resolution__signed(dim, base=10000.0, *, interpolation=1.0):
    return (2 * (_steps(dim, base, interpolation) / 2).sin()).mean().item()


@misconception(
    "local_resolution",
    "Half of the chord is missing: it is twice the sine of half of the angle.",
)
def local_resolution__half_a_chord(dim, base=10000.0, *, interpolation=1.0):
    return (_steps(dim, base, interpolation) / 2).sin().abs().mean().item()


@misconception(
    "local_resolution",
    "You compared sines alone. A pair has two coordinates, and both of them move.",
)
def local_resolution__sines_alone(dim, base=10000.0, *, interpolation=1.0):
    return _steps(dim, base, interpolation).sin().abs().mean().item()
