"""Day 32: generate, fine-tune, reinforce. `kata lesson` explains, `kata check` tells you where you are.

B rows, T tokens, P prompts, G samples per prompt (a group), N responses, V vocabulary. Tokens are the ids of day 7:
digits, +, =, <eos> (12) and <pad> (13). A `model` is the DeepSeekForCausalLM of day 31, or anything that has its
`forward`, `new_caches` and `lm_head.weight`. Logarithms are natural. A `generator` lives on the device of the model;
where one is given, torch's global random state is left alone, and the same state of it gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from day01_tensor_basics import pad_stack  # noqa: F401 - yours, if you passed day 1, and so on
from day02_tensor_operations import masked_mean  # noqa: F401
from day06_training_loop import clip_grad_norm_, train_step  # noqa: F401
from day07_data_loading import EOS_ID, PAD_ID, ArithmeticDataset, decode, encode  # noqa: F401
from day10_losses import cross_entropy, log_softmax  # noqa: F401
from day11_optimizers import AdamW  # noqa: F401
from day22_kv_cache import left_pad_positions  # noqa: F401
from day29_deepseek_architecture import DeepSeekConfig  # noqa: F401
from day31_deepseek_integration import DeepSeekForCausalLM, load_pretrained, read_checkpoint  # noqa: F401
from torch import Tensor, nn
from torch.optim import Optimizer


class Generation(NamedTuple):
    """What was written, in three tensors (B, N). Complete as it stands."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor


class History(NamedTuple):
    """One number per step of a run, as floats. Complete as it stands."""

    reward: list[float]
    loss: list[float]
    kl: list[float]
    clip_fraction: list[float]
    zero_spread: list[float]


def arithmetic_reward(prompt: str, completion: str) -> float:
    """Return 1.0 if the completion answers the prompt "a+b=" exactly, else 0.0.

    completion: the text of the tokens that were written, such as "75<eos>". The answer is what stands before its first
        "<eos>"; what comes after that does not matter. Without an "<eos>" there is no answer.
    Right is only the decimal sum with its digits in reverse, as in day 7, character by character: "75" answers "50+7=".
    No superfluous zero, blank, sign or repetition is forgiven.
    """
    raise NotImplementedError


