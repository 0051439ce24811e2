"""``ghoststore info``."""

from __future__ import annotations

from typing import Any

from ghoststore.cli import options
from ghoststore.lazy import load
from ghoststore.settings.shared import AsJson
from ghoststore.settings.store import InfoOptions


@options.command(InfoOptions, AsJson)
def command(keywords: options.Keywords, printing: AsJson) -> None:
    """What a store holds: its parts and training runs, how far they are, their settings."""
    from ghoststore.cli.terminal import print_json

    store_info = load("info")(**keywords)
    options.log_result(store_info)
    if printing.as_json:
        print_json(store_info.to_json())
    elif keywords.keys() & {"part", "run"}:
        for part in store_info.parts:
            _print_part(part)
        for run in store_info.runs:
            _print_run(run)
    else:
        if store_info.parts or not store_info.runs:
            _print_parts(store_info)
        if store_info.runs:
            _print_runs(store_info)


def _print_parts(store_info: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_table

    columns = [
        ("part", False),
        ("rows", True),
        ("usable", True),
        ("tokens", True),
        ("D", True),
        ("dtype", False),
        ("bytes a row", True),
        ("on disk", True),
        ("checkpoint", False),
    ]
    rows = []
    for part in store_info.parts:
        usable = part.statuses.get("ok", 0) + part.statuses.get("truncated", 0)
        whole = "" if part.complete else " of a stream" if part.open else f" of {part.rows:,}"
        share = f"{part.committed:,}{whole}"
        rows.append(
            [
                part.name,
                share,
                f"{usable:,}",
                f"{part.tokens:,}",
                f"{part.dimension:,}",
                part.dtype,
                f"{part.row_bytes:,}",
                human_bytes(part.bytes),
                part.manifest["source"]["checkpoint"],
            ]
        )
    print_table(f"{store_info.store}: {len(store_info.parts)} part(s)", columns, rows)


def _rows(part: Any) -> str:
    if part.open:
        return f"{part.committed:,} committed; the end of the stream was not seen yet"
    return f"{part.committed:,} of {part.rows:,} committed"


def _corpus(source: dict[str, Any]) -> str:
    """Where the corpus lies: of a stream of the hub its name there."""
    return str(source.get("stream", source["data"]))


def _print_part(part: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts
    from ghoststore.store.part.fidelity import fidelity_line

    manifest = part.manifest
    projection, corpus = manifest["projection"], manifest["corpus"]
    numbers = f", blocks of {projection['kronecker_dimension']:,} numbers in all"
    by = "layer by layer" if projection["compress_by"] == "layer" else "all layers together"
    step = numbers + (f", sketched to {projection['compress']:,} {by}" if projection["compress"] else "")
    facts = [
        ("rows", _rows(part)),
        *((f"  {status.replace('_', ' ')}", f"{count:,}") for status, count in part.statuses.items()),
        ("tokens", f"{part.tokens:,}"),
        ("on disk", human_bytes(part.bytes)),
        ("vectors", f"{part.dimension:,} × {part.dtype}"),
        ("bytes a row", f"{part.row_bytes:,}, ids and texts aside"),
        ("projection", f"{projection['kind']}, seed {projection['seed']}{step}"),
        *_learned(projection),
        ("layers", f"{len(manifest['layers'])} ({', '.join(projection['layers'])})"),
        ("  cover", f"{manifest['coverage']['share']:.1%} of the model's parameters"),
        ("checkpoint", f"{manifest['source']['checkpoint']} ({manifest['checkpoint'].get('architecture')})"),
        ("  weights", str(manifest["checkpoint"].get("fingerprint"))),
        ("corpus", f"{_corpus(manifest['source'])} ({manifest['source']['form']}, {corpus['samples']:,} samples)"),
        ("  content", corpus["fingerprint"]),
        *_repeated(part),
        ("domains", ", ".join(corpus["domains"] or []) or "none"),
        *(
            [("kept fields", ", ".join(f"{name} ({kind})" for name, kind in part.fields.items()))]
            if part.fields
            else []
        ),
        ("tokens a row", f"at most {manifest['tokens']['max_length']}, longer: {manifest['tokens']['overlong']}"),
        ("loss", f"{manifest['loss']['reduction']} of {manifest['loss']['definition']}"),
        *((f"index {index['name']}", _index(index)) for index in part.indexes),
        *(("fidelity", fidelity_line(measured)) for measured in part.fidelity),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest["software"].items())),
    ]
    print_facts(part.name, facts)


