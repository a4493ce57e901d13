"""Known wrong solutions of day 21, each with what its numbers say."""

import torch
from torch import nn

from checker.testing import misconception
from reference import day21_encoder_decoder as right
from reference.day01_tensor_basics import sequence_mask
from reference.day06_training_loop import train_step
from reference.day10_losses import cross_entropy, log_softmax
from reference.day11_optimizers import Adam, cosine_lr
from reference.day16_scaled_dot_product import causal_mask
from reference.day19_positions import sinusoidal

PAD, BOS, EOS, ZERO = 0, 1, 2, 3


# shift_right


@misconception(
    "shift_right",
    "The decoder would read the very token that it has to predict. Copying it is easy: the loss goes to 0 within minutes, and "
    "generation fails, because there nobody hands it the answer.",
)
def shift_right__not_at_all(tgt, bos):
    return tgt.clone()


@misconception(
    "shift_right",
    "You shifted to the left: at each place stands the token after the target, and bos comes last. The decoder must read what "
    "was before.",
)
def shift_right__to_the_left(tgt, bos):
    B, T = tgt.shape
    return torch.cat([tgt, tgt.new_full((B, 1), bos)], 1)[:, 1 if T else 0 : T + 1 if T else 0]


@misconception(
    "shift_right",
    "bos is in front, but nothing has left at the end: there is one token more than there are targets. The last target is "
    "never read, since nothing is predicted after it.",
)
def shift_right__one_longer(tgt, bos):
    return torch.cat([tgt.new_full((len(tgt), 1), bos), tgt], 1)


# make_masks


def _masks(src_lengths, tgt_lengths, ts, tt):
    if src_lengths.shape != tgt_lengths.shape:
        raise ValueError(f"{tuple(src_lengths.shape)} and {tuple(tgt_lengths.shape)}")
    keys = sequence_mask(src_lengths, ts)[:, None, None]
    return keys, sequence_mask(tgt_lengths, tt)[:, None, None], causal_mask(tt, tt, device=keys.device)


@misconception(
    "make_masks",
    "Your source mask is causal. The source is there as a whole before the first word is written: its tokens may look both "
    "ways, and hiding half of them makes the encoder blind on one side.",
)
def make_masks__causal_source(src_lengths, tgt_lengths, ts, tt):
    src, tgt, back = _masks(src_lengths, tgt_lengths, ts, tt)
    return src & causal_mask(ts, ts, device=src.device), tgt & back, src


@misconception(
    "make_masks",
    "Your cross mask was made of target lengths. In cross-attention the target asks, but keys are source tokens: what may be "
    "looked at is decided by the lengths of the sources.",
)
def make_masks__cross_from_targets(src_lengths, tgt_lengths, ts, tt):
    src, tgt, back = _masks(src_lengths, tgt_lengths, ts, tt)
    return src, tgt & back, tgt


@misconception(
    "make_masks",
    "All three masks say the opposite: True at what is hidden. That is how nn.Transformer reads them; here True means may "
    "attend.",
)
def make_masks__inverted(src_lengths, tgt_lengths, ts, tt):
    src, tgt, back = _masks(src_lengths, tgt_lengths, ts, tt)
    return ~src, ~(tgt & back), ~src


@misconception(
    "make_masks",
    "The target mask hides the future, but no padding: places after the end of a short target may be looked at by those that "
    "follow.",
)
def make_masks__target_padding_seen(src_lengths, tgt_lengths, ts, tt):
    src, tgt, back = _masks(src_lengths, tgt_lengths, ts, tt)
    return src, back.expand(len(tgt), 1, tt, tt), src


@misconception(
    "make_masks",
    "The target mask hides padding, but no future: each token may look at those that it is there to predict.",
)
def make_masks__future_seen(src_lengths, tgt_lengths, ts, tt):
    src, tgt, _ = _masks(src_lengths, tgt_lengths, ts, tt)
    return src, tgt.expand(len(tgt), 1, tt, tt), src


@misconception(
    "make_masks",
    "The diagonal of your target mask is False: a token may not look at itself. It may, since what it predicts comes one place "
    "later; the shift has taken care of that. As it is, the first token has nothing to look at.",
)
def make_masks__not_at_itself(src_lengths, tgt_lengths, ts, tt):
    src, tgt, _ = _masks(src_lengths, tgt_lengths, ts, tt)
    return src, tgt & causal_mask(tt, tt, offset=-1, device=src.device), src


