"""RoPE of day 19 in both layouts, against the rotary classes of Llama (halves) and DeepSeek (interleaved)."""

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.llama import modeling_llama as llama

from reference.day19_positions import apply_rope, apply_rope_half, interleaved_to_half, rope_tables

B, H, T, D = 2, 3, 7, 16
POSITIONS = torch.stack((torch.arange(T), torch.arange(50, 50 + T)))  # small: a float32 angle p is exact to p * 2^-24


def heads():
    return torch.randn(B, H, T, D), torch.randn(B, H, T, D)


def per_row(tables):
    """Tables (B, T, D/2) beside heads (B, H, T, D)."""
    return [table[:, None] for table in tables]


def scores(q, k):
    return q @ k.mT


def llama_tables(base):
    config = llama.LlamaConfig(
        hidden_size=H * D,
        num_attention_heads=H,
        head_dim=D,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    return llama.LlamaRotaryEmbedding(config)(torch.zeros(()), POSITIONS)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_llama_rotates_halves(base):
    q, k = heads()
    cos, sin = llama_tables(base)
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    mine = per_row(rope_tables(POSITIONS, D, base))
    torch.testing.assert_close(apply_rope_half(q, *mine), theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apply_rope_half(k, *mine), theirs[1], rtol=1e-5, atol=1e-5)


def deepseek_v2_angles():
    config = v2.DeepseekV2Config(
        qk_rope_head_dim=D,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return v2.DeepseekV2RotaryEmbedding(config)(torch.zeros(()), POSITIONS)


def test_deepseek_v2_rotates_interleaved_pairs():
    q, k = heads()
    theirs = v2.apply_rotary_emb(q, k, deepseek_v2_angles())
    mine = per_row(rope_tables(POSITIONS, D))
    torch.testing.assert_close(apply_rope(q, *mine), theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apply_rope(k, *mine), theirs[1], rtol=1e-5, atol=1e-5)


def test_deepseek_v3_rotates_interleaved_pairs_and_returns_halves():
    q, k = heads()
    cos, sin = llama_tables(10000.0)  # cat(angles, angles), as V3's own class makes them
    theirs = v3.apply_rotary_pos_emb_interleave(q, k, cos, sin)
    mine = per_row(rope_tables(POSITIONS, D))
    rotated = apply_rope(q, *mine), apply_rope(k, *mine)
    halves = [torch.cat((x[..., 0::2], x[..., 1::2]), -1) for x in rotated]
    torch.testing.assert_close(halves[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores(*rotated), scores(*theirs), rtol=1e-5, atol=2e-5)
    assert not torch.allclose(rotated[0], theirs[0], atol=1e-2)  # only scores may be compared, never a cached key


def test_permuted_weights_under_llamas_rotation_score_as_interleaved_ones():
    x = torch.randn(B, T, 32)
    w_q, w_k = torch.randn(H * D, 32), torch.randn(H * D, 32)

    def split(weight):
        return (x @ weight.mT).unflatten(-1, (H, D)).transpose(1, 2)

    mine = per_row(rope_tables(POSITIONS, D))
    wanted = scores(apply_rope(split(w_q), *mine), apply_rope(split(w_k), *mine))
    q, k = split(interleaved_to_half(w_q, H)), split(interleaved_to_half(w_k, H))
    got = scores(*llama.apply_rotary_pos_emb(q, k, *llama_tables(10000.0)))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-3)
    unpermuted = scores(*llama.apply_rotary_pos_emb(split(w_q), split(w_k), *llama_tables(10000.0)))
    assert (unpermuted - wanted).abs().max() > 1
