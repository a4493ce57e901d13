import torch

from checker.testing import alternative


@alternative("matmul_vjp")
def matmul_vjp_by_einsum(a, b, grad):
    if a.dim() != 2 or b.dim() != 2 or a.size(1) != b.size(0):
        raise ValueError(f"cannot multiply {list(a.shape)} by {list(b.shape)}")
    if list(grad.shape) != [len(a), b.size(1)]:
        raise ValueError(f"expected a gradient of shape {[len(a), b.size(1)]}, got {list(grad.shape)}")
    return torch.einsum("nm,km->nk", grad, b), torch.einsum("nk,nm->km", a, grad)


@alternative("unbroadcast")
def unbroadcast_one_dimension_at_a_time(grad, shape):
    padded = (1,) * (grad.dim() - len(shape)) + tuple(shape)
    fits = len(padded) == grad.dim() and all(n in (1, m) for n, m in zip(padded, grad.shape, strict=True))
    if not fits:
        raise ValueError(f"{tuple(shape)} cannot have been broadcast to {tuple(grad.shape)}")
    for dim, n in enumerate(padded):
        if grad.size(dim) != n:
            grad = grad.sum(dim, keepdim=True)
    return grad.view(shape) if grad.is_contiguous() else grad.reshape(shape)


@alternative("unbroadcast")
def unbroadcast_with_two_sums(grad, shape):
    shape = torch.Size(shape)
    try:
        common = torch.broadcast_shapes(shape, grad.shape)
    except RuntimeError:
        common = None
    if common != grad.shape:
        raise ValueError(f"{tuple(shape)} does not go into {tuple(grad.shape)}")
    extra = grad.dim() - len(shape)
    if extra:
        grad = grad.sum(tuple(range(extra)))
    dims = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(dims, keepdim=True) if dims else grad


@alternative("topo_order")
def topo_order_by_counting_uses(root):
    uses, found = {root: 0}, [root]
    for node in found:
        for parent in node.parents:
            if parent not in uses:
                uses[parent] = 0
                found.append(parent)
            uses[parent] += 1
    ready, order = [root], []
    while ready:
        node = ready.pop()
        order.append(node)
        for parent in node.parents:
            uses[parent] -= 1
            if not uses[parent]:
                ready.append(parent)
    order.reverse()
    return order


