"""Day 07: data. From pairs of numbers to batches of tokens, in an order that can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from day01_tensor_basics import pad_stack
from torch import Tensor
from torch.utils.data import Dataset

VOCAB = (*"0123456789+=", "<eos>", "<pad>")  # a token's id is its place in this list
EOS_ID = 12
PAD_ID = 13


def encode(s: str) -> list[int]:
    """Return the id of each character of `s`, as a list of Python ints; an empty text gives [].

    Only the twelve characters 0123456789+= can be written. Anything else, other kinds of digits and blanks
    included, raises ValueError with the character in its message. The special tokens cannot be typed: "<eos>"
    in a text is five characters, and "<" is not in the vocabulary.
    """
    raise NotImplementedError


def decode(ids: Iterable[int]) -> str:
    """Return the text of `ids`, which are a list of ints or a LongTensor (T,); no ids give "".

    Special tokens appear under their names, "<eos>" and "<pad>". So decode(encode(s)) is s for every text that
    can be encoded. An id that is not one of 0 to 13 raises ValueError with the id in its message.
    """
    raise NotImplementedError


class TokenWindows(Dataset):
    """All windows of `context` tokens in one long row, each with the tokens that follow.

    tokens (N,) of any dtype. Item i is the pair (x, y), both of shape (context,): x holds the tokens from place
    i on, y those from place i + 1 on, so that y[t] is the token after x[t]. Windows overlap: there is one for
    each start whose y is complete, N - context in all, and none where N <= context.

    x and y are views: a data set and its items allocate no memory for tokens (0 new bytes), whatever the
    strides of `tokens`, and what is later written into `tokens` shows in the items. `tokens` is not changed.

    Indices from -len to -1 count from the end. Any other index outside 0 to len - 1 raises IndexError, which
    also is what ends a `for` loop over the data set. A context below 1, or tokens that are not one row, raise
    ValueError with the context or the shape in the message.
    """

    def __init__(self, tokens: Tensor, context: int):
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class ArithmeticDataset(Dataset):
    """All questions a+b= with a and b from 0 to 10**n_digits - 1, divided into "train" and "test".

    An item is {"prompt": Long (P,), "answer": Long (A,)} on the CPU, made of the ids of VOCAB. The prompt is the
    text a+b= and the answer is the sum with its digits *reversed*; numbers are written without leading zeros,
    so 7 plus 15 is the prompt "7+15=" and the answer "22", 61 plus 52 has the answer "311". There is no <eos>.
    Items are in rising order of (a, b). Each access makes new tensors.

    `split` is "train" or "test". The two are disjoint and together complete. a+b and b+a always are in the same
    split, or the test would ask what the training has answered. There are U = n * (n + 1) / 2 unordered pairs
    with n = 10**n_digits; of these, test_fraction * U, rounded to a neighboring whole number, are drawn at random
    for the test. 0 and 1 are allowed, and leave one split empty.

    What is in which split depends only on n_digits, test_fraction and `seed` (a whole number, at least 0): not
    on the global random state, which stays untouched, nor on what was made or read before. Each pair can be
    drawn, and another seed draws others.

    Indices from -len to -1 count from the end; any other index outside 0 to len - 1 raises IndexError. Another
    split, an `op` other than "+" (the vocabulary has no other), n_digits below 1 and a test_fraction outside
    0 to 1 raise ValueError with the value in the message.
    """

    def __init__(self, n_digits: int, split: str, *, op: str = "+", test_fraction: float = 0.1, seed: int = 0):
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError


def pad_collate(batch: list[dict[str, Tensor]], pad_id: int, ignore_index: int = -100) -> dict[str, Tensor]:
    """Turn items {"prompt": Long (P,), "answer": Long (A,)} into {"input_ids", "labels", "lengths"}.

    Row b of `input_ids` (B, T) is the prompt of item b, then its answer, then `pad_id`; T is the largest P + A.
    `lengths` (B,) holds the P + A. Row b of `labels` (B, T) says for each place which token comes *next*, the
    shift is done here, but only where that token has to be written by the model: the A answer tokens and,
    after the last of them, EOS_ID. So the first answer token is the label of the last prompt token, EOS_ID is
    the label of the last answer token (and never an input), and A + 1 labels of the row count. All other places,
    prompt and padding, have `ignore_index`.

    What counts is decided by place, never by value: `pad_id` may be the id of a digit. P is at least 1, A may be
    0. All three results are int64 and on the device of the items, which are not changed. An empty batch raises
    ValueError.
    """
    raise NotImplementedError


class ShuffledBatchSampler:
    """Batches of the indices 0 to n - 1 in random order, each a list of at most batch_size Python ints.

    One pass (one `iter`) gives each index exactly once. All batches have batch_size indices but the last, which
    has what is left; with `drop_last` a shorter last batch is left out. `len` is the number of batches in a
    pass; n may be 0.

    The order depends only on n, seed and epoch (whole numbers, at least 0). A new sampler is in epoch 0, and
    only `set_epoch` changes that: two passes without it are the same, a pass in epoch 3 is the same whether or
    not epochs 0 to 2 came before, and two passes that are under way at one time do not disturb each other.
    Each other seed or epoch has an order of its own, also where the sum of the two is the same: seed 1 in epoch
    0 is not seed 0 in epoch 1. Every index can come to every place, with any other behind it.

    The global random state is neither used nor touched. batch_size below 1 and n below 0 raise ValueError with
    the number in the message.
    """

    def __init__(self, n: int, batch_size: int, *, drop_last: bool = False, seed: int = 0):
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the passes that begin after this call."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        raise NotImplementedError


class Loader:
    """An iterable of batches: for each list of indices from `batch_sampler`, collate_fn([dataset[i], ...]).

    The items are given to `collate_fn` as one list, in the order of the indices, and what it returns is passed
    on as it is. `batch_sampler` is any iterable of lists of indices that has a length. The batches are those of
    torch.utils.data.DataLoader with the same three arguments, which may not be used.

    Each `for` loop begins a new pass over `batch_sampler`, and asks it only then, so that its set_epoch works
    between passes. Two passes that are under way at one time do not disturb each other. An item is fetched when
    its batch is asked for, not earlier, and once. `len` is that of `batch_sampler`.
    """

    def __init__(self, dataset: Any, batch_sampler: Any, collate_fn: Callable[[list], Any]):
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError


class BucketBatchSampler:
    """Batches of indices of similarly long items, each as large as a limit on its padded size allows.

    lengths[i], at least 1, is the number of tokens of item i. A batch is a list of Python ints, never empty, and
    the longest of its items times the number of its items is at most max_tokens. One pass gives each index
    exactly once. `len` is the number of batches of a pass in the present epoch; without lengths it is 0.

    Little is padded, and few batches do it. For lengths such as texts have (a thousand or more, many short and
    few long, none above a quarter of max_tokens) the padded sizes of all batches add up to at most 1.2 times the
    sum of the lengths, and there are at most 1.5 * sum(lengths) / max_tokens batches.

    In each epoch the batches come in another random order, not sorted by length, and items of equal length come
    together in other companies. Seed, epoch and set_epoch work as in ShuffledBatchSampler: a pass depends only
    on lengths, max_tokens, seed and epoch, and the global random state is neither used nor touched.
    `lengths` is not changed. A length above max_tokens raises ValueError with both numbers in the message; one
    that equals it is allowed.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int, seed: int):
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the passes that begin after this call."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        raise NotImplementedError


