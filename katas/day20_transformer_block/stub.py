"""Day 20: the transformer block. `kata lesson` explains, `kata check` tells you where you are.

B sequences of T tokens, each a vector of width D: activations are (B, T, D), the feed-forward width is F, and V is the
size of the vocabulary. A mask is boolean, and True means: may attend. Unless something else is said, parameters start
as their layers start them, from torch's global random state.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from day01_tensor_basics import merge_heads, split_heads  # noqa: F401 - yours, if you passed day 1
from day06_training_loop import train_step  # noqa: F401
from day08_linear_layers import Linear  # noqa: F401
from day09_activations import gelu, relu, silu  # noqa: F401
from day10_losses import cross_entropy  # noqa: F401
from day14_custom_modules import Dropout, Embedding, load_renamed  # noqa: F401
from day16_scaled_dot_product import attention, causal_mask, combine_masks  # noqa: F401
from day18_multi_head import MultiHeadAttention, from_torch  # noqa: F401
from day19_positions import apply_rope, rope_tables  # noqa: F401
from torch import Tensor, nn
from torch.optim import Optimizer


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, for each vector along the last axis by itself.

    Parameters `weight` (dim,), ones at first, and `bias` (dim,), zeros at first. With affine=False both are None, with
    bias=False the bias is. Attributes `dim` and `eps`. State dicts of nn.LayerNorm load into it.
    """

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True, bias: bool = True):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim) to the same shape and dtype; any number of leading axes, empty ones included.

        The variance is the mean of the squared distances from the mean (over dim, not dim - 1). It is computed from the
        distances: in float64, numbers around a million come out as exact as numbers around 0. A vector of equal numbers
        becomes the bias, and its gradient is finite.
        float16 and bfloat16 are computed in float32, weight and bias included, and rounded once at the end; float64
        stays float64. Values and gradients are those of nn.LayerNorm; x is not changed and need not be contiguous.
        Raises ValueError with the shape of x and (dim,) when x does not end in dim.
        """
        raise NotImplementedError


class FeedForward(nn.Module):
    """down_proj(dropout(activation(up_proj(x)))), the same for every token.

    `up_proj` is day 8's Linear from d_model to d_ff, `down_proj` one from d_ff to d_model, both with a bias or both
    without; `dropout` is day 14's Dropout. `activation` is "relu", "gelu" (the exact one) or "silu"; other words raise
    ValueError with the word in the message.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "gelu", dropout: float = 0.0, bias: bool = True):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D) in the dtype of x, with 4 * D * F FLOPs per token.

        Dropout falls on the d_ff numbers between the two maps, in training only. Nothing comes after down_proj.
        Raises ValueError, that of Linear, when x does not end in D.
        """
        raise NotImplementedError


class TransformerBlock(nn.Module):
    """Two residual branches: `attention` moves between tokens, then `feed_forward` works on each token.

    norm_first=True:    x = x + drop(attention(norm1(x)));  x = x + drop(feed_forward(norm2(x)))
    norm_first=False:   x = norm1(x + drop(attention(x)));  x = norm2(x + drop(feed_forward(x)))

    `attention` is day 18's MultiHeadAttention, `norm1` and `norm2` are two LayerNorms with the default eps, and
    `feed_forward` is a FeedForward with `activation` and `dropout`. bias=False takes the bias out of all of them.
    drop is day 14's Dropout with the probability `dropout`. What is dropped are entries of a branch, each by itself;
    the stream x is never dropped, and neither are attention weights. `norm_first` is kept as an attribute.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        norm_first: bool = True,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
    ):
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None, **options) -> Tensor:
        """Map x (B, T, D) to (B, T, D), in its dtype; B and T may be 0, and x is not changed.

        mask: boolean, broadcastable to (B, H, T, T); None allows everything
        options: further keyword arguments for the attention, handed on as they are

        `attention` may be exchanged for another module. It is called as attention(x, **options), with mask=mask besides
        only where there is a mask. What hidden tokens hold has no influence on those that cannot see them.
        Without dropout, values and gradients are those of nn.TransformerEncoderLayer with the same weights.
        Cost: exactly 2 * (4 * D**2 + 2 * D * F) + 4 * T * D FLOPs for each of the B * T tokens.
        """
        raise NotImplementedError


def from_torch_layer(layer: nn.TransformerEncoderLayer) -> TransformerBlock:
    """Return a TransformerBlock with the weights of a layer of torch, which computes the same.

    Taken over: widths and heads, norm_first, bias, dropout (that of `layer.dropout`), the eps of each norm, the
    activation where it is F.relu, F.gelu or F.silu, training or eval mode, dtype and device. Another activation raises
    ValueError. `batch_first` does not matter: the block always takes (B, T, D).

    The parameters of the block are leaves that can be trained, and share neither memory nor a graph with the layer,
    which does not change. The global random state is not touched.
    """
    raise NotImplementedError


