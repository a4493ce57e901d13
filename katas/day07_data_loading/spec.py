"""Day 7: what a right solution does."""

import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from checker.testing import (
    assert_close,
    assert_cost,
    assert_equal,
    assert_raises,
    assert_that,
    cost_case,
    global_rng_untouched,
    noncontiguous,
    same_storage,
    task,
    unchanged,
)

CHARACTERS = "0123456789+="
EOS, PAD = 12, 13
IGNORE = -100


@pytest.fixture(autouse=True)
def known_global_state(seed):
    """Code that draws from the global random state makes the same mistake whenever it is repeated."""
    seed_everything(seed)


@pytest.fixture
def small_seed(seed):
    """A seed that every random generator takes, also after some arithmetic."""
    return seed % 10_000


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would prepare every other device too, which takes longer than most tests here
    torch.default_generator.manual_seed(seed)


def flat(batches):
    return [index for batch in batches for index in batch]


# encode, decode


@task("encode")
def test_the_digits_and_signs_have_the_ids_0_to_11(solution):
    assert_equal(solution.encode(CHARACTERS), list(range(12)), because="an id is a place in VOCAB")


@task("encode")
def test_a_text_becomes_its_ids_in_order(solution, randint):
    expected = randint(0, 12, (30,)).tolist()
    text = "".join(CHARACTERS[i] for i in expected)
    ids = solution.encode(text)
    assert_equal(ids, expected)
    assert_that(all(type(i) is int for i in ids), "the ids are Python ints", value=[type(i).__name__ for i in ids])


@task("encode")
def test_an_empty_text_has_no_ids(solution):
    assert_equal(solution.encode(""), [])


@task("encode")
@pytest.mark.parametrize("character", ["-", " ", "x", "²", "é"])
def test_other_characters_are_refused_by_name(solution, character):
    assert_raises(
        ValueError,
        solution.encode,
        f"1{character}2",
        mentions=[character],
        because=f"{character!r} is not one of {CHARACTERS}",
    )


@task("encode")
def test_digits_of_other_scripts_are_refused(solution):
    try:
        found = solution.encode("1\u06632")  # an Arabic-Indic three in the middle
    except ValueError:
        found = "ValueError"
    assert_equal(found, "ValueError", because="\u0663 is a digit to Python, and not one of " + CHARACTERS)


@task("encode")
@pytest.mark.parametrize("name", ["<eos>", "<pad>"])
def test_special_tokens_cannot_be_typed(solution, name):
    assert_raises(
        ValueError,
        solution.encode,
        f"3{name}",
        mentions=["<"],
        because=f"'{name}' in a text is five characters",
    )


@task("encode")
def test_every_id_has_its_text(solution):
    assert_equal(solution.decode(list(range(14))), CHARACTERS + "<eos><pad>")


@task("encode")
def test_ids_become_a_text_in_order(solution, randint):
    ids = randint(0, 12, (30,)).tolist()
    assert_equal(solution.decode([*ids, EOS]), "".join(CHARACTERS[i] for i in ids) + "<eos>")


@task("encode")
def test_ids_may_come_as_a_tensor(solution, randint):
    ids = randint(0, 12, (20,))
    expected = "".join(CHARACTERS[i] for i in ids.tolist())
    assert_equal(solution.decode(ids), expected)


@task("encode")
def test_no_ids_are_an_empty_text(solution):
    assert_equal(solution.decode([]), "")


@task("encode")
@pytest.mark.parametrize("unknown", [14, 99, -1, -14])
def test_other_ids_are_refused_by_number(solution, unknown):
    assert_raises(
        ValueError,
        solution.decode,
        [1, unknown],
        mentions=[str(unknown)],
        because=f"there is no token {unknown}: the ids are 0 to 13",
    )


# TokenWindows


@task("TokenWindows")
def test_windows_hold_tokens_and_the_tokens_that_follow(solution, randperm):
    tokens, context = randperm(11), 4
    row = tokens.tolist()
    xs = torch.tensor([[row[start + t] for t in range(context)] for start in range(7)])
    ys = torch.tensor([[row[start + t + 1] for t in range(context)] for start in range(7)])
    windows = solution.TokenWindows(tokens, context)
    items = [windows[i] for i in range(7)]
    assert_equal([len(item) for item in items], [2] * 7, because="an item is the pair (x, y)")
    for i, (x, _) in enumerate(items):
        assert_close(x, xs[i], because=f"x of item {i} holds the tokens from place {i} on")
    for i, (_, y) in enumerate(items):
        assert_close(y, ys[i], because=f"y[t] is the token after x[t], here for item {i}")


@task("TokenWindows")
@pytest.mark.parametrize(("n", "context"), [(10, 3), (12, 1), (6, 5), (5, 5), (3, 7), (0, 2)])
def test_there_is_a_window_for_every_start_with_a_complete_y(solution, device, n, context):
    windows = solution.TokenWindows(torch.arange(n, device=device), context)
    assert_equal(len(windows), max(0, n - context), because=f"N = {n}, context = {context}")


@task("TokenWindows")
def test_the_last_window_ends_with_the_last_token(solution, randperm):
    tokens = randperm(9)
    expected = tokens.cpu()[-3:]
    windows = solution.TokenWindows(tokens, 3)
    assert_close(windows[len(windows) - 1][1], expected)


@task("TokenWindows")
def test_negative_indices_count_from_the_end(solution, randperm):
    tokens = randperm(9)
    row = tokens.cpu().clone()
    windows = solution.TokenWindows(tokens, 3)
    assert_close(windows[-1], (row[5:8], row[6:9]), because="item -1 is the last window")
    assert_close(windows[-2], (row[4:7], row[5:8]))
    assert_close(windows[-6], (row[0:3], row[1:4]), because="item -len is the first window")


@task("TokenWindows")
@pytest.mark.parametrize("index", [6, 7, 8, 50, -7, -8, -50])
def test_an_index_outside_is_an_indexerror(solution, device, index):
    windows = solution.TokenWindows(torch.arange(9, device=device), 3)
    assert_raises(IndexError, windows.__getitem__, index, because=f"six windows have no item {index}")


