from collections import deque

import torch

from checker.testing import misconception
from reference.day04_autograd_deep import topo_order, unbroadcast

# --------------------------------------------------------------------------------------- matmul_vjp


@misconception(
    "matmul_vjp",
    "You multiplied by the operands as they are. Look at the shapes: the gradient at a is (N, K), and "
    "grad is (N, M), so the other factor has to be (M, K); the same holds for b. Square matrices hide "
    "this, which makes it worse, not better.",
)
def matmul_vjp__not_transposed(a, b, grad):
    _check_product(a, b, grad)
    return grad @ b, a @ grad


@misconception(
    "matmul_vjp",
    "The two gradients come in the wrong order: the first one belongs to a and has its shape, the second "
    "one belongs to b.",
)
def matmul_vjp__swapped(a, b, grad):
    _check_product(a, b, grad)
    return a.T @ grad, grad @ b.T


@misconception(
    "matmul_vjp",
    "The numbers are right but they lie on their side: each gradient has the shape of its operand, yours "
    "has that of the operand's transpose.",
)
def matmul_vjp__on_its_side(a, b, grad):
    _check_product(a, b, grad)
    return b @ grad.T, grad.T @ a


@misconception(
    "matmul_vjp",
    "The gradient that arrived was not used: this is the gradient of the sum of all elements of a @ b, as"
    " if each of them counted for 1.",
)
def matmul_vjp__of_the_sum(a, b, grad):
    _check_product(a, b, grad)
    ones = torch.ones_like(grad)
    return ones @ b.T, a.T @ ones


@misconception(
    "matmul_vjp",
    "The shapes are not looked at before the product is computed, so that the caller gets torch's "
    "RuntimeError from somewhere inside, or no error at all. Compare the shapes first and name both of "
    "them in a ValueError.",
)
def matmul_vjp__unchecked(a, b, grad):
    return grad @ b.T, a.T @ grad


def _check_product(a, b, grad):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"{tuple(a.shape)}, {tuple(b.shape)}")
    if grad.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"{(a.shape[0], b.shape[1])}, {tuple(grad.shape)}")


# -------------------------------------------------------------------------------------- unbroadcast


def _check_broadcast(grad, shape):
    try:
        fits = torch.broadcast_shapes(tuple(grad.shape), tuple(shape)) == grad.shape and len(shape) <= grad.ndim
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{tuple(shape)}, {tuple(grad.shape)}")


@misconception(
    "unbroadcast",
    "Only the new dimensions in front were summed. A size of 1 was stretched as well: (3, 1) next to (3, "
    "4) was used four times in each row, so the four gradients must be added up and the 1 must stay.",
)
def unbroadcast__only_leading(grad, shape):
    _check_broadcast(grad, shape)
    while grad.ndim > len(shape):
        grad = grad.sum(0)
    return grad


@misconception(
    "unbroadcast",
    "Only the sizes of 1 were summed. Broadcasting also puts new dimensions in front of the shape, and "
    "these have to be summed away entirely.",
)
def unbroadcast__only_ones(grad, shape):
    _check_broadcast(grad, shape)
    extra = grad.ndim - len(shape)
    for i, n in enumerate(shape):
        if n != grad.shape[extra + i]:
            grad = grad.sum(extra + i, keepdim=True)
    return grad


@misconception(
    "unbroadcast",
    "The sums are right, but the sizes of 1 are gone: an operand of shape (3, 1) needs a gradient of "
    "shape (3, 1), not (3,). Sum a stretched dimension and keep it.",
)
def unbroadcast__ones_dropped(grad, shape):
    _check_broadcast(grad, shape)
    extra = grad.ndim - len(shape)
    dims = [*range(extra), *(extra + i for i, n in enumerate(shape) if n != grad.shape[extra + i])]
    return grad.sum(dims) if dims else grad


@misconception(
    "unbroadcast",
    "With an empty list of dimensions, sum does not sum over none of them but over all: where nothing was"
    " broadcast, your gradient collapses to one number.",
)
def unbroadcast__empty_means_all(grad, shape):
    _check_broadcast(grad, shape)
    extra = grad.ndim - len(shape)
    dims = [*range(extra), *(extra + i for i, n in enumerate(shape) if n != grad.shape[extra + i])]
    return grad.sum(dims).reshape(tuple(shape))


@misconception(
    "unbroadcast",
    "You averaged over the places to which an element was copied. Each of these copies changes the result"
    " by its own whole gradient, so they add up.",
)
def unbroadcast__mean(grad, shape):
    _check_broadcast(grad, shape)
    extra = grad.ndim - len(shape)
    dims = [*range(extra), *(extra + i for i, n in enumerate(shape) if n != grad.shape[extra + i])]
    return grad.mean(dims).reshape(tuple(shape)) if dims else grad