def filtered_probs(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the distribution (B, V) from which `sample` draws; each row of logits (B, V) stands for itself.

    Three filters, in this order; each takes the distribution that the one before it leaves:
    temperature: the logits are divided by it. At 0 everything is on the largest logit, whatever top_k and top_p are.
    top_k: only the k most probable tokens remain, scaled up so that they sum to 1. More than V changes nothing, like
        None.
    top_p: only the smallest set of most probable tokens whose sum reaches top_p remains, scaled up so that it sums
        to 1. The token with which the sum reaches top_p belongs to it, so at least one remains. top_p = 1 keeps every
        token, however improbable it is, and changes nothing, like None.
    Among equally probable tokens any may be preferred.

    What was removed has the probability 0; so has a token with the logit -inf (one logit of each row at least is
    finite). Half precision logits are made float32 first, and the result is float32; float64 stays float64.
    Raises ValueError with the number in its message when temperature is negative, top_k below 1, or top_p not above
    0 and at most 1.
    """
    raise NotImplementedError


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits (B, V): a LongTensor (B,), distributed as `filtered_probs` says.

    The rows are drawn independently of each other, with `generator` (None means torch's global one). At temperature 0
    the most probable token is returned and nothing is drawn. Raises ValueError where `filtered_probs` does.
    """
    raise NotImplementedError


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
    """Continue B prompts (lists of ids, of any lengths) together, token by token; each as if it were alone.

    The first token of each prompt stands at position 0, whatever the padding before it.
    A row ends with its first `eos_id` that is *written* (prompts may contain any id). Writing stops when all rows have
    ended or have max_new_tokens tokens; N is the number of tokens of the longest row.
    Returns tokens (B, N), long: what was written, with its eos_id, then pad_id
            mask (B, N), bool: True where a token was written, the eos_id included
            logprobs (B, N): the log-probability of each token under the model itself, that is, before temperature,
            top_k and top_p; 0 where nothing was written. They have the dtype of the logits and no graph, and may take
            part in a loss.
    Tokens are drawn as `sample` draws, from the logits of the row's last token. `mode` is handed to the model.

    The model runs in eval mode and without gradients; afterwards each of its modules is in the mode in which it was
    before.
    Cost: one call of the model with all prompts, padded on the left to the longest (P tokens), then N - 1 calls with
    one token per row, all on one set of latent caches, which is made for B rows of P + max_new_tokens - 1 places in the
    dtype of the model's weights.
    Raises ValueError when there is no prompt, when a prompt is empty, and when max_new_tokens is below 1.
    """
    raise NotImplementedError


def sequence_logprobs(model: nn.Module, tokens: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Return (B, T-1): at place t the log-probability of tokens[:, t+1], given all tokens up to t.

    tokens: (B, T), each row a prompt and its response, then perhaps padding; prompt_lengths: (B,), each from 1 to T
    Only tokens from place prompt_lengths[b] on count; where the next token still belongs to the prompt, the result
    is 0. The first token of a response is thus scored at the place of the last token of its prompt. Padding is not known
    here: what stands there counts like a response, and whoever uses the result masks it.
    Gradients flow to the model, which is called without caches and in the mode in which it is. The dtype is that of the
    logits.
    Raises ValueError with both shapes when prompt_lengths is not (B,).
    """
    raise NotImplementedError


def sft_step(model: nn.Module, batch: dict[str, Tensor], optimizer: Optimizer, *, max_norm: float = 1.0) -> float:
    """Make one update of the model, in train mode, towards the answers of a batch; return the loss from before it.

    batch: as `pad_collate` of day 7 makes it: "input_ids" (B, T) and "labels" (B, T), already moved by one place, with
        -100 where nothing is to be learned
    loss: the mean cross-entropy over all labels that are not -100
    Old gradients are forgotten first; the new ones are clipped to a joint norm of max_norm before the optimizer's step.
    """
    raise NotImplementedError


def train_sft(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], optimizer: Optimizer, *, max_norm: float = 1.0
) -> list[float]:
    """Make one `sft_step` for each of the batches (any iterable), in their order; return all losses."""
    raise NotImplementedError


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """Return (P, G): what each of the G samples of a prompt earned more than the mean of its own group.

    rewards: (P, G), float32 or float64; the result has its dtype
    scale_by_std: divide by the standard deviation of the group (of a sample: G - 1 in the denominator) plus eps
    A group in which all rewards are equal gets exactly 0, whatever rounding makes of its mean. Groups do not mix. No
    gradient flows back to the rewards.
    Raises ValueError with the shape when rewards are not (P, G) or when G is 1.
    """
    raise NotImplementedError


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return exp(d) - d - 1 with d = ref_logp - logp, for two tensors of one shape, number by number.

    It is 0 where the two are equal and positive elsewhere, and its mean over samples of the policy estimates
    KL(policy || reference) without bias. Gradients flow to both. Two different shapes raise ValueError with both in the
    message.
    """
    raise NotImplementedError


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
    """Return the loss (a scalar tensor) of N responses of up to T tokens, and statistics.

    logp, old_logp, ref_logp: (N, T), log-probabilities of the tokens under the policy, under the policy that sampled
        them, and under the reference; advantages: (N,), one for all tokens of a response; mask: (N, T), bool, True for
        tokens that count
    Each token costs -min(ratio * A, clipped * A) + beta * kl, where ratio = exp(logp - old_logp), clipped is the ratio
        held between 1 - clip and 1 + clip, A is the advantage of its response, and kl is kl_k3(logp, ref_logp).
    aggregate: "response": the mean over the tokens of each response, then the mean over the N responses
               "token": the mean over all tokens of all responses
               "constant": the sum over all tokens, divided by N * max_len
        A response without any token contributes 0 and is one of the N. If no token counts, the loss is 0.
    What stands where the mask is False has no effect, not even NaN, and gets the gradient 0. Gradients flow to logp
    alone.

    The statistics are floats:
      "clip_fraction": the share of tokens where the clipped product is the smaller one, so that the ratio has no
          gradient
      "ratio", "kl": their means over all tokens that count
      "zero_advantage": the share of responses whose advantage is exactly 0
    The first three are 0.0 if no token counts.
    Raises ValueError with all shapes when these do not fit, when aggregate is none of the three (naming it), and when
    it is "constant" without a max_len.
    """
    raise NotImplementedError


def load_start(folder: str | Path) -> DeepSeekForCausalLM:
    """Return the model that a folder holds: its sizes in config.json, its weights in model.safetensors, as on the hub.

    The weights are stored in bfloat16; the model has float32 parameters of exactly these values. It comes in eval mode.
    """
    raise NotImplementedError


def greedy_accuracy(model: nn.Module, pairs: Sequence[tuple[int, int]], *, max_new_tokens: int = 4) -> float:
    """Return the share of pairs (a, b) for which the model, asked "a+b=", writes what `arithmetic_reward` accepts.

    It writes the most probable tokens, at most max_new_tokens for each pair (three digits and <eos> make four). There
    is at least one pair.
    """
    raise NotImplementedError


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
    """Change a model by reinforcement on its own samples, in place; return what happened, one number per step.

    Each step
    - draws prompts_per_step items of the dataset with equal chances, with replacement; item["prompt"] holds its ids
      (day 7)
    - continues each prompt group_size times, by `generate` with at most max_new_tokens tokens and without any filter
    - asks reward(prompt, completion) once for each sample: two texts of day 7's `decode`, the completion ending with
      its "<eos>" if there is one. The samples of a prompt follow one another.
    - takes the `group_advantages` of the rewards, and the log-probabilities of all responses under the model as it is
      now (they stay as they are for the whole step) and under ref_model (which is never changed and gets no gradients)
    - makes inner_epochs updates, each with the `grpo_loss` of all samples of the step under clip and beta ("response"),
      gradients clipped to max_norm, and AdamW without weight decay. There is one AdamW for the whole run, with learning
      rate lr.
    All random numbers come from `generator`.

    reward: the mean of the step's rewards; zero_spread: the share of its groups in which all rewards are equal
    loss, kl, clip_fraction: of the step's last update, from before it. All are floats.
    Cost of a step: one call of `generate` with all samples; at most one more call of the model without gradients,
    inner_epochs with; one call of ref_model. No graph outlives its step.
    """
    raise NotImplementedError


def improve(model: nn.Module, *, steps: int = 40, lr: float = 2e-4, generator: torch.Generator) -> History:
    """Teach a model two-digit sums with `train_grpo`; return its History.

    The data are the "train" part of day 7's ArithmeticDataset with two digits. Each step has 32 prompts, 8 samples of
    each, and 2 inner epochs; everything else is left at its default. The reference is the model as it was before the
    first step, and stays so. From the shipped start, the default 40 steps raise the greedy accuracy on the test pairs
    to 0.80 or more.
    """
    raise NotImplementedError


def kl_penalty(logp: Tensor, old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return one number per token, whose mean and whose gradient's mean are those of a divergence.

    logp, old_logp, ref_logp: log-probabilities of the tokens, three tensors of one shape
    The tokens were drawn from the *old* policy, whose log-probabilities are old_logp. Averaged over such tokens,
    - the result is KL(policy || reference), and
    - its gradient with respect to the parameters of the policy, on which logp depends, is that of KL(policy || reference);
    both exactly, whether the policy is still the old one or not. No gradient flows to old_logp and ref_logp.
    """
    raise NotImplementedError
