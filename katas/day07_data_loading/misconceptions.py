import random

import numpy as np
import torch

from checker.testing import misconception
from reference.day01_tensor_basics import pad_stack
from reference.day07_data_loading import (
    EOS_ID,
    VOCAB,
    ArithmeticDataset,
    BucketBatchSampler,
    Loader,
    ResumableLoader,
    ShuffledBatchSampler,
    TokenWindows,
    decode,
    encode,
)

# encode, decode


@misconception(
    "encode",
    "The digits are right and '+' became -5: you measure the distance from '0' in the character table, where the "
    "signs do not stand behind the digits as they do in VOCAB.",
)
def encode__by_character_code(s):
    return [ord(character) - ord("0") for character in s]


@misconception(
    "encode",
    "Characters that are not in the vocabulary disappear without a word, so a typing error turns into another "
    "question. Say no instead.",
)
def encode__skips_the_unknown(s):
    return [VOCAB.index(character) for character in s if character in VOCAB]


@misconception(
    "encode",
    "Python calls far more characters digits than the ten of VOCAB, and int() reads them all: a three of another "
    "script came through as 3. Ask the vocabulary, not the character.",
)
def encode__every_digit_of_unicode(s):
    return [int(c) if c.isdecimal() else encode(c)[0] for c in s]


@misconception(
    "encode",
    "There is one id too many: you close the text with <eos>. Where a sequence ends is decided later, when "
    "questions and answers are put together.",
)
def encode__adds_the_end(s):
    return [*encode(s), EOS_ID]


@misconception(
    "decode",
    "A list in Python counts negative places from its end, so the id -1 came back as '<pad>'. An id that does not "
    "exist has to be noticed at both ends of the vocabulary.",
)
def decode__counts_from_the_end(ids):
    try:
        return "".join(VOCAB[i] for i in ids)
    except IndexError:
        raise ValueError(f"no such id: {ids}") from None


@misconception(
    "decode",
    "The special tokens are missing in the text. Whoever looks for a bug in a batch needs to see <eos> and <pad> "
    "where they stand.",
)
def decode__hides_special_tokens(ids):
    return "".join(decode([i]) for i in ids if not 12 <= i <= 13)


# TokenWindows


@misconception(
    "TokenWindows",
    "You cut the tokens into pieces that do not overlap. A window may begin at any token, so count the possible "
    "starts, not the pieces.",
)
class TokenWindows__pieces(TokenWindows):
    def __len__(self):
        return len(self.tokens) // self.context

    def __getitem__(self, index):
        n = len(self)
        if not -n <= index < n:
            raise IndexError(index)
        start = (index % n) * self.context
        return self.tokens[start : start + self.context], self.tokens[start + 1 : start + 1 + self.context]


@misconception(
    "TokenWindows",
    "There is one window too many: the last x is complete, but nothing follows its last token, and its y comes "
    "out one short.",
)
class TokenWindows__one_too_many(TokenWindows):
    def __len__(self):
        return max(0, len(self.tokens) - self.context + 1)


@misconception(
    "TokenWindows",
    "The numbers are right, but each item is a copy: it allocates memory of its own, and what is written into the "
    "tokens later does not reach it. A slice would have been a view.",
)
class TokenWindows__copies(TokenWindows):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x.clone(), y.clone()


@misconception(
    "TokenWindows",
    "x and y are the same tokens. A model trained on this learns to repeat what it sees; the target of each place "
    "is the token after it.",
)
class TokenWindows__not_shifted(TokenWindows):
    def __getitem__(self, index):
        x, _ = super().__getitem__(index)
        return x, x


@misconception(
    "TokenWindows",
    "y is two tokens ahead of x. If the loss shifts, the data must not, and here the data does, once: somebody "
    "has shifted twice.",
)
class TokenWindows__shifted_twice(TokenWindows):
    def __len__(self):
        return max(0, len(self.tokens) - self.context - 1)

    def __getitem__(self, index):
        x, _ = super().__getitem__(index)
        start = index % len(self)
        return x, self.tokens[start + 2 : start + 2 + self.context]


@misconception(
    "TokenWindows",
    "A slice never complains: outside of the data it just gets shorter, down to nothing. So a wrong index goes "
    "unnoticed, -1 is an empty window, and a for loop over the data set never ends.",
)
class TokenWindows__trusts_slices(TokenWindows):
    def __getitem__(self, index):
        x = self.tokens[index : index + self.context]
        return x, self.tokens[index + 1 : index + self.context + 1]


