"""Day 32: what the tasks promise."""

import copy
import json
import math
import re

import pytest
import torch
import torch._dynamo  # the first optimizer imports it, which would be counted as the time of some test
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from checker.testing import (
    assert_close,
    assert_equal,
    assert_gradients_close,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    noncontiguous,
    task,
)
from reference.day07_data_loading import ArithmeticDataset, decode, encode, pad_collate
from reference.day29_deepseek_architecture import DeepSeekConfig
from reference.day31_deepseek_integration import DeepSeekForCausalLM, init_weights_

V, EOS, PAD = 14, 12, 13
START_CORRECT = 181  # of the 500 test pairs, written right by the shipped model
AFTER = 0.80  # its greedy accuracy after the run
GENTLE = [0.3, -0.5, 0.9, 0.0, 1.2, -0.2, 0.7]  # logits of which even the least one comes often enough to be counted

SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}


def dice(device, seed):
    """A generator where the model lives."""
    return torch.Generator(device=device).manual_seed(seed)


def deepseek(seed, device, dtype=torch.float64):
    """A small DeepSeek model with random weights, large enough that its tokens have something to say."""
    model = DeepSeekForCausalLM(DeepSeekConfig(**SIZES))
    init_weights_(model, 0.4, generator=torch.Generator().manual_seed(seed))
    return model.to(device=device, dtype=dtype).eval()


class Places:
    """The length of a cache, and nothing in it."""

    def __init__(self, max_len):
        self.max_len, self.length = max_len, 0


class Bigram(nn.Module):
    """A language model that sees the last token alone: its logits are table[token]. It writes down how it is called."""

    def __init__(self, table):
        super().__init__()
        self.lm_head = nn.Linear(len(table), len(table), bias=False, dtype=table.dtype, device=table.device)
        self.lm_head.weight = nn.Parameter(table.T.clone())
        self.dropout = nn.Dropout(0.5)
        self.calls, self.made = [], []

    def new_caches(self, batch, max_len, dtype=torch.float32, device=None):
        self.made.append((batch, max_len, dtype))
        return [Places(max_len)]

    def forward(self, tokens, *, positions=None, mask=None, caches=None, mode="auto", last_only=False):
        self.calls.append(
            {
                "shape": tuple(tokens.shape),
                "cached": caches is not None,
                "gradients": torch.is_grad_enabled(),
                "train": self.training,
                "mode": mode,
                "last": None if positions is None else positions.expand(tokens.shape)[:, -1].tolist(),
            }
        )
        for cache in caches or []:
            cache.length += tokens.shape[1]
            if cache.length > cache.max_len:
                raise ValueError(f"{cache.length} tokens do not fit into a cache of {cache.max_len} places")
        logits = self.lm_head.weight.T[tokens]  # (B, T, V)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) + self.nudge(tokens, caches)
        if self.training:  # no wilder than dropout
            logits = logits.flip(-1)
        return logits[:, -1:] if last_only else logits

    def nudge(self, tokens, caches):
        return 0.0


class Adder(Bigram):
    """A Bigram that can add, though it is not too sure of itself."""

    def nudge(self, tokens, caches):
        rows = tokens.tolist()
        if caches and caches[0].length > tokens.shape[1]:
            self.seen = [old + new for old, new in zip(self.seen, rows, strict=True)]
        elif caches:
            self.seen = rows
        extra = torch.zeros(*tokens.shape, V, dtype=torch.float64)
        for b, row in enumerate(self.seen if caches else rows):
            start, end = 0, row.index(encode("=")[0])
            while row[start] == PAD:
                start += 1
            a, c = decode(row[start:end]).split("+")
            answer = [*encode(str(int(a) + int(c))[::-1]), EOS]
            for t in range(tokens.shape[1]):
                place = len(row) - tokens.shape[1] + t - end
                if 0 <= place < len(answer):
                    extra[b, t, answer[place]] = 3.0
        return extra.to(tokens.device)


def chain(device, **following):
    """A Bigram in which `following` says what comes after each token, all but surely; EOS after all others."""
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    for token in range(V):
        table[token, following.get(f"t{token}", EOS)] = 60.0
    return Bigram(table).eval()


def answers(device, written):
    """A model that answers each prompt with a text, looked up; tokens of padding in a prompt are passed over."""
    return Answers(written).to(device).eval()


class Answers(nn.Module):
    def __init__(self, written):
        super().__init__()
        self.written = written
        self.lm_head = nn.Linear(V, V, bias=False)

    def new_caches(self, batch, max_len, dtype=torch.float32, device=None):
        self.step = 0
        return [Places(max_len)]

    def forward(self, tokens, *, positions=None, mask=None, caches=None, mode="auto", last_only=False):
        if self.step == 0:
            self.rows = [self.written[decode([t for t in row if t != PAD])] for row in tokens.tolist()]
        logits = torch.zeros(len(tokens), tokens.shape[1], V, device=tokens.device)
        for b, text in enumerate(self.rows):
            ids = ids_of(text)
            logits[b, -1, ids[self.step] if self.step < len(ids) else 0] = 5.0
        self.step += 1
        return logits[:, -1:] if last_only else logits


def ids_of(text):
    """The tokens of a text in which <eos> and <pad> are written out."""
    names = re.findall(r"<eos>|<pad>|.", text)
    return [EOS if name == "<eos>" else PAD if name == "<pad>" else encode(name)[0] for name in names]


def alone(model, prompt, n, **ids):
    """What a model writes greedily after one prompt, without any cache: (tokens, log-probabilities)."""
    device = next(model.parameters()).device
    row, written, logprobs = list(prompt), [], []
    with torch.no_grad():
        for _ in range(n):
            logits = model(torch.tensor([row], device=device))[0, -1]
            token = int(logits.argmax())
            logprobs.append(float(logits[token] - torch.logsumexp(logits, 0)))
            written.append(token)
            row.append(token)
            if token == EOS:
                break
    return written, logprobs


