"""Sampling, fine-tuning and reinforcement learning of a DeepSeek model that adds.

Nucleus sampling: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1. Group relative policy optimization: DeepSeekMath
(arXiv:2402.03300), equation 3 with the estimate of the divergence in equation 4 (Schulman's k3), and outcome rewards as
in section 4.1.2. The other two ways to average: DAPO (arXiv:2503.14476), equation 8, and Dr. GRPO (arXiv:2503.20783).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.day01_tensor_basics import pad_stack
from reference.day02_tensor_operations import masked_mean
from reference.day06_training_loop import clip_grad_norm_, train_step
from reference.day07_data_loading import EOS_ID, PAD_ID, ArithmeticDataset, decode, encode
from reference.day10_losses import cross_entropy, log_softmax
from reference.day11_optimizers import AdamW
from reference.day22_kv_cache import left_pad_positions
from reference.day29_deepseek_architecture import DeepSeekConfig
from reference.day31_deepseek_integration import DeepSeekForCausalLM, load_pretrained, read_checkpoint


class Generation(NamedTuple):
    """What was written: tokens, which of them count, and their log-probabilities, each (B, N)."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor


class History(NamedTuple):
    """One number per step of a run."""

    reward: list[float]
    loss: list[float]
    kl: list[float]
    clip_fraction: list[float]
    zero_spread: list[float]


def filtered_probs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the distribution (B, V) that is sampled from: tempered, then cut to the top k, then to the nucleus."""
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k} and top_p {top_p} do not describe a distribution")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
    ranked, order = torch.softmax(logits / temperature, 1).sort(1, descending=True)  # (B, V), twice
    if top_k is not None:
        ranked, order = _scaled(ranked[:, :top_k]), order[:, :top_k]  # (B, K), twice
    if top_p is not None and top_p < 1:  # rounded sums reach 1 before the last token
        before = ranked.cumsum(1) - ranked  # of all that are more probable
        ranked = _scaled(torch.where(before < top_p, ranked, 0.0))
    return torch.zeros_like(logits).scatter(1, order, ranked)  # (B, V)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token (B,) per row of logits (B, V); at temperature 0 the most probable one."""
    probs = filtered_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        return probs.argmax(1)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: int = EOS_ID,
    pad_id: int = PAD_ID,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    mode: str = "auto",
) -> Generation:
    """Continue prompts of any lengths on a latent cache, until every row has ended or max_new_tokens are written."""
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError(
            f"{max_new_tokens} tokens after each of {len(prompts)} prompts, or an empty prompt: nothing to do"
        )
    device = next(model.parameters()).device
    shown, step = _left_padded(prompts, pad_id, device)  # (B, P), twice
    B, P = step.shape
    caches = model.new_caches(B, P + max_new_tokens - 1, model.lm_head.weight.dtype)
    positions = left_pad_positions(shown)  # (B, P)
    done = shown.new_zeros(B)
    tokens, masks, logprobs = [], [], []
    with _evaluating(model):
        while True:
            seen = shown[:, None, None]  # (B, 1, 1, S)
            logits = model(step, positions=positions, mask=seen, caches=caches, mode=mode, last_only=True)[:, 0]
            drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)  # (B,)
            tokens.append(drawn.masked_fill(done, pad_id))
            masks.append(~done)
            logprobs.append(log_softmax(logits).gather(1, drawn[:, None])[:, 0].masked_fill(done, 0.0))
            done = done | (drawn == eos_id)
            if len(tokens) == max_new_tokens or done.all():
                break
            step, positions = tokens[-1][:, None], positions[:, -1:] + 1  # (B, 1), twice
            shown = torch.cat((shown, shown.new_ones(B, 1)), 1)
    return Generation(torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logprobs, 1))


