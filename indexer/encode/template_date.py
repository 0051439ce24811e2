"""The date that a chat template writes. It is fixed for all rows of a part, and does not follow the clock.

Templates such as those of Llama 3 print ``strftime_now("%d %b %Y")``. With the real clock, rows built on two days would
differ, and a query would differ from the rows that it is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from typing import Any

CLOCK = "strftime_now"
"""The name of the clock function in templates of transformers."""


def date_for(tokenizer: Any, fixed: str | None) -> str | None:
    """The date (ISO 8601) for the chat template of ``tokenizer``: ``fixed``, or today's; None if the template uses no
    date.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None or CLOCK not in json.dumps(template):
        return None
    return fixed or date.today().isoformat()


@contextmanager
def clock_at(tokenizer: Any, day: str | None, tools: Any) -> Iterator[None]:
    """While open, the clock of the chat template (the one that ``tokenizer`` uses for ``tools``) shows midnight of
    ``day``. With None it does not change.

    The clock is a global of the environment in which transformers compiled the template. A variable with its name would
    not work, because transformers accepts only plain data as variables.
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
        names[CLOCK] = clock  # the user shares the compiled template