@task("TokenWindows")
@pytest.mark.parametrize("index", [0, -1])
def test_no_windows_have_no_items(solution, device, index):
    windows = solution.TokenWindows(torch.arange(4, device=device), 4)
    assert_raises(IndexError, windows.__getitem__, index)


@task("TokenWindows")
def test_a_for_loop_over_the_windows_ends(solution, device):
    windows = solution.TokenWindows(torch.arange(8, device=device), 2)
    firsts = [int(x[0]) for x, _ in islice(windows, 20)]
    assert_equal(firsts, [0, 1, 2, 3, 4, 5])


@task("TokenWindows")
def test_items_allocate_nothing(solution, randint):
    tokens = randint(0, 50, (4096,))
    because = "a slice is a view: no token has to be copied"
    windows = assert_cost(solution.TokenWindows, tokens, 64, max_new_bytes=0, because=because)
    x, y = assert_cost(lambda: windows[17], max_new_bytes=0, because=because)
    assert_that(same_storage(x, tokens) and same_storage(y, tokens), "x and y show the memory of `tokens`")


@task("TokenWindows")
def test_later_writes_show_in_the_items(solution, device):
    tokens = torch.zeros(8, dtype=torch.int64, device=device)
    windows = solution.TokenWindows(tokens, 3)
    x, y = windows[2]
    tokens.copy_(torch.arange(8))
    assert_close((x, y), (torch.tensor([2, 3, 4]), torch.tensor([3, 4, 5])), because="items are views")
    assert_close(windows[0][1], torch.tensor([1, 2, 3]), because="the data set keeps `tokens`, not a copy")


@task("TokenWindows")
def test_strided_tokens_are_read_in_place(solution, randint):
    tokens = noncontiguous(randint(0, 50, (10,)))
    row = tokens.cpu().clone()
    x, y = assert_cost(lambda: solution.TokenWindows(tokens, 4)[5], max_new_bytes=0)
    assert_close((x, y), (row[5:9], row[6:10]))


@task("TokenWindows")
@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.float64])
def test_the_dtype_is_that_of_the_tokens(solution, device, kind):
    tokens = torch.arange(6, device=device).to(kind)
    with unchanged(tokens):
        x, y = solution.TokenWindows(tokens, 2)[1]
    assert_close((x, y), (torch.tensor([1, 2], dtype=kind), torch.tensor([2, 3], dtype=kind)))


@task("TokenWindows")
@pytest.mark.parametrize("context", [0, -2])
def test_a_context_below_one_is_refused(solution, device, context):
    tokens = torch.arange(5, device=device)
    assert_raises(ValueError, solution.TokenWindows, tokens, context, mentions=[str(context)])


@task("TokenWindows")
@pytest.mark.parametrize("shape", [(4, 3), ()])
def test_tokens_that_are_not_a_row_are_refused(solution, device, shape):
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    assert_raises(ValueError, solution.TokenWindows, tokens, 1, mentions=[str(shape)])


@cost_case("TokenWindows")
def one_window(module, randint):
    windows = module.TokenWindows(randint(0, 50, (4096,)), 64)
    return lambda: windows[100]


# ArithmeticDataset


def read(dataset, indices=None):
    """The items as pairs (prompt, answer) of texts, read with a vocabulary of our own."""
    names = [*CHARACTERS, "<eos>", "<pad>"]
    indices = range(len(dataset)) if indices is None else indices
    items = [dataset[i] for i in indices]
    return [tuple("".join(names[t] for t in item[key].tolist()) for key in ("prompt", "answer")) for item in items]


def questions(dataset, indices=None):
    """The prompts as pairs of ints."""
    return [tuple(map(int, prompt.rstrip("=").split("+"))) for prompt, _ in read(dataset, indices)]


def all_sums(numbers):
    return [(f"{a}+{b}=", str(a + b)[::-1]) for a in range(numbers) for b in range(numbers)]


def unordered(pairs):
    return {(min(pair), max(pair)) for pair in pairs}


@task("ArithmeticDataset")
def test_items_are_questions_and_reversed_answers(solution):
    dataset = solution.ArithmeticDataset(1, "test", test_fraction=1.0)
    assert_equal(len(dataset), 100, because="test_fraction=1 puts all 100 questions into the test")
    assert_equal(read(dataset), all_sums(10), because="a+b= with the digits of the sum reversed, by (a, b)")


@task("ArithmeticDataset")
def test_numbers_of_two_digits_are_written_as_they_are(solution, randint):
    dataset = solution.ArithmeticDataset(2, "train", test_fraction=0.0)
    assert_equal(len(dataset), 10_000, because="test_fraction=0 puts all 10,000 questions into the training")
    indices = [705, 715, 6152, 9999, *randint(0, 10_000, (60,)).tolist()]
    expected = all_sums(100)
    assert_equal(read(dataset, indices), [expected[i] for i in indices], because="item 705 is 7+5=, answer 21")


@task("ArithmeticDataset")
@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_an_item_holds_two_rows_of_int64(solution, key):
    item = solution.ArithmeticDataset(1, "train")[3]
    assert_equal(sorted(item), ["answer", "prompt"])
    found = item[key]
    assert_that(isinstance(found, torch.Tensor), f"{key} is a tensor", value=type(found).__name__)
    facts = (found.dtype, found.dim(), found.device.type)
    assert_equal(facts, (torch.int64, 1, "cpu"), because=f"{key} is a LongTensor with one axis, on the CPU")


@task("ArithmeticDataset")
@pytest.mark.parametrize("n_digits", [1, 2])
def test_train_and_test_are_disjoint(solution, n_digits, small_seed, randperm):
    train = solution.ArithmeticDataset(n_digits, "train", seed=small_seed)
    train = questions(train, randperm(len(train))[:1500].tolist())  # all, or enough of them
    test = questions(solution.ArithmeticDataset(n_digits, "test", seed=small_seed))
    both = len(set(train) & set(test))
    assert_equal(both, 0, because="number of questions that are in both splits")


@task("ArithmeticDataset")
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_train_and_test_are_together_complete(solution, fraction, small_seed):
    test = questions(solution.ArithmeticDataset(1, "test", test_fraction=fraction, seed=small_seed))
    train = questions(solution.ArithmeticDataset(1, "train", test_fraction=fraction, seed=small_seed))
    missing = set((a, b) for a in range(10) for b in range(10)) - set(train) - set(test)
    assert_equal(len(missing), 0, because="number of questions that are in neither split")
    assert_equal(len(train) + len(test), 100, because="no question is there twice")


