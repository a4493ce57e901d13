"""Right solutions of day 21, written differently."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import alternative
from reference.day08_linear_layers import Linear
from reference.day14_custom_modules import Dropout, Embedding
from reference.day18_multi_head import MultiHeadAttention
from reference.day19_positions import sinusoidal
from reference.day20_transformer_block import FeedForward, LayerNorm, TransformerBlock


@alternative("shift_right")
def shift_right__by_rolling(tgt, bos):
    found = tgt.roll(1, dims=1)
    found[:, :1] = bos
    return found


@alternative("make_masks")
def make_masks__by_comparing(src_lengths, tgt_lengths, ts, tt):
    if len(src_lengths) != len(tgt_lengths):
        raise ValueError(
            f"lengths {list(src_lengths.shape)} and {tuple(src_lengths.shape)}, {tuple(tgt_lengths.shape)}"
        )
    s, t = torch.arange(ts, device=src_lengths.device), torch.arange(tt, device=src_lengths.device)
    src = s.view(1, 1, 1, -1) < src_lengths.view(-1, 1, 1, 1)
    tgt = torch.minimum(t[:, None] + 1, tgt_lengths[:, None, None, None]) > t
    return src, tgt, src.clone()


@alternative("seq2seq_loss")
def seq2seq_loss__of_real_tokens(logits, tgt, pad_id, label_smoothing=0.0):
    if tuple(logits.shape[:-1]) != tuple(tgt.shape):
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(tgt.shape)}")
    real = tgt != pad_id
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(wide[real], -1)  # (N, V)
    if not len(logp):
        return (logits * 0).sum()
    picked = logp.gather(1, tgt[real][:, None])[:, 0]
    mixed = (1 - label_smoothing) * picked + label_smoothing * logp.mean(-1)
    return -mixed.mean().to(logits.dtype)


@alternative("EncoderLayer")
class EncoderLayer__with_its_own_forward(nn.Module):
    def __init__(self, d_model, n_heads, d_ff, *, norm_first=False, activation="relu", dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(d_model), LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, n_heads, bias=True)
        self.feed_forward = FeedForward(d_model, d_ff, activation, dropout)
        self.drop, self.norm_first = Dropout(dropout), norm_first

    def forward(self, x, mask=None):
        for norm, branch in ((self.norm1, self._attend), (self.norm2, lambda x, mask: self.feed_forward(x))):
            if self.norm_first:
                x = x + self.drop(branch(norm(x), mask))
            else:
                x = norm(x + self.drop(branch(x, mask)))
        return x

    def _attend(self, x, mask):
        return self.attention(x, x, mask)


@alternative("Encoder")
class Encoder__of_blocks(nn.Module):
    def __init__(self, d_model, n_heads, n_layers, d_ff, *, norm_first=False, **options):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            self.layers.append(TransformerBlock(d_model, n_heads, d_ff, norm_first=norm_first, **options))
        self.norm = LayerNorm(d_model)

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.norm(x)


@alternative("DecoderLayer")
class DecoderLayer__three_branches(nn.Module):
    def __init__(self, d_model, n_heads, d_ff, *, norm_first=False, activation="relu", dropout=0.0):
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_heads, bias=True)
        self.cross_attention = MultiHeadAttention(d_model, n_heads, bias=True, d_context=d_model)
        self.feed_forward = FeedForward(d_model, d_ff, activation, dropout)
        for i in (1, 2, 3):
            setattr(self, f"norm{i}", LayerNorm(d_model))
        self.drop, self.norm_first = Dropout(dropout), norm_first

    def forward(self, y, memory, self_mask=None, cross_mask=None):
        y = self._branch(y, self.norm1, lambda x: self.self_attention(x, x, self_mask))
        y = self._branch(y, self.norm2, lambda x: self.cross_attention(x, context=memory, mask=cross_mask))
        return self._branch(y, self.norm3, self.feed_forward)

    def _branch(self, y, norm, says):
        return y + self.drop(says(norm(y))) if self.norm_first else norm(y + self.drop(says(y)))


@alternative("Decoder")
class Decoder__in_a_row(nn.Module):
    def __init__(self, d_model, n_heads, n_layers, d_ff, **options):
        super().__init__()
        self.norm = LayerNorm(d_model)
        layers = [DecoderLayer__three_branches(d_model, n_heads, d_ff, **options) for _ in range(n_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, y, memory, self_mask=None, cross_mask=None):
        for layer in self.layers:
            y = layer(y, memory, cross_mask=cross_mask, self_mask=self_mask)
        return self.norm(y)


@alternative("Transformer")
class Transformer__with_a_buffer(nn.Module):
    def __init__(
        self, src_vocab, tgt_vocab, d_model, n_heads, n_enc, n_dec, d_ff, max_len,
        *, share_embeddings=False, tie_output=True,
    ):  # fmt: skip
        super().__init__()
        self.src_embedding = Embedding(src_vocab, d_model)
        self.tgt_embedding = Embedding(tgt_vocab, d_model)
        if share_embeddings:
            if src_vocab != tgt_vocab:
                raise ValueError(f"{src_vocab} != {tgt_vocab}")
            self.tgt_embedding = self.src_embedding
        with torch.no_grad():
            self.src_embedding.weight.normal_(0, d_model**-0.5)
            self.tgt_embedding.weight.normal_(0, d_model**-0.5)
        self.encoder = Encoder__in_its_own_words(d_model, n_heads, n_enc, d_ff)
        self.decoder = Decoder__in_its_own_words(d_model, n_heads, n_dec, d_ff)
        self.head = Linear(d_model, tgt_vocab, bias=False)
        if tie_output:
            self.head.weight = self.tgt_embedding.weight
        self.register_buffer("positions", sinusoidal(torch.arange(max_len), d_model), persistent=False)

    def _vectors(self, table, tokens):
        T, longest = tokens.shape[1], len(self.positions)
        if T > longest:
            raise ValueError(f"{T} tokens, and room for {longest}")
        rows = table(tokens)
        return rows * math.sqrt(rows.shape[-1]) + self.positions[:T].to(rows.dtype)

    def encode(self, src, src_lengths):
        keep = torch.arange(src.shape[1], device=src.device) < src_lengths[:, None]
        return self.encoder(self._vectors(self.src_embedding, src), keep[:, None, None, :])

    def decode(self, tgt, memory, src_lengths, tgt_lengths=None):
        T = tgt.shape[1]
        self_mask = torch.ones(T, T, dtype=torch.bool, device=tgt.device).tril()
        if tgt_lengths is not None:
            self_mask = self_mask & (torch.arange(T, device=tgt.device) < tgt_lengths[:, None])[:, None, None]
        keep = torch.arange(memory.shape[1], device=tgt.device) < src_lengths[:, None]
        y = self.decoder(self._vectors(self.tgt_embedding, tgt), memory, self_mask, keep[:, None, None])
        return y @ self.head.weight.T

    def forward(self, src, tgt, src_lengths, tgt_lengths):
        memory = self.encode(src, src_lengths)
        return self.decode(tgt, memory, src_lengths, tgt_lengths)


class Encoder__in_its_own_words(Encoder__of_blocks):
    pass


class Decoder__in_its_own_words(Decoder__in_a_row):
    pass


Encoder__in_its_own_words.__name__, Decoder__in_its_own_words.__name__ = "Encoder", "Decoder"


@alternative("greedy_decode")
def greedy_decode__row_by_row_leaving(model, src, src_lengths, bos, eos, max_len):
    """Rows that have ended leave the batch."""
    rows = [[] for _ in range(len(src))]
    alive = torch.arange(len(src), device=src.device)
    with torch.inference_mode():
        memory = model.encode(src, src_lengths)
        read = torch.full((len(src), 1), bos, device=src.device)
        while len(alive) and read.shape[1] <= max_len:
            token = model.decode(read, memory[alive], src_lengths[alive])[:, -1, :].argmax(dim=-1)
            going = token != eos
            for b, t in zip(alive[going].tolist(), token[going].tolist(), strict=True):
                rows[b].append(t)
            read = torch.cat([read, token[:, None]], dim=1)[going]
            alive = alive[going]
    return rows


@alternative("reversal_batch")
def reversal_batch__row_by_row(n, *, generator):
    lengths = torch.randint(3, 9, (n,), generator=generator, device=generator.device)
    digits = torch.randint(0, 10, (n, 8), generator=generator, device=generator.device)
    src = lengths.new_zeros(n, 8)
    tgt = lengths.new_zeros(n, 9)
    for b, k in enumerate(lengths.tolist()):
        src[b, :k] = digits[b, :k] + 3
        tgt[b, :k] = src[b, :k].flip(0)
        tgt[b, k] = 2
    return src, lengths, tgt, lengths + 1


@alternative("exact_match")
def exact_match__by_tensors(model, src, src_lengths, tgt):
    rows = greedy_decode__row_by_row_leaving(model, src, src_lengths, 1, 2, tgt.shape[1])
    right = 0
    for row, wanted in zip(rows, tgt.tolist(), strict=True):
        wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
        right += int(row == wanted)
    return right / tgt.shape[0]


@alternative("train_reversal")
def train_reversal__by_torch(model, steps, *, batch=32, lr=4e-3, generator):
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.98))
    warmup = steps // 10
    losses = []
    model.train()
    for i in range(steps):
        up = (i + 1) / (warmup + 1)
        down = 0.5 + 0.5 * math.cos(math.pi * max(i - warmup, 0) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = lr * (up if i < warmup else down)
        src, src_lengths, tgt, tgt_lengths = reversal_batch__row_by_row(batch, generator=generator)
        read = F.pad(tgt, (1, 0), value=1)[:, :-1]
        logits = model(src, read, src_lengths, tgt_lengths)
        loss = F.cross_entropy(logits.transpose(1, 2), tgt, ignore_index=0)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@alternative("beam_search")
def beam_search__on_lists(model, src, beam, *, bos, eos, max_len, length_penalty=0.0):
    if beam <= 0:
        raise ValueError(f"a beam of {beam}")
    found, alive = [], [([bos], 0.0)]
    with torch.no_grad():
        n = torch.full((1,), src.shape[0], device=src.device)
        memory = model.encode(src.unsqueeze(0), n)
        for t in range(1, max_len + 1):
            read = torch.tensor([tokens for tokens, _ in alive], device=src.device)
            scores = model.decode(read, memory.repeat(len(alive), 1, 1), n.repeat(len(alive)))[:, -1].log_softmax(-1)
            following = []
            for (tokens, total), row in zip(alive, scores.tolist(), strict=True):
                following += [(total + gain, [*tokens, token]) for token, gain in enumerate(row)]
            following = sorted(following, reverse=True)[:beam]
            alive = []
            for total, tokens in following:
                if tokens[-1] == eos:
                    found.append((tokens[1:-1], total / t**length_penalty))
                elif t == max_len:
                    found.append((tokens[1:], total / t**length_penalty))
                else:
                    alive.append((tokens, total))
            if not alive:
                break
    return sorted(found, key=lambda pair: pair[1], reverse=True)[:beam]
