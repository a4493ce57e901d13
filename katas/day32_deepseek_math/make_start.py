"""Make the start checkpoint of day 32: a small DeepSeek model that has learned two-digit addition and half forgot it.

Fine-tuning alone either stops too early, with a model that reinforcement learning cannot help in a minute, or goes all
the way. So the model is trained until it adds, and then noise is put on its weights: what it knew is still in there.

Usage: python katas/day32_deepseek_math/make_start.py [FOLDER]   (from the folder that holds `reference`; about a minute)
"""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from reference.day07_data_loading import PAD_ID, ArithmeticDataset, Loader, ShuffledBatchSampler, pad_collate
from reference.day11_optimizers import AdamW, cosine_lr
from reference.day29_deepseek_architecture import DeepSeekConfig
from reference.day31_deepseek_integration import DeepSeekForCausalLM, init_weights_
from reference.day32_deepseek_math import greedy_accuracy, sft_step

STEPS, BATCH, LR = 450, 256, 3e-3
NOISE = 0.23  # of the standard deviation of each matrix
CONFIG = DeepSeekConfig(
    vocab_size=14,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    max_position_embeddings=32,
)


def trained() -> DeepSeekForCausalLM:
    """A model that adds: fine-tuned on the training part of day 7's sums."""
    model = DeepSeekForCausalLM(CONFIG)
    init_weights_(model, 0.08, generator=torch.Generator().manual_seed(0))
    data = ArithmeticDataset(2, "train")
    sampler = ShuffledBatchSampler(len(data), BATCH, drop_last=True, seed=0)
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    step = 0
    while step < STEPS:
        sampler.set_epoch(step)
        for batch in Loader(data, sampler, lambda items: pad_collate(items, PAD_ID)):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(step, lr_max=LR, lr_min=LR / 10, warmup=20, total=STEPS)
            sft_step(model, batch, optimizer)
            step += 1
            if step == STEPS:
                break
    return model


@torch.no_grad()
def disturb_(model: DeepSeekForCausalLM) -> None:
    """Add noise to every matrix, and round to what bfloat16 can hold."""
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=NOISE * weight.std().item())
        weight.copy_(weight.bfloat16())


def main() -> None:
    """Train, disturb, measure, write."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    pairs = random.Random(0).sample(ArithmeticDataset(2, "test").pairs, 500)
    model = trained()
    print(f"trained: {greedy_accuracy(model, pairs):.3f} of the test sums")
    disturb_(model)
    print(f"disturbed: {greedy_accuracy(model, pairs):.3f}")
    tensors = {
        name: tensor.clone() if tensor.dim() == 1 and "bias" in name else tensor.bfloat16()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "torch": torch.__version__})
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict(), indent=1) + "\n")
    (folder / "pairs.json").write_text(json.dumps(pairs) + "\n")


if __name__ == "__main__":
    main()
