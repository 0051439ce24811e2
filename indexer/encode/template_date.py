"""The date that a chat template writes: fixed once for everything that is made of a corpus, never the clock's.

Templates such as those of Llama 3 print ``strftime_now("%d %b %Y")``. Rows of two days would differ, and a query from
the rows that it is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from typing import Any

CLOCK = "strftime_now"
"""What transformers calls the clock of its templates."""


def date_for(tokenizer: Any, fixed: str | None) -> str | None:
    """The date (ISO 8601) for the chat template of ``tokenizer``: ``fixed``, by default today's; None where the
    template asks for none.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None or CLOCK not in json.dumps(template):
        return None
    return fixed or date.today().isoformat()


@contextmanager
def clock_at(tokenizer: Any, day: str | None, tools: Any) -> Iterator[None]:
    """The clock of the template that ``tokenizer`` takes for ``tools`` stands at midnight of ``day``; None: it is left
    alone.

    The clock is a global of the environment in which transformers compiled the template. A variable of its name would
    not do: transformers makes plain data of all variables.
    """
    if day is None:
        yield
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    midnight = datetime.combine(date.fromisoformat(day), time())
    names = _compile_jinja_template(tokenizer.get_chat_template(tools=tools)).environment.globals
    clock = names[CLOCK]
    names[CLOCK] = midnight.strftime
    try:
        yield
    finally:
        names[CLOCK] = clock  # the compiled template is the user's, too
