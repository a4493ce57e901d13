"""Day 27: known wrong solutions, each with the sentence for whoever wrote it."""

import torch
from torch import nn

from checker.testing import misconception
from reference import day27_mla_components as right
from reference.day01_tensor_basics import split_heads
from reference.day08_linear_layers import Linear
from reference.day14_custom_modules import RMSNorm
from reference.day19_positions import apply_rope, apply_rope_half, rope_tables

# mla_parameter_count


def _recount(d_model, n_heads, dn, dr, dv, r, rq, **changed):
    counts = right.mla_parameter_count(d_model, n_heads, dn, dr, dv, r, rq)
    counts |= {name: count for name, count in changed.items() if name in counts}
    del counts["total"]
    return counts | {"total": sum(counts.values())}


@misconception(
    "mla_parameter_count",
    "The rotary key was counted once per head. One of them serves all heads, so kv_a_proj_with_mqa has r + dr outputs.",
)
def mla_parameter_count__rotary_key_per_head(d_model, n_heads, dn, dr, dv, r, rq=None):
    return _recount(d_model, n_heads, dn, dr, dv, r, rq, kv_a_proj_with_mqa=(r + n_heads * dr) * d_model)


@misconception(
    "mla_parameter_count", "kv_a_proj_with_mqa has no rows for the rotary key here: it makes the latent and the key."
)
def mla_parameter_count__no_rotary_key(d_model, n_heads, dn, dr, dv, r, rq=None):
    return _recount(d_model, n_heads, dn, dr, dv, r, rq, kv_a_proj_with_mqa=r * d_model)


@misconception(
    "mla_parameter_count",
    "Your queries are dn wide. They meet keys of dn + dr numbers, so each head needs its rotary rows, too.",
)
def mla_parameter_count__queries_without_rope(d_model, n_heads, dn, dr, dv, r, rq=None):
    wide = n_heads * dn
    return _recount(d_model, n_heads, dn, dr, dv, r, rq, q_proj=wide * d_model, q_b_proj=wide * (rq or 0))


@misconception(
    "mla_parameter_count",
    "kv_b_proj came out with rotary rows. The rotary key does not pass through the latent at all.",
)
def mla_parameter_count__rope_in_kv_b(d_model, n_heads, dn, dr, dv, r, rq=None):
    return _recount(d_model, n_heads, dn, dr, dv, r, rq, kv_b_proj=n_heads * (dn + dr + dv) * r)


@misconception(
    "mla_parameter_count",
    "The values were given the width of the keys. In DeepSeek's models both are 128, which hides it; dv is a number of its own.",
)
def mla_parameter_count__values_like_keys(d_model, n_heads, dn, dr, dv, r, rq=None):
    return right.mla_parameter_count(d_model, n_heads, dn, dr, dn, r, rq)


@misconception(
    "mla_parameter_count",
    "o_proj was taken for a D by D matrix. It reads H * dv numbers, in V3 16,384 of them for a D of 7,168.",
)
def mla_parameter_count__square_output(d_model, n_heads, dn, dr, dv, r, rq=None):
    return _recount(d_model, n_heads, dn, dr, dv, r, rq, o_proj=d_model * d_model)


@misconception(
    "mla_parameter_count",
    "A gain for the rotary key was counted. The norm stands behind the latent alone and has r gains.",
)
def mla_parameter_count__norm_over_both(d_model, n_heads, dn, dr, dv, r, rq=None):
    return _recount(d_model, n_heads, dn, dr, dv, r, rq, kv_a_layernorm=r + dr)


@misconception(
    "mla_parameter_count", "The gains of the norms are not in your total. They are few, but a checkpoint holds them."
)
def mla_parameter_count__total_without_norms(d_model, n_heads, dn, dr, dv, r, rq=None):
    counts = right.mla_parameter_count(d_model, n_heads, dn, dr, dv, r, rq)
    return counts | {"total": sum(n for name, n in counts.items() if "proj" in name)}


@misconception(
    "mla_parameter_count",
    "Parts that this form does not have are listed with 0 or None. A checkpoint has no such names; leave them out.",
)
def mla_parameter_count__both_forms_listed(d_model, n_heads, dn, dr, dv, r, rq=None):
    empty = dict.fromkeys(("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj"), 0)
    return empty | right.mla_parameter_count(d_model, n_heads, dn, dr, dv, r, rq)


@misconception(
    "mla_parameter_count",
    "The compressed form still holds a full q_proj. q_a_proj and q_b_proj stand in its place, not beside it.",
)
def mla_parameter_count__compressed_and_full(d_model, n_heads, dn, dr, dv, r, rq=None):
    counts = right.mla_parameter_count(d_model, n_heads, dn, dr, dv, r, rq)
    if rq is None:
        return counts
    full = n_heads * (dn + dr) * d_model
    return counts | {"q_proj": full, "total": counts["total"] + full}


# KVDown


@misconception(
    "KVDown",
    "Your latent is smaller than it should be whenever the key is large: the mean square runs over all r + dr outputs. Only "
    "the latent is normalized; the key keeps its own scale.",
)
class KVDownStatisticsOverBoth(right.KVDown):
    def forward(self, x, cos, sin):
        both = self.kv_a_proj_with_mqa(x)
        wide = both.double() if both.dtype == torch.float64 else both.float()
        size = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.kv_a_layernorm.eps)
        latent = (wide * size).to(x.dtype)[..., : self.r] * self.kv_a_layernorm.weight
        return latent, apply_rope(both[..., self.r :], cos, sin)


@misconception(
    "KVDown",
    "The norm has r + dr gains, so it also stands behind the rotary key. A checkpoint has r: the key is left as it is.",
)
class KVDownNormOfBoth(nn.Module):
    def __init__(self, d_model, r, dr, eps=1e-6):
        super().__init__()
        self.r = r
        self.kv_a_proj_with_mqa = Linear(d_model, r + dr, bias=False)
        self.kv_a_layernorm = RMSNorm(r + dr, eps)

    def forward(self, x, cos, sin):
        both = self.kv_a_layernorm(self.kv_a_proj_with_mqa(x))
        return both[..., : self.r], apply_rope(both[..., self.r :], cos, sin)


@misconception(
    "KVDown",
    "The key came out normalized as well, apart from the latent. It does not grow with x any more; nothing but a rotation belongs to it.",
)
class KVDownNormOfEach(right.KVDown):
    def forward(self, x, cos, sin):
        c, k_rope = super().forward(x, cos, sin)
        return c, k_rope * torch.rsqrt(k_rope.square().mean(-1, keepdim=True) + 1e-6)


