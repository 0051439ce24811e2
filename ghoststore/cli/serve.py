"""``ghoststore serve``."""

from __future__ import annotations

from ghoststore.cli import options
from ghoststore.lazy import load
from ghoststore.settings.serve import ExplorerOptions


@options.command(ExplorerOptions)
def command(keywords: options.Keywords) -> None:
    """The explorer: a page to ask a store and look at it, and the same as JSON, on this machine alone.

    It prints the address, with a token that is new each time. It reads the store, and changes nothing. Ctrl-C ends it.

    \b
      ghoststore serve --store ./store
      ghoststore serve --store ./store --port 8321
      ghoststore serve --store ./store --store small=/data/other/store
    """
    from ghoststore.cli.terminal import say
    from ghoststore.processes import share_memory_among_threads

    share_memory_among_threads()
    explorer = load("serve")(**keywords)
    say(explorer.url)
    explorer.run()