@misconception(
    "TokenWindows",
    "A negative index is refused here. A data set is a sequence, and a sequence counts from its end, too.",
)
class TokenWindows__no_negative(TokenWindows):
    def __getitem__(self, index):
        if index < 0:
            raise IndexError(index)
        return super().__getitem__(index)


# ArithmeticDataset


def all_pairs(n_digits):
    return [(a, b) for a in range(10**n_digits) for b in range(10**n_digits)]


class Split(ArithmeticDataset):
    """The questions that `choose` gives for a test, out of all."""

    def __init__(self, n_digits, split, *, op="+", test_fraction=0.1, seed=0):
        super().__init__(n_digits, split, op=op, test_fraction=test_fraction, seed=seed)
        test = set(self.choose(n_digits, test_fraction, seed))
        self.pairs = [pair for pair in all_pairs(n_digits) if (pair in test) == (split == "test")]


def with_twins(pairs):
    return [*pairs, *((b, a) for a, b in pairs)]


def half(n_digits):
    return [(a, b) for a, b in all_pairs(n_digits) if a <= b]


@misconception(
    "ArithmeticDataset",
    "Your train and your test were drawn from the global random state, one after the other, so they are two "
    "different draws: they overlap, leave questions out, and change with every run. Both have to come from one "
    "draw that the seed alone decides.",
)
class ArithmeticDataset__global_draw(Split):
    @staticmethod
    def choose(n_digits, fraction, seed):
        pairs = half(n_digits)
        order = torch.randperm(len(pairs)).tolist()
        return with_twins([pairs[i] for i in order[: round(fraction * len(pairs))]])


@misconception(
    "ArithmeticDataset",
    "You drew single questions, so 3+5= can be in the test while 5+3= was in the training, with the same answer. "
    "With a tenth of all questions in the test, about nine of ten leak like this.",
)
class ArithmeticDataset__twins_apart(Split):
    @staticmethod
    def choose(n_digits, fraction, seed):
        pairs = all_pairs(n_digits)
        order = np.random.default_rng(seed).permutation(len(pairs))
        return [pairs[i] for i in order[: round(fraction * len(pairs))]]


@misconception(
    "ArithmeticDataset",
    "The test is the same for every seed: the first pairs of the list. A test of small numbers alone says nothing "
    "about the others; it has to be drawn.",
)
class ArithmeticDataset__first_pairs(Split):
    @staticmethod
    def choose(n_digits, fraction, seed):
        pairs = half(n_digits)
        return with_twins(pairs[: round(fraction * len(pairs))])


@misconception(
    "ArithmeticDataset",
    "The two parts have each other's size: test_fraction of the pairs went into the training.",
)
class ArithmeticDataset__fractions_swapped(ArithmeticDataset):
    def __init__(self, n_digits, split, *, op="+", test_fraction=0.1, seed=0):
        super().__init__(n_digits, split, op=op, test_fraction=1 - test_fraction, seed=seed)


@misconception(
    "ArithmeticDataset",
    "Only one of a+b and b+a is there, so almost half of all questions are missing. Twins have to be in the same "
    "split, both of them.",
)
class ArithmeticDataset__one_twin(ArithmeticDataset):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pairs = [(a, b) for a, b in self.pairs if a <= b]


@misconception(
    "ArithmeticDataset",
    "The answers are written as people write them. The model would have to know the carry of all digits before it "
    "writes the first one; here the last digit comes first.",
)
class ArithmeticDataset__not_reversed(ArithmeticDataset):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {"prompt": item["prompt"], "answer": item["answer"].flip(0)}


@misconception(
    "ArithmeticDataset",
    "Your numbers have leading zeros. With a fixed width every prompt is equally long; the contract is plain "
    "numbers, of as many digits as they have.",
)
class ArithmeticDataset__leading_zeros(ArithmeticDataset):
    def __init__(self, n_digits, *args, **kwargs):
        super().__init__(n_digits, *args, **kwargs)
        self.width = n_digits

    def __getitem__(self, index):
        a, b = self.pairs[index]
        question, answer = f"{a:0{self.width}}+{b:0{self.width}}=", f"{a + b:0{self.width + 1}}"
        return {"prompt": torch.tensor(encode(question)), "answer": torch.tensor(encode(answer[::-1]))}


