"""What a computation costs: FLOPs, calls, bytes; counted, never timed.

A `Meter` stands between PyTorch and its kernels and writes down every ATen call that runs inside its
`with` block, those of the backward pass included. Nothing is estimated and nothing is measured with a
clock, so two runs of the same code give the same `Cost`, whatever ran before, on any device:

    with Meter() as meter:
        loss = model(x).sum()
        loss.backward()
    meter.cost.flops

Composite functions are counted as what they run: `F.rms_norm` is `pow, mean, add, rsqrt, mul`, a matmul
of expanded heads is an `expand`, the `clone` that makes the copy and a `bmm`. What happens inside one
kernel stays inside: its scratch memory is not seen.

Which calls count
    *Not* a call, and free: views (`view`, `expand`, `transpose`, `detach`, slices, `_unsafe_view`, and the
    in-place ones such as `unsqueeze_`), questions about metadata (sizes, strides, `promote_types`),
    profiler marks, and pure allocation (`empty` and its relatives, `resize_`, `lift_fresh` as in
    `torch.tensor(...)`), of which only the bytes count. Memory that is not allocated as a tensor has no
    bytes here: what NumPy lends, and the storages of `copy.deepcopy` and `torch.load`.
    A call: everything else, that is every kernel which reads or writes elements: also copies
    (`clone`, `copy_`, `_to_copy`, the copy of a `reshape`), fills (`zeros`, `arange`), random numbers,
    and reading a number out (`item`).

Which FLOPs count
    Contractions only, 2 per multiply-add: matrix products, dot products, convolutions, fused attention
    (its masked half included, as if every query met every key), fused recurrent layers, and the
    *multiply-then-sum*: see below. A bias is free, an outer product is elementwise.

Multiply-then-sum
    `(a[:, :, None] * b[None]).sum(1)` is a matrix product in disguise. A *product* is the result of a
    multiplication of two tensors of which at least one is broadcast, be it by its shape or by a stride of
    zero. When `sum`, `mean` or `nansum` makes fewer elements out of a product of n elements, that costs
    2n FLOPs: one multiplication and one addition each. Views of a product, its copies (`clone`, `.to`),
    and its multiples (times a further tensor, divided, negated, `masked_fill`ed) are products too;
    any other write into its storage ends that.
    Not products: a multiplication by a number or by a tensor with a single value (expanded or not), by a
    boolean tensor (that selects), and one of two tensors that are both full size: `(x * x).mean(-1)` in a
    norm and `(p * log_p).sum()` are no dearer than `x.pow(2).mean(-1)`. So a broadcast that was first made
    real by a copy is no product either: it shows in the bytes. `cumsum`, norms, `var` and `std` are never
    contractions.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Cost", "Meter", "measure", "saved_bytes", "unmetered"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cost:
    """What ran inside a meter. All counts are exact integers; two equal runs give equal costs.

    Attributes:
        flops: floating point operations of all contractions, 2 per multiply-add (the module says which).
        elementwise: elements written by all other calls.
        calls: number of ATen calls that compute (the module says which).
        new_bytes: bytes of the storages allocated inside, each once; views and in-place results add none.
            A storage that is resized to more bytes is allocated anew. `meta` tensors have no bytes.
        peak_bytes: highest sum, in bytes, of new storages that were alive at the same time.
        saved_bytes: highest sum, in bytes, of storages that were alive and had been saved for a backward
            pass, each once, those of parameters and inputs included. A storage counts as a whole,
            whatever part of it was saved. For one graph that is: the bytes it keeps.
        ops: how often each op was called, `(name, count)` sorted by name; the counts sum up to `calls`.
        shapes: shape of every tensor that was allocated or written; views are not in it.
        matmuls: number of contraction calls (mm, bmm, mv, dot, convolution, fused attention and the
            like; a multiply-then-sum is none).
        largest: elements of the largest storage that was allocated.
    """

    flops: int = 0
    elementwise: int = 0
    calls: int = 0
    new_bytes: int = 0
    peak_bytes: int = 0
    saved_bytes: int = 0
    ops: tuple[tuple[str, int], ...] = ()
    shapes: frozenset[tuple[int, ...]] = frozenset()
    matmuls: int = 0
    largest: int = 0


# ---------------------------------------------------------------------------------------------------------
# FLOPs of one call. Formulas get the call's arguments and its result.

_Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]


def _product_of(first: int) -> _Formula:
    """A matrix, vector or batched product of the arguments `first` and `first + 1`."""

    def formula(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        left, right = args[first].shape, args[first + 1].shape
        columns = right[-1] if len(right) > 1 else 1
        return 2 * math.prod(left) * columns

    return formula


def _convolution_flops(x: Tensor, weight: Tensor, result_shape: torch.Size, transposed: bool) -> int:
    # Each position (of the result, or of the input where transposed) meets every weight once.
    positions = x.shape[2:] if transposed else result_shape[2:]
    return 2 * x.shape[0] * math.prod(positions) * math.prod(weight.shape)


def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return _convolution_flops(args[0], args[1], out.shape, bool(args[6]))


def _convolution_like(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return _convolution_flops(args[0], args[1], out.shape, False)


def _convolution_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    # The gradients of the input and of the weight cost what the forward pass costs, each.
    grad, x, weight, transposed, wanted = args[0], args[1], args[2], bool(args[7]), args[10]
    return (int(wanted[0]) + int(wanted[1])) * _convolution_flops(x, weight, grad.shape, transposed)


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    query, key, value = args[0].shape, args[1].shape, args[2].shape
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    # Scores once more; gradients of the weights and of the values; gradients of query and key.
    query, key, value = args[1].shape, args[2].shape, args[3].shape
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _recurrent(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    # Every step of every sequence (time x batch of them) meets every weight matrix once.
    weights: list[Tensor] = []
    _collect(args[1:3], weights)
    return 2 * math.prod(args[0].shape[:-1]) * sum(w.numel() for w in weights if w.dim() > 1)


def _recurrent_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    # The gradients of the inputs and of the weights cost what the forward pass costs, each.
    return 2 * _recurrent(args, kwargs, out)


def _multi_head(query: torch.Size, key: torch.Size, qkv_weight: Tensor, out_weight: Tensor) -> int:
    # (B, T, D) and (B, S, D): the projections, then the two products of attention.
    width = query[-1]
    queries, keys = math.prod(query[:-1]), math.prod(key[:-1])
    projections = queries * (width * width + out_weight.numel()) + keys * (qkv_weight.numel() - width * width)
    return 2 * projections + 2 * queries * key[1] * 2 * width


def _fused_multi_head(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return _multi_head(args[0].shape, args[1].shape, args[5], args[7])


def _fused_encoder_layer(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    source = args[0].shape
    feed_forward = 2 * math.prod(source[:-1]) * (args[14].numel() + args[16].numel())
    return _multi_head(source, source, args[3], args[5]) + feed_forward


def _distances(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return 2 * out.numel() * args[0].shape[-1]


def _trilinear(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    shapes = []
    for tensor, unsqueezed in zip(args[:3], args[3:6], strict=True):
        shape = list(tensor.shape)
        for dim in unsqueezed:
            shape.insert(dim, 1)
        shapes.append(shape)
    return 2 * math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


_FORMULAS: dict[str, _Formula] = {
    "mm": _product_of(0),
    "bmm": _product_of(0),
    "mv": _product_of(0),
    "dot": _product_of(0),
    "vdot": _product_of(0),
    "_int_mm": _product_of(0),
    "addmm": _product_of(1),
    "addmv": _product_of(1),
    "baddbmm": _product_of(1),
    "addbmm": _product_of(1),
    "_addmm_activation": _product_of(1),
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    "mkldnn_convolution": _convolution_like,
    "cudnn_convolution": _convolution_like,
    "_slow_conv2d_forward": _convolution_like,
    "slow_conv3d_forward": _convolution_like,
    "_conv_depthwise2d": _convolution_like,
    "conv_depthwise3d": _convolution_like,
    "convolution_backward": _convolution_backward,
    "convolution_backward_overrideable": lambda args, kwargs, out: _convolution_backward(
        (*args[:3], None, *args[3:]), kwargs, out
    ),
    "mkldnn_rnn_layer": _recurrent,
    "_cudnn_rnn": _recurrent,
    "mkldnn_rnn_layer_backward": _recurrent_backward,
    "_cudnn_rnn_backward": _recurrent_backward,
    "_native_multi_head_attention": _fused_multi_head,
    "_transformer_encoder_layer_fwd": _fused_encoder_layer,
    "_cdist_forward": _distances,
    "_euclidean_dist": _distances,
    "_trilinear": _trilinear,
}


def _formula(func: Any, name: str) -> _Formula | None:
    """The formula for an op, or None where it is no contraction."""
    if name.startswith("_scaled_dot_product"):
        return _attention_backward if name.endswith("_backward") else _attention
    formula = _FORMULAS.get(name) or _FORMULAS.get(name.rstrip("_"))
    if formula is None:
        # What torch knows beyond this: scaled and grouped products, nested and flexible attention.
        known = flop_registry.get(getattr(func, "overloadpacket", func))
        if known is not None:
            return lambda args, kwargs, out: int(known(*args, **kwargs, out_val=out))
    return formula


# ---------------------------------------------------------------------------------------------------------
# What kind of call it is. Decided once per op.

_FREE, _COMPOSITE, _ALLOCATION, _CONTRACTION, _OTHER = range(5)

_ALLOCATIONS = frozenset(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided "
    "lift lift_fresh resize_ resize_as_ resize".split()
)
_VIEWS_BY_NAME = frozenset(  # views that their schema does not declare
    "_unsafe_view unsafe_split unsafe_split_with_sizes unsafe_chunk detach_ set_".split()
)
_QUESTIONS = frozenset(
    "size stride sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous storage_offset dim numel "
    "is_same_size is_pinned is_set_to is_contiguous is_strides_like_format record_stream "
    "_has_compatible_shallow_copy_type".split()
)
_MULTIPLICATIONS = frozenset(["mul", "mul_"])
_CARRIERS = frozenset(["clone", "_to_copy", "copy_", "div", "div_", "neg", "neg_", "masked_fill", "masked_fill_"])
_REDUCTIONS = frozenset(["sum", "mean", "nansum"])


@dataclass(frozen=True)
class _Kind:
    """What a meter needs to know about an op."""

    name: str
    role: int
    formula: _Formula | None = None
    writes: tuple[int | str, ...] = ()  # arguments whose elements it writes: positions, names where keyword-only
    resizes: bool = False  # may give a storage among its arguments more bytes
    multiplies: bool = False
    carries: bool = False
    reduces: bool = False


_KINDS: dict[Any, _Kind] = {}


def _classify(func: Any) -> _Kind:
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator
        kind = _Kind(str(func), _OTHER)
        formula = _formula(func, kind.name)
        if formula is not None:
            kind = _Kind(kind.name, _CONTRACTION, formula)
    else:
        kind = _classify_by_schema(func, schema)
    _KINDS[func] = kind
    return kind


def _classify_by_schema(func: Any, schema: Any) -> _Kind:
    namespace, _, name = schema.name.partition("::")
    full_name = name if namespace == "aten" else schema.name
    if namespace in ("prim", "profiler") or name in _QUESTIONS:
        return _Kind(full_name, _FREE)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return _Kind(full_name, _COMPOSITE)
    writes: list[int | str] = []
    resizes = name.startswith("resize")
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append(argument.name if argument.kwarg_only else position)
            resizes = resizes or argument.kwarg_only
    if namespace == "aten" and name in _ALLOCATIONS:
        return _Kind(full_name, _ALLOCATION, resizes=resizes)
    returned = [result.alias_info for result in schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    touches_tensors = any("Tensor" in str(thing.type) for thing in (*schema.arguments, *schema.returns))
    if is_view or not touches_tensors or torch.Tag.inplace_view in func.tags or name in _VIEWS_BY_NAME:
        return _Kind(full_name, _FREE)
    formula = _formula(func, full_name)
    return _Kind(
        full_name,
        _OTHER if formula is None else _CONTRACTION,
        formula,
        tuple(writes),
        resizes,
        multiplies=full_name in _MULTIPLICATIONS,
        carries=full_name in _CARRIERS,
        reduces=full_name in _REDUCTIONS,
    )


# ---------------------------------------------------------------------------------------------------------
# The book: one per meter.


def _collect(values: Any, found: list[Tensor]) -> None:
    """Append the tensors in a value, or in the tuples, lists and dictionaries of it, to `found`."""
    if isinstance(values, Tensor):
        found.append(values)
    elif isinstance(values, (list, tuple)):
        for value in values:
            if value is not None:
                _collect(value, found)
    elif isinstance(values, dict):
        for value in values.values():
            _collect(value, found)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor, or None where it has none of its own (sparse, some subclasses)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _bytes_of(storage: torch.UntypedStorage) -> int:
    return 0 if storage.device.type == "meta" else int(storage.nbytes())


def _distinct(tensor: Tensor) -> int:
    """Number of elements, those repeated by a stride of zero counted once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride != 0:
            count *= size
    return count


