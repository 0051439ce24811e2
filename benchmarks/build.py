"""What a build costs beside plain training steps on the same batches: time, memory, and where it goes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch
from common import (
    CORES,
    BuildWatch,
    Clock,
    PeakMemory,
    Results,
    SelfTimes,
    Spread,
    Table,
    folders,
    in_fresh_process,
    machine_facts,
    mebibytes,
    ratios,
    read_texts,
    scratch_folder,
    write_jsonl,
)
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

import ghoststore
import ghoststore.store.spans.writer
import indexer.build.spans
import indexer.encode.encoder
import indexer.layers.linear
from ghoststore import Corpus, ProjectionConfig
from ghoststore.checkpoint.load import find_checkpoint, load_model, load_tokenizer
from indexer.encode.batching import plan_batches
from indexer.encode.encoder import RowEncoder, pad
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of
from indexer.layers import layer_type_by_name
from indexer.projection.matrices import Projection
from query.demo.tokenizer import train_tokenizer

ARCHITECTURES: dict[str, dict[str, int]] = {
    "gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "small": {"n_layer": 4, "n_embd": 256, "n_head": 4},
}
TRAINED_VOCABULARY = 1024
GROWTH_SPAN_ROWS = 64

PLAIN, FLOOR, ENGINE, BUILD = "plain", "floor", "engine", "build"
MEANING = {
    PLAIN: "a. forward and backward, all weight gradients",
    FLOOR: "b. forward and backward, activation gradients alone",
    ENGINE: "c. RowEncoder: vectors in memory",
    BUILD: "d. ghoststore.build: tokens to committed rows",
}

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measurement: a checkpoint, a corpus of equally long rows, and how to go through it."""

    checkpoint: str
    corpus: str
    scratch: str
    batch: int
    length: int
    dtype: str
    device: str
    repeats: int


def prepare(
    scratch: Path, architecture: str, data: Path, tokenizer: Path | None, *, rows: int, length: int
) -> tuple[Path, Path]:
    """(checkpoint, corpus): a model drawn at random, and ``rows`` samples of at least ``length`` tokens."""
    texts = read_texts(data)
    loaded: Any = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else train_tokenizer(texts, TRAINED_VOCABULARY)
    shape = {"vocab_size": len(loaded), **ARCHITECTURES[architecture]}
    end = loaded.eos_token_id
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=max(1024, length), bos_token_id=end, eos_token_id=end, **shape))
    model.save_pretrained(scratch / architecture)
    loaded.save_pretrained(scratch / architecture)
    return scratch / architecture, write_jsonl(
        scratch / f"{architecture}-{rows}.jsonl", list(packed(texts, loaded, rows, length))
    )


def packed(texts: Sequence[str], tokenizer: Any, rows: int, length: int) -> Iterator[dict[str, str]]:
    """``rows`` samples, each some texts one after another, long enough to be cut at ``length`` tokens."""
    place = count()
    for row in range(rows):
        text, tokens = "", 0
        while tokens <= length:
            text += texts[next(place) % len(texts)] + "\n"
            tokens = len(tokenizer(text, verbose=False)["input_ids"])
        yield {"id": f"row-{row:06d}", "text": text}