@misconception(
    "ArithmeticDataset",
    "Each answer has an <eos> at its end. The item is the bare answer; its end is added when the batch is made, and "
    "would then be there twice.",
)
class ArithmeticDataset__end_in_the_answer(ArithmeticDataset):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {"prompt": item["prompt"], "answer": torch.cat((item["answer"], torch.tensor([EOS_ID])))}


@misconception(
    "ArithmeticDataset",
    "What item i is depends on what was read before: you draw while reading. An item has to be a function of its "
    "index, or a loader with another order sees another data set.",
)
class ArithmeticDataset__draws_while_reading(ArithmeticDataset):
    def __init__(self, *args, seed=0, **kwargs):
        super().__init__(*args, seed=seed, **kwargs)
        self.rng = random.Random(seed)

    def __getitem__(self, index):
        self.pairs[index]
        return super().__getitem__(self.rng.randrange(len(self.pairs)))


@misconception(
    "ArithmeticDataset",
    "The items are made once and handed out again and again: whoever writes into one of them has changed the data "
    "set for everybody.",
)
class ArithmeticDataset__hands_out_its_own(ArithmeticDataset):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.items = {}

    def __getitem__(self, index):
        if index not in self.items:
            self.items[index] = super().__getitem__(index)
        return self.items[index]


@misconception(
    "ArithmeticDataset",
    "The questions come in the order of the draw. The split is right, but an order belongs to a sampler; a data set "
    "that is sorted can be compared with another one.",
)
class ArithmeticDataset__unsorted(ArithmeticDataset):
    def __init__(self, *args, seed=0, **kwargs):
        super().__init__(*args, seed=seed, **kwargs)
        random.Random(seed).shuffle(self.pairs)


# pad_collate


def parts(batch):
    return [(item["prompt"], item["answer"], item["answer"].new_tensor([EOS_ID])) for item in batch]


def put_together(batch, rows, targets, pad_id, ignore_index):
    input_ids, lengths = pad_stack(rows, pad_id)
    labels, _ = pad_stack(targets, ignore_index)
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths}