def scored(model, prompt, response):
    """Log-probabilities (R,) of a response, token by token, by a call of the model for this row alone."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([prompt + response], device=device))[0]
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    picked = [logits[t, token] - logits[t].logsumexp(0) for t, token in zip(places, response, strict=True)]
    return torch.stack(picked)


def padded(rows, fill, n, dtype, device):
    """Rows of one length n, filled up on the right."""
    return torch.tensor([list(row) + [fill] * (n - len(row)) for row in rows], dtype=dtype, device=device)


def far(df):
    """A bound that a chi-square with df degrees of freedom stays below, but for a chance of about 1e-12."""
    return df * (1 - 2 / (9 * df) + 7 * math.sqrt(2 / (9 * df))) ** 3


def surprise(draws, probs):
    """Chi-square of draws against probabilities (list); infinite when something came that cannot come."""
    counts = torch.bincount(draws.flatten().cpu(), minlength=len(probs)).tolist()
    n = sum(counts)
    if any(count and not p for count, p in zip(counts, probs, strict=True)):
        return math.inf
    return sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, probs, strict=True) if p)


def shares(draws):
    """How often each token came, in tenths: what a message shows."""
    counts = torch.bincount(draws.flatten().cpu(), minlength=V)
    return (counts / counts.sum() * 10).round().tolist()


# arithmetic_reward


@task("arithmetic_reward")
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("3+4=", "7<eos>"), ("50+7=", "75<eos>"), ("8+5=", "31<eos>"), ("99+99=", "891<eos>"), ("0+0=", "0<eos>")],
)
def test_a_right_answer_earns_one(solution, prompt, completion):
    assert_equal(solution.arithmetic_reward(prompt, completion), 1.0, because="the reversed sum, and then <eos>")


@task("arithmetic_reward")
def test_random_sums_are_right_and_their_neighbors_are_not(solution, randint):
    for a, b in randint(0, 100, (10, 2)).tolist():
        text = str(a + b)[::-1]
        assert_equal(solution.arithmetic_reward(f"{a}+{b}=", f"{text}<eos>"), 1.0, because=f"{a} + {b} = {a + b}")
        wrong = str(a + b + 1)[::-1]
        assert_equal(solution.arithmetic_reward(f"{a}+{b}=", f"{wrong}<eos>"), 0.0, because=f"{a} + {b} = {a + b}")


@task("arithmetic_reward")
@pytest.mark.parametrize("completion", ["7<eos><pad><pad>", "7<eos>7", "7<eos>99<eos>", "7<eos>+="])
def test_what_comes_after_the_end_does_not_matter(solution, completion):
    assert_equal(
        solution.arithmetic_reward("3+4=", completion), 1.0, because="the answer stands before the first <eos>"
    )


@task("arithmetic_reward")
@pytest.mark.parametrize("completion", ["75", "75<pad>", "75<eos", ""])
def test_without_an_end_there_is_no_answer(solution, completion):
    assert_equal(solution.arithmetic_reward("50+7=", completion), 0.0, because="no <eos> was written")


@task("arithmetic_reward")
@pytest.mark.parametrize("completion", ["<eos>", "<eos>75<eos>", "<pad>75<eos>"])
def test_an_empty_or_misplaced_answer_earns_nothing(solution, completion):
    assert_equal(solution.arithmetic_reward("50+7=", completion), 0.0, because="before the first <eos> must stand 75")


@task("arithmetic_reward")
def test_the_digits_are_reversed(solution):
    assert_equal(solution.arithmetic_reward("50+7=", "57<eos>"), 0.0, because="57 is written 75, lowest digit first")


@task("arithmetic_reward")
@pytest.mark.parametrize("completion", ["750<eos>", "7500<eos>", " 75<eos>", "75 <eos>", "+75<eos>", "7_5<eos>"])
def test_numbers_that_are_equal_but_written_otherwise_earn_nothing(solution, completion):
    assert_equal(solution.arithmetic_reward("50+7=", completion), 0.0, because="75, character by character")


@task("arithmetic_reward")
@pytest.mark.parametrize(
    "completion", ["75+<eos>", "175<eos>", "7575<eos>", "50+7=75<eos>", "0123456789<eos>", "=75<eos>", "7<eos>5<eos>"]
)
def test_an_answer_that_only_contains_the_number_earns_nothing(solution, completion):
    assert_equal(solution.arithmetic_reward("50+7=", completion), 0.0, because="the answer is 75 and nothing else")


# filtered_probs


def filtered(logits, temperature=1.0, top_k=None, top_p=None):
    """The definition, row by row, in Python floats: a CPU tensor in float64."""
    rows = []
    for row in logits.double().cpu().tolist():
        top = max(row)
        weights = [math.exp((x - top) / temperature) for x in row]
        probs = {i: w / sum(weights) for i, w in enumerate(weights)}
        ranked = sorted(probs, key=lambda i: -probs[i])
        if top_k is not None:
            ranked = ranked[:top_k]
        mass = sum(probs[i] for i in ranked)
        if top_p is not None and top_p < 1:
            kept, total = [], 0.0
            for i in ranked:
                kept.append(i)
                total += probs[i] / mass
                if total >= top_p:
                    break
            ranked = kept
        mass = sum(probs[i] for i in ranked)
        rows.append([probs[i] / mass if i in ranked else 0.0 for i in range(len(row))])
    return torch.tensor(rows, dtype=torch.float64)


def spread(randn, randperm, B=5, width=9, dtype=torch.float64):
    """Logits whose values are apart from each other, in any order."""
    return torch.stack([randperm(width) * 0.5 for _ in range(B)]).to(dtype) + 0.01 * randn(B, 1, dtype=dtype)


@task("filtered_probs")
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_without_filters_it_is_a_softmax(solution, randn, dtype, temperature):
    logits = randn(4, 7, dtype=dtype, scale=3.0)
    expected = torch.softmax(logits.double().cpu() / temperature, -1).to(dtype)
    assert_close(
        solution.filtered_probs(logits, temperature=temperature), expected, because="logits divided by the temperature"
    )


@task("filtered_probs")
@pytest.mark.parametrize("top_k", [1, 2, 5, 9, 20])
def test_top_k_keeps_the_k_most_probable_tokens(solution, randn, randperm, top_k):
    logits = spread(randn, randperm)
    expected = filtered(logits, top_k=top_k)
    assert_close(
        solution.filtered_probs(logits, top_k=top_k), expected, because=f"the {min(top_k, 9)} largest, scaled up to 1"
    )


@task("filtered_probs")
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(solution, randn, randperm, top_p):
    logits = spread(randn, randperm)
    expected = filtered(logits, top_p=top_p)
    assert_close(
        solution.filtered_probs(logits, top_p=top_p),
        expected,
        because=f"the most probable tokens up to a sum of {top_p}",
    )


@task("filtered_probs")
def test_one_token_that_is_more_than_p_stays(solution, device):
    logits = torch.tensor([[0.02, 0.9, 0.03, 0.05]], dtype=torch.float64, device=device).log()
    expected = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(
        solution.filtered_probs(logits, top_p=0.1),
        expected,
        because="the token of 0.9 crosses 0.1, and belongs to the nucleus",
    )


@task("filtered_probs")
def test_the_token_that_crosses_p_belongs_to_the_nucleus(solution, device):
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]], dtype=torch.float64, device=device).log()
    expected = torch.tensor([[0.0, 2 / 3, 1 / 3, 0.0]], dtype=torch.float64)
    assert_close(
        solution.filtered_probs(logits, top_p=0.6), expected, because="0.5 does not reach 0.6, and 0.5 + 0.25 does"
    )


@task("filtered_probs")
def test_a_sum_of_exactly_p_is_enough(solution, device):
    probs = solution.filtered_probs(torch.zeros(1, 4, dtype=torch.float64, device=device), top_p=0.5)
    expected = torch.tensor([[0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    assert_close(
        probs.sort(-1).values, expected, because="four times 0.25: two of them reach 0.5, a third one is not needed"
    )


@task("filtered_probs")
def test_p_of_one_keeps_even_what_is_hardly_possible(solution, device):
    logits = torch.tensor([[-23.0, 0.0, -21.0, -25.0]], device=device)
    expected = torch.softmax(logits.double().cpu(), -1).float()
    probs = solution.filtered_probs(logits, top_p=1.0)
    assert_that((probs > 0).all(), "top_p=1 keeps tokens of 1e-9, too", value=probs)
    assert_close(probs, expected, because="top_p=1 changes nothing")


@task("filtered_probs")
def test_temperature_comes_before_the_nucleus(solution, randn, randperm):
    logits = spread(randn, randperm)
    expected = filtered(logits, temperature=2.0, top_p=0.7)
    assert_close(
        solution.filtered_probs(logits, temperature=2.0, top_p=0.7),
        expected,
        because="the nucleus is that of the tempered distribution",
    )
    expected = filtered(logits, temperature=0.4, top_p=0.9)
    assert_close(
        solution.filtered_probs(logits, temperature=0.4, top_p=0.9),
        expected,
        because="the nucleus is that of the tempered distribution",
    )


@task("filtered_probs")
def test_the_nucleus_is_taken_of_what_top_k_leaves(solution, device):
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64, device=device).log()
    expected = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(
        solution.filtered_probs(logits, top_k=2, top_p=0.5),
        expected,
        because="of 0.4 and 0.3, scaled up to 4/7 and 3/7, the first alone reaches 0.5",
    )


@task("filtered_probs")
def test_all_three_filters_work_together(solution, randn, randperm):
    logits = spread(randn, randperm, B=8)
    for temperature, top_k, top_p in ((0.7, 4, 0.8), (1.5, 6, 0.6), (3.0, 3, 0.95)):
        expected = filtered(logits, temperature, top_k, top_p)
        found = solution.filtered_probs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        assert_close(found, expected, because=f"temperature {temperature}, then top {top_k}, then {top_p}")


@task("filtered_probs")
def test_each_row_stands_for_itself(solution, randn, randperm):
    logits = spread(randn, randperm, B=4) * torch.tensor([[0.1], [1.0], [4.0], [0.5]], device=randn(1).device)
    expected = torch.cat([filtered(row[None], 1.0, 6, 0.8) for row in logits])
    assert_close(
        solution.filtered_probs(logits, top_k=6, top_p=0.8),
        expected,
        because="flat rows have larger nuclei than steep ones",
    )


@task("filtered_probs")
def test_tokens_that_are_impossible_stay_impossible(solution, randn, randperm):
    logits = spread(randn, randperm, B=3)
    logits[:, 2:5] = -torch.inf
    expected = filtered(logits)
    assert_close(solution.filtered_probs(logits), expected, because="a logit of -inf is a probability of 0, not NaN")
    expected = filtered(logits, 0.5, 8, 0.99)
    found = solution.filtered_probs(logits, temperature=0.5, top_k=8, top_p=0.99)
    assert_close(found, expected, because="a logit of -inf is a probability of 0, not NaN")


@task("filtered_probs")
def test_half_precision_is_decided_in_float32(solution, randn, randperm):
    logits = spread(randn, randperm, B=3, width=9, dtype=torch.float32).bfloat16()
    expected = filtered(logits, 0.7, 6, 0.9).float()
    found = solution.filtered_probs(logits, temperature=0.7, top_k=6, top_p=0.9)
    assert_close(found, expected, because="bfloat16 logits become float32 before anything else")


@task("filtered_probs")
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_logits_of_any_size_are_fine(solution, randperm, size):
    logits = (randperm(6) * size).double()[None]
    expected = torch.zeros(1, 6, dtype=torch.float64)
    expected[0, logits[0].argmax().cpu()] = 1.0
    assert_close(solution.filtered_probs(logits, top_p=0.9), expected, because="softmax does not overflow")


@task("filtered_probs")
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.2}, {"top_k": 2, "top_p": 0.9}])
def test_at_temperature_zero_the_largest_logit_has_it_all(solution, randn, randperm, options):
    logits = spread(randn, randperm)
    expected = torch.zeros(5, 9, dtype=torch.float64)
    expected[range(5), logits.argmax(-1).cpu()] = 1.0
    found = solution.filtered_probs(logits, temperature=0, **options)
    assert_close(found, expected, because="temperature 0 is the argmax, whatever the other filters are")


@task("filtered_probs")
def test_strides_do_not_matter(solution, randn, randperm):
    logits = noncontiguous(spread(randn, randperm))
    expected = filtered(logits, 1.0, 4, 0.9)
    assert_close(solution.filtered_probs(logits, top_k=4, top_p=0.9), expected)


@task("filtered_probs")
@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"temperature": -0.5}, "-0.5"),
        ({"top_k": 0}, "0"),
        ({"top_k": -3}, "-3"),
        ({"top_p": 0.0}, "0"),
        ({"top_p": 1.25}, "1.25"),
        ({"top_p": -0.25}, "-0.25"),
    ],
)
def test_filters_that_mean_nothing_are_refused(solution, randn, options, number):
    assert_raises(ValueError, solution.filtered_probs, randn(2, 5), mentions=[number], **options)


@cost_case("filtered_probs")
def filtered_probs_cost(module, randn):
    logits = randn(64, 1000)
    return lambda: module.filtered_probs(logits, temperature=0.8, top_k=50, top_p=0.9)


# sample


@task("sample")
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.75}, {"temperature": 1.5, "top_k": 5, "top_p": 0.9}]
)
def test_draws_follow_the_filtered_distribution(solution, device, seed, options):
    logits = torch.tensor(GENTLE, dtype=torch.float64, device=device)
    expected = filtered(logits[None], **options)[0].tolist()
    draws = solution.sample(logits.expand(20000, 7), generator=dice(device, seed), **options)
    df = sum(p > 0 for p in expected) - 1
    assert_that(
        surprise(draws, expected) < far(df),
        "20,000 draws come as often as filtered_probs says; beside it: how often each token came, in tenths",
        value=shares(draws),
    )


@task("sample")
def test_one_token_per_row_is_drawn(solution, randn, device, seed):
    tokens = solution.sample(randn(6, 9), generator=dice(device, seed))
    assert_equal((tuple(tokens.shape), tokens.dtype), ((6,), torch.int64), because="logits (6, 9) give six ids")


@task("sample")
def test_a_vocabulary_of_one_leaves_no_choice(solution, device, seed):
    tokens = solution.sample(torch.zeros(3, 1, device=device), top_p=0.5, generator=dice(device, seed))
    assert_equal(tokens, torch.zeros(3, dtype=torch.int64), because="there is one token")


@task("sample")
def test_rows_are_drawn_from_their_own_logits(solution, device, randperm, seed):
    wanted = randperm(9)
    logits = F.one_hot(wanted, 9) * 80.0
    assert_equal(
        solution.sample(logits, generator=dice(device, seed)), wanted.cpu(), because="each row is sure of another token"
    )


@task("sample")
def test_rows_are_drawn_independently(solution, device, seed):
    tokens = solution.sample(torch.zeros(200, 9, device=device), generator=dice(device, seed))
    n = len(set(tokens.tolist()))
    assert_that(n > 3, "200 equal rows of nine equal logits show more than three different tokens", value=n)


@task("sample")
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.1}])
def test_temperature_zero_takes_the_largest(solution, randn, randperm, options):
    logits = spread(randn, randperm, B=40)
    expected = logits.argmax(-1).cpu()
    with global_rng_untouched():
        found = solution.sample(logits, temperature=0, **options)
    assert_equal(found, expected, because="temperature 0 is the argmax")


@task("sample")
def test_what_cannot_come_does_not_come(solution, device, seed):
    logits = torch.full((3000, 6), -torch.inf, device=device)
    logits[:, 1] = logits[:, 4] = 0.5
    draws = solution.sample(logits.bfloat16(), generator=dice(device, seed))
    assert_equal(sorted(set(draws.tolist())), [1, 4], because="all other logits are -inf")


@task("sample")
def test_the_generator_decides_alone(solution, randn, device, seed):
    logits = randn(50, 9)
    with global_rng_untouched():
        first = solution.sample(logits, generator=dice(device, seed)).cpu()
        second = solution.sample(logits, generator=dice(device, seed))
        third = solution.sample(logits, generator=dice(device, seed + 1))
    assert_equal(second, first, because="the same state of the generator gives the same tokens")
    assert_that(not torch.equal(third.cpu(), first), "another state gives others", value=third)


@task("sample")
def test_sampling_refuses_what_filtering_refuses(solution, randn):
    assert_raises(ValueError, solution.sample, randn(2, 5), top_p=1.5, mentions=["1.5"])
    assert_raises(ValueError, solution.sample, randn(2, 5), temperature=-2.0, mentions=["-2"])


# generate


@task("generate")
def test_rows_are_continued_until_they_end(solution, device):
    model = chain(device, t1=2, t2=3, t4=5, t5=6, t6=7)
    written = solution.generate(model, [[1, 2], [9], [3, 5, 4]], 6, temperature=0)
    expected = padded([[3, EOS], [EOS], [5, 6, 7, EOS]], PAD, 4, torch.int64, device)
    assert_equal(written.tokens, expected, because="each row up to its <eos>, then padding")


@task("generate")
def test_the_mask_counts_the_end_and_no_padding(solution, device):
    model = chain(device, t1=2, t2=3, t4=5, t5=6, t6=7)
    written = solution.generate(model, [[1, 2], [9], [3, 5, 4]], 6, temperature=0)
    expected = padded([[True] * 2, [True], [True] * 4], False, 4, torch.bool, device)
    assert_equal(written.mask, expected, because="True up to the <eos>, which was written, too")


@task("generate")
def test_no_row_is_longer_than_was_asked(solution, device):
    model = chain(device, t1=2, t2=1)
    for n in (1, 3):
        written = solution.generate(model, [[1], [5, 2]], n, temperature=0)
        expected = torch.tensor([[2, 1, 2], [1, 2, 1]], device=device)[:, :n]
        assert_equal(written.tokens, expected, because=f"neither row ends by itself, and {n} tokens were asked for")
        assert_equal(written.mask, torch.ones(2, n, dtype=torch.bool), because="all of them were written")


@task("generate")
def test_a_prefill_and_then_one_token_at_a_time(solution, device):
    model = chain(device, t1=2, t2=1)
    solution.generate(model, [[1], [3, 5, 2], [2, 2]], 5, temperature=0)
    shapes = [call["shape"] for call in model.calls]
    assert_equal(
        shapes, [(3, 3)] + [(3, 1)] * 4, because="all prompts at once, then N - 1 calls with one token per row"
    )
    assert_that(all(call["cached"] for call in model.calls), "every call uses the caches", value=len(shapes))


@task("generate")
def test_each_row_counts_its_positions_from_its_own_first_token(solution, device):
    model = chain(device, t1=2, t2=1)
    solution.generate(model, [[1], [3, 5, 2]], 3, temperature=0)
    found = [call["last"] for call in model.calls]
    assert_equal(found, [[0, 2], [1, 3], [2, 4]], because="a prompt of one token stands at position 0, padded or not")


@task("generate")
def test_padding_has_a_log_probability_of_zero(solution, device):
    model = chain(device, t1=2, t2=3, t4=5)
    written = solution.generate(model, [[1], [9], [4]], 6, temperature=0.9, generator=dice(device, 0))
    found = written.logprobs[~written.mask].cpu()
    assert_equal(found, torch.zeros(3, dtype=torch.float64), because="three places of three rows were not written")


@task("generate")
def test_nothing_is_computed_after_the_last_row_ended(solution, device):
    model = chain(device, t1=2, t4=5)
    solution.generate(model, [[1], [4], [9, 9]], 50, temperature=0)
    shapes = [call["shape"] for call in model.calls]
    assert_equal(shapes, [(3, 2), (3, 1)], because="after two tokens every row has ended, though 50 were allowed")


@task("generate")
@pytest.mark.parametrize("dtype_", [torch.float64, torch.float32, torch.bfloat16])
def test_the_caches_are_made_once_and_fit(solution, device, dtype_):
    model = chain(device, t1=2, t2=1).to(dtype_)
    solution.generate(model, [[1], [3, 5, 2]], 6, temperature=0)
    assert_equal(model.made, [(2, 8, dtype_)], because="2 rows, 3 + 6 - 1 places, in the dtype of the weights")


@task("generate")
def test_the_caches_of_a_deepseek_model_have_the_bytes_that_were_promised(solution, device, seed):
    model = deepseek(seed, device)
    made, new_caches = [], model.new_caches
    model.new_caches = lambda *args, **kwargs: made.append(new_caches(*args, **kwargs)) or made[-1]
    solution.generate(model, [[1, 2, 3], [4]], 5, temperature=0, eos_id=-1)
    found = sum(cache.nbytes for caches in made for cache in caches)
    assert_equal(
        found, 2 * 2 * 7 * (8 + 4) * 8, because="layers x rows x (3 + 5 - 1) places x (r + dr) numbers of 8 bytes"
    )


@task("generate")
@pytest.mark.parametrize(
    "prompts", [[[3, 10, 4, 11], [7], [1, 2, 10, 9, 9, 11]], [[5]], [[1, 13, 2], [12, 4], [13, 13, 6]]]
)
def test_each_row_is_written_as_if_it_were_alone(solution, device, seed, prompts):
    model = deepseek(seed, device)
    expected = [alone(model, prompt, 6) for prompt in prompts]
    n = max(len(tokens) for tokens, _ in expected)
    written = solution.generate(model, prompts, 6, temperature=0)
    tokens = padded([tokens for tokens, _ in expected], PAD, n, torch.int64, device)
    assert_equal(written.tokens, tokens, because="the same tokens as one row after the other, without a cache")
    logprobs = padded([logprobs for _, logprobs in expected], 0.0, n, torch.float64, device)
    assert_close(written.logprobs, logprobs, rtol=1e-8, atol=1e-8, because="log-probabilities of the greedy tokens")


@task("generate")
@pytest.mark.parametrize("mode", ["naive", "absorbed"])
def test_the_mode_goes_to_the_model(solution, device, seed, mode):
    model = chain(device, t1=2, t2=1)
    solution.generate(model, [[1]], 3, temperature=0, mode=mode)
    found = [call["mode"] for call in model.calls]
    assert_equal(found, [mode] * 3, because=f"mode={mode!r} was asked for")


@task("generate")
def test_logprobs_are_those_of_the_model_itself(solution, device, seed):
    model = deepseek(seed, device)
    prompts = [[3, 10, 4, 11], [7], [1, 2]]
    written = solution.generate(
        model, prompts, 5, temperature=0.6, top_k=5, top_p=0.9, generator=dice(device, seed), eos_id=4
    )
    for prompt, tokens, mask, found in zip(prompts, *written, strict=True):
        expected = torch.zeros_like(found)
        expected[mask] = scored(model, prompt, tokens[mask].tolist()).detach()
        assert_close(
            found, expected, rtol=1e-8, atol=1e-8, because="before temperature, top_k and top_p; 0 for padding"
        )


@task("generate")
def test_the_filters_are_used(solution, device, seed):
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    table[1, 2:9] = torch.tensor(GENTLE, device=device, dtype=torch.float64)
    for options in ({"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}):
        expected = filtered(table[1][None], **options)[0].tolist()
        written = solution.generate(Bigram(table), [[1]] * 4000, 1, generator=dice(device, seed), **options)
        df = sum(p > 0 for p in expected) - 1
        because = f"4,000 first tokens under {options} come as often as filtered_probs says; in tenths:"
        assert_that(surprise(written.tokens, expected) < far(df), because, value=shares(written.tokens))


@task("generate")
def test_by_default_tokens_are_sampled_as_the_model_says(solution, device, seed):
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    table[1, 2:9] = torch.tensor(GENTLE, device=device, dtype=torch.float64)
    expected = filtered(table[1][None])[0].tolist()
    written = solution.generate(Bigram(table), [[1]] * 4000, 1, generator=dice(device, seed))
    because = "4,000 first tokens come as often as the softmax says; in tenths:"
    assert_that(surprise(written.tokens, expected) < far(V - 1), because, value=shares(written.tokens))


@task("generate")
def test_end_and_padding_can_be_other_tokens(solution, device):
    model = chain(device, t1=2, t2=3, t4=5, t5=EOS, t12=6)
    written = solution.generate(model, [[1], [4]], 9, temperature=0, eos_id=3, pad_id=0)
    expected = padded([[2, 3], [5, EOS, 6, EOS, 6, EOS, 6, EOS, 6]], 0, 9, torch.int64, device)
    assert_equal(written.tokens, expected, because="3 ends a row, 12 does not, and 0 pads")


@task("generate")
def test_end_and_padding_can_be_the_same_token(solution, device):
    model = chain(device, t1=2, t4=5, t5=6)
    written = solution.generate(model, [[1], [4]], 9, temperature=0, pad_id=EOS)
    expected = padded([[True] * 2, [True] * 3], False, 3, torch.bool, device)
    assert_equal(written.mask, expected, because="the first <eos> was written, what follows it is padding")


@task("generate")
def test_an_end_inside_a_prompt_ends_nothing(solution, device):
    model = chain(device, t1=2, t2=3)
    written = solution.generate(model, [[EOS, 1]], 9, temperature=0)
    assert_equal(written.tokens, torch.tensor([[2, 3, EOS]]), because="only what is written can end a row")


@task("generate")
def test_sampling_is_a_function_of_the_generator(solution, device, seed):
    model = deepseek(seed, device)
    with global_rng_untouched():
        first, second = (
            solution.generate(model, [[1, 2], [3]], 6, generator=dice(device, seed), eos_id=-1) for _ in range(2)
        )
        assert_equal(second.tokens, first.tokens.cpu(), because="the same state of the generator, the same tokens")
        solution.generate(model, [[1, 2], [3]], 3, temperature=0)


@task("generate")
def test_the_model_runs_in_eval_mode_and_gets_its_modes_back(solution, device):
    model = chain(device, t1=2, t2=1)
    model.train()
    model.dropout.eval()
    solution.generate(model, [[1]], 3, temperature=0)
    found = [call["train"] for call in model.calls]
    assert_equal(found, [False] * 3, because="the policy that samples must be the policy that is scored")
    found = [model.training, model.lm_head.training, model.dropout.training]
    assert_equal(found, [True, True, False], because="afterwards each module is in its mode of before")


@task("generate")
def test_no_graph_is_built(solution, device):
    model = chain(device, t1=2, t2=1)
    written = solution.generate(model, [[1]], 3, temperature=0)
    found = [call["gradients"] for call in model.calls]
    assert_equal(found, [False] * 3, because="a graph of all steps would keep every activation alive")
    assert_that(not written.logprobs.requires_grad, "the log-probabilities carry no graph", value=True)
    leaf = torch.ones(1, 3, dtype=torch.float64, device=device, requires_grad=True)
    (leaf * written.logprobs).sum().backward()  # a tensor of inference mode could not be saved for this


@task("generate")
def test_dtypes_are_those_of_ids_masks_and_logits(solution, device):
    for dtype, wide in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        written = solution.generate(chain(device, t1=2).to(dtype), [[1]], 3, temperature=0)
        found = [x.dtype for x in written]
        assert_equal(found, [torch.int64, torch.bool, wide], because="ids, a mask, and numbers of the logits' dtype")


@task("generate")
@pytest.mark.parametrize(("prompts", "n"), [([], 3), ([[]], 3), ([[1], []], 3), ([[1], [2]], 0), ([[1]], -1)])
def test_nothing_to_do_is_refused(solution, device, prompts, n):
    model = chain(device)
    assert_raises(ValueError, solution.generate, model, prompts, n, temperature=0)
    assert_equal(len(model.calls), 0, because="the model is not called in vain")


@cost_case("generate")
def generate_cost(module, randn):
    model = deepseek(1, randn(1).device, torch.float32)
    return lambda: module.generate(model, [[1, 2, 3], [4]], 8, temperature=0, eos_id=-1)


# sequence_logprobs


@task("sequence_logprobs")
def test_the_first_token_of_a_response_is_scored_at_the_end_of_the_prompt(solution, device):
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    table[1, 2] = table[2, 3] = table[3, 4] = 1.0
    p, q = math.log(math.e / (math.e + V - 1)), math.log(1 / (math.e + V - 1))
    tokens = torch.tensor([[1, 2, 3, 4], [3, 1, 2, 5]], device=device)
    expected = torch.tensor([[0.0, p, p], [0.0, 0.0, q]], dtype=torch.float64)
    found = solution.sequence_logprobs(Bigram(table).eval(), tokens, torch.tensor([2, 3], device=device))
    assert_close(found, expected, because="place t speaks of token t + 1, and prompts of 2 and 3 tokens are not scored")


@task("sequence_logprobs")
def test_log_probabilities_are_those_of_a_row_alone(solution, device, seed, randint):
    model = deepseek(seed, device)
    tokens, lengths = randint(0, V, (4, 7)), [3, 1, 6, 4]
    rows = []
    for row, length in zip(tokens.tolist(), lengths, strict=True):
        rows.append([0.0] * (length - 1) + scored(model, row[:length], row[length:]).tolist())
    expected = torch.tensor(rows, dtype=torch.float64)
    found = solution.sequence_logprobs(model, tokens, torch.tensor(lengths, device=device))
    assert_close(found, expected, rtol=1e-9, atol=1e-9, because="log softmax of the logits before each token")


@task("sequence_logprobs")
def test_outside_of_responses_is_exactly_zero(solution, device, seed, randint):
    model = deepseek(seed, device)
    found = solution.sequence_logprobs(model, randint(0, V, (2, 5)), torch.tensor([5, 4], device=device))
    part = found[:, :3].detach().cpu()
    assert_equal(part, torch.zeros(2, 3, dtype=torch.float64), because="these tokens belong to prompts")
    assert_that(
        bool(found[0, 3] == 0) and bool(found[1, 3] < 0), "4 of 5 tokens are a prompt, or all", value=found[:, 3]
    )


@task("sequence_logprobs")
def test_a_prompt_of_one_token_leaves_all_the_rest(solution, device, seed, randint):
    model = deepseek(seed, device)
    tokens = randint(0, V, (2, 5))
    expected = torch.stack([scored(model, row[:1], row[1:]).detach() for row in tokens.tolist()])
    found = solution.sequence_logprobs(model, tokens, torch.ones(2, dtype=torch.int64, device=device))
    assert_close(found, expected, rtol=1e-9, atol=1e-9, because="everything but the first token was written")


@task("sequence_logprobs")
def test_gradients_reach_the_model_from_responses_alone(solution, device, randn, randint):
    table, tokens = randn(V, V, dtype=torch.float64), randint(0, V, (3, 6))
    lengths = [2, 5, 4]
    ours, theirs = Bigram(table), Bigram(table)
    for row, length in zip(tokens.tolist(), lengths, strict=True):
        (-scored(theirs, row[:length], row[length:]).sum()).backward()
    (-solution.sequence_logprobs(ours, tokens, torch.tensor(lengths, device=device)).sum()).backward()
    assert_close(
        ours.lm_head.weight.grad, theirs.lm_head.weight.grad, because="the gradient of the responses' log-probability"
    )


@task("sequence_logprobs")
def test_scores_have_the_dtype_of_the_logits(solution, device):
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        tokens = torch.tensor([[1, 2, 3]], device=device)
        model = chain(device, t1=2).to(dtype)
        model.train()
        found = solution.sequence_logprobs(model, tokens, torch.tensor([1], device=device))
        assert_equal((tuple(found.shape), found.dtype), ((1, 2), wide), because="(B, T-1), as the model's logits")
        found = [(call["train"], call["cached"]) for call in model.calls]
        assert_equal(found, [(True, False)], because="one call without caches, in the mode in which the model was")


@task("sequence_logprobs")
@pytest.mark.parametrize("shape", [(3,), (2, 1), (1,), ()])
def test_prompt_lengths_that_do_not_fit_are_refused(solution, device, shape):
    tokens, lengths = (
        torch.zeros(2, 4, dtype=torch.int64, device=device),
        torch.ones(shape, dtype=torch.int64, device=device),
    )
    assert_raises(
        ValueError, solution.sequence_logprobs, chain(device), tokens, lengths, mentions=["(2, 4)", str(tuple(shape))]
    )


@cost_case("sequence_logprobs")
def sequence_logprobs_cost(module, randn, randint):
    model = deepseek(1, randn(1).device, torch.float32)
    tokens, lengths = randint(0, V, (16, 12)), randint(1, 12, (16,))
    return lambda: module.sequence_logprobs(model, tokens, lengths)


# sft_step and train_sft


def lesson(device):
    """A batch as day 7 makes it: two sums of different lengths."""
    items = [(7, 8), (1, 2)]
    rows = [
        {"prompt": torch.tensor(encode(f"{a}+{b}=")), "answer": torch.tensor(encode(str(a + b)[::-1]))}
        for a, b in items
    ]
    return {name: x.to(device) for name, x in pad_collate(rows, PAD).items()}


def one_transition(device):
    """A batch in which all has to be learned about one token: the gradient of a stubborn model is longer than 1."""
    batch = lesson(device)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, 6)
    return {**batch, "input_ids": torch.full_like(batch["input_ids"], 3)}


def answer_loss(model, batch):
    """The mean of -log p over the labels that are not -100, one by one."""
    logits, terms = model(batch["input_ids"]), []
    for b, row in enumerate(batch["labels"].tolist()):
        for t, label in enumerate(row):
            if label != -100:
                terms.append(logits[b, t].logsumexp(0) - logits[b, t, label])
    return torch.stack(terms).mean()


def torch_step(model, batch, optimizer, max_norm):
    optimizer.zero_grad()
    loss = answer_loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


def sgd(model, lr=0.5):
    return torch.optim.SGD(model.parameters(), lr=lr)


def stubborn(device):
    """A model that is sure of the wrong token everywhere, in train and eval mode alike: its gradients are large."""
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    table[:, 0] = table[:, -1] = 30.0
    return Bigram(table)


@task("sft_step")
def test_the_loss_is_that_of_the_answers_before_the_step(solution, device, randn):
    model, batch = Bigram(randn(V, V, dtype=torch.float64)), lesson(device)
    expected = answer_loss(copy.deepcopy(model).train(), batch).item()
    loss = solution.sft_step(model, batch, sgd(model))
    assert_that(type(loss) is float, "the loss is a Python float", value=type(loss).__name__)
    assert_close(
        loss, expected, rtol=1e-10, because="the mean over the five labels that are not -100, before the update"
    )


@task("sft_step")
def test_steps_are_those_of_torch(solution, device, randn):
    ours = Bigram(randn(V, V, dtype=torch.float64))
    theirs, batch = copy.deepcopy(ours).train(), lesson(device)
    mine, yours = sgd(ours), sgd(theirs)
    for _ in range(3):
        torch_step(theirs, batch, yours, 1.0)
        solution.sft_step(ours, batch, mine)
        assert_close(
            ours.lm_head.weight.detach(),
            theirs.lm_head.weight.detach(),
            rtol=1e-5,
            atol=1e-5,
            because="forget old gradients, forward, backward, clip, step",
        )


@task("sft_step")
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"max_norm": 5.0}])
def test_gradients_are_clipped(solution, device, options):
    ours, batch = stubborn(device), one_transition(device)
    theirs = copy.deepcopy(ours)
    torch_step(theirs, batch, sgd(theirs), options.get("max_norm", 1.0))
    solution.sft_step(ours, batch, sgd(ours), **options)
    assert_close(
        ours.lm_head.weight.detach(),
        theirs.lm_head.weight.detach(),
        rtol=1e-5,
        atol=1e-5,
        because=f"the joint norm is at most {options.get('max_norm', 1.0)}",
    )


@task("sft_step")
def test_the_model_is_in_train_mode(solution, device, randn):
    model = Bigram(randn(V, V, dtype=torch.float64)).eval()
    solution.sft_step(model, lesson(device), sgd(model))
    found = [(call["train"], call["cached"]) for call in model.calls]
    assert_equal(found, [(True, False)], because="fine-tuning is training, and needs no cache")


@task("sft_step")
def test_every_batch_is_a_step(solution, device):
    ours, batch = stubborn(device), one_transition(device)
    theirs = copy.deepcopy(ours).train()
    batches = [{name: x[i : i + 1] for name, x in batch.items()} for i in (0, 1, 0)]
    yours = sgd(theirs)
    expected = [torch_step(theirs, one, yours, 0.05) for one in batches]
    found = solution.train_sft(ours, (one for one in batches), sgd(ours), max_norm=0.05)
    assert_equal(len(found), 3, because="one loss per batch")
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two, rtol=1e-5, because="the losses of steps that are clipped to 0.05, in their order")
    ours, theirs = stubborn(device), stubborn(device)
    expected = torch_step(theirs, batch, sgd(theirs), 1.0)
    solution.train_sft(ours, [batch], sgd(ours))
    found, expected = ours.lm_head.weight.detach(), theirs.lm_head.weight.detach()
    assert_close(found, expected, rtol=1e-5, atol=1e-5, because="max_norm is 1 by default")


@task("sft_step")
def test_one_digit_sums_are_learned(solution, device):
    plan = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "kv_lora_rank": 32,
    }
    heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    model = DeepSeekForCausalLM(DeepSeekConfig(vocab_size=V, **plan, **heads))
    init_weights_(model, 0.1, generator=torch.Generator().manual_seed(0))
    model.to(device)
    data = ArithmeticDataset(1, "train", test_fraction=0.0)
    batch = {name: x.to(device) for name, x in pad_collate([data[i] for i in range(len(data))], PAD).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = solution.train_sft(model, [batch] * 75, optimizer)
    assert_that(
        losses[-1] < 0.05, "75 steps on all 100 sums of one digit bring the loss near to 0", value=round(losses[-1], 1)
    )
    with torch.no_grad():
        predicted = model.eval()(batch["input_ids"]).argmax(-1)
    right = ((predicted == batch["labels"]) | (batch["labels"] == -100)).all(1).sum().item()
    assert_equal(right, 100, because="all 100 sums are right")


# group_advantages


def advantages(rewards, scale_by_std=True, eps=1e-4):
    """The formula, group by group, in Python floats."""
    rows = []
    for row in rewards.tolist():
        mean = sum(row) / len(row)
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / (len(row) - 1))
        same = all(r == row[0] for r in row)
        rows.append([0.0 if same else (r - mean) / (std + eps) if scale_by_std else r - mean for r in row])
    return torch.tensor(rows, dtype=torch.float64)


@task("group_advantages")
def test_advantages_follow_the_formula(solution, randn, dtype):
    rewards = randn(5, 7, dtype=dtype)
    expected = advantages(rewards).to(dtype)
    assert_close(
        solution.group_advantages(rewards),
        expected,
        because="less the group's mean, divided by its deviation plus 1e-4",
    )


@task("group_advantages")
def test_two_samples_are_a_group(solution, device):
    rewards = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=device)
    x = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = torch.tensor([[-x, x]], dtype=torch.float64)
    assert_close(solution.group_advantages(rewards), expected, because="the deviation of a sample divides by G - 1")


@task("group_advantages")
def test_the_deviation_can_be_left_out(solution, randn):
    rewards = randn(4, 3, dtype=torch.float64)
    expected = advantages(rewards, scale_by_std=False)
    assert_close(
        solution.group_advantages(rewards, scale_by_std=False), expected, because="less the mean of the group, no more"
    )


@task("group_advantages")
@pytest.mark.parametrize("eps", [0.0, 0.5, 10.0])
def test_eps_is_added_to_the_deviation(solution, randn, eps):
    rewards = randn(4, 3, dtype=torch.float64)
    expected = advantages(rewards, eps=eps)
    assert_close(solution.group_advantages(rewards, eps=eps), expected, because=f"divided by the deviation plus {eps}")


@task("group_advantages")
@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 123.456])
def test_a_group_that_agrees_teaches_nothing(solution, device, dtype, reward, scale_by_std):
    rewards = torch.full((2, 7), reward, dtype=dtype, device=device)
    rewards[1, 0] += 1.0
    found = solution.group_advantages(rewards, scale_by_std=scale_by_std)[0].cpu()
    assert_equal(found, torch.zeros(7, dtype=dtype), because=f"seven times {reward}: exactly 0, not NaN and not noise")


@task("group_advantages")
def test_with_eps_of_zero_a_group_that_agrees_is_still_zero(solution, device):
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]], device=device)
    found = solution.group_advantages(rewards, eps=1e-30)[0].cpu()
    assert_equal(found, torch.zeros(2), because="0 divided by next to nothing is 0")


@task("group_advantages")
def test_each_group_is_its_own_baseline(solution, device):
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64, device=device)
    x = 0.25 / (0.5 + 1e-4)
    expected = torch.tensor([[x, x, x, -3 * x], [-x, -x, 3 * x, -x]], dtype=torch.float64)
    assert_close(
        solution.group_advantages(rewards),
        expected,
        because="an easy prompt and a hard one: their samples do not compare",
    )


@task("group_advantages")
def test_a_shift_of_all_rewards_changes_nothing(solution, randn):
    rewards = randn(3, 5, dtype=torch.float64)
    expected = advantages(rewards)
    found = solution.group_advantages(rewards + 64.0)
    assert_close(found, expected, rtol=1e-8, atol=1e-8, because="only differences within the group count")


@task("group_advantages")
def test_rewards_get_no_gradient(solution, randn):
    rewards = randn(3, 5).requires_grad_()
    for scale_by_std in (True, False):
        found = solution.group_advantages(rewards, scale_by_std=scale_by_std).requires_grad
        assert_equal(found, False, because="advantages are numbers; nothing flows back to the rewards")


@task("group_advantages")
@pytest.mark.parametrize("shape", [(3, 1), (6,), (2, 3, 4)])
def test_a_group_of_one_has_nothing_to_compare_with(solution, randn, shape):
    assert_raises(ValueError, solution.group_advantages, randn(*shape), mentions=[str(shape)])


# kl_k3


@task("kl_k3")
def test_k3_is_its_formula(solution, randn, dtype):
    logp, ref = -randn(4, 5, dtype=dtype).abs(), -randn(4, 5, dtype=dtype).abs()
    d = ref.double().cpu() - logp.double().cpu()
    expected = (d.exp() - d - 1).to(dtype)
    assert_close(solution.kl_k3(logp, ref), expected, atol=1e-6, because="exp(d) - d - 1 with d = ref_logp - logp")


@task("kl_k3")
def test_k3_is_zero_only_between_equals(solution, device):
    logp = torch.tensor([-2.0, -2.0, -2.0, -0.5], dtype=torch.float64, device=device)
    ref = torch.tensor([-2.0, -1.9, -2.1, -9.0], dtype=torch.float64, device=device)
    found = solution.kl_k3(logp, ref)
    assert_that(
        bool(found[0] == 0) and bool((found[1:] > 1e-3).all()), "0 for the first pair, more for the others", value=found
    )


@task("kl_k3")
def test_the_mean_of_k3_is_the_divergence_from_policy_to_reference(solution, randn):
    p, q = (torch.log_softmax(randn(1, 6, dtype=torch.float64), -1) for _ in range(2))
    expected = (p.exp() * (p - q)).sum().cpu()
    found = (p.exp() * solution.kl_k3(p, q)).sum()
    assert_close(found, expected, because="averaged over the policy's own samples, all six enumerated")


@task("kl_k3")
def test_k3_has_gradients_in_both(solution, randn):
    logp, ref = randn(3, 4, dtype=torch.float64), randn(3, 4, dtype=torch.float64)
    assert_gradients_close(
        lambda a, b: solution.kl_k3(a, b),
        lambda a, b: torch.exp(b - a) - b + a - 1,
        (logp, ref),
        because="d/dlogp is 1 - exp(d)",
    )


@task("kl_k3")
def test_log_probabilities_of_two_shapes_are_refused(solution, randn):
    assert_raises(ValueError, solution.kl_k3, randn(3, 4), randn(3, 1), mentions=["(3, 4)", "(3, 1)"])


# grpo_loss


def token_cost(logp, old, ref, A, clip, beta):
    """What one token costs; all numbers, logp perhaps with a graph."""
    ratio = torch.exp(logp - old)
    low, high = 1 - clip, 1 + clip
    held = ratio if low <= ratio.item() <= high else torch.full_like(ratio, low if ratio.item() < low else high)
    first, second = ratio * A, held * A
    d = ref - logp
    return -(first if first.item() <= second.item() else second) + beta * (torch.exp(d) - d - 1)


def loss_by_hand(logp, old, ref, A, mask, clip=0.2, beta=0.04, aggregate="response", max_len=None):
    """The definition, token by token."""
    N, T = logp.shape
    rows = []
    for n in range(N):
        places = [t for t in range(T) if mask[n, t]]
        rows.append(
            [token_cost(logp[n, t], old[n, t].item(), ref[n, t].item(), A[n].item(), clip, beta) for t in places]
        )
    zero = logp.new_zeros(())
    if aggregate == "response":
        return sum((sum(row) / len(row) for row in rows if row), zero) / N
    total, count = sum((x for row in rows for x in row), zero), sum(map(len, rows))
    return total / (count if aggregate == "token" else N * max_len)


def responses(randn, lengths=(3, 8, 1, 5), T=8, apart=0.5):
    """logp, old_logp, ref_logp, advantages and mask of responses of these lengths, in float64."""
    logp = -randn(len(lengths), T, dtype=torch.float64).abs()
    old, ref = (logp + apart * randn(len(lengths), T, dtype=torch.float64) for _ in range(2))
    A = randn(len(lengths), dtype=torch.float64)
    mask = torch.arange(T, device=logp.device) < torch.tensor(lengths, device=logp.device)[:, None]
    return logp, old, ref, A, mask


def loss_of(solution, logp, *others, **options):
    return solution.grpo_loss(logp, *others, **options)[0]


CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # a weight 1 / (N * length) may have been float32
AGGREGATES = [{"aggregate": "response"}, {"aggregate": "token"}, {"aggregate": "constant", "max_len": 10}]


@task("grpo_loss")
@pytest.mark.parametrize("options", AGGREGATES)
def test_loss_and_gradient_are_those_of_the_definition(solution, randn, options):
    logp, *others = responses(randn)
    assert_gradients_close(
        lambda x: loss_of(solution, x, *others, **options),
        lambda x: loss_by_hand(x, *others, **options),
        (logp,),
        **CLOSE,
        because=f"token by token, {options['aggregate']}",
    )


@task("grpo_loss")
@pytest.mark.parametrize("options", [{"clip": 0.5}, {"clip": 0.05, "beta": 0.0}, {"beta": 2.0}, {}])
def test_clip_and_beta_can_be_chosen(solution, randn, options):
    logp, *others = responses(randn, lengths=(8, 8, 6, 7), apart=0.4)
    assert_gradients_close(
        lambda x: loss_of(solution, x, *others, **options),
        lambda x: loss_by_hand(x, *others, **options),
        (logp,),
        **CLOSE,
        because=f"clip {options.get('clip', 0.2)}, beta {options.get('beta', 0.04)}",
    )


@task("grpo_loss")
def test_masks_may_have_holes(solution, randn, rand):
    logp, old, ref, A, _ = responses(randn)
    mask = rand(4, 8) < 0.5
    mask[:, 2] = True
    for options in AGGREGATES:
        assert_gradients_close(
            lambda x, options=options: loss_of(solution, x, old, ref, A, mask, **options),
            lambda x, options=options: loss_by_hand(x, old, ref, A, mask, **options),
            (logp,),
            **CLOSE,
            because=f"only True counts, {options['aggregate']}",
        )


@task("grpo_loss")
def test_at_ratio_one_the_value_is_zero_and_the_gradient_is_not(solution, randn):
    logp, _, _, _, mask = responses(randn)
    A = torch.tensor([1.5, -0.5, -2.0, 1.0], dtype=torch.float64, device=logp.device)
    leaf = logp.clone().requires_grad_()
    loss = loss_of(solution, leaf, logp, logp, A, mask)
    assert_close(loss.detach(), torch.tensor(0.0, dtype=torch.float64), **CLOSE, because="the advantages sum up to 0")
    loss.backward()
    lengths = mask.sum(1, keepdim=True)
    expected = (-A[:, None] / lengths / 4 * mask).cpu()
    assert_close(leaf.grad, expected, **CLOSE, because="-A / |o| / N at each token that counts")


@task("grpo_loss")
@pytest.mark.parametrize(
    ("A", "ratio", "gradient"),
    [(2.0, 1.5, 0.0), (2.0, 0.5, -1.0), (-2.0, 1.5, 3.0), (-2.0, 0.5, 0.0), (2.0, 1.1, -2.2), (-2.0, 0.9, 1.8)],
)
def test_the_ratio_is_clipped_only_where_it_already_gained(solution, device, A, ratio, gradient):
    old = torch.tensor([[-1.0]], dtype=torch.float64, device=device)
    logp = (old + math.log(ratio)).requires_grad_()
    one = torch.ones(1, dtype=torch.float64, device=device)
    loss = loss_of(solution, logp, old, old, A * one, one.bool()[None], beta=0.0)
    value = -min(A * ratio, A * min(max(ratio, 0.8), 1.2))
    assert_close(
        loss.detach(),
        torch.tensor(value, dtype=torch.float64),
        **CLOSE,
        because=f"A = {A}, ratio = {ratio}, clip = 0.2",
    )
    (found,) = torch.autograd.grad(loss, logp, materialize_grads=True)
    expected = torch.tensor([[gradient]], dtype=torch.float64)
    assert_close(
        found,
        expected,
        **CLOSE,
        because=f"A = {A}, ratio = {ratio}: the gradient is -A * ratio, or 0 where it is clipped",
    )


@task("grpo_loss")
@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"aggregate": "response"}, 0.0),
        ({"aggregate": "token"}, 5 / 11),
        ({"aggregate": "constant", "max_len": 10}, 0.25),
        ({"aggregate": "constant", "max_len": 20}, 0.125),
    ],
)
def test_three_and_eight_tokens_tell_the_averages_apart(solution, randn, options, value):
    logp, _, _, _, mask = responses(randn, lengths=(3, 8))
    A = torch.tensor([1.0, -1.0], dtype=torch.float64, device=logp.device)
    found = loss_of(solution, logp, logp, logp, A, mask, **options)
    assert_close(
        found,
        torch.tensor(value, dtype=torch.float64),
        **CLOSE,
        because="each token costs -1 in the first response, 1 in the second",
    )


@task("grpo_loss")
def test_the_reference_holds_the_policy_back(solution, randn):
    logp, _, ref, _, mask = responses(randn)
    leaf, A = logp.clone().requires_grad_(), torch.zeros(4, dtype=torch.float64, device=logp.device)
    loss = loss_of(solution, leaf, logp, ref, A, mask, beta=0.5)
    d, lengths = ref - logp, mask.sum(1, keepdim=True)
    expected = (0.5 * ((d.exp() - d - 1) * mask / lengths).sum() / 4).cpu()
    assert_close(loss.detach(), expected, **CLOSE, because="without advantages, the loss is beta times k3")
    loss.backward()
    expected = (0.5 * (1 - d.exp()) * mask / lengths / 4).cpu()
    assert_close(leaf.grad, expected, **CLOSE, because="and its gradient is beta * (1 - exp(d)) / |o| / N")


@task("grpo_loss")
@pytest.mark.parametrize("garbage", [100.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", AGGREGATES)
def test_what_stands_under_the_mask_has_no_effect(solution, randn, garbage, options):
    logp, old, ref, A, mask = responses(randn)
    expected = loss_by_hand(logp, old, ref, A, mask, **options).cpu()
    dirty = [torch.where(mask, x, garbage) for x in (logp, old, ref)]
    leaf = dirty[0].requires_grad_()
    loss, stats = solution.grpo_loss(leaf, *dirty[1:], A, mask, **options)
    assert_close(loss.detach(), expected, **CLOSE, because=f"{garbage} stands where nothing was written")
    loss.backward()
    found = leaf.grad[~mask].cpu()
    assert_equal(found, torch.zeros_like(found), because="and gets the gradient 0")
    assert_that(bool(leaf.grad.isfinite().all()), "all gradients are finite", value=leaf.grad)
    finite = all(math.isfinite(value) for value in stats.values())
    assert_that(finite, "the statistics do not look there either", value=sorted(stats.items()))


@task("grpo_loss")
def test_an_empty_response_adds_nothing_and_counts(solution, randn):
    logp, old, ref, A, mask = responses(randn, lengths=(3, 0, 5))
    for options in AGGREGATES:
        expected = loss_by_hand(logp, old, ref, A, mask, **options).cpu()
        found = loss_of(solution, logp, old, ref, A, mask, **options)
        assert_close(
            found, expected, **CLOSE, because=f"{options['aggregate']}: it is one of three responses, and costs nothing"
        )


@task("grpo_loss")
@pytest.mark.parametrize("options", AGGREGATES)
def test_without_any_token_the_loss_is_zero(solution, randn, options):
    logp, old, ref, A, mask = responses(randn, lengths=(0, 0))
    loss, stats = solution.grpo_loss(logp, old, ref, A, mask, **options)
    assert_close(loss, torch.tensor(0.0, dtype=torch.float64), **CLOSE, because="nothing was written")
    found = [stats[name] for name in ("clip_fraction", "ratio", "kl")]
    assert_equal(found, [0.0, 0.0, 0.0], because="and there is nothing to count")


@task("grpo_loss")
@pytest.mark.parametrize("options", AGGREGATES)
def test_one_token_alone_is_divided_by_one(solution, randn, options):
    logp, old, ref, A, mask = responses(randn, lengths=(1,), T=3)
    expected = loss_by_hand(logp, old, ref, A, mask, **options).cpu()
    assert_close(
        loss_of(solution, logp, old, ref, A, mask, **options), expected, **CLOSE, because="one response of one token"
    )


@task("grpo_loss")
def test_gradients_flow_to_the_policy_alone(solution, randn):
    logp, old, ref, A, mask = responses(randn)
    leaves = [x.clone().requires_grad_() for x in (logp, old, ref, A)]
    loss = loss_of(solution, *leaves, mask)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    names = [
        name
        for name, grad in zip(("logp", "old_logp", "ref_logp", "advantages"), found, strict=True)
        if grad is not None and bool((grad != 0).any())
    ]
    assert_equal(names, ["logp"], because="everything else was measured, and is fixed")


@task("grpo_loss")
def test_statistics_are_floats_with_these_names(solution, randn):
    logp, *others = responses(randn)
    _, stats = solution.grpo_loss(logp.requires_grad_(), *others)
    found = sorted((name, type(value).__name__) for name, value in stats.items())
    expected = [(name, "float") for name in ("clip_fraction", "kl", "ratio", "zero_advantage")]
    assert_equal(found, expected, because="four floats, so that no graph outlives the step")


@task("grpo_loss")
def test_ratio_and_divergence_are_means_over_tokens(solution, randn):
    logp, old, ref, A, mask = responses(randn)
    _, stats = solution.grpo_loss(logp, old, ref, A, mask)
    ratio, d = (logp - old).exp()[mask], (ref - logp)[mask]
    assert_close(stats["ratio"], ratio.mean().item(), rtol=1e-9, because="the mean ratio of all tokens that count")
    assert_close(
        stats["kl"], (d.exp() - d - 1).mean().item(), rtol=1e-9, because="the mean of k3 over them, without beta"
    )


@task("grpo_loss")
def test_the_clip_fraction_counts_where_clipping_acts(solution, device):
    ratio = torch.tensor(
        [[1.5, 0.5, 1.0, 1.5], [1.5, 0.5, 0.1, 1.1], [1.5, 0.5, 1.0, 1.0]], dtype=torch.float64, device=device
    )
    A = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, device=device)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[0, 3] = mask[2, 3] = False
    old = torch.full_like(ratio, -1.0)
    _, stats = solution.grpo_loss(old + ratio.log(), old, old, A, mask)
    assert_close(
        stats["clip_fraction"], 3 / 10, rtol=1e-9, because="1.5 with A > 0; 0.5 and 0.1 with A < 0; never with A = 0"
    )


@task("grpo_loss")
def test_responses_without_an_advantage_are_counted(solution, randn):
    logp, old, ref, _, mask = responses(randn, lengths=(3, 0, 1, 5))
    A = torch.tensor([0.0, 2.0, 1e-9, -1.0], dtype=torch.float64, device=logp.device)
    _, stats = solution.grpo_loss(logp, old, ref, A, mask)
    assert_equal(stats["zero_advantage"], 0.25, because="one of four advantages is exactly 0")


@task("grpo_loss")
def test_the_loss_is_a_scalar_in_the_dtype_of_the_log_probabilities(solution, randn, dtype):
    logp, old, ref, A, mask = (x.to(dtype) if x.is_floating_point() else x for x in responses(randn))
    loss = loss_of(solution, logp, old, ref, A, mask)
    assert_equal((tuple(loss.shape), loss.dtype), ((), dtype), because="one number")


@task("grpo_loss")
@pytest.mark.parametrize("which", range(5))
def test_shapes_that_do_not_fit_are_refused(solution, randn, which):
    tensors = list(responses(randn))
    solution.grpo_loss(*tensors)
    tensors[which] = tensors[which][:3]
    shapes = sorted({str(tuple(x.shape)) for x in tensors})
    assert_raises(ValueError, solution.grpo_loss, *tensors, mentions=shapes)


@task("grpo_loss")
def test_averages_that_do_not_exist_are_refused(solution, randn):
    assert_raises(ValueError, solution.grpo_loss, *responses(randn), aggregate="median", mentions=["median"])
    assert_raises(ValueError, solution.grpo_loss, *responses(randn), aggregate="constant")


@cost_case("grpo_loss")
def grpo_loss_cost(module, randn):
    tensors = responses(randn, lengths=(5,) * 64)
    return lambda: module.grpo_loss(*tensors)


# load_start and greedy_accuracy


@pytest.fixture
def pairs(data_dir):
    return [tuple(pair) for pair in json.loads((data_dir / "pairs.json").read_text())]


def accuracy(solution, *args, **kwargs):
    """What greedy_accuracy says, without a draw."""
    with global_rng_untouched():
        return solution.greedy_accuracy(*args, **kwargs)


@task("greedy_accuracy")
def test_the_shipped_weights_are_loaded_exactly(solution, data_dir):
    model = solution.load_start(data_dir)
    state, stored = model.state_dict(), load_file(data_dir / "model.safetensors")
    assert_equal(sorted(state), sorted(stored), because="every tensor of the file has its place")
    assert_equal(sum(p.numel() for p in model.parameters()), 134528, because="the model that was shipped")
    for name, tensor in stored.items():
        assert_equal(state[name].cpu(), tensor.float(), because=f"{name} holds the stored bfloat16 numbers, in float32")
    assert_equal(model.training, False, because="it comes in eval mode")
    solution.load_start(str(data_dir))


@task("greedy_accuracy")
def test_the_shipped_model_is_as_good_as_it_was(solution, data_dir, pairs, device):
    model = solution.load_start(data_dir).to(device)
    found = accuracy(solution, model, pairs)
    assert_close(
        found, START_CORRECT / 500, rtol=1e-9, because="a parity test of everything that you built: pair by pair"
    )


@task("greedy_accuracy")
def test_accuracy_is_the_share_of_right_answers(solution, device):
    written = {"1+2=": "3<eos>", "12+3=": "51<eos>", "50+50=": "001<eos>", "4+5=": "90<eos>", "9+9=": "18<eos>"}
    model = answers(device, written)
    found = accuracy(solution, model, [(1, 2), (12, 3), (50, 50), (4, 5), (9, 9)])
    assert_close(
        found, 0.6, rtol=1e-9, because="3, 15 and 100 are right; 9 has a zero too many, and 18 is not reversed"
    )
    assert_equal(accuracy(solution, model, [(1, 2)]), 1.0, because="one of one")
    assert_equal(accuracy(solution, model, [(9, 9)]), 0.0, because="none of one")


@task("greedy_accuracy")
def test_answers_that_do_not_fit_are_wrong(solution, device):
    model = answers(device, {"1+2=": "3<eos>", "50+50=": "001<eos>", "2+2=": "4444444", "999+9=": "8001<eos>"})
    pairs = [(1, 2), (50, 50), (2, 2)]
    assert_close(accuracy(solution, model, pairs), 2 / 3, rtol=1e-9, because="four tokens are enough for 100")
    found = accuracy(solution, model, pairs, max_new_tokens=3)
    assert_close(found, 1 / 3, rtol=1e-9, because="with three tokens 100 never ends")
    assert_equal(
        accuracy(solution, model, [(999, 9)]), 0.0, because="four tokens, the default, are not enough for 1008"
    )


@task("greedy_accuracy")
def test_accuracy_draws_nothing(solution, device):
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    table[11, 3] = table[3, EOS] = 0.5
    model = Bigram(table)
    found = accuracy(solution, model, [(1, 2), (0, 3), (3, 0), (2, 2)])
    assert_equal(found, 0.75, because="the most probable tokens are 3 and <eos>, however little they lead")


# train_grpo


SUMS = [{"prompt": torch.tensor(encode(text))} for text in ("1+2=", "10+5=", "7+7=")]


def talker(randn, scale=0.7):
    """A Bigram that says this and that, and often ends."""
    table = scale * randn(V, V, dtype=torch.float64)
    table[:, EOS] += 1.2
    return Bigram(table).eval()


def taste(prompt, completion):
    """A reward that differs between many completions: of three such numbers one is the mean only if all are equal."""
    return 2.0 ** (sum((3 * i + 1) * token for i, token in enumerate(ids_of(completion))) % 5)


class Heard:
    """A reward function that remembers what it was asked."""

    def __init__(self, reward=taste):
        self.asked, self.reward = [], reward

    def __call__(self, prompt, completion):
        self.asked.append((prompt, completion))
        return self.reward(prompt, completion)


def trained_by_hand(model, ref, heard, *, per_step, group, inner_epochs, lr, clip=0.2, beta=0.04, max_norm=1.0):
    """Train on what was heard, response by response: the history."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    history = {name: [] for name in ("reward", "loss", "kl", "clip_fraction", "zero_spread")}
    for start in range(0, len(heard.asked), per_step * group):
        asked = heard.asked[start : start + per_step * group]
        rewards = torch.tensor([heard.reward(*one) for one in asked]).view(-1, group)
        A = advantages(rewards).flatten().to(torch.float64)
        rows = []
        for prompt, completion in asked:
            end = completion.find("<eos>")
            text = completion if end < 0 else completion[: end + 5]
            rows.append((encode(prompt), ids_of(text)))
        with torch.no_grad():
            old = [scored(model, *row) for row in rows]
            fixed = [scored(ref, *row) for row in rows]
        for _ in range(inner_epochs):
            costs, kls, clipped = [], [], []
            for row, before, other, a in zip(rows, old, fixed, A.tolist(), strict=True):
                logp = scored(model, *row)
                tokens = [
                    token_cost(x, o.item(), r.item(), a, clip, beta)
                    for x, o, r in zip(logp, before, other, strict=True)
                ]
                costs.append(torch.stack(tokens).mean())
                d, ratio = (other - logp).detach(), (logp - before).exp().detach()
                kls += (d.exp() - d - 1).tolist()
                clipped += [(a > 0 and x > 1 + clip) or (a < 0 and x < 1 - clip) for x in ratio.tolist()]
            loss = torch.stack(costs).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        history["reward"].append(rewards.double().mean().item())
        history["loss"].append(loss.item())
        history["kl"].append(sum(kls) / len(kls))
        history["clip_fraction"].append(sum(clipped) / len(clipped))
        history["zero_spread"].append((rewards == rewards[:, :1]).all(1).double().mean().item())
    return history


