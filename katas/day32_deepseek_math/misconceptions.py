"""Day 32: known wrong solutions, each with the sentence for whoever wrote it."""

import torch
from torch.nn import functional as F

from checker.testing import misconception
from reference import day32_deepseek_math as right
from reference.day01_tensor_basics import pad_stack
from reference.day02_tensor_operations import masked_mean
from reference.day06_training_loop import clip_grad_norm_, train_step
from reference.day07_data_loading import EOS_ID, PAD_ID, ArithmeticDataset, decode, encode
from reference.day10_losses import cross_entropy
from reference.day11_optimizers import AdamW
from reference.day22_kv_cache import left_pad_positions

# arithmetic_reward


@misconception(
    "arithmetic_reward",
    "It is enough for you that the right digits occur somewhere. A policy that is paid for this learns to print every number.",
)
def arithmetic_reward__contains(prompt, completion):
    a, b = prompt.removesuffix("=").split("+")
    return float(str(int(a) + int(b))[::-1] in completion and "<eos>" in completion)


@misconception(
    "arithmetic_reward",
    "An answer that never ended was paid. Without <eos> nobody knows where the answer stops, and the policy will ramble on.",
)
def arithmetic_reward__no_end_needed(prompt, completion):
    a, b = prompt.removesuffix("=").split("+")
    return float(completion.partition("<eos>")[0] == str(int(a) + int(b))[::-1])


@misconception(
    "arithmetic_reward",
    "You compare numbers, so 750, read backwards, is still 57. What is asked for is a text, and each superfluous zero is a "
    "token that was paid.",
)
def arithmetic_reward__as_numbers(prompt, completion):
    a, b = prompt.removesuffix("=").split("+")
    answer, end, _ = completion.partition("<eos>")
    try:
        return float(bool(end) and int(answer[::-1]) == int(a) + int(b))
    except ValueError:
        return 0.0


@misconception(
    "arithmetic_reward",
    "The sum is expected with its highest digit first. Since day 7 answers run from the ones upwards.",
)
def arithmetic_reward__not_reversed(prompt, completion):
    a, b = prompt.removesuffix("=").split("+")
    answer, end, _ = completion.partition("<eos>")
    return float(bool(end) and answer == str(int(a) + int(b)))


@misconception(
    "arithmetic_reward",
    "You look at the whole completion, padding and what else follows its end included. The answer is over at the first <eos>.",
)
def arithmetic_reward__to_the_very_end(prompt, completion):
    a, b = prompt.removesuffix("=").split("+")
    return float(completion == str(int(a) + int(b))[::-1] + "<eos>")


# filtered_probs


def _check(temperature, top_k, top_p):
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"{temperature}, {top_k}, {top_p}")


def _filtered(logits, temperature, top_k, top_p, nucleus=None, order="kp", wide=True, temper=None):
    """The right solution, with places to go wrong in."""
    _check(temperature, top_k, top_p)
    logits = logits.float() if wide and logits.dtype != torch.float64 else logits
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    probs = torch.softmax(logits / temperature if temper is None else temper(logits, temperature), -1)
    for letter in order:
        ranked, index = probs.sort(-1, descending=True)
        if letter == "k" and top_k is not None:
            ranked[..., top_k:] = 0
        if letter == "p" and top_p is not None and top_p < 1:
            keep = ranked.cumsum(-1) - ranked < top_p if nucleus is None else nucleus(ranked, top_p)
            ranked = torch.where(keep, ranked, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ranked / ranked.sum(-1, keepdim=True))
    return probs


@misconception(
    "filtered_probs",
    "Your nucleus is that of the distribution before the temperature. A high temperature flattens it, and then more tokens are "
    "needed to reach top_p: temper first, filter what comes out.",
)
def filtered_probs__temperature_last(logits, *, temperature=1.0, top_k=None, top_p=None):
    probs = _filtered(logits, 1.0 if temperature > 0 else temperature, top_k, top_p)
    _check(temperature, top_k, top_p)
    return probs if temperature in (0, 1) else torch.softmax(probs.log() / temperature, -1)