@task("ArithmeticDataset")
def test_splits_of_two_digits_have_all_questions(solution, small_seed):
    sizes = [len(solution.ArithmeticDataset(2, split, seed=small_seed)) for split in ("test", "train")]
    assert_equal(sum(sizes), 10_000, because="items in the test and in the training")


@task("ArithmeticDataset")
def test_twins_stay_together(solution, small_seed):
    train = set(questions(solution.ArithmeticDataset(1, "train", test_fraction=0.5, seed=small_seed)))
    test = questions(solution.ArithmeticDataset(1, "test", test_fraction=0.5, seed=small_seed))
    leaks = sum((b, a) in train for a, b in test)
    assert_equal(leaks, 0, because="number of test questions a+b whose twin b+a is in the training")


@task("ArithmeticDataset")
@pytest.mark.parametrize(("n_digits", "fraction"), [(1, 0.1), (1, 0.25), (1, 0.5), (1, 0.9), (2, 0.1), (2, 0.25)])
def test_the_test_gets_its_fraction_of_the_unordered_pairs(solution, n_digits, fraction):
    n = 10**n_digits
    wanted = fraction * n * (n + 1) / 2
    test = solution.ArithmeticDataset(n_digits, "test", test_fraction=fraction)
    pairs = len(unordered(questions(test)))
    because = f"{fraction} of the unordered pairs are {wanted:g}, give or take one"
    assert_that(abs(pairs - wanted) < 1, because, value=pairs)


@task("ArithmeticDataset")
@pytest.mark.parametrize(("empty", "fraction"), [("test", 0.0), ("train", 1.0)])
def test_a_split_may_be_empty(solution, empty, fraction):
    dataset = solution.ArithmeticDataset(1, empty, test_fraction=fraction)
    assert_equal(len(dataset), 0)
    assert_raises(IndexError, dataset.__getitem__, 0)


@task("ArithmeticDataset")
def test_the_defaults_are_addition_a_tenth_and_seed_0(solution):
    explicit = read(solution.ArithmeticDataset(2, "test", op="+", test_fraction=0.1, seed=0))
    assert_that(read(solution.ArithmeticDataset(2, "test")) == explicit, "op '+', test_fraction 0.1, seed 0")


@task("ArithmeticDataset")
@pytest.mark.parametrize("split", ["train", "test"])
def test_items_are_in_rising_order(solution, split, small_seed):
    pairs = questions(solution.ArithmeticDataset(1, split, test_fraction=0.4, seed=small_seed))
    assert_equal(pairs, sorted(pairs), because="the order of the items is (a, b); shuffling is a sampler's work")


@task("ArithmeticDataset")
def test_the_same_seed_gives_the_same_split(solution, small_seed):
    first = read(solution.ArithmeticDataset(2, "test", seed=small_seed))
    solution.ArithmeticDataset(1, "train", seed=small_seed + 1)
    seed_everything(small_seed + 17)
    second = read(solution.ArithmeticDataset(2, "test", seed=small_seed))
    assert_equal(second, first, because="nothing but n_digits, test_fraction and seed decides what is in the test")


@task("ArithmeticDataset")
def test_the_order_of_reading_does_not_matter(solution, small_seed):
    def make():
        return solution.ArithmeticDataset(1, "test", test_fraction=0.5, seed=small_seed)

    forwards = read(make())
    dataset = make()
    backwards = read(dataset, range(len(dataset) - 1, -1, -1))[::-1]
    again = read(dataset)
    assert_equal(backwards, forwards, because="item i is the same whatever was read before it")
    assert_equal(again, forwards, because="item i is the same at its second reading")


@task("ArithmeticDataset")
def test_another_seed_gives_another_split(solution, small_seed):
    one = read(solution.ArithmeticDataset(2, "test", seed=small_seed))
    two = read(solution.ArithmeticDataset(2, "test", seed=small_seed + 1))
    assert_that(one != two, "the split depends on the seed", value=len(set(one) & set(two)))


@task("ArithmeticDataset")
def test_every_pair_can_be_drawn(solution, small_seed):
    counts = {}
    for one in range(120):
        test = solution.ArithmeticDataset(1, "test", test_fraction=0.5, seed=small_seed + one)
        for pair in unordered(questions(test)):
            counts[pair] = counts.get(pair, 0) + 1
    always = sorted(pair for pair, count in counts.items() if count == 120)
    never = sorted((a, b) for a in range(10) for b in range(a, 10) if (a, b) not in counts)
    assert_equal(never, [], because="pairs that are in the test for none of 120 seeds")
    assert_equal(always, [], because="pairs that are in the test for each of 120 seeds")


@task("ArithmeticDataset")
def test_splits_do_not_touch_the_global_random_state(solution):
    with global_rng_untouched():
        solution.ArithmeticDataset(1, "train")[0]


@task("ArithmeticDataset")
def test_negative_indices_count_from_the_end_of_a_split(solution):
    dataset = solution.ArithmeticDataset(1, "train", test_fraction=0.0)
    assert_equal(read(dataset, [-1, -2, -100]), [("9+9=", "81"), ("9+8=", "71"), ("0+0=", "0")])


@task("ArithmeticDataset")
@pytest.mark.parametrize("index", [100, 101, -101, 1000, -1000])
def test_an_index_outside_a_split_is_an_indexerror(solution, index):
    dataset = solution.ArithmeticDataset(1, "train", test_fraction=0.0)
    assert_raises(IndexError, dataset.__getitem__, index, because=f"100 items have no item {index}")


@task("ArithmeticDataset")
def test_each_access_makes_new_tensors(solution):
    dataset = solution.ArithmeticDataset(1, "train", test_fraction=0.0)
    item = dataset[57]
    item["prompt"].fill_(PAD)
    item["answer"].fill_(PAD)
    assert_equal(read(dataset, [57]), [("5+7=", "21")], because="writing into an item must not change the data set")