@misconception(
    "KVDown",
    "This latent is not normalized. What is cached is what will be used, and nobody norms it later: the norm belongs before the cache.",
)
class KVDownWithoutNorm(right.KVDown):
    def forward(self, x, cos, sin):
        both = self.kv_a_proj_with_mqa(x)
        return both[..., : self.r] + 0 * self.kv_a_layernorm.weight, apply_rope(both[..., self.r :], cos, sin)


@misconception(
    "KVDown",
    "The gains have no effect: your latent is what a norm with gains of 1 makes. A loaded checkpoint has others.",
)
class KVDownWithoutGain(right.KVDown):
    def forward(self, x, cos, sin):
        c, k_rope = super().forward(x, cos, sin)
        both = self.kv_a_proj_with_mqa(x)
        ones = RMSNorm(self.r, self.kv_a_layernorm.eps).to(both)
        return ones(both[..., : self.r]) + 0 * c.nan_to_num(0, 0, 0), k_rope


@misconception(
    "KVDown",
    "x was normalized before the projection. The norm stands behind it, on the r numbers of the latent.",
)
class KVDownNormBefore(right.KVDown):
    def forward(self, x, cos, sin):
        normed = RMSNorm(x.shape[-1], self.kv_a_layernorm.eps).to(x)(x)
        both = self.kv_a_proj_with_mqa(normed)
        return both[..., : self.r] * self.kv_a_layernorm.weight, apply_rope(both[..., self.r :], cos, sin)


@misconception(
    "KVDown",
    "A mean was subtracted: that is a LayerNorm. In spite of its name kv_a_layernorm divides by the root of the mean square, no more.",
)
class KVDownLayerNorm(right.KVDown):
    def forward(self, x, cos, sin):
        both = self.kv_a_proj_with_mqa(x)
        latent = both[..., : self.r]
        latent = latent - latent.mean(-1, keepdim=True)
        return self.kv_a_layernorm(latent), apply_rope(both[..., self.r :], cos, sin)


@misconception(
    "KVDown",
    "The first dr rows were read as the key and the rest as the latent. In the checkpoint the latent comes first.",
)
class KVDownKeyFirst(right.KVDown):
    def forward(self, x, cos, sin):
        key, latent = self.kv_a_proj_with_mqa(x).split((self.dr, self.r), -1)
        return self.kv_a_layernorm(latent), apply_rope(key, cos, sin)


@misconception(
    "KVDown",
    "The key left without its rotation. It carries all that scores know about positions, and it is turned once, here.",
)
class KVDownWithoutRotation(right.KVDown):
    def forward(self, x, cos, sin):
        key = apply_rope(self.kv_a_proj_with_mqa(x)[..., self.r :], cos, sin)
        c, _ = super().forward(x, cos, sin)
        return c, 0 * key + self.kv_a_proj_with_mqa(x)[..., self.r :]


@misconception(
    "KVDown",
    "Your key turns the pairs (0, dr/2), (1, dr/2 + 1), ... DeepSeek's weights have their pairs next to each other: (0, 1), (2, 3), ...",
)
class KVDownHalfSplit(right.KVDown):
    def forward(self, x, cos, sin):
        latent, key = self.kv_a_proj_with_mqa(x).split((self.r, self.dr), -1)
        return self.kv_a_layernorm(latent), apply_rope_half(key, cos, sin)


@misconception(
    "KVDown",
    "The key is right up to its order: the halves stand apart, as V3's class in transformers leaves them. Scores would agree, but "
    "here neighboring pairs stay neighbors.",
)
class KVDownHalvesApart(right.KVDown):
    def forward(self, x, cos, sin):
        c, k_rope = super().forward(x, cos, sin)
        return c, torch.cat((k_rope[..., 0::2], k_rope[..., 1::2]), -1)


@misconception("KVDown", "Your key turns the other way: at every position by minus the angle of the tables.")
class KVDownBackwards(right.KVDown):
    def forward(self, x, cos, sin):
        return super().forward(x, cos, -sin)


