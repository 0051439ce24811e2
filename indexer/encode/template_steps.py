"""A chat template is a program: how long it may run, and what it may not compute in one step.

The sandbox of jinja2 keeps a template from the machine, not from running without end: nested loops, and macros that
call themselves twice, take as long as they like. Steps are counted: a template is refused on every machine, or on none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from threading import Lock
from types import FrameType
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

MOST_STEPS = 10_000_000
"""Lines of a compiled template, and calls, for one conversation; common templates take some hundred a message."""
LONGEST_REPEAT = 1 << 20
"""Of what `*` makes of a text or a list."""
MOST_BITS = 4096
"""Of a product or a power."""
_GUARDED = frozenset({"*", "**"})
_FILE = "<template>"
"""What jinja2 calls the file of a template that comes from a string."""


@contextmanager
def bounded(tokenizer: Any, tools: Any) -> Iterator[None]:
    """The chat template that ``tokenizer`` takes for ``tools`` is rendered inside in at most MOST_STEPS steps, none of
    which makes much of little: jinja2.TemplateError otherwise.
    """
    guarded_template(tokenizer.get_chat_template(tools=tools))
    before = sys.gettrace()  # of a debugger, or of what measures coverage
    sys.settrace(_Counter().see)
    try:
        yield
    finally:
        sys.settrace(before)


class _Counter:
    """Counts lines of the template, and calls of anything."""

    def __init__(self) -> None:
        self._steps = 0

    def see(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise jinja2.TemplateRuntimeError(f"it takes more than {MOST_STEPS:,} steps")
        return self.see if frame.f_code.co_filename == _FILE else None


def guarded_template(source: str) -> jinja2.Template:
    """The template that transformers compiles of ``source`` and keeps for the next time, with guarded operators."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    with _compiling:
        # Constants are computed while the template is compiled, before there is an environment to guard.
        SandboxedEnvironment.intercepted_binops = _GUARDED
        try:
            template: jinja2.Template = _compile_jinja_template(source)
        finally:
            SandboxedEnvironment.intercepted_binops = frozenset()
        environment: Any = template.environment
        if environment.intercepted_binops != _GUARDED:
            environment.intercepted_binops, environment.call_binop = _GUARDED, _computed
            again = environment.from_string(source)  # it may have been compiled without us
            template.root_render_func, template.blocks = again.root_render_func, again.blocks
    return template


_compiling = Lock()


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