# seq2seq_loss


def _costs(logits, tgt, pad_id, label_smoothing=0.0):
    """What each place costs (B, T), 0 at padding, and which places are real."""
    options = {"ignore_index": pad_id, "label_smoothing": label_smoothing, "reduction": "none"}
    return cross_entropy(logits, tgt, **options), tgt != pad_id


@misconception(
    "seq2seq_loss",
    "Padding costs nothing in your loss, but it is counted: the sum is divided by all B * T places. Batches with much padding "
    "look better than they are, and their gradients are smaller.",
)
def seq2seq_loss__over_padding(logits, tgt, pad_id, label_smoothing=0.0):
    costs, _ = _costs(logits, tgt, pad_id, label_smoothing)
    return costs.sum() / max(costs.numel(), 1)


@misconception(
    "seq2seq_loss",
    "Padding is a target in your loss. It is easy to predict, so the mean looks fine, and a part of the model's strength goes "
    "into something that is not in the sentence.",
)
def seq2seq_loss__padding_is_a_target(logits, tgt, pad_id, label_smoothing=0.0):
    if pad_id < 0:
        return right.seq2seq_loss(logits, tgt, pad_id, label_smoothing)
    loss = cross_entropy(logits, tgt, ignore_index=-100, label_smoothing=label_smoothing)
    return loss


@misconception(
    "seq2seq_loss",
    "You took the mean of each row, and then the mean of those. A token in a short row weighs more than one in a long row; "
    "every target of the batch is to count once.",
)
def seq2seq_loss__mean_of_rows(logits, tgt, pad_id, label_smoothing=0.0):
    costs, real = _costs(logits, tgt, pad_id, label_smoothing)
    if not costs.numel():
        return costs.sum()
    return (costs.sum(1) / real.sum(1).clamp(min=1)).mean().to(logits.dtype)


@misconception(
    "seq2seq_loss",
    "Logits and targets were shifted against each other once more, as for a language model. Here the input of the decoder was "
    "shifted already: logits at t belong to the target at t. The first target of each row is missing now, and the others are "
    "compared with the wrong scores.",
)
def seq2seq_loss__shifted_twice(logits, tgt, pad_id, label_smoothing=0.0):
    if logits.shape[:-1] != tgt.shape:
        raise ValueError(f"{tuple(logits.shape)} and {tuple(tgt.shape)}")
    return cross_entropy(logits[:, :-1], tgt[:, 1:], ignore_index=pad_id, label_smoothing=label_smoothing)


# Encoder


@misconception(
    "EncoderLayer",
    "Your layer normalizes first unless told otherwise. That was yesterday's default; the layer of 2017 adds first and "
    "normalizes the sum.",
)
class EncoderLayer__pre_norm(right.TransformerBlock):
    def __init__(self, d_model, n_heads, d_ff, *, norm_first=True, activation="relu", dropout=0.0):
        super().__init__(d_model, n_heads, d_ff, norm_first=norm_first, activation=activation, dropout=dropout)


@misconception(
    "Encoder",
    "Your encoder hides later tokens from earlier ones. It may look both ways: nothing here is being predicted, and the source "
    "is known to its end.",
)
class Encoder__causal(right.Encoder):
    def forward(self, x, mask=None):
        back = causal_mask(x.shape[1], x.shape[1], device=x.device)
        return super().forward(x, back if mask is None else mask & back)


@misconception(
    "Encoder",
    "All your layers are one: the same weights are used several times, and the state dict names one tensor often. `[layer] * n` "
    "makes a list of n references; each layer needs weights of its own.",
)
class Encoder__one_layer(right.Encoder):
    def __init__(self, d_model, n_heads, n_layers, d_ff, **options):
        super().__init__(d_model, n_heads, 0, d_ff)
        self.layers = nn.ModuleList([right.EncoderLayer(d_model, n_heads, d_ff, **options)] * n_layers)


@misconception(
    "Encoder",
    "The norm at the end of the stack is not applied: these are the numbers of the last layer.",
)
class Encoder__no_last_norm(right.Encoder):
    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return x


# Decoder


