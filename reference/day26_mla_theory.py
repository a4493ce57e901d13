"""Low rank, absorption, and why a rotation is in the way: the algebra under multi-head latent attention.

Keys and values are two linear readings of one latent, k = W_UK c and v = W_UV c with c = W_D x (DeepSeek-V2,
arXiv:2405.04434, section 2.1.2 and appendix C). Matrix products may be bracketed at will, so attention can run
on the latent itself; the rotation of section 2.1.3 stands between two matrices and cannot be merged into either.
"""

import torch
from torch import Tensor

BASE = 10000.0  # of the rotation's frequencies


def merged_parameter_ratio(d_model: int, dn: int, r: int) -> float:
    """Return how many times more numbers a merged matrix (r, D) has than w_q (dn, D) and w_uk (dn, r) together."""
    return r * d_model / (dn * (d_model + r))


def cache_elements(
    kind: str,
    n_heads: int,
    head_dim: int,
    n_kv_heads: int | None = None,
    r: int | None = None,
    dr: int | None = None,
) -> int:
    """Return how many numbers one token leaves in the cache of one layer."""
    if kind == "mha":
        return 2 * n_heads * head_dim
    if kind == "gqa" and n_kv_heads is not None:
        return 2 * n_kv_heads * head_dim
    if kind == "mla" and r is not None and dr is not None:
        return r + dr
    raise ValueError(f"kind {kind!r} with n_kv_heads {n_kv_heads}, r {r}, dr {dr}: nothing to count")


def equivalent_gqa_groups(r: int, dr: int, head_dim: int) -> float:
    """Return how many key/value heads of grouped attention would fill the cache as much as a latent does."""
    return (r + dr) / (2 * head_dim)


def compression_vs_mha(n_heads: int, head_dim: int, r: int, dr: int) -> float:
    """Return how many times larger the cache of the same heads is without a latent."""
    return 2 * n_heads * head_dim / (r + dr)


