"""``ghoststore tokenize``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.settings.build import TokenizeOptions
from ghoststore.settings.shared import Printing


@options.command(TokenizeOptions, Printing, first="data tokenizer out domains max_samples workers")
def command(keywords: options.Keywords, printing: Printing) -> None:
    """The tokens of every sample of a corpus, memory-mapped, with id, domain and place in the corpus.

    Run it again to continue: what is committed is not tokenized twice. The folder is a corpus, too: build and query
    take it as --data and --val-set.

    \b
      ghoststore tokenize --data train.jsonl --tokenizer ./model --out ./shards
    """
    options.run("tokenize", keywords, printing, _print)


def _print(report: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts, print_table

    columns = [("domain", False), ("samples", True), ("tokens", True), ("share", True)]
    rows = [
        [
            domain.domain if domain.domain is not None else "(none)",
            f"{domain.samples:,}",
            f"{domain.tokens:,}",
            f"{domain.tokens / max(report.tokens, 1):.1%}",
        ]
        for domain in report.domains
    ]
    rows.append(["all", f"{report.samples:,}", f"{report.tokens:,}", ""])
    print_table(report.out, columns, rows)
    there = f" ({report.resumed_samples:,} samples were there)" if report.resumed_samples else ""
    facts = [
        ("shards", f"{report.shards:,}{there}"),
        ("on disk", f"{human_bytes(report.bytes_on_disk)}, {report.token_dtype}"),
    ]
    if report.empty_samples:
        facts.append(("empty samples", f"{report.empty_samples:,} (they keep their place)"))
    seconds = report.seconds["tokenize"]
    rate = f" ({report.written_tokens / seconds:,.0f} tokens/s by {report.workers} process(es))"
    facts.append(("time", f"{report.seconds['total']:,.1f} s{rate if report.written_tokens else ''}"))
    print_facts("tokenized", facts)