@misconception(
    "filtered_probs",
    "The token with which the sum crosses top_p was dropped. With top_p = 0.1 and a token of 0.9 there is then nothing to draw "
    "from.",
)
def filtered_probs__crossing_token_dropped(logits, *, temperature=1.0, top_k=None, top_p=None):
    return _filtered(logits, temperature, top_k, top_p, nucleus=lambda ranked, p: ranked.cumsum(-1) <= p)


@misconception(
    "filtered_probs",
    "The crossing token was dropped, unless it was the first one. That saves you from an empty nucleus and still keeps a set "
    "whose sum is below top_p.",
)
def filtered_probs__at_least_the_first(logits, *, temperature=1.0, top_k=None, top_p=None):
    def nucleus(ranked, p):
        keep = ranked.cumsum(-1) <= p
        keep[..., 0] = True
        return keep

    return _filtered(logits, temperature, top_k, top_p, nucleus=nucleus)


@misconception(
    "filtered_probs",
    "The nucleus was taken before top_k, or of tokens that were not scaled up in between. Compare top_p with sums of the k tokens "
    "that are left, scaled up to 1.",
)
def filtered_probs__nucleus_before_top_k(logits, *, temperature=1.0, top_k=None, top_p=None):
    return _filtered(logits, temperature, top_k, top_p, order="pk")


@misconception(
    "filtered_probs",
    "The rest was not scaled up: what you return sums to less than 1, and is no distribution.",
)
def filtered_probs__not_normalized(logits, *, temperature=1.0, top_k=None, top_p=None):
    probs = _filtered(logits, temperature, top_k, top_p)
    if temperature == 0:
        return probs
    return torch.where(probs > 0, _filtered(logits, temperature, None, None), 0.0)


@misconception(
    "filtered_probs",
    "You multiply by the temperature. A high temperature should flatten the distribution, and yours sharpens it.",
)
def filtered_probs__multiplied(logits, *, temperature=1.0, top_k=None, top_p=None):
    return _filtered(logits, temperature, top_k, top_p, temper=lambda x, t: x * t)


@misconception(
    "filtered_probs",
    "top_p = 1 lost tokens. In floating point the running sum is 1 before the last of them, so the comparison says that they are "
    "not needed.",
)
def filtered_probs__one_cuts_the_tail(logits, *, temperature=1.0, top_k=None, top_p=None):
    probs = _filtered(logits, temperature, top_k, top_p)
    if temperature == 0 or top_p != 1:
        return probs
    ranked, index = probs.sort(-1, descending=True)
    kept = torch.where(ranked.cumsum(-1) - ranked < 1, ranked, 0.0)
    return torch.zeros_like(probs).scatter(-1, index, kept / kept.sum(-1, keepdim=True))


@misconception(
    "filtered_probs",
    "The probabilities stayed in half precision. bfloat16 has three digits: sums of many tokens stop growing, and the nucleus "
    "never fills.",
)
def filtered_probs__half(logits, *, temperature=1.0, top_k=None, top_p=None):
    return _filtered(logits, temperature, top_k, top_p, wide=False)


# sample


@misconception(
    "sample",
    "The most probable token was taken, at every temperature. That is decoding, and a policy that explores nothing.",
)
def sample__always_the_largest(logits, *, temperature=1.0, top_k=None, top_p=None, generator=None):
    return right.filtered_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p).argmax(-1)


@misconception("sample", "Each token came in a row of its own, (B, 1): the axis of the draws is still there.")
def sample__axis_kept(logits, *, temperature=1.0, top_k=None, top_p=None, generator=None):
    return right.sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)[:, None]


@misconception(
    "sample",
    "The generator was not used: the draws came from torch's global random state, so nobody can repeat them.",
)
def sample__global_state(logits, *, temperature=1.0, top_k=None, top_p=None, generator=None):
    return right.sample(logits, temperature=temperature, top_k=top_k, top_p=top_p)


@misconception("sample", "The filters have no effect: you draw from the plain softmax of the logits.")
def sample__unfiltered(logits, *, temperature=1.0, top_k=None, top_p=None, generator=None):
    probs = right.filtered_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        return probs.argmax(-1)
    return right.sample(logits, generator=generator)


# generate