@task("ArithmeticDataset")
@pytest.mark.parametrize(
    ("args", "options", "shown"),
    [
        ((1, "validation"), {}, "validation"),
        ((1, "Test"), {}, "Test"),
        ((1, "train"), {"op": "*"}, "*"),
        ((1, "train"), {"op": "-"}, "-"),
        ((0, "train"), {}, "0"),
        ((-1, "test"), {}, "-1"),
        ((1, "train"), {"test_fraction": -0.25}, "-0.25"),
        ((1, "train"), {"test_fraction": 1.5}, "1.5"),
    ],
)
def test_what_does_not_exist_is_refused(solution, args, options, shown):
    assert_raises(ValueError, solution.ArithmeticDataset, *args, mentions=[shown], **options)


# pad_collate


def make_batch(randint, sizes):
    """Items with prompts of ids 0 to 11 and answers of digits, of these (P, A)."""
    return [{"prompt": randint(0, 12, (p,)), "answer": randint(0, 10, (a,))} for p, a in sizes]


def collated(batch, pad_id, ignore=IGNORE):
    """What a batch becomes, place by place."""
    rows = [(item["prompt"].tolist(), item["answer"].tolist()) for item in batch]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = [], []
    for prompt, answer in rows:
        text = [*prompt, *answer, EOS]
        last = len(prompt) + len(answer) - 1
        ids.append([text[t] if t <= last else pad_id for t in range(width)])
        labels.append([text[t + 1] if len(prompt) - 1 <= t <= last else ignore for t in range(width)])
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(lengths)


SIZES = [(4, 2), (6, 3), (3, 1), (5, 3), (4, 1)]


@task("pad_collate")
def test_rows_are_prompt_answer_and_padding(solution, randint):
    batch = make_batch(randint, SIZES)
    ids, _, _ = collated(batch, PAD)
    assert_close(solution.pad_collate(batch, PAD)["input_ids"], ids, because="prompt, answer, padding; no <eos>")


@task("pad_collate")
def test_lengths_count_prompt_and_answer(solution, randint):
    batch = make_batch(randint, SIZES)
    assert_close(solution.pad_collate(batch, PAD)["lengths"], torch.tensor([6, 9, 4, 8, 5]))


@task("pad_collate")
def test_labels_are_the_next_tokens_of_the_answers(solution, randint):
    batch = make_batch(randint, SIZES)
    _, labels, _ = collated(batch, PAD)
    assert_close(
        solution.pad_collate(batch, PAD)["labels"],
        labels,
        because="labels[t] is the token after input_ids[t] where the model has to write it",
    )


@task("pad_collate")
def test_the_answer_and_its_end_are_all_that_counts(solution, randint):
    batch = make_batch(randint, SIZES)
    labels = solution.pad_collate(batch, PAD)["labels"]
    counted = int((labels != IGNORE).sum())
    assert_equal(counted, 2 + 3 + 1 + 3 + 1 + 5, because="labels that count: len(answer) + 1 for each item")


@task("pad_collate")
def test_the_last_prompt_token_predicts_the_first_answer_token(solution, device):
    batch = [
        {"prompt": torch.tensor(p, device=device), "answer": torch.tensor(a, device=device)}
        for p, a in [([1, 10, 2, 11], [3]), ([9, 10, 5, 11], [4, 1])]
    ]
    labels = solution.pad_collate(batch, PAD)["labels"]
    assert_close(labels[:, 3], torch.tensor([3, 4]), because="under the '=' stands the first digit of the answer")


@task("pad_collate")
def test_the_last_answer_token_predicts_the_end(solution, device):
    batch = [
        {"prompt": torch.tensor(p, device=device), "answer": torch.tensor(a, device=device)}
        for p, a in [([1, 10, 2, 11], [3]), ([9, 10, 5, 11], [4, 1])]
    ]
    labels = solution.pad_collate(batch, PAD)["labels"]
    ends = torch.stack((labels[0, 4], labels[1, 5]))
    assert_close(ends, torch.tensor([EOS, EOS]), because="after the last digit the model has to say <eos>")


@task("pad_collate")
@pytest.mark.parametrize("pad_id", [0, 3, EOS])
def test_padding_may_have_the_id_of_a_real_token(solution, device, pad_id):
    batch = [
        {"prompt": torch.tensor(p, device=device), "answer": torch.tensor(a, device=device)}
        for p, a in [([3, 10, 0, 11], [3]), ([5, 10, 5, 11], [0, 1]), ([9, 9, 10, 1, 11], [0, 0, 1])]
    ]
    ids, labels, lengths = collated(batch, pad_id)
    assert_close(
        solution.pad_collate(batch, pad_id),
        {"input_ids": ids, "labels": labels, "lengths": lengths},
        because="what is padding is known from the lengths, not from the ids",
    )


@task("pad_collate")
@pytest.mark.parametrize("ignore", [-1, -7, 99])
def test_ignore_index_can_be_chosen(solution, randint, ignore):
    batch = make_batch(randint, SIZES)
    _, labels, _ = collated(batch, PAD, ignore)
    found = solution.pad_collate(batch, PAD, ignore_index=ignore)["labels"]
    assert_close(found, labels, because=f"ignore_index={ignore}")


@task("pad_collate")
@pytest.mark.parametrize("sizes", [[(4, 2)], [(1, 1), (1, 3)], [(5, 1), (2, 4)], [(7, 1), (2, 2)]])
def test_a_batch_is_as_wide_as_its_longest_item(solution, randint, sizes):
    batch = make_batch(randint, sizes)
    ids, labels, lengths = collated(batch, PAD)
    assert_close(solution.pad_collate(batch, PAD), {"input_ids": ids, "labels": labels, "lengths": lengths})


@task("pad_collate")
def test_an_empty_answer_still_has_an_end(solution, randint):
    batch = make_batch(randint, [(3, 0), (2, 4)])
    _, labels, _ = collated(batch, PAD)
    assert_close(solution.pad_collate(batch, PAD)["labels"], labels, because="A = 0 leaves one label, EOS_ID")


@task("pad_collate")
@pytest.mark.parametrize("key", ["input_ids", "labels", "lengths"])
def test_everything_is_int64_on_the_device_of_the_items(solution, randint, device, key):
    found = solution.pad_collate(make_batch(randint, SIZES), PAD)
    assert_equal(sorted(found), ["input_ids", "labels", "lengths"])
    value = found[key]
    assert_equal((value.dtype, value.device.type), (torch.int64, device.type), because=key)