class Bench:
    """The four ways through the same batches, in one process, with one model."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        found = find_checkpoint(setting.checkpoint)
        self.model = load_model(found, dtype=setting.dtype, device=setting.device)
        self.model.loss_type = "ForCausalLM"  # what transformers takes anyway, after a warning
        samples = Corpus.open(setting.corpus).samples()
        tokenizer = Tokenizer(load_tokenizer(found.folder))
        self.rows = list(rows_of(samples, tokenizer, TokenSettings(max_length=setting.length)))
        lengths = [len(row.tokens) for row in self.rows]
        assert set(lengths) == {setting.length}, f"rows of {set(lengths)} tokens"
        batches = plan_batches(lengths, setting.batch * setting.length)
        self.batches = [[self.rows[place] for place in batch] for batch in batches]
        self.tokens = sum(lengths)
        self._stores = count()

    @property
    def first_block(self) -> torch.nn.Module:
        return self.model.transformer.h[0]

    def run(self, way: str, batches: Sequence[Sequence[Row]] | None = None) -> Clock:
        """CPU and wall seconds of one way through all batches (or ``batches``)."""
        if way == BUILD:
            return self.build().seconds()
        through: Callable[[Sequence[Sequence[Row]]], Clock] = getattr(self, way)
        return through(batches or self.batches)

    def plain(self, batches: Sequence[Sequence[Row]]) -> Clock:
        began = Clock.now(self.setting.device)
        for rows in batches:
            self.model.zero_grad(set_to_none=True)
            self._loss(rows).backward()
        spent = Clock.now(self.setting.device).since(began)
        self.model.zero_grad(set_to_none=True)
        return spent

    def floor(self, batches: Sequence[Sequence[Row]]) -> Clock:
        """No weight gradient, no projection: what any method that needs activation gradients must pay."""
        entered: list[Tensor] = []

        def enter(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            entered.append(args[0].detach().requires_grad_(True))
            return (entered[-1], *args[1:])

        self.model.requires_grad_(False)
        hook = self.first_block.register_forward_pre_hook(enter)
        try:
            began = Clock.now(self.setting.device)
            for rows in batches:
                loss = self._loss(rows)
                torch.autograd.grad(loss, [entered.pop()])
            return Clock.now(self.setting.device).since(began)
        finally:
            hook.remove()
            self.model.requires_grad_(True)

    def engine(self, batches: Sequence[Sequence[Row]]) -> Clock:
        with RowEncoder(self.model, default_projection(self.model)) as encoder:
            began = Clock.now(self.setting.device)
            for rows in batches:
                encoder(rows)
            return Clock.now(self.setting.device).since(began)

    def build(self) -> BuildWatch:
        return build_once(self.setting, f"store-{next(self._stores)}")[1]

    def _loss(self, rows: Sequence[Row]) -> Tensor:
        ids, labels, mask = (x.to(self.setting.device) for x in pad(rows))
        loss: Tensor = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return loss


def default_projection(model: Any) -> Projection:
    """What ``ghoststore.build`` draws without further options."""
    return Projection.for_model(model, ProjectionConfig())


def build_once(
    setting: Setting, store: str, span_rows: int | None = None, at_building: Callable[[], None] = lambda: None
) -> tuple[ghoststore.BuildReport, BuildWatch]:
    """``ghoststore.build`` of the setting's corpus into a new store that is removed again."""
    watch = BuildWatch(setting.device, at_building)
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
        report = ghoststore.build(
            checkpoint=setting.checkpoint,
            data=setting.corpus,
            store=Path(folder) / store,
            max_length=setting.length,
            batch_tokens=setting.batch * setting.length,
            span_rows=span_rows,
            device=setting.device,
            model_dtype=setting.dtype,
            progress=watch,
        )
    assert report.tokens == report.rows * setting.length, "the build saw other batches"
    return report, watch


def measure_times(setting: Setting) -> dict[str, list[Clock]]:
    """Seconds of each way, repeat by repeat; the ways take turns."""
    bench = Bench(setting)
    for way in (PLAIN, ENGINE):  # memory touched for the first time costs as much as half a batch
        bench.run(way, bench.batches[:1])
    spent: dict[str, list[Clock]] = {way: [] for way in MEANING}
    for _ in range(setting.repeats):
        for way in MEANING:
            spent[way].append(bench.run(way))
    return spent


def measure_shares(setting: Setting) -> tuple[dict[str, float], float]:
    """(seconds by kind of work, seconds of everything) of one build, with its functions timed."""
    on_cuda = setting.device.startswith("cuda")
    times = SelfTimes((lambda: Clock.now(setting.device).wall) if on_cuda else time.thread_time)
    conv = layer_type_by_name("conv1d")
    places = (
        (RowEncoder, "__call__", "the model's forward pass"),
        (indexer.encode.encoder.GradProjLoraEngine, "collect", "the model's backward pass"),
        (indexer.encode.encoder, "next_token_losses", "losses and their gradient"),
        (conv, "keep", "projection of inputs, P_in x"),
        (conv, "block", "projection of gradients, P_out δ"),
        (indexer.layers.linear, "outer_sum", "block products"),
        (Projection, "assemble", "assembling and sketch"),
        (indexer.build.spans, "encode_rows", "gathering a span, transfer to the host"),
        (indexer.build.spans, "seal_vectors", "storage dtype and norms"),
        (indexer.build.spans, "span_arrays", "ids, digests, places"),
        (Tokenizer, "encode", "tokens (a thread)"),
        (ghoststore.store.spans.writer, "write_span", "writing (a thread, its waits for the disk not counted)"),
    )
    with times.wrapped(*places):
        # Not what is spent before it: the check of the model, and learning, call some of these, too.
        spent = build_once(setting, "shares", at_building=times.seconds.clear)[1].seconds()
    return times.seconds, spent.wall if on_cuda else spent.cpu


