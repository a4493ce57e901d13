"""The whole transformer of 2017: an encoder that reads, a decoder that writes while it looks at what was read.

Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762): figure 1 for the two stacks, section 3.1 for their layers,
3.2.3 for the three kinds of attention, 3.4 for the scaled and shared embeddings, 5.4 for label smoothing. As in
nn.Transformer, each stack ends in a norm of its own. The length penalty of the beam is a plain power of the length, the
simplest of those that Wu et al. (arXiv 1609.08144), section 7, compare.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.day01_tensor_basics import sequence_mask
from reference.day06_training_loop import train_step
from reference.day08_linear_layers import Linear
from reference.day10_losses import cross_entropy, log_softmax
from reference.day11_optimizers import Adam, cosine_lr
from reference.day14_custom_modules import Dropout, Embedding
from reference.day16_scaled_dot_product import causal_mask
from reference.day18_multi_head import MultiHeadAttention
from reference.day19_positions import sinusoidal
from reference.day20_transformer_block import FeedForward, LayerNorm, TransformerBlock

PAD, BOS, EOS, ZERO = 0, 1, 2, 3  # the tokens of the last exercise; the digit c is the token ZERO + c
SHORTEST, LONGEST = 3, 8


def shift_right(tgt: Tensor, bos: int) -> Tensor:
    """Return what the decoder reads while it predicts tgt (B, T): bos first, then all tokens but the last."""
    B, T = tgt.shape
    return torch.cat([tgt.new_full((B, 1), bos), tgt], dim=1)[:, :T]  # (B, T)


def make_masks(src_lengths: Tensor, tgt_lengths: Tensor, ts: int, tt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks (src_mask, tgt_mask, cross_mask) of a batch of pairs."""
    if src_lengths.shape != tgt_lengths.shape:
        raise ValueError(f"src_lengths {tuple(src_lengths.shape)} and tgt_lengths {tuple(tgt_lengths.shape)} differ")
    src_mask = sequence_mask(src_lengths, ts)[:, None, None]  # (B, 1, 1, Ts)
    tgt_mask = sequence_mask(tgt_lengths, tt)[:, None, None]  # (B, 1, 1, Tt)
    return src_mask, tgt_mask & causal_mask(tt, tt, device=tgt_mask.device), src_mask


