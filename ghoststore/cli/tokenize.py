"""``ghoststore tokenize``."""

from __future__ import annotations

from typing import Any

import click

from ghoststore.cli import options


@click.command("tokenize", short_help="a corpus to token shards")
@click.option(
    "--data", required=True, metavar="PATH", help="Corpus: jsonl, gz, zst, parquet, csv, txt, a folder, or -."
)
@click.option("--tokenizer", required=True, metavar="PATH", help="Folder with a saved tokenizer, or a hub id.")
@click.option("--out", required=True, metavar="PATH", help="Folder of the shards: a new one, or one to continue.")
@click.option("--domain", "domains", metavar="NAME", multiple=True, help="Only samples of this domain; repeatable.")
@click.option("--max-samples", type=int, help="Only the first samples (of those domains).")
@click.option("--shard-samples", type=int, help="Samples committed together (default: 4096).")
@click.option(
    "--workers",
    type=int,
    metavar="N",
    help="Processes (default: one for every 16 MiB of text, at most one a core). The result is the same.",
)
@options.fields
@options.common
def command(**values: Any) -> None:
    """The tokens of every sample of a corpus, memory-mapped, with id, domain and place in the corpus.

    Run it again to continue: what is committed is not tokenized twice. The folder is a corpus, too: build and query
    take it as --data and --val-set.

    \b
      ghoststore tokenize --data train.jsonl --tokenizer ./model --out ./shards
    """
    from ghoststore.cli.terminal import listener, print_json
    from ghoststore.lazy import load

    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    report = load("tokenize")(progress=listener(quiet), **options.take_fields(values))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)


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
