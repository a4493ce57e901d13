"""First-order mutants of a Python module: one small edit each, made on its syntax tree.

A kata's tests are good when they tell its reference from every wrong variant of it, and a mutant is a wrong
variant that nobody had to write. A walk over the tree collects edits (which fields of which node to
replace); each is applied in place, written out and undone. Only the edited function or class is written
anew: the rest of the module keeps its text.

Edits known to change nothing, or to say what another already says, are left out: `x[0:n]` to `x[:n]`, a
negated test of a conditional expression beside its swapped branches. So are loops that would never end.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Mutant:
    """One edit of a module, and the module with that edit.

    key: an identity without line numbers, `<qualname>: <before> -> <after>`, and ` #2` where one repeats
    qualname: the top-level function, the class or the method that holds the edit
    top: the first part of qualname
    line: where the edit is in the original source
    operator: the kind of edit, such as `arithmetic` or `drop-keyword`
    source: the whole mutated module
    """

    key: str
    qualname: str
    top: str
    line: int
    operator: str
    source: str


def generate(source: str, *, names: Collection[str] | None = None, limit_per_name: int | None = None) -> list[Mutant]:
    """Return the mutants of a module's top-level functions and classes, in source order.

    names: only mutate these top-level names; those that the module does not define are ignored
    limit_per_name: keep this many mutants per top-level name, spread evenly over its source
    """
    if limit_per_name is not None and limit_per_name < 0:
        raise ValueError(f"limit_per_name ({limit_per_name}) must not be negative")
    module = ast.parse(source)
    imported = _imported(module)
    mutants: dict[str, list[Mutant]] = {}
    for top in module.body:
        if isinstance(top, _DEFINITIONS) and (names is None or top.name in names):
            mutants.setdefault(top.name, []).extend(_mutants_of(top, source, imported))
    kept = [one for group in mutants.values() for one in _spread(_numbered(group), limit_per_name)]
    return sorted(kept, key=lambda mutant: mutant.line)


def reachable(source: str, names: Collection[str]) -> dict[str, set[str]]:
    """Map each top-level function and class to those of `names` whose code can reach it.

    A definition is reached by being named, in a body, a default, a base or a decorator, also through other
    definitions and module-level variables. A name reaches itself.
    """
    module = ast.parse(source)
    uses: dict[str, set[str]] = {}
    for statement in module.body:
        for bound in _bound_names(statement):
            uses.setdefault(bound, set()).update(_names(statement))
    reached: dict[str, set[str]] = {top.name: set() for top in module.body if isinstance(top, _DEFINITIONS)}
    for name in names:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            current = waiting.pop()
            if current in uses and current not in seen:
                seen.add(current)
                waiting.extend(uses[current])
        for found in seen & reached.keys():
            reached[found].add(name)
    return reached


# Edits, and the walk that collects them


class _Default(NamedTuple):
    """A parameter's default, which has no node of its own; read anew each time that it is shown."""

    owner: ast.arguments
    field: str
    index: int

    def __str__(self) -> str:
        defaults, named = getattr(self.owner, self.field), self.owner.kwonlyargs
        if self.field == "defaults":
            named = [*self.owner.posonlyargs, *self.owner.args][-len(defaults) :]
        return f"{named[self.index].arg}={ast.unparse(defaults[self.index])}"


class _Edit(NamedTuple):
    """Fields to replace on one node; `before` and `after` are what the mutant's key shows."""

    operator: str
    qualname: str
    line: int
    column: int
    owner: ast.AST
    changes: dict[str, object]
    before: ast.AST | _Default | str
    after: ast.AST | _Default | str


@dataclass(frozen=True)
class _Place:
    """Where a node sits: in which field of its owner, and inside what."""

    owner: ast.AST
    field: str
    index: int | None
    context: ast.AST | _Default  # the smallest node around it that reads well by itself
    qualname: str
    in_function: bool
    loops: tuple[ast.AST, ...]  # the loops around it, innermost last
    imported: frozenset[str]

    def change(self, operator: str, owner: ast.AST, *, at: ast.AST | None = None, **fields: object) -> _Edit:
        """Replace fields of a node at this place; the key shows the smallest readable node around them."""
        at = at or owner
        shown = owner if isinstance(owner, _READABLE) else self.context
        return _Edit(operator, self.qualname, at.lineno, at.col_offset, owner, fields, shown, shown)

    def put(self, operator: str, node: ast.AST, *new: ast.AST) -> _Edit:
        """Put other nodes in the place of this one; the key shows what is around it."""
        value: object = new[0]
        if self.index is not None:
            old = getattr(self.owner, self.field)
            value = [*old[: self.index], *new, *old[self.index + 1 :]]
        return self.change(operator, self.owner, at=node, **{self.field: value})

    def swap(self, operator: str, node: ast.AST, *new: ast.AST) -> _Edit:
        """Put other nodes in the place of this one; the key shows the two alone."""
        return self.put(operator, node, *new)._replace(before=node, after=new[0])

    def tests(self, *kinds: type[ast.AST]) -> bool:
        """Whether the node is the whole test of such a statement or expression."""
        return self.field == "test" and isinstance(self.owner, kinds)