def _repeated(part_or_run: Any) -> list[tuple[str, str]]:
    from ghoststore.corpus.repeated import repeated_words

    words = repeated_words(part_or_run.repeated_ids)
    return [("  ids", words)] if words else []


def _learned(projection: dict[str, Any]) -> list[tuple[str, str]]:
    from ghoststore.store.part.metric import part_metric

    metric, calibration = part_metric(projection), projection["calibration"]
    if calibration is None:
        return [] if metric is None else [("  metric", metric)]
    samples = f"{calibration['samples']:,} samples"
    if metric is None:
        return [("  sizes and sides", f"learned from {samples}")]
    return [("  metric", f"{metric} (from {samples}, damping {projection['damping']:g})")]


def _index(index: dict[str, Any]) -> str:
    from ghoststore.cli.terminal import human_bytes

    if index["state"] != "current":
        return f"{index['state']}: {index['problem']}"
    recalls = ", ".join(f"{recall['at_10']:.3f} ({kind})" for kind, recall in index["recall"].items())
    return f"{index['factory']} by {index['metric']}, {human_bytes(index['bytes'])}, recall@10 {recalls}"


def _print_runs(store_info: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_table

    columns = [
        ("run", False),
        ("steps", True),
        ("ranks × batch", True),
        ("rows", True),
        ("train loss", True),
        ("val loss", True),
        ("negative", True),
        ("tokens", True),
        ("on disk", True),
    ]
    rows = []
    for run in store_info.runs:
        share = f"{run.committed:,}" + ("" if run.complete else f" of {run.steps:,}")
        rows.append(
            [
                run.name,
                share,
                f"{run.ranks} × {run.batch}",
                f"{run.rows:,}",
                _number(run.train_loss),
                _number(run.val_loss),
                _share(run.negative),
                f"{run.tokens:,}",
                human_bytes(run.bytes),
            ]
        )
    print_table(f"{store_info.store}: {len(store_info.runs)} run(s)", columns, rows)


def _value(value: Any) -> str:
    """An entry of a manifest as text; of a dictionary, such as a model's configuration, its fingerprint or size."""
    if not isinstance(value, dict):
        return str(value)
    return str(value["fingerprint"]) if "fingerprint" in value else f"{len(value)} fields"


def _print_run(run: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts

    storage = run.manifest["storage"]
    saved = storage.get("save_steps", storage["span_steps"])
    facts = [
        ("steps", f"{run.committed:,} of {run.steps:,} committed, {saved:,} at a time"),
        ("samples a step", f"{run.ranks} × {run.batch} (ranks × batch){_choosing(run)}"),
        *((f"  {status.replace('_', ' ')}", f"{count:,}") for status, count in run.statuses.items()),
        ("rows", f"{run.rows:,}"),
        *_repeated(run),
        ("domains", ", ".join(run.manifest["corpus"]["domains"] or []) or "none"),
        ("train loss", _number(run.train_loss)),
        ("val loss", _number(run.val_loss)),
        ("negative scores", _share(run.negative)),
        ("val groups", ", ".join(storage["groups"]) or "none"),
        ("blocks", ", ".join(storage["blocks"]) or "none"),
        ("gradients", _gradients(run.gradients)),
        ("tokens", f"{run.tokens:,}"),
        ("on disk", human_bytes(run.bytes)),
    ]
    for section in ("model", "val", "training", "scoring", "source"):
        facts += [(f"{section}.{name}", _value(value)) for name, value in run.manifest[section].items()]
    facts.append(("made with", ", ".join(f"{name} {version}" for name, version in run.manifest["software"].items())))
    print_facts(run.name, facts)


def _gradients(kept: dict[str, Any] | None) -> str:
    from ghoststore.cli.terminal import human_bytes

    if kept is None:
        return "none kept"
    which = "every step" if kept["every"] == 1 else f"one step in {kept['every']:,}"
    size = human_bytes(kept["step_bytes"])
    return f"of {which}: {kept['steps']:,} steps, {kept['dimension']:,} numbers as {kept['dtype']}, {size} a step"


def _choosing(run: Any) -> str:
    """How a step chooses among its samples; empty if it does not."""
    choosing = run.manifest["scoring"].get("choosing")
    if choosing is None:
        return ""
    kept = "" if choosing["keep"] is None else f", {choosing['keep']} kept"
    return f": candidates, {choosing['policy']}{kept}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