def measure_memory(setting: Setting, way: str) -> int:
    """Peak bytes of one way through the batches, beyond the loaded model. For a fresh process."""
    if way == BUILD:
        return build_once(setting, "memory")[1].memory.beyond()
    bench, memory = Bench(setting), PeakMemory(setting.device)
    memory.start()
    bench.run(way)
    return memory.beyond()


def measure_growth(setting: Setting) -> dict[str, float]:
    """Tokens, wall seconds and peak bytes of one build. For a fresh process."""
    report, watch = build_once(setting, "growth", span_rows=GROWTH_SPAN_ROWS)
    assert report.tokens is not None
    return {
        "rows": report.rows,
        "tokens": report.tokens,
        "cpu": watch.seconds().cpu,
        "wall": watch.seconds().wall,
        "memory": watch.memory.beyond(),
    }


def add_times(results: Results, setting: Setting, tokens: int) -> None:
    """Ratios and rates, of CPU seconds on one thread and of wall seconds on all cores (CUDA: wall alone)."""
    on_cuda = setting.device.startswith("cuda")
    runs = {} if on_cuda else {"CPU time, 1 thread": (0, in_fresh_process(measure_times, setting, threads=1))}
    where = "CUDA" if on_cuda else f"{CORES} cores"
    runs[f"wall time, {where}"] = (1, in_fresh_process(measure_times, setting))
    rows = []
    for way, meaning in MEANING.items():
        row = {"way": meaning}
        for label, (kind, spent) in runs.items():
            mine, plain = ([clock[kind] for clock in spent[name]] for name in (way, PLAIN))
            row[f"÷ plain ({label})"] = ratios(mine, plain).show()
            row[f"tokens/s ({label})"] = f"{tokens / Spread.of(mine).median:,.0f}"
        rows.append(row)
    note = (
        f"Medians of {setting.repeats} repeats (least to largest); the ways take turns in each. "
        "d contains tokenization, writing, fsync and commits; not loading the model and scanning the corpus."
    )
    numbers = {label: {way: list(map(list, spent[way])) for way in spent} for label, (_, spent) in runs.items()}
    results.add(Table("Time", rows, note), times=numbers)


def add_shares(results: Results, setting: Setting) -> None:
    seconds, whole = in_fresh_process(measure_shares, setting, threads=1)
    seconds["everything else"] = whole - sum(seconds.values())
    rows = [{"work": label, "seconds": f"{s:.3f}", "share": f"{s / whole:.2%}"} for label, s in seconds.items()]
    note = "One build on one thread with its functions timed, each without those it calls; CPU time (CUDA: wall)."
    results.add(Table("Where the time of d goes", rows, note), shares=seconds)


def measure_learning(setting: Setting) -> dict[str, Clock]:
    """Seconds by task of one default build: learning in two tasks, and building. For a fresh process."""
    return build_once(setting, "learning")[1].spent


def add_learning(results: Results, setting: Setting, rows: int) -> None:
    """What the default learns before it builds, beside building as many rows."""
    learnt = min(rows, ProjectionConfig().calibration_samples)
    spent = [in_fresh_process(measure_learning, setting, threads=1) for _ in range(setting.repeats)]
    kind = 1 if setting.device.startswith("cuda") else 0
    building = [run["building"][kind] * learnt / rows for run in spent]
    lines = []
    for name in ("learning the projection", "eigenvectors of layers"):
        seconds = [run[name][kind] for run in spent]
        over = ratios(seconds, building).show(".2f")
        lines.append({"task": name, "seconds": Spread.of(seconds).show(".2f"), "÷ building as many rows": over})
    whole = [sum(run[line["task"]][kind] for line in lines) for run in spent]
    over = ratios(whole, building).show(".2f")
    lines.append({"task": "both", "seconds": Spread.of(whole).show(".2f"), "÷ building as many rows": over})
    note = f"A default build of {rows:,} rows that learns from {learnt:,}; one thread, CPU seconds (CUDA: wall)."
    results.add(Table("Learning", lines, note), learning=[{name: list(run[name]) for name in run} for run in spent])


