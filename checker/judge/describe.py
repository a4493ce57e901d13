"""Values in a few words, for the messages that a learner reads."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Mapping
from typing import Any

import torch


def shape(value: torch.Tensor | tuple[int, ...] | torch.Size) -> str:
    """'(2,3,4)' without blanks; '()' for a scalar and '(3,)' for a vector."""
    sizes = tuple(value.shape) if isinstance(value, torch.Tensor) else tuple(value)
    return f"({sizes[0]},)" if len(sizes) == 1 else "(" + ",".join(map(str, sizes)) + ")"


def number(value: float | int | bool | complex) -> str:
    """Four significant digits, and exact integers."""
    if isinstance(value, (bool, complex)) or isinstance(value, numbers.Integral):
        return str(value)
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.4f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values of its own: not on the meta device, and not a stand-in inside vmap or torch.func.grad."""
    return tensor.device.type != "meta" and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def values(tensor: torch.Tensor, limit: int = 6) -> str:
    """The first elements of a tensor in brackets."""
    flat = tensor.detach().reshape(-1)
    shown = [number(item) for item in flat[:limit].tolist()]
    return "[" + ", ".join(shown) + (", ...]" if flat.numel() > limit else "]")


def tensor(value: torch.Tensor) -> str:
    """Shape, then dtype and device where they are not float32 on the CPU, then the values of a small one."""
    words = [shape(value)]
    if value.dtype != torch.float32:
        words.append(str(value.dtype).removeprefix("torch."))
    if value.device.type != "cpu":
        words.append(str(value.device))
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        words.append(type(value).__name__)
    return " ".join(words)


def value(item: Any, limit: int = 60) -> str:
    """Anything in at most about `limit` characters."""
    if isinstance(item, torch.Tensor):
        if item.numel() <= 6 and item.dim() <= 1 and readable(item):
            return f"{tensor(item)} = {values(item)}" if item.dim() else f"{tensor(item)} = {number(item.item())}"
        return tensor(item)
    if isinstance(item, torch.nn.Module):
        return type(item).__name__
    if isinstance(item, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in item):
        parts = [tensor(part) if isinstance(part, torch.Tensor) else value(part, 20) for part in item[:4]]
        more = ", ..." if len(item) > 4 else ""
        opening, closing = ("[", "]") if isinstance(item, list) else ("(", ")")
        return f"{opening}{', '.join(parts)}{more}{closing}"
    if isinstance(item, Mapping):
        inner = ", ".join(f"{key!r}: {value(part, 24)}" for key, part in itertools.islice(item.items(), 4))
        return "{" + inner + (", ...}" if len(item) > 4 else "}")
    if callable(item) and hasattr(item, "__name__"):
        return item.__name__
    if isinstance(item, float):
        return number(item)
    try:
        text = repr(item)
    except Exception:
        text = f"<{type(item).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: list[str]) -> str:
    """'attention(q (2,3,4,8), k (2,3,4,8), scale=None)': a call with names and shapes instead of values."""
    parts = []
    for position, item in enumerate(args):
        label = parameters[position] if position < len(parameters) else ""
        parts.append(_argument(label, item))
    parts += [_argument(key, item) for key, item in kwargs.items()]
    return f"{name}({', '.join(parts)})"


def _argument(label: str, item: Any) -> str:
    if isinstance(item, torch.Tensor):
        return f"{label} {tensor(item)}".strip()
    text = value(item, 40)
    return f"{label}={text}" if label else text
