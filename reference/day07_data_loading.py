"""From pairs of numbers to batches of tokens.

A data set answers `data[i]`, a batch sampler says which `i` go together, a collate function makes one batch of
them, and a loader is the loop around the three: the protocol of torch.utils.data. The task is addition with
the digits of the answer written backwards, so that each one depends only on what stands before it
(Lee et al., "Teaching Arithmetic to Small Transformers", arXiv 2307.03381, section "Learning Addition in Small Models").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reference.day01_tensor_basics import pad_stack

VOCAB = (*"0123456789+=", "<eos>", "<pad>")
EOS_ID = 12
PAD_ID = 13


def encode(s: str) -> list[int]:
    """Return the id of each character of `s`."""
    ids = []
    for character in s:
        if character not in VOCAB:
            raise ValueError(f"{character!r} is not in the vocabulary {''.join(VOCAB[:EOS_ID])!r}")
        ids.append(VOCAB.index(character))
    return ids


def decode(ids: Iterable[int]) -> str:
    """Return the text that the ids stand for."""
    pieces = []
    for i in ids:
        if not 0 <= i < len(VOCAB):
            raise ValueError(f"there is no token {int(i)}: the vocabulary has {len(VOCAB)}")
        pieces.append(VOCAB[i])
    return "".join(pieces)


class TokenWindows(Dataset):
    """Every window of `context` tokens with the tokens that follow its places."""

    def __init__(self, tokens: Tensor, context: int):
        if tokens.dim() != 1:
            raise ValueError(f"tokens must be one row (N,), but have shape {tuple(tokens.shape)}")
        if context < 1:
            raise ValueError(f"context ({context}) must be at least 1")
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return max(0, len(self.tokens) - self.context)  # the last window must have a token behind it

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"index {index} is out of range for {n} windows")
        start = index % n
        window = self.tokens[start : start + self.context + 1]
        return window[:-1], window[1:]


class ArithmeticDataset(Dataset):
    """All sums of two numbers with up to n_digits digits, split so that a+b and b+a stay together."""

    def __init__(self, n_digits: int, split: str, *, op: str = "+", test_fraction: float = 0.1, seed: int = 0):
        if n_digits < 1:
            raise ValueError(f"n_digits ({n_digits}) must be at least 1")
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        if op != "+":
            raise ValueError(f"the vocabulary has no operation {op!r}, only '+'")
        if not 0 <= test_fraction <= 1:
            raise ValueError(f"test_fraction ({test_fraction}) must lie between 0 and 1")
        numbers = 10**n_digits
        unordered = [(a, b) for a in range(numbers) for b in range(a, numbers)]
        order = np.random.default_rng(seed).permutation(len(unordered))
        n_test = round(test_fraction * len(unordered))
        drawn = order[:n_test] if split == "test" else order[n_test:]
        pairs = {unordered[i] for i in drawn}
        self.pairs = sorted(pairs | {(b, a) for a, b in pairs})

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        a, b = self.pairs[index]
        return {
            "prompt": torch.tensor(encode(f"{a}+{b}=")),
            "answer": torch.tensor(encode(str(a + b)[::-1])),
        }


def pad_collate(batch: list[dict[str, Tensor]], pad_id: int, ignore_index: int = -100) -> dict[str, Tensor]:
    """Pad questions with their answers into one batch, and label only what the model has to write."""
    rows, targets = [], []
    for item in batch:
        prompt, answer = item["prompt"], item["answer"]
        given = prompt.new_full((len(prompt) - 1,), ignore_index)  # the next token is still a prompt token
        rows.append(torch.cat((prompt, answer)))  # (P + A,)
        targets.append(torch.cat((given, answer, answer.new_tensor([EOS_ID]))))  # (P - 1 + A + 1,)
    input_ids, lengths = pad_stack(rows, pad_id)  # (B, T), (B,)
    labels, _ = pad_stack(targets, ignore_index)  # (B, T)
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths}


class ShuffledBatchSampler:
    """Batches of indices in an order that is a function of seed and epoch alone."""

    def __init__(self, n: int, batch_size: int, *, drop_last: bool = False, seed: int = 0):
        if n < 0:
            raise ValueError(f"n ({n}) must not be negative")
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        self.n, self.batch_size, self.drop_last, self.seed = n, batch_size, drop_last, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.n, self.batch_size)
        return full if self.drop_last else full + (rest > 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n).tolist()
        for number in range(len(self)):
            start = number * self.batch_size
            yield order[start : start + self.batch_size]


class Loader:
    """The loop of a data loader: ask the sampler, fetch the items, collate them."""

    def __init__(self, dataset: Any, batch_sampler: Any, collate_fn: Callable[[list], Any]):
        self.dataset, self.batch_sampler, self.collate_fn = dataset, batch_sampler, collate_fn

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        for indices in self.batch_sampler:
            yield self.collate_fn([self.dataset[i] for i in indices])


class BucketBatchSampler:
    """Batches of items of similar length, each as large as max_tokens allows."""

    def __init__(self, lengths: Sequence[int], max_tokens: int, seed: int):
        for length in lengths:
            if length > max_tokens:
                raise ValueError(f"an item of {length} tokens does not fit into a batch of {max_tokens}")
        self.lengths, self.max_tokens, self.seed = list(lengths), max_tokens, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._cut(range(len(self.lengths))))

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = self._cut(rng.permutation(len(self.lengths)).tolist())
        for number in rng.permutation(len(batches)):
            yield batches[number]

    def _cut(self, order: Iterable[int]) -> list[list[int]]:
        """Sort by length (equal lengths stay in the given order), and begin a batch where the next is too much."""
        batches: list[list[int]] = []
        for index in sorted(order, key=lambda i: self.lengths[i]):
            # in rising order the newest item is the longest, to which all others are padded
            if not batches or (len(batches[-1]) + 1) * self.lengths[index] > self.max_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches


class ResumableLoader:
    """A loader that knows where it stands: which epoch, and how many of its batches were handed out."""

    def __init__(self, dataset: Any, batch_sampler: Any, collate_fn: Callable[[list], Any]):
        self.dataset, self.batch_sampler, self.collate_fn = dataset, batch_sampler, collate_fn
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        self.batch_sampler.set_epoch(self.epoch)
        batches = list(self.batch_sampler)  # indices, no data
        for indices in batches[self.position :]:
            batch = self.collate_fn([self.dataset[i] for i in indices])
            self.position += 1  # before the batch goes out: the caller may save the state while it holds it
            if self.position == len(batches):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the place as two numbers."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a place that `state_dict` returned."""
        self.epoch, self.position = state["epoch"], state["position"]
