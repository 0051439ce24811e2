"""A chat template is a program: how long it may run, and what it may not compute in one step.

The sandbox of jinja2 keeps a template from the machine, not from running without end: nested loops, and macros that
call themselves twice, take as long as they like. So the Python that jinja2 makes of a template counts its turns of
loops and its calls: a template is refused on every machine, or on none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from threading import Lock
from types import CodeType
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

MOST_STEPS = 10_000_000
"""Turns of loops, and calls of macros, for one conversation; common templates take some for each message."""
LONGEST_REPEAT = 1 << 20
"""Of what `*` makes of a text or a list."""
MOST_BITS = 4096
"""Of a product or a power."""
_OPERATORS = frozenset({"*", "**"})
_compiling = Lock()


@contextmanager
def bounded(tokenizer: Any, tools: Any) -> Iterator[None]:
    """The chat template that ``tokenizer`` takes for ``tools`` is rendered inside in at most MOST_STEPS steps, none of
    which makes much of little: jinja2.TemplateError otherwise.
    """
    environment: Any = _guarded(tokenizer.get_chat_template(tools=tools)).environment
    environment.step = _Counter().step
    yield


class _Counter:
    def __init__(self) -> None:
        self._left = MOST_STEPS

    def step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise jinja2.TemplateRuntimeError(f"it takes more than {MOST_STEPS:,} steps")


def _guarded(source: str) -> jinja2.Template:
    """The template that transformers compiles of ``source`` and keeps for the next time, compiled anew in its place: it
    counts its steps, and its operators are :func:`_computed`.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    with _compiling:
        # Constants are computed while a template is compiled, and its environment is made by the same function.
        SandboxedEnvironment.intercepted_binops = _OPERATORS
        try:
            template: jinja2.Template = _compile_jinja_template(source)
        finally:
            SandboxedEnvironment.intercepted_binops = frozenset()
        environment: Any = template.environment
        if not hasattr(environment, "step"):
            environment.intercepted_binops, environment.call_binop = _OPERATORS, _computed
            environment._compile, environment.step = _with_steps, _Counter().step
            ours = environment.from_string(source)
            template.root_render_func, template.blocks = ours.root_render_func, ours.blocks
    return template


class _Steps(ast.NodeTransformer):
    """Has every turn of a loop, and every function, begin with a step."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, ast.parse("environment.step()").body[0])
        return node

    visit_For = visit_While = visit_FunctionDef = _counted


def _with_steps(source: str, filename: str) -> CodeType:
    """In place of jinja2's own: the code of the Python ``source`` that it made of a template."""
    tree = ast.fix_missing_locations(_Steps().visit(ast.parse(source, filename)))
    return compile(tree, filename, "exec")


def _computed(context: Any, operator: str, left: Any, right: Any) -> Any:
    """``left`` operator ``right``; jinja2.TemplateError where that is a large number, or a long text or list."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Sized) and isinstance(other, int) and len(one) * other > LONGEST_REPEAT:
            raise jinja2.TemplateRuntimeError(f"it repeats something {other:,} times")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise jinja2.TemplateRuntimeError(f"it computes a number of more than {MOST_BITS:,} bits")
    return left**right if operator == "**" else left * right