def joint_low_rank(w_k: Tensor, w_v: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return w_down (r, D), w_uk (H*dn, r), w_uv (H*dv, r): the best factors of both matrices with one latent."""
    if w_k.shape[1] != w_v.shape[1]:
        raise ValueError(f"w_k {tuple(w_k.shape)} and w_v {tuple(w_v.shape)} read inputs of different widths")
    n_k, _ = w_k.shape
    up, down = _truncated(torch.cat([w_k, w_v]), r)  # (H*dn + H*dv, r), (r, D)
    return down, up[:n_k], up[n_k:]


def absorbed_scores(q: Tensor, c: Tensor, w_uk: Tensor) -> Tensor:
    """Return the products of q (B, H, T, dn) with the keys w_uk c (c: (B, S, r)), as (q w_uk) c^T."""
    if q.shape[1::2] != w_uk.shape[:2]:
        raise ValueError(f"q {tuple(q.shape)} does not fit w_uk {tuple(w_uk.shape)}")
    if c.shape[2] != w_uk.shape[2]:
        raise ValueError(f"c {tuple(c.shape)} does not fit w_uk {tuple(w_uk.shape)}")
    if q.shape[0] != c.shape[0]:
        raise ValueError(f"q {tuple(q.shape)} and c {tuple(c.shape)} differ in the batch")
    latent = torch.einsum("bhtn,hnr->bhtr", q, w_uk)  # (B, H, T, r)
    return torch.einsum("bhtr,bsr->bhts", latent, c)  # (B, H, T, S)


def absorbed_values(p: Tensor, c: Tensor, w_uv: Tensor) -> Tensor:
    """Return the mixture by p (B, H, T, S) of the values w_uv c (c: (B, S, r)), as (p c) w_uv^T."""
    if p.shape[::3] != c.shape[:2]:
        raise ValueError(f"p {tuple(p.shape)} does not fit c {tuple(c.shape)}")
    if p.shape[1] != w_uv.shape[0]:
        raise ValueError(f"p {tuple(p.shape)} does not fit w_uv {tuple(w_uv.shape)}")
    if c.shape[2] != w_uv.shape[2]:
        raise ValueError(f"c {tuple(c.shape)} does not fit w_uv {tuple(w_uv.shape)}")
    latent = torch.einsum("bhts,bsr->bhtr", p, c)  # (B, H, T, r)
    return torch.einsum("bhtr,hvr->bhtv", latent, w_uv)  # (B, H, T, dv)


def merge_query(w_q: Tensor, w_uk: Tensor) -> Tensor:
    """Return (H, r, D): for each head the one matrix w_uk^T w_q that takes x to a query in the latent space."""
    if w_q.shape[:2] != w_uk.shape[:2]:
        raise ValueError(f"w_q {tuple(w_q.shape)} does not fit w_uk {tuple(w_uk.shape)}")
    return w_uk.mT @ w_q  # (H, r, D)


def merge_output(w_o: Tensor, w_uv: Tensor) -> Tensor:
    """Return (H, D, r): for each head the one matrix w_o w_uv that takes a mixture of latents to the output."""
    if w_o.shape[1:] != w_uv.shape[:2]:
        raise ValueError(f"w_o {tuple(w_o.shape)} does not fit w_uv {tuple(w_uv.shape)}")
    return w_o.transpose(0, 1) @ w_uv  # (H, D, r)


def effective_matrices(w_q: Tensor, w_uk: Tensor, positions: Tensor, query_pos: int) -> Tensor:
    """Return (P, D, r): the matrix M_s of x^T M_s c for a query at query_pos and a rotated key at each position s.

    The two rotations leave one, R(t)^T R(s) = R(s - t), between w_q^T and w_uk.
    """
    if w_q.shape[0] != w_uk.shape[0]:
        raise ValueError(f"w_q {tuple(w_q.shape)} does not fit w_uk {tuple(w_uk.shape)}")
    dn = w_q.shape[0]
    if dn % 2 != 0:
        raise ValueError(f"pairs are rotated: the width {dn} is odd")
    pairs = torch.arange(0, dn, 2, dtype=torch.float64, device=w_q.device)  # (dn/2,)
    angles = (positions - query_pos)[:, None] * BASE ** (-pairs / dn)  # (P, dn/2)
    cos, sin = (x.to(w_q.dtype)[..., None] for x in (angles.cos(), angles.sin()))  # (P, dn/2, 1)
    even, odd = w_uk[0::2], w_uk[1::2]  # (dn/2, r)
    rotated = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=2).flatten(1, 2)  # (P, dn, r)
    return w_q.T @ rotated  # (P, D, r)


def latent_gauge(w_down: Tensor, w_uk: Tensor, w_uv: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same keys and values from another latent, a c in place of c."""
    if a.shape != (w_down.shape[0], w_down.shape[0]):
        raise ValueError(f"a {tuple(a.shape)} does not fit w_down {tuple(w_down.shape)}")
    back = torch.linalg.inv(a)  # (r, r)
    return a @ w_down, w_uk @ back, w_uv @ back


def normalise_gauge(w_down: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same keys and values from a latent whose w_down has orthonormal rows."""
    r, d_model = w_down.shape
    if r > d_model:
        raise ValueError(f"{r} rows of width {d_model} cannot be orthonormal: w_down {tuple(w_down.shape)}")
    rows, mix = torch.linalg.qr(w_down.T)  # (D, r), (r, r)
    return rows.T, w_uk @ mix.T, w_uv @ mix.T


def calibrated_low_rank(w: Tensor, x_cal: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return down (r, D), up (O, r): of all factors of rank r, those that change the outputs x w^T on x_cal least.

    The best approximation of the outputs projects them on their r strongest directions, and a projection of the
    outputs is one of w. Nothing is inverted, so inputs that fill no more than a subspace are no special case.
    """
    if x_cal.shape[1] != w.shape[1]:
        raise ValueError(f"x_cal {tuple(x_cal.shape)} does not fit w {tuple(w.shape)}")
    if not 1 <= r <= min(w.shape):
        raise ValueError(f"no rank {r} in a matrix {tuple(w.shape)}")
    _, mix = torch.linalg.qr(x_cal, mode="r")  # (min(N, D), D): x_cal without the directions among its rows
    u, _, _ = torch.linalg.svd(w @ mix.T)  # (O, O)
    up = u[:, :r]  # (O, r)
    return up.T @ w, up


def _truncated(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the factors (O, r) and (r, D) of the best approximation of w of rank r."""
    if not 1 <= r <= min(w.shape):
        raise ValueError(f"no rank {r} in a matrix {tuple(w.shape)}")
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :r] * s[:r], vh[:r]
