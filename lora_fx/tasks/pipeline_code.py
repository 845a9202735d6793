"""What the code of a pipeline's class says of its components: with what it calls them."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator


@functools.cache
def passes(kind: object, component: str, word: str) -> bool:
    """Whether a pipeline gives a component an argument whenever it calls it.

    Its code says so: all of its calls have the word, with a value that is no constant but True, and
    that no line sets to None. A text encoder that no call names is called in turn with the others,
    as ``text_encoder``.

    Args:
        kind: the class of a pipeline; of anything else, nothing is known.
        component: a name, such as ``"unet"``.
        word: of the argument.
    """
    if not inspect.isclass(kind):
        return False
    nodes = list(_nodes(kind))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    own = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == component]
    if not own and component.startswith("text_encoder"):
        own = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "text_encoder"]
    given = [next((k.value for k in call.keywords if k.arg == word), None) for call in own]
    unset = set(_set_to_none(nodes))
    return bool(given) and all(value is not None and _says(value, unset) for value in given)


def _says(value: ast.expr, unset: set[str]) -> bool:
    if isinstance(value, ast.Constant):
        return value.value is True
    return not (isinstance(value, ast.Name) and value.id in unset)


def _set_to_none(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        value = node.value if isinstance(node, ast.Assign) else None
        if isinstance(node, ast.Assign) and isinstance(value, ast.Constant) and value.value is None:
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _nodes(kind: type) -> Iterator[ast.AST]:
    for base in kind.__mro__:
        if base.__module__.startswith("diffusers."):
            yield from ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base))))
