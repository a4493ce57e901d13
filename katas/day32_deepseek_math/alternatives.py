"""Day 32: right solutions, written differently."""

import copy
import json
import math
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import alternative
from reference import day32_deepseek_math as right
from reference.day07_data_loading import EOS_ID, PAD_ID, ArithmeticDataset, decode, encode
from reference.day29_deepseek_architecture import DeepSeekConfig
from reference.day31_deepseek_integration import DeepSeekForCausalLM, load_pretrained, read_checkpoint


@alternative("arithmetic_reward")
def arithmetic_reward__pattern(prompt, completion):
    a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)=", prompt).groups())
    wanted = "".join(reversed(str(a + b))) + "<eos>"
    return 1.0 if completion.startswith(wanted) else 0.0


@alternative("filtered_probs")
def filtered_probs__on_logits(logits, *, temperature=1.0, top_k=None, top_p=None):
    """With -inf in place of what is removed, and a softmax after each filter."""
    for name, value, fits in (
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not fits:
            raise ValueError(f"{name} = {value}")
    B, V = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
    if temperature == 0:
        return (torch.arange(V, device=logits.device) == logits.max(-1).indices[:, None]).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, V), dim=-1).indices
        logits = torch.full_like(logits, -math.inf).scatter(1, kept, logits.gather(1, kept))
    if top_p is not None and top_p != 1:
        for b in range(B):
            probs, order = logits[b].softmax(-1).sort(descending=True)
            n = int((probs.cumsum(0) < top_p).sum()) + 1
            logits[b, order[n:]] = -math.inf
    return F.softmax(logits, dim=-1)


@alternative("sample")
def sample__by_inversion(logits, *, temperature=1.0, top_k=None, top_p=None, generator=None):
    """The first token at which the running sum exceeds a uniform number."""
    probs = right.filtered_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p).double()
    if temperature == 0:
        return probs.max(-1).indices
    u = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=torch.float64)
    steps = probs.cumsum(-1)
    return torch.searchsorted(steps, u * steps[:, -1:], right=True)[:, 0]