@task("pad_collate")
def test_an_empty_batch_is_refused(solution):
    assert_raises(ValueError, solution.pad_collate, [], PAD)


@cost_case("pad_collate")
def one_batch(module, randint):
    batch = [{"prompt": randint(0, 12, (3 + i % 4,)), "answer": randint(0, 10, (1 + i % 3,))} for i in range(32)]
    return lambda: module.pad_collate(batch, PAD)


# ShuffledBatchSampler


@task("ShuffledBatchSampler")
@pytest.mark.parametrize(("n", "size"), [(23, 5), (20, 5), (3, 10), (7, 1), (1, 1), (0, 4)])
def test_each_index_comes_once(solution, n, size, small_seed):
    found = flat(islice(solution.ShuffledBatchSampler(n, size, seed=small_seed), 100))
    assert_equal(sorted(found), list(range(n)), because="one pass gives 0 ... n-1, each once")


@task("ShuffledBatchSampler")
@pytest.mark.parametrize(("n", "sizes"), [(23, [5, 5, 5, 5, 3]), (20, [5, 5, 5, 5]), (3, [3]), (0, [])])
def test_the_last_batch_has_what_is_left(solution, n, sizes, small_seed):
    found = [len(batch) for batch in islice(solution.ShuffledBatchSampler(n, 5, seed=small_seed), 100)]
    assert_equal(found, sizes, because=f"sizes of the batches of {n} indices, batch_size 5")


@task("ShuffledBatchSampler")
@pytest.mark.parametrize(("n", "sizes"), [(23, [5, 5, 5, 5]), (20, [5, 5, 5, 5]), (3, []), (0, [])])
def test_drop_last_leaves_out_a_short_batch(solution, n, sizes, small_seed):
    batches = list(islice(solution.ShuffledBatchSampler(n, 5, drop_last=True, seed=small_seed), 100))
    found = flat(batches)
    assert_equal([len(batch) for batch in batches], sizes, because=f"{n} indices, batch_size 5, drop_last")
    assert_equal(len(set(found) & set(range(n))), len(found), because="no index comes twice")


@task("ShuffledBatchSampler")
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("n", "size"), [(23, 5), (20, 5), (21, 5), (24, 5), (3, 10), (0, 4)])
def test_the_length_is_the_number_of_batches(solution, n, size, drop_last):
    sampler = solution.ShuffledBatchSampler(n, size, drop_last=drop_last)
    expected = n // size if drop_last else (n + size - 1) // size
    found = {"len": len(sampler), "batches": len(list(islice(sampler, 100)))}
    because = f"n={n}, batch_size={size}, drop_last={drop_last}"
    assert_equal(found, {"len": expected, "batches": expected}, because=because)


@task("ShuffledBatchSampler")
def test_batches_are_lists_of_python_ints(solution):
    batch = next(iter(solution.ShuffledBatchSampler(9, 4)))
    assert_that(type(batch) is list, "a batch is a list", value=type(batch).__name__)
    assert_equal([type(index).__name__ for index in batch], ["int"] * 4)


@task("ShuffledBatchSampler")
def test_the_same_seed_and_epoch_give_the_same_order(solution, small_seed):
    orders = []
    for state in (1, 2):
        seed_everything(state)
        sampler = solution.ShuffledBatchSampler(50, 8, seed=small_seed)
        sampler.set_epoch(3)
        orders.append(list(sampler))
    assert_equal(orders[1], orders[0], because="two samplers with equal n, seed and epoch")


@task("ShuffledBatchSampler")
def test_a_pass_can_be_repeated(solution, small_seed):
    sampler = solution.ShuffledBatchSampler(50, 8, seed=small_seed)
    first = list(sampler)
    assert_equal(list(sampler), first, because="without set_epoch the second pass is the first again")


@task("ShuffledBatchSampler")
def test_another_epoch_has_another_order(solution, small_seed):
    sampler = solution.ShuffledBatchSampler(50, 8, seed=small_seed)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(tuple(flat(sampler)))
    assert_equal(len(set(orders)), 4, because="number of different orders in four epochs")


@task("ShuffledBatchSampler")
def test_an_epoch_does_not_depend_on_those_before(solution, small_seed):
    travelled = solution.ShuffledBatchSampler(50, 8, seed=small_seed)
    for epoch in (0, 1, 5):
        travelled.set_epoch(epoch)
        list(travelled)
    travelled.set_epoch(2)
    direct = solution.ShuffledBatchSampler(50, 8, seed=small_seed)
    direct.set_epoch(2)
    expected = list(direct)
    assert_equal(list(travelled), expected, because="epoch 2 after epochs 0, 1, 5, and epoch 2 at once")


@task("ShuffledBatchSampler")
def test_a_new_sampler_has_seed_0_and_is_in_epoch_0(solution):
    explicit = solution.ShuffledBatchSampler(50, 8, drop_last=False, seed=0)
    explicit.set_epoch(0)
    expected = list(explicit)
    assert_equal(list(solution.ShuffledBatchSampler(50, 8)), expected)


@task("ShuffledBatchSampler")
def test_another_seed_has_another_order(solution, small_seed):
    one = list(solution.ShuffledBatchSampler(50, 8, seed=small_seed))
    two = list(solution.ShuffledBatchSampler(50, 8, seed=small_seed + 2))
    assert_that(one != two, "the order depends on the seed", value=two)


@task("ShuffledBatchSampler")
def test_seed_and_epoch_are_not_added(solution):
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            sampler = solution.ShuffledBatchSampler(50, 8, seed=seed)
            sampler.set_epoch(epoch)
            orders.setdefault(tuple(flat(sampler)), []).append((seed, epoch))
    same = [pairs for pairs in orders.values() if len(pairs) > 1]
    assert_equal(same, [], because="pairs (seed, epoch) with the same order")


