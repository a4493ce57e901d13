"""Day 26: known wrong solutions, each with the sentence for whoever wrote it."""

import torch

from checker.testing import misconception
from reference.day26_mla_theory import (
    BASE,
    cache_elements,
    calibrated_low_rank,
    effective_matrices,
    joint_low_rank,
    latent_gauge,
    merge_output,
    merge_query,
    normalise_gauge,
)


@misconception(
    "cache_elements", "Plain attention came out at half: each head leaves a key and a value, not one vector."
)
def cache_elements__keys_only(kind, n_heads, head_dim, n_kv_heads=None, r=None, dr=None):
    right = cache_elements(kind, n_heads, head_dim, n_kv_heads, r, dr)
    return right // 2 if kind != "mla" else right


@misconception(
    "cache_elements", "Grouped attention was counted with all query heads. Only the key/value heads leave something."
)
def cache_elements__all_heads(kind, n_heads, head_dim, n_kv_heads=None, r=None, dr=None):
    right = cache_elements(kind, n_heads, head_dim, n_kv_heads, r, dr)
    return 2 * n_heads * head_dim if kind == "gqa" else right


@misconception(
    "cache_elements",
    "The latent was counted twice, once for keys and once for values. Both are read from the same one: it is stored once.",
)
def cache_elements__latent_twice(kind, n_heads, head_dim, n_kv_heads=None, r=None, dr=None):
    right = cache_elements(kind, n_heads, head_dim, n_kv_heads, r, dr)
    return 2 * r + dr if kind == "mla" else right


@misconception(
    "cache_elements", "The rotated key is missing: it lies beside the latent and takes dr numbers of its own."
)
def cache_elements__no_rotated_key(kind, n_heads, head_dim, n_kv_heads=None, r=None, dr=None):
    right = cache_elements(kind, n_heads, head_dim, n_kv_heads, r, dr)
    return r if kind == "mla" else right


@misconception("cache_elements", "You count a rotated key for every head. There is one, and all heads look at it.")
def cache_elements__rotated_key_per_head(kind, n_heads, head_dim, n_kv_heads=None, r=None, dr=None):
    right = cache_elements(kind, n_heads, head_dim, n_kv_heads, r, dr)
    return r + n_heads * dr if kind == "mla" else right


@misconception(
    "cache_elements", "A rotary width of 0 was taken for a missing one. 0 is a number; only None is missing."
)
def cache_elements__zero_is_missing(kind, n_heads, head_dim, n_kv_heads=None, r=None, dr=None):
    if kind == "mla" and not dr:
        raise ValueError("dr is missing")
    return cache_elements(kind, n_heads, head_dim, n_kv_heads, r, dr)


@misconception("equivalent_gqa_groups", "Twice too many: a group keeps a key and a value, so it takes two head widths.")
def equivalent_gqa_groups__one_vector(r, dr, head_dim):
    return (r + dr) / head_dim


@misconception(
    "equivalent_gqa_groups", "Your groups are those of the latent alone. The rotated key fills the cache, too."
)
def equivalent_gqa_groups__latent_alone(r, dr, head_dim):
    return r / (2 * head_dim)


