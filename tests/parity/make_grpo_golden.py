"""Write grpo_golden.json: what TRL's GRPOTrainer computes for small random inputs.

TRL brings a dozen packages along that nothing else here needs, so its numbers are kept instead. In an environment of its own:
pip install torch==2.13.0 trl==1.16.0 && python tests/parity/make_grpo_golden.py
"""

import importlib.metadata
import json
from collections import defaultdict
from pathlib import Path
from unittest.mock import MagicMock

import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

LOSSES = {"response": "grpo", "token": "bnpo", "constant": "dr_grpo"}
MAX_LEN = 8


def trainer(loss_type, beta):
    """A stand-in for a trainer: the settings that its loss reads, and a log for what it reports."""
    found = MagicMock()
    found.loss_type, found.beta, found.max_completion_length = loss_type, beta, MAX_LEN
    found.epsilon_low = found.epsilon_high = 0.2
    found.importance_sampling_level = "token"
    found.top_entropy_quantile = 1.0
    found.off_policy_mask_threshold = None
    found.use_vllm = found.aux_loss_enabled = found._entropy_bonus_enabled = False
    found.args.delta, found.args.use_bias_correction_kl = None, False
    found.model.training = False
    found.accelerator.gather.side_effect = found.accelerator.gather_for_metrics.side_effect = lambda x: x
    found._metrics = defaultdict(lambda: defaultdict(list))
    return found


def case(aggregate, beta, seed):
    """Inputs with clipped and unclipped tokens, and the loss and gradient that TRL gives them."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = 4, 5
    old = -3 * torch.rand(rows, width, generator=generator)
    logp = (old + 0.4 * torch.randn(rows, width, generator=generator)).requires_grad_()
    ref = old + 0.3 * torch.randn(rows, width, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    stand_in = trainer(LOSSES[aggregate], beta)
    stand_in._get_per_token_logps_and_entropies.return_value = logp, torch.zeros(rows, width), None
    ids = torch.zeros(rows, width, dtype=torch.long)
    loss = GRPOTrainer._compute_loss(
        stand_in,
        stand_in.model,
        {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        },
    )
    loss.backward()
    tensors = {"logp": logp, "old": old, "ref": ref, "advantages": advantages, "mask": mask, "grad": logp.grad}
    settings = {"aggregate": aggregate, "beta": beta, "clip": 0.2, "max_len": MAX_LEN, "loss": loss.item()}
    return settings | {name: tensor.tolist() for name, tensor in tensors.items()}


def main():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.3, -0.2, 4.0, 1.1]])
    centered = rewards - rewards.mean(1, keepdim=True)
    golden = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "trl", "transformers")},
        "rewards": rewards.tolist(),
        "advantages": (centered / (nanstd(rewards, dim=1)[:, None] + 1e-4)).tolist(),
        "cases": [case(name, beta, seed) for name in LOSSES for beta in (0.0, 0.04) for seed in (0, 1)],
    }
    Path(__file__).with_name("grpo_golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
