"""Day 21: the complete transformer. `kata lesson` explains, `kata check` tells you where you are.

B pairs of a source of Ts tokens and a target of Tt tokens: tokens are (B, Ts) and (B, Tt), integers, with padding at the
end of each row; activations are (B, Ts, D) and (B, Tt, D); V is the size of the target's vocabulary. Lengths are integers
(B,). A mask is boolean, and True means: may attend. Unless something else is said, parameters start as their layers start
them, from torch's global random state; where a shape does not fit, day 18's layer raises its ValueError.
"""

from __future__ import annotations

import torch
from day01_tensor_basics import sequence_mask  # noqa: F401 - yours, if you passed day 1
from day06_training_loop import train_step  # noqa: F401
from day08_linear_layers import Linear  # noqa: F401
from day10_losses import cross_entropy, log_softmax  # noqa: F401
from day11_optimizers import Adam, cosine_lr  # noqa: F401
from day14_custom_modules import Dropout, Embedding  # noqa: F401
from day16_scaled_dot_product import causal_mask  # noqa: F401
from day18_multi_head import MultiHeadAttention  # noqa: F401
from day19_positions import sinusoidal  # noqa: F401
from day20_transformer_block import FeedForward, LayerNorm, TransformerBlock  # noqa: F401
from torch import Tensor, nn

PAD, BOS, EOS, ZERO = 0, 1, 2, 3  # the tokens of reversal_batch; the digit c is the token ZERO + c


def shift_right(tgt: Tensor, bos: int) -> Tensor:
    """Return what the decoder reads while it predicts tgt (B, T): bos first, then all tokens but the last, (B, T).

    Dtype and device are those of tgt, which does not change. B and T may be 0. Padding is a token like any other here.
    """
    raise NotImplementedError