class _Layer(right.DecoderLayer):
    """What most of these share: three branches, of which one or the other goes wrong."""

    def look_back(self, y, mask):
        return self.self_attention(y, mask=mask)

    def look_across(self, y, memory, mask):
        return self.cross_attention(y, memory, mask)

    def forward(self, y, memory, self_mask=None, cross_mask=None):
        drop = self.dropout
        if self.norm_first:
            y = y + drop(self.look_back(self.norm1(y), self_mask))
            y = y + drop(self.look_across(self.norm2(y), memory, cross_mask))
            return y + drop(self.feed_forward(self.norm3(y)))
        y = self.norm1(y + drop(self.look_back(y, self_mask)))
        y = self.norm2(y + drop(self.look_across(y, memory, cross_mask)))
        return self.norm3(y + drop(self.feed_forward(y)))


@misconception(
    "DecoderLayer",
    "In your cross-attention the memory asks and the target answers. It is the other way round: the decoder asks, the encoder "
    "answers. That is why the result has one row per target token, and not one per source token.",
)
class DecoderLayer__memory_asks(_Layer):
    def look_across(self, y, memory, mask):
        return self.cross_attention(memory, y, mask)


@misconception(
    "DecoderLayer",
    "The two masks have changed places: cross-attention got the causal one, and self-attention the one for the source's padding. "
    "Where source and target are equally long no shape complains.",
)
class DecoderLayer__masks_swapped(right.DecoderLayer):
    def forward(self, y, memory, self_mask=None, cross_mask=None):
        return super().forward(y, memory, cross_mask, self_mask)


@misconception(
    "DecoderLayer",
    "Your cross-attention looks at y itself, and the memory has no part in the result: it is the same for every source. Keys and "
    "values have to come from the memory.",
)
class DecoderLayer__memory_unused(_Layer):
    def look_across(self, y, memory, mask):
        if len(memory) != len(y):
            raise ValueError(f"{tuple(y.shape)} {tuple(memory.shape)}")
        return self.cross_attention(y, y)


@misconception(
    "DecoderLayer",
    "What cross-attention says replaces the stream instead of being added to it: all that self-attention found is lost there, "
    "and so is the short way for the gradient.",
)
class DecoderLayer__across_replaces(_Layer):
    def forward(self, y, memory, self_mask=None, cross_mask=None):
        drop = self.dropout
        if self.norm_first:
            y = y + drop(self.look_back(self.norm1(y), self_mask))
            y = drop(self.look_across(self.norm2(y), memory, cross_mask))
            return y + drop(self.feed_forward(self.norm3(y)))
        y = self.norm1(y + drop(self.look_back(y, self_mask)))
        y = self.norm2(drop(self.look_across(y, memory, cross_mask)))
        return self.norm3(y + drop(self.feed_forward(y)))


@misconception(
    "DecoderLayer",
    "self_mask has no effect: each target token sees those after it. In training it will copy them, and in decoding they are not "
    "there.",
)
class DecoderLayer__future_seen(right.DecoderLayer):
    def forward(self, y, memory, self_mask=None, cross_mask=None):
        return super().forward(y, memory, None, cross_mask)


@misconception(
    "DecoderLayer",
    "Dropout fell on the sums, stream included. Where the stream is dropped, what came in is lost for all later layers; only "
    "what a branch says may be dropped.",
)
class DecoderLayer__stream_dropped(right.DecoderLayer):
    def forward(self, y, memory, self_mask=None, cross_mask=None):
        drop = self.dropout
        if self.norm_first:
            y = drop(y + self.self_attention(self.norm1(y), mask=self_mask))
            y = drop(y + self.cross_attention(self.norm2(y), memory, cross_mask))
            return drop(y + self.feed_forward(self.norm3(y)))
        y = self.norm1(drop(y + self.self_attention(y, mask=self_mask)))
        y = self.norm2(drop(y + self.cross_attention(y, memory, cross_mask)))
        return self.norm3(drop(y + self.feed_forward(y)))


@misconception(
    "DecoderLayer",
    "There are three norms, and you use the first one three times: the weights of norm2 and norm3 never matter.",
)
class DecoderLayer__one_norm(right.DecoderLayer):
    def forward(self, y, memory, self_mask=None, cross_mask=None):
        drop, norm = self.dropout, self.norm1
        if self.norm_first:
            y = y + drop(self.self_attention(norm(y), mask=self_mask))
            y = y + drop(self.cross_attention(norm(y), memory, cross_mask))
            return y + drop(self.feed_forward(norm(y)))
        y = norm(y + drop(self.self_attention(y, mask=self_mask)))
        y = norm(y + drop(self.cross_attention(y, memory, cross_mask)))
        return norm(y + drop(self.feed_forward(y)))