SMALL = {"prompts_per_step": 2, "group_size": 3, "inner_epochs": 2, "lr": 0.05}
RUNS = [
    {"steps": 1, **SMALL, "inner_epochs": 3, "lr": 0.4},
    {"steps": 1, **SMALL, "inner_epochs": 3, "lr": 0.3, "clip": 0.1},
    {"steps": 3, **SMALL, "inner_epochs": 1, "beta": 1.5, "max_norm": 0.05},
    {"steps": 1, **SMALL, "inner_epochs": 4, "lr": 0.4, "beta": 10.0},  # gradients of norms around 1 and 2
]


def run_both(solution, randn, device, seed, options):
    """Train a model, then another one by hand on what the first was rewarded for: (model, history, model, history)."""
    ours, ref, heard = talker(randn), talker(randn), Heard()
    theirs = copy.deepcopy(ours)
    history = solution.train_grpo(
        ours, ref, SUMS, reward=heard, generator=dice(device, seed), max_new_tokens=3, **options
    )
    n = options["steps"] * options["prompts_per_step"] * options["group_size"]
    assert_equal(len(heard.asked), n, because="one reward for each sample")
    same = {
        name: value for name, value in options.items() if name in ("inner_epochs", "lr", "clip", "beta", "max_norm")
    }
    per_step, group = options["prompts_per_step"], options["group_size"]
    expected = trained_by_hand(theirs, ref, heard, per_step=per_step, group=group, **same)
    return ours, history, theirs, expected