def add_memory(results: Results, setting: Setting) -> None:
    peaks = {way: in_fresh_process(measure_memory, setting, way) for way in (PLAIN, ENGINE, BUILD)}
    rows = [
        {"way": MEANING[way], "peak": mebibytes(peak), "÷ plain": f"{peak / peaks[PLAIN]:.3f}"}
        for way, peak in peaks.items()
    ]
    note = "The most beyond the loaded model, each in a process of its own."
    results.add(Table("Peak memory", rows, note), memory=peaks)


def add_growth(results: Results, setting: Setting, sizes: Sequence[Setting]) -> None:
    found = [in_fresh_process(measure_growth, size) for size in sizes]
    rows = [
        {
            "rows": f"{one['rows']:,}",
            "tokens": f"{one['tokens']:,}",
            "wall µs a token": f"{one['wall'] / one['tokens'] * 1e6:.1f}",
            "CPU µs a token": f"{one['cpu'] / one['tokens'] * 1e6:.1f}",
            "peak": mebibytes(one["memory"]),
        }
        for one in found
    ]
    note = (
        f"The 4-layer model, rows of {sizes[0].length} tokens, spans of {GROWTH_SPAN_ROWS} rows; the peak is that "
        "of the whole build beyond the loaded model, each in a process of its own."
    )
    results.add(Table("As rows grow", rows, note), growth=found)


def whole_numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return [int(piece) for piece in value.split(",") if piece]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not whole numbers with commas") from None


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="Corpus to take texts from.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help=f"Folder of a tokenizer; without it one of {TRAINED_VOCABULARY:,} tokens is learned from the data.",
)
@click.option("--architecture", type=click.Choice(list(ARCHITECTURES)), default="gpt2-small", show_default=True)
@click.option("--tokens", type=int, default=2048, show_default=True, help="Tokens of one repeat.")
@click.option("--batch", type=int, default=4, show_default=True, help="Samples of a batch.")
@click.option("--length", type=int, default=256, show_default=True, help="Tokens of a sample.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option(
    "--growth-rows",
    callback=whole_numbers,
    default="200,2000",
    show_default=True,
    help="Rows of the builds of the growth table; empty for none.",
)
@folders
def main(
    data: Path,
    tokenizer: Path | None,
    architecture: str,
    tokens: int,
    batch: int,
    length: int,
    dtype: str,
    device: str,
    repeats: int,
    growth_rows: list[int],
    scratch: Path | None,
    out: Path,
) -> None:
    """Compare ghoststore.build with plain forward and backward passes over the same batches."""
    rows = tokens // length // batch * batch
    if rows < batch:
        raise click.UsageError(f"--tokens {tokens} is less than one batch of {batch} × {length}")
    disable_progress_bar()
    with scratch_folder(scratch) as folder:
        checkpoint, corpus = prepare(folder, architecture, data, tokenizer, rows=rows, length=length)
        setting = Setting(
            checkpoint=str(checkpoint),
            corpus=str(corpus),
            scratch=str(folder),
            batch=batch,
            length=length,
            dtype=dtype,
            device=device,
            repeats=repeats,
        )
        shown = {
            name: value for name, value in asdict(setting).items() if name not in ("checkpoint", "corpus", "scratch")
        }
        results = Results(
            name=f"build-{architecture}-{dtype}-b{batch}-t{length}" + ("" if device == "cpu" else f"-{device}"),
            title=f"Build ÷ plain forward and backward: {architecture}, {batch} × {length}, {dtype}",
            settings={"architecture": architecture, "tokens": rows * length, **shown, "data": data.name},
            facts=machine_facts(device),
        )
        add_times(results, setting, rows * length)
        add_learning(results, setting, rows)
        add_shares(results, setting)
        add_memory(results, setting)
        if growth_rows:
            sizes = []
            for size in growth_rows:
                found = prepare(folder, "small", data, None, rows=size, length=128)
                sizes.append(replace(setting, checkpoint=str(found[0]), corpus=str(found[1]), batch=16, length=128))
            add_growth(results, setting, sizes)
        results.write(out)


if __name__ == "__main__":
    main()