def make_masks(src_lengths: Tensor, tgt_lengths: Tensor, ts: int, tt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks (src_mask, tgt_mask, cross_mask) of B pairs, for sources of width ts and targets of width tt.

    src_mask    (B, 1, 1, ts)    the encoder: a source token may be looked at, by all others, unless it is padding
    tgt_mask    (B, 1, tt, tt)   the decoder, at itself: token i may look at j <= i, unless j is padding
    cross_mask  (B, 1, 1, ts)    the decoder, at the encoder: a source token may be looked at unless it is padding

    Row b has src_lengths[b] and tgt_lengths[b] real tokens; a length may be 0. All three are boolean, True means may
    attend, and live on the device of the lengths. Nothing is said about who asks: rows of padded queries are like others.
    Raises ValueError with both shapes if there are not as many source lengths as target lengths.
    """
    raise NotImplementedError


def seq2seq_loss(logits: Tensor, tgt: Tensor, pad_id: int, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the targets tgt (B, T) under logits (B, T, V), without padding: a scalar.

    Logits at t score the target at t: nothing is shifted here. The mean is over all targets of the batch that are not
    pad_id, each of them counted once, whichever row it is in; what follows the end of a sentence, and how much of it,
    changes nothing and gets a gradient of 0. If all is padding, or there is nothing, the loss is 0. The token pad_id is
    still one of the V classes that the others are compared with.

    Label smoothing is that of day 10: a share of each target is spread evenly over all V classes.
    Half-precision logits are computed in float32; the result has the dtype of the logits.
    Raises ValueError with both shapes unless logits have the shape of tgt and one axis more.
    """
    raise NotImplementedError


class EncoderLayer(TransformerBlock):
    """Day 20's TransformerBlock with its parameters and their names, but post-norm unless told otherwise.

    norm_first=False:   x = norm1(x + drop(attention(x)));  x = norm2(x + drop(feed_forward(x)))

    `attention`, `norm1`, `norm2` and `feed_forward` are as there, and all have biases. layer(x, mask) maps x (B, Ts, D) to
    (B, Ts, D); mask is boolean, broadcastable to (B, H, Ts, Ts), and None allows everything. Without dropout, values are those
    of nn.TransformerEncoderLayer with the same weights. You may also write it without inheriting.
    """

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
        raise NotImplementedError


class Encoder(nn.Module):
    """`layers`, a ModuleList of n_layers EncoderLayers with weights of their own, and `norm`, a LayerNorm, after the last.

    options: keyword arguments of EncoderLayer, for each of the layers
    """

    def __init__(self, d_model: int, n_heads: int, n_layers: int, d_ff: int, **options):
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, Ts, D) to the memory (B, Ts, D), in its dtype. B, Ts and n_layers may be 0; x is not changed.

        mask: boolean, broadcastable to (B, H, Ts, Ts), the same for each layer; None allows everything. What is not
        masked may be looked at, before and after.
        Values and gradients are those of nn.TransformerEncoder with a norm and the same weights.
        Cost: exactly 2 * (4 * D**2 + 2 * D * F) + 4 * Ts * D FLOPs per layer for each of the B * Ts tokens.
        """
        raise NotImplementedError


class DecoderLayer(nn.Module):
    """Three residual branches, each with a norm of its own.

    norm_first=False:   y = norm1(y + drop(self_attention(y)))
                        y = norm2(y + drop(cross_attention(y, memory)))
                        y = norm3(y + drop(feed_forward(y)))
    norm_first=True:    y = y + drop(self_attention(norm1(y))), and so on. The memory is never normalized here.

    `self_attention` and `cross_attention` are two of day 18's MultiHeadAttention, `feed_forward` is day 20's FeedForward
    with `activation` and `dropout`, `norm1` to `norm3` are LayerNorms, and all have biases. drop is day 14's Dropout: it
    falls on entries of a branch, never on the stream y or on attention weights. `norm_first` is kept as an attribute.
    """

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
        raise NotImplementedError

    def forward(
        self, y: Tensor, memory: Tensor, self_mask: Tensor | None = None, cross_mask: Tensor | None = None
    ) -> Tensor:
        """Map y (B, Tt, D) to (B, Tt, D), in its dtype, looking at the memory (B, Ts, D). Neither is changed.

        self_mask: boolean, broadcastable to (B, H, Tt, Tt), who may look at whom in y; None allows everything
        cross_mask: boolean, broadcastable to (B, H, Tt, Ts), which of the memory may be looked at; None allows everything

        Tokens of y ask, the memory answers. Where the memory is hidden completely, or has no tokens, cross-attention says
        what its last bias says. B and Tt may be 0. A memory of another batch raises day 18's ValueError with both shapes.
        Without dropout, values and gradients are those of nn.TransformerDecoderLayer with the same weights.
        Cost: exactly 2 * (6 * D**2 + 2 * D * F) + 4 * D * (Tt + Ts) FLOPs for each of the B * Tt tokens of y, and
        4 * D**2 for each of the B * Ts of the memory.
        """
        raise NotImplementedError


class Decoder(nn.Module):
    """`layers`, a ModuleList of n_layers DecoderLayers with weights of their own, and `norm`, a LayerNorm, after the last.

    options: keyword arguments of DecoderLayer, for each of the layers
    """

    def __init__(self, d_model: int, n_heads: int, n_layers: int, d_ff: int, **options):
        raise NotImplementedError

    def forward(
        self, y: Tensor, memory: Tensor, self_mask: Tensor | None = None, cross_mask: Tensor | None = None
    ) -> Tensor:
        """Map y (B, Tt, D) to (B, Tt, D); each layer gets the same memory and the same masks, as in DecoderLayer."""
        raise NotImplementedError


class Transformer(nn.Module):
    """Figure 1 of the paper: two stacks, post-norm, with tables of vectors at both ends.

    src_embedding   Embedding (src_vocab, d_model)
    tgt_embedding   Embedding (tgt_vocab, d_model); with share_embeddings=True it *is* src_embedding, and vocabularies
                    that differ in size raise ValueError with both sizes
    encoder         Encoder of n_enc layers, with its defaults
    decoder         Decoder of n_dec layers, with its defaults
    head            Linear (d_model, tgt_vocab) without a bias. With tie_output=True its weight *is* that of
                    tgt_embedding; else it starts as Linear starts it

    Tables start as N(0, 1 / d_model). What a stack gets is sqrt(d_model) * row + position, where position is day 19's
    sinusoidal vector for 0, 1, 2, ...; it is not trained, and not in the state dict.
    """

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
        raise NotImplementedError

    def encode(self, src: Tensor, src_lengths: Tensor) -> Tensor:
        """Map src (B, Ts) to the memory (B, Ts, D). Padding is hidden from all tokens.

        More than max_len tokens raise ValueError with both numbers.
        """
        raise NotImplementedError

    def decode(self, tgt: Tensor, memory: Tensor, src_lengths: Tensor, tgt_lengths: Tensor | None = None) -> Tensor:
        """Map what the decoder has read, tgt (B, Tt), to logits (B, Tt, V): those at t score the token after tgt[:, t].

        tgt_lengths: how many tokens of each row are real; None means all Tt
        Logits at t do not depend on later tokens, on padding of the source, or on the width of anything.
        More than max_len tokens raise ValueError with both numbers.
        """
        raise NotImplementedError

    def forward(self, src: Tensor, tgt: Tensor, src_lengths: Tensor, tgt_lengths: Tensor) -> Tensor:
        """Map src (B, Ts) and tgt (B, Tt) to logits (B, Tt, V). tgt is what the decoder reads, shifted already.

        With the same weights the stacks are those of nn.Transformer (norm_first=False), padded places included. A source
        of length 0 gives finite logits. Dtype (float64 and half precision, too) and device come from the parameters.
        Cost: exactly that of both stacks and 2 * D * V FLOPs per target token; with backward three times as much, and up to
        a fifth of the forward pass on top of it for softmax and norms.
        """
        raise NotImplementedError


def greedy_decode(
    model: nn.Module, src: Tensor, src_lengths: Tensor, bos: int, eos: int, max_len: int
) -> list[list[int]]:
    """Return what the model writes for each row of src (B, Ts): always the likeliest next token, until eos.

    model: has `encode(src, src_lengths)` and `decode(tgt, memory, src_lengths)` as the Transformer has them

    The decoder begins with bos and reads what it has written. A row ends before its first eos, and after max_len tokens at
    the latest; the lists hold neither bos nor eos, whose ids may be the same. What a row becomes does not depend on others.
    B may be 0 and max_len may be 0.

    The encoder is called once. The decoder is called once for each token of the longest row, its eos included, with the
    tokens so far: 1, then 2, then 3. Rows that have ended may stay in the batch or leave it.
    No graph is made, no module changes its mode, and nothing is drawn at random.
    """
    raise NotImplementedError


def reversal_batch(n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return n random exercises (src (n, 8), src_lengths (n,), tgt (n, 9), tgt_lengths (n,)), all int64.

    A row of src is 3 to 8 digits, the digit c as ZERO + c, and then PAD. The row of tgt is the same digits backwards, then
    EOS, then PAD. Lengths count what is not PAD, so that tgt_lengths = src_lengths + 1.

    Drawn are torch.randint(3, 9, (n,)) for the lengths of the sources and after that torch.randint(0, 10, (n, 8)) for the
    digits, of which row b takes the first src_lengths[b]; both from the generator, on its device.
    """
    raise NotImplementedError