@misconception(
    "pad_collate",
    "The tokens of the prompts count as labels, too: a model trained on this learns to write questions, and most of "
    "its loss comes from digits that nobody can predict.",
)
def pad_collate__learns_the_questions(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [torch.cat((prompt[1:], answer, end)) for prompt, answer, end in parts(batch)]
    return put_together(batch, rows, targets, pad_id, ignore_index)


@misconception(
    "pad_collate",
    "The first answer token is nowhere among your labels. You ignored as many labels as the prompt has tokens, but "
    "the label of the last one is already a piece of the answer.",
)
def pad_collate__first_token_lost(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [
        torch.cat((torch.full_like(prompt, ignore_index), answer[1:], end)) for prompt, answer, end in parts(batch)
    ]
    return put_together(batch, rows, targets, pad_id, ignore_index)


@misconception(
    "pad_collate",
    "Each label is the token of its own place. The loss would ask the model for what it was just shown; the label "
    "of a place is the token after it.",
)
def pad_collate__not_shifted(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [torch.cat((torch.full_like(prompt, ignore_index), answer)) for prompt, answer, _ in parts(batch)]
    return put_together(batch, rows, targets, pad_id, ignore_index)


@misconception(
    "pad_collate",
    "The labels are two places ahead: the one under the last prompt token is the second token of the answer. The "
    "sequence was shifted, and then shifted again.",
)
def pad_collate__shifted_twice(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [
        torch.cat((torch.full_like(prompt[1:], ignore_index), answer[1:], end)) for prompt, answer, end in parts(batch)
    ]
    return put_together(batch, rows, targets, pad_id, ignore_index)


@misconception(
    "pad_collate",
    "You took every label that equals pad_id for padding. With another pad_id this goes unnoticed; here it is the id "
    "of a token that the answers use, and they lost it.",
)
def pad_collate__padding_by_value(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [torch.cat((torch.full_like(prompt[1:], pad_id), answer, end)) for prompt, answer, end in parts(batch)]
    result = put_together(batch, rows, targets, pad_id, pad_id)
    result["labels"] = result["labels"].masked_fill(result["labels"] == pad_id, ignore_index)
    return result


@misconception(
    "pad_collate",
    "Behind the answers your labels are pad_id: the model is trained to write padding, row after row. Nothing at all "
    "is asked there.",
)
def pad_collate__learns_the_padding(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [
        torch.cat((torch.full_like(prompt[1:], ignore_index), answer, end)) for prompt, answer, end in parts(batch)
    ]
    return put_together(batch, rows, targets, pad_id, pad_id)


@misconception(
    "pad_collate",
    "No label is <eos>, so each item has one label too few. A model that was never asked for an end does not stop.",
)
def pad_collate__no_end(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [
        torch.cat((torch.full_like(prompt, ignore_index)[1:], answer, torch.full_like(end, ignore_index)))
        for prompt, answer, end in parts(batch)
    ]
    return put_together(batch, rows, targets, pad_id, ignore_index)


@misconception(
    "pad_collate",
    "Your rows hold <eos> as an input, and are one token wider than they need to be. Nothing has to be predicted "
    "after the end, so it is a label and no input.",
)
def pad_collate__end_as_input(batch, pad_id, ignore_index=-100):
    rows = [torch.cat(part) for part in parts(batch)]
    targets = [
        torch.cat((torch.full_like(prompt[1:], ignore_index), answer, end, torch.full_like(end, ignore_index)))
        for prompt, answer, end in parts(batch)
    ]
    return put_together(batch, rows, targets, pad_id, ignore_index)


@misconception(
    "pad_collate",
    "The ignored labels are -100 whatever ignore_index says.",
)
def pad_collate__always_minus_100(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)) for prompt, answer, _ in parts(batch)]
    targets = [torch.cat((torch.full_like(prompt[1:], -100), answer, end)) for prompt, answer, end in parts(batch)]
    return put_together(batch, rows, targets, pad_id, -100)


@misconception(
    "pad_collate",
    "The padding stands in front of the rows. There are reasons to do so when answers are written by a model, but "
    "here each row begins at place 0.",
)
def pad_collate__padded_in_front(batch, pad_id, ignore_index=-100):
    rows = [torch.cat((prompt, answer)).flip(0) for prompt, answer, _ in parts(batch)]
    targets = [
        torch.cat((torch.full_like(prompt[1:], ignore_index), answer, end)).flip(0)
        for prompt, answer, end in parts(batch)
    ]
    result = put_together(batch, rows, targets, pad_id, ignore_index)
    result["input_ids"], result["labels"] = result["input_ids"].flip(1), result["labels"].flip(1)
    return result


# ShuffledBatchSampler


class Ordered(ShuffledBatchSampler):
    """Batches of whatever `order` gives."""

    def __iter__(self):
        order = self.order()
        for number in range(len(self)):
            yield order[number * self.batch_size : (number + 1) * self.batch_size]


@misconception(
    "ShuffledBatchSampler",
    "Every epoch has the same order: set_epoch has no effect on it, and the model meets its data in one and the same "
    "sequence again and again.",
)
class ShuffledBatchSampler__one_order(Ordered):
    def order(self):
        return np.random.default_rng((self.seed, 0)).permutation(self.n).tolist()


@misconception(
    "ShuffledBatchSampler",
    "The generator is made once and moves on with every pass, so the order of an epoch depends on how many passes "
    "came before. A run that was stopped can never find its order again.",
)
class ShuffledBatchSampler__one_generator(Ordered):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rng = np.random.default_rng(self.seed)

    def order(self):
        return self.rng.permutation(self.n).tolist()


@misconception(
    "ShuffledBatchSampler",
    "The order comes from torch's global random state: it changes with whatever else draws a number in the program, "
    "and your sampler moves that state for all others.",
)
class ShuffledBatchSampler__global_state(Ordered):
    def order(self):
        return torch.randperm(self.n).tolist()


@misconception(
    "ShuffledBatchSampler",
    "You seed the global generator to get your order. It can be repeated, but everybody else who draws from that "
    "generator now starts anew in each epoch.",
)
class ShuffledBatchSampler__seeds_the_world(Ordered):
    def order(self):
        torch.manual_seed(hash((self.seed, self.epoch)))
        return torch.randperm(self.n).tolist()


@misconception(
    "ShuffledBatchSampler",
    "Seed and epoch are added up. Then the second epoch of seed 0 is the first of seed 1: runs that should be "
    "independent see the same orders, one epoch apart.",
)
class ShuffledBatchSampler__sum_of_seed_and_epoch(Ordered):
    def order(self):
        return np.random.default_rng(self.seed + self.epoch).permutation(self.n).tolist()


@misconception(
    "ShuffledBatchSampler",
    "You shuffle the batches, but not what is in them: the same neighbors stay together for the whole training.",
)
class ShuffledBatchSampler__blocks(ShuffledBatchSampler):
    def __iter__(self):
        blocks = [
            list(range(start, min(start + self.batch_size, self.n))) for start in range(0, self.n, self.batch_size)
        ]
        for number in np.random.default_rng((self.seed, self.epoch)).permutation(len(blocks)):
            if len(blocks[number]) == self.batch_size or not self.drop_last:
                yield blocks[number]


@misconception(
    "ShuffledBatchSampler",
    "Indices are drawn with replacement: some come several times in one epoch and about a third never.",
)
class ShuffledBatchSampler__with_replacement(Ordered):
    def order(self):
        return np.random.default_rng((self.seed, self.epoch)).integers(0, max(self.n, 1), self.n).tolist()


@misconception(
    "ShuffledBatchSampler",
    "The length counts full batches only, although the shorter last one is given, too. A schedule that trusts this "
    "number ends one step early in every epoch.",
)
class ShuffledBatchSampler__length_rounded_down(ShuffledBatchSampler):
    def __len__(self):
        return self.n // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n).tolist()
        batches = [order[start : start + self.batch_size] for start in range(0, self.n, self.batch_size)]
        return iter([batch for batch in batches if len(batch) == self.batch_size or not self.drop_last])


@misconception(
    "ShuffledBatchSampler",
    "The short batch at the end is always lost, as if drop_last were true. Its indices are missing in the epoch.",
)
class ShuffledBatchSampler__always_drops(ShuffledBatchSampler):
    def __init__(self, n, batch_size, *, drop_last=False, seed=0):
        super().__init__(n, batch_size, drop_last=True, seed=seed)


@misconception(
    "ShuffledBatchSampler",
    "The sampler goes to the next epoch by itself after each pass. Then somebody who only looks at the batches once "
    "changes the training; only set_epoch may do that.",
)
class ShuffledBatchSampler__counts_by_itself(ShuffledBatchSampler):
    def __iter__(self):
        batches = list(super().__iter__())
        self.epoch += 1
        return iter(batches)


# Loader


@misconception(
    "Loader",
    "There is a single iterator for the life of the loader, made when the loader was made. The first loop uses it up, "
    "and the second epoch is empty.",
)
class Loader__used_up(Loader):
    def __init__(self, *args):
        super().__init__(*args)
        self.batches = super().__iter__()

    def __iter__(self):
        return self.batches


@misconception(
    "Loader",
    "All batches are made before the first one is handed out: memory for the whole epoch, and a long wait before the "
    "first step.",
)
class Loader__all_at_once(Loader):
    def __iter__(self):
        return iter(list(super().__iter__()))


@misconception(
    "Loader",
    "The length is the number of items in the data set. What a loader counts is batches.",
)
class Loader__length_of_the_data(Loader):
    def __len__(self):
        return len(self.dataset)


@misconception(
    "Loader",
    "The list of batches is taken once, when the loader is made. So every pass has the batches of that moment, and "
    "set_epoch of the sampler comes too late.",
)
class Loader__frozen_plan(Loader):
    def __init__(self, dataset, batch_sampler, collate_fn):
        super().__init__(dataset, list(batch_sampler), collate_fn)


@misconception(
    "Loader",
    "Items are collated one by one and come out as a list of batches of one. The collate function wants all items of "
    "a batch together: only then can it know how wide the batch has to be.",
)
class Loader__one_by_one(Loader):
    def __iter__(self):
        for indices in self.batch_sampler:
            yield [self.collate_fn([self.dataset[i]]) for i in indices]


# BucketBatchSampler


class Cut(BucketBatchSampler):
    """A BucketBatchSampler with another rule for when a batch is full."""

    def _cut(self, order):
        batches = []
        for index in sorted(order, key=lambda i: self.lengths[i]):
            if not batches or self.full(batches[-1], index):
                batches.append([])
            batches[-1].append(index)
        return batches


@misconception(
    "BucketBatchSampler",
    "You add up the lengths of the items. But every item is padded to the longest one, so a batch costs the longest "
    "length times their number, and yours are above the limit.",
)
class BucketBatchSampler__sum_of_lengths(Cut):
    def full(self, batch, index):
        return sum(self.lengths[i] for i in batch) + self.lengths[index] > self.max_tokens


@misconception(
    "BucketBatchSampler",
    "The limit is looked at before the next item joins, not with it: a batch is closed one item too late.",
)
class BucketBatchSampler__one_too_late(Cut):
    def full(self, batch, index):
        return len(batch) * self.lengths[batch[-1]] > self.max_tokens


@misconception(
    "BucketBatchSampler",
    "All batches have the same number of items, as many as would fit if each were the longest. Batches of short items "
    "stay almost empty, and there are far too many of them.",
)
class BucketBatchSampler__fixed_number(Cut):
    def full(self, batch, index):
        return len(batch) >= self.max_tokens // max(self.lengths)


@misconception(
    "BucketBatchSampler",
    "A batch that is filled to the last token is taken for too full: the limit itself is allowed.",
)
class BucketBatchSampler__below_the_limit(Cut):
    def full(self, batch, index):
        return (len(batch) + 1) * self.lengths[index] >= self.max_tokens


@misconception(
    "BucketBatchSampler",
    "Items join in random order, long ones beside short ones, and more than half of each batch is padding. Items of "
    "similar length have to come together first.",
)
class BucketBatchSampler__no_buckets(BucketBatchSampler):
    def _cut(self, order):
        batches, longest = [], 0
        for index in order:
            longest = max(longest, self.lengths[index])
            if not batches or (len(batches[-1]) + 1) * longest > self.max_tokens:
                batches.append([])
                longest = self.lengths[index]
            batches[-1].append(index)
        return batches


@misconception(
    "BucketBatchSampler",
    "The batches come sorted, short ones first. The model then sees every epoch from easy to hard and ends it with "
    "the longest items alone: shuffle the batches, too.",
)
class BucketBatchSampler__sorted_batches(BucketBatchSampler):
    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        return iter(self._cut(rng.permutation(len(self.lengths)).tolist()))


@misconception(
    "BucketBatchSampler",
    "The same items share a batch in every epoch; only the order of the batches changes. Equal lengths leave room for "
    "chance inside the batches as well.",
)
class BucketBatchSampler__same_companies(BucketBatchSampler):
    def __iter__(self):
        batches = self._cut(range(len(self.lengths)))
        for number in np.random.default_rng((self.seed, self.epoch)).permutation(len(batches)):
            yield batches[number]


@misconception(
    "BucketBatchSampler",
    "Every epoch has the same batches in the same order: set_epoch has no effect on them.",
)
class BucketBatchSampler__one_order(BucketBatchSampler):
    def set_epoch(self, epoch):
        pass


@misconception(
    "BucketBatchSampler",
    "An item that is too long gets a batch of its own and breaks the limit all the same. The limit is there because "
    "of memory; better to fail now than in the middle of the night.",
)
class BucketBatchSampler__lets_long_items_in(BucketBatchSampler):
    def __init__(self, lengths, max_tokens, seed):
        super().__init__(lengths, max(max_tokens, *lengths) if len(lengths) else max_tokens, seed)
        self.max_tokens = max_tokens


@misconception(
    "BucketBatchSampler",
    "Items that are too long are left out in silence. Whoever made the data should hear of it.",
)
class BucketBatchSampler__drops_long_items(BucketBatchSampler):
    def __init__(self, lengths, max_tokens, seed):
        super().__init__([length if length <= max_tokens else 0 for length in lengths], max_tokens, seed)

    def _cut(self, order):
        return super()._cut([i for i in order if self.lengths[i]])


@misconception(
    "BucketBatchSampler",
    "The last batch, the one that did not become full, is missing, and its items with it.",
)
class BucketBatchSampler__loses_the_last(BucketBatchSampler):
    def _cut(self, order):
        return super()._cut(order)[:-1]


@misconception(
    "BucketBatchSampler",
    "Seed and epoch are added up, so that the second epoch of seed 0 has the batches of the first epoch of seed 1.",
)
class BucketBatchSampler__sum_of_seed_and_epoch(BucketBatchSampler):
    def __iter__(self):
        rng = np.random.default_rng(self.seed + self.epoch)
        batches = self._cut(rng.permutation(len(self.lengths)).tolist())
        for number in rng.permutation(len(batches)):
            yield batches[number]


# ResumableLoader


class Walk(ResumableLoader):
    """A ResumableLoader in small steps, each of which can be wrong."""

    def __iter__(self):
        self.batch_sampler.set_epoch(self.epoch)
        batches = list(self.batch_sampler)
        for indices in batches[self.position :]:
            batch = self.collate_fn([self.dataset[i] for i in indices])
            yield from self.hand_out(batch, len(batches))

    def hand_out(self, batch, count):
        self.position += 1
        if self.position == count:
            self.next_epoch()
        yield batch

    def next_epoch(self):
        self.epoch, self.position = self.epoch + 1, 0


@misconception(
    "ResumableLoader",
    "The state is one batch behind: you count a batch when the next one is asked for. Whoever saves while holding a "
    "batch gets the same one again after resuming.",
)
class ResumableLoader__counts_afterwards(Walk):
    def hand_out(self, batch, count):
        yield batch
        self.position += 1
        if self.position == count:
            self.next_epoch()


@misconception(
    "ResumableLoader",
    "The state does not remember the epoch: after resuming, the rest of the batches comes from the order of epoch 0.",
)
class ResumableLoader__forgets_the_epoch(Walk):
    def load_state_dict(self, state):
        self.epoch, self.position = 0, state["position"]


@misconception(
    "ResumableLoader",
    "A loader that has resumed starts the epoch from its beginning: batches that were done come again.",
)
class ResumableLoader__restarts_the_epoch(Walk):
    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], 0


@misconception(
    "ResumableLoader",
    "After the end of an epoch the count of its batches is still there, and the next epoch begins somewhere in its "
    "middle, or not at all.",
)
class ResumableLoader__never_back_to_zero(Walk):
    def next_epoch(self):
        self.epoch += 1


@misconception(
    "ResumableLoader",
    "Each loop sets the sampler to the same epoch: nobody counts up when an epoch is done.",
)
class ResumableLoader__stays_in_its_epoch(Walk):
    def next_epoch(self):
        self.position = 0


@misconception(
    "ResumableLoader",
    "To get to its place, your loader fetches and collates everything that was done before and throws it away. In the "
    "middle of a long epoch that can take hours; only indices have to be skipped.",
)
class ResumableLoader__fetches_what_it_skips(Walk):
    def __iter__(self):
        self.batch_sampler.set_epoch(self.epoch)
        done, batches = self.position, list(self.batch_sampler)
        for number, indices in enumerate(batches):
            batch = self.collate_fn([self.dataset[i] for i in indices])
            if number >= done:
                yield from self.hand_out(batch, len(batches))


@misconception(
    "ResumableLoader",
    "A loop that was left in the middle is followed by a loop over the whole epoch: the loader forgets its place when "
    "a new loop begins.",
)
class ResumableLoader__every_loop_is_whole(Walk):
    loaded = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.loaded = True

    def __iter__(self):
        if not self.loaded:
            self.position = 0
        self.loaded = False
        yield from super().__iter__()


@misconception(
    "ResumableLoader",
    "The state that you return is the loader's own dict. It moves on with the loader, and by the time it is written "
    "to a file it says something else.",
)
class ResumableLoader__lends_its_state(ResumableLoader):
    def __init__(self, *args):
        self.place = {}
        super().__init__(*args)

    epoch = property(lambda self: self.place["epoch"], lambda self, value: self.place.update(epoch=value))
    position = property(lambda self: self.place["position"], lambda self, value: self.place.update(position=value))

    def state_dict(self):
        return self.place

    def load_state_dict(self, state):
        self.place = state


@misconception(
    "ResumableLoader",
    "The state holds the batches that remain, so it is as large as the data set. Seed and epoch can make them again: "
    "it is enough to know where in the epoch the loader stands.",
)
class ResumableLoader__stores_the_rest(ResumableLoader):
    def state_dict(self):
        self.batch_sampler.set_epoch(self.epoch)
        return {**super().state_dict(), "rest": list(self.batch_sampler)[self.position :]}
