"""Makes the folders in data/: three checkpoints of tiny DeepSeek models, and what transformers computes with them.

Run it from anywhere. The files are laid out as published ones are: matrices in bfloat16, a tensor for each matrix of each
expert, router biases in float32. Weights have variance 1/fan_in, embeddings variance 1, gains lie around 1 and biases are
often negative: with the usual spread of 0.02 most mistakes would hardly move a logit.
"""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

B, T, PADDING, PROMPT = 2, 12, 5, 6
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-4,
}
V2 = {"model_type": "deepseek_v2", "n_shared_experts": 2, "norm_topk_prob": False, "scoring_func": "softmax"}
V3 = {"model_type": "deepseek_v3", "n_shared_experts": 1, "norm_topk_prob": True, "scoring_func": "sigmoid"}
GROUPS = {"n_group": 4, "topk_group": 2, "q_lora_rank": 12}
CASES = {
    "v2_greedy": {**V2, "topk_method": "greedy", "routed_scaling_factor": 1.0, "q_lora_rank": None, "mscale": 0.707},
    "v2_groups": {
        **V2,
        **GROUPS,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "mscale": 0.707,
    },
    "v3": {**V3, **GROUPS, "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "mscale": 1.0},
}


def published(case: dict) -> dict:
    """The case as a config.json."""
    case = {**SIZES, **case}
    mscale = case.pop("mscale")
    case["rope_theta"] = 10000.0
    case["rope_scaling"] = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    return case


def build(config: dict):
    """The model of a config.json in transformers."""
    given = {key: value for key, value in config.items() if key not in ("model_type", "rope_theta", "rope_scaling")}
    rope = {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    rope["rope_type"] = rope.pop("type")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    if config["model_type"] == "deepseek_v2":
        return DeepseekV2ForCausalLM(DeepseekV2Config(**given, rope_parameters=rope, **eager)).eval()
    return DeepseekV3ForCausalLM(DeepseekV3Config(**given, rope_parameters=rope, **eager)).eval()


def fill(model, generator: torch.Generator) -> None:
    """Draw all weights anew, each of them a number that bfloat16 can hold; biases need float32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        uniform = torch.rand(tensor.shape, generator=generator)
        normal = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.5 - 2.0 * uniform)
        elif "norm" in name:
            tensor.copy_((0.5 + uniform).bfloat16())
        elif "embed_tokens" in name:
            tensor.copy_(normal.bfloat16())
        elif tensor.ndim >= 2:
            tensor.copy_((normal * tensor.shape[-1] ** -0.5).bfloat16())


def checkpoint(model, style: str) -> dict[str, torch.Tensor]:
    """The tensors of the model as published files have them."""
    found = {}
    for key, tensor in model.state_dict().items():
        lead, _, kind = key.rpartition("mlp.experts.")
        if kind == "gate_up_proj":
            for number, both in enumerate(tensor):
                gate, up = both.bfloat16().chunk(2)
                found[f"{lead}mlp.experts.{number}.gate_proj.weight"] = gate.clone()
                found[f"{lead}mlp.experts.{number}.up_proj.weight"] = up.clone()
        elif kind == "down_proj":
            for number, down in enumerate(tensor.bfloat16()):
                found[f"{lead}mlp.experts.{number}.down_proj.weight"] = down.clone()
        elif not key.endswith("e_score_correction_bias"):
            found[key] = tensor.bfloat16()
        elif style == "v3":  # the class of V2 registers one that its router never adds
            found[key] = tensor.clone()
    return found


def run(model, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tokens, and what the model makes of them: plain, left-padded, and greedily continued."""
    tokens = torch.randint(SIZES["vocab_size"], (B, T), generator=generator)
    seen = {}
    handles = []
    for i, layer in enumerate(model.model.layers):

        def keep(_, args, kwargs, out, i=i):
            seen[f"layer{i}.in"] = (args[0] if args else kwargs["hidden_states"]).clone()
            seen[f"layer{i}.out"] = out.clone()

        handles.append(layer.register_forward_hook(keep, with_kwargs=True))
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    shown = torch.ones(B, T, dtype=torch.bool)
    shown[0, :PADDING] = False
    positions = (shown.long().cumsum(1) - 1).clamp(min=0)
    padded = model(tokens, attention_mask=shown.long(), position_ids=positions).logits
    prompt = tokens[:, :PROMPT]
    everything = torch.ones_like(prompt)  # otherwise the pad token is taken for padding
    settings = {"max_new_tokens": PROMPT, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(prompt, attention_mask=everything, **settings)
    return {"tokens": tokens, "logits": logits, "shown": shown, "padded": padded, "greedy": greedy, **seen}


def margins(model, tokens) -> tuple[float, float]:
    """The smallest lead of a logit over the next one, and the smallest difference of two experts' scores."""
    routers = []

    def keep(module, args, out):
        scores = torch.nn.functional.linear(args[0].flatten(0, -2).float(), module.weight.float())
        bias = getattr(module, "e_score_correction_bias", None)
        routers.append(scores.softmax(-1) if bias is None or not bias.any() else scores.sigmoid() + bias)

    handles = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers[1:]]
    logits = model(tokens).logits
    for handle in handles:
        handle.remove()
    best = logits.topk(2).values
    experts = torch.cat(routers).sort(-1).values.diff().min()
    return (best[..., 0] - best[..., 1]).min().item(), experts.item()


@torch.no_grad()
def main() -> None:
    """Make the three folders."""
    made = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, case in CASES.items():
        config = published(case)
        model = build(config)
        style = name[:2]
        for seed in range(10_000):
            generator = torch.Generator().manual_seed(seed)
            fill(model, generator)
            expected = run(model, generator)
            logit, expert = margins(model, torch.cat((expected["tokens"], expected["greedy"])))
            if logit > 2e-3 and expert > 2e-5:
                break
        folder = Path(__file__).parent / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        config["transformers_version"] = transformers.__version__
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        expected = {key: tensor.contiguous() for key, tensor in expected.items()}
        save_file(expected, folder / "expected.safetensors", metadata={**made, "seed": str(seed)})
        save_file(checkpoint(model, style), folder / "model.safetensors", metadata={"format": "pt"})
        print(name, seed, expected["logits"].std(), margins(model, expected["tokens"]), flush=True)


if __name__ == "__main__":
    main()