class RotaryAttention(nn.Module):
    """Multi-head self-attention whose queries and keys are rotated by where they stand, as on day 19.

    The parameters have the names and shapes of MultiHeadAttention(d_model, n_heads, bias=bias): `q_proj`, `k_proj`,
    `v_proj` and `o_proj`, all (D, D). Heads are split as there, each is D / H wide, and pairs are neighbors, with
    frequencies from `base`. If d_model does not divide into heads of an even width, ValueError with both numbers.
    """

    def __init__(self, d_model: int, n_heads: int, *, base: float = 10000.0, bias: bool = False):
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        """Map x (B, T, D) to (B, T, D), in its dtype; B and T may be 0, and x is not changed.

        mask: boolean, broadcastable to (B, H, T, T); None allows everything
        positions: integers (T,), or (B, T) for rows with positions of their own; None means 0, 1, ..., T - 1.
            Other shapes raise ValueError with the shapes (T,) and (B, T) and that of positions.

        Only differences of positions matter. Values are not rotated. In bfloat16 positions still count exactly.
        Cost: exactly 8 * D**2 + 4 * T * D FLOPs for each of the B * T tokens.
        """
        raise NotImplementedError


class DecoderLM(nn.Module):
    """A language model: embedding, causal blocks, a last norm, and a score for every next token.

    embedding           Embedding (vocab, d_model)
    position_embedding  Embedding (max_len, d_model), added to the tokens, for positions="learned"; None for "rope"
    blocks              nn.ModuleList of n_layers TransformerBlocks: norm_first, activation "gelu", no dropout.
                        For "rope" the `attention` of each is a RotaryAttention with the default base.
    norm                LayerNorm (d_model)
    head                Linear (d_model, vocab) without a bias. With tie=True its weight *is* that of the embedding.

    bias=False takes the bias out of everything. The weights of embedding, position_embedding and head start as
    N(0, 0.02**2), so that the first loss is close to log(vocab). Another word for `positions` raises ValueError with
    the word in the message.
    """

    def __init__(
        self,
        vocab: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_ff: int,
        max_len: int,
        *,
        positions: str = "learned",
        tie: bool = True,
        bias: bool = True,
    ):
        raise NotImplementedError

    def forward(self, tokens: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V): those at t score the token at t + 1. T may be 0.

        positions: integers (T,) or (B, T); None means 0, 1, ..., T - 1. Other shapes raise ValueError with the shapes
            (T,) and (B, T) and that of positions. Learned positions outside of the table raise IndexError; rotary
            ones may be any numbers, and a common shift of all of them changes nothing.
        mask: boolean, broadcastable to (B, H, T, T), for example (B, 1, 1, T) for padding. It comes on top of the causal
            mask: the logits at t never depend on a later token.

        Each block is called as block(x, mask), and for "rope" as block(x, mask, positions=positions).
        More than max_len tokens raise ValueError with both numbers. Device and dtype come from tokens and parameters;
        that includes "meta", where nothing but shapes is computed.
        Cost: exactly that of the blocks and 2 * D * V FLOPs per token.
        """
        raise NotImplementedError


def residual_norms(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the root mean square of the residual stream before the first block and after each: (n_layers + 1,).

    model: has at least one block in `model.blocks`. model(tokens) calls them in order, each once, as block(x, ...),
        and each returns the stream. It need not be a DecoderLM.
    One number for all of x (B, T, D): the root of the mean of all squares. The result is at least float32 (squares of
    half-precision numbers overflow), float64 for a float64 stream, on the stream's device.

    The model runs once, in eval mode and without a graph. Afterwards, also when it raises, every module is in the mode
    it was in, and no hook is left on it.
    """
    raise NotImplementedError


def train_tiny_lm(
    model: nn.Module,
    tokens: Tensor,
    optimizer: Optimizer,
    *,
    steps: int,
    batch: int = 16,
    context: int = 32,
    generator: torch.Generator,
) -> list[float]:
    """Train a language model on random windows of one text, tokens (N,); return the loss of each step, as floats.

    A window is `context` + 1 neighboring tokens: the model, called as model(inputs) on (batch, context), gets the first
    `context` of them, and the target of each is the token after it. At each step
    torch.randint(N - context, (batch,), generator=generator) draws where the windows begin.

    A step is day 6's: the mean cross-entropy over all batch * context targets, from before the update; the gradient
    clipped to a norm of 1; one step of the optimizer; the model in training mode.
    All random numbers come from the generator, which is on the CPU; tokens are not changed. A text that has no window
    (N <= context) raises ValueError with both numbers.
    """
    raise NotImplementedError


class ReversibleStack(nn.Module):
    """Layers of two branches, y1 = x1 + f(x2) and y2 = x2 + g(y1), that keep nothing but the result for backward.

    layers: any iterable of at least one pair (f, g); a module may occur several times. They are kept in the
        nn.ModuleLists `f` and `g`. Each maps a tensor to one of the same shape, and computes the same whenever it is
        called with the same: no dropout.
    """

    def __init__(self, layers: Iterable[tuple[nn.Module, nn.Module]]):
        raise NotImplementedError

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Send both streams through all layers; return (y1, y2) of the last. Neither input is changed.

        Gradients are those of the plain loop, to rounding: for x1, x2, and every parameter that is not frozen. Backward
        computes the inputs of a layer from its outputs. Each branch is called once forward and once more in backward.
        What is saved for backward, parameters aside, does not depend on the number of layers, at any moment: after
        forward it is no more than y1 and y2. Second derivatives are not asked for.
        Raises ValueError with both shapes when x1 and x2 differ.
        """
        raise NotImplementedError

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x1, x2) that `forward` maps to (y1, y2), to rounding, without a graph."""
        raise NotImplementedError