@task("ShuffledBatchSampler")
def test_every_index_comes_to_every_place_with_every_other_behind_it(solution, small_seed):
    sampler = solution.ShuffledBatchSampler(6, 2, seed=small_seed)
    places, neighbors = set(), set()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        order = flat(sampler)
        places.update(enumerate(order))
        neighbors.update(zip(order, order[1:], strict=False))
    assert_equal(len(places), 36, because="combinations of place and index that 300 epochs show, of 36")
    assert_equal(len(neighbors), 30, because="combinations of an index and the one behind it, of 30")


@task("ShuffledBatchSampler")
def test_two_passes_at_one_time_do_not_disturb_each_other(solution, small_seed):
    sampler = solution.ShuffledBatchSampler(20, 3, seed=small_seed)
    expected = list(sampler)
    one, two = iter(sampler), iter(sampler)
    found = [next(one), next(one), next(two), next(one), next(two)]
    assert_equal(found, [expected[i] for i in (0, 1, 0, 2, 1)])


@task("ShuffledBatchSampler")
def test_the_sampler_leaves_the_global_random_state_alone(solution, small_seed):
    torch.manual_seed(small_seed)
    expected = torch.rand(3)
    torch.manual_seed(small_seed)
    list(solution.ShuffledBatchSampler(30, 4, seed=5))
    assert_close(torch.rand(3), expected, because="torch.rand gives what it would have given without the sampler")
    with global_rng_untouched():
        list(solution.ShuffledBatchSampler(30, 4, seed=5))


@task("ShuffledBatchSampler")
@pytest.mark.parametrize(("n", "size"), [(10, 0), (10, -3), (-1, 4)])
def test_impossible_sizes_are_refused(solution, n, size):
    wrong = n if n < 0 else size
    assert_raises(ValueError, solution.ShuffledBatchSampler, n, size, mentions=[str(wrong)])


# Loader