@alternative("topo_order")
def topo_order_with_iterators(root):
    order, seen, stack = [], {id(root)}, [(root, iter(root.parents))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if id(parent) not in seen:
                seen.add(id(parent))
                stack.append((parent, iter(parent.parents)))
                break
        else:
            stack.pop()
            order.append(node)
    return order


@alternative("Var")
class VarWithClosures:
    """Every result carries a function that adds to the gradients of its operands."""

    def __init__(self, data, parents=()):
        self.data, self.grad, self.parents = data, None, parents
        self._spread = lambda: None

    def _collect(self, grad):
        while grad.dim() > self.data.dim():
            grad = grad.sum(0)
        for dim, n in enumerate(self.data.shape):
            if n == 1 and grad.shape[dim] != 1:
                grad = grad.sum(dim, keepdim=True)
        if self.grad is None:
            self.grad = torch.zeros_like(self.data)
        self.grad = self.grad + grad

    def _var(self, other):
        if isinstance(other, VarWithClosures):
            return other
        return VarWithClosures(torch.full((), other, dtype=self.data.dtype, device=self.data.device))

    def _pointwise(self, other, compute, left, right):
        other = self._var(other)
        try:
            shape = torch.broadcast_shapes(self.data.shape, other.data.shape)
        except RuntimeError as error:
            raise ValueError(f"{self.data.shape} and {other.data.shape}") from error
        out = VarWithClosures(compute(self.data, other.data), (self, other))
        assert out.data.shape == shape

        def spread():
            self._collect(out.grad * left(self.data, other.data))
            other._collect(out.grad * right(self.data, other.data))

        out._spread = spread
        return out

    def _single(self, value, rule):
        out = VarWithClosures(value, (self,))
        out._spread = lambda: self._collect(rule(out.grad))
        return out

    def __add__(self, other):
        return self._pointwise(other, torch.add, lambda a, b: 1, lambda a, b: 1)

    def __sub__(self, other):
        return self._pointwise(other, torch.sub, lambda a, b: 1, lambda a, b: -1)

    def __mul__(self, other):
        return self._pointwise(other, torch.mul, lambda a, b: b, lambda a, b: a)

    def __truediv__(self, other):
        return self._pointwise(other, torch.div, lambda a, b: 1 / b, lambda a, b: -a / (b * b))

    def __radd__(self, other):
        return self._var(other) + self

    def __rsub__(self, other):
        return self._var(other) - self

    def __rmul__(self, other):
        return self._var(other) * self

    def __rtruediv__(self, other):
        return self._var(other) / self

    def __neg__(self):
        return self._single(-self.data, torch.neg)

    def __pow__(self, n):
        return self._single(self.data.pow(n), lambda g: g * n * self.data.pow(n - 1) if n else g * 0)

    def __matmul__(self, other):
        a, b = self.data, other.data
        try:
            value = torch.einsum("...nk,...km->...nm", a, b)
        except RuntimeError as error:
            raise ValueError(f"{a.shape} and {b.shape}") from error
        out = VarWithClosures(value, (self, other))

        def spread():
            self._collect(torch.einsum("...nm,...km->...nk", out.grad, b))
            other._collect(torch.einsum("...nk,...nm->...km", a, out.grad))

        out._spread = spread
        return out

    def exp(self):
        value = torch.exp(self.data)
        return self._single(value, lambda g: g * value)

    def log(self):
        return self._single(torch.log(self.data), lambda g: g / self.data)

    def relu(self):
        return self._single(torch.relu(self.data), lambda g: torch.where(self.data > 0, g, 0))

    def sum(self, dim=None, keepdim=False):
        def rule(g):
            if dim is None:
                return torch.ones_like(self.data) * g.sum()
            return torch.ones_like(self.data) * (g if keepdim else g.unsqueeze(dim))

        value = self.data.sum() if dim is None else self.data.sum(dim, keepdim=keepdim)
        if dim is None and keepdim:
            value = value.reshape([1] * self.data.dim())
        return self._single(value, rule)

    def reshape(self, *shape):
        return self._single(self.data.reshape(*shape), lambda g: g.reshape_as(self.data))

    def backward(self):
        if self.data.numel() != 1:
            raise ValueError(f"cannot start at shape {list(self.data.shape)}")
        order = topo_order_with_iterators(self)
        for var in order:
            if var.parents:
                var.grad = None
        self._collect(torch.ones_like(self.data))
        for var in reversed(order):
            var._spread()


@alternative("SiLUFunction")
class SiLUWithSetupContext(torch.autograd.Function):
    """Forward and the saving apart, and the derivative by way of the value."""

    @staticmethod
    def forward(x):
        return x / (1 + torch.exp(-x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.needs_input_grad[0]:
            x = ctx.saved_tensors[0]
            s = x.sigmoid()
            return (s + x * s * (1 - s)) * grad_output
        return None


@alternative("saved_bytes")
def saved_bytes_from_a_list(f, *args):
    kept = []

    def pack(tensor):
        kept.append(tensor.detach())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        f(*args)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().size() for tensor in kept}
    return sum(storages.values())


@alternative("intermediate_grads")
def intermediate_grads_one_link_at_a_time(fns, x):
    links, h = [], x
    for fn in fns:
        before = h.detach().requires_grad_()
        h = fn(before)
        links.append((before, h))
    if not links:
        return []
    if h.numel() != 1:
        raise ValueError(f"the end has shape {list(h.shape)}")
    grads = [torch.ones_like(h)]
    for before, after in reversed(links[1:]):
        (grad,) = torch.autograd.grad(after, before, grads[-1], allow_unused=True)
        grads.append(torch.zeros_like(before) if grad is None else grad)
    return [grad.detach() for grad in reversed(grads)]


@alternative("intermediate_grads")
def intermediate_grads_by_hooks(fns, x):
    h = x.clone().detach().requires_grad_(True)
    grads, outputs, handles = {}, [], []
    for i, fn in enumerate(fns):
        h = fn(h)
        handles.append(h.register_hook(lambda grad, i=i: grads.update({i: grad})))
        outputs.append(h)
    if not outputs:
        return []
    if h.numel() != 1:
        raise ValueError(f"the end has shape {list(h.shape)}")
    torch.autograd.backward(h, inputs=[h, *{id(out): out for out in outputs if not out.is_leaf}.values()])
    for handle in handles:
        handle.remove()
    for out in outputs:
        out.grad = None
    return [grads.get(i, torch.zeros_like(out)) for i, out in enumerate(outputs)]


@alternative("checkpoint")
def checkpoint_with_a_closure(f, *xs):
    """The Function is made anew for each call and knows f by its closure."""
    cuda = torch.cuda.is_available()
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *xs):
            ctx.save_for_backward(*xs)
            with torch.no_grad():
                return f(*xs)

        @staticmethod
        def backward(ctx, grad_output):
            now = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
            inputs = []
            for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True):
                inputs.append(x.detach().clone().requires_grad_() if need else x)
            torch.set_rng_state(states[0])
            if cuda:
                torch.cuda.set_rng_state_all(states[1])
            with torch.enable_grad():
                (f(*inputs) * grad_output).sum().backward()
            torch.set_rng_state(now[0])
            if cuda:
                torch.cuda.set_rng_state_all(now[1])
            grads = [x.grad if need else None for x, need in zip(inputs, ctx.needs_input_grad, strict=True)]
            return tuple(grads)

    return Run.apply(*xs)