def sequence_logprobs(model: nn.Module, tokens: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Return (B, T-1): the log-probability of tokens[:, t+1] at t where it is part of a response, else 0."""
    if prompt_lengths.shape != tokens.shape[:1]:
        raise ValueError(f"prompt_lengths {tuple(prompt_lengths.shape)} do not fit tokens {tuple(tokens.shape)}")
    logits = model(tokens[:, :-1])  # (B, T-1, V)
    logprobs = log_softmax(logits).gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T-1)
    written = torch.arange(1, tokens.shape[1], device=tokens.device) >= prompt_lengths[:, None]  # (B, T-1)
    return torch.where(written, logprobs, 0.0)


def sft_step(model: nn.Module, batch: dict[str, Tensor], optimizer: Optimizer, *, max_norm: float = 1.0) -> float:
    """One update on the answers of a batch of day 7; return the loss before it."""
    return train_step(model, (batch["input_ids"], batch["labels"]), cross_entropy, optimizer, max_norm=max_norm)


def train_sft(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], optimizer: Optimizer, *, max_norm: float = 1.0
) -> list[float]:
    """One `sft_step` per batch; return all losses."""
    return [sft_step(model, batch, optimizer, max_norm=max_norm) for batch in batches]


def arithmetic_reward(prompt: str, completion: str) -> float:
    """Return 1.0 if what stands before the first <eos> is the reversed sum of "a+b=", to the letter; else 0.0."""
    a, b = prompt.removesuffix("=").split("+")
    answer, end, _ = completion.partition("<eos>")
    return float(bool(end) and answer == str(int(a) + int(b))[::-1])


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """Return (P, G): how much better each sample of a prompt did than its group, in standard deviations of the group."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards {tuple(rewards.shape)} are not (P, G) with two samples or more in a group")
    rewards = rewards.detach()
    centered = rewards - rewards.mean(1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)
    centered = centered.masked_fill(same, 0.0)  # where a mean is rounded
    return centered / (rewards.std(1, keepdim=True) + eps) if scale_by_std else centered


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return exp(d) - d - 1 with d = ref_logp - logp: never negative, and unbiased for KL(policy || reference)."""
    if logp.shape != ref_logp.shape:
        raise ValueError(f"logp {tuple(logp.shape)} does not fit ref_logp {tuple(ref_logp.shape)}")
    difference = ref_logp - logp
    return torch.expm1(difference) - difference


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    beta: float = 0.04,
    aggregate: str = "response",
    max_len: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of N responses of up to T tokens, and a few statistics; all of (N, T), advantages (N,)."""
    if not logp.shape == old_logp.shape == ref_logp.shape == mask.shape or advantages.shape != logp.shape[:1]:
        shapes = [tuple(x.shape) for x in (logp, old_logp, ref_logp, advantages, mask)]
        raise ValueError(f"logp, old_logp, ref_logp, advantages and mask do not fit: {shapes}")
    logp, old, ref = (torch.where(mask, x, 0.0) for x in (logp, old_logp.detach(), ref_logp.detach()))
    ratio = (logp - old).exp()
    gain = advantages.detach()[:, None]  # (N, 1)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    kl = kl_k3(logp, ref)
    per_token = torch.where(mask, beta * kl - torch.minimum(ratio * gain, clipped * gain), 0.0)  # (N, T)
    if aggregate == "response":
        loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()
    elif aggregate == "token":
        loss = per_token.sum() / mask.sum().clamp(min=1)
    elif aggregate == "constant":
        if max_len is None:
            raise ValueError("aggregate 'constant' needs max_len")
        loss = per_token.sum() / (len(logp) * max_len)
    else:
        raise ValueError(f"aggregate {aggregate!r} is none of 'response', 'token', 'constant'")
    stats = {
        "clip_fraction": masked_mean((clipped * gain < ratio * gain).double(), mask).item(),
        "ratio": masked_mean(ratio, mask).item(),
        "kl": masked_mean(kl, mask).item(),
        "zero_advantage": (advantages == 0).double().mean().item(),
    }
    return loss, stats


def load_start(folder: str | Path) -> DeepSeekForCausalLM:
    """Return the model of a folder with config.json and model.safetensors, in float32 and in eval mode."""
    config = json.loads((Path(folder) / "config.json").read_text())
    model = DeepSeekForCausalLM(DeepSeekConfig.from_dict(config))
    load_pretrained(model, read_checkpoint(folder))
    return model.eval()


def greedy_accuracy(model: nn.Module, pairs: Sequence[tuple[int, int]], *, max_new_tokens: int = 4) -> float:
    """Return the share of sums a+b that the model writes exactly right when it takes the most probable tokens."""
    prompts = [encode(f"{a}+{b}=") for a, b in pairs]
    responses = _responses(generate(model, prompts, max_new_tokens, temperature=0))
    return sum(_rewards(prompts, responses, arithmetic_reward)) / len(pairs)