@misconception(
    "KVDown",
    "The latent was rotated, too. A latent that depends on its position cannot be absorbed: that is why the key stands apart.",
)
class KVDownRotatesLatent(right.KVDown):
    def forward(self, x, cos, sin):
        c, k_rope = super().forward(x, cos, sin)
        n = min(self.r // 2 * 2, self.dr)
        head = apply_rope(c[..., :n], cos[..., : n // 2], sin[..., : n // 2])
        return torch.cat((head, c[..., n:]), -1), k_rope


@misconception(
    "KVDown",
    "For small x your eps is visibly another one. The latent norms of DeepSeek use 1e-6 unless told otherwise.",
)
class KVDownOtherEps(right.KVDown):
    def __init__(self, d_model, r, dr, eps=1e-5):
        super().__init__(d_model, r, dr, eps)


@misconception("KVDown", "The eps that was passed in changes nothing: your norm always uses its default.")
class KVDownIgnoresEps(right.KVDown):
    def __init__(self, d_model, r, dr, eps=1e-6):
        super().__init__(d_model, r, dr)


@misconception(
    "KVDown",
    "In float16 the mean square is infinite and the latent 0: a square of 300 does not fit. Take the statistics in float32, then go back.",
)
class KVDownHalfStatistics(right.KVDown):
    def forward(self, x, cos, sin):
        latent, key = self.kv_a_proj_with_mqa(x).split((self.r, self.dr), -1)
        size = torch.rsqrt(latent.square().mean(-1, keepdim=True) + self.kv_a_layernorm.eps)
        return latent * size * self.kv_a_layernorm.weight, apply_rope(key, cos, sin)


@misconception(
    "KVDown",
    "Float64 was rounded to float32 on the way. Widen half precision, and leave what is wider than float32 as it is.",
)
class KVDownAlwaysFloat(right.KVDown):
    def forward(self, x, cos, sin):
        latent, key = self.kv_a_proj_with_mqa(x).split((self.r, self.dr), -1)
        return self.kv_a_layernorm(latent.float()).to(x.dtype), apply_rope(key, cos, sin)


@misconception(
    "KVDown", "Your projection has a bias. In DeepSeek's checkpoints it has none, so that loading would miss a tensor."
)
class KVDownWithBias(right.KVDown):
    def __init__(self, d_model, r, dr, eps=1e-6):
        super().__init__(d_model, r, dr, eps)
        self.kv_a_proj_with_mqa = Linear(d_model, r + dr)


@misconception(
    "KVDown",
    "x is projected twice, once for the latent and once for the key. It is one matrix: project once, cut the result.",
)
class KVDownTwoProducts(right.KVDown):
    def forward(self, x, cos, sin):
        if x.shape[-1] != self.kv_a_proj_with_mqa.weight.shape[1]:
            return super().forward(x, cos, sin)
        w_c, w_k = self.kv_a_proj_with_mqa.weight.split((self.r, self.dr))
        return self.kv_a_layernorm(x @ w_c.T), apply_rope(x @ w_k.T, cos, sin)


@misconception("KVDown", "The key comes with an axis for heads. It is (B, T, dr): there is one for all of them.")
class KVDownHeadAxis(right.KVDown):
    def forward(self, x, cos, sin):
        c, k_rope = super().forward(x, cos, sin)
        return c, k_rope[:, None]


@misconception("KVDown", "The rotated key comes first in your pair. What is returned is the latent, then the key.")
class KVDownSwapped(right.KVDown):
    def forward(self, x, cos, sin):
        c, k_rope = super().forward(x, cos, sin)
        return k_rope, c


# kv_b


def _rows(weight, n_heads, dn, dv):
    if weight.shape[0] != n_heads * (dn + dv):
        raise ValueError(f"weight {tuple(weight.shape)} has not {n_heads * (dn + dv)} rows")


@misconception(
    "split_kv_b",
    "The rows were read as all keys, then all values. They alternate: dn rows for the key of a head, dv for its value, next head.",
)
def split_kv_b__keys_then_values(weight, n_heads, dn, dv):
    _rows(weight, n_heads, dn, dv)
    keys, values = weight.split((n_heads * dn, n_heads * dv))
    return keys.unflatten(0, (n_heads, dn)), values.unflatten(0, (n_heads, dv))


@misconception("split_kv_b", "In each head the value's rows were taken first. The key's come first.")
def split_kv_b__values_first(weight, n_heads, dn, dv):
    _rows(weight, n_heads, dn, dv)
    heads = weight.unflatten(0, (n_heads, dn + dv))
    return heads[:, dv:], heads[:, :dv]


@misconception(
    "split_kv_b",
    "Your heads take turns row by row. A head's rows are neighbors: the head is the outer of the two axes.",
)
def split_kv_b__heads_inside(weight, n_heads, dn, dv):
    _rows(weight, n_heads, dn, dv)
    heads = weight.unflatten(0, (dn + dv, n_heads)).transpose(0, 1)
    return heads[:, :dn], heads[:, dn:]


@misconception(
    "split_kv_b",
    "These are copies. When training moves the weight, they stay behind; and a copy per step is 32 MB to read for each layer of V3.",
)
def split_kv_b__copies(weight, n_heads, dn, dv):
    w_uk, w_uv = right.split_kv_b(weight, n_heads, dn, dv)
    return w_uk.clone(), w_uv.clone()


@misconception(
    "split_kv_b",
    "For a weight with other strides you return a copy: reshape copies where it must. Splitting an axis never needs one.",
)
def split_kv_b__reshape_of_transposed(weight, n_heads, dn, dv):
    return right.split_kv_b(weight.contiguous(), n_heads, dn, dv)


@misconception("split_kv_b", "The views are detached, so the weight gets no gradient through them.")
def split_kv_b__detached(weight, n_heads, dn, dv):
    return right.split_kv_b(weight.detach(), n_heads, dn, dv)


@misconception(
    "split_kv_b",
    "A weight with the wrong number of rows got through, or died with another error. Compare the rows with H * (dn + dv) first.",
)
def split_kv_b__unchecked(weight, n_heads, dn, dv):
    heads = weight[: n_heads * (dn + dv)].unflatten(0, (n_heads, -1))
    return heads[:, :dn], heads[:, dn:]


@misconception(
    "KVUp",
    "The outputs were read as all keys, then all values. They come head by head, dn for the key and dv for the value.",
)
class KVUpKeysThenValues(right.KVUp):
    def forward(self, c):
        keys, values = self.kv_b_proj(c).split((self.n_heads * self.dn, self.n_heads * self.dv), -1)
        return split_heads(keys, self.n_heads), split_heads(values, self.n_heads)


@misconception("KVUp", "In each head the value was taken first. The first dn outputs are the key.")
class KVUpValuesFirst(right.KVUp):
    def forward(self, c):
        v, k = split_heads(self.kv_b_proj(c), self.n_heads).split((self.dv, self.dn), -1)
        return k, v


@misconception(
    "KVUp", "Your heads come after the positions. They go in front of them: (B, H, S, dn) and (B, H, S, dv)."
)
class KVUpHeadsBehind(right.KVUp):
    def forward(self, c):
        k, v = super().forward(c)
        return k.transpose(1, 2), v.transpose(1, 2)


@misconception(
    "KVUp",
    "The shapes are right and the numbers shuffled: a view to (B, H, S, ...) mixes heads and positions. Split the axis, then move it.",
)
class KVUpViewedHeads(right.KVUp):
    def forward(self, c):
        B, S, _ = c.shape
        heads = self.kv_b_proj(c).reshape(B, self.n_heads, S, self.dn + self.dv)
        return heads.split((self.dn, self.dv), -1)


@misconception(
    "KVUp", "The latent was normalized a second time here. It comes normalized, and a cache hands out what was stored."
)
class KVUpNormsAgain(right.KVUp):
    def forward(self, c):
        return super().forward(c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-6))


@misconception(
    "KVUp", "The keys were normalized after the up-projection. The norm belongs to the latent, before it is stored."
)
class KVUpNormsKeys(right.KVUp):
    def forward(self, c):
        k, v = super().forward(c)
        return k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6), v


@misconception(
    "KVUp", "Keys and values are made by two products. They leave one matrix: project once, and cut what comes out."
)
class KVUpTwoProducts(right.KVUp):
    def forward(self, c):
        if c.shape[-1] != self.kv_b_proj.weight.shape[1]:
            return super().forward(c)
        w_uk, w_uv = right.split_kv_b(self.kv_b_proj.weight, self.n_heads, self.dn, self.dv)
        k, v = c @ w_uk.flatten(0, 1).T, c @ w_uv.flatten(0, 1).T
        return split_heads(k, self.n_heads), split_heads(v, self.n_heads)


@misconception(
    "KVUp",
    "Your kv_b_proj has a bias. The checkpoint has none; and with one, nothing could be absorbed into a product.",
)
class KVUpWithBias(right.KVUp):
    def __init__(self, r, n_heads, dn, dv):
        super().__init__(r, n_heads, dn, dv)
        self.kv_b_proj = Linear(r, n_heads * (dn + dv))


# QueryPath


@misconception(
    "QueryPath",
    "The rotary part has a projection of its own, from x. With compressed queries it comes from the latent c_q, like the rest of its head.",
)
class QueryPathRopeFromX(right.QueryPath):
    def __init__(self, d_model, n_heads, dn, dr, rq=None, eps=1e-6):
        super().__init__(d_model, n_heads, dn, dr, rq, eps)
        if rq is not None:
            self.q_b_proj = Linear(rq, n_heads * dn, bias=False)
            self.q_r_proj = Linear(d_model, n_heads * dr, bias=False)

    def forward(self, x, cos, sin):
        if self.rq is None:
            return super().forward(x, cos, sin)
        nope = split_heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))), self.n_heads)
        return nope, apply_rope(split_heads(self.q_r_proj(x), self.n_heads), cos, sin)


