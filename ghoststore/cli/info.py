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

    found = load("info")(**keywords)
    options.report(found)
    if printing.as_json:
        print_json(found.to_json())
    elif keywords.keys() & {"part", "run"}:
        for one in found.parts:
            _print_part(one)
        for one in found.runs:
            _print_run(one)
    else:
        if found.parts or not found.runs:
            _print_parts(found)
        if found.runs:
            _print_runs(found)


def _print_parts(found: Any) -> None:
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
    for part in found.parts:
        usable = part.statuses.get("ok", 0) + part.statuses.get("truncated", 0)
        share = f"{part.committed:,}" + ("" if part.complete else f" of {part.rows:,}")
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
    print_table(f"{found.store}: {len(found.parts)} part(s)", columns, rows)


def _print_part(part: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts
    from ghoststore.store.part.fidelity import fidelity_line

    manifest = part.manifest
    projection, corpus = manifest["projection"], manifest["corpus"]
    numbers = f", blocks of {projection['kronecker_dimension']:,} numbers in all"
    by = "layer by layer" if projection["compress_by"] == "layer" else "all layers together"
    step = numbers + (f", sketched to {projection['compress']:,} {by}" if projection["compress"] else "")
    facts = [
        ("rows", f"{part.committed:,} of {part.rows:,} committed"),
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
        ("corpus", f"{manifest['source']['data']} ({manifest['source']['form']}, {corpus['samples']:,} samples)"),
        ("  content", corpus["fingerprint"]),
        *_repeated(part),
        ("domains", ", ".join(corpus["domains"] or []) or "none"),
        ("tokens a row", f"at most {manifest['tokens']['max_length']}, longer: {manifest['tokens']['overlong']}"),
        ("loss", f"{manifest['loss']['reduction']} of {manifest['loss']['definition']}"),
        *((f"index {one['name']}", _index(one)) for one in part.indexes),
        *(("fidelity", fidelity_line(one)) for one in part.fidelity),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest["software"].items())),
    ]
    print_facts(part.name, facts)


def _repeated(one: Any) -> list[tuple[str, str]]:
    from ghoststore.corpus.repeated import repeated_words

    words = repeated_words(one.repeated_ids)
    return [("  ids", words)] if words else []


def _learned(projection: dict[str, Any]) -> list[tuple[str, str]]:
    if projection["optimizer_state"]:
        return [("  metric", "of an optimizer state (--optimizer-state)")]
    if projection["calibration"] is None:
        return []
    sample = f"learned from {projection['calibration']['samples']:,} samples"
    if projection["precondition"] == "none":
        return [("  sizes and sides", sample)]
    return [("  metric", f"preconditioned ({projection['precondition']}, damping {projection['damping']:g}), {sample}")]


def _index(one: dict[str, Any]) -> str:
    from ghoststore.cli.terminal import human_bytes

    if one["state"] != "current":
        return f"{one['state']}: {one['problem']}"
    recall = ", ".join(f"{found['at_10']:.3f} ({kind})" for kind, found in one["recall"].items())
    return f"{one['factory']} by {one['metric']}, {human_bytes(one['bytes'])}, recall@10 {recall}"


def _print_runs(found: Any) -> None:
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
    for run in found.runs:
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
    print_table(f"{found.store}: {len(found.runs)} run(s)", columns, rows)


def _said(value: Any) -> str:
    """An entry of a manifest; of one with entries (a model's configuration) how many there are: --json has them."""
    if not isinstance(value, dict):
        return str(value)
    return str(value["fingerprint"]) if "fingerprint" in value else f"{len(value)} fields"


def _print_run(run: Any) -> None:
    from ghoststore.cli.terminal import human_bytes, print_facts

    storage = run.manifest["storage"]
    saved = storage.get("save_steps", storage["span_steps"])
    facts = [
        ("steps", f"{run.committed:,} of {run.steps:,} committed, {saved:,} at a time"),
        ("samples a step", f"{run.ranks} × {run.batch} (ranks × batch){_chosen(run)}"),
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
        facts += [(f"{section}.{name}", _said(value)) for name, value in run.manifest[section].items()]
    facts.append(("made with", ", ".join(f"{name} {version}" for name, version in run.manifest["software"].items())))
    print_facts(run.name, facts)


def _gradients(kept: dict[str, Any] | None) -> str:
    from ghoststore.cli.terminal import human_bytes

    if kept is None:
        return "none kept"
    which = "every step" if kept["every"] == 1 else f"one step in {kept['every']:,}"
    size = human_bytes(kept["step_bytes"])
    return f"of {which}: {kept['steps']:,} steps, {kept['dimension']:,} numbers as {kept['dtype']}, {size} a step"


def _chosen(run: Any) -> str:
    """How a step chooses among its samples, where it does."""
    choosing = run.manifest["scoring"].get("choosing")
    if choosing is None:
        return ""
    kept = "" if choosing["keep"] is None else f", {choosing['keep']} kept"
    return f": candidates, {choosing['policy']}{kept}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