def exact_match(model: nn.Module, src: Tensor, src_lengths: Tensor, tgt: Tensor) -> float:
    """Return the share of the rows (from 0 to 1, B is at least 1) that the model writes exactly as tgt (B, Tt) has them.

    The model, which is like that of greedy_decode, writes by itself, from BOS, Tt tokens at most. A row counts if all its
    tokens before EOS are those of tgt before EOS, no more and no fewer.
    """
    raise NotImplementedError


def train_reversal(
    model: nn.Module, steps: int, *, batch: int = 32, lr: float = 4e-3, generator: torch.Generator
) -> list[float]:
    """Train a model to write digits backwards; return the loss of each step, as floats.

    At each step a batch is drawn by reversal_batch. The model, called as model(src, read, src_lengths, tgt_lengths), gets
    as `read` the targets shifted right behind BOS; the loss is the mean cross-entropy of the targets, without PAD.
    A step is day 6's: the loss from before the update, the gradient clipped to a norm of 1, one step of the optimizer,
    the model in training mode. The optimizer is Adam with betas (0.9, 0.98). Its learning rate at step i, from 0, is that
    of day 11's cosine_lr: up to lr in steps // 10 steps, and down to 0 after `steps`. `steps` may be 0.

    All that is drawn here comes from the generator, which is where the model is.
    A new Transformer(13, 13, 64, 4, 2, 2, 128, 9) writes at least 85 % of unseen strings right after 250 steps with the
    defaults (nearly all of them, in fact), and less than 20 % when all digits of the source are replaced by one.
    """
    raise NotImplementedError


def beam_search(
    model: nn.Module, src: Tensor, beam: int, *, bos: int, eos: int, max_len: int, length_penalty: float = 0.0
) -> list[tuple[list[int], float]]:
    """Return the best hypotheses (tokens, score) for one source src (Ts,), without padding; the best score comes first.

    model: has `encode` and `decode` as the Transformer has them

    It starts with one hypothesis, bos alone. In each round all V continuations of all living hypotheses are compared by
    the sum of the log-probabilities of their tokens, and the best `beam` of them (all, if there are fewer) are kept. Of
    these, those that end in eos are finished and live no longer. It goes on until none is alive, or each has max_len tokens;
    these are finished, too. No two hypotheses are the same.

    The score is the sum of log-probabilities over n ** length_penalty, n being the number of tokens with eos. Returned are
    the best `beam` of all that have been finished in any round, or all if there are fewer; tokens come without bos and eos,
    whose ids may be the same. max_len may be 0: then there are none.

    The encoder is called once, the decoder once per round, with all that live. No graph is made, no module changes its
    mode. A beam of less than 1 raises ValueError with the number.
    """
    raise NotImplementedError