class _Ref(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage, and what the book says about it.

    It refers to the Python object of the storage, which PyTorch keeps for as long as the storage itself
    lives, whichever tensors or graphs hold it. So the reference dies exactly when the memory is freed.
    """

    __slots__ = ("key", "live", "saved", "product")

    key: int  # address of the storage, its own while it lives
    live: int  # bytes, 0 for a storage that was there before
    saved: int  # bytes, 0 for a storage that no graph has saved
    product: bool


class _Book:
    """The counts of one run of one meter. Holds storages weakly, so it keeps no tensor alive."""

    def __init__(self) -> None:
        self.paused = 0
        self.flops = self.elementwise = self.matmuls = 0
        self.new_bytes = self.live_bytes = self.peak_bytes = 0
        self.live_saved = self.peak_saved = self.largest = 0
        self.ops: Counter[str] = Counter()
        self.shapes: set[torch.Size] = set()
        self.refs: dict[int, _Ref] = {}
        self.on_free = self._freed

    def cost(self) -> Cost:
        return Cost(
            flops=self.flops,
            elementwise=self.elementwise,
            calls=sum(self.ops.values()),
            new_bytes=self.new_bytes,
            peak_bytes=self.peak_bytes,
            saved_bytes=self.peak_saved,
            ops=tuple(sorted(self.ops.items())),
            shapes=frozenset(tuple(int(size) for size in shape) for shape in self.shapes),
            matmuls=self.matmuls,
            largest=self.largest,
        )

    def close(self) -> None:
        """Forget all storages: what is freed from now on is no longer followed."""
        self.refs.clear()

    # storages

    def _freed(self, ref: _Ref) -> None:
        if self.refs.get(ref.key) is ref:
            del self.refs[ref.key]
            self.live_bytes -= ref.live
            self.live_saved -= ref.saved

    def _ref(self, storage: torch.UntypedStorage) -> _Ref:
        """The entry of a storage, made where there is none."""
        key = storage._cdata
        ref = self.refs.get(key)
        if ref is None:
            ref = _Ref(storage, self.on_free)
            ref.key, ref.live, ref.saved, ref.product = key, 0, 0, False
            self.refs[key] = ref
        return ref

    def _allocated(self, storage: torch.UntypedStorage, item_size: int) -> None:
        """A storage is new, or has been given more bytes."""
        size = _bytes_of(storage)
        ref = self._ref(storage)
        self.new_bytes += size
        self.live_bytes += size - ref.live
        ref.live = size
        self.largest = max(self.largest, size // item_size)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def save(self, kept: Any) -> None:
        """An autograd graph keeps these tensors."""
        if self.paused:
            return
        tensors: list[Tensor] = []
        _collect(kept, tensors)
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None:
                ref = self._ref(storage)
                size = _bytes_of(storage)
                self.live_saved += size - ref.saved
                ref.saved = size
        self.peak_saved = max(self.peak_saved, self.live_saved)

    # calls

    def run(self, func: Any, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and write it down; a call that raises leaves no trace."""
        inputs: list[Tensor] = []
        _collect(args, inputs)
        if kwargs:
            _collect(kwargs, inputs)
        known: dict[int, int] = {}  # storages that were there before, and their bytes where they may grow
        if kind.name not in ("lift_fresh", "lift"):  # these hand on what was just made from Python data
            for tensor in inputs:
                storage = _storage(tensor)
                if storage is not None:
                    known[storage._cdata] = int(storage.nbytes()) if kind.resizes else 0

        result = func(*args, **kwargs)

        outputs: list[Tensor] = []
        _collect(result, outputs)
        if not outputs and kind.writes:
            for where in kind.writes:
                _collect(kwargs.get(where) if isinstance(where, str) else args[where], outputs)
        elements = 0
        for tensor in outputs:
            self.shapes.add(tensor.shape)
            elements += tensor.numel()
            storage = _storage(tensor)
            if storage is None or storage.device.type == "meta":
                continue
            key = storage._cdata
            if key in known:
                if kind.resizes and storage.nbytes() > known[key]:
                    self._allocated(storage, tensor.element_size())
                    known[key] = int(storage.nbytes())
            elif key not in self.refs and storage.resizable():  # memory borrowed from NumPy is not resizable
                self._allocated(storage, tensor.element_size())
        if kind.role == _ALLOCATION:
            return result

        self.ops[kind.name] += 1
        if kind.formula is not None:
            self.matmuls += 1
            self.flops += kind.formula(args, kwargs, result)
        else:
            self.elementwise += elements
        if kind.reduces:
            if self._is_product(args[0]) and elements < args[0].numel():
                self.flops += 2 * args[0].numel()
        elif kind.multiplies or kind.carries:
            self._mark(outputs, self._makes_product(kind, args, elements))
            return result
        if kind.writes:
            self._mark(outputs, False)
        return result

    # products, for the multiply-then-sum

    def _is_product(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or not self.refs:
            return False
        storage = _storage(value)
        ref = None if storage is None else self.refs.get(storage._cdata)
        return ref is not None and ref.product

    def _makes_product(self, kind: _Kind, args: tuple[Any, ...], elements: int) -> bool:
        if kind.name == "copy_":
            return self._is_product(args[1])
        if self._is_product(args[0]):
            return True
        if not kind.multiplies or len(args) < 2 or not isinstance(args[1], Tensor):
            return False
        left, right = args[0], args[1]
        if self._is_product(right):
            return True
        if torch.bool in (left.dtype, right.dtype) or _storage(left) is None or _storage(right) is None:
            return False
        least = min(_distinct(left), _distinct(right))
        return 1 < least and least < elements or max(_distinct(left), _distinct(right)) < elements and least > 1

    def _mark(self, tensors: list[Tensor], product: bool) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is not None and (product or storage._cdata in self.refs):
                self._ref(storage).product = product


class _Mode(TorchDispatchMode):
    """Passes every call on to the book."""

    supports_higher_order_operators = True

    def __init__(self, book: _Book) -> None:
        super().__init__()
        self.book = book

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import the whole compiler at the first call.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func) or _classify(func)
        if kind.role == _FREE or self.book.paused:
            return func(*args, **kwargs)
        if kind.role == _COMPOSITE:
            # Met in inference mode only; elsewhere it is taken apart before it comes here.
            with self:
                return func.decompose(*args, **kwargs)
        return self.book.run(func, kind, args, kwargs)


# ---------------------------------------------------------------------------------------------------------
# What is saved for the backward pass.


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    """What a graph keeps in place of a tensor: the same memory, and its version.

    The tensor itself would do, were it not that an op which saves its own result would then keep itself
    alive in a circle. No mode is to see that `detach`: nobody asked for it.
    """
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        return tensor.detach(), tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """The tensor. PyTorch leaves it to hooks to notice that it was overwritten; so do it here."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
            f"expected version {version} instead."
        )
    return tensor


_autograd: Any = torch._C._autograd
_push_hooks = _autograd._push_saved_tensors_default_hooks
_pop_hooks = _autograd._pop_saved_tensors_default_hooks
_top_hooks = _autograd._top_saved_tensors_default_hooks
_disable_hooks = _autograd._saved_tensors_hooks_disable


def _listening(pack: Callable[[Tensor], Any], books: tuple[_Book, ...]) -> Callable[[Tensor], Any]:
    """`pack`, which also tells the books what it keeps."""

    def listening_pack(tensor: Tensor) -> Any:
        packed = pack(tensor)
        with torch._C.DisableTorchFunction():
            for book in books:
                book.save(packed)
        return packed

    return listening_pack


@contextlib.contextmanager
def _saved_hooks(book: _Book) -> Iterator[None]:
    """Tell the book what is saved; hooks that are already there go on to decide what is kept."""
    pack, unpack = _top_hooks(False) or (_pack, _unpack)
    _push_hooks(_listening(pack, (book,)), unpack)
    try:
        yield
    finally:
        _pop_hooks()


def _push_hooks_inside(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    """What code inside a meter gets when it enters saved-tensor hooks of its own (only the innermost run)."""
    books = tuple(meter._book for meter in _running() if meter._saved and meter._book is not None)
    _push_hooks(_listening(pack, books) if books else pack, unpack)


def _disable_hooks_inside(message: str, fail_if_non_empty: bool = True) -> None:
    """`torch.func` refuses to run under hooks; under those of a meter it may, unseen by them."""
    _disable_hooks(message, fail_if_non_empty and not any(meter._saved for meter in _running()))


# ---------------------------------------------------------------------------------------------------------
# Meters.

_local = threading.local()
_lock = threading.Lock()
_depth = 0
_collects = False


def _running() -> tuple[Meter, ...]:
    """The meters of this thread, outermost first."""
    return getattr(_local, "meters", ())


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    """While any meter runs: no garbage collection at a moment of its own choice, and hooks that nest."""
    global _depth, _collects
    with _lock:
        _depth += 1
        if _depth == 1:
            _collects = gc.isenabled()
            gc.disable()
            _autograd._push_saved_tensors_default_hooks = _push_hooks_inside
            _autograd._saved_tensors_hooks_disable = _disable_hooks_inside
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _autograd._push_saved_tensors_default_hooks = _push_hooks
                _autograd._saved_tensors_hooks_disable = _disable_hooks
                if _collects:
                    gc.enable()


@contextlib.contextmanager
def _registered(meter: Meter) -> Iterator[None]:
    before = _running()
    _local.meters = (*before, meter)
    try:
        yield
    finally:
        _local.meters = before


class Meter:
    """Counts what runs inside its `with` block, on this thread and in the backward passes it starts.

    Meters nest: what runs inside an inner one counts for the outer ones too. Entered again while it runs, a
    meter goes on counting, each call once; entered again after it has ended, it starts from zero.

    While a meter runs, Python does not look for reference cycles unasked, since the moment at which it does
    depends on all that ran before: a tensor held by a cycle stays live until `gc.collect()`.

    With `saved` (the default) it also counts what autograd saves. Code inside may use saved-tensor hooks
    of its own; then the tensors count that its `pack` returned, also in tuples, lists and dictionaries. Not
    seen: tensors saved inside `torch.func` transforms, attributes set on the `ctx` of a Function.

    Args:
        saved: count the bytes saved for backward; without it `Cost.saved_bytes` is 0.
    """

    def __init__(self, *, saved: bool = True) -> None:
        self._saved = saved
        self._entered = 0
        self._book: _Book | None = None
        self._stack = contextlib.ExitStack()
        self._final = Cost()

    def __enter__(self) -> Meter:
        if not self._entered:
            book = _Book()
            with contextlib.ExitStack() as stack:
                stack.enter_context(_prepared())
                if self._saved:
                    stack.enter_context(_saved_hooks(book))
                stack.enter_context(_registered(self))
                stack.enter_context(_Mode(book))
                self._stack = stack.pop_all()
            self._book = book
        self._entered += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._entered -= 1
        if not self._entered and self._book is not None:
            try:
                self._stack.close()
            finally:
                self._final = self._book.cost()
                self._book.close()
                self._book = None

    @property
    def cost(self) -> Cost:
        """What has run so far; after the block, what ran in it (in the last one, if there were several)."""
        return self._final if self._book is None else self._book.cost()

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages allocated inside that are alive now; 0 when the meter does not run."""
        return 0 if self._book is None else self._book.live_bytes

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Calls inside are invisible to this meter, their allocations included; frees still count."""
        book = self._book
        if book is not None:
            book.paused += 1
        try:
            yield
        finally:
            if book is not None:
                book.paused -= 1


def measure(fn: Callable[..., _T], *args: Any, **kwargs: Any) -> tuple[_T, Cost]:
    """Call `fn(*args, **kwargs)`; return its result and what it cost."""
    with Meter() as meter:
        result = fn(*args, **kwargs)
    return result, meter.cost


def saved_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Bytes of the storages that `fn(*args, **kwargs)` keeps for a backward pass, each storage once.

    Inputs and parameters count where the graph keeps them; 0 under `torch.no_grad()`.
    """
    return measure(fn, *args, **kwargs)[1].saved_bytes


@contextlib.contextmanager
def unmetered() -> Iterator[None]:
    """Calls inside are invisible to every meter that runs on this thread; for the checker's own work.

    A meter that is started inside sees what runs in it.
    """
    with contextlib.ExitStack() as stack:
        for meter in _running():
            stack.enter_context(meter.pause())
        yield