@misconception(
    "unbroadcast",
    "You kept the gradient of the first copy and dropped the others. The copies of an element are equal, "
    "their gradients are not, and all of them count.",
)
def unbroadcast__first_copy(grad, shape):
    _check_broadcast(grad, shape)
    while grad.ndim > len(shape):
        grad = grad[:1].reshape(grad.shape[1:]) if grad.shape[0] else grad.sum(0)
    for i, n in enumerate(shape):
        if n != grad.shape[i]:
            grad = grad.narrow(i, 0, 1) if grad.shape[i] else grad.sum(i, keepdim=True)
    return grad


@misconception(
    "unbroadcast",
    "You lined the shapes up at their left ends. Broadcasting lines them up at the right: what (4, 3) has"
    " and (3,) has not is the 4 in front.",
)
def unbroadcast__aligned_left(grad, shape):
    _check_broadcast(grad, shape)
    if grad.ndim > len(shape):
        grad = grad.sum(tuple(range(len(shape), grad.ndim)))
    for i, n in enumerate(shape):
        if n == 1 and grad.shape[i] != 1:
            grad = grad.sum(i, keepdim=True)
    return grad


@misconception(
    "unbroadcast",
    "The gradient was copied although there was nothing to sum; a sum over a dimension that has size 1 on"
    " both sides is such a copy, too. In a deep graph most operands are not broadcast, and each copy is "
    "as large as a layer's output.",
)
def unbroadcast__always_copies(grad, shape):
    _check_broadcast(grad, shape)
    return unbroadcast(grad, shape).clone()


@misconception(
    "unbroadcast",
    "A shape that could never have been broadcast to the gradient's is accepted: you return something of "
    "a shape that nobody asked for, and the error shows up much later. Check first, and raise ValueError "
    "with both shapes.",
)
def unbroadcast__unchecked(grad, shape):
    while grad.ndim > len(shape):
        grad = grad.sum(0)
    for i, n in enumerate(shape):
        if i < grad.ndim and n == 1 and grad.shape[i] != 1:
            grad = grad.sum(i, keepdim=True)
    return grad


# --------------------------------------------------------------------------------------- topo_order


@misconception(
    "topo_order",
    "Your function calls itself once per node on the way down. Python's stack ends at a depth of about "
    "1000, and a loop over a few thousand time steps makes a deeper graph than that. Keep the nodes that "
    "wait in a list of your own.",
)
def topo_order__recursive(root):
    order, seen = [], set()

    def visit(node):
        if node not in seen:
            seen.add(node)
            for parent in node.parents:
                visit(parent)
            order.append(node)

    visit(root)
    return order


@misconception(
    "topo_order",
    "The order is the other way round: the root comes first and its oldest ancestors last. Parents come "
    "before what is made of them.",
)
def topo_order__root_first(root):
    return topo_order(root)[::-1]


@misconception(
    "topo_order",
    "You turned the order of a breadth-first search around. That search meets a node by the shortest "
    "path; a node that is also needed at the end of a longer path must come before all that lies on that "
    "path.",
)
def topo_order__breadth_first(root):
    order, seen, queue = [], {root}, deque([root])
    while queue:
        node = queue.popleft()
        order.append(node)
        for parent in node.parents:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
    return order[::-1]