def _walk(node: ast.AST, place: _Place) -> Iterator[_Edit]:
    if _is_untouched(node, place):
        return
    if (number := _number(node)) is not None:
        if not place.tests(ast.While):
            for value in _other_numbers(number, place):
                yield place.put("constant", node, _literal(value))
        return
    if isinstance(node, ast.keyword) and node.arg in _DIM_KEYWORDS and _dims(node.value):
        yield from _dim(node, place)
        return
    if operator := _OPERATORS.get(type(node)):
        yield from operator(node, place)
    yield from _walk_children(node, place)


def _walk_children(node: ast.AST, place: _Place) -> Iterator[_Edit]:
    context = node if isinstance(node, _READABLE) else place.context
    place = replace(place, owner=node, context=context)
    if isinstance(node, _DEFINITIONS) and not place.in_function:
        qualname = f"{place.qualname}.{node.name}" if place.qualname else node.name
        place = replace(place, qualname=qualname, in_function=not isinstance(node, ast.ClassDef))
    if isinstance(node, (*_DEFINITIONS, ast.Lambda)):
        place = replace(place, loops=())
    for field, value in ast.iter_fields(node):
        if field in _UNTOUCHED_FIELDS or (isinstance(node, ast.ClassDef) and field != "body"):
            continue
        looped = isinstance(node, _LOOPS) and field == "body"
        loops = (*place.loops, node) if looped else place.loops
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                position = index if isinstance(value, list) else None
                inner = replace(place, field=field, index=position, loops=loops)
                if isinstance(node, ast.arguments):
                    inner = replace(inner, context=_Default(node, field, index))
                yield from _walk(child, inner)


