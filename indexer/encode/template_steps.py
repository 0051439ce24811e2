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
from jinja2.sandbox import SandboxedEnvironment

MOST_STEPS = 10_000_000
"""Most loop iterations and macro calls for one conversation. Common templates take a few for each message."""
LONGEST_REPEAT = 1 << 20
"""Longest text or list that `*` may make."""
MOST_BITS = 4096
"""Most bits of a product or a power."""
_OPERATORS = frozenset({"*", "**"})
_compiling = Lock()


@contextmanager
def bounded(tokenizer: Any, tools: Any) -> Iterator[None]:
    """While open, the chat template that ``tokenizer`` uses for ``tools`` raises jinja2.TemplateError if it takes more
    than MOST_STEPS steps, or makes a large value in one step.
    """
    environment: Any = _counting_template(tokenizer.get_chat_template(tools=tools)).environment
    environment.step = _Counter().step
    yield


class _Counter:
    def __init__(self) -> None:
        self._left = MOST_STEPS

    def step(self) -> None:
        self._left -= 1
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
        try:
            template: jinja2.Template = _compile_jinja_template(source)
        finally:
            SandboxedEnvironment.intercepted_binops = frozenset()
        environment: Any = template.environment
        if not hasattr(environment, "step"):
            environment.intercepted_binops, environment.call_binop = _OPERATORS, _computed
            environment._compile, environment.step = _with_steps, _Counter().step
            counting = environment.from_string(source)
            template.root_render_func, template.blocks = counting.root_render_func, counting.blocks
    return template


class _Steps(ast.NodeTransformer):
    """Inserts a call of ``environment.step`` at the beginning of every loop body and every function."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, ast.parse("environment.step()").body[0])
        return node

    visit_For = visit_While = visit_FunctionDef = _counted


def _with_steps(source: str, filename: str) -> CodeType:
    """Replaces jinja2's ``_compile``: compiles the Python ``source`` of a template, with steps inserted."""
    tree = ast.fix_missing_locations(_Steps().visit(ast.parse(source, filename)))
    return compile(tree, filename, "exec")


def _computed(context: Any, operator: str, left: Any, right: Any) -> Any:
    """``left`` operator ``right``. jinja2.TemplateError if the result is a large number, or a long text or list."""
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, Sized) and isinstance(times, int) and len(sequence) * times > LONGEST_REPEAT:
            raise jinja2.TemplateRuntimeError(f"it repeats something {times:,} times")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise jinja2.TemplateRuntimeError(f"it computes a number of more than {MOST_BITS:,} bits")
    return left**right if operator == "**" else left * right