def _generated(
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
    end_counts=True,
    pad_counts=False,
    placed=True,
    hidden=True,
    own=True,
    early=True,
    evaluate=True,
    once_more=False,
):
    """The right solution, with places to go wrong in."""
    if not prompts or min(map(len, prompts)) < 1 or max_new_tokens < 1:
        raise ValueError("nothing to do")
    device, B, P = next(model.parameters()).device, len(prompts), max(map(len, prompts))
    step = torch.tensor([[pad_id] * (P - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    shown = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts], device=device)
    positions = left_pad_positions(shown) if placed else torch.arange(P, device=device).expand(B, P)
    caches = model.new_caches(B, P + max_new_tokens - 1 + once_more, model.lm_head.weight.dtype)
    done, tokens, masks, logprobs = shown.new_zeros(B), [], [], []
    modes = [(module, module.training) for module in model.modules()]
    if evaluate:
        model.eval()
    while True:
        mask = shown[:, None, None] if hidden else None
        logits = model(step, positions=positions, mask=mask, caches=caches, mode=mode, last_only=True)[:, 0]
        filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        drawn = right.sample(logits, generator=generator, **filters)
        scores = logits.log_softmax(-1) if own else right.filtered_probs(logits, **filters).log()
        ends = drawn == eos_id
        tokens.append(drawn.masked_fill(done, pad_id))
        counts = torch.ones_like(done) if pad_counts else ~done if end_counts else ~(done | ends)
        masks.append(counts)
        logprobs.append(scores.gather(-1, drawn[:, None])[:, 0].masked_fill(done, 0.0))
        done = done | ends
        step, positions = tokens[-1][:, None], positions[:, -1:] + 1
        shown = torch.cat((shown, shown.new_ones(B, 1)), 1)
        if len(tokens) == max_new_tokens or (early and bool(done.all())):
            break
    if once_more:
        mask = shown[:, None, None]
        model(step, positions=positions, mask=mask, caches=caches, mode=mode, last_only=True)
    for module, training in modes:
        module.training = training
    return right.Generation(torch.stack(tokens, 1), torch.stack(masks, 1), torch.stack(logprobs, 1))


@misconception(
    "generate",
    "The mask is False at <eos>. It was written like any other token, and the policy must learn when to write it.",
)
@torch.no_grad()
def generate__end_not_counted(*args, **kwargs):
    return _generated(*args, **kwargs, end_counts=False)


@misconception(
    "generate",
    "The mask is True everywhere. Padding was not written by the policy, and nobody should be rewarded for it.",
)
@torch.no_grad()
def generate__padding_counted(*args, **kwargs):
    return _generated(*args, **kwargs, pad_counts=True)


@misconception(
    "generate",
    "Positions were counted from the left edge of the batch. A short prompt then begins at position 3, say. Rotations see only "
    "distances and forgive it; what looks at a position itself does not.",
)
@torch.no_grad()
def generate__positions_of_the_batch(*args, **kwargs):
    return _generated(*args, **kwargs, placed=False)


@misconception(
    "generate",
    "Short prompts look at their padding. The longest prompt of the batch comes out right, the others do not.",
)
@torch.no_grad()
def generate__padding_is_seen(*args, **kwargs):
    return _generated(*args, **kwargs, hidden=False)


@misconception(
    "generate",
    "Your log-probabilities are those after temperature, top_k and top_p. Training knows nothing of these filters: what it "
    "compares with is the model's own distribution.",
)
@torch.no_grad()
def generate__logprobs_of_the_filtered(*args, **kwargs):
    return _generated(*args, **kwargs, own=False)


@misconception(
    "generate",
    "Writing went on after every row had ended, up to max_new_tokens: steps that produce nothing but padding.",
)
@torch.no_grad()
def generate__never_early(*args, **kwargs):
    return _generated(*args, **kwargs, early=False)


@misconception(
    "generate",
    "The last tokens were sent through the model once more, though nothing is drawn after them: N calls make N tokens.",
)
@torch.no_grad()
def generate__one_call_too_many(*args, **kwargs):
    return _generated(*args, **kwargs, once_more=True)


@misconception(
    "generate",
    "The model ran in the mode in which it was. With dropout, the policy that wrote is then another one than the policy that is "
    "scored and updated.",
)
@torch.no_grad()
def generate__in_train_mode(*args, **kwargs):
    return _generated(*args, **kwargs, evaluate=False)


@misconception(
    "generate",
    "Every step built a graph. It holds the activations of all steps, though nobody will ask for their gradients.",
)
def generate__with_gradients(*args, **kwargs):
    return _generated(*args, **kwargs)


# sequence_logprobs


def _scored(model, tokens, prompt_lengths, inputs=None, targets=None, first=0):
    if prompt_lengths.shape != tokens.shape[:1]:
        raise ValueError(f"{tuple(tokens.shape)} and {tuple(prompt_lengths.shape)}")
    logits = model(tokens[:, :-1])
    targets = tokens[:, 1:] if targets is None else targets
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    places = torch.arange(1, tokens.shape[1], device=tokens.device)
    return torch.where(places >= prompt_lengths[:, None] + first, logprobs, 0.0)


@misconception(
    "sequence_logprobs",
    "Each token was scored by the logits of its own place, which have already seen it. Place t speaks of token t + 1.",
)
def sequence_logprobs__own_place(model, tokens, prompt_lengths):
    return _scored(model, tokens, prompt_lengths, targets=tokens[:, :-1])


@misconception(
    "sequence_logprobs",
    "The first token of each response is missing. It is predicted at the last token of the prompt, one place earlier.",
)
def sequence_logprobs__first_token_missing(model, tokens, prompt_lengths):
    return _scored(model, tokens, prompt_lengths, first=1)


@misconception(
    "sequence_logprobs",
    "The last token of each prompt was scored, too. Nobody sampled it, so there is nothing to learn from it.",
)
def sequence_logprobs__one_too_early(model, tokens, prompt_lengths):
    return _scored(model, tokens, prompt_lengths, first=-1)


@misconception("sequence_logprobs", "Prompts were scored like responses: the result is nowhere 0.")
def sequence_logprobs__prompts_too(model, tokens, prompt_lengths):
    return _scored(model, tokens, prompt_lengths, first=-tokens.shape[1])


# sft_step and train_sft


@misconception(
    "sft_step",
    "The loss takes the prompt along: the model is taught to ask as well, though nobody can predict the digits of a question. "
    "Labels of -100 mean: nothing to learn here.",
)
def sft_step__prompt_too(model, batch, optimizer, *, max_norm=1.0):
    labels = batch["labels"].clone()
    labels[:, :-1] = batch["input_ids"][:, 1:]
    return right.sft_step(model, {**batch, "labels": labels}, optimizer, max_norm=max_norm)


@misconception("sft_step", "Gradients of earlier steps were added up: every step drags all the steps before it along.")
def sft_step__gradients_pile_up(model, batch, optimizer, *, max_norm=1.0):
    model.train()
    loss = cross_entropy(model(batch["input_ids"]), batch["labels"])
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


@misconception(
    "sft_step", "Nothing was clipped: a batch with a gradient that is far too long takes the model far too far."
)
def sft_step__not_clipped(model, batch, optimizer, *, max_norm=1.0):
    return train_step(model, (batch["input_ids"], batch["labels"]), cross_entropy, optimizer)


@misconception(
    "sft_step",
    "The labels were moved by one place a second time. Day 7 has done it: labels[t] is what follows input_ids[t].",
)
def sft_step__shifted_twice(model, batch, optimizer, *, max_norm=1.0):
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return right.sft_step(model, {**batch, "labels": labels}, optimizer, max_norm=max_norm)


@misconception("train_sft", "max_norm did not reach the steps: they are clipped to 1, whatever was asked for.")
def train_sft__norm_forgotten(model, batches, optimizer, *, max_norm=1.0):
    return [right.sft_step(model, batch, optimizer) for batch in batches]


# group_advantages


def _checked(rewards):
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}")
    return rewards.detach()