@misconception(
    "DecoderLayer",
    "The memory went through norm2 as well. Only the stream is normalized before it asks; the memory comes out of an encoder "
    "that has a norm at its end, and goes in as it is.",
)
class DecoderLayer__memory_normalized(_Layer):
    def look_across(self, y, memory, mask):
        return self.cross_attention(y, self.norm2(memory) if self.norm_first else memory, mask)


@misconception(
    "DecoderLayer",
    "cross_mask has no effect: the padding of the source is looked at like a word, and a sentence is translated differently in a "
    "wider batch.",
)
class DecoderLayer__source_padding_seen(right.DecoderLayer):
    def forward(self, y, memory, self_mask=None, cross_mask=None):
        return super().forward(y, memory, self_mask, None)


@misconception(
    "Decoder",
    "From the second layer on, the memory is gone: your layers look at what the layer before them said. All of them should look "
    "at the one memory of the encoder.",
)
class Decoder__memory_once(right.Decoder):
    def forward(self, y, memory, self_mask=None, cross_mask=None):
        for layer in self.layers:
            y = layer(y, memory, self_mask, cross_mask)
            memory, cross_mask = y, None
        return self.norm(y)


# Transformer


@misconception(
    "Transformer",
    "Rows of the tables go in as they are. With the numbers that suit a tied head they have length 1, and a position has length "
    "sqrt(D / 2): positions drown the tokens. Start the tables larger, and the logits explode. sqrt(d_model) is what makes both "
    "uses fit.",
)
class Transformer__not_scaled(right.Transformer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = 1.0


class _Embedding(right.Transformer):
    """What these share: they get the embedding wrong."""

    def join(self, rows, positions, table):
        return rows * self.scale + positions

    def _embed(self, table, tokens):
        T = tokens.shape[1]
        if T > self.max_len:
            raise ValueError(f"{T} tokens, max_len {self.max_len}")
        rows = table(tokens)
        positions = sinusoidal(torch.arange(T, device=tokens.device), rows.shape[-1])
        return self.join(rows, positions, table).to(rows.dtype)


@misconception(
    "Transformer",
    "Positions are missing. Without them attention sees a bag of tokens: 3 2 1 is the same source as 1 2 3.",
)
class Transformer__no_positions(_Embedding):
    def join(self, rows, positions, table):
        return rows * self.scale


@misconception(
    "Transformer",
    "The encoder got no mask, and its tokens look at padding. Hiding it from the decoder alone is too late: by then it is mixed "
    "into every vector of the memory.",
)
class Transformer__encoder_sees_padding(right.Transformer):
    def encode(self, src, src_lengths):
        return self.encoder(self._embed(self.src_embedding, src))


class _Decoding(right.Transformer):
    """What these share: the wrong masks for the decoder."""

    def decode(self, tgt, memory, src_lengths, tgt_lengths=None):
        T = tgt.shape[1]
        if tgt_lengths is None:
            tgt_lengths = torch.full_like(src_lengths, T)
        masks = self.masks(src_lengths, tgt_lengths, memory.shape[1], T)
        return self.head(self.decoder(self._embed(self.tgt_embedding, tgt), memory, *masks))


@misconception(
    "Transformer",
    "In decode the future is not hidden: changing a later token changes the logits before it. The loss will be wonderful, and "
    "decoding will not work.",
)
class Transformer__future_seen(_Decoding):
    def masks(self, src_lengths, tgt_lengths, ts, tt):
        src, tgt, _ = _masks(src_lengths, tgt_lengths, ts, tt)
        return tgt, src


@misconception(
    "Transformer",
    "The head starts with a copy of the table's numbers, but it is a parameter of its own: after the first step they differ, and "
    "there are as many parameters as without tying.",
)
class Transformer__tied_by_copy(right.Transformer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.head.weight is self.tgt_embedding.weight:
            self.head.weight = nn.Parameter(self.head.weight.detach().clone())


@misconception(
    "Transformer",
    "Your tables start with numbers of size 1. Scaled by sqrt(d_model) they are that much louder than positions, and as the head "
    "they make logits as large as sqrt(d_model).",
)
class Transformer__tables_of_size_one(right.Transformer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        with torch.no_grad():
            self.src_embedding.weight.mul_(self.scale)
            if self.tgt_embedding is not self.src_embedding:
                self.tgt_embedding.weight.mul_(self.scale)


# greedy_decode


def _cut(row, eos):
    return row[: row.index(eos)] if eos in row else row


def _greedy(model, src, src_lengths, bos, eos, max_len, *, every=all, again=False, column=-1, only_last=False):
    """Greedy decoding with a choice of mistakes; returns what was written, bos first."""
    with torch.no_grad():
        memory = model.encode(src, src_lengths)
        written = src.new_full((len(src), 1), bos)
        done = torch.zeros_like(written[:, 0], dtype=torch.bool)
        for step in range(max_len):
            if len(src) == 0 or every(done.tolist()):
                break
            if again and step:
                memory = model.encode(src, src_lengths)
            logits = model.decode(written[:, -1:] if only_last else written, memory, src_lengths)
            token = logits[:, column].argmax(-1)
            written = torch.cat([written, token[:, None]], 1)
            done = done | (token == eos)
    return written.tolist()


@misconception(
    "greedy_decode",
    "You encode the source again for each token. It has not changed, and neither has the memory: encode once, before the loop.",
)
def greedy_decode__encoded_again(model, src, src_lengths, bos, eos, max_len):
    return [_cut(row[1:], eos) for row in _greedy(model, src, src_lengths, bos, eos, max_len, again=True)]


@misconception(
    "greedy_decode",
    "The rows are cut at the right place, but eos is still in them. It is a signal, not a part of the text.",
)
def greedy_decode__with_eos(model, src, src_lengths, bos, eos, max_len):
    rows = [row[1:] for row in _greedy(model, src, src_lengths, bos, eos, max_len)]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


@misconception(
    "greedy_decode",
    "All rows stop as soon as one of them says eos. Rows end one by one; the loop ends with the last of them.",
)
def greedy_decode__first_end_stops_all(model, src, src_lengths, bos, eos, max_len):
    return [_cut(row[1:], eos) for row in _greedy(model, src, src_lengths, bos, eos, max_len, every=any)]


@misconception(
    "greedy_decode",
    "The decoder gets the last token alone. Without a cache (that is tomorrow) it remembers nothing: it needs all that was "
    "written so far, each time.",
)
def greedy_decode__last_token_only(model, src, src_lengths, bos, eos, max_len):
    return [_cut(row[1:], eos) for row in _greedy(model, src, src_lengths, bos, eos, max_len, only_last=True)]


@misconception(
    "greedy_decode",
    "eos was taken out wherever it stood, and what came after it was kept. A finished row goes on saying things in a batch; none "
    "of them count.",
)
def greedy_decode__eos_filtered(model, src, src_lengths, bos, eos, max_len):
    rows = _greedy(model, src, src_lengths, bos, eos, max_len)
    return [[token for token in row[1:] if token != eos] for row in rows]


@misconception(
    "greedy_decode",
    "The texts are right, but the loop always runs to max_len, also when every row has ended long before.",
)
def greedy_decode__no_early_end(model, src, src_lengths, bos, eos, max_len):
    rows = _greedy(model, src, src_lengths, bos, eos, max_len, every=lambda done: False)
    return [_cut(row[1:], eos) for row in rows]


@misconception(
    "greedy_decode",
    "You read the scores at the first place. Those say what comes after bos; the next token is scored at the last place.",
)
def greedy_decode__first_place(model, src, src_lengths, bos, eos, max_len):
    return [_cut(row[1:], eos) for row in _greedy(model, src, src_lengths, bos, eos, max_len, column=0)]


@misconception(
    "greedy_decode",
    "One token too few where no eos comes: bos was counted among the max_len tokens.",
)
def greedy_decode__bos_counted(model, src, src_lengths, bos, eos, max_len):
    return [_cut(row[1:], eos) for row in _greedy(model, src, src_lengths, bos, eos, max_len - 1)]


# reversal_batch


def _batch(n, generator, *, high=9, zero=ZERO):
    device = generator.device
    lengths = torch.randint(3, high, (n,), generator=generator, device=device)
    digits = torch.randint(0, 10, (n, 8), generator=generator, device=device) + zero
    return lengths, digits, torch.arange(9, device=device)


def _pair(lengths, digits, place):
    src = torch.where(place[:8] < lengths[:, None], digits, PAD)
    mirrored = src.gather(1, (lengths[:, None] - 1 - place) % 8)
    tgt = torch.where(place < lengths[:, None], mirrored, torch.where(place == lengths[:, None], EOS, PAD))
    return src, tgt


@misconception(
    "reversal_batch",
    "You turned the whole row around, padding included: short targets begin with PAD. Only the digits are to be turned.",
)
def reversal_batch__padding_first(n, *, generator):
    lengths, digits, place = _batch(n, generator)
    src, _ = _pair(lengths, digits, place)
    tgt = torch.cat([src.flip(1), torch.full_like(src[:, :1], EOS)], 1)
    return src, lengths, tgt, lengths + 1


@misconception(
    "reversal_batch",
    "Your targets have no EOS. A model that has never seen an end will not write one: it goes on until it is stopped.",
)
def reversal_batch__no_end(n, *, generator):
    lengths, digits, place = _batch(n, generator)
    src, tgt = _pair(lengths, digits, place)
    return src, lengths, torch.where(tgt == EOS, PAD, tgt), lengths + 1


@misconception(
    "reversal_batch",
    "The target lengths are those of the sources. A target has a token more, its EOS, and with this length it would be hidden.",
)
def reversal_batch__end_not_counted(n, *, generator):
    lengths, digits, place = _batch(n, generator)
    src, tgt = _pair(lengths, digits, place)
    return src, lengths, tgt, lengths.clone()


# exact_match


@misconception(
    "exact_match",
    "You let the model read the right answer and looked whether it could say the next token. It saw the truth one token ago; "
    "let it write by itself to know what it can do.",
)
def exact_match__teacher_forced(model, src, src_lengths, tgt):
    with torch.no_grad():
        read = right.shift_right(tgt, BOS)
        found = model.decode(read, model.encode(src, src_lengths), src_lengths).argmax(-1)
    return ((found == tgt) | (tgt == PAD)).all(1).double().mean().item()


@misconception(
    "exact_match",
    "You counted tokens. With 95 % of the tokens right, only two of three strings of eight digits are; a row counts as a whole.",
)
def exact_match__share_of_tokens(model, src, src_lengths, tgt):
    written = right.greedy_decode(model, src, src_lengths, BOS, EOS, tgt.shape[1])
    hits = total = 0
    for found, row in zip(written, tgt.tolist(), strict=True):
        wanted = _cut(row, EOS) + [EOS]
        found = found + [EOS]
        hits += sum(a == b for a, b in zip(found, wanted, strict=False))
        total += len(wanted)
    return hits / total


# train_reversal


def _train(model, steps, batch, lr, generator, *, read=None, pad=PAD, rate=cosine_lr, max_norm=1.0, betas=(0.9, 0.98)):
    optimizer = Adam(model.parameters(), lr, betas=betas)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, lr_max=lr, lr_min=0.0, warmup=steps // 10, total=steps)
        src, src_lengths, tgt, tgt_lengths = right.reversal_batch(batch, generator=generator)
        shifted = right.shift_right(tgt, BOS) if read is None else read(tgt)
        inputs = (src, shifted, src_lengths, tgt_lengths)
        loss_fn = lambda logits, tgt: cross_entropy(logits, tgt, ignore_index=pad)  # noqa: E731
        losses.append(train_step(model, (*inputs, tgt), loss_fn, optimizer, max_norm=max_norm))
    return losses


@misconception(
    "train_reversal",
    "The decoder reads the targets themselves, each at the place where it is to be predicted. The loss goes to 0, since copying "
    "is easy, and generation fails: nothing is there to be copied. Shift the targets to the right.",
)
def train_reversal__not_shifted(model, steps, *, batch=32, lr=4e-3, generator):
    return _train(model, steps, batch, lr, generator, read=lambda tgt: tgt)


@misconception(
    "train_reversal",
    "PAD is a target in your loss. More than a fourth of all places are padding, so a good part of each step teaches the model "
    "to write nothing.",
)
def train_reversal__padding_learned(model, steps, *, batch=32, lr=4e-3, generator):
    return _train(model, steps, batch, lr, generator, pad=-100)


@misconception(
    "train_reversal",
    "The learning rate is lr all the time. It was to rise over the first tenth of the steps, which post-norm layers need, and to "
    "fall to 0 after that.",
)
def train_reversal__constant_rate(model, steps, *, batch=32, lr=4e-3, generator):
    return _train(model, steps, batch, lr, generator, rate=lambda step, **_: lr)


# beam_search


def _beam(model, src, beam, bos, eos, max_len, penalty, *, copies=1, length=lambda n: n, **mistakes):
    """Beam search on lists, with a choice of mistakes."""
    if beam < 1:
        raise ValueError(f"beam {beam}")
    with torch.no_grad():
        lengths = torch.tensor([len(src)], device=src.device)
        memory = model.encode(src[None], lengths)
        alive, ended = [([], 0.0)] * copies, []
        for t in range(max_len):
            if not alive:
                break
            read = torch.tensor([[bos, *tokens] for tokens, _ in alive], device=src.device)
            logits = model.decode(read, memory.expand(len(alive), -1, -1), lengths.expand(len(alive)))[:, -1]
            logp = logits if mistakes.get("raw") else log_softmax(logits)
            candidates = [
                ([*tokens, token], total + gain)
                for (tokens, total), row in zip(alive, logp.tolist(), strict=True)
                for token, gain in enumerate(row)
            ]
            candidates.sort(key=lambda pair: -pair[1])
            if mistakes.get("refill"):
                going = [pair for pair in candidates if pair[0][-1] != eos][:beam]
                ending = [pair for pair in candidates[:beam] if pair[0][-1] == eos]
                candidates = going + ending
            else:
                candidates = candidates[:beam]
            alive = []
            for tokens, total in candidates:
                if tokens[-1] == eos or t == max_len - 1:
                    score = total / length(t + 1) ** penalty
                    text = _cut(tokens, eos)
                    if not mistakes.get("only_survivors") or t == max_len - 1:
                        ended.append((text, score))
                else:
                    alive.append((tokens, total))
            if mistakes.get("hurry") and ended:
                break
    ended.sort(key=lambda pair: -pair[1])
    return ended[:beam]


@misconception(
    "beam_search",
    "Your beam starts with several copies of bos. They all have the same best continuation, so they stay copies of each other: a "
    "wide beam that searches like a narrow one.",
)
def beam_search__copies(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    return _beam(model, src, beam, bos, eos, max_len, length_penalty, copies=max(beam, 1))


@misconception(
    "beam_search",
    "The search stops as soon as something is finished. Others that still live may end better, above all when length is "
    "rewarded.",
)
def beam_search__first_end_stops(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    return _beam(model, src, beam, bos, eos, max_len, length_penalty, hurry=True)


@misconception(
    "beam_search",
    "length_penalty has no effect on your scores. Without it each further token makes a text less likely, and short ones win.",
)
def beam_search__no_penalty(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    return _beam(model, src, beam, bos, eos, max_len, 0.0)


@misconception(
    "beam_search",
    "eos is missing in your count of tokens. Its log-probability is in the sum, so it belongs to the length, too.",
)
def beam_search__end_not_counted(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    length = lambda n: max(n - 1, 1)  # noqa: E731
    return _beam(model, src, beam, bos, eos, max_len, length_penalty, length=length)


@misconception(
    "beam_search",
    "You added up logits. They are no probabilities: each step may add any number, and two steps cannot be compared before their "
    "sum over all tokens has been taken out.",
)
def beam_search__raw_logits(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    return _beam(model, src, beam, bos, eos, max_len, length_penalty, raw=True)


@misconception(
    "beam_search",
    "Only what lives in the last round comes back. Texts that ended before were found and then forgotten.",
)
def beam_search__finished_forgotten(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    return _beam(model, src, beam, bos, eos, max_len, length_penalty, only_survivors=True)


@misconception(
    "beam_search",
    "When a hypothesis ends you fill its place with the next best one. Some libraries do; here a place that was used by an end is "
    "gone, so fewer and fewer live.",
)
def beam_search__places_refilled(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    return _beam(model, src, beam, bos, eos, max_len, length_penalty, refill=True)