@task("train_grpo")
@pytest.mark.parametrize("options", RUNS)
def test_weights_change_as_the_definition_says(solution, randn, device, seed, options):
    ours, _, theirs, _ = run_both(solution, randn, device, seed, options)
    found, expected = ours.lm_head.weight.detach(), theirs.lm_head.weight.detach()
    assert_close(found, expected, rtol=1e-4, atol=1e-5, because="the same samples and rewards, response by response")


@task("train_grpo")
@pytest.mark.parametrize("options", RUNS)
def test_history_tells_what_happened(solution, randn, device, seed, options):
    _, history, _, expected = run_both(solution, randn, device, seed, options)
    for name, values in expected.items():
        found = getattr(history, name)
        kinds = {type(value).__name__ for value in found}
        assert_equal(kinds, {"float"}, because=f"{name} holds floats: a tensor would keep its graph alive")
        assert_equal(len(found), options["steps"], because="one number per step")
        found, wanted = (torch.tensor(x, dtype=torch.float64) for x in (found, values))
        assert_close(found, wanted, rtol=1e-4, atol=1e-5, because=f"{name}, step by step")


@task("train_grpo")
def test_groups_that_agree_change_nothing(solution, randn, device, seed):
    model = talker(randn)
    before = model.lm_head.weight.detach().cpu().clone()
    heard = Heard(lambda prompt, completion: 0.1 if prompt == "1+2=" else 0.7)
    history = solution.train_grpo(
        model,
        copy.deepcopy(model),
        SUMS,
        reward=heard,
        generator=dice(device, seed),
        steps=2,
        prompts_per_step=4,
        group_size=3,
        inner_epochs=1,
        lr=0.1,
    )
    assert_equal(history.zero_spread, [1.0, 1.0], because="within each group all rewards are equal")
    assert_close(
        model.lm_head.weight.detach(), before, because="no advantage, no divergence, no weight decay: no change"
    )