def _equal(rewards):
    return (rewards == rewards[:, :1]).all(1, keepdim=True)


@misconception(
    "group_advantages",
    "You normalize over the whole batch. Each prompt is its own baseline: this way samples of an easy prompt are praised for the "
    "prompt. A training run will not tell you, it learns almost as well.",
)
def group_advantages__over_the_batch(rewards, *, scale_by_std=True, eps=1e-4):
    rewards = _checked(rewards)
    centered = rewards - rewards.mean()
    return centered / (rewards.std() + eps) if scale_by_std else centered


@misconception(
    "group_advantages",
    "The mean is that of the group, the deviation that of the whole batch. Both belong to the group.",
)
def group_advantages__deviation_of_the_batch(rewards, *, scale_by_std=True, eps=1e-4):
    rewards = _checked(rewards)
    centered = (rewards - rewards.mean(1, keepdim=True)).masked_fill(_equal(rewards), 0.0)
    return centered / (rewards.std() + eps) if scale_by_std else centered


@misconception(
    "group_advantages",
    "A group in which all rewards are equal got tiny advantages: rounding of the mean, blown up by a deviation that is nearly 0. "
    "Solved or hopeless, such a group has nothing to teach.",
)
def group_advantages__noise(rewards, *, scale_by_std=True, eps=1e-4):
    rewards = _checked(rewards)
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + eps) if scale_by_std else centered