def seq2seq_loss(logits: Tensor, tgt: Tensor, pad_id: int, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of tgt (B, T) under logits (B, T, V) over all that is not padding."""
    return cross_entropy(logits, tgt, ignore_index=pad_id, label_smoothing=label_smoothing)


class EncoderLayer(TransformerBlock):
    """The block of day 20 as it was in 2017: add first, then normalize."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        norm_first: bool = False,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__(d_model, n_heads, d_ff, norm_first=norm_first, activation=activation, dropout=dropout)


class Encoder(nn.Module):
    """Layers in which every token may look at every other, and a norm at the end."""

    def __init__(self, d_model: int, n_heads: int, n_layers: int, d_ff: int, **options):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d_model, n_heads, d_ff, **options) for _ in range(n_layers))
        self.norm = LayerNorm(d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, Ts, D) to the memory (B, Ts, D)."""
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Three residual branches: look back at what was written, look across at what was read, think."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        norm_first: bool = False,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm_first = norm_first
        self.self_attention = MultiHeadAttention(d_model, n_heads, bias=True)
        self.norm1 = LayerNorm(d_model)
        self.cross_attention = MultiHeadAttention(d_model, n_heads, bias=True)
        self.norm2 = LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff, activation, dropout)
        self.norm3 = LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(
        self, y: Tensor, memory: Tensor, self_mask: Tensor | None = None, cross_mask: Tensor | None = None
    ) -> Tensor:
        """Map y (B, Tt, D) to (B, Tt, D), looking at the memory (B, Ts, D)."""
        if self.norm_first:
            y = y + self.dropout(self.self_attention(self.norm1(y), mask=self_mask))  # (B, Tt, D)
            y = y + self.dropout(self.cross_attention(self.norm2(y), memory, cross_mask))  # (B, Tt, D)
            return y + self.dropout(self.feed_forward(self.norm3(y)))
        y = self.norm1(y + self.dropout(self.self_attention(y, mask=self_mask)))  # (B, Tt, D)
        y = self.norm2(y + self.dropout(self.cross_attention(y, memory, cross_mask)))  # (B, Tt, D)
        return self.norm3(y + self.dropout(self.feed_forward(y)))


class Decoder(nn.Module):
    """Decoder layers that all look at one memory, and a norm at the end."""

    def __init__(self, d_model: int, n_heads: int, n_layers: int, d_ff: int, **options):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(d_model, n_heads, d_ff, **options) for _ in range(n_layers))
        self.norm = LayerNorm(d_model)

    def forward(
        self, y: Tensor, memory: Tensor, self_mask: Tensor | None = None, cross_mask: Tensor | None = None
    ) -> Tensor:
        """Map y (B, Tt, D) to (B, Tt, D), looking at the memory (B, Ts, D)."""
        for layer in self.layers:
            y = layer(y, memory, self_mask, cross_mask)
        return self.norm(y)


class Transformer(nn.Module):
    """Source tokens in, and for each target token that was read a score for every next one out."""

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int,
        n_heads: int,
        n_enc: int,
        n_dec: int,
        d_ff: int,
        max_len: int,
        *,
        share_embeddings: bool = False,
        tie_output: bool = True,
    ):
        super().__init__()
        if share_embeddings and src_vocab != tgt_vocab:
            raise ValueError(f"vocabularies of {src_vocab} and {tgt_vocab} cannot share one table")
        self.max_len, self.scale = max_len, d_model**0.5
        self.src_embedding = Embedding(src_vocab, d_model)
        self.tgt_embedding = self.src_embedding if share_embeddings else Embedding(tgt_vocab, d_model)
        self.encoder = Encoder(d_model, n_heads, n_enc, d_ff)
        self.decoder = Decoder(d_model, n_heads, n_dec, d_ff)
        self.head = Linear(d_model, tgt_vocab, bias=False)
        for table in (self.src_embedding, self.tgt_embedding):
            nn.init.normal_(table.weight, std=1 / self.scale)
        if tie_output:
            self.head.weight = self.tgt_embedding.weight

    def encode(self, src: Tensor, src_lengths: Tensor) -> Tensor:
        """Map src (B, Ts) to the memory (B, Ts, D)."""
        mask = sequence_mask(src_lengths, src.shape[1])[:, None, None]  # (B, 1, 1, Ts)
        return self.encoder(self._embed(self.src_embedding, src), mask)

    def decode(self, tgt: Tensor, memory: Tensor, src_lengths: Tensor, tgt_lengths: Tensor | None = None) -> Tensor:
        """Map tgt (B, Tt) and the memory (B, Ts, D) to logits (B, Tt, V)."""
        T = tgt.shape[1]
        if tgt_lengths is None:
            tgt_lengths = torch.full_like(src_lengths, T)
        _, tgt_mask, cross_mask = make_masks(src_lengths, tgt_lengths, memory.shape[1], T)
        y = self.decoder(self._embed(self.tgt_embedding, tgt), memory, tgt_mask, cross_mask)  # (B, Tt, D)
        return self.head(y)

    def forward(self, src: Tensor, tgt: Tensor, src_lengths: Tensor, tgt_lengths: Tensor) -> Tensor:
        """Map src (B, Ts) and tgt (B, Tt) to logits (B, Tt, V)."""
        return self.decode(tgt, self.encode(src, src_lengths), src_lengths, tgt_lengths)

    def _embed(self, table: nn.Module, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        if T > self.max_len:
            raise ValueError(f"{T} tokens are more than max_len {self.max_len}")
        x = table(tokens) * self.scale  # (B, T, D)
        positions = sinusoidal(torch.arange(T, device=tokens.device), x.shape[-1])  # (T, D)
        return (x + positions).to(x.dtype)


@torch.no_grad()
def greedy_decode(
    model: nn.Module, src: Tensor, src_lengths: Tensor, bos: int, eos: int, max_len: int
) -> list[list[int]]:
    """Return, for each row of src (B, Ts), the tokens that the model writes before eos: always the likeliest next one."""
    memory = model.encode(src, src_lengths)  # (B, Ts, D)
    written = src.new_full((len(src), 1), bos)  # (B, 1 + what was written)
    running = written[:, 0] == bos  # (B,), all of them
    for _ in range(max_len):
        if not running.any():
            break
        token = model.decode(written, memory, src_lengths)[:, -1].argmax(dim=1)  # (B,)
        written = torch.cat([written, token[:, None]], dim=1)
        running = running & (token != eos)
    return [_before(row, eos) for row in written[:, 1:].tolist()]


def reversal_batch(n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (src (n, 8), src_lengths, tgt (n, 9), tgt_lengths): random digits, and the same backwards with EOS."""
    device = generator.device
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator, device=device)
    digits = torch.randint(0, 10, (n, LONGEST), generator=generator, device=device)
    place = torch.arange(LONGEST + 1, device=device)  # (9,)
    src = torch.where(place[:-1] < lengths[:, None], digits + ZERO, PAD)  # (n, 8)
    mirrored = src.gather(1, (lengths[:, None] - 1 - place) % LONGEST)  # (n, 9)
    after = torch.where(place == lengths[:, None], EOS, PAD)  # (n, 9)
    tgt = torch.where(place < lengths[:, None], mirrored, after)  # (n, 9)
    return src, lengths, tgt, lengths + 1