@misconception(
    "QueryPath",
    "The rotary part was made from c_q before its norm: it grows with x, while the rest does not. Both parts come from the normalized latent.",
)
class QueryPathRopeBeforeNorm(right.QueryPath):
    def forward(self, x, cos, sin):
        q_nope, q_rope = super().forward(x, cos, sin)
        if self.rq is not None:
            raw = split_heads(self.q_b_proj(self.q_a_proj(x)), self.n_heads)[..., self.dn :]
            q_rope = apply_rope(raw, cos, sin)
        return q_nope, q_rope


@misconception(
    "QueryPath",
    "The queries' latent is not normalized. It has a norm of its own between the two projections, like the one of the keys.",
)
class QueryPathWithoutNorm(right.QueryPath):
    def forward(self, x, cos, sin):
        if self.rq is None:
            return super().forward(x, cos, sin)
        q = split_heads(self.q_b_proj(self.q_a_proj(x) + 0 * self.q_a_layernorm.weight), self.n_heads)
        return q[..., : self.dn], apply_rope(q[..., self.dn :], cos, sin)


@misconception(
    "QueryPath", "In each head the rotary part was taken first. The first dn numbers are the ones without a position."
)
class QueryPathRopeFirst(right.QueryPath):
    def forward(self, x, cos, sin):
        q = self.q_proj(x) if self.rq is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_rope, q_nope = split_heads(q, self.n_heads).split((self.dr, self.dn), -1)
        return q_nope, apply_rope(q_rope, cos, sin)


@misconception(
    "QueryPath",
    "The outputs were read as the parts without a position of all heads, then the rotary parts of all. Each head has its own two parts, side by side.",
)
class QueryPathPartsThenHeads(right.QueryPath):
    def forward(self, x, cos, sin):
        q = self.q_proj(x) if self.rq is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.split((self.n_heads * self.dn, self.n_heads * self.dr), -1)
        return split_heads(q_nope, self.n_heads), apply_rope(split_heads(q_rope, self.n_heads), cos, sin)


@misconception("QueryPath", "The rotary part is not rotated. The key is, so the query has to be.")
class QueryPathWithoutRotation(right.QueryPath):
    def forward(self, x, cos, sin):
        turned = super().forward(x, cos, sin)
        q = self.q_proj(x) if self.rq is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return turned[0], split_heads(q, self.n_heads)[..., self.dn :] + 0 * turned[1]