@task("train_grpo")
def test_each_sample_is_rewarded_by_its_texts(solution, randn, device, seed):
    heard = Heard()
    model = talker(randn)
    solution.train_grpo(
        model,
        model,
        SUMS,
        reward=heard,
        generator=dice(device, seed),
        steps=2,
        prompts_per_step=5,
        group_size=4,
        inner_epochs=1,
        lr=1e-3,
    )
    assert_equal(len(heard.asked), 40, because="2 steps, 5 prompts, 4 samples of each")
    prompts = [prompt for prompt, _ in heard.asked]
    assert_that(
        set(prompts) <= {"1+2=", "10+5=", "7+7="}, "prompts are those of the dataset", value=sorted(set(prompts))
    )
    together = all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert_that(together, "the four samples of a prompt follow one another", value="mixed")
    lengths = {len(ids_of(text[: text.find("<eos>") + 5 if "<eos>" in text else None])) for _, text in heard.asked}
    assert_that(max(lengths) <= 4, "no completion has more than four tokens by default", value=max(lengths))
    fine = all("<eos>" in text or len(ids_of(text)) == 4 for _, text in heard.asked)
    assert_that(fine, "a completion that ended is handed over with its <eos>", value="no <eos>")


@task("train_grpo")
def test_samples_come_as_the_model_says(solution, device, seed):
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    table[11, 2:9] = torch.tensor(GENTLE, device=device, dtype=torch.float64)
    expected = filtered(table[11][None])[0].tolist()
    heard, model = Heard(lambda prompt, completion: 0.0), Bigram(table).eval()
    solution.train_grpo(
        model,
        copy.deepcopy(model),
        SUMS,
        reward=heard,
        generator=dice(device, seed),
        steps=1,
        prompts_per_step=1500,
        group_size=2,
        inner_epochs=1,
        lr=1e-3,
        max_new_tokens=1,
    )
    first = torch.tensor([ids_of(completion)[0] for _, completion in heard.asked])
    because = "3,000 first tokens come as often as the softmax says, unfiltered; in tenths:"
    assert_that(surprise(first, expected) < far(V - 1), because, value=shares(first))
    names = ["1+2=", "10+5=", "7+7="]
    drawn = torch.tensor([names.index(prompt) for prompt, _ in heard.asked[::2]])
    because = "1,500 prompts come from three sums with equal chances; in tenths:"
    assert_that(surprise(drawn, [1 / 3] * 3) < far(2), because, value=shares(drawn)[:3])