@misconception(
    "group_advantages",
    "Without eps a group whose rewards agree divides 0 by 0: NaN, and after one step so is every weight.",
)
def group_advantages__no_eps(rewards, *, scale_by_std=True, eps=1e-4):
    rewards = _checked(rewards)
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / rewards.std(1, keepdim=True) if scale_by_std else centered


@misconception(
    "group_advantages",
    "The deviation divides by G. Rewards of a group are a sample, so its sum of squares is divided by G - 1.",
)
def group_advantages__population(rewards, *, scale_by_std=True, eps=1e-4):
    rewards = _checked(rewards)
    centered = (rewards - rewards.mean(1, keepdim=True)).masked_fill(_equal(rewards), 0.0)
    return centered / (rewards.std(1, keepdim=True, correction=0) + eps) if scale_by_std else centered


@misconception(
    "group_advantages",
    "Mean and deviation run over the prompts, axis 0. A group is a row: its samples answer the same prompt.",
)
def group_advantages__wrong_axis(rewards, *, scale_by_std=True, eps=1e-4):
    rewards = _checked(rewards)
    centered = rewards - rewards.mean(0)
    return centered / (rewards.std(0) + eps) if scale_by_std else centered


# kl_k3


def _same(logp, ref_logp):
    if logp.shape != ref_logp.shape:
        raise ValueError(f"{tuple(logp.shape)} and {tuple(ref_logp.shape)}")


@misconception(
    "kl_k3",
    "This is k1, the plain difference. Its mean is right and single values are negative; as a term of a loss its gradient is 0 on "
    "average, so it holds nothing back.",
)
def kl_k3__k1(logp, ref_logp):
    _same(logp, ref_logp)
    return logp - ref_logp


@misconception(
    "kl_k3", "This is k2, half the squared difference. It is never negative either, but its mean is not the divergence."
)
def kl_k3__k2(logp, ref_logp):
    _same(logp, ref_logp)
    return (logp - ref_logp).square() / 2


@misconception(
    "kl_k3",
    "d has the wrong sign. Averaged over the policy's samples, this does not give the divergence from policy to reference.",
)
def kl_k3__other_sign(logp, ref_logp):
    _same(logp, ref_logp)
    return (logp - ref_logp).exp() - (logp - ref_logp) - 1


# grpo_loss


def _cost(ratio, gain, clip):
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)


def _mean_by_response(x, mask):
    return (x.sum(1) / mask.sum(1).clamp(min=1)).mean()


def _loss(
    logp,
    old_logp,
    ref_logp,
    advantages,
    mask,
    *,
    clip=0.2,
    beta=0.04,
    aggregate="response",
    max_len=None,
    cost=_cost,
    response=_mean_by_response,
    leash=1.0,
    frozen=True,
    token=None,
):
    """The right solution, with places to go wrong in."""
    _, stats = right.grpo_loss(
        logp, old_logp, ref_logp, advantages, mask, clip=clip, beta=beta, aggregate=aggregate, max_len=max_len
    )
    if frozen:
        old_logp, ref_logp, advantages = old_logp.detach(), ref_logp.detach(), advantages.detach()
    logp, old, ref = (torch.where(mask, x, 0.0) for x in (logp, old_logp, ref_logp))
    each = cost((logp - old).exp(), advantages[:, None], clip) + leash * beta * right.kl_k3(logp, ref)
    each = torch.where(mask, each, 0.0)
    if aggregate == "response":
        return response(each, mask), stats
    if aggregate == "token":
        return (each.sum() / mask.sum().clamp(min=1) if token is None else token(each, mask)), stats
    return each.sum() / (len(mask) * max_len), stats


