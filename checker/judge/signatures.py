"""Whether the learner's functions and classes can still be called as the stub says."""

from __future__ import annotations

import ast
import inspect
from typing import Any


def signatures(source: str) -> dict[str, list[tuple[str, bool]]]:
    """For each top-level function or class (its __init__): the parameters as (name, has a default), without self."""
    found = {}
    for node in ast.parse(source).body:
        target = node
        if isinstance(node, ast.ClassDef):
            target = next(
                (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None
            )
        if isinstance(target, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = _parameters(target, skip_self=isinstance(node, ast.ClassDef))
    return found


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, *, skip_self: bool) -> list[tuple[str, bool]]:
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [False] * (len(positional) - len(args.defaults)) + [True] * len(args.defaults)
    both = list(zip((arg.arg for arg in positional), defaults, strict=True))[1 if skip_self else 0 :]
    return both + [
        (arg.arg, default is not None) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]


def wrong_arguments(name: str, thing: Any, wanted: list[tuple[str, bool]]) -> str:
    """A sentence if `thing` cannot be called like the stub's version, else ''."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return ""
    have = {p.name: p.default is not p.empty for p in parameters}
    names = [p for p, _ in wanted]
    same_order = [p for p in have if p in names] == names
    extra_needed = [p for p, default in have.items() if p not in names and not default]
    lost_default = [p for p, default in wanted if default and not have.get(p, True)]
    if same_order and not extra_needed and not lost_default:
        return ""
    mine = ", ".join(f"{p}=..." if default else p for p, default in have.items())
    theirs = ", ".join(f"{p}=..." if default else p for p, default in wanted)
    return f"{name} takes ({theirs}) in the stub, but yours takes ({mine}): put the arguments back"