@task("train_grpo")
def test_the_reference_model_is_left_alone(solution, randn, device, seed):
    model, ref = talker(randn), talker(randn)
    before = ref.lm_head.weight.detach().cpu().clone()
    solution.train_grpo(model, ref, SUMS, reward=taste, generator=dice(device, seed), steps=2, **SMALL)
    assert_equal(ref.lm_head.weight.detach(), before, because="the reference is never changed")
    assert_that(ref.lm_head.weight.grad is None, "and gets no gradients", value="a gradient")
    found = [(call["cached"], call["gradients"]) for call in ref.calls]
    assert_equal(found, [(False, False)] * 2, because="it scores each step's samples once, without gradients")


@task("train_grpo")
def test_a_step_costs_what_it_must(solution, randn, device, seed):
    model, ref = talker(randn), talker(randn)
    solution.train_grpo(
        model,
        ref,
        SUMS,
        reward=taste,
        generator=dice(device, seed),
        steps=2,
        prompts_per_step=2,
        group_size=4,
        inner_epochs=3,
        lr=1e-3,
    )
    assert_equal([made[0] for made in model.made], [8, 8], because="one generation per step, for all samples at once")
    updates = sum(call["gradients"] for call in model.calls)
    assert_equal(updates, 2 * 3, because="inner_epochs forward passes with gradients per step")
    scorings = sum(not call["gradients"] and not call["cached"] for call in model.calls)
    assert_that(scorings <= 2, "the old log-probabilities are taken once per step, at most", value=scorings)