@misconception(
    "grpo_loss",
    "The sign is turned around: tokens with a positive advantage become less probable. The loss is what goes down, so the gain "
    "enters it with a minus.",
)
def grpo_loss__other_sign(*args, **kwargs):
    return _loss(*args, **kwargs, cost=lambda ratio, gain, clip: -_cost(ratio, gain, clip))


@misconception(
    "grpo_loss",
    "You took the larger of the two products. Clipping then stops exactly the steps that would repair something, and lets pass "
    "those that go too far.",
)
def grpo_loss__larger_product(*args, **kwargs):
    def cost(ratio, gain, clip):
        return -torch.maximum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)

    return _loss(*args, **kwargs, cost=cost)


@misconception(
    "grpo_loss",
    "The ratio is clipped on both sides, whatever the advantage is. A token that became rare and turns out to be good then gets "
    "no gradient, and stays rare.",
)
def grpo_loss__always_clipped(*args, **kwargs):
    return _loss(*args, **kwargs, cost=lambda ratio, gain, clip: -ratio.clamp(1 - clip, 1 + clip) * gain)


@misconception(
    "grpo_loss",
    "Nothing is clipped: with several updates on the same samples the policy runs away from the one that wrote them.",
)
def grpo_loss__never_clipped(*args, **kwargs):
    return _loss(*args, **kwargs, cost=lambda ratio, gain, clip: -ratio * gain)


@misconception(
    "grpo_loss",
    "The ratio has no derivative here: at first its value is 1, and what moves the policy is that it would change. Whoever "
    "sees a loss of 0 and detaches, or subtracts something from itself, learns nothing.",
)
def grpo_loss__ratio_without_gradient(*args, **kwargs):
    return _loss(*args, **kwargs, cost=lambda ratio, gain, clip: _cost(ratio.detach(), gain, clip))


@misconception(
    "grpo_loss",
    "The mean of a response was taken over all T places. Short answers are thinned out by their padding, and the policy learns "
    "that long ones weigh more.",
)
def grpo_loss__padding_in_the_mean(*args, **kwargs):
    return _loss(*args, **kwargs, response=lambda x, mask: x.mean(1).mean())


@misconception(
    "grpo_loss",
    "'response' came out as the mean over all tokens: long responses have more say. Average each response by itself first.",
)
def grpo_loss__response_by_token(*args, **kwargs):
    return _loss(*args, **kwargs, response=lambda x, mask: x.sum() / mask.sum().clamp(min=1))


@misconception("grpo_loss", "The tokens of a response were added up, not averaged: a longer answer counts for more.")
def grpo_loss__sum_of_the_response(*args, **kwargs):
    return _loss(*args, **kwargs, response=lambda x, mask: x.sum(1).mean())


@misconception(
    "grpo_loss",
    "'token' came out as the mean of the responses' means. Every token should weigh the same, in whichever response it stands.",
)
def grpo_loss__token_by_response(*args, **kwargs):
    return _loss(*args, **kwargs, token=_mean_by_response)


@misconception(
    "grpo_loss",
    "The divergence has the wrong sign: the loss goes down when the policy leaves the reference, so it is pushed away.",
)
def grpo_loss__pushed_away(*args, **kwargs):
    return _loss(*args, **kwargs, leash=-1.0)


@misconception("grpo_loss", "beta has no effect: the policy is not held to the reference at all.")
def grpo_loss__no_leash(*args, **kwargs):
    return _loss(*args, **kwargs, leash=0.0)


@misconception(
    "grpo_loss",
    "Gradients flow into old_logp, ref_logp or the advantages. They were measured before this update, and are constants in it.",
)
def grpo_loss__nothing_frozen(*args, **kwargs):
    return _loss(*args, **kwargs, frozen=False)


