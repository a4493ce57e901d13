"""Day 28: known wrong solutions, each with the sentence for whoever wrote it."""

import torch

from checker.testing import misconception
from reference import day28_mla_module as right
from reference.day08_linear_layers import linear
from reference.day16_scaled_dot_product import causal_mask, combine_masks
from reference.day19_positions import apply_rope, apply_rope_half, rope_tables

# mla_cost


def _cost(cfg, t, s, mode, dtype_bytes, *, flops=0, cache=0):
    """The right cost, with other FLOPs or bytes on top."""
    cost = right.mla_cost(cfg, t, s, mode, dtype_bytes=dtype_bytes)
    return right.Cost(cost.flops + flops, cost.cache_bytes + cache * dtype_bytes)


@misconception(
    "mla_cost", "Half of what the meter sees: a multiply-add is two operations, one multiplication and one addition."
)
def mla_cost__one_per_multiply_add(cfg, t, s, mode, *, dtype_bytes=2):
    cost = right.mla_cost(cfg, t, s, mode, dtype_bytes=dtype_bytes)
    return right.Cost(cost.flops // 2, cost.cache_bytes)


@misconception(
    "mla_cost",
    "The naive mode expands only the new tokens here. What is cached are latents: all s of them have to become keys and "
    "values at every call, and that is what makes naive decoding dear.",
)
def mla_cost__expands_new_tokens(cfg, t, s, mode, *, dtype_bytes=2):
    missing = 2 * (t - s) * cfg.kv_lora_rank * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    return _cost(cfg, t, s, mode, dtype_bytes, flops=missing if mode == "naive" else 0)


@misconception(
    "mla_cost",
    "Absorbing is taken to be free. In each call the queries go through w_uk and the mixtures through w_uv: the merged "
    "matrices exist on paper only.",
)
def mla_cost__absorbing_is_free(cfg, t, s, mode, *, dtype_bytes=2):
    missing = -2 * t * cfg.kv_lora_rank * cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    return _cost(cfg, t, s, mode, dtype_bytes, flops=missing if mode == "absorbed" else 0)


@misconception(
    "mla_cost",
    "The absorbed scores are counted over the width of a head. In the latent space a score runs over r numbers: four times "
    "as many, which is the price of reading fewer bytes.",
)
def mla_cost__latent_scores_of_head_width(cfg, t, s, mode, *, dtype_bytes=2):
    missing = 2 * cfg.n_heads * t * s * (cfg.qk_nope_head_dim - cfg.kv_lora_rank)
    return _cost(cfg, t, s, mode, dtype_bytes, flops=missing if mode == "absorbed" else 0)


@misconception("mla_cost", "The rotary part of the scores is not counted: dr more numbers for each query and key.")
def mla_cost__no_rotary_scores(cfg, t, s, mode, *, dtype_bytes=2):
    return _cost(cfg, t, s, mode, dtype_bytes, flops=-2 * cfg.n_heads * t * s * cfg.qk_rope_head_dim)


@misconception("mla_cost", "The output projection is missing: H*dv numbers of each token go back to D.")
def mla_cost__no_output(cfg, t, s, mode, *, dtype_bytes=2):
    return _cost(cfg, t, s, mode, dtype_bytes, flops=-2 * t * cfg.n_heads * cfg.v_head_dim * cfg.d_model)


@misconception(
    "mla_cost",
    "With a q_lora_rank the queries are still counted as one product from D. They take two, through rq, and these are "
    "the smaller for it.",
)
def mla_cost__queries_in_one(cfg, t, s, mode, *, dtype_bytes=2):
    width = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    rq = cfg.q_lora_rank
    more = 0 if rq is None else 2 * t * (cfg.d_model * width - cfg.d_model * rq - rq * width)
    return _cost(cfg, t, s, mode, dtype_bytes, flops=more)


@misconception(
    "mla_cost",
    "Keys and values of every head are stored here: that is the cache of plain attention again, 71 times larger for "
    "DeepSeek-V2. One latent and one rotary key per token are all.",
)
def mla_cost__caches_the_heads(cfg, t, s, mode, *, dtype_bytes=2):
    per_head = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
    return _cost(
        cfg,
        t,
        s,
        mode,
        dtype_bytes,
        cache=s * (cfg.n_heads * per_head - cfg.kv_lora_rank - cfg.qk_rope_head_dim),
    )


@misconception("mla_cost", "The rotary key lies in the cache as well, beside the latent.")
def mla_cost__caches_latents_alone(cfg, t, s, mode, *, dtype_bytes=2):
    return _cost(cfg, t, s, mode, dtype_bytes, cache=-s * cfg.qk_rope_head_dim)


@misconception(
    "mla_cost", "The cache is counted twice, for keys and for values. Both are read from the same latent: no factor 2."
)
def mla_cost__keys_and_values(cfg, t, s, mode, *, dtype_bytes=2):
    return _cost(cfg, t, s, mode, dtype_bytes, cache=s * (cfg.kv_lora_rank + cfg.qk_rope_head_dim))


# choose_mode


@misconception("choose_mode", "This is the dearer of the two modes.")
def choose_mode__dearer(t, s, cfg):
    naive, absorbed = (right.mla_cost(cfg, t, s, mode).flops for mode in ("naive", "absorbed"))
    return "naive" if naive > absorbed else "absorbed"


@misconception(
    "choose_mode",
    "One token goes to the latents and more go the other way. The border lies where the costs cross, which is beyond 160 "
    "tokens for DeepSeek's shapes.",
)
def choose_mode__by_one_token(t, s, cfg):
    right.choose_mode(t, s, cfg)
    return "absorbed" if t == 1 else "naive"


@misconception(
    "choose_mode",
    "The border stands at 171 tokens for every cache. That is its limit for long caches: with few keys there is less to "
    "expand, and the naive mode wins earlier.",
)
def choose_mode__limit_of_long_caches(t, s, cfg):
    right.choose_mode(t, s, cfg)
    n, r = cfg.qk_nope_head_dim + cfg.v_head_dim, cfg.kv_lora_rank
    return "absorbed" if t * (2 * r - n) <= r * n else "naive"


@misconception("choose_mode", "Where both modes cost the same, the naive one came out. Equal FLOPs go to fewer bytes.")
def choose_mode__tie_to_naive(t, s, cfg):
    costs = {mode: right.mla_cost(cfg, t, s, mode).flops for mode in ("naive", "absorbed")}
    return min(costs, key=costs.get)


@misconception(
    "choose_mode",
    "The numbers of V3 are built in. A layer with other widths has its border elsewhere: count with the cfg that is given.",
)
def choose_mode__v3_only(t, s, cfg):
    return right.choose_mode(t, s, right.MLAConfig(7168, 128, 128, 64, 128, 512, 1536))


# naive_attention and absorbed_attention


def _weights(scores, mask):
    return right.masked_softmax(scores, mask)


def _scores(q_nope, q_rope, k_nope, k_rope, scale):
    """Scores of full keys; scale None is the right default."""
    scale = (q_nope.shape[3] + q_rope.shape[3]) ** -0.5 if scale is None else scale
    return (q_nope @ k_nope.mT + torch.einsum("bhtd,bsd->bhts", q_rope, k_rope)) * scale


def _expanded(q_nope, q_rope, c, k_rope, w):
    """Keys and values of all heads, after the checks of the reference."""
    right._check_shapes(q_nope, q_rope, c, k_rope, w)
    dn = q_nope.shape[3]
    heads = right.split_heads(linear(c, w), q_nope.shape[1])
    return heads[..., :dn], heads[..., dn:]


@misconception(
    "naive_attention",
    "The scale comes from dn alone. A score is a sum over dn + dr products, the rotary ones included.",
)
def naive_attention__scale_of_content(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    k, v = _expanded(q_nope, q_rope, c, k_rope, kv_b_weight)
    scale = q_nope.shape[3] ** -0.5 if scale is None else scale
    return _weights(_scores(q_nope, q_rope, k, k_rope, scale), mask) @ v


@misconception(
    "naive_attention",
    "The rotary part is not in the scores: nobody knows any more where a token stands.",
)
def naive_attention__no_positions(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    return right.naive_attention(q_nope, q_rope * 0, c, k_rope, kv_b_weight, mask=mask, scale=scale)


@misconception(
    "naive_attention",
    "The rows of kv_b_weight are read as all keys and then all values. They are stored head by head: dn rows for keys, dv "
    "for values, then the next head.",
)
def naive_attention__keys_then_values(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    _expanded(q_nope, q_rope, c, k_rope, kv_b_weight)
    H, dn = q_nope.shape[1::2]
    k = right.split_heads(linear(c, kv_b_weight[: H * dn]), H)
    v = right.split_heads(linear(c, kv_b_weight[H * dn :]), H)
    return _weights(_scores(q_nope, q_rope, k, k_rope, scale), mask) @ v


@misconception(
    "naive_attention",
    "The expanded rows were viewed as heads before tokens, without moving the axis: heads and tokens are scrambled.",
)
def naive_attention__scrambled_heads(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    _expanded(q_nope, q_rope, c, k_rope, kv_b_weight)
    B, H, _, dn = q_nope.shape
    heads = linear(c, kv_b_weight).reshape(B, H, c.shape[1], -1)
    return _weights(_scores(q_nope, q_rope, heads[..., :dn], k_rope, scale), mask) @ heads[..., dn:]


@misconception("naive_attention", "The mask is the wrong way round: True means that a key may be read.")
def naive_attention__mask_inverted(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    mask = None if mask is None else ~mask
    return right.naive_attention(q_nope, q_rope, c, k_rope, kv_b_weight, mask=mask, scale=scale)


@misconception(
    "naive_attention",
    "Keys that come later are hidden here as well. Who may see whom is said by the mask alone; the layer will pass in the rule.",
)
def naive_attention__always_causal(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    mask = combine_masks(causal_mask(q_nope.shape[2], c.shape[1], device=c.device), mask)
    return right.naive_attention(q_nope, q_rope, c, k_rope, kv_b_weight, mask=mask, scale=scale)


@misconception(
    "naive_attention",
    "The weights were cut after the softmax, so those that are left no longer add up to one.",
)
def naive_attention__mask_after_softmax(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    k, v = _expanded(q_nope, q_rope, c, k_rope, kv_b_weight)
    scores = _scores(q_nope, q_rope, k, k_rope, scale)
    weights = torch.softmax(scores, -1)
    if mask is not None:
        _weights(scores, mask)
        weights = weights * mask
    return weights @ v


@misconception(
    "naive_attention",
    "A query that may see nothing came out as NaN: a softmax over nothing but -inf is 0/0. It should give zeros, and its "
    "gradients, too.",
)
def naive_attention__nan_rows(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    k, v = _expanded(q_nope, q_rope, c, k_rope, kv_b_weight)
    scores = _scores(q_nope, q_rope, k, k_rope, scale)
    if mask is not None:
        _weights(scores, mask)
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1) @ v


@misconception(
    "naive_attention",
    "A query that may see nothing gets the mean of all values: a very negative number is subtracted everywhere, and the "
    "softmax does not see what is the same everywhere.",
)
def naive_attention__mean_for_nothing(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    k, v = _expanded(q_nope, q_rope, c, k_rope, kv_b_weight)
    scores = _scores(q_nope, q_rope, k, k_rope, scale)
    if mask is not None:
        _weights(scores, mask)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1) @ v


def _absorbed(q_nope, q_rope, c, k_rope, w, mask, scale, views=None):
    """The absorbed form with any pair of matrices; scale None is the right default."""
    right._check_shapes(q_nope, q_rope, c, k_rope, w)
    w_uk, w_uv = _views(q_nope, w) if views is None else views
    scale = (q_nope.shape[3] + q_rope.shape[3]) ** -0.5 if scale is None else scale
    scores = torch.einsum("bhtr,bsr->bhts", torch.einsum("bhtn,hnr->bhtr", q_nope, w_uk), c)
    scores = (scores + torch.einsum("bhtd,bsd->bhts", q_rope, k_rope)) * scale
    return torch.einsum("bhtr,hvr->bhtv", torch.einsum("bhts,bsr->bhtr", _weights(scores, mask), c), w_uv)


def _views(q_nope, w):
    H, dn = q_nope.shape[1::2]
    return right.split_kv_b(w, H, dn, len(w) // H - dn)


@misconception(
    "absorbed_attention",
    "The results are right and the costs are not: keys and values of every cached token were written. In this mode the "
    "queries go to the latents, not the latents to the queries.",
)
def absorbed_attention__expands(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    return right.naive_attention(q_nope, q_rope, c, k_rope, kv_b_weight, mask=mask, scale=scale)


@misconception(
    "absorbed_attention",
    "The scale is that of the latent width. The order of multiplication changes no score, so the scale stays what it was: "
    "queries and keys are dn + dr wide.",
)
def absorbed_attention__scale_of_latents(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    scale = c.shape[2] ** -0.5 if scale is None else scale
    return _absorbed(q_nope, q_rope, c, k_rope, kv_b_weight, mask, scale)


@misconception(
    "absorbed_attention",
    "The scale comes from r + dr, the numbers that are multiplied here. It belongs to the queries and keys of the model, "
    "which are dn + dr wide in either order.",
)
def absorbed_attention__scale_of_cached_width(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    scale = (c.shape[2] + q_rope.shape[3]) ** -0.5 if scale is None else scale
    return _absorbed(q_nope, q_rope, c, k_rope, kv_b_weight, mask, scale)


@misconception(
    "absorbed_attention",
    "The rotary part is missing in this mode alone: prefill knows positions, decoding is blind to them.",
)
def absorbed_attention__no_positions(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    return _absorbed(q_nope, q_rope * 0, c, k_rope, kv_b_weight, mask, scale)


@misconception(
    "absorbed_attention",
    "The rows of kv_b_weight are cut into all keys and then all values. They are stored head by head, dn and dv in turns.",
)
def absorbed_attention__keys_then_values(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    right._check_shapes(q_nope, q_rope, c, k_rope, kv_b_weight)
    H, dn = q_nope.shape[1::2]
    keys, values = kv_b_weight[: H * dn], kv_b_weight[H * dn :]
    views = keys.unflatten(0, (H, dn)), values.unflatten(0, (H, len(values) // H))
    return _absorbed(q_nope, q_rope, c, k_rope, kv_b_weight, mask, scale, views)


@misconception(
    "absorbed_attention",
    "w_uv was read from the first rows of each head, where the keys are: it begins after dn rows.",
)
def absorbed_attention__values_from_key_rows(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    right._check_shapes(q_nope, q_rope, c, k_rope, kv_b_weight)
    w_uk, w_uv = _views(q_nope, kv_b_weight)
    rows = kv_b_weight.unflatten(0, (q_nope.shape[1], -1))
    return _absorbed(q_nope, q_rope, c, k_rope, kv_b_weight, mask, scale, (w_uk, rows[:, : w_uv.shape[1]]))


@misconception(
    "absorbed_attention",
    "The numbers are right, but w_uk and w_uv were copied out of kv_b_weight: at V3's size that writes 33 MB in each layer "
    "for each token. Slices of a weight are matrices already.",
)
def absorbed_attention__copies_weights(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    right._check_shapes(q_nope, q_rope, c, k_rope, kv_b_weight)
    views = tuple(x.contiguous() for x in _views(q_nope, kv_b_weight))
    return _absorbed(q_nope, q_rope, c, k_rope, kv_b_weight, mask, scale, views)


@misconception(
    "absorbed_attention",
    "The numbers are right, but the latents were copied once for each head: that is what a matmul does to an expanded axis.",
)
def absorbed_attention__latents_per_head(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    right._check_shapes(q_nope, q_rope, c, k_rope, kv_b_weight)
    w_uk, w_uv = _views(q_nope, kv_b_weight)
    scale = (q_nope.shape[3] + q_rope.shape[3]) ** -0.5 if scale is None else scale
    scores = ((q_nope @ w_uk) @ c[:, None].mT + q_rope @ k_rope[:, None].mT) * scale
    return (_weights(scores, mask) @ c[:, None]) @ w_uv.mT


@misconception(
    "absorbed_attention",
    "Half latents were copied to float32: twice the bytes of the cache are written for each token. The softmax is what has "
    "to be float32, and it sees scores alone.",
)
def absorbed_attention__wide_latents(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    given = (torch.promote_types(q_nope.dtype, torch.float32), q_nope, q_rope, c, k_rope, kv_b_weight)
    given = (x.to(given[0]) for x in given[1:])
    return _absorbed(*given, mask, scale).to(q_nope.dtype)


@misconception(
    "absorbed_attention",
    "A triangle was cut out of the scores, aligned at the top left: with 2 queries and 8 keys nobody sees the last 6. This "
    "function hides what the mask hides, and nothing else.",
)
def absorbed_attention__always_causal(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    triangle = causal_mask(q_nope.shape[2], c.shape[1], offset=0, device=c.device)
    return _absorbed(q_nope, q_rope, c, k_rope, kv_b_weight, combine_masks(triangle, mask), scale)


@misconception("absorbed_attention", "The mask has no effect in this mode.")
def absorbed_attention__no_mask(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    if mask is not None:
        right.absorbed_attention(q_nope, q_rope, c, k_rope, kv_b_weight, mask=mask, scale=scale)
    return _absorbed(q_nope, q_rope, c, k_rope, kv_b_weight, None, scale)


# MLA


class _Core(right.MLA):
    """An MLA whose attention is `attend(mode, q_nope, q_rope, c, k_rope, weight, mask)`, and whose cache use is `remember`."""

    def attend(self, mode, q_nope, q_rope, c, k_rope, weight, mask):
        return right.PATHS[mode](q_nope, q_rope, c, k_rope, weight, mask=mask, scale=self.softmax_scale)

    def remember(self, cache, c, k_rope):
        return (c, k_rope) if cache is None else cache.update(c, k_rope)

    def forward(self, x, *, cache=None, mask=None, positions=None, mode="auto"):
        B, T, _ = x.shape
        start = 0 if cache is None else cache.length
        mode = self.chosen(mode, T, start + T)
        mask = self._visible(mask, (B, self.n_heads, T, start + T), x.device)
        tables = self._tables(x, positions, start)
        q_nope, q_rope = self._queries(x, *tables)
        c, k_rope = self.remember(cache, *self._latents(x, *tables))
        out = self.attend(mode, q_nope, q_rope, c, k_rope, self.kv_b_proj.weight, mask)
        return self.o_proj(self.merged(out))

    def chosen(self, mode, T, S):
        if mode not in (*right.PATHS, "auto"):
            raise ValueError(f"mode {mode!r}")
        return right.choose_mode(T, S, self) if mode == "auto" else mode

    def merged(self, out):
        return right.merge_heads(out)


@misconception(
    "MLA",
    "The numbers are right, the names are not: checkpoints know q_a_proj, kv_a_proj_with_mqa and kv_b_proj in this module "
    "itself, not inside of parts with prefixes.",
)
class MLA__other_names(_Core):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = torch.nn.Module()
        self.down.kv_a_proj_with_mqa, self.down.kv_a_layernorm = self.kv_a_proj_with_mqa, self.kv_a_layernorm
        del self.kv_a_proj_with_mqa, self.kv_a_layernorm

    def _latents(self, x, cos, sin):
        down, r = self.down.kv_a_proj_with_mqa(x), self.kv_lora_rank
        return self.down.kv_a_layernorm(down[..., :r]), apply_rope(down[..., r:], cos, sin)


@misconception(
    "MLA",
    "The frequencies are in the state dict. No published checkpoint has them: a buffer that can be computed is not "
    "persistent.",
)
class MLA__frequencies_in_the_state(_Core):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        inv_freq = self.inv_freq
        del self.inv_freq
        self.register_buffer("inv_freq", inv_freq)


@misconception(
    "MLA",
    "The latent is not normalized. The norm stands between the two projections, and without it they are one product.",
)
class MLA__no_norm(_Core):
    def _latents(self, x, cos, sin):
        down, r = self.kv_a_proj_with_mqa(x), self.kv_lora_rank
        return down[..., :r], apply_rope(down[..., r:], cos, sin)


@misconception(
    "MLA",
    "The root mean square was taken over latent and rotary key together. The key keeps its own size; the norm is for the "
    "first r numbers alone.",
)
class MLA__norm_over_all(_Core):
    def _latents(self, x, cos, sin):
        down, r = self.kv_a_proj_with_mqa(x), self.kv_lora_rank
        down = down * torch.rsqrt(down.square().mean(-1, keepdim=True) + self.kv_a_layernorm.eps)
        return down[..., :r] * self.kv_a_layernorm.weight, apply_rope(down[..., r:], cos, sin)


@misconception(
    "MLA",
    "The first column was paired with the one in the middle. DeepSeek's weights have neighbors as pairs, and no training will "
    "move them for you.",
)
class MLA__half_split(_Core):
    def _queries(self, x, cos, sin):
        nope, rope = super()._queries(x, torch.ones_like(cos), torch.zeros_like(sin))
        return nope, apply_rope_half(rope, cos, sin)

    def _latents(self, x, cos, sin):
        c, key = super()._latents(x, torch.ones_like(cos), torch.zeros_like(sin))
        return c, apply_rope_half(key, cos, sin)


@misconception(
    "MLA",
    "softmax_scale has no effect: the scores are scaled by the widths alone. For DeepSeek with YaRN that is 0.072 in place "
    "of 0.115, and transformers had this very mistake until July 2026.",
)
class MLA__scale_ignored(_Core):
    def __init__(self, *args, softmax_scale=None, **kwargs):
        super().__init__(*args, **kwargs)


@misconception(
    "MLA",
    "The absorbed mode scales by the latent width, the naive one by that of the heads. One and the same scale belongs to both.",
)
class MLA__scale_of_latents(_Core):
    def attend(self, mode, q_nope, q_rope, c, k_rope, weight, mask):
        scale = self.kv_lora_rank**-0.5 if mode == "absorbed" else self.softmax_scale
        return right.PATHS[mode](q_nope, q_rope, c, k_rope, weight, mask=mask, scale=scale)


@misconception(
    "MLA",
    "The eps is 1e-5 unless something else is passed. Checkpoints were trained with 1e-6 in these norms.",
)
class MLA__eps_too_large(_Core):
    def __init__(self, *args, eps=1e-5, **kwargs):
        super().__init__(*args, eps=eps, **kwargs)


@misconception(
    "MLA",
    "The frequencies were rounded with the weights when the layer became bfloat16. Three digits of a frequency, times a "
    "position of some hundreds, are an angle that means nothing.",
)
class MLA__frequencies_cast(_Core):
    def _apply(self, fn, recurse=True):
        return torch.nn.Module._apply(self, fn, recurse)


@misconception(
    "MLA",
    "Positions begin at 0 in every chunk. Keys in the cache were rotated at their absolute positions; the new tokens come "
    "after them.",
)
class MLA__positions_restart(_Core):
    def _tables(self, x, positions, start):
        return super()._tables(x, positions, 0)


@misconception(
    "MLA",
    "The triangle is aligned at the top left, as is_causal does it: with a warm cache the newest token sees only the oldest. "
    "Query i stands at cache.length + i.",
)
class MLA__triangle_at_the_top_left(_Core):
    def _visible(self, mask, shape, device):
        super()._visible(mask, shape, device)
        *_, T, S = shape
        return combine_masks(causal_mask(T, S, offset=0, device=device), mask)


@misconception(
    "MLA",
    "Behind a warm cache there is no triangle: within the chunk tokens see their own future. Only a single token needs none.",
)
class MLA__no_triangle_after_a_cache(_Core):
    def _visible(self, mask, shape, device):
        both = super()._visible(mask, shape, device)
        return mask if shape[2] < shape[3] else both


@misconception(
    "MLA",
    "A mask takes the place of the causal rule, so one that hides padding opens the future. It hides keys in addition.",
)
class MLA__mask_replaces_the_triangle(_Core):
    def _visible(self, mask, shape, device):
        both = super()._visible(mask, shape, device)
        return both if mask is None else mask


@misconception(
    "MLA",
    "The cache holds keys that are not rotated, and they stay so when they are read: only the newest ones know where they stand.",
)
class MLA__caches_unrotated_keys(_Core):
    def _latents(self, x, cos, sin):
        c, rotated = super()._latents(x, cos, sin)
        self.plain = self.kv_a_proj_with_mqa(x)[..., self.kv_lora_rank :]
        return c, rotated

    def remember(self, cache, c, k_rope):
        return (c, k_rope) if cache is None else cache.update(c, self.plain)


@misconception(
    "MLA",
    "Cached keys are rotated once more at every read. They were rotated at their own positions when they were stored.",
)
class MLA__rotates_on_every_read(_Core):
    def remember(self, cache, c, k_rope):
        if cache is None:
            return c, k_rope
        old = cache.length
        c, keys = cache.update(c, k_rope)
        positions = torch.arange(old, device=c.device).to(torch.float64 if c.dtype == torch.float64 else torch.float32)
        again = apply_rope(
            keys[:, :old], *rope_tables(positions, self.qk_rope_head_dim, self.base, inv_freq=self.inv_freq)
        )
        return c, torch.cat([again, keys[:, old:]], 1)


@misconception(
    "MLA",
    "What is cached is the latent before its norm, and it is read back as it is: old tokens have other keys and values than "
    "new ones. Store what you use.",
)
class MLA__caches_before_the_norm(_Core):
    def _latents(self, x, cos, sin):
        c, k_rope = super()._latents(x, cos, sin)
        self.raw = self.kv_a_proj_with_mqa(x)[..., : self.kv_lora_rank]
        return c, k_rope

    def remember(self, cache, c, k_rope):
        return (c, k_rope) if cache is None else cache.update(self.raw, k_rope)


@misconception(
    "MLA",
    "The latent is stored raw and normalized again at every read, over the whole cache. The outputs are right; the work "
    "grows with each token, and what lies in the cache is not what other code expects there.",
)
class MLA__normalizes_on_every_read(_Core):
    def _latents(self, x, cos, sin):
        down, r = self.kv_a_proj_with_mqa(x), self.kv_lora_rank
        return down[..., :r], apply_rope(down[..., r:], cos, sin)

    def remember(self, cache, c, k_rope):
        c, k_rope = super().remember(cache, c, k_rope)
        return self.kv_a_layernorm(c), k_rope


@misconception(
    "MLA",
    "The layer keeps a past of its own beside the cache, and no truncate reaches it: tokens that were taken back are still "
    "read. If that past holds keys and values of every head, it is also 71 times as large as the latents of DeepSeek-V2.",
)
class MLA__own_keys_and_values(_Core):
    def remember(self, cache, c, k_rope):
        if cache is None:
            return c, k_rope
        if cache.length == 0:
            self.past = c[:, :0], k_rope[:, :0]
        cache.update(c, k_rope)
        self.past = torch.cat([self.past[0], c], 1), torch.cat([self.past[1], k_rope], 1)
        wanted = cache.length
        return self.past[0][:, -wanted:], self.past[1][:, -wanted:]


@misconception(
    "MLA",
    "The heads were joined without moving their axis back behind the tokens: o_proj reads scrambled numbers.",
)
class MLA__scrambled_output(_Core):
    def merged(self, out):
        B, H, T, dv = out.shape
        return out.reshape(B, T, H * dv)


@misconception(
    "MLA",
    "Auto goes by the number of tokens alone: one to the latents, more to the naive mode. A chunk of 20 after 180 is still "
    "cheaper on the latents.",
)
class MLA__auto_by_one_token(_Core):
    def chosen(self, mode, T, S):
        if mode == "auto":
            mode = "absorbed" if T == 1 and S > 1 else "naive"
        return super().chosen(mode, T, S)


@misconception(
    "MLA",
    "The absorbed step makes slices of kv_b_proj contiguous first: a copy of the weight for each token.",
)
class MLA__copies_weights(_Core):
    def attend(self, mode, q_nope, q_rope, c, k_rope, weight, mask):
        return super().attend(mode, q_nope, q_rope, c, k_rope, weight.clone() if mode == "absorbed" else weight, mask)


@misconception(
    "MLA",
    "The length of the longest row is read from the mask, on the host: on a GPU every token then waits for all work that was "
    "sent before.",
)
class MLA__asks_the_mask(_Core):
    def _visible(self, mask, shape, device):
        both = super()._visible(mask, shape, device)
        if mask is not None and bool(mask.all()):
            return super()._visible(None, shape, device)
        return both


# deinterleave_rope


def _moved(state, n_heads, dn, dr, r, queries, keys):
    """The reference's result, with what `queries` and `keys` make of the weights in place of its own."""
    result = right.deinterleave_rope(state, n_heads, dn, dr, r)
    for key in result:
        name = ".".join(key.split(".")[-2:])
        if name in ("q_proj.weight", "q_b_proj.weight"):
            result[key] = queries(state[key], result[key])
        elif name == "kv_a_proj_with_mqa.weight":
            result[key] = keys(state[key], result[key])
    return result


def _kept(old, new):
    return old


def _right(old, new):
    return new


def _sorted(rows):
    return torch.cat([rows[0::2], rows[1::2]])


@misconception(
    "deinterleave_rope",
    "The keys were left as they are. Queries and keys go through the same rotation: the rotary rows of kv_a_proj_with_mqa have to "
    "move with those of the queries.",
)
def deinterleave_rope__queries_alone(state, n_heads, dn, dr, r):
    return _moved(state, n_heads, dn, dr, r, _right, _kept)


@misconception(
    "deinterleave_rope",
    "Only q_proj is looked for. A layer with a q_lora_rank has its rotary rows in q_b_proj.",
)
def deinterleave_rope__q_proj_alone(state, n_heads, dn, dr, r):
    result = right.deinterleave_rope(state, n_heads, dn, dr, r)
    return {key: state[key] if key.endswith("q_b_proj.weight") else value for key, value in result.items()}


@misconception(
    "deinterleave_rope",
    "All rows of a head were sorted, those without a position, too. Only the last dr of them are rotated.",
)
def deinterleave_rope__whole_heads(state, n_heads, dn, dr, r):
    def queries(old, new):
        return torch.cat([_sorted(head) for head in old.chunk(n_heads)])

    return _moved(state, n_heads, dn, dr, r, queries, _right)


@misconception(
    "deinterleave_rope",
    "The first dr rows of each head were sorted. The rotary rows come after the dn others.",
)
def deinterleave_rope__first_rows(state, n_heads, dn, dr, r):
    def queries(old, new):
        return torch.cat([torch.cat([_sorted(head[:dr]), head[dr:]]) for head in old.chunk(n_heads)])

    return _moved(state, n_heads, dn, dr, r, queries, _right)


@misconception(
    "deinterleave_rope",
    "The rotary rows of the key were looked for at the beginning of kv_a_proj_with_mqa. The latent's r rows come first.",
)
def deinterleave_rope__key_first(state, n_heads, dn, dr, r):
    return _moved(state, n_heads, dn, dr, r, _right, lambda old, new: torch.cat([_sorted(old[:dr]), old[dr:]]))


@misconception(
    "deinterleave_rope",
    "The rows went the other way: from halves to neighbors. Row 2i goes to place i, and row 2i + 1 to place i + dr/2.",
)
def deinterleave_rope__other_way(state, n_heads, dn, dr, r):
    def back(rows):
        return torch.stack(rows.chunk(2), 1).flatten(0, 1)

    def queries(old, new):
        return torch.cat([torch.cat([head[:dn], back(head[dn:])]) for head in old.chunk(n_heads)])

    return _moved(state, n_heads, dn, dr, r, queries, lambda old, new: torch.cat([old[:r], back(old[r:])]))


@misconception(
    "deinterleave_rope",
    "All tensors were copied, the large ones without a rotary row as well. Those can be handed on as they are.",
)
def deinterleave_rope__copies_all(state, n_heads, dn, dr, r):
    return {key: value.clone() for key, value in right.deinterleave_rope(state, n_heads, dn, dr, r).items()}


@misconception(
    "deinterleave_rope",
    "The given dict itself was changed. Run it twice, as a loader may, and the rows are sorted twice.",
)
def deinterleave_rope__in_the_given_dict(state, n_heads, dn, dr, r):
    state.update(right.deinterleave_rope(state, n_heads, dn, dr, r))
    return state


@misconception(
    "deinterleave_rope",
    "The result has only what was changed. A loader expects all tensors of the state.",
)
def deinterleave_rope__changed_alone(state, n_heads, dn, dr, r):
    result = right.deinterleave_rope(state, n_heads, dn, dr, r)
    return {key: value for key, value in result.items() if value is not state[key]}


# latent_flash_decode


def _flash(
    q_latent,
    q_rope,
    cache,
    splits,
    scale,
    lengths,
    *,
    decay=True,
    divide=True,
    peak=True,
    drop=False,
    causal=True,
    wide=True,
):
    """Split decoding with one of its parts left out."""
    B, H, T, r = q_latent.shape
    if splits < 1:
        raise ValueError(f"splits {splits}")
    c, k_rope = cache.update(q_latent.new_empty(B, 0, r), q_rope.new_empty(B, 0, q_rope.shape[-1]))
    S = c.shape[1]
    if lengths is None:
        lengths = torch.full((B,), S, device=c.device)
    newest = lengths[:, None] - T + torch.arange(T, device=c.device)
    if not causal:
        newest = (lengths[:, None] - 1).expand(B, T)
    kind = torch.promote_types(q_latent.dtype, torch.float32) if wide else q_latent.dtype
    top = q_latent.new_full((B, H, T, 1), -torch.inf if peak else 0.0, dtype=kind)
    total = q_latent.new_zeros(B, H, T, 1, dtype=kind)
    mixture = q_latent.new_zeros(B, H, T, r, dtype=kind)
    size = max(1, S // splits if drop else -(-S // splits))
    for start in range(0, size * splits if drop else S, size):
        latents, keys = c[:, start : start + size], k_rope[:, start : start + size]
        if not latents.shape[1]:
            break
        scores = torch.einsum("bhtr,bnr->bhtn", q_latent, latents) + torch.einsum("bhtd,bnd->bhtn", q_rope, keys)
        allowed = torch.arange(start, start + latents.shape[1], device=c.device) <= newest[..., None]
        scores = (scores.to(kind) * scale).masked_fill(~allowed[:, None], -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True)) if peak else top
        shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
        weights, factor = (scores - shift).exp(), (top - shift).exp() if decay else 1.0
        total = total * factor + weights.sum(-1, keepdim=True)
        mixture = mixture * factor + torch.einsum("bhtn,bnr->bhtr", weights.to(c.dtype), latents)
        top = new_top
    if divide:
        mixture = mixture / total.masked_fill(total == 0, 1.0)
    return mixture.to(q_latent.dtype)


@misconception(
    "latent_flash_decode",
    "A new maximum moves the new weights, and the sums from before stay as they were. They belong to another maximum: both have to "
    "be brought to the same one before they are added.",
)
def latent_flash_decode__sums_not_moved(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    return _flash(q_latent, q_rope, cache, splits, scale, lengths, decay=False)


@misconception(
    "latent_flash_decode",
    "No maximum is subtracted: scores of a hundred are infinite in float32 when they are exponentials.",
)
def latent_flash_decode__no_maximum(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    return _flash(q_latent, q_rope, cache, splits, scale, lengths, peak=False)


@misconception(
    "latent_flash_decode",
    "The pieces have floor(S / splits) keys, and the last keys of the cache are in none of them: the newest tokens, of all.",
)
def latent_flash_decode__rest_dropped(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    return _flash(q_latent, q_rope, cache, splits, scale, lengths, drop=True)


@misconception(
    "latent_flash_decode",
    "All T queries see all keys. The last T keys are those of the queries themselves: query i must not see the ones after its own.",
)
def latent_flash_decode__sees_the_future(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    return _flash(q_latent, q_rope, cache, splits, scale, lengths, causal=False)


@misconception(
    "latent_flash_decode",
    "lengths has no effect: shorter rows read what lies behind their last key.",
)
def latent_flash_decode__lengths_ignored(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    return _flash(q_latent, q_rope, cache, splits, scale, None)


@misconception(
    "latent_flash_decode",
    "Each piece was normalized for itself, and then the mean was taken. Pieces count by the sum of their weights.",
)
def latent_flash_decode__mean_of_pieces(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    if splits < 1:
        raise ValueError(f"splits {splits}")
    B, H, T, r = q_latent.shape
    c, k = cache.update(q_latent.new_empty(B, 0, r), q_rope.new_empty(B, 0, q_rope.shape[-1]))
    S = c.shape[1]
    n = torch.full((B,), S, device=c.device) if lengths is None else lengths
    newest = n[:, None] - T + torch.arange(T, device=c.device)
    size = max(1, -(-S // splits))
    kind = torch.promote_types(q_latent.dtype, torch.float32)
    out, count = q_latent.new_zeros(B, H, T, r, dtype=kind), 0
    for start in range(0, S, size):
        latents, keys = c[:, start : start + size], k[:, start : start + size]
        scores = torch.einsum("bhtr,bnr->bhtn", q_latent, latents) + torch.einsum("bhtd,bnd->bhtn", q_rope, keys)
        allowed = torch.arange(start, start + latents.shape[1], device=c.device) <= newest[..., None]
        weights = right.masked_softmax(scores.to(kind) * scale, allowed[:, None])
        out, count = out + torch.einsum("bhtn,bnr->bhtr", weights.to(c.dtype), latents), count + 1
    return (out / max(1, count)).to(q_latent.dtype)


@misconception(
    "latent_flash_decode",
    "The result is right, and all scores were made at once: memory grows with the cache, whatever the number of pieces.",
)
def latent_flash_decode__in_one_piece(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    if splits < 1:
        raise ValueError(f"splits {splits}")
    return _flash(q_latent, q_rope, cache, 1, scale, lengths)


@misconception(
    "latent_flash_decode",
    "A query without a key came out as NaN: its sum is zero, or its maximum minus infinity. It should give zeros.",
)
def latent_flash_decode__nan_for_nothing(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    out = _flash(q_latent, q_rope, cache, splits, scale, lengths)
    return torch.where((out == 0).all(-1, keepdim=True), torch.nan, out)