def _is_untouched(node: ast.AST, place: _Place) -> bool:
    """Whether nothing in the node is mutated: messages, `Literal[...]`, the step of a `while` loop."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value) == "Literal"
    if isinstance(node, ast.AugAssign):
        return _is_awaited(node.target, place)
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
        return any(_is_awaited(target, place) for target in node.targets)
    return type(node).__name__ in _UNTOUCHED_NODES


def _is_awaited(target: ast.AST, place: _Place) -> bool:
    """Whether the end of a `while` loop around the place depends on this variable."""
    waits = (loop for loop in place.loops if isinstance(loop, ast.While))
    return isinstance(target, ast.Name) and any(target.id in _names(loop.test) for loop in waits)


# Operators: for a node of a type, its edits


def _operation(node: ast.BinOp | ast.BoolOp | ast.AugAssign, place: _Place) -> Iterator[_Edit]:
    if isinstance(node, ast.AugAssign):
        yield place.swap("drop-statement", node, ast.Pass())
    if isinstance(node, ast.BoolOp):
        yield place.change("boolean", node, op=_SWAPPED[type(node.op)]())
    elif type(node.op) in _SWAPPED and not any(_is_text(one) for one in ast.iter_child_nodes(node)):
        yield place.change("arithmetic", node, op=_SWAPPED[type(node.op)]())
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield place.change("arithmetic", node, left=node.right, right=node.left)


def _unary(node: ast.UnaryOp, place: _Place) -> Iterator[_Edit]:
    negates_test = isinstance(node.op, ast.Not) and (
        place.tests(ast.While, ast.IfExp) or (place.tests(ast.If) and _only_raises(place.owner))
    )
    if not isinstance(node.op, ast.UAdd) and not negates_test:
        yield place.swap("unary", node, node.operand)


def _compare(node: ast.Compare, place: _Place) -> Iterator[_Edit]:
    boundaries_only = place.tests(ast.While)
    opposites_elsewhere = place.tests(ast.While, ast.IfExp) and len(node.ops) == 1
    for index, op in enumerate(node.ops):
        others = [*_BOUNDARY.get(type(op), ())]
        others += [] if boundaries_only else _FLIP.get(type(op), ())
        others += [] if opposites_elsewhere else _OPPOSITE.get(type(op), ())
        for other in others:
            ops = [*node.ops[:index], other(), *node.ops[index + 1 :]]
            yield place.change("comparison", node, ops=ops)


def _truth(node: ast.Constant, place: _Place) -> Iterator[_Edit]:
    if _is_constant(node, bool) and not place.tests(ast.While):
        yield place.put("constant", node, ast.Constant(not node.value))


def _slice(node: ast.Slice, place: _Place) -> Iterator[_Edit]:
    for field, default in (("lower", 0), ("upper", None), ("step", 1)):
        bound = getattr(node, field)
        if bound is None or _is_constant(bound, type(None)):
            continue
        if default is None or _number(bound) != default:
            yield place.change("slice", node, at=bound, **{field: None})
        if field != "step" and _number(bound) is None and not _has_offset(bound):
            more = ast.BinOp(bound, ast.Add(), ast.Constant(1))
            yield place.change("slice", node, at=bound, **{field: more})


def _if(node: ast.If, place: _Place) -> Iterator[_Edit]:
    if _only_raises(node):
        edit = place.swap("drop-statement", node, *(node.orelse or [ast.Pass()]))
        yield edit._replace(before=f"{_text(node)}: raise", after="pass")
    else:
        yield place.change("condition", node, test=_negated(node.test))


def _while(node: ast.While, place: _Place) -> Iterator[_Edit]:
    yield place.change("condition", node, test=ast.Constant(False))


def _if_expression(node: ast.IfExp, place: _Place) -> Iterator[_Edit]:
    yield place.change("condition", node, body=node.orelse, orelse=node.body)


def _comprehension(node: ast.comprehension, place: _Place) -> Iterator[_Edit]:
    for index, test in enumerate(node.ifs):
        others = node.ifs[:index] + node.ifs[index + 1 :]
        yield place.change("condition", node, at=test, ifs=others)


def _expression_statement(node: ast.Expr, place: _Place) -> Iterator[_Edit]:
    call = node.value
    if isinstance(call, ast.Call):
        if not (isinstance(call.func, ast.Attribute) and _is_awaited(call.func.value, place)):
            yield place.swap("drop-statement", node, ast.Pass())


def _assignment(node: ast.Assign | ast.AnnAssign, place: _Place) -> Iterator[_Edit]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if node.value is not None and all(isinstance(one, (ast.Attribute, ast.Subscript)) for one in targets):
        yield place.swap("drop-statement", node, ast.Pass())


def _jump(node: ast.Break | ast.Continue, place: _Place) -> Iterator[_Edit]:
    loop = place.loops[-1]
    is_only_end = isinstance(node, ast.Break) and isinstance(getattr(loop, "test", None), ast.Constant)
    if not is_only_end:
        yield place.swap("drop-statement", node, ast.Pass())


def _with(node: ast.With | ast.AsyncWith, place: _Place) -> Iterator[_Edit]:
    if all(item.optional_vars is None for item in node.items):
        yield place.swap("drop-statement", node, *node.body)._replace(after="its body alone")


def _call(node: ast.Call, place: _Place) -> Iterator[_Edit]:
    name = _last_name(node.func)
    if name not in _KEPT_CALLS and _is_chained(node, place):
        yield place.swap("drop-call", node, node.func.value)
    if name not in _KEPT_ORDER and not name.endswith(("Error", "Exception", "Warning")):
        order = [index for index, argument in enumerate(node.args) if not _is_text(argument)][:2]
        if len(order) == 2 and not any(isinstance(one, ast.Starred) for one in node.args[: order[1] + 1]):
            swapped = list(node.args)
            for index, other in zip(order, reversed(order), strict=True):
                swapped[index] = node.args[other]
            yield place.change("swap-arguments", node, args=swapped)
    for index, keyword in enumerate(node.keywords):
        is_switch = _is_constant(keyword.value, bool, type(None))
        is_default = name in _JOINS and keyword.arg in _DIM_KEYWORDS and _number(keyword.value) == 0
        if keyword.arg is not None and not is_switch and not is_default:
            others = node.keywords[:index] + node.keywords[index + 1 :]
            yield place.change("drop-keyword", node, at=keyword, keywords=others)


def _dim(node: ast.keyword, place: _Place) -> Iterator[_Edit]:
    """Move the first of the dims that a keyword names to a neighbour that the others leave free."""
    dims = _dims(node.value)
    moved = dims[0] + 1 if dims[0] == 0 or dims[0] < -1 else dims[0] - 1
    while moved in dims:
        moved += -1 if moved < 0 else 1
    value: ast.AST = _literal(moved)
    if isinstance(node.value, (ast.Tuple, ast.List)):
        value = type(node.value)([value, *node.value.elts[1:]], ast.Load())
    yield place.put("dim", node, ast.keyword(node.arg, value))


# What the operators ask about nodes


def _number(node: ast.AST | None) -> int | float | None:
    """Return the number that a literal stands for, with its sign, or None."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        is_literal = isinstance(node.operand, ast.Constant)
        return -number if is_literal and (number := _number(node.operand)) is not None else None
    return node.value if isinstance(node, ast.Constant) and type(node.value) in (int, float) else None


