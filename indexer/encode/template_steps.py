"""Limits for chat templates, which are programs: how long they may run, and how much they may compute in one step.

The sandbox of jinja2 protects the machine, but it does not stop a template that runs forever: nested loops, and macros
that call themselves twice, take any time. So the Python code that jinja2 makes of a template is changed to count loop
iterations and calls. The limit is a number of steps, not a time, so that all machines refuse the same templates.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from threading import Lock
from types import CodeType
from typing import Any

import jinja2
from jinja2.nodes import EvalContext, Filter, Impossible
from jinja2.sandbox import SandboxedEnvironment

from indexer.encode.template_texts import LONGEST_REPEAT, Room, guarded

MOST_STEPS = 10_000_000
"""Turns of loops, and calls of macros, for one conversation; common templates take some for each message."""
MOST_BITS = 4096
"""Of a product or a power."""
_OPERATORS = frozenset({"*", "**", "+", "%"})
_MADE = {"str": "text", "str_join": "joined", "markup_join": "joined", "concat": "joined"}
"""Functions that make a text in the Python of a template, and the methods of its room that take their place."""
_compiling = Lock()


@contextmanager
def bounded(tokenizer: Any, tools: Any) -> Iterator[None]:
    """The chat template that ``tokenizer`` takes for ``tools`` is rendered inside in at most MOST_STEPS steps, none of
    which makes much of little, and makes at most MOST_TEXT characters: jinja2.TemplateError otherwise.
    """
    environment: Any = _counting_template(tokenizer.get_chat_template(tools=tools)).environment
    environment.step = _Counter().step
    environment.room = Room(environment.step)
    yield


class _Counter:
    def __init__(self) -> None:
        self._left = MOST_STEPS

    def step(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise jinja2.TemplateRuntimeError(f"it takes more than {MOST_STEPS:,} steps")


def _counting_template(source: str) -> jinja2.Template:
    """The template that transformers compiles from ``source`` and caches, changed in place: it counts its steps, and
    its operators are :func:`_computed`.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    with _compiling:
        # Set on the class, because compiling computes constants, in an environment that the same function makes.
        SandboxedEnvironment.intercepted_binops = _OPERATORS
        computed, Filter.as_const = Filter.as_const, _not_yet  # type: ignore[method-assign,assignment]
        try:
            template: jinja2.Template = _compile_jinja_template(source)
        finally:
            SandboxedEnvironment.intercepted_binops = frozenset()
            Filter.as_const = computed  # type: ignore[method-assign]
        environment: Any = template.environment
        if not hasattr(environment, "step"):
            environment.intercepted_binops, environment.call_binop = _OPERATORS, _computed
            environment._compile, environment.step = _with_steps, _Counter().step
            environment.room = Room(environment.step)
            environment.optimized, environment.call = False, _calling(environment, environment.call)
            for name, function in environment.filters.items():
                environment.filters[name] = guarded(name, function, lambda: environment.room)
            counting = environment.from_string(source)
            template.root_render_func, template.blocks = counting.root_render_func, counting.blocks
    return template


def _not_yet(node: Filter, context: EvalContext | None = None) -> Any:
    """Of a filter of constants: it is computed when the template is rendered, with a guard."""
    raise Impossible


def _calling(environment: Any, call: Any) -> Any:
    """``environment.call``, estimated before and counted after."""

    def guard(context: Any, function: Any, *values: Any, **named: Any) -> Any:
        environment.room.called(function, values, named)
        return environment.room.charged(call(context, function, *values, **named))

    return guard


class _Steps(ast.NodeTransformer):
    """Has every turn of a loop, and every function, begin with a step; and what makes a text ask for room."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, ast.parse("environment.step()").body[0])
        return node

    visit_For = visit_While = visit_FunctionDef = _counted

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in _MADE:
            room = ast.parse(f"environment.room.{_MADE[name]}", mode="eval").body
            return ast.Call(room, node.args if name == "str" else [node.func, *node.args], [])
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.slice, ast.Slice) or not isinstance(node.ctx, ast.Load):
            return node
        return ast.Call(ast.parse("environment.room.charged", mode="eval").body, [node], [])

    def visit_Yield(self, node: ast.Yield) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None:
            node.value = ast.Call(ast.parse("environment.room.charged", mode="eval").body, [node.value], [])
        return node


def _with_steps(source: str, filename: str) -> CodeType:
    """Replaces jinja2's ``_compile``: compiles the Python ``source`` of a template, with steps inserted."""
    tree = ast.fix_missing_locations(_Steps().visit(ast.parse(source, filename)))
    return compile(tree, filename, "exec")


def _computed(context: Any, operator: str, left: Any, right: Any) -> Any:
    """``left`` operator ``right``; jinja2.TemplateError where that is a large number, or a long text or list."""
    room: Room = context.environment.room
    if operator in ("+", "%"):
        return room.added(left, right) if operator == "+" else room.formatted(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Sized) and isinstance(other, int) and len(one) * other > LONGEST_REPEAT:
            raise jinja2.TemplateRuntimeError(f"it repeats something {other:,} times")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise jinja2.TemplateRuntimeError(f"it computes a number of more than {MOST_BITS:,} bits")
    return left**right if operator == "**" else room.charged(left * right)
