"""Make data/golden.safetensors: Llama's rotary embedding, T5's buckets and Bloom's slopes, from transformers.

Run it by hand: `python katas/day19_positions/make_golden.py`. The spec reads the file and never imports transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

BATCH, HEADS, T, WIDTH = 2, 3, 6, 8
SLOPES = (6, 12, 20)


def main() -> None:
    """Write what the three libraries' functions give."""
    gen = torch.Generator().manual_seed(19)
    golden = {}

    config = LlamaConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS)
    rotary = LlamaRotaryEmbedding(config)
    q, k = (torch.randn(BATCH, HEADS, T, WIDTH, generator=gen) for _ in range(2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 30, 31, 100]])
    cos, sin = rotary(q, positions)  # (B, T, WIDTH): both halves hold the same numbers
    rotated_q, rotated_k = apply_rotary_pos_emb(q, k, cos, sin)
    golden |= {"llama.q": q, "llama.k": k, "llama.positions": positions, "llama.cos": cos, "llama.sin": sin}
    golden |= {"llama.rotated_q": rotated_q, "llama.rotated_k": rotated_k}

    rel = torch.arange(-300, 301)
    golden["t5.rel"] = rel
    for bidirectional in (True, False):
        for buckets, distance in ((32, 128), (16, 64)):
            name = f"t5.{'both' if bidirectional else 'past'}.{buckets}.{distance}"
            golden[name] = T5Attention._relative_position_bucket(rel, bidirectional, buckets, distance)

    for n in SLOPES:
        golden[f"bloom.slopes.{n}"] = build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1]  # slope * 1

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    path = Path(__file__).parent / "data" / "golden.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in golden.items()}, path, metadata=versions)
    print(f"{path.name}: {path.stat().st_size:,} bytes, {versions}")


if __name__ == "__main__":
    main()
