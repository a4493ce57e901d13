"""Day 26: right solutions, written differently."""

import numpy as np
import torch

from checker.testing import alternative


def _shapes(*tensors):
    return ValueError(" / ".join(str(tuple(x.shape)) for x in tensors))


@alternative("cache_elements")
def cache_elements__by_table(kind, n_heads, head_dim, n_kv_heads=None, r=None, dr=None):
    parts = {"mha": [n_heads * head_dim] * 2, "gqa": [(n_kv_heads, head_dim)] * 2, "mla": [r, dr]}.get(kind)
    if parts is None or None in parts or (kind == "gqa" and n_kv_heads is None):
        raise ValueError(f"cannot count {kind}")
    return sum(a if isinstance(a, int) else a[0] * a[1] for a in parts)


@alternative("joint_low_rank")
def joint_low_rank__roots_shared(w_k, w_v, r):
    if w_k.shape[1] != w_v.shape[1]:
        raise _shapes(w_k, w_v)
    both = torch.vstack((w_k, w_v))
    if r < 1 or r > min(both.shape):
        raise ValueError(f"rank {r}")
    v, s, uh = torch.linalg.svd(both.T, full_matrices=False)
    root = s[:r].sqrt()
    up = uh[:r].T * root
    return (v[:, :r] * root).T, *up.split([len(w_k), len(w_v)])


@alternative("absorbed_scores")
def absorbed_scores__rows(q, c, w_uk):
    B, H, T, n = q.shape
    if c.shape[0] != B or w_uk.shape != (H, n, c.shape[-1]):
        raise _shapes(q, c, w_uk)
    rows = torch.stack([q[:, h] @ w_uk[h] for h in range(H)], dim=1)
    return (rows.reshape(B, H * T, c.shape[2]) @ c.mT).reshape(B, H, T, c.shape[1])


@alternative("absorbed_values")
def absorbed_values__rows(p, c, w_uv):
    B, H, T, S = p.shape
    if c.shape[:2] != (B, S) or w_uv.shape[0] != H or w_uv.shape[2] != c.shape[2]:
        raise _shapes(p, c, w_uv)
    mixed = (p.reshape(B, H * T, S) @ c).reshape(B, H, T, c.shape[2])
    return mixed @ w_uv.mT


@alternative("merge_query")
def merge_query__einsum(w_q, w_uk):
    if w_q.shape[:2] != w_uk.shape[:2]:
        raise _shapes(w_q, w_uk)
    return torch.einsum("hnd,hnr->hrd", w_q, w_uk)


@alternative("merge_output")
def merge_output__einsum(w_o, w_uv):
    if w_o.shape[1:] != w_uv.shape[:2]:
        raise _shapes(w_o, w_uv)
    return torch.einsum("dhv,hvr->hdr", w_o, w_uv)


@alternative("effective_matrices")
def effective_matrices__two_rotations(w_q, w_uk, positions, query_pos):
    n = w_q.shape[0]
    if n != w_uk.shape[0] or n % 2:
        raise _shapes(w_q, w_uk)

    def rotation(position):
        out = np.zeros((n, n))
        for i in range(0, n, 2):
            angle = position / 10000 ** (i / n)
            out[i, i] = out[i + 1, i + 1] = np.cos(angle)
            out[i + 1, i] = np.sin(angle)
            out[i, i + 1] = -np.sin(angle)
        return torch.from_numpy(out).to(w_q)

    left = w_q.T @ rotation(query_pos).T
    return torch.stack([left @ rotation(s) @ w_uk for s in positions.tolist()])


@alternative("latent_gauge")
def latent_gauge__solved(w_down, w_uk, w_uv, a):
    if a.shape != (len(w_down),) * 2:
        raise _shapes(a, w_down)
    return a @ w_down, torch.linalg.solve(a, w_uk, left=False), torch.linalg.solve(a.T, w_uv.T).T


@alternative("normalise_gauge")
def normalise_gauge__svd(w_down, w_uk, w_uv):
    if w_down.shape[0] > w_down.shape[1]:
        raise _shapes(w_down)
    u, s, vh = torch.linalg.svd(w_down, full_matrices=False)
    return vh, w_uk @ (u * s), w_uv @ (u * s)


@alternative("calibrated_low_rank")
def calibrated_low_rank__root_of_the_covariance(w, x_cal, r):
    if x_cal.shape[1] != w.shape[1]:
        raise _shapes(w, x_cal)
    if r < 1 or r > min(w.shape):
        raise ValueError(f"rank {r}")
    _, s, vh = torch.linalg.svd(x_cal, full_matrices=False)
    u, _, _ = torch.linalg.svd((w @ vh.T) * s)
    return (w.T @ u[:, :r]).T, u[:, :r]