def _literal(number: int | float) -> ast.AST:
    return ast.UnaryOp(ast.USub(), ast.Constant(-number)) if number < 0 else ast.Constant(number)


def _other_numbers(number: int | float, place: _Place) -> list[int | float]:
    if isinstance(number, float):
        return [2 * number or 1.0] + [-number] * (number < 0)
    if number < 0:
        return [number - 1, -number]
    is_dropped = isinstance(place.owner, ast.Slice) and place.field != "upper"  # x[0:] is x[:], no step is 0
    return [2, 0] if number == 1 and not is_dropped else [number + 1]


def _dims(node: ast.AST) -> list[int]:
    """Return the integer literals of a dim or of a tuple of dims; none where one is not a literal."""
    dims = [_number(one) for one in (node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node])]
    return dims if all(isinstance(dim, int) for dim in dims) else []


def _negated(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _OPPOSITE:
        return ast.Compare(test.left, [_OPPOSITE[type(test.ops[0])][0]()], test.comparators)
    return ast.UnaryOp(ast.Not(), test)


def _only_raises(node: ast.If) -> bool:
    return len(node.body) == 1 and isinstance(node.body[0], ast.Raise)


def _has_offset(node: ast.AST) -> bool:
    """Whether the node is `n + 1` or alike, of which the constant's mutants are the neighbours."""
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))
    return is_sum and _number(node.right) is not None


def _is_chained(node: ast.Call, place: _Place) -> bool:
    """Whether the node is `value.method()` in an expression, and the value more than a module."""
    if node.args or node.keywords or not isinstance(node.func, ast.Attribute):
        return False
    if isinstance(place.owner, (ast.Expr, ast.withitem)):
        return False
    root = node.func.value
    while isinstance(root, ast.Attribute):
        root = root.value
    is_super = isinstance(root, ast.Call) and _last_name(root.func) == "super"
    return not is_super and not (isinstance(root, ast.Name) and root.id in place.imported)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or _is_constant(node, str)


def _is_constant(node: ast.AST, *kinds: type) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, kinds)