def train_grpo(
    model: nn.Module,
    ref_model: nn.Module,
    dataset: Any,
    *,
    steps: int,
    prompts_per_step: int,
    group_size: int,
    inner_epochs: int,
    lr: float,
    clip: float = 0.2,
    beta: float = 0.04,
    max_new_tokens: int = 4,
    max_norm: float = 1.0,
    reward: Callable[[str, str], float] = arithmetic_reward,
    generator: torch.Generator,
) -> History:
    """Improve a model by its own samples: groups per prompt, advantages within the group, a few updates per step."""
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    history = History([], [], [], [], [])
    device = next(model.parameters()).device
    for _ in range(steps):
        drawn = torch.randint(len(dataset), (prompts_per_step,), generator=generator, device=generator.device)
        prompts = [dataset[int(i)]["prompt"].tolist() for i in drawn for _ in range(group_size)]
        responses = _responses(generate(model, prompts, max_new_tokens, generator=generator))
        rewards = torch.tensor(_rewards(prompts, responses, reward), device=device).view(-1, group_size)  # (P, G)
        advantages = group_advantages(rewards).flatten()  # (P G,)
        tokens, lengths, mask = _joined(prompts, responses, device)  # (N, T), (N,), (N, T-1)
        with torch.no_grad():
            old = sequence_logprobs(model, tokens, lengths)
            ref = sequence_logprobs(ref_model, tokens, lengths)
        for _ in range(inner_epochs):
            optimizer.zero_grad()
            logp = sequence_logprobs(model, tokens, lengths)
            loss, stats = grpo_loss(logp, old, ref, advantages, mask, clip=clip, beta=beta)
            loss.backward()
            clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        history.reward.append(rewards.mean().item())
        history.loss.append(loss.item())
        history.kl.append(stats["kl"])
        history.clip_fraction.append(stats["clip_fraction"])
        history.zero_spread.append((rewards == rewards[:, :1]).all(1).double().mean().item())
    return history


def improve(model: nn.Module, *, steps: int = 40, lr: float = 2e-4, generator: torch.Generator) -> History:
    """Teach a model two-digit sums by its own samples, held near to what it was at the start."""
    before = copy.deepcopy(model)
    return train_grpo(
        model,
        before,
        ArithmeticDataset(2, "train"),
        steps=steps,
        prompts_per_step=32,
        group_size=8,
        inner_epochs=2,
        lr=lr,
        generator=generator,
    )


def kl_penalty(logp: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return an estimate of KL(policy || reference) per token of samples of the old policy, with an unbiased gradient.

    The ratio weighs the samples as if they were the policy's own; without it the gradient of k3 is that of the other
    divergence, and that of k1 is 0 on average.
    """
    ratio = (logp - old_logp.detach()).exp()
    return ratio * kl_k3(logp, ref_logp.detach())


def _scaled(probs: Tensor) -> Tensor:
    """Return each row scaled up to a sum of 1."""
    return probs / probs.sum(1, keepdim=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return shown (B, P), True for tokens of the prompts, and the prompts themselves with padding on the left."""
    width = max(map(len, prompts))
    rows = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    shown = torch.arange(width) >= width - lengths[:, None]
    return shown.to(device), rows.to(device)


def _responses(written: Generation) -> list[list[int]]:
    """Return the tokens of each row that count."""
    return [written.tokens[b, mask].tolist() for b, mask in enumerate(written.mask)]


def _rewards(prompts: list[list[int]], responses: list[list[int]], reward: Callable[[str, str], float]) -> list[float]:
    """Return what each response is worth."""
    return list(map(reward, map(decode, prompts), map(decode, responses)))


def _joined(
    prompts: list[list[int]], responses: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (N, T): prompt, response, padding; the lengths of the prompts; and where (N, T-1) responses are."""
    rows = [torch.tensor(row) for row in map(add, prompts, responses)]
    tokens, ends = pad_stack(rows, PAD_ID)  # (N, T), (N,)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    place = torch.arange(1, tokens.shape[1])
    mask = (place >= starts[:, None]) & (place < ends[:, None])  # (N, T-1)
    return tokens.to(device), starts.to(device), mask.to(device)
