"""What scoring costs beside the regular training step: exact (direct, Gram, the cheaper of both), sketched."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from common import (
    CORES,
    Clock,
    PeakMemory,
    Results,
    Spread,
    Table,
    folders,
    in_fresh_process,
    machine_facts,
    mebibytes,
    ratios,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ghoststore import GradDotProdEngine, ProjectionConfig
from indexer.dotprod.low_rank import DIRECTIONS, PASSES
from indexer.dotprod.routes import gram_flops
from indexer.encode.losses import training_loss
from indexer.training.architectures import ARCHITECTURES

VOCABULARY = 50257
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, direct": {"route": "direct"},
    "exact, Gram": {"route": "gram"},
    "sketched, 64 × 64": {"projection": ProjectionConfig()},
    "sketched, 8 × 8": {"projection": ProjectionConfig(rank_total=64)},
}
REFRESH = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table: a model and the shape of its batches."""

    architecture: str
    batch: int
    length: int
    val: int
    dtype: str
    device: str
    repeats: int
    checkpoint: Path | None = None
    data: Path | None = None
    vocabulary: int = VOCABULARY

    @property
    def told(self) -> str:
        return f"{self.architecture} B={self.batch} T={self.length} n_v={self.val}"


class Bench:
    """One model, its regular step, and the step with an engine."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        shape = ARCHITECTURES[setting.architecture]
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.width,
            n_head=shape.heads,
            vocab_size=setting.vocabulary,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        drawn = setting.checkpoint is None
        model = GPT2LMHeadModel(config) if drawn else GPT2LMHeadModel.from_pretrained(setting.checkpoint)
        self.model: Any = model.to(device=setting.device, dtype=getattr(torch, setting.dtype)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.ids, self.val = rows_for(setting).to(setting.device).split([setting.batch, setting.val])

    def engine(self, options: dict[str, Any], interval: int) -> GradDotProdEngine:
        batch = {"input_ids": self.val, "labels": self.val}
        return GradDotProdEngine(
            self.model, batch, optimizer=self.optimizer, val_refresh_interval=interval, check=False, **options
        )

    def step(self, engine: GradDotProdEngine | None) -> Clock:
        """CPU and wall seconds of one optimizer step."""
        begun = Clock.now(self.setting.device)
        if engine is not None:
            engine.prepare(len(self.ids), tokens=self.ids.numel())
        logits = self.model(input_ids=self.ids, use_cache=False).logits
        loss, _ = training_loss(logits, self.ids, self.ids.numel() - len(self.ids))
        del logits
        if engine is not None:
            engine.watch(loss)
        loss.backward()
        if engine is not None:
            engine.collect()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Clock.now(self.setting.device).since(begun)


def rows_for(setting: Setting) -> Tensor:
    """(batch + val, length): random tokens or, of a text, rows of it from all over."""
    count = setting.batch + setting.val
    if setting.data is None:
        return torch.randint(0, setting.vocabulary, (count, setting.length))
    tokenizer = AutoTokenizer.from_pretrained(setting.checkpoint)
    text = "\n\n".join(json.loads(line)["text"] for line in setting.data.read_text(encoding="utf-8").splitlines())
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // setting.length * setting.length].view(-1, setting.length)
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def measure(setting: Setting, modes: Sequence[str]) -> dict[str, Any]:
    """Seconds of regular steps and, for each mode, of steps with a val gradient of their own (``every``, routes chosen
    for R=1), and of steps that compute one for ten and that use it (``fresh``, ``cached``, routes chosen for R=10).

    In turns, forwards and backwards, so that no mode always has the same place.
    """
    bench = Bench(setting)
    engines = {mode: {interval: bench.engine(MODES[mode], interval) for interval in (1, REFRESH)} for mode in modes}
    kinds = {"every": 1, "fresh": REFRESH, "cached": REFRESH}
    found: dict[str, Any] = {"regular": [], "modes": {mode: {kind: [] for kind in kinds} for mode in modes}}
    for mode in modes:  # each once, unmeasured
        for engine in engines[mode].values():
            with engine:
                bench.step(engine)
    for repeat in range(setting.repeats):
        found["regular"].append([*bench.step(None)])
        for mode in modes if repeat % 2 == 0 else modes[::-1]:
            for kind, interval in kinds.items():
                with engines[mode][interval] as engine:
                    if kind != "cached":
                        engine.set_validation(engine.val_batches)
                    found["modes"][mode][kind].append([*bench.step(engine)])
    for mode in modes:
        of_mode = engines[mode]
        found["modes"][mode]["routes"] = {
            interval: dict(Counter(engine.method.routes.values())) for interval, engine in of_mode.items()
        }
        found["modes"][mode]["predicted"] = {
            "every": predict(bench, of_mode[1])["fresh"],
            **predict(bench, of_mode[REFRESH]),
        }
    return found


def memory(setting: Setting, mode: str | None) -> int:
    """Peak bytes of two steps beyond model and optimizer state."""
    bench = Bench(setting)
    bench.step(None)
    engine = None if mode is None else bench.engine(MODES[mode], REFRESH).attach()
    peak = PeakMemory(setting.device)
    peak.start()
    for _ in range(2):
        bench.step(engine)
    return peak.beyond()


def predict(bench: Bench, engine: GradDotProdEngine) -> dict[str, float]:
    """Multiply-adds over those of a regular step, by the formulas: with a fresh and with a cached val gradient."""
    setting = bench.setting
    tokens, val_tokens = setting.batch * setting.length, setting.val * setting.length
    matrices = {
        name: p for name, p in bench.model.named_parameters() if p.dim() == 2 and not name.endswith("wpe.weight")
    }
    weights = float(sum(p.numel() for p in matrices.values()))
    shape = ARCHITECTURES[setting.architecture]
    attention = 2.0 * shape.layers * shape.width * setting.length
    forward = weights + attention
    regular = 3.0 * forward * tokens
    projection = engine.method.projection
    if projection is None:
        routes = engine.method.routes
        direct = float(sum(p.numel() for name, p in matrices.items() if routes.get(name) == "direct"))
        gram = sum(
            gram_flops(p.shape, tokens=tokens, val_tokens=val_tokens)
            for name, p in matrices.items()
            if routes.get(name) == "gram"
        )
        low_rank = [p.shape for name, p in matrices.items() if routes.get(name) == "low-rank"]
        thin = float(sum(DIRECTIONS * (rows + columns) for rows, columns in low_rank))
        scoring = (direct + thin) * tokens + gram
        val_weights = direct + sum(shape.numel() for shape in low_rank)
    else:
        plan = projection.plan
        each = [
            layer.k_in * layer.block.n_in + layer.k_out * layer.block.n_out + layer.k_in * layer.k_out
            for layer in plan.layers
        ]
        scoring, val_weights = float(sum(each)) * tokens, float(sum(each))
    val = val_tokens * (2.0 * forward + val_weights)
    if projection is None:
        val += PASSES * DIRECTIONS * (val_weights - direct)
    return {"cached": 1 + scoring / regular, "fresh": 1 + (scoring + val) / regular}


def rows_of(setting: Setting, found: dict[str, Any], clock: int) -> list[dict[str, str]]:
    """Table rows of one setting, by one of the clocks (0: CPU, 1: wall)."""
    regular = [seconds[clock] for seconds in found["regular"]]
    rows = [
        {
            "setting": setting.told,
            "mode": "regular",
            "routes": "",
            "÷ regular, R=1": "1",
            "÷ regular, R=10": "1",
            "predicted R=1": "",
            "predicted R=10": "",
            "s a step": Spread.of(regular).show(".2f"),
        }
    ]
    for mode, times in found["modes"].items():
        every, fresh, cached = ([seconds[clock] for seconds in times[kind]] for kind in ("every", "fresh", "cached"))
        tenth = [(f + (REFRESH - 1) * c) / REFRESH for f, c in zip(fresh, cached, strict=True)]
        predicted = times["predicted"]
        rows.append(
            {
                "setting": "",
                "mode": mode,
                "routes": "; ".join(dict.fromkeys(shown(routes) for routes in times["routes"].values())),
                "÷ regular, R=1": ratios(every, regular).show(),
                "÷ regular, R=10": ratios(tenth, regular).show(),
                "predicted R=1": f"{predicted['every']:.3f}",
                "predicted R=10": f"{(predicted['fresh'] + (REFRESH - 1) * predicted['cached']) / REFRESH:.3f}",
                "s a step": "",
            }
        )
    return rows


def shown(routes: dict[str, int]) -> str:
    """``49 direct, 99 gram``."""
    return ", ".join(f"{count} {name}" for name, count in sorted(routes.items()))


def parse(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, int, int, int]]:
    """``GPT2-Small:4x256x1``: architecture, batch, length, val samples."""
    found = []
    for value in values:
        name, _, shape = value.partition(":")
        try:
            batch, length, val = (int(piece) for piece in shape.split("x"))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not like GPT2-Small:4x256x1", ctx, parameter) from None
        if name not in ARCHITECTURES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(ARCHITECTURES)}", ctx, parameter)
        found.append((name, batch, length, val))
    return found


@click.command()
@click.option(
    "--setting",
    "settings",
    multiple=True,
    callback=parse,
    metavar="NAME:BxTxV",
    default=("GPT2-Small:4x256x1", "GPT2-Small:4x128x4", "GPT2-Tiny:8x128x1", "GPT2-Tiny:8x128x8"),
    show_default=True,
    help="Architecture, batch, tokens, val samples. Repeatable.",
)
@click.option("--mode", "modes", multiple=True, type=click.Choice(list(MODES)), help="Default: all.")
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True, help="CPU time on one thread is the steadiest.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True),
    help="A GPT-2 with its tokenizer, in the place of drawn weights: routes depend on the val gradient.",
)
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True), help="Texts (jsonl) in the place of random tokens."
)
@click.option("--name", default="dot-product", show_default=True, help="Name of the result files.")
@folders
def main(
    settings: list[tuple[str, int, int, int]],
    modes: tuple[str, ...],
    repeats: int,
    dtype: str,
    device: str,
    threads: int,
    checkpoint: Path | None,
    data: Path | None,
    name: str,
    scratch: Path | None,
    out: Path,
) -> None:
    """Step time and memory with scoring ÷ without, beside what the cost formulas predict."""
    results = Results(
        name=name if dtype == "float32" and device == "cpu" else f"{name}-{device}-{dtype}",
        title="Scoring beside the regular training step",
        settings={"dtype": dtype, "device": device, "threads": threads, "cores": CORES, "repeats": repeats},
        facts=machine_facts(device),
    )
    clock = 0 if device == "cpu" and threads == 1 else 1
    chosen = list(modes) or list(MODES)
    rows, numbers, peaks = [], {}, []
    for architecture, batch, length, val in settings:
        setting = Setting(
            architecture=architecture,
            batch=batch,
            length=length,
            val=val,
            dtype=dtype,
            device=device,
            repeats=repeats,
            checkpoint=checkpoint,
            data=data,
        )
        found = in_fresh_process(measure, setting, chosen, threads=threads)
        said = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(setting).items()}
        numbers[setting.told] = {"setting": said, **found}
        rows += rows_of(setting, found, clock)
        plain = in_fresh_process(memory, setting, None, threads=threads)
        own = {mode: in_fresh_process(memory, setting, mode, threads=threads) for mode in chosen[:1]}
        peaks.append(
            {
                "setting": setting.told,
                "regular": mebibytes(plain),
                **{f"{mode}, R=10": f"{mebibytes(peak)} ({peak / plain:.2f})" for mode, peak in own.items()},
            }
        )
    results.add(
        Table(
            f"Time ({'CPU' if clock == 0 else 'wall'} seconds of a whole step, optimizer included)",
            rows,
            "R: steps between val gradients; R=10 is one fresh and nine cached steps. Routes: for R=1; for R=10, where "
            "they differ. Predicted: multiply-adds of "
            "matrix products alone (a regular step also has an optimizer, softmax, norms and GELU; scoring has not).",
        ),
        measured=numbers,
    )
    results.add(Table("Peak memory of a step beyond weights and optimizer state", peaks))
    results.write(out)


if __name__ == "__main__":
    main()