@misconception(
    "equivalent_gqa_groups", "This is rounded down to whole groups. 2.25 is the honest answer: nobody has to build it."
)
def equivalent_gqa_groups__whole(r, dr, head_dim):
    return float((r + dr) // (2 * head_dim))


@misconception(
    "compression_vs_mha",
    "You compare with keys alone. That is where 28 for a model with 128 heads comes from; its values are cached as well.",
)
def compression_vs_mha__keys_only(n_heads, head_dim, r, dr):
    return n_heads * head_dim / (r + dr)


@misconception("compression_vs_mha", "The rotated key is left out, which flatters the ratio: 64 where 56.9 is true.")
def compression_vs_mha__latent_alone(n_heads, head_dim, r, dr):
    return 2 * n_heads * head_dim / r


@misconception("compression_vs_mha", "The ratio is upside down: it says how many times larger the plain cache is.")
def compression_vs_mha__upside_down(n_heads, head_dim, r, dr):
    return (r + dr) / (2 * n_heads * head_dim)


def _svd(w_k, w_v, r):
    joint_low_rank(w_k, w_v, r)
    return torch.linalg.svd(torch.cat([w_k, w_v]), full_matrices=False)


@misconception(
    "joint_low_rank",
    "These are two latents of half the width, one for keys and one for values. The cache is the same and the error larger: "
    "what both read is stored twice.",
)
def joint_low_rank__two_latents(w_k, w_v, r):
    joint_low_rank(w_k, w_v, r)
    downs, ups = [], []
    for w, part in ((w_k, r // 2), (w_v, r - r // 2)):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        downs.append(torch.cat([vh[:part], vh.new_zeros(max(0, part - len(vh)), vh.shape[1])]))
        ups.append(torch.cat([u[:, :part] * s[:part], u.new_zeros(len(u), max(0, part - len(s)))], 1))
    (k, v), half = ups, r // 2
    w_uk = torch.cat([k, k.new_zeros(len(k), r - half)], 1)
    return torch.cat(downs), w_uk, torch.cat([v.new_zeros(len(v), half), v], 1)


@misconception(
    "joint_low_rank",
    "The latent was chosen for the keys, and the values had to live with it. The best one is found for both at once.",
)
def joint_low_rank__keys_choose(w_k, w_v, r):
    joint_low_rank(w_k, w_v, r)
    down = torch.linalg.svd(w_k)[2][:r]
    return down, w_k @ down.T, w_v @ down.T


@misconception(
    "joint_low_rank", "The smallest singular values were kept. What is large is what matters, and it comes first."
)
def joint_low_rank__smallest(w_k, w_v, r):
    u, s, vh = _svd(w_k, w_v, r)
    up = u[:, -r:] * s[-r:]
    return vh[-r:], up[: len(w_k)], up[len(w_k) :]


@misconception("joint_low_rank", "The singular values are missing: each direction comes back with the strength 1.")
def joint_low_rank__no_strength(w_k, w_v, r):
    u, _, vh = _svd(w_k, w_v, r)
    return vh[:r], u[: len(w_k), :r], u[len(w_k) :, :r]


@misconception(
    "joint_low_rank", "Each singular value was multiplied into both factors, so the product holds its square."
)
def joint_low_rank__strength_twice(w_k, w_v, r):
    u, s, vh = _svd(w_k, w_v, r)
    up = u[:, :r] * s[:r]
    return s[:r, None] * vh[:r], up[: len(w_k)], up[len(w_k) :]


@misconception("joint_low_rank", "Keys and values have changed places in what you return: first w_uk, then w_uv.")
def joint_low_rank__swapped(w_k, w_v, r):
    down, w_uk, w_uv = joint_low_rank(w_k, w_v, r)
    return down, w_uv, w_uk


@misconception(
    "joint_low_rank",
    "The square orthogonal matrices of the full decomposition were made, most of whose columns nobody needs: ask for the thin one.",
)
def joint_low_rank__full(w_k, w_v, r):
    joint_low_rank(w_k, w_v, r)
    u, s, vh = torch.linalg.svd(torch.cat([w_k, w_v]))
    up = u[:, :r] * s[:r]
    return vh[:r], up[: len(w_k)], up[len(w_k) :]


def _fit(x, c, w, inner):
    fits = x.shape[0] == c.shape[0] and x.shape[1] == w.shape[0] and c.shape[2] == w.shape[2] and inner
    if not fits:
        raise ValueError(f"{tuple(x.shape)}, {tuple(c.shape)}, {tuple(w.shape)}")


def _fit_scores(q, c, w):
    _fit(q, c, w, q.shape[3] == w.shape[1])


def _fit_values(p, c, w):
    _fit(p, c, w, p.shape[3] == c.shape[1])


def _scores(q, c, w):
    return torch.einsum("bhtr,bsr->bhts", torch.einsum("bhtn,hnr->bhtr", q, w), c)


def _values(p, c, w):
    return torch.einsum("bhtr,hvr->bhtv", torch.einsum("bhts,bsr->bhtr", p, c), w)


@misconception(
    "absorbed_scores",
    "The numbers are right, but you made the keys of all heads first. With the query taken to the latent, no key is needed.",
)
def absorbed_scores__keys_made(q, c, w_uk):
    _fit_scores(q, c, w_uk)
    return torch.einsum("bhtn,bhsn->bhts", q, torch.einsum("bsr,hnr->bhsn", c, w_uk))


@misconception(
    "absorbed_scores",
    "The numbers are right, but a broadcasted matmul copied the latent once for every head. All heads read the same one.",
)
def absorbed_scores__latent_copied(q, c, w_uk):
    _fit_scores(q, c, w_uk)
    return (q @ w_uk) @ c[:, None].mT


@misconception(
    "absorbed_scores",
    "w_uk is (dn, r) and was read as (r, dn): reshaping does not transpose. The query lives in the space of keys and goes "
    "to that of latents.",
)
def absorbed_scores__reshaped(q, c, w_uk):
    _fit_scores(q, c, w_uk)
    H, n, r = w_uk.shape
    return _scores(q, c, w_uk.reshape(H, r, n).mT)


@misconception("absorbed_scores", "These scores are divided by the root of the key width. No scale was asked for.")
def absorbed_scores__scaled(q, c, w_uk):
    _fit_scores(q, c, w_uk)
    return _scores(q, c, w_uk) * q.shape[-1] ** -0.5


@misconception(
    "absorbed_scores",
    "These scores are divided by the root of the latent width. The order of multiplication changes no score, so no scale "
    "belongs here, and later it is that of the key.",
)
def absorbed_scores__scaled_by_latent(q, c, w_uk):
    _fit_scores(q, c, w_uk)
    return _scores(q, c, w_uk) * c.shape[-1] ** -0.5


@misconception("absorbed_scores", "Every head used the matrix of head 0. They share the latent, not how they read it.")
def absorbed_scores__head_zero(q, c, w_uk):
    _fit_scores(q, c, w_uk)
    return _scores(q, c, w_uk[:1].expand_as(w_uk))


@misconception(
    "absorbed_scores", "The scores went through float32. Identities are proved in float64; float32 shows rounding."
)
def absorbed_scores__float32(q, c, w_uk):
    _fit_scores(q, c, w_uk)
    return _scores(q.float(), c.float(), w_uk.float()).to(q.dtype)


@misconception(
    "absorbed_scores", "Sizes of 1 passed your check and were stretched. One head's matrix is not every head's matrix."
)
def absorbed_scores__stretched(q, c, w_uk):
    return _scores(q, c, w_uk)


@misconception(
    "absorbed_values",
    "The numbers are right, but you made the values of all heads first. The weights are plain numbers: they can mix latents.",
)
def absorbed_values__values_made(p, c, w_uv):
    _fit_values(p, c, w_uv)
    return torch.einsum("bhts,bhsv->bhtv", p, torch.einsum("bsr,hvr->bhsv", c, w_uv))


@misconception(
    "absorbed_values",
    "The numbers are right, but a broadcasted matmul copied the latent once for every head. All heads mix the same one.",
)
def absorbed_values__latent_copied(p, c, w_uv):
    _fit_values(p, c, w_uv)
    return (p @ c[:, None]) @ w_uv.mT


@misconception("absorbed_values", "w_uv is (dv, r) and was read as (r, dv): reshaping does not transpose.")
def absorbed_values__reshaped(p, c, w_uv):
    _fit_values(p, c, w_uv)
    H, v, r = w_uv.shape
    return _values(p, c, w_uv.reshape(H, r, v).mT)


@misconception(
    "absorbed_values", "You made the weights sum to 1. They are used as they are: softmax and mask came before."
)
def absorbed_values__renormalised(p, c, w_uv):
    _fit_values(p, c, w_uv)
    return _values(p / p.sum(-1, keepdim=True), c, w_uv)


@misconception("absorbed_values", "A softmax was applied to the weights. They are weights already.")
def absorbed_values__softmax(p, c, w_uv):
    _fit_values(p, c, w_uv)
    return _values(p.softmax(-1), c, w_uv)


@misconception("absorbed_values", "Every head used the matrix of head 0. They share the latent, not how they read it.")
def absorbed_values__head_zero(p, c, w_uv):
    _fit_values(p, c, w_uv)
    return _values(p, c, w_uv[:1].expand_as(w_uv))


@misconception(
    "absorbed_values", "The mixture went through float32. Identities are proved in float64; float32 shows rounding."
)
def absorbed_values__float32(p, c, w_uv):
    _fit_values(p, c, w_uv)
    return _values(p.float(), c.float(), w_uv.float()).to(p.dtype)


@misconception(
    "merge_query", "Your matrices are transposed: (H, D, r) where x of width D goes in and r numbers come out."
)
def merge_query__transposed(w_q, w_uk):
    return merge_query(w_q, w_uk).mT


@misconception(
    "merge_query", "The shape is right and the numbers are shuffled: (D, r) was reshaped to (r, D), not transposed."
)
def merge_query__reshaped(w_q, w_uk):
    merged = merge_query(w_q, w_uk)
    return merged.mT.reshape(merged.shape)


@misconception(
    "merge_query", "All heads have one matrix here, the sum. Each head has its own softmax, so each keeps its own."
)
def merge_query__summed(w_q, w_uk):
    merged = merge_query(w_q, w_uk)
    return merged.sum(0, keepdim=True).expand_as(merged)


@misconception("merge_output", "Your matrices are transposed: a latent of width r goes in, and D numbers come out.")
def merge_output__transposed(w_o, w_uv):
    return merge_output(w_o, w_uv).mT


@misconception(
    "merge_output",
    "The head axis of w_o stands in the middle, and a reshape brought it to the front: that mixes heads and rows.",
)
def merge_output__reshaped(w_o, w_uv):
    merge_output(w_o, w_uv)
    D, H, v = w_o.shape
    return w_o.reshape(H, D, v) @ w_uv


@misconception(
    "merged_parameter_ratio", "Upside down: the merged matrix is the larger one, so the ratio is above 1 for V2."
)
def merged_parameter_ratio__upside_down(d_model, dn, r):
    return dn * (d_model + r) / (r * d_model)


@misconception("merged_parameter_ratio", "You compare with w_q alone. The unmerged form reads w_uk, too.")
def merged_parameter_ratio__query_alone(d_model, dn, r):
    return r / dn


@misconception(
    "merged_parameter_ratio", "Below 1: this says that merging saves weights. The merged matrix is r by D, not dn by D."
)
def merged_parameter_ratio__saves(d_model, dn, r):
    return d_model / (d_model + r)


@misconception(
    "effective_matrices",
    "The rotation is gone: one matrix for every key. It depends on the distance, stands between w_q and w_uk, and cannot be "
    "moved out of there.",
)
def effective_matrices__absorbed(w_q, w_uk, positions, query_pos):
    return torch.zeros_like(effective_matrices(w_q, w_uk, positions, query_pos)) + w_q.T @ w_uk


@misconception(
    "effective_matrices", "It turns the wrong way: the query's rotation is the transposed one, which leaves s - t."
)
def effective_matrices__wrong_way(w_q, w_uk, positions, query_pos):
    return effective_matrices(w_q, w_uk, 2 * query_pos - positions, query_pos)


@misconception(
    "effective_matrices",
    "The angles of query and key were added. In a dot product one rotation is undone by the other.",
)
def effective_matrices__added(w_q, w_uk, positions, query_pos):
    return effective_matrices(w_q, w_uk, positions, -query_pos)


@misconception(
    "effective_matrices", "Only the key was turned: the position of the query has no effect in your numbers."
)
def effective_matrices__key_alone(w_q, w_uk, positions, query_pos):
    return effective_matrices(w_q, w_uk, positions, 0)


@misconception("effective_matrices", "You paired x[i] with x[i + dn/2]. Here neighbors are pairs: 0 with 1, 2 with 3.")
def effective_matrices__half_split(w_q, w_uk, positions, query_pos):
    effective_matrices(w_q, w_uk, positions, query_pos)
    n = len(w_q)
    order = torch.arange(n, device=w_q.device).reshape(2, n // 2).T.flatten()
    return effective_matrices(w_q[order], w_uk[order], positions, query_pos)


def _turned(w_q, w_uk, angles):
    cos, sin = (x.to(w_q.dtype)[..., None] for x in (angles.cos(), angles.sin()))
    even, odd = w_uk[0::2], w_uk[1::2]
    return w_q.T @ torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=2).flatten(1, 2)


@misconception(
    "effective_matrices", "Your frequencies fall half as fast as they should: the exponent is -2i/dn for the pair i."
)
def effective_matrices__half_exponent(w_q, w_uk, positions, query_pos):
    effective_matrices(w_q, w_uk, positions, query_pos)
    n = len(w_q)
    pairs = torch.arange(n // 2, dtype=torch.float64, device=w_q.device)
    return _turned(w_q, w_uk, (positions - query_pos)[:, None] * BASE ** (-pairs / n))


@misconception(
    "effective_matrices",
    "Your angles are float32. A million radians leave few digits for what is within one turn: use float64.",
)
def effective_matrices__float32(w_q, w_uk, positions, query_pos):
    effective_matrices(w_q, w_uk, positions, query_pos)
    n = len(w_q)
    pairs = torch.arange(0, n, 2, dtype=torch.float32, device=w_q.device)
    return _turned(w_q, w_uk, (positions - query_pos)[:, None].float() * BASE ** (-pairs / n))


@misconception(
    "latent_gauge",
    "`a` went into every factor. Where it is multiplied in on one side, its inverse belongs on the other.",
)
def latent_gauge__no_inverse(w_down, w_uk, w_uv, a):
    latent_gauge(w_down, w_uk, w_uv, a)
    return a @ w_down, w_uk @ a, w_uv @ a


@misconception("latent_gauge", "You took the transposed of `a` for its inverse. That holds for rotations alone.")
def latent_gauge__transposed(w_down, w_uk, w_uv, a):
    latent_gauge(w_down, w_uk, w_uv, a)
    return a @ w_down, w_uk @ a.T, w_uv @ a.T


@misconception("latent_gauge", "This is the way back: the latent becomes the inverse of `a` times c.")
def latent_gauge__way_back(w_down, w_uk, w_uv, a):
    latent_gauge(w_down, w_uk, w_uv, a)
    return torch.linalg.inv(a) @ w_down, w_uk @ a, w_uv @ a


@misconception("latent_gauge", "The values still read the old latent: w_uv has to change with w_uk.")
def latent_gauge__values_forgotten(w_down, w_uk, w_uv, a):
    down, up, _ = latent_gauge(w_down, w_uk, w_uv, a)
    return down, up, w_uv.clone()


@misconception("normalise_gauge", "The rows have length 1, but they are not at right angles to each other.")
def normalise_gauge__lengths(w_down, w_uk, w_uv):
    normalise_gauge(w_down, w_uk, w_uv)
    norm = w_down.norm(dim=1, keepdim=True)
    return w_down / norm, w_uk * norm.T, w_uv * norm.T


@misconception("normalise_gauge", "w_down was replaced and the others were left: keys and values are other ones now.")
def normalise_gauge__not_compensated(w_down, w_uk, w_uv):
    return normalise_gauge(w_down, w_uk, w_uv)[0], w_uk.clone(), w_uv.clone()


@misconception(
    "normalise_gauge", "The triangular factor was moved over without its transposition, so keys and values changed."
)
def normalise_gauge__not_transposed(w_down, w_uk, w_uv):
    normalise_gauge(w_down, w_uk, w_uv)
    rows, mix = torch.linalg.qr(w_down.T)
    return rows.T, w_uk @ mix, w_uv @ mix


@misconception("calibrated_low_rank", "This is the plain truncation of w: the inputs had no say in what was kept.")
def calibrated_low_rank__plain(w, x_cal, r):
    calibrated_low_rank(w, x_cal, r)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return vh[:r], u[:, :r] * s[:r]


@misconception(
    "calibrated_low_rank",
    "You kept the strongest directions of the inputs. What counts is how strong they are behind w: look at the outputs.",
)
def calibrated_low_rank__inputs_alone(w, x_cal, r):
    calibrated_low_rank(w, x_cal, r)
    down = torch.linalg.svd(x_cal.T @ x_cal)[2][:r]
    return down, w @ down.T


@misconception(
    "calibrated_low_rank", "The mean was subtracted from the inputs. Their mean is part of what goes through w."
)
def calibrated_low_rank__centered(w, x_cal, r):
    return calibrated_low_rank(w, x_cal - x_cal.mean(0), r)


@misconception(
    "calibrated_low_rank",
    "w was multiplied by the covariance where its root belongs: strong directions count too much.",
)
def calibrated_low_rank__covariance(w, x_cal, r):
    calibrated_low_rank(w, x_cal, r)
    return calibrated_low_rank(w, x_cal.T @ x_cal, r)