@misconception(
    "grpo_loss",
    "Multiplying by the mask does not hide NaN or infinity, since 0 times either is NaN. Put something harmless under the mask "
    "before you take the exponential.",
)
def grpo_loss__mask_multiplied(
    logp, old_logp, ref_logp, advantages, mask, *, clip=0.2, beta=0.04, aggregate="response", max_len=None
):
    _, stats = right.grpo_loss(
        logp, old_logp, ref_logp, advantages, mask, clip=clip, beta=beta, aggregate=aggregate, max_len=max_len
    )
    old_logp, ref_logp, gain = old_logp.detach(), ref_logp.detach(), advantages.detach()[:, None]
    each = (_cost((logp - old_logp).exp(), gain, clip) + beta * right.kl_k3(logp, ref_logp)) * mask
    if aggregate == "response":
        return _mean_by_response(each, mask), stats
    return each.sum() / (mask.sum().clamp(min=1) if aggregate == "token" else len(mask) * max_len), stats


@misconception(
    "grpo_loss",
    "clip_fraction counts every ratio outside of the interval. On one side clipping acts only where the advantage is positive, on "
    "the other only where it is negative.",
)
def grpo_loss__outside_is_clipped(
    logp, old_logp, ref_logp, advantages, mask, *, clip=0.2, beta=0.04, aggregate="response", max_len=None
):
    options = {"clip": clip, "beta": beta, "aggregate": aggregate, "max_len": max_len}
    loss, stats = right.grpo_loss(logp, old_logp, ref_logp, advantages, mask, **options)
    ratio = torch.where(mask, logp - old_logp, 0.0).exp()
    outside = (ratio < 1 - clip) | (ratio > 1 + clip)
    return loss, {**stats, "clip_fraction": masked_mean(outside.double(), mask).item()}


# load_start and greedy_accuracy


@misconception(
    "greedy_accuracy",
    "The answers were sampled. Greedy means temperature 0: what the model believes most, the same at every call.",
)
def greedy_accuracy__sampled(model, pairs, *, max_new_tokens=4):
    prompts = [encode(f"{a}+{b}=") for a, b in pairs]
    written = right.generate(model, prompts, max_new_tokens)
    texts = [decode(row) for row in written.tokens.tolist()]
    rewards = [right.arithmetic_reward(f"{a}+{b}=", text) for (a, b), text in zip(pairs, texts, strict=True)]
    return sum(rewards) / len(pairs)


@misconception(
    "load_start",
    "The parameters are bfloat16, as in the file. Storage is one thing: to learn in steps of 2e-4, weights need more than three "
    "digits.",
)
def load_start__bfloat16(folder):
    return right.load_start(folder).bfloat16()


# train_grpo


def _trained(
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
    fresh_old=False,
    batch_baseline=False,
    all_places=False,
    greedy=False,
    new_optimizer=False,
    decay=0.0,
):
    """The right solution, with places to go wrong in."""
    device = next(model.parameters()).device
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=decay)
    history = right.History([], [], [], [], [])
    for _ in range(steps):
        if new_optimizer:
            optimizer = AdamW(model.parameters(), lr=lr, weight_decay=decay)
        drawn = torch.randint(len(dataset), (prompts_per_step,), generator=generator, device=generator.device)
        prompts = [dataset[i]["prompt"].tolist() for i in drawn.tolist() for _ in range(group_size)]
        temperature = 0 if greedy else 1.0
        written = right.generate(model, prompts, max_new_tokens, temperature=temperature, generator=generator)
        answers = [row[m].tolist() for row, m in zip(written.tokens, written.mask, strict=True)]
        rewards = [reward(decode(p), decode(a)) for p, a in zip(prompts, answers, strict=True)]
        rewards = torch.tensor(rewards, device=device).view(-1, group_size)
        A = group_advantages__over_the_batch(rewards) if batch_baseline else right.group_advantages(rewards)
        rows = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
        tokens, ends = (x.to(device) for x in pad_stack(rows, PAD_ID))
        starts = torch.tensor([len(p) for p in prompts], device=device)
        places = torch.arange(1, tokens.shape[1], device=device)
        mask = places >= starts[:, None]
        if not all_places:
            mask &= places < ends[:, None]
        with torch.no_grad():
            old = right.sequence_logprobs(model, tokens, starts)
            ref = right.sequence_logprobs(ref_model, tokens, starts)
        for _ in range(inner_epochs):
            optimizer.zero_grad()
            logp = right.sequence_logprobs(model, tokens, starts)
            before = logp.detach() if fresh_old else old
            loss, stats = right.grpo_loss(logp, before, ref, A.flatten(), mask, clip=clip, beta=beta)
            loss.backward()
            clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        same = (rewards == rewards[:, :1]).all(1).double().mean().item()
        for values, value in zip(
            history, (rewards.mean().item(), loss.item(), stats["kl"], stats["clip_fraction"], same), strict=True
        ):
            values.append(value)
    return history