class Recorder:
    """A data set of rows that remembers what was asked for."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.rows[index]


class Plan:
    """A batch sampler that has other batches, and another number of them, in each epoch."""

    def __init__(self, n, seed=0):
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def _batches(self):
        rng = random.Random(f"{self.seed}:{self.epoch}")
        order = rng.sample(range(self.n), self.n)
        cuts = sorted(rng.sample(range(1, self.n), 3 + self.epoch % 3))
        return [order[i:j] for i, j in zip([0, *cuts], [*cuts, self.n], strict=True)]

    def __len__(self):
        return len(self._batches())

    def __iter__(self):
        return iter(self._batches())


def plan(n, seed, epoch):
    """The batches of one epoch."""
    sampler = Plan(n, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def as_list(items):
    return list(items)


@task("Loader")
def test_batches_are_those_of_the_library(solution, randn, small_seed):
    data = list(randn(17, 3).cpu())
    expected = list(DataLoader(data, batch_sampler=Plan(17, small_seed), collate_fn=torch.stack))
    loader = solution.Loader(data, Plan(17, small_seed), torch.stack)
    assert_close(list(islice(loader, 50)), expected)


@task("Loader")
def test_items_are_fetched_in_order_and_given_as_a_list(solution):
    seen = []
    loader = solution.Loader("abcdef", [[4, 1], [0], [5, 2, 3]], lambda items: seen.append(items))
    results = list(islice(loader, 50))
    assert_equal(seen, [["e", "b"], ["a"], ["f", "c", "d"]], because="what collate_fn was given")
    assert_equal(results, [None] * 3, because="what collate_fn returns is passed on as it is")


@task("Loader")
def test_the_length_is_that_of_the_sampler(solution):
    assert_equal(len(solution.Loader("abcdef", [[4, 1], [0], [5]], as_list)), 3)
    assert_equal(len(solution.Loader("abcdef", [], as_list)), 0)


@task("Loader")
def test_each_loop_is_a_new_pass(solution):
    loader = solution.Loader("abcd", [[2, 0], [3]], as_list)
    first = list(islice(loader, 50))
    second = list(islice(loader, 50))
    assert_equal([first, second], [[["c", "a"], ["d"]]] * 2, because="two loops over one loader")


@task("Loader")
def test_the_sampler_is_asked_at_every_pass(solution, small_seed):
    sampler = Plan(12, small_seed)
    loader = solution.Loader(range(12), sampler, as_list)
    found = []
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        assert_equal(len(loader), len(plan(12, small_seed, epoch)), because=f"number of batches in epoch {epoch}")
        found.append(list(islice(loader, 50)))
    expected = [plan(12, small_seed, epoch) for epoch in (0, 1, 5)]
    assert_equal(found, expected, because="the batches of epochs 0, 1 and 5")


@task("Loader")
def test_items_are_fetched_when_their_batch_is_asked_for(solution):
    dataset = Recorder("abcdef")
    loader = solution.Loader(dataset, [[4, 1], [0], [5, 2]], as_list)
    batches = iter(loader)
    assert_equal(dataset.asked, [], because="items that were fetched before the first batch was asked for")
    next(batches)
    assert_equal(dataset.asked, [4, 1], because="items that were fetched for the first batch")
    next(batches)
    assert_equal(dataset.asked, [4, 1, 0], because="items that were fetched for the first two batches")


@task("Loader")
def test_two_loops_at_one_time_do_not_disturb_each_other(solution):
    loader = solution.Loader("abcdef", [[4, 1], [0], [5, 2]], as_list)
    one, two = iter(loader), iter(loader)
    found = [next(one), next(one), next(two), next(one), next(two)]
    assert_equal(found, [["e", "b"], ["a"], ["e", "b"], ["f", "c"], ["a"]])


@task("Loader")
def test_no_batches_are_no_calls(solution):
    seen = []
    assert_equal(list(islice(solution.Loader("abc", [], seen.append), 50)), [])
    assert_equal(seen, [])


# BucketBatchSampler

MAX_TOKENS = 512


@pytest.fixture
def skewed(rand):
    """2,000 lengths from 1 to 121: many short ones, few long."""
    return [1 + int(120 * u**3) for u in rand(2000).tolist()]


def padded(batch, lengths):
    return len(batch) * max(lengths[i] for i in batch)


@task("BucketBatchSampler")
def test_every_item_comes_once(solution, skewed, small_seed):
    batches = list(solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed))
    assert_equal(len(flat(batches)), 2000, because="one pass over 2,000 items")
    assert_equal(sorted(flat(batches)), list(range(2000)), because="each index once")


@task("BucketBatchSampler")
@pytest.mark.parametrize("max_tokens", [512, 200, 121])
def test_no_batch_is_larger_than_the_limit(solution, skewed, small_seed, max_tokens):
    batches = list(solution.BucketBatchSampler(skewed, max_tokens, small_seed))
    largest = max(padded(batch, skewed) for batch in batches)
    assert_that(
        largest <= max_tokens,
        f"the longest item of a batch times their number is at most max_tokens = {max_tokens}",
        value=largest,
    )


@task("BucketBatchSampler")
def test_little_is_padded(solution, skewed, small_seed):
    batches = list(solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed))
    ratio = sum(padded(batch, skewed) for batch in batches) / sum(skewed)
    assert_that(ratio <= 1.2, "padded sizes of all batches, as a multiple of the tokens: at most 1.2", value=ratio)


@task("BucketBatchSampler")
def test_batches_are_filled(solution, skewed, small_seed):
    batches = list(solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed))
    most = 1.5 * sum(skewed) / MAX_TOKENS
    assert_that(len(batches) <= most, f"at most {most:.0f} batches are needed for these lengths", value=len(batches))


@task("BucketBatchSampler")
@pytest.mark.parametrize("count", [0, 1, 2, 10, 11])
def test_equal_lengths_fill_a_batch_to_the_last_token(solution, count, small_seed):
    sampler = solution.BucketBatchSampler([6] * count, 30, small_seed)
    sizes = sorted((len(batch) for batch in islice(sampler, 50)), reverse=True)
    assert_equal(sizes, [5] * (count // 5) + [count % 5] * (count % 5 > 0), because="five times six fit into 30")


@task("BucketBatchSampler")
def test_bucket_batches_are_lists_of_python_ints(solution, small_seed):
    batches = list(solution.BucketBatchSampler([3, 5, 4, 5], 10, small_seed))
    assert_equal(sorted({type(batch).__name__ for batch in batches}), ["list"])
    assert_equal(sorted({type(index).__name__ for index in flat(batches)}), ["int"])
    assert_equal(sum(not batch for batch in batches), 0, because="number of empty batches")


@task("BucketBatchSampler")
def test_the_length_is_the_number_of_buckets_of_a_pass(solution, skewed, small_seed):
    sampler = solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed)
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        assert_equal(len(sampler), len(list(sampler)), because=f"len and the batches of epoch {epoch}")
    assert_equal(len(solution.BucketBatchSampler([], 10, small_seed)), 0)


@task("BucketBatchSampler")
def test_batches_are_not_sorted_by_length(solution, skewed, small_seed):
    batches = list(solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed))
    longest = [max(skewed[i] for i in batch) for batch in batches]
    rises = sum(one < two for one, two in zip(longest, longest[1:], strict=False))
    falls = sum(one > two for one, two in zip(longest, longest[1:], strict=False))
    assert_that(
        min(rises, falls) >= len(batches) // 10,
        "the longest items of the batches go up and down through an epoch: (steps up, steps down)",
        value=(rises, falls),
    )


@task("BucketBatchSampler")
def test_another_epoch_has_another_order_of_batches(solution, skewed, small_seed):
    sampler = solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed)
    shapes = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        shapes.append(tuple(max(skewed[i] for i in batch) for batch in sampler))
    assert_equal(len(set(shapes)), 3, because="number of different sequences of batch widths in three epochs")


@task("BucketBatchSampler")
def test_equal_lengths_come_in_other_companies(solution, small_seed):
    sampler = solution.BucketBatchSampler([7] * 200, 70, small_seed)
    passes = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        passes.append(tuple(tuple(sorted(batch)) for batch in sampler))
    found = {"orders": len(set(passes)), "groupings": len({frozenset(batches) for batches in passes})}
    assert_equal(found, {"orders": 3, "groupings": 3}, because="how many different ones three epochs show")


@task("BucketBatchSampler")
def test_the_same_seed_and_epoch_give_the_same_batches(solution, skewed, small_seed):
    passes = []
    for state, before in ((1, []), (2, [0, 4, 1])):
        seed_everything(state)
        sampler = solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed)
        for epoch in before:
            sampler.set_epoch(epoch)
            list(sampler)
        sampler.set_epoch(3)
        passes.append(list(sampler))
    assert_that(passes[0] == passes[1], "epoch 3 at once, and epoch 3 after epochs 0, 4, 1", value=passes[1])


@task("BucketBatchSampler")
def test_a_new_bucket_sampler_is_in_epoch_0(solution, skewed, small_seed):
    sampler = solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed)
    fresh = list(sampler)
    sampler.set_epoch(0)
    assert_that(list(sampler) == fresh, "a new sampler is in epoch 0")


@task("BucketBatchSampler")
def test_bucket_seed_and_epoch_are_not_added(solution):
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            sampler = solution.BucketBatchSampler([4] * 60, 20, seed)
            sampler.set_epoch(epoch)
            orders.setdefault(tuple(flat(sampler)), []).append((seed, epoch))
    same = [pairs for pairs in orders.values() if len(pairs) > 1]
    assert_equal(same, [], because="pairs (seed, epoch) with the same batches")


@task("BucketBatchSampler")
def test_two_bucket_passes_do_not_disturb_each_other(solution, small_seed):
    sampler = solution.BucketBatchSampler([4] * 20, 12, small_seed)
    expected = list(sampler)
    one, two = iter(sampler), iter(sampler)
    found = [next(one), next(one), next(two), next(one), next(two)]
    assert_equal(found, [expected[i] for i in (0, 1, 0, 2, 1)])


@task("BucketBatchSampler")
def test_buckets_leave_lengths_and_the_global_random_state_alone(solution, skewed, small_seed):
    before = list(skewed)
    with global_rng_untouched():
        sampler = solution.BucketBatchSampler(skewed, MAX_TOKENS, small_seed)
        len(sampler), list(sampler)
    assert_that(skewed == before, "`lengths` is the caller's: its order must stay", value=skewed[:8])


@task("BucketBatchSampler")
def test_a_too_long_item_is_refused(solution, small_seed):
    try:
        found = sorted(sorted(batch) for batch in solution.BucketBatchSampler([3, 21, 5], 20, small_seed))
    except ValueError:
        found = "ValueError"
    assert_equal(found, "ValueError", because="lengths 3, 21 and 5: 21 tokens fit into no batch of 20")
    assert_raises(
        ValueError, solution.BucketBatchSampler, [3, 21, 5], 20, small_seed, mentions=["21", "20"],
        because="an item of 21 tokens fits into no batch of 20",
    )  # fmt: skip


@task("BucketBatchSampler")
def test_an_item_may_fill_a_batch_alone(solution, small_seed):
    batches = list(islice(solution.BucketBatchSampler([3, 20, 5], 20, small_seed), 50))
    assert_equal(sorted(flat(batches)), [0, 1, 2])
    assert_that([1] in batches, "the item of 20 tokens is alone in a batch of 20", value=batches)


# ResumableLoader


def run(loader, count):
    """The next `count` batches, over as many loops as it takes; the last loop is left at its last batch."""
    found = []
    for _ in range(2 * count + 2):
        for batch in loader:
            found.append(batch)
            if len(found) == count:
                return found
    return found


def run_loops(loader, count):
    """The batches of `count` full loops, loop by loop."""
    return [list(islice(loader, 100)) for _ in range(count)]


@task("ResumableLoader")
def test_full_loops_are_the_epochs_of_the_sampler(solution, small_seed):
    loader = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    expected = [plan(15, small_seed, epoch) for epoch in range(4)]
    assert_equal(run_loops(loader, 4), expected, because="loop 1 is epoch 0, loop 2 is epoch 1, ...")


@task("ResumableLoader")
def test_collated_items_arrive_as_from_the_library(solution, randn, small_seed):
    data = list(randn(15, 2).cpu())
    expected = list(DataLoader(data, batch_sampler=Plan(15, small_seed), collate_fn=torch.stack))
    loader = solution.ResumableLoader(data, Plan(15, small_seed), torch.stack)
    assert_close(list(islice(loader, 50)), expected)


@task("ResumableLoader")
@pytest.mark.parametrize("done", range(12))
def test_a_state_goes_on_at_the_very_next_batch(solution, small_seed, done):
    stream = [batch for epoch in range(4) for batch in plan(15, small_seed, epoch)]
    assert len(stream) >= 14
    loader = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    run(loader, done) if done else None
    state = loader.state_dict()
    other = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    other.load_state_dict(json.loads(json.dumps(state)))
    rest = len(stream) - done
    assert_equal(run(other, rest), stream[done:], because=f"the stream of batches after {done} of them were done")


@task("ResumableLoader")
def test_bucket_batches_go_on_too(solution, reference, skewed, small_seed):
    def make():
        sampler = reference.BucketBatchSampler(skewed, MAX_TOKENS, small_seed)
        return solution.ResumableLoader(range(2000), sampler, as_list)

    whole = make()
    expected = [batch for loop in run_loops(whole, 2) for batch in loop]
    loader = make()
    run(loader, 13)
    other = make()
    other.load_state_dict(loader.state_dict())
    found = [batch for loop in run_loops(other, 2) for batch in loop]
    assert_that(found == expected[13:], "the batches after the first 13 of two epochs", value=found)


@task("ResumableLoader")
def test_a_loop_that_was_left_is_continued(solution, small_seed):
    batches = plan(15, small_seed, 0)
    loader = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    first = run(loader, 2)
    rest = list(islice(loader, 50))
    assert_equal([first, rest], [batches[:2], batches[2:]], because="two batches, break, and a second loop")


@task("ResumableLoader")
def test_an_epoch_that_is_done_is_followed_by_the_next(solution, small_seed):
    loader = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    run(loader, len(plan(15, small_seed, 0)))  # and left at the last batch
    state = loader.state_dict()
    other = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    other.load_state_dict(state)
    expected = plan(15, small_seed, 1)
    assert_equal(list(islice(other, 50)), expected, because="the loop after the last batch of epoch 0 is epoch 1")
    assert_equal(list(islice(loader, 50)), expected, because="and so it is in the loader that was not stopped")


@task("ResumableLoader")
def test_a_state_is_a_snapshot(solution, small_seed):
    loader = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    run(loader, 2)
    state = loader.state_dict()
    before = json.dumps(state)
    run(loader, 4)
    assert_equal(json.dumps(state), before, because="a state that was taken does not move on with the loader")
    other = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    other.load_state_dict(state)
    run(other, 5)
    assert_equal(json.dumps(state), before, because="nor with a loader that has loaded it")


@task("ResumableLoader")
def test_a_loader_can_go_back(solution, small_seed):
    stream = [batch for epoch in range(3) for batch in plan(15, small_seed, epoch)]
    loader = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    run(loader, 1)
    state = loader.state_dict()
    run(loader, 7)
    loader.load_state_dict(state)
    assert_equal(run(loader, 6), stream[1:7], because="after going back to where one batch was done")


@task("ResumableLoader")
def test_a_state_is_small(solution, small_seed):
    dataset = Recorder(range(5000))
    loader = solution.ResumableLoader(dataset, Plan(5000, small_seed), as_list)
    run(loader, 2)
    size = len(json.dumps(loader.state_dict()))
    assert_that(size < 200, "a state is below 200 characters as JSON, whatever the size of the data set", value=size)


@task("ResumableLoader")
def test_batches_that_were_done_are_not_fetched_again(solution, small_seed):
    batches = plan(15, small_seed, 0)
    loader = solution.ResumableLoader(range(15), Plan(15, small_seed), as_list)
    run(loader, 2)
    state = loader.state_dict()
    dataset = Recorder(range(15))
    other = solution.ResumableLoader(dataset, Plan(15, small_seed), as_list)
    other.load_state_dict(state)
    assert_equal(dataset.asked, [], because="items that were fetched by load_state_dict")
    next(iter(other))
    assert_equal(dataset.asked, batches[2], because="items that were fetched for the first batch after resuming")


@task("ResumableLoader")
def test_the_length_is_that_of_its_sampler(solution, small_seed):
    sampler = Plan(15, small_seed)
    loader = solution.ResumableLoader(range(15), sampler, as_list)
    assert_equal(len(loader), len(sampler))