@misconception(
    "QueryPath",
    "The part without a position was rotated as well. What is rotated cannot be absorbed; only the last dr numbers of a head turn.",
)
class QueryPathRotatesAll(right.QueryPath):
    def forward(self, x, cos, sin):
        q_nope, q_rope = super().forward(x, cos, sin)
        n = min(self.dn // 2 * 2, self.dr)
        head = apply_rope(q_nope[..., :n], cos[..., : n // 2], sin[..., : n // 2])
        return torch.cat((head, q_nope[..., n:]), -1), q_rope


@misconception(
    "QueryPath",
    "Your queries turn the pairs (0, dr/2), (1, dr/2 + 1), ... DeepSeek's weights have their pairs next to each other.",
)
class QueryPathHalfSplit(right.QueryPath):
    def forward(self, x, cos, sin):
        q = self.q_proj(x) if self.rq is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = split_heads(q, self.n_heads).split((self.dn, self.dr), -1)
        return q_nope, apply_rope_half(q_rope, cos, sin)


@misconception("QueryPath", "Your queries turn the other way: by minus the angle of the tables.")
class QueryPathBackwards(right.QueryPath):
    def forward(self, x, cos, sin):
        return super().forward(x, cos, -sin)


@misconception(
    "QueryPath",
    "The queries are scaled already. The scale is applied once, to the scores; with both it would count twice.",
)
class QueryPathScaled(right.QueryPath):
    def forward(self, x, cos, sin):
        scale = (self.dn + self.dr) ** -0.5
        return tuple(scale * q for q in super().forward(x, cos, sin))


@misconception(
    "QueryPath", "Your heads come after the positions. They go in front of them: (B, H, T, dn) and (B, H, T, dr)."
)
class QueryPathHeadsBehind(right.QueryPath):
    def forward(self, x, cos, sin):
        return tuple(q.transpose(1, 2) for q in super().forward(x, cos, sin))


@misconception(
    "QueryPath",
    "The shapes are right and the numbers shuffled: a view to (B, H, T, ...) mixes heads and positions. Split the axis, then move it.",
)
class QueryPathViewedHeads(right.QueryPath):
    def forward(self, x, cos, sin):
        q = self.q_proj(x) if self.rq is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.reshape(x.shape[0], self.n_heads, x.shape[1], -1).split((self.dn, self.dr), -1)
        return q_nope, apply_rope(q_rope, cos, sin)


@misconception("QueryPath", "rq changed nothing: there is a full q_proj where a latent was asked for.")
class QueryPathNeverCompressed(right.QueryPath):
    def __init__(self, d_model, n_heads, dn, dr, rq=None, eps=1e-6):
        super().__init__(d_model, n_heads, dn, dr)


@misconception(
    "QueryPath",
    "Both forms of the projection are created, and one is never used. It would be saved, loaded and trained all the same.",
)
class QueryPathBothForms(right.QueryPath):
    def __init__(self, d_model, n_heads, dn, dr, rq=None, eps=1e-6):
        super().__init__(d_model, n_heads, dn, dr, rq, eps)
        if rq is not None:
            self.q_proj = Linear(d_model, n_heads * (dn + dr), bias=False)


@misconception(
    "QueryPath",
    "For small x your eps is visibly another one. The latent norms of DeepSeek use 1e-6 unless told otherwise.",
)
class QueryPathOtherEps(right.QueryPath):
    def __init__(self, d_model, n_heads, dn, dr, rq=None, eps=1e-5):
        super().__init__(d_model, n_heads, dn, dr, rq, eps)


@misconception("QueryPath", "The eps that was passed in changes nothing: your norm always uses its default.")
class QueryPathIgnoresEps(right.QueryPath):
    def __init__(self, d_model, n_heads, dn, dr, rq=None, eps=1e-6):
        super().__init__(d_model, n_heads, dn, dr, rq)


@misconception(
    "QueryPath",
    "In float16 the mean square is infinite and the queries 0: a square of 300 does not fit. Take the statistics in float32.",
)
class QueryPathHalfStatistics(right.QueryPath):
    def forward(self, x, cos, sin):
        if self.rq is None:
            return super().forward(x, cos, sin)
        latent = self.q_a_proj(x)
        latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + self.q_a_layernorm.eps)
        q = split_heads(self.q_b_proj(latent * self.q_a_layernorm.weight), self.n_heads)
        return q[..., : self.dn], apply_rope(q[..., self.dn :], cos, sin)


# decoupled_scores


def _check(q_nope, q_rope, k_nope, k_rope):
    right.decoupled_scores(q_nope[..., :0, :], q_rope[..., :0, :], k_nope, k_rope)
    if q_nope.shape[2] != q_rope.shape[2]:
        raise ValueError(f"{tuple(q_nope.shape)} and {tuple(q_rope.shape)}")


def _unscaled(q_nope, q_rope, k_nope, k_rope):
    scores = q_nope @ k_nope.mT
    return scores.add_(torch.einsum("bhtd,bsd->bhts", q_rope, k_rope))


@misconception(
    "decoupled_scores",
    "The default scale was taken from dn alone. The dot product runs over dn + dr numbers, 192 in DeepSeek's models.",
)
def decoupled_scores__scale_of_content(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, q_nope.shape[-1] ** -0.5 if scale is None else scale)


@misconception(
    "decoupled_scores",
    "Each part was scaled by its own width. The sum is one dot product over dn + dr numbers, with one scale.",
)
def decoupled_scores__two_scales(q_nope, q_rope, k_nope, k_rope, scale=None):
    if scale is not None:
        return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, scale)
    _check(q_nope, q_rope, k_nope, k_rope)
    scores = (q_nope @ k_nope.mT).mul_(q_nope.shape[-1] ** -0.5)
    return scores.add_(torch.einsum("bhtd,bsd->bhts", q_rope * q_rope.shape[-1] ** -0.5, k_rope))


@misconception(
    "decoupled_scores", "The scale was applied to the content and not to the rotary part. It belongs to their sum."
)
def decoupled_scores__scales_content_only(q_nope, q_rope, k_nope, k_rope, scale=None):
    _check(q_nope, q_rope, k_nope, k_rope)
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    return (q_nope @ k_nope.mT).mul_(scale).add_(torch.einsum("bhtd,bsd->bhts", q_rope, k_rope))


@misconception("decoupled_scores", "No scale without an argument: None means (dn + dr)**-0.5, not 1.")
def decoupled_scores__none_is_one(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, 1.0 if scale is None else scale)


@misconception(
    "decoupled_scores", "The scale that was passed in is ignored. YaRN will need another one than the default."
)
def decoupled_scores__ignores_scale(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope)


@misconception("decoupled_scores", "A scale of 0 was taken for a missing one: `or` does not tell 0 from None.")
def decoupled_scores__zero_is_none(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, scale or None)


@misconception("decoupled_scores", "The given scale was multiplied with the default one. It stands in its place.")
def decoupled_scores__both_scales(q_nope, q_rope, k_nope, k_rope, scale=None):
    default = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, default * (1.0 if scale is None else scale))