class ResumableLoader:
    """A Loader that can be stopped anywhere, also in the middle of an epoch, and go on in a new process.

    `batch_sampler` is like the two above: a pass depends only on its epoch, and set_epoch chooses it. The number
    of batches may be another one in each epoch. This loader counts the epochs itself, from 0: it calls set_epoch
    at the beginning of each `for` loop, so that consecutive full loops are the epochs 0, 1, 2, ... of the sampler.
    `len` is that of `batch_sampler`.

    A loop that was left in the middle is continued by the next one: it gives the rest of the epoch. A batch that
    was handed out counts as done, from the moment at which the caller holds it. After the last batch of an
    epoch, the next loop gives the next epoch, even if the last loop was left at that very batch.

    `state_dict()` says where the loader stands: a dict that `json` can write and read, below 200 characters however
    large the data set is, and not changed by what the loader does later. `load_state_dict` of another loader,
    made from equal parts (same data, lengths, seeds), takes such a state; from there on its batches are exactly
    those that the first loader gives, in this epoch and all later ones. The state is not changed by that.

    Items are fetched when their batch is asked for, not earlier, and those of batches that were done before are
    not fetched again. DataLoader may not be used.
    """

    def __init__(self, dataset: Any, batch_sampler: Any, collate_fn: Callable[[list], Any]):
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a `state_dict` says; the next loop goes on from there."""
        raise NotImplementedError