@alternative("generate")
def generate__with_buffers(
    model,
    prompts,
    max_new_tokens,
    *,
    eos_id=EOS_ID,
    pad_id=PAD_ID,
    temperature=1.0,
    top_k=None,
    top_p=None,
    generator=None,
    mode="auto",
):
    """All tensors made at their full size, positions by counting, full masks."""
    lengths = [len(prompt) for prompt in prompts]
    if max_new_tokens <= 0 or not lengths or 0 in lengths:
        raise ValueError("there is nothing to write, or nothing to continue")
    weight = model.lm_head.weight
    B, P = len(prompts), max(lengths)
    S = P + max_new_tokens - 1
    ids = torch.full((B, P), pad_id, device=weight.device)
    shown = torch.zeros(B, S, dtype=torch.bool, device=weight.device)
    for b, prompt in enumerate(prompts):
        ids[b, P - len(prompt) :] = torch.tensor(prompt, device=weight.device)
        shown[b, P - len(prompt) :] = True
    first = torch.tensor([P - n for n in lengths], device=weight.device)[:, None]
    tokens = torch.full((B, max_new_tokens), pad_id, device=weight.device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=weight.device)
    scores = None
    alive = torch.ones(B, dtype=torch.bool, device=weight.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        caches = model.new_caches(B, S, dtype=weight.dtype)
        n = start = 0
        while n < max_new_tokens and alive.any():
            end = start + ids.shape[1]
            positions = (torch.arange(start, end, device=weight.device) - first).clamp(min=0)
            seen = shown[:, None, None, :end].expand(B, 1, end - start, end)
            logits = model(ids, positions=positions, mask=seen, caches=caches, mode=mode)[:, -1]
            if scores is None:
                scores = logits.new_zeros(B, max_new_tokens)
            new = right.sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            tokens[alive, n], mask[:, n] = new[alive], alive
            scores[alive, n] = -F.cross_entropy(logits[alive], new[alive], reduction="none")
            alive = alive & (new != eos_id)
            ids, start, n = tokens[:, n : n + 1].clone(), end, n + 1
    for module, training in modes.items():
        module.training = training
    return right.Generation(tokens[:, :n], mask[:, :n], scores[:, :n])


@alternative("sequence_logprobs")
def sequence_logprobs__cross_entropy(model, tokens, prompt_lengths):
    B, T = tokens.shape
    if tuple(prompt_lengths.shape) != (B,):
        raise ValueError(f"{prompt_lengths.shape} for {tokens.shape}")
    logits = model(tokens)[:, :-1]
    rows = []
    for b, n in enumerate(prompt_lengths.tolist()):
        scores = -F.cross_entropy(logits[b, n - 1 :], tokens[b, n:], reduction="none")
        rows.append(F.pad(scores, (T - 1 - len(scores), 0)))
    return torch.stack(rows)


@alternative("sft_step")
def sft_step__by_hand(model, batch, optimizer, *, max_norm=1.0):
    model.train()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    loss = F.cross_entropy(model(batch["input_ids"]).transpose(1, 2), batch["labels"])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return float(loss.detach())


@alternative("train_sft")
def train_sft__loop(model, batches, optimizer, *, max_norm=1.0):
    losses = []
    for batch in batches:
        losses.append(right.sft_step(model, batch, optimizer, max_norm=max_norm))
    return losses


@alternative("group_advantages")
@torch.no_grad()
def group_advantages__row_by_row(rewards, *, scale_by_std=True, eps=1e-4):
    if rewards.ndim != 2 or rewards.size(1) == 1:
        raise ValueError(f"a group needs two rewards: {rewards.shape}")
    out = torch.zeros_like(rewards)
    for p, row in enumerate(rewards):
        if row.max() > row.min():
            out[p] = row - row.sum() / len(row)
            if scale_by_std:
                out[p] /= out[p].square().sum().div(len(row) - 1).sqrt() + eps
    return out


@alternative("kl_k3")
def kl_k3__as_written(logp, ref_logp):
    if logp.shape != ref_logp.shape:
        raise ValueError(f"shapes {logp.shape} and {ref_logp.shape}")
    return torch.exp(ref_logp - logp) - (ref_logp - logp) - 1


@alternative("grpo_loss")
def grpo_loss__tokens_picked_out(
    logp, old_logp, ref_logp, advantages, mask, *, clip=0.2, beta=0.04, aggregate="response", max_len=None
):
    """Only tokens that count are looked at, each with a weight that says how its response is averaged."""
    N = len(logp)
    for x in (old_logp, ref_logp, mask, advantages[:, None].expand(len(advantages), logp.shape[1])):
        if x.shape != logp.shape:
            raise ValueError([list(y.shape) for y in (logp, old_logp, ref_logp, advantages, mask)])
    if aggregate not in ("response", "token", "constant") or (aggregate == "constant" and not max_len):
        raise ValueError(f"aggregate={aggregate}, max_len={max_len}")
    lengths = mask.sum(-1)
    weight = {
        "response": lambda: 1 / (N * lengths.clamp(min=1)),
        "token": lambda: (1 / lengths.sum().clamp(min=1)).expand(N),
        "constant": lambda: torch.full_like(advantages, 1 / (N * max_len)),
    }[aggregate]()
    row, _ = mask.nonzero(as_tuple=True)
    new, old, ref = logp[mask], old_logp[mask].detach(), ref_logp[mask].detach()
    A, weight = advantages.detach()[row], weight[row].to(logp.dtype)
    log_ratio, d = new - old, ref - new
    ratio = log_ratio.exp()
    stopped = ((A > 0) & (ratio > 1 + clip)) | ((A < 0) & (ratio < 1 - clip))
    bound = torch.where(A > 0, 1 + clip, 1 - clip).to(ratio.dtype)
    gain = torch.where(stopped, bound * A, ratio * A)
    kl = d.exp() - d - 1
    loss = (weight * (beta * kl - gain)).sum()
    n = max(1, len(new))
    stats = {
        "clip_fraction": stopped.sum().item() / n,
        "ratio": ratio.sum().item() / n,
        "kl": kl.sum().item() / n,
        "zero_advantage": (advantages == 0).sum().item() / N,
    }
    return loss, stats


@alternative("load_start")
def load_start__step_by_step(folder):
    folder = Path(folder)
    with open(folder / "config.json") as file:
        model = DeepSeekForCausalLM(DeepSeekConfig.from_dict(json.load(file)))
    load_pretrained(model, {name: tensor.float() for name, tensor in read_checkpoint(folder).items()})
    model.train(False)
    return model


@alternative("greedy_accuracy")
def greedy_accuracy__one_by_one(model, pairs, *, max_new_tokens=4):
    """In pieces of a hundred, compared as ids."""
    right_ones = 0
    for start in range(0, len(pairs), 100):
        part = pairs[start : start + 100]
        written = right.generate(model, [encode(f"{a}+{b}=") for a, b in part], max_new_tokens, temperature=0.0)
        for (a, b), ids, mask in zip(part, written.tokens, written.mask, strict=True):
            right_ones += ids[mask].tolist() == [*encode(str(a + b)[::-1]), EOS_ID]
    return right_ones / len(pairs)


@alternative("train_grpo")
def train_grpo__padded_prompts_and_own_scores(
    model,
    ref_model,
    dataset,
    *,
    steps,
    prompts_per_step,
    group_size,
    inner_epochs,
    lr,
    clip=0.2,
    beta=0.04,
    max_new_tokens=4,
    max_norm=1.0,
    reward=right.arithmetic_reward,
    generator,
):
    """What `generate` returns serves as old log-probabilities; torch's own AdamW; numbers drawn one by one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rows = []
    for _ in range(steps):
        prompts = []
        for _ in range(prompts_per_step):
            u = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()
            prompts += [dataset[int(u * len(dataset))]["prompt"].tolist()] * group_size
        written = right.generate(model, prompts, max_new_tokens, generator=generator)
        B, N = written.tokens.shape
        T = max(map(len, prompts)) + N
        tokens = written.tokens.new_full((B, T), PAD_ID)
        mask = torch.zeros(B, T - 1, dtype=torch.bool, device=tokens.device)
        old = written.logprobs.new_zeros(B, T - 1)
        rewards = []
        for b, prompt in enumerate(prompts):
            answer = written.tokens[b][written.mask[b]]
            end = len(prompt) + len(answer)
            tokens[b, : len(prompt)] = tokens.new_tensor(prompt)
            tokens[b, len(prompt) : end] = answer
            mask[b, len(prompt) - 1 : end - 1] = True
            old[b, len(prompt) - 1 : end - 1] = written.logprobs[b][written.mask[b]]
            rewards.append(reward(decode(prompt), decode(answer.tolist())))
        rewards = torch.tensor(rewards, device=tokens.device, dtype=torch.float64).reshape(-1, group_size)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
        advantages = right.group_advantages(rewards).reshape(-1)
        with torch.no_grad():
            ref = right.sequence_logprobs(ref_model, tokens, lengths)
        for _ in range(inner_epochs):
            logp = right.sequence_logprobs(model, tokens, lengths)
            loss, stats = right.grpo_loss(logp, old, ref, advantages, mask, clip=clip, beta=beta)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        agree = (rewards.amax(1) == rewards.amin(1)).double().mean()
        rows.append((float(rewards.mean()), loss.item(), stats["kl"], stats["clip_fraction"], float(agree)))
    return right.History(*(list(column) for column in zip(*rows, strict=True)))


@alternative("improve")
def improve__frozen_reference(model, *, steps=40, lr=2e-4, generator):
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    data = ArithmeticDataset(2, "train")
    return right.train_grpo(
        model, frozen, data, steps=steps, prompts_per_step=32, group_size=8, inner_epochs=2, lr=lr, generator=generator
    )


@alternative("kl_penalty")
def kl_penalty__weighted_k1(logp, old_logp, ref_logp):
    """The plain difference, weighted by the ratio."""
    return torch.exp(logp - old_logp.detach()) * (logp - ref_logp.detach())