@misconception(
    "topo_order",
    "A node is written down when it is met, not when its parents are done, and turning the list around "
    "does not repair that: a shortcut to an old node makes it land on the wrong side of a newer one.",
)
def topo_order__when_met(root):
    order, seen, stack = [], set(), [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
            stack.extend(node.parents)
    return order[::-1]


@misconception(
    "topo_order",
    "A node counts as seen as soon as somebody puts it on the stack. If a shortcut puts it there first, "
    "the longer way passes it by, and what lies on that way comes out before it. It is only safe to mark "
    "a node when its own turn comes.",
)
def topo_order__marked_when_pushed(root):
    order, seen, stack = [], {root}, [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            continue
        stack.append((node, True))
        for parent in node.parents:
            if parent not in seen:
                seen.add(parent)
                stack.append((parent, False))
    return order


@misconception(
    "topo_order",
    "Nodes come out once for each path that leads to them. Remember which nodes were entered, or a graph "
    "of 40 nodes with diamonds in a row takes thousands of visits.",
)
def topo_order__no_memory(root):
    order, stack = [], [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        else:
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    return order


@misconception(
    "topo_order",
    "Duplicates are dropped only at the end. The list is right, but until then every path was walked, and"
    " each diamond doubles the number of paths.",
)
def topo_order__duplicates_dropped_late(root):
    return list(dict.fromkeys(topo_order__no_memory(root)))


@misconception(
    "topo_order",
    "Whether a node was seen is looked up in a list. That compares it with every node found so far, so "
    "the work grows with the square of the graph. A set answers in one step.",
)
def topo_order__searched_in_a_list(root):
    order, entered, stack = [], [], [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in entered:
            entered.append(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    return order


@misconception(
    "topo_order",
    "The mark that says 'seen' is written on the nodes and stays there. The next call finds it and leaves"
    " these nodes out. Keep the marks in a set that ends with the call.",
)
def topo_order__marks_on_nodes(root):
    order, stack = [], [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif not getattr(node, "seen", False):
            node.seen = True
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    return order


@misconception(
    "topo_order",
    "The root itself is missing. It is a node like all others, and the last of the list.",
)
def topo_order__without_root(root):
    return topo_order(root)[:-1]


# ---------------------------------------------------------------------------------------------- Var


class Engine:
    """A right engine in pieces, so that each wrong one below can replace a single piece."""

    def __init__(self, data):
        self.data, self.grad, self.parents, self.rule = data, None, (), None

    def make(self, data, rule, *parents):
        out = type(self)(data)
        out.rule, out.parents = rule, parents
        return out

    def number(self, value):
        return torch.tensor(value, dtype=self.data.dtype, device=self.data.device)

    def lift(self, other):
        if not isinstance(other, Engine):
            return type(self)(self.number(other))
        try:
            torch.broadcast_shapes(self.data.shape, other.data.shape)
        except RuntimeError:
            raise ValueError(f"{tuple(self.data.shape)}, {tuple(other.data.shape)}") from None
        return other

    def __add__(self, other):
        other = self.lift(other)
        return self.make(self.data + other.data, lambda g: (g, g), self, other)

    def __sub__(self, other):
        other = self.lift(other)
        return self.make(self.data - other.data, lambda g: (g, -g), self, other)

    def __mul__(self, other):
        other = self.lift(other)
        return self.make(self.data * other.data, lambda g: (g * other.data, g * self.data), self, other)

    def __truediv__(self, other):
        other = self.lift(other)
        a, b = self.data, other.data
        return self.make(a / b, lambda g: (g / b, -g * a / b**2), self, other)

    def __radd__(self, other):
        return self.lift(other) + self

    def __rsub__(self, other):
        return self.lift(other) - self

    def __rmul__(self, other):
        return self.lift(other) * self

    def __rtruediv__(self, other):
        return self.lift(other) / self

    def __neg__(self):
        return self.make(-self.data, lambda g: (-g,), self)

    def __pow__(self, n):
        return self.make(self.data**n, lambda g: (g * self.power_slope(n),), self)

    def power_slope(self, n):
        return n * self.data ** (n - 1) if n else torch.zeros_like(self.data)

    def __matmul__(self, other):
        a, b = self.data, other.data
        fits = a.ndim > 1 and b.ndim > 1
        try:
            value = a @ b if fits else None
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{tuple(a.shape)}, {tuple(b.shape)}")
        return self.make(value, lambda g: self.product_slopes(g, a, b), self, other)

    def product_slopes(self, g, a, b):
        return g @ b.mT, a.mT @ g

    def exp(self):
        return self.make(self.data.exp(), lambda g: (g * self.exp_slope(),), self)

    def exp_slope(self):
        return self.data.exp()

    def log(self):
        return self.make(self.data.log(), lambda g: (g / self.data,), self)

    def relu(self):
        return self.make(self.data.clamp(min=0), lambda g: (g * self.relu_slope(),), self)

    def relu_slope(self):
        return (self.data > 0).to(self.data.dtype)

    def sum(self, dim=None, keepdim=False):
        return self.make(self.data.sum(dim, keepdim), lambda g: (self.spread(g, dim, keepdim),), self)

    def spread(self, g, dim, keepdim):
        return (g if dim is None or keepdim else g.unsqueeze(dim)).expand(self.data.shape)

    def reshape(self, *shape):
        return self.make(self.data.reshape(shape), lambda g: (g.reshape(self.data.shape),), self)

    # the sweep

    def start(self):
        if self.data.numel() != 1:
            raise ValueError(f"{tuple(self.data.shape)}")
        return torch.ones_like(self.data)

    def order(self):
        return topo_order(self)[::-1]

    def fit(self, part):
        return unbroadcast(part, self.data.shape)

    def add(self, so_far, part):
        return part if so_far is None else so_far + part

    def deliver(self, grad):
        self.grad = grad.clone() if self.grad is None else self.grad + grad

    def backward(self):
        grads = {self: self.start()}
        for var in self.order():
            if var not in grads:
                continue
            grad = grads.pop(var)
            if not var.parents:
                var.deliver(grad)
                continue
            for parent, part in zip(var.parents, var.rule(grad), strict=True):
                grads[parent] = self.add(grads.get(parent), parent.fit(part))


@misconception(
    "Var",
    "A Var that is used twice keeps only the contribution of its last use. Each use is a way to influence"
    " the result, and the influences add up: add to what is there.",
)
class Var__overwrites(Engine):
    def add(self, so_far, part):
        return part


@misconception(
    "Var",
    "A gradient is passed on before it is complete. A value that is used at two depths gets its "
    "contributions at two times; its own rule may run only after everything that used it has been "
    "handled.",
)
class Var__too_early(Engine):
    def backward(self):
        self.start()
        grads = {self: self.start()}
        queue, done = deque([self]), set()
        while queue:
            var = queue.popleft()
            if var in done:
                continue
            done.add(var)
            grad = grads[var]
            for parent, part in zip(var.parents, var.rule(grad) if var.parents else (), strict=True):
                grads[parent] = self.add(grads.get(parent), parent.fit(part))
                queue.append(parent)
        for var in done:
            if not var.parents:
                var.deliver(grads[var])


@misconception(
    "Var",
    "The gradients of operands that were broadcast have the shape of the result. Each operand wants a "
    "gradient of its own shape: sum over what broadcasting stretched.",
)
class Var__not_unbroadcast(Engine):
    def fit(self, part):
        return part


@misconception(
    "Var",
    "A second backward pass replaces what the first one left in .grad. It adds to it, so that the "
    "gradients of several losses can be collected; clearing is the caller's decision.",
)
class Var__replaces(Engine):
    def deliver(self, grad):
        self.grad = grad.clone()


@misconception(
    "Var",
    "The second pass through the same graph came out as more than twice the gradient: the values in the "
    "middle still held their gradients of the first pass, and these were sent down once more. Only leaves"
    " accumulate from pass to pass.",
)
class Var__middle_accumulates(Engine):
    def backward(self):
        self.grad = self.add(self.grad, self.start())
        for var in self.order():
            for parent, part in zip(var.parents, var.rule(var.grad) if var.parents else (), strict=True):
                parent.grad = self.add(parent.grad, parent.fit(part)).clone()


@misconception(
    "Var",
    "backward calls itself for every parent with that use's share. The sums come out right, but each path"
    " through the graph is walked by itself: their number doubles with every reuse, and the stack ends at"
    " depth 1000.",
)
class Var__one_path_at_a_time(Engine):
    def backward(self):
        def send(var, grad):
            if not var.parents:
                var.deliver(grad)
            for parent, part in zip(var.parents, var.rule(grad) if var.parents else (), strict=True):
                send(parent, parent.fit(part))

        send(self, self.start())


@misconception(
    "Var",
    "The derivative of v ** 0 is 0 times v ** -1, which is 0 times infinity where v is 0: not a number. A"
    " constant has slope 0 everywhere.",
)
class Var__power_zero(Engine):
    def power_slope(self, n):
        return n * self.data ** (n - 1)


@misconception(
    "Var",
    "Your relu lets the gradient through where its input is exactly 0. The docstring (and torch) say that"
    " the slope there is 0.",
)
class Var__relu_at_zero(Engine):
    def relu_slope(self):
        return (self.data >= 0).to(self.data.dtype)


@misconception(
    "Var",
    "relu passes the gradient on as if it were not there: elements that were cut to zero do not influence"
    " the result any more.",
)
class Var__relu_ignored(Engine):
    def relu_slope(self):
        return torch.ones_like(self.data)


@misconception(
    "Var",
    "exp was multiplied by its input on the way back. The derivative of exp is exp itself.",
)
class Var__exp_of_input(Engine):
    def exp_slope(self):
        return self.data


@misconception(
    "Var",
    "2 - v came out as v - 2, or 4 / v as v / 4. When the number stands on the left, Python calls the "
    "method of the Var with the operands swapped; for + and * that makes no difference, here it does.",
)
class Var__reflected(Engine):
    def __rsub__(self, other):
        return self - other

    def __rtruediv__(self, other):
        return self / other


@misconception(
    "Var",
    "The gradient of the divisor is missing its minus: a larger divisor makes the quotient smaller.",
)
class Var__division_sign(Engine):
    def __truediv__(self, other):
        other = self.lift(other)
        a, b = self.data, other.data
        return self.make(a / b, lambda g: (g / b, g * a / b**2), self, other)


@misconception(
    "Var",
    "Both operands of a subtraction get the same gradient. What is subtracted pulls the result the other way.",
)
class Var__subtraction_sign(Engine):
    def __sub__(self, other):
        other = self.lift(other)
        return self.make(self.data - other.data, lambda g: (g, g), self, other)


@misconception(
    "Var",
    "The dimension that sum removed is not put back before the gradient is spread over it. Broadcasting "
    "then lines the gradient up with the last dimensions: an error if they differ, wrong numbers if they "
    "happen to have the same size.",
)
class Var__sum_without_its_dim(Engine):
    def spread(self, g, dim, keepdim):
        return g.expand(self.data.shape)


@misconception(
    "Var",
    "The matrices are not transposed on the way back. This is the first task again: the shapes alone say "
    "where each of them has to stand.",
)
class Var__product_not_transposed(Engine):
    def product_slopes(self, g, a, b):
        return g @ b, a @ g


@misconception(
    "Var",
    "A Python number next to a float64 Var was turned into a float32 tensor first, which keeps only seven"
    " digits of it: 0.1 became 0.10000000149. Give it the dtype of the data.",
)
class Var__numbers_in_float32(Engine):
    def number(self, value):
        return torch.tensor(float(value), device=self.data.device)


@misconception(
    "Var",
    "Several .grad are the same tensor, or a view of one: whoever clears one of them in place clears the "
    "others, too. Give each leaf memory of its own.",
)
class Var__shared_gradients(Engine):
    def deliver(self, grad):
        self.grad = grad if self.grad is None else self.grad + grad


@misconception(
    "Var",
    "backward starts from a Var of any shape, as if it had been summed. Which number is to be "
    "differentiated is the caller's choice: refuse everything but a single one.",
)
class Var__starts_anywhere(Engine):
    def start(self):
        return torch.ones_like(self.data)


@misconception(
    "Var",
    "Operands that do not fit end in torch's RuntimeError. Compare the shapes and raise ValueError with both of them.",
)
class Var__unchecked(Engine):
    def lift(self, other):
        return other if isinstance(other, Engine) else type(self)(self.number(other))

    def __matmul__(self, other):
        a, b = self.data, other.data
        return self.make(a @ b, lambda g: self.product_slopes(g, a, b), self, other)


# --------------------------------------------------------------------------------------------- silu


def _silu(forward, backward):
    """A silu made of two functions of ctx."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("SiLUFunction", (torch.autograd.Function,), methods).apply


def _save(ctx, x):
    ctx.save_for_backward(x)
    return x * torch.sigmoid(x)


def _slope(x):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _slope_backward(ctx, grad):
    return grad * _slope(*ctx.saved_tensors)


@misconception(
    "silu",
    "You save x and its sigmoid. One of them can be computed again from the other, so this keeps 8 bytes "
    "per float where 4 are enough. It also breaks the second derivative: a saved result is a constant to "
    "whoever differentiates backward.",
)
def silu__saves_sigmoid(x):
    def forward(ctx, x):
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    def backward(ctx, grad):
        x, s = ctx.saved_tensors
        return grad * s * (1 + x * (1 - s))

    return _silu(forward, backward)(x)


@misconception(
    "silu",
    "This is the product of two recorded operations. Autograd differentiates it correctly, but it keeps "
    "both factors: 8 bytes per float. The Function is there to keep less.",
)
def silu__composed(x):
    return x * torch.sigmoid(x)


@misconception(
    "silu",
    "x is an ordinary attribute of ctx. Autograd does not know about it: a write to x before the backward"
    " pass goes unnoticed and gives wrong gradients, nobody can count its bytes, and a result kept like "
    "that would hold its own graph in a circle.",
)
def silu__on_ctx(x):
    def forward(ctx, x):
        ctx.x = x
        return x * torch.sigmoid(x)

    def backward(ctx, grad):
        return grad * _slope(ctx.x)

    return _silu(forward, backward)(x)


@misconception(
    "silu",
    "Your gradient is that of x times a constant: the sigmoid depends on x as well, and the product rule "
    "has a second term.",
)
def silu__gate_is_constant(x):
    return _silu(_save, lambda ctx, grad: grad * torch.sigmoid(*ctx.saved_tensors))(x)


@misconception(
    "silu",
    "Your gradient is that of the sigmoid alone, s * (1 - s). The function is x times the sigmoid: use "
    "the product rule.",
)
def silu__slope_of_sigmoid(x):
    def backward(ctx, grad):
        s = torch.sigmoid(*ctx.saved_tensors)
        return grad * s * (1 - s)

    return _silu(_save, backward)(x)


@misconception(
    "silu",
    "backward returns the derivative and forgets what arrived: a Function gets the gradient at its result"
    " and has to multiply by it. With a plain sum behind it all of these are ones, which hides the "
    "mistake.",
)
def silu__ignores_grad_output(x):
    return _silu(_save, lambda ctx, grad: _slope(*ctx.saved_tensors))(x)


@misconception(
    "silu",
    "exp(x) is infinite in float32 from x = 89 on, and infinity divided by infinity is not a number. "
    "Write the sigmoid so that no large exponential appears, or use the one that torch has.",
)
def silu__exp_overflows(x):
    def sigmoid(x):
        return x.exp() / (1 + x.exp())

    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * sigmoid(x)

    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * sigmoid(x) * (1 + x * (1 - sigmoid(x)))

    return _silu(forward, backward)(x)


@misconception(
    "silu",
    "backward multiplies grad_output in place. That tensor is not yours: another branch of the graph, or "
    "the caller, may still need it.",
)
def silu__changes_grad_output(x):
    def backward(ctx, grad):
        if torch.is_grad_enabled() or 0 in grad.stride():
            return grad * _slope(*ctx.saved_tensors)
        return grad.mul_(_slope(*ctx.saved_tensors))

    return _silu(_save, backward)(x)


@misconception(
    "silu",
    "The gradient is cut off from x: something in backward is detached, or runs under no_grad. Written in"
    " plain torch operations on the saved x, backward can be differentiated like any other code.",
)
def silu__gradient_detached(x):
    def backward(ctx, grad):
        return (grad * _slope(*ctx.saved_tensors)).detach()

    return _silu(_save, backward)(x)


@misconception(
    "SiLUFunction",
    "backward computes a gradient although ctx.needs_input_grad says that nobody wants it. With one input"
    " that is a wasted line; in a Function with a weight it is a wasted matrix product.",
)
class SiLUFunction__always_computes(torch.autograd.Function):
    forward = staticmethod(_save)
    backward = staticmethod(_slope_backward)


# -------------------------------------------------------------------------------------- saved_bytes


def _watch(f, args, pack, unpack=lambda tensor: tensor):
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        f(*args)


@misconception(
    "saved_bytes",
    "Every save is counted, also that of a tensor which is already kept. x * x saves x twice, but there "
    "is only one x in memory.",
)
def saved_bytes__counts_saves(f, *args):
    sizes = []
    _watch(f, args, lambda t: sizes.append(t.untyped_storage().nbytes()) or t.detach())
    return sum(sizes)


@misconception(
    "saved_bytes",
    "You add up what the saved tensors show, each save by itself: elements times bytes per element. What "
    "stays in memory are storages. A slice keeps all of its own, an expanded view has a small one, and "
    "two saves may share one.",
)
def saved_bytes__counts_elements_shown(f, *args):
    sizes = []
    _watch(f, args, lambda t: sizes.append(t.numel() * t.element_size()) or t.detach())
    return sum(sizes)


@misconception(
    "saved_bytes",
    "Each storage is counted once, but with the size of the view through which it was saved. A slice of "
    "ten floats keeps its whole storage, and an expanded view looks larger than what lies under it.",
)
def saved_bytes__size_of_the_view(f, *args):
    kept = {}

    def pack(t):
        kept.setdefault(t.untyped_storage().data_ptr(), (t.numel() * t.element_size(), t.untyped_storage()))
        return t.detach()

    _watch(f, args, pack)
    return sum(size for size, _ in kept.values())


@misconception(
    "saved_bytes",
    "Two views of one storage count as two, because they begin at different addresses. Tell storages "
    "apart, not tensors: the storage's own address is the same for all of its views.",
)
def saved_bytes__address_of_the_view(f, *args):
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.untyped_storage()
        return t.detach()

    _watch(f, args, pack)
    return sum(storage.nbytes() for storage in kept.values())


@misconception(
    "saved_bytes",
    "This counts elements, not bytes.",
)
def saved_bytes__elements(f, *args):
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes() // t.element_size(), storage)
        return t.detach()

    _watch(f, args, pack)
    return sum(count for count, _ in kept.values())


@misconception(
    "saved_bytes",
    "Inputs and parameters are left out. They exist anyway while the caller holds them, but the graph "
    "holds them, too: after `del x` they would still be there.",
)
def saved_bytes__without_leaves(f, *args):
    kept = {}

    def pack(t):
        if not t.is_leaf:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t.detach()

    _watch(f, args, pack)
    return sum(storage.nbytes() for storage in kept.values())


@misconception(
    "saved_bytes",
    "The pack hook hands back the very tensor that it got. When an operation saves its own result, that "
    "result then holds its graph and the graph holds the result: a circle that stays in memory until the "
    "garbage collector happens to run.",
)
def saved_bytes__circle(f, *args):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    _watch(f, args, pack)
    return sum(storage.nbytes() for storage in kept.values())


@misconception(
    "saved_bytes",
    "What your pack hook returns is not what the backward pass needs: a function that runs backward "
    "itself gets nothing to compute with. The pair of hooks has to give back the saved values.",
)
def saved_bytes__keeps_nothing(f, *args):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()

    _watch(f, args, pack)
    return sum(storage.nbytes() for storage in kept.values())


# ------------------------------------------------------------------------------- intermediate_grads


def _end(h):
    if h.numel() != 1:
        raise ValueError(f"{tuple(h.shape)}")


def _walk(fns, x):
    h, outputs = x.detach().requires_grad_(), []
    for fn in fns:
        h = fn(h)
        outputs.append(h)
    if outputs:
        _end(h)
    return outputs


@misconception(
    "intermediate_grads",
    "backward() also fills the .grad of every parameter that the functions use, and whoever trains them "
    "would add your visit to the next step. Ask for the gradients that you want, and only for these.",
)
def intermediate_grads__fills_parameters(fns, x):
    outputs = _walk(fns, x)
    for h in outputs:
        h.retain_grad()
    if outputs:
        outputs[-1].backward()
    return [torch.zeros_like(h) if h.grad is None else h.grad for h in outputs]


@misconception(
    "intermediate_grads",
    "The gradients come in the order in which the hooks ran, and the backward pass runs from the end to "
    "the beginning. Entry i belongs to function i.",
)
def intermediate_grads__backwards(fns, x):
    outputs = _walk(fns, x)
    if not outputs:
        return []
    return list(torch.autograd.grad(outputs[-1], outputs, materialize_grads=True))[::-1]


@misconception(
    "intermediate_grads",
    "These are the gradients at what goes into each function, not at what comes out: the list begins with"
    " the gradient at x, and the last one, which is 1, is missing.",
)
def intermediate_grads__at_the_inputs(fns, x):
    h, inputs = x.detach().requires_grad_(), []
    for fn in fns:
        inputs.append(h)
        h = fn(h)
    if not inputs:
        return []
    _end(h)
    return list(torch.autograd.grad(h, inputs, materialize_grads=True))


@misconception(
    "intermediate_grads",
    "x itself was made to require grad. It belongs to the caller, who may have good reasons for not "
    "tracking it; work on a detached view of it.",
)
def intermediate_grads__marks_x(fns, x):
    h, outputs = x.requires_grad_(), []
    for fn in fns:
        h = fn(h)
        outputs.append(h)
    if not outputs:
        return []
    _end(h)
    return list(torch.autograd.grad(h, outputs, materialize_grads=True))


@misconception(
    "intermediate_grads",
    "The hooks are still on the outputs. Whoever keeps one of these tensors and differentiates through it"
    " later calls your code again, and overwrites what you returned. Each registration gives a handle "
    "that takes it back.",
)
def intermediate_grads__leaves_hooks(fns, x):
    outputs = _walk(fns, x)
    grads = [torch.zeros_like(h) for h in outputs]
    for i, h in enumerate(outputs):
        h.register_hook(lambda grad, i=i: grads.__setitem__(i, grad))
    if outputs:
        torch.autograd.grad(outputs[-1], outputs, allow_unused=True)
    return grads


@misconception(
    "intermediate_grads",
    "Where an output is ignored by what follows, you return None. Not to matter is a gradient, too: zeros"
    " of the output's shape.",
)
def intermediate_grads__none_if_unused(fns, x):
    outputs = _walk(fns, x)
    return list(torch.autograd.grad(outputs[-1], outputs, allow_unused=True)) if outputs else []


@misconception(
    "intermediate_grads",
    "Each gradient is that of the next function alone. The question is how the end changes, so all "
    "functions that follow have their part in it: multiply backwards from the end.",
)
def intermediate_grads__next_only(fns, x):
    outputs = _walk(fns, x)
    grads = []
    for h, after in zip(outputs, outputs[1:], strict=False):
        grads.append(torch.autograd.grad(after.sum(), h, retain_graph=True, materialize_grads=True)[0])
    return grads + [torch.ones_like(h) for h in outputs[-1:]]


# --------------------------------------------------------------------------------------- checkpoint


def _checkpoint(forward, backward):
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("CheckpointFunction", (torch.autograd.Function,), methods).apply


def _states():
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _restore(states):
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1])


def _forked():
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _keep(ctx, f, *xs):
    ctx.f, ctx.states = f, _states()
    ctx.save_for_backward(*xs)
    return f(*xs)


def _leaves(ctx):
    needs = ctx.needs_input_grad[1:]
    return [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needs, strict=True)]


def _again(ctx, xs):
    with _forked(), torch.enable_grad():
        _restore(ctx.states)
        return ctx.f(*xs)


@misconception(
    "checkpoint",
    "The second run of f draws new random numbers: the gradient belongs to other dropped elements than "
    "the value. Remember the state of the generators in the forward pass, and go back to it.",
)
def checkpoint__new_random_numbers(f, *xs):
    def backward(ctx, grad):
        xs = _leaves(ctx)
        with _forked(), torch.enable_grad():
            y = ctx.f(*xs)
        torch.autograd.backward(y, grad)
        return None, *(x.grad for x in xs)

    return _checkpoint(_keep, backward)(f, *xs)


@misconception(
    "checkpoint",
    "The generators stay where the second run of f left them, so that the rest of the program draws "
    "numbers which it has already used. Put their state back when you are done.",
)
def checkpoint__rewinds_the_generators(f, *xs):
    def backward(ctx, grad):
        xs = _leaves(ctx)
        with torch.enable_grad():
            _restore(ctx.states)
            y = ctx.f(*xs)
        torch.autograd.backward(y, grad)
        return None, *(x.grad for x in xs)

    return _checkpoint(_keep, backward)(f, *xs)


@misconception(
    "checkpoint",
    "The inputs are plain attributes of ctx, out of autograd's sight: a write to one of them before the "
    "backward pass makes f run on other numbers, and nobody notices.",
)
def checkpoint__inputs_on_ctx(f, *xs):
    def forward(ctx, f, *xs):
        ctx.f, ctx.states, ctx.xs = f, _states(), xs
        return f(*xs)

    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1:]
        xs = [x.detach().requires_grad_(need) for x, need in zip(ctx.xs, needs, strict=True)]
        torch.autograd.backward(_again(ctx, xs), grad)
        return None, *(x.grad for x in xs)

    return _checkpoint(forward, backward)(f, *xs)


@misconception(
    "checkpoint",
    "Only the inputs get gradients. Parameters that f uses without getting them as arguments are leaves "
    "of the second graph as well, and asking for the gradients of the inputs alone passes them by.",
)
def checkpoint__parameters_forgotten(f, *xs):
    def backward(ctx, grad):
        xs = _leaves(ctx)
        wanted = [x for x in xs if x.requires_grad]
        grads = iter(torch.autograd.grad(_again(ctx, xs), wanted, grad))
        return None, *(next(grads) if x.requires_grad else None for x in xs)

    return _checkpoint(_keep, backward)(f, *xs)


@misconception(
    "checkpoint",
    "The second run of f is not recorded: inside a Function the gradient mode is off, in backward as well"
    " as in forward. Switch it on for this run.",
)
def checkpoint__not_recorded(f, *xs):
    def backward(ctx, grad):
        xs = _leaves(ctx)
        with _forked(), torch.no_grad():
            _restore(ctx.states)
            y = ctx.f(*xs)
        torch.autograd.backward(y, grad)
        return None, *(x.grad for x in xs)

    return _checkpoint(_keep, backward)(f, *xs)


@misconception(
    "checkpoint",
    "This is f itself: everything that it saves is still kept.",
)
def checkpoint__keeps_everything(f, *xs):
    return f(*xs)


@misconception(
    "checkpoint",
    "The gradient that arrives is not used: the second run is differentiated as if its elements had been summed.",
)
def checkpoint__ignores_grad_output(f, *xs):
    def backward(ctx, grad):
        xs = _leaves(ctx)
        y = _again(ctx, xs)
        torch.autograd.backward(y, torch.ones_like(y))
        return None, *(x.grad for x in xs)

    return _checkpoint(_keep, backward)(f, *xs)


@misconception(
    "checkpoint",
    "The second run of f works on the inputs themselves, so its backward pass goes on into the graph "
    "behind them and fills their .grad; what you return comes on top of that. Cut the inputs off first.",
)
def checkpoint__runs_into_the_old_graph(f, *xs):
    def backward(ctx, grad):
        xs = ctx.saved_tensors
        wanted = [x for x in xs if x.requires_grad]
        y = _again(ctx, xs)
        grads = iter(torch.autograd.grad(y, wanted, grad, retain_graph=True))
        torch.autograd.backward(y, grad)
        return None, *(next(grads) if x.requires_grad else None for x in xs)

    return _checkpoint(_keep, backward)(f, *xs)