@task("train_grpo")
def test_a_run_is_a_function_of_the_generator(solution, randn, device, seed):
    start = talker(randn)
    weights = []
    with global_rng_untouched():
        for _ in range(2):
            model = copy.deepcopy(start)
            solution.train_grpo(model, start, SUMS, reward=taste, generator=dice(device, seed), steps=2, **SMALL)
            weights.append(model.lm_head.weight.detach().cpu())
    assert_equal(weights[1], weights[0], because="the same generator, the same run")


@task("train_grpo")
def test_by_default_sums_are_rewarded(solution, device, seed):
    table = torch.zeros(V, V, dtype=torch.float64, device=device)
    table[11, 3] = table[3, EOS] = 60.0
    model = Bigram(table).eval()
    history = solution.train_grpo(
        model,
        copy.deepcopy(model),
        SUMS[:1],
        generator=dice(device, seed),
        steps=1,
        prompts_per_step=2,
        group_size=2,
        inner_epochs=1,
        lr=1e-3,
    )
    assert_equal(history.reward, [1.0], because="the model answers 1+2= with 3 and <eos>")


# improve


@task("improve")
def test_the_run_has_the_sizes_that_were_promised(solution, device, seed):
    model = Adder(torch.zeros(V, V, dtype=torch.float64, device=device)).eval()
    history = solution.improve(model, steps=2, generator=dice(device, seed))
    assert_equal([len(x) for x in history], [2] * 5, because="two steps were asked for")
    assert_equal([made[0] for made in model.made], [256] * 2, because="32 prompts, 8 samples of each")
    updates = sum(call["gradients"] for call in model.calls)
    assert_equal(updates, 2 * 2, because="two inner epochs per step")
    change = model.lm_head.weight.detach().abs().max().item()
    because = "AdamW moves a weight by about its learning rate, 2e-4, in each of four updates; in units of that:"
    assert_that(1.0 < change / 2e-4 < 4.04, because, value=round(change / 2e-4))