@misconception(
    "train_grpo",
    "The old log-probabilities are taken anew before each update. The ratio is then 1 forever and clipping never acts: freeze "
    "them when the samples are written.",
)
def train_grpo__old_taken_anew(*args, **kwargs):
    return _trained(*args, **kwargs, fresh_old=True)


@misconception(
    "train_grpo",
    "Advantages are taken over all samples of the step. Each prompt is its own baseline; hard and easy ones must not be compared.",
)
def train_grpo__batch_baseline(*args, **kwargs):
    return _trained(*args, **kwargs, batch_baseline=True)


@misconception(
    "train_grpo",
    "Padding takes part in the loss: everything after the prompt counts as response, and short answers are thinned out.",
)
def train_grpo__padding_counts(*args, **kwargs):
    return _trained(*args, **kwargs, all_places=True)


@misconception(
    "train_grpo",
    "All samples of a prompt are the same, the most probable one. A group without differences teaches nothing: sample.",
)
def train_grpo__greedy(*args, **kwargs):
    return _trained(*args, **kwargs, greedy=True)


@misconception(
    "train_grpo",
    "Every step begins with a new optimizer, which has forgotten its averages: each first update is a full step in every weight.",
)
def train_grpo__new_optimizer(*args, **kwargs):
    return _trained(*args, **kwargs, new_optimizer=True)


@misconception(
    "train_grpo", "The weights decay, also where no reward asks for it: AdamW's default has to be switched off."
)
def train_grpo__weights_decay(*args, **kwargs):
    return _trained(*args, **kwargs, decay=0.01)


# improve


@misconception(
    "improve",
    "The reference is the model itself, so it learns along and the divergence from it is always 0. Keep a copy of the start.",
)
def improve__no_copy(model, *, steps=40, lr=2e-4, generator):
    sizes = {"prompts_per_step": 32, "group_size": 8, "inner_epochs": 2}
    return right.train_grpo(
        model, model, ArithmeticDataset(2, "train"), steps=steps, lr=lr, generator=generator, **sizes
    )


# kl_penalty


@misconception(
    "kl_penalty",
    "This is k3 as it stands. Its mean is right while the policy is the old one, but the gradient's mean is that of the other "
    "divergence, KL(reference || policy).",
)
def kl_penalty__plain_k3(logp, old_logp, ref_logp):
    return right.kl_k3(logp, ref_logp.detach())


@misconception(
    "kl_penalty",
    "The plain difference logp - ref_logp has a gradient whose mean is 0: the samples do not know that the policy moves. Something "
    "must weigh them anew.",
)
def kl_penalty__plain_k1(logp, old_logp, ref_logp):
    return logp - ref_logp.detach()


@misconception(
    "kl_penalty",
    "The weights are right and cut off from the graph. That corrects the value; the gradient must also know that the policy would "
    "draw other tokens.",
)
def kl_penalty__detached_ratio(logp, old_logp, ref_logp):
    return (logp - old_logp).exp().detach() * right.kl_k3(logp, ref_logp.detach())


@misconception(
    "kl_penalty",
    "The squared difference has the right gradient only as long as the policy is the one that sampled, and its value is never the "
    "divergence.",
)
def kl_penalty__k2(logp, old_logp, ref_logp):
    return (logp - ref_logp.detach()).square() / 2