def _last_name(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _bound_names(statement: ast.stmt) -> set[str]:
    """Return the module-level names that a statement defines, assigns or fills."""
    if isinstance(statement, _DEFINITIONS):
        return {statement.name}
    stored = [one for one in ast.walk(statement) if isinstance(getattr(one, "ctx", None), ast.Store)]
    defined = {one.name for one in ast.walk(statement) if isinstance(one, _DEFINITIONS)}
    return defined.union(*map(_names, stored))


def _imported(module: ast.Module) -> frozenset[str]:
    imports = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return frozenset((one.asname or one.name).split(".")[0] for node in imports for one in node.names)


# From edits to mutants


def _mutants_of(top: ast.stmt, source: str, imported: frozenset[str]) -> Iterator[Mutant]:
    lines = source.split("\n")
    start = min([top.lineno, *(decorator.lineno for decorator in top.decorator_list)]) - 1
    place = _Place(top, "", None, top, "", False, (), imported)
    seen = {ast.unparse(top)}
    for edit in sorted(_walk(top, place), key=lambda edit: (edit.line, edit.column)):
        original = {field: getattr(edit.owner, field) for field in edit.changes}
        before = _text(edit.before)
        vars(edit.owner).update(edit.changes)
        after, text = _text(edit.after), ast.unparse(top)
        vars(edit.owner).update(original)
        if text not in seen and _compiles(text):
            seen.add(text)
            key = f"{edit.qualname}: {before} -> {after}"
            mutated = "\n".join([*lines[:start], text, *lines[top.end_lineno :]])
            yield Mutant(key, edit.qualname, top.name, edit.line, edit.operator, mutated)


def _compiles(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<mutant>", "exec")
        except (SyntaxError, ValueError):
            return False
    return True


def _text(node: ast.AST | _Default | str) -> str:
    """Write a node on one line, alike in every Python version; a compound statement as its header alone."""
    if isinstance(node, ast.stmt) and (hasattr(node, "body") or hasattr(node, "cases")):
        header = {field: [] if field in _BLOCKS else value for field, value in ast.iter_fields(node)}
        node = ast.copy_location(type(node)(**header), node)
    text = ast.unparse(node) if isinstance(node, ast.AST) else str(node)
    for pattern, same in _SPELLINGS:
        text = re.sub(pattern, same, text)
    return text.strip().removesuffix(":")


def _numbered(mutants: list[Mutant]) -> list[Mutant]:
    seen: Counter[str] = Counter()
    numbered = []
    for mutant in mutants:
        seen[mutant.key] += 1
        repeat = seen[mutant.key]
        numbered.append(replace(mutant, key=f"{mutant.key} #{repeat}") if repeat > 1 else mutant)
    return numbered


def _spread(mutants: list[Mutant], limit: int | None) -> list[Mutant]:
    if limit is None or len(mutants) <= limit:
        return mutants
    return [mutants[index * len(mutants) // limit] for index in range(limit)]


# Tables

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_SPELLINGS = (  # what `ast.unparse` writes differently in different versions
    (r"\s+", " "),
    (r"\'{3}|\"{3}|\"", "'"),  # the quotes around and in f-strings
    (r"\blambda :", "lambda:"),
    (
        r"\bfor \(([^()]+)\) in\b|^\(([^()]+)\)(?= = )",
        lambda found: f"for {found[1]} in" if found[1] else found[2],
    ),
)
_BLOCKS = {"body", "orelse", "finalbody", "handlers", "cases"}
_READABLE = (
    *(ast.stmt, ast.BinOp, ast.BoolOp, ast.Compare, ast.Call, ast.Subscript, ast.IfExp),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Dict, ast.NamedExpr),
)
_UNTOUCHED_NODES = {"Raise", "JoinedStr", "TemplateStr", "TypeAlias"}
_UNTOUCHED_FIELDS = {"annotation", "returns", "decorator_list", "type_params", "pattern", "msg"}

_SWAPPED = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Div, ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift},
}
_BOUNDARY = {ast.Lt: (ast.LtE,), ast.LtE: (ast.Lt,), ast.Gt: (ast.GtE,), ast.GtE: (ast.Gt,)}
_FLIP = {ast.Lt: (ast.Gt,), ast.Gt: (ast.Lt,)}
_OPPOSITE = {
    **{ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)},
    **{ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)},
}

_DIM_KEYWORDS = {"dim", "axis", "dims", "axes"}
_JOINS = {"cat", "concat", "stack"}  # their dim is 0 unless said otherwise
_KEPT_CALLS = {
    *("item", "numel", "dim", "size", "stride", "backward", "keys", "values", "items", "state_dict"),
    *("parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules", "children"),
    *("named_children", "__init__"),
}
_KEPT_ORDER = {
    *("isinstance", "issubclass", "getattr", "setattr", "hasattr", "super", "range", "print", "zip"),
    *("min", "max", "minimum", "maximum", "add", "mul", "dot", "logical_and", "logical_or", "logaddexp"),
    *("equal", "allclose", "isclose", "assert_close", "mse_loss", "l1_loss", "cosine_similarity"),
    *("transpose", "swapaxes", "swapdims"),
}

_OPERATORS: dict[type[ast.AST], Callable[..., Iterator[_Edit]]] = {
    **dict.fromkeys((ast.BinOp, ast.BoolOp, ast.AugAssign), _operation),
    **dict.fromkeys((ast.Assign, ast.AnnAssign), _assignment),
    **dict.fromkeys((ast.Break, ast.Continue), _jump),
    **dict.fromkeys((ast.With, ast.AsyncWith), _with),
    **{ast.UnaryOp: _unary, ast.Compare: _compare, ast.Constant: _truth, ast.Slice: _slice, ast.Call: _call},
    **{ast.If: _if, ast.While: _while, ast.IfExp: _if_expression, ast.comprehension: _comprehension},
    ast.Expr: _expression_statement,
}
