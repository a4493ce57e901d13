import random

import torch
from torch.utils.data import Dataset

from checker.testing import alternative

NAMES = list("0123456789+=") + ["<eos>", "<pad>"]
IDS = {name: i for i, name in enumerate(NAMES[:12])}


@alternative("encode")
def encode(s):
    try:
        return [IDS[character] for character in s]
    except KeyError as error:
        raise ValueError(f"unknown character {error.args[0]}") from None


@alternative("decode")
def decode(ids):
    ids = [int(i) for i in ids]
    if unknown := [i for i in ids if i not in range(14)]:
        raise ValueError(f"unknown ids {unknown}")
    return "".join(map(NAMES.__getitem__, ids))


@alternative("TokenWindows")
class Unfolded(Dataset):
    def __init__(self, tokens, context):
        if tokens.ndim != 1 or context <= 0:
            raise ValueError(f"tokens {tuple(tokens.shape)}, context {context}")
        self.context = context
        self.tokens = tokens
        self.starts = range(len(tokens) - context)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        start = self.starts[index]
        pair = self.tokens.narrow(0, start, self.context + 1).unfold(0, self.context, 1)
        return pair[0], pair[1]


@alternative("ArithmeticDataset")
class Coded(Dataset):
    """A question is the number n * a + b, and what is in the test is marked in a table."""

    def __init__(self, n_digits, split, *, op="+", test_fraction=0.1, seed=0):
        if op not in ["+"] or split not in {"train", "test"} or n_digits <= 0 or not (1 >= test_fraction >= 0):
            raise ValueError(f"n_digits={n_digits}, split={split}, op={op}, test_fraction={test_fraction}")
        self.n = 10**n_digits
        upper = torch.ones(self.n, self.n).triu().nonzero()
        keys = torch.rand(len(upper), generator=torch.Generator().manual_seed(seed))
        a, b = upper[keys.argsort()[: int(test_fraction * len(upper))]].T
        in_test = torch.zeros(self.n, self.n, dtype=torch.bool)
        in_test[a, b] = in_test[b, a] = True
        wanted = in_test if split == "test" else ~in_test
        self.codes = wanted.flatten().nonzero().flatten().tolist()

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, index):
        a, b = divmod(self.codes[index], self.n)
        digits, rest = [], a + b
        while rest or not digits:
            rest, digit = divmod(rest, 10)
            digits.append(digit)
        prompt = [IDS[c] for c in f"{a}+{b}="]
        return {"prompt": torch.LongTensor(prompt), "answer": torch.LongTensor(digits)}


@alternative("pad_collate")
def pad_collate(batch, pad_id, ignore_index=-100):
    if len(batch) == 0:
        raise ValueError("empty batch")
    lengths = torch.stack([torch.tensor(len(item["prompt"]) + len(item["answer"])) for item in batch])
    lengths = lengths.to(batch[0]["prompt"].device)
    starts = torch.tensor([len(item["prompt"]) for item in batch], device=lengths.device)
    full = lengths.new_full((len(batch), int(lengths.max()) + 1), 12)
    for row, item in zip(full, batch, strict=True):
        row[: len(item["prompt"])] = item["prompt"]
        row[len(item["prompt"]) :][: len(item["answer"])] = item["answer"]
    place = torch.arange(full.shape[1] - 1, device=lengths.device)
    inside = place < lengths[:, None]
    written = inside & (place >= starts[:, None] - 1)
    return {
        "input_ids": torch.where(inside, full[:, :-1], pad_id),
        "labels": torch.where(written, full[:, 1:], ignore_index),
        "lengths": lengths,
    }


@alternative("ShuffledBatchSampler")
class HashSeeded:
    def __init__(self, n, batch_size, *, drop_last=False, seed=0):
        if n < 0 or batch_size <= 0:
            raise ValueError(f"n={n}, batch_size={batch_size}")
        self.args = n, batch_size, drop_last, seed
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        n, batch_size, drop_last, _ = self.args
        return n // batch_size if drop_last else -(-n // batch_size)

    def __iter__(self):
        n, batch_size, drop_last, seed = self.args
        generator = torch.Generator().manual_seed(hash((seed, self.epoch)))
        pieces = torch.randperm(n, generator=generator).split(batch_size) if n else ()
        return iter([piece.tolist() for piece in pieces if len(piece) == batch_size or not drop_last])


@alternative("Loader")
class Mapped:
    def __init__(self, dataset, batch_sampler, collate_fn):
        self.batch_sampler = batch_sampler
        self.make = lambda indices: collate_fn(list(map(dataset.__getitem__, indices)))

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        return map(self.make, self.batch_sampler)


@alternative("BucketBatchSampler")
class Pools:
    """Sorts pools of 500 shuffled items, not all of them."""

    def __init__(self, lengths, max_tokens, seed):
        for length in lengths:
            if length > max_tokens:
                raise ValueError(f"{length} tokens, max_tokens {max_tokens}")
        self.lengths, self.max_tokens, self.seed, self.epoch = tuple(lengths), max_tokens, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.batches())

    def __iter__(self):
        return iter(self.batches())

    def batches(self):
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        found = []
        for start in range(0, len(order), 500):
            batch = []
            for index in sorted(order[start : start + 500], key=self.lengths.__getitem__, reverse=True):
                if batch and self.lengths[batch[0]] * (len(batch) + 1) > self.max_tokens:
                    found.append(batch)
                    batch = []
                batch.append(index)
            found.append(batch)
        rng.shuffle(found)
        return found


@alternative("ResumableLoader")
class Skipping:
    """Keeps the place as one text, and lets an iterator run over the batches that are done."""

    def __init__(self, dataset, batch_sampler, collate_fn):
        self.dataset, self.batch_sampler, self.collate_fn = dataset, batch_sampler, collate_fn
        self.place = "0 0"

    def __len__(self):
        return len(self.batch_sampler)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]

    def __iter__(self):
        epoch, done = map(int, self.place.split())
        self.batch_sampler.set_epoch(epoch)
        last = len(self.batch_sampler) - 1
        for number, indices in enumerate(self.batch_sampler):
            if number < done:
                continue
            batch = self.collate_fn([self.dataset[i] for i in indices])
            self.place = f"{epoch} {number + 1}" if number < last else f"{epoch + 1} 0"
            yield batch