@misconception("decoupled_scores", "The rotary part is missing: these scores do not know where anything stands.")
def decoupled_scores__content_only(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(q_nope, 0 * q_rope, k_nope, k_rope, scale)


@misconception(
    "decoupled_scores", "Only the rotary part is left: these scores know where a token stands, and not what it says."
)
def decoupled_scores__position_only(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(0 * q_nope, q_rope, k_nope, k_rope, scale)


@misconception(
    "decoupled_scores", "Attention weights came out. The softmax, like the mask, is not a part of today's function."
)
def decoupled_scores__softmax(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, scale).softmax(-1)


@misconception(
    "decoupled_scores",
    "The numbers are right, but queries and keys were joined first. That writes the rotary key once per head, and the whole keys with it.",
)
def decoupled_scores__joined(q_nope, q_rope, k_nope, k_rope, scale=None):
    _check(q_nope, q_rope, k_nope, k_rope)
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    shared = k_rope[:, None].expand(-1, q_nope.shape[1], -1, -1)
    return torch.cat((q_nope, q_rope), -1) @ torch.cat((k_nope, shared), -1).mT * scale


@misconception(
    "decoupled_scores",
    "The broadcasted product copies the rotary key for every head. One key for all: put heads and queries into one axis, or let einsum do it.",
)
def decoupled_scores__key_copied_per_head(q_nope, q_rope, k_nope, k_rope, scale=None):
    _check(q_nope, q_rope, k_nope, k_rope)
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    scores = q_nope @ k_nope.mT
    scores += q_rope @ k_rope[:, None].mT
    return scores.mul_(scale)


@misconception(
    "decoupled_scores",
    "The numbers are right, in four tables of scores where two do: the sum and its multiple are new ones. The first table is yours; write into it.",
)
def decoupled_scores__four_tables(q_nope, q_rope, k_nope, k_rope, scale=None):
    _check(q_nope, q_rope, k_nope, k_rope)
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    return (q_nope @ k_nope.mT + torch.einsum("bhtd,bsd->bhts", q_rope, k_rope)) * scale


@misconception(
    "decoupled_scores", "Queries and keys have changed places in the table: it is (B, H, T, S), one row for each query."
)
def decoupled_scores__transposed(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, scale).mT


@misconception(
    "decoupled_scores",
    "Sizes of 1 were stretched to fit. The one thing that is shared is k_rope, over the heads; everything else has to agree.",
)
def decoupled_scores__broadcasts(q_nope, q_rope, k_nope, k_rope, scale=None):
    try:
        scores = _unscaled(q_nope, q_rope, k_nope, k_rope)
    except RuntimeError as error:
        raise ValueError(" ".join(str(tuple(x.shape)) for x in (q_nope, q_rope, k_nope, k_rope))) from error
    return scores.mul_((q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else scale)


@misconception(
    "decoupled_scores",
    "A k_rope with a head axis was accepted. There is one rotary key for all heads, (B, S, dr); that is what keeps the cache small.",
)
def decoupled_scores__key_per_head(q_nope, q_rope, k_nope, k_rope, scale=None):
    if k_rope.dim() == 4:
        k_rope = k_rope.mean(1)
    return right.decoupled_scores(q_nope, q_rope, k_nope, k_rope, scale)


@misconception(
    "decoupled_scores",
    "The scores are float32 whatever came in. They stay in the dtype of the inputs; only tomorrow's softmax widens.",
)
def decoupled_scores__always_float(q_nope, q_rope, k_nope, k_rope, scale=None):
    return right.decoupled_scores(*(x.float() for x in (q_nope, q_rope, k_nope, k_rope)), scale)


# LatentCache


@misconception(
    "LatentCache",
    "The whole buffer comes back, with zeros behind the valid positions. They would be keys, too, and get their share of the softmax.",
)
class LatentCacheWholeBuffer(right.LatentCache):
    def update(self, c, k_rope):
        super().update(c, k_rope)
        return self.latents, self.keys


@misconception(
    "LatentCache", "Only the new positions come back. Attention needs all that are valid, the old ones included."
)
class LatentCacheOnlyNew(right.LatentCache):
    def update(self, c, k_rope):
        C, K = super().update(c, k_rope)
        first = self.length - c.shape[1]
        return C[:, first:], K[:, first:]


@misconception(
    "LatentCache",
    "What comes back is a copy. At each step the whole past would be read and written once more; slices of the buffer cost nothing.",
)
class LatentCacheCopies(right.LatentCache):
    def update(self, c, k_rope):
        C, K = super().update(c, k_rope)
        return C.clone(), K.clone()


@misconception("LatentCache", "The length does not grow: every chunk is written over the one before it.")
class LatentCacheStandsStill(right.LatentCache):
    def update(self, c, k_rope):
        before = self.length
        found = super().update(c, k_rope)
        self.length = before
        return found


@misconception("LatentCache", "The length grows by one per call. A chunk of T tokens is T positions.")
class LatentCacheCountsCalls(right.LatentCache):
    def update(self, c, k_rope):
        before = self.length
        found = super().update(c, k_rope)
        self.length = before + 1
        return found


@misconception("LatentCache", "The last position is never used: max_len tokens fit, and only one more does not.")
class LatentCacheOneTooFew(right.LatentCache):
    def update(self, c, k_rope):
        if self.length + c.shape[1] >= self.max_len:
            raise ValueError(f"{c.shape[1]} after {self.length} do not fit into {self.max_len}")
        return super().update(c, k_rope)


@misconception(
    "LatentCache",
    "What does not fit is cut off without a word. The caller believes that its tokens are there; say so with a ValueError, and store nothing.",
)
class LatentCacheCutsOff(right.LatentCache):
    def update(self, c, k_rope):
        room = self.max_len - self.length
        return super().update(c[:, :room], k_rope[:, :room])


@misconception(
    "LatentCache",
    "When it is full your cache drops its oldest positions. That is another cache; this one refuses with a ValueError.",
)
class LatentCacheDropsOldest(right.LatentCache):
    def update(self, c, k_rope):
        extra = self.length + c.shape[1] - self.max_len
        if extra > 0:
            self.length = max(0, self.length - extra)
            c, k_rope = c[:, -self.max_len :], k_rope[:, -self.max_len :]
        return super().update(c, k_rope)


@misconception(
    "LatentCache",
    "The length was moved before the chunk was checked: after a refusal the cache counts positions that nobody wrote. Check "
    "everything first, and move the length last.",
)
class LatentCacheCountsBeforeChecking(right.LatentCache):
    def update(self, c, k_rope):
        before = self.length
        try:
            return super().update(c, k_rope)
        except ValueError:
            self.length = min(before + c.shape[1], self.max_len)
            raise


@misconception(
    "LatentCache",
    "A chunk with one row, or of width 1, was stretched over the buffer: assigning into a slice broadcasts. Compare the shapes first.",
)
class LatentCacheBroadcasts(right.LatentCache):
    def update(self, c, k_rope):
        B, _, r = self.latents.shape
        if c.dim() == k_rope.dim() == 3 and c.shape[1] == k_rope.shape[1]:
            ones = [
                all(n in (1, m) for n, m in zip(x.shape[::2], y.shape[::2], strict=True))
                for x, y in ((c, self.latents), (k_rope, self.keys))
            ]
            if all(ones):
                c, k_rope = c.expand(B, -1, r), k_rope.expand(B, -1, self.keys.shape[-1])
        return super().update(c, k_rope)


@misconception(
    "LatentCache",
    "A chunk with a graph was detached in silence. Whoever trains through a cache should hear that it cannot be done.",
)
class LatentCacheDetaches(right.LatentCache):
    def update(self, c, k_rope):
        return super().update(c.detach(), k_rope.detach())


@misconception(
    "LatentCache", "A chunk that requires a gradient is refused even under no_grad. There it brings no graph along."
)
class LatentCacheAlwaysRefuses(right.LatentCache):
    def update(self, c, k_rope):
        if c.requires_grad or k_rope.requires_grad:
            raise RuntimeError("a cache keeps no graph")
        return super().update(c, k_rope)


@misconception("LatentCache", "Only c is asked whether it requires a gradient. The rotary key has a graph as well.")
class LatentCacheAsksLatentOnly(right.LatentCache):
    def update(self, c, k_rope):
        return super().update(c, k_rope.detach())


@misconception("LatentCache", "Truncating did nothing: the old positions are still in front of what comes next.")
class LatentCacheIgnoresTruncate(right.LatentCache):
    def truncate(self, n):
        if not 0 <= n <= self.length:
            raise ValueError(n)


@misconception("LatentCache", "Truncating removed n positions. It keeps n: the number says where the past ends.")
class LatentCacheRemoves(right.LatentCache):
    def truncate(self, n):
        if not 0 <= n <= self.length:
            raise ValueError(n)
        self.length -= n


@misconception(
    "LatentCache", "Truncating to more than there is was accepted: the length then counts positions that nobody wrote."
)
class LatentCacheTruncatesUnchecked(right.LatentCache):
    def truncate(self, n):
        self.length = n


@misconception(
    "LatentCache",
    "A truncation that asks for too much is trimmed in silence. It is a mistake of the caller: ValueError.",
)
class LatentCacheTruncatesQuietly(right.LatentCache):
    def truncate(self, n):
        self.length = max(0, min(n, self.length))


@misconception(
    "LatentCache", "After reset the length is not 0: the next sequence would read the tokens of the last one."
)
class LatentCacheResetForgetsLength(right.LatentCache):
    def reset(self):
        self.latents.zero_()
        self.keys.zero_()


@misconception(
    "LatentCache",
    "nbytes is that of the valid positions. The memory is allocated once and is there from the beginning.",
)
class LatentCacheBytesOfLength(right.LatentCache):
    @property
    def nbytes(self):
        return super().nbytes // self.max_len * self.length


@misconception(
    "LatentCache", "nbytes leaves out the rotary keys. They are dr numbers per token beside the r of the latent."
)
class LatentCacheBytesOfLatent(right.LatentCache):
    @property
    def nbytes(self):
        return self.latents.nbytes


@misconception("LatentCache", "nbytes counts numbers. A number of bfloat16 has two bytes, one of float32 four.")
class LatentCacheCountsNumbers(right.LatentCache):
    @property
    def nbytes(self):
        return self.latents.numel() + self.keys.numel()


@misconception(
    "LatentCache",
    "The latents come back normalized again. What is stored was normalized before: store as it is, return as it is.",
)
class LatentCacheNormsOnRead(right.LatentCache):
    def update(self, c, k_rope):
        C, K = super().update(c, k_rope)
        return C * torch.rsqrt(C.float().square().mean(-1, keepdim=True) + 1e-6).to(C.dtype), K


@misconception(
    "LatentCache",
    "The keys were rotated on the way out. They came rotated, each at its own position; a second turn puts them somewhere else.",
)
class LatentCacheRotatesOnRead(right.LatentCache):
    def update(self, c, k_rope):
        C, K = super().update(c, k_rope)
        return C, apply_rope(K, *rope_tables(torch.arange(self.length, device=K.device), K.shape[-1]))


@misconception("LatentCache", "dtype has no effect: the cache is float32 always, twice what bfloat16 would take.")
class LatentCacheAlwaysFloat(right.LatentCache):
    def __init__(self, batch, max_len, r, dr, *, dtype=torch.float32, device=None):
        super().__init__(batch, max_len, r, dr, device=device)


@misconception(
    "LatentCache",
    "Batch rows stand behind the positions in your buffer. It is (B, L, r) and (B, L, dr), as everywhere.",
)
class LatentCachePositionsFirst(right.LatentCache):
    def update(self, c, k_rope):
        C, K = super().update(c, k_rope)
        return C.transpose(0, 1), K.transpose(0, 1)


@misconception("LatentCache", "The keys have an axis for heads. There are none here: one key per token.")
class LatentCacheHeadAxis(right.LatentCache):
    def update(self, c, k_rope):
        C, K = super().update(c, k_rope)
        return C, K[:, None]


@misconception(
    "LatentCache", "All your caches share one memory, as default arguments and class attributes do. Each needs its own."
)
class LatentCacheShared(right.LatentCache):
    memory = {}

    def __init__(self, batch, max_len, r, dr, *, dtype=torch.float32, device=None):
        super().__init__(batch, max_len, r, dr, dtype=dtype, device=device)
        key = (batch, max_len, r, dr, dtype)
        self.latents, self.keys = self.memory.setdefault(key, (self.latents, self.keys))


# fold_norm


@misconception(
    "fold_norm",
    "The gain was multiplied into the rows. Each number of the latent meets one column, so that is where its gain goes.",
)
def fold_norm__rows(kv_a_layernorm_weight, kv_b_weight):
    right.fold_norm(kv_a_layernorm_weight, kv_b_weight)
    n, r = kv_b_weight.shape
    return kv_b_weight * kv_a_layernorm_weight.repeat(-(-n // r))[:n, None]


@misconception(
    "fold_norm", "The gain was divided out. The norm multiplies by it, and the folded weight must do so in its place."
)
def fold_norm__divides(kv_a_layernorm_weight, kv_b_weight):
    right.fold_norm(kv_a_layernorm_weight, kv_b_weight)
    return kv_b_weight / kv_a_layernorm_weight


@misconception("fold_norm", "The gain counts twice: the norm that remains has gains of 1, so one factor is enough.")
def fold_norm__twice(kv_a_layernorm_weight, kv_b_weight):
    return right.fold_norm(kv_a_layernorm_weight, kv_b_weight) * kv_a_layernorm_weight


@misconception("fold_norm", "1 was added to the gain. Some models store gain - 1; DeepSeek stores the gain.")
def fold_norm__gain_plus_one(kv_a_layernorm_weight, kv_b_weight):
    return right.fold_norm(kv_a_layernorm_weight, kv_b_weight) + kv_b_weight


@misconception(
    "fold_norm", "The weight that came in was changed. It belongs to the caller, who still needs it with its norm."
)
def fold_norm__in_place(kv_a_layernorm_weight, kv_b_weight):
    right.fold_norm(kv_a_layernorm_weight, kv_b_weight)
    with torch.no_grad():
        return kv_b_weight.mul_(kv_a_layernorm_weight)


@misconception(
    "fold_norm",
    "A gain of another width got through by broadcasting, or died with another error: compare it with the columns first.",
)
def fold_norm__unchecked(kv_a_layernorm_weight, kv_b_weight):
    return kv_b_weight * kv_a_layernorm_weight


@misconception("norm_counterexample", "c itself came back. A matrix that normalizes c normalizes it again.")
def norm_counterexample__same(c):
    return c.clone()


@misconception(
    "norm_counterexample",
    "Two latents in different directions can always be served: a matrix is free to do as it likes with each of them.",
)
def norm_counterexample__another_direction(c):
    return c.flip(0) + torch.arange(len(c), dtype=c.dtype, device=c.device)


@misconception(
    "norm_counterexample",
    "The mirrored latent has the mirrored norm, and a matrix mirrors as well: one matrix does both.",
)
def norm_counterexample__mirrored(c):
    return -c


@misconception(
    "norm_counterexample",
    "Every matrix sends zero to zero, and that is what a norm makes of it, too. It proves nothing.",
)
def norm_counterexample__zero(c):
    return torch.zeros_like(c)


@misconception(
    "norm_counterexample",
    "The idea is right and the difference too small: the best matrix misses both by less than a tenth. Go further away from c.",
)
def norm_counterexample__too_close(c):
    return 1.1 * c


# QuantizedLatentCache


def _quantize(c, group, levels=127, rounding=torch.round):
    right.quantize_latent(c, group)
    groups = c.float().unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1) / levels
    steps = torch.where(scales > 0, scales, 1.0)[..., None]
    return rounding(groups / steps).to(torch.int8).flatten(-2), scales


@misconception(
    "quantize_latent",
    "Codes were cut off toward zero. The nearest whole number is half a step away at most, this one a whole step.",
)
def quantize_latent__truncates(c, group=128):
    return _quantize(c, group, rounding=torch.trunc)


@misconception(
    "quantize_latent",
    "Your largest code is 128, which int8 does not have: it became -128, and the largest number of a group changed its sign.",
)
def quantize_latent__128_levels(c, group=128):
    return _quantize(c, group, levels=128)


@misconception(
    "quantize_latent",
    "There is one scale for the whole row here. Each group has its own, so that one large number spoils only its neighbors.",
)
def quantize_latent__one_scale(c, group=128):
    codes, scales = _quantize(c, group)
    whole = _quantize(c, c.shape[-1])
    return whole[0], whole[1].expand_as(scales).contiguous()


@misconception(
    "quantize_latent",
    "The scale was taken from the largest number, not from the largest magnitude: negative ones run out of the codes.",
)
def quantize_latent__largest_number(c, group=128):
    right.quantize_latent(c, group)
    groups = c.float().unflatten(-1, (-1, group))
    scales = groups.amax(-1).abs() / 127
    steps = torch.where(scales > 0, scales, 1.0)[..., None]
    return (groups / steps).round().clamp(-127, 127).to(torch.int8).flatten(-2), scales


@misconception(
    "quantize_latent",
    "The scales were rounded to the dtype of the latent. They are float32: a coarse scale is wrong for its whole group.",
)
def quantize_latent__half_scales(c, group=128):
    codes, scales = right.quantize_latent(c, group)
    return codes, scales.to(c.dtype).float()


@misconception(
    "quantize_latent", "Groups were taken across the latent, every r/group-th number. A group is a run of neighbors."
)
def quantize_latent__strided_groups(c, group=128):
    right.quantize_latent(c, group)
    groups = c.float().unflatten(-1, (group, -1))
    scales = groups.abs().amax(-2) / 127
    steps = torch.where(scales > 0, scales, 1.0)[..., None, :]
    return (groups / steps).round().to(torch.int8).flatten(-2), scales


@misconception(
    "QuantizedLatentCache", "Your record leaves out the scales. They are four bytes for each group: 16 of the 656."
)
class QuantizedLatentCacheWithoutScales(right.QuantizedLatentCache):
    @property
    def bytes_per_token(self):
        return super().bytes_per_token - 4 * self.scales.shape[-1]


@misconception(
    "QuantizedLatentCache",
    "The rotary keys are kept in float32. They are rounded to bfloat16, which takes half of that.",
)
class QuantizedLatentCacheWideKeys(right.QuantizedLatentCache):
    def __init__(self, batch, max_len, r, dr, *, group=128, device=None):
        super().__init__(batch, max_len, r, dr, group=group, device=device)
        self.keys = self.keys.float()


@misconception(
    "QuantizedLatentCache",
    "All positions come back in floating point. That undoes the gain at each step; return codes and scales as they are stored.",
)
class QuantizedLatentCacheReadsAll(right.QuantizedLatentCache):
    def update(self, c, k_rope):
        codes, scales, keys = super().update(c, k_rope)
        back = codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]
        return back.flatten(-2), scales, keys


@misconception(
    "QuantizedLatentCache",
    "The length was moved before the chunk was checked: after a refusal the cache believes in positions that nobody wrote.",
)
class QuantizedLatentCacheCountsFirst(right.QuantizedLatentCache):
    def update(self, c, k_rope):
        before = self.length
        try:
            return super().update(c, k_rope)
        except ValueError:
            self.length = min(before + c.shape[1], self.max_len)
            raise


@misconception(
    "quantized_scores", "The scales are missing: these are products with the codes, which are whole numbers up to 127."
)
def quantized_scores__without_scales(q_latent, codes, scales, block=64):
    return right.quantized_scores(q_latent, codes, torch.ones_like(scales), block)


@misconception(
    "quantized_scores",
    "The numbers are right, but all latents were turned back at once: four bytes for each one that had been saved. Go block by block.",
)
def quantized_scores__all_at_once(q_latent, codes, scales, block=64):
    return right.quantized_scores(q_latent, codes, scales, max(1, codes.shape[1]))


@misconception(
    "quantized_scores",
    "The positions after the last whole block have no scores. S need not be a multiple of the block.",
)
def quantized_scores__drops_the_rest(q_latent, codes, scales, block=64):
    scores = right.quantized_scores(q_latent, codes, scales, block)
    whole = codes.shape[1] // block * block
    rest = torch.zeros_like(scores[..., whole:])
    return torch.cat((scores[..., :whole], rest), -1)


@misconception(
    "quantized_scores",
    "Latents were turned back in half precision. 127 steps do not survive there next to a scale; work in float32, then round once.",
)
def quantized_scores__in_half(q_latent, codes, scales, block=64):
    right.quantized_scores(q_latent, codes, scales, block)
    latents = codes.to(q_latent.dtype).unflatten(-1, (scales.shape[-1], -1)) * scales[..., None].to(q_latent.dtype)
    parts = [q_latent @ x.mT[:, None] for x in latents.flatten(-2).split(block, 1)]
    return torch.cat(parts, -1)


@misconception(
    "score_error_bound", "This bound is twice too large: rounding to the nearest step is off by half a scale at most."
)
def score_error_bound__whole_scale(q_latent, scales):
    return 2 * right.score_error_bound(q_latent, scales)


@misconception(
    "score_error_bound",
    "Positive and negative numbers of the query cancel in your bound. Every error can point in the direction that hurts: add up magnitudes.",
)
def score_error_bound__signed(q_latent, scales):
    right.score_error_bound(q_latent, scales)
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    weights = q_latent.to(wide).unflatten(-1, (scales.shape[2], -1)).sum(-1)
    return (torch.einsum("bhtg,bsg->bhts", weights, scales.to(wide)) / 2).abs()


@misconception(
    "score_error_bound",
    "The errors were added as if they were independent, squares under a root. That is what to expect, not the worst that may happen.",
)
def score_error_bound__root_of_squares(q_latent, scales):
    right.score_error_bound(q_latent, scales)
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    weights = q_latent.to(wide).square().unflatten(-1, (scales.shape[2], -1)).sum(-1)
    return torch.einsum("bhtg,bsg->bhts", weights, scales.to(wide).square()).sqrt() / 2


@misconception(
    "score_error_bound",
    "Your bound uses the largest scale for all groups. It holds, but it is loose: each group has its own.",
)
def score_error_bound__largest_scale(q_latent, scales):
    return right.score_error_bound(q_latent, scales.amax(-1, keepdim=True).expand_as(scales))
