"""How the code is walked: the files that a command enters, and how often it goes back into one that it had left.

A reader who follows a command reads each function when it is first called. This traces tiny real runs and lists the
functions of the project in that order; *returns* counts the steps of that walk which lead into a file that was entered
before and has been left since. *Mutual* counts the pairs of files that call each other.

    python benchmarks/flow.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ghoststore", "indexer", "query")


class Walk:
    """Functions of the project in the order in which they are first entered, on any thread."""

    def __init__(self) -> None:
        self.functions: dict[CodeType, str] = {}
        self.calls: set[tuple[str, str]] = set()
        self._names: dict[str, str | None] = {}

    def _file(self, code: CodeType) -> str | None:
        """The function's file below the root; None for code of others and of imports."""
        name = code.co_filename
        if name not in self._names:
            path = Path(name)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
            self._names[name] = str(path.relative_to(ROOT)) if inside else None
        return None if code.co_name == "<module>" else self._names[name]

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (file := self._file(frame.f_code)) is None:
            return
        self.functions.setdefault(frame.f_code, file)
        caller = frame.f_back
        while caller is not None:
            above = self._file(caller.f_code)
            if above is not None:
                self.calls.add((above, file))
                return
            caller = caller.f_back

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Trace what runs inside, and the threads that it starts."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def measured(self) -> dict[str, int]:
        """Files entered, functions, returns, and pairs of files that call each other."""
        left: set[str] = set()
        current, returns = "", 0
        for file in self.functions.values():
            if file != current:
                returns += file in left
                left.add(current)
                current = file
        mutual = sum((b, a) in self.calls for a, b in self.calls if a < b)
        return {
            "files": len(set(self.functions.values())),
            "functions": len(self.functions),
            "returns": returns,
            "mutual": mutual,
        }


def commands(folder: Path) -> dict[str, Callable[[], Any]]:
    """Tiny real runs, each on what the one before has made."""
    import torch
    from transformers import AutoTokenizer  # noqa: F401  # imported before anything is traced

    import ghoststore
    from query.demo import demo  # noqa: F401

    torch.manual_seed(0)
    rows, val = folder / "train.jsonl", folder / "val.jsonl"
    words = [left + right for left in "bdfgklmn" for right in "aeo"]
    for path, count in ((rows, 24), (val, 4)):
        texts = [" ".join(words[(i * 7 + j * 3) % len(words)] for j in range(12)) for i in range(count)]
        path.write_text("".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(texts)))
    tokenizer = save_tokenizer(folder / "tokenizer", words)
    where = {"store": folder / "store", "device": "cpu"}
    checkpoint = folder / "trained" / "checkpoint-4"
    return {
        "train": lambda: ghoststore.train(
            data=rows,
            val_set=val,
            output_dir=folder / "trained",
            architecture="GPT2-Tiny",
            tokenizer=tokenizer,
            batch_size=4,
            max_steps=4,
            val_batch_size=2,
            max_length=16,
            name="run",
            **where,
        ),
        "build": lambda: ghoststore.build(checkpoint=checkpoint, data=rows, name="part", **where),
        "query": lambda: ghoststore.query(val_set=val, part="part", **where),
        "select": lambda: ghoststore.select(val_set=val, part="part", count=6, out=folder / "best.jsonl", **where),
    }


def save_tokenizer(folder: Path, words: list[str]) -> Path:
    """A tokenizer of whole words, in transformers' format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<eos>", *sorted(set(words))]
    plain = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="Write the figures to this file, too.")
    asked = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in commands(Path(folder)).items():
            walk = Walk()
            with walk.traced():
                run()
            figures[name] = walk.measured()
    print(f"{'command':8} {'files':>6} {'functions':>10} {'returns':>8} {'mutual':>7}")
    for name, row in figures.items():
        print(f"{name:8} {row['files']:6} {row['functions']:10} {row['returns']:8} {row['mutual']:7}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