def train_reversal(
    model: nn.Module, steps: int, *, batch: int = 32, lr: float = 4e-3, generator: torch.Generator
) -> list[float]:
    """Train a Transformer to write digits backwards; the loss of each step."""
    optimizer = Adam(model.parameters(), betas=(0.9, 0.98))
    losses = []
    for step in range(steps):
        rate = cosine_lr(step, lr_max=lr, lr_min=0.0, warmup=steps // 10, total=steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        src, src_lengths, tgt, tgt_lengths = reversal_batch(batch, generator=generator)
        inputs = (src, shift_right(tgt, BOS), src_lengths, tgt_lengths)
        losses.append(train_step(model, (*inputs, tgt), _reversal_loss, optimizer, max_norm=1.0))
    return losses


def exact_match(model: nn.Module, src: Tensor, src_lengths: Tensor, tgt: Tensor) -> float:
    """Return the share of rows that the model, decoding greedily, writes without any mistake."""
    written = greedy_decode(model, src, src_lengths, BOS, EOS, tgt.shape[1])
    wanted = [_before(row, EOS) for row in tgt.tolist()]
    return sum(written[i] == row for i, row in enumerate(wanted)) / len(wanted)


@torch.no_grad()
def beam_search(
    model: nn.Module, src: Tensor, beam: int, *, bos: int, eos: int, max_len: int, length_penalty: float = 0.0
) -> list[tuple[list[int], float]]:
    """Return the best translations (tokens, score) of one source (Ts,) that a beam of some width finds, best first."""
    if beam < 1:
        raise ValueError(f"beam is {beam}, at least 1 is needed")
    lengths = src.new_full((1,), len(src))
    memory = model.encode(src[None], lengths)  # (1, Ts, D)
    alive, logp = src.new_full((1, 1), bos), memory.new_zeros(1)  # (N, 1 + t), (N,)
    ended = []
    for t in range(max_len):
        N = len(alive)
        logits = model.decode(alive, memory.expand(N, -1, -1), lengths.expand(N))[:, -1]  # (N, V)
        _, V = logits.shape
        candidates = (logp[:, None] + log_softmax(logits)).flatten()  # (N * V,)
        logp, chosen = candidates.topk(min(beam, len(candidates)))  # (N',)
        alive = torch.cat([alive[chosen // V], (chosen % V)[:, None]], dim=1)  # (N', 2 + t)
        done = (alive[:, -1] == eos) | (t == max_len - 1)  # (N',)
        for i in done.nonzero()[:, 0]:
            score = logp[i].item() / (t + 1) ** length_penalty
            ended.append((_before(alive[i, 1:].tolist(), eos), score))
        alive, logp = alive[~done], logp[~done]
        if not len(alive):
            break
    ended.sort(key=lambda pair: -pair[1])
    return ended[:beam]


def _before(tokens: list[int], eos: int) -> list[int]:
    """Return the tokens before the first eos; all of them if there is none."""
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def _reversal_loss(logits: Tensor, tgt: Tensor) -> Tensor:
    return seq2seq_loss(logits, tgt, PAD)