@task("improve")
def test_the_learning_rate_can_be_chosen(solution, device, seed):
    model = Adder(torch.zeros(V, V, dtype=torch.float64, device=device)).eval()
    solution.improve(model, steps=1, lr=0.05, generator=dice(device, seed))
    change = model.lm_head.weight.detach().abs().max().item()
    because = "AdamW moves a weight by about its learning rate, 0.05, in each of two updates; in units of that:"
    assert_that(0.95 < change / 0.05 < 2.02, because, value=round(change / 0.05, 1))


@task("improve")
def test_prompts_have_two_digits_and_are_not_those_of_the_test(solution, device, seed):
    model = Adder(torch.zeros(V, V, dtype=torch.float64, device=device)).eval()
    heard = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: heard.extend(args[0].tolist()) if len(args[0].T) > 1 else None
    )
    try:
        solution.improve(model, steps=1, generator=dice(device, seed))
    finally:
        handle.remove()
    texts = {decode([token for token in row if token != PAD]).partition("=")[0] for row in heard}
    asked = {tuple(map(int, text.split("+"))) for text in texts}
    train = set(ArithmeticDataset(2, "train").pairs)
    assert_that(asked <= train, "all prompts belong to the train part", value=len(asked - train))
    assert_that(len(asked) > 8, "32 prompts are drawn from thousands", value=len(asked))


@task("improve")
def test_the_reference_stays_what_the_model_was(solution, device, seed):
    model = Adder(torch.zeros(V, V, dtype=torch.float64, device=device)).eval()
    scored_by = []

    def note(module, args, output):
        if isinstance(module, Adder) and not module.calls[-1]["cached"] and not module.calls[-1]["gradients"]:
            if module is not model:
                scored_by.append(module.lm_head.weight.abs().max().item())

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        solution.improve(model, steps=3, lr=0.5, generator=dice(device, seed))
    finally:
        handle.remove()
    assert_equal(
        scored_by, [0.0] * 3, because="in each of three steps another model scores, with the weights of the start"
    )


@task("improve")
def test_forty_steps_teach_two_digit_sums(solution, data_dir, pairs, device):
    cfg = json.loads((data_dir / "config.json").read_text())
    model = DeepSeekForCausalLM(DeepSeekConfig.from_dict(cfg))
    model.load_state_dict({name: x.float() for name, x in load_file(data_dir / "model.safetensors").items()})
    model.to(device).eval()
    history = solution.improve(model, generator=dice(device, 0))
    assert_equal(len(history.reward), 40, because="40 steps are the default")
    right = 0
    with torch.no_grad():
        for prompt_length in sorted({len(f"{a}+{b}=") for a, b in pairs}):
            group = [(a, b) for a, b in pairs if len(f"{a}+{b}=") == prompt_length]
            rows = torch.tensor([encode(f"{a}+{b}=") for a, b in group], device=device)
            for _ in range(4):
                rows = torch.cat((rows, model(rows)[:, -1:].argmax(-1)), 1)
            for (a, b), row in zip(group, rows[:, prompt_length:].tolist(), strict=True):
                right += decode(row).startswith(str(a + b)[::-1] + "<eos>")
    assert_that(right >= AFTER * len(pairs), "most of the 500 sums are right after 40 steps", value=right // 50)
    early, late = sum(history.reward[:5]) / 5, sum(history.reward[-5:]) / 5
    assert_that(late > early + 0.05, "and more of the samples are right, too", value=[round(early, 1), round(late, 1)])


# kl_penalty


def policies(randn):
    """Logits of a policy, of the one that sampled, and of the reference, over six tokens."""
    return tuple(randn(6, dtype=torch.float64) for _ in range(3))


def log_softmax(x):
    return x - torch.logsumexp(x, -1)


@task("kl_penalty")
@pytest.mark.parametrize("moved", [False, True])
def test_the_mean_penalty_is_the_divergence(solution, randn, moved):
    policy, old, ref = policies(randn)
    old = old if moved else policy
    p, o, q = log_softmax(policy), log_softmax(old), log_softmax(ref)
    expected = (p.exp() * (p - q)).sum().cpu()
    found = (o.exp() * solution.kl_penalty(p, o, q)).sum()
    assert_close(found, expected, because="all six tokens, weighted by the policy that draws them")


@task("kl_penalty")
@pytest.mark.parametrize("moved", [False, True])
def test_the_mean_gradient_is_that_of_the_divergence(solution, randn, moved):
    policy, old, ref = policies(randn)
    old = old if moved else policy
    o, q = log_softmax(old.clone()), log_softmax(ref)
    leaf, other = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    p = log_softmax(other)
    (expected,) = torch.autograd.grad((p.exp() * (p - q)).sum(), other)
    penalty = solution.kl_penalty(log_softmax(leaf), o, q)
    (found,) = torch.autograd.grad((o.exp() * penalty).sum(), leaf, materialize_grads=True)
    assert_close(found, expected, because="the gradient of KL(policy || reference), all six tokens enumerated")


@task("kl_penalty")
def test_only_the_policy_gets_a_gradient(solution, randn):
    leaves = [(-randn(3, 4, dtype=torch.float64).abs()).requires_grad_() for _ in range(3)]
    found = torch.autograd.grad(solution.kl_penalty(*leaves).sum(), leaves, allow_unused=True)
    names = [
        name
        for name, grad in zip(("logp", "old_logp", "ref_logp"), found, strict=True)
        if grad is not None and bool((grad != 0).any())
    ]
    assert_equal(names, ["logp"], because="old policy and reference are fixed")


@task("kl_penalty")
def test_each_token_has_its_penalty(solution, randn):
    logp, old, ref = (-randn(3, 4, dtype=torch.float64).abs() for _ in range(3))
    whole = solution.kl_penalty(logp, old, ref).detach().cpu()
    assert_equal(tuple(whole.shape), (3, 4), because="one number per token")
    part = solution.kl_penalty(logp[1:2, 2:3], old[1:2, 2:3], ref[1:2, 2:3])
    assert_close(part, whole[1:2, 2:3], because="a token's penalty does not depend on the others")
