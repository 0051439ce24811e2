"""The pages of the Python API, from docstrings, signatures and options: ``python docs/site/reference.py docs/api``.

Signatures are made when the package is imported, from the fields of the options, which have their help. So this
imports it, and asks; what reads sources alone would see ``build(options)``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from words import ALIASES, OURS, Links, attributes, default, docstring, is_options, line, signature, type_words

import ghoststore
from ghoststore import errors, progress
from ghoststore.lazy import FACE
from ghoststore.settings.option import options_of, parameters_of

WRITTEN = "Written by `make docs` from the docstrings and options themselves; do not edit."

HEAD_OF_NAMES = f"""# The Python API

Everything public is an attribute of `ghoststore`, and is imported when it is first used: `import ghoststore` alone
loads neither torch nor transformers. Every command is a function with the same options. How they are used together:
[from Python](../python.md), [in a loop of your own](../loops.md).

{WRITTEN}"""
HEAD_OF_ERRORS = f"""# Errors and progress

Every error that ghoststore raises on purpose is a `ghoststore.errors.GhostStoreError`, and inherits the builtin that a
Python user would catch. Its message names the object, what was expected, what was found, and what to do. The command
line ends with its exit code.

{WRITTEN}"""
TYPES = (
    (
        "`Data`",
        "A path or several; or texts, dictionaries, or a table in memory ([which](../python.md#data-in-memory)).",
    ),
    ("`Checkpoint`", "A folder in transformers' format, a hub id or nanoGPT's file; or a loaded model."),
    ("`TokenizerSource`", "A folder or a hub id; or a loaded tokenizer."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page of the reference."""

    name: str
    title: str
    about: str
    names: Sequence[str]
    """Public names, in order."""
    only: dict[str, Sequence[str]] = field(default_factory=dict)
    """Of classes with methods that only ghoststore's own code needs: those to show."""


GROUP = ("complete", "domains", "read")
MADE = ("ProjectionConfig", "Fields", "TrainConfig", "GradDotProdEngine", "GradProjLoraEngine", "GhostEngineManager",
        "GhostConfig", "GhostStoreCallback", "Choosing")  # fmt: skip
"""Classes that a user makes objects of."""
PAGES = (
    Page(
        name="stores",
        title="Builds and stores",
        about="From a checkpoint and a corpus to a part of a store; what is in a store, and keeping it in order.",
        names=("build", "BuildReport", "ProjectionConfig", "doctor", "DoctorReport", "Store", "Part", "Status", "info",
               "verify", "repair", "gc", "copy", "rename", "remove", "export", "full_gradients", "FullGradientsReport",
               "demo"),
        only={
            "BuildReport": ("to_json",),
            "ProjectionConfig": (),
            "Store": ("open", "part_names", "part", "run_names", "run"),
            "Part": ("rows", "encoding", "groups", *GROUP, "row_numbers", "column", "usable", "read_rows", "summarize"),
        },
    ),
    Page(
        name="data",
        title="Corpora and tokens",
        about="What samples are read from. Every function that takes `data` or `val_set` opens it by itself.",
        names=("Fields", "Corpus", "tokenize", "TokenizeReport", "TokenShards", "load_nanogpt"),
        only={"Corpus": ("open", "samples", "fetch")},
    ),
    Page(
        name="questions",
        title="Queries and results",
        about="Rankings of a part's rows, and what is made of them.",
        names=("open", "Session", "query", "QueryResult", "self_influence", "index", "IndexReport", "select",
               "SelectReport", "serve", "Explorer", "fidelity", "FidelityReport", "plot_error", "ErrorCurve",
               "evaluate"),
        only={"SelectReport": ("to_json",)},
    ),
    Page(
        name="training",
        title="Training",
        about="The command `train` as a function, and the scores that a run keeps.",
        names=("train", "TrainConfig", "TrainReport", "scores", "ScoresResult", "watch", "Run"),
        only={
            "TrainConfig": ("of",),
            "Run": ("steps", "ranges", *GROUP, "committed_steps", "read_committed", "reload", "summarize"),
        },
    ),
    Page(
        name="engines",
        title="Engines and loops",
        about="Gradients and scores in a loop of your own, with any model and any loss of each sample. Shapes: B "
        "samples of a batch, T tokens, V words of the vocabulary, D numbers of a vector, R rows.",
        names=("GradDotProdEngine", "Scores", "packed_samples", "GradProjLoraEngine", "next_token_losses",
               "GhostEngineManager", "GhostConfig", "GhostStoreCallback", "Choosing", "Candidates"),
        only={
            "GradDotProdEngine": ("attach", "detach", "attached", "prepare", "watch", "collect", "discard", "scoring",
                                  "set_validation", "refresh", "stepped", "val_due", "val_samples", "group_names"),
            "GhostConfig": ("of",),
        },
    ),
)  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def names_of(of: Any) -> dict[str, Any]:
    """What the annotations of an object may name."""
    module = sys.modules[of.__module__]
    return vars(module)


def is_property(value: Any) -> bool:
    return isinstance(value, property | cached_property)


def result_of(value: property | cached_property[Any]) -> Any:
    """The type of a property."""
    getter = value.fget if isinstance(value, property) else value.func
    assert getter is not None
    return inspect.signature(getter).return_annotation


class Reference:
    """All pages."""

    @cached_property
    def links(self) -> Links:
        names: dict[str, str] = {}
        for page in PAGES:
            for name in page.names:
                names[name] = f"{page.name}.md#{name.lower()}"
                for member, value in self.members(page, name):
                    names[f"{name}.{member}"] = names[name] + ("" if is_property(value) else member.lower())
        names |= dict.fromkeys(ALIASES, "README.md#types")
        return Links(names, {kind.__name__: f"errors.md#{kind.__name__.lower()}" for kind in self.errors})

    @cached_property
    def errors(self) -> list[type[Exception]]:
        found = [
            kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__
        ]
        return [kind for kind in found if issubclass(kind, Exception)]

    def members(self, page: Page, name: str) -> Iterator[tuple[str, Any]]:
        """(name, what the class has there) of public methods and properties, in the order of their sources."""
        of = getattr(ghoststore, name)
        if not inspect.isclass(of):
            return
        found: dict[str, Any] = {}
        for base in reversed(of.__mro__):
            if base.__module__.partition(".")[0] in OURS:
                for member, value in vars(base).items():
                    kinds = (property, cached_property, classmethod, staticmethod)
                    if member[0] != "_" and (inspect.isfunction(value) or isinstance(value, kinds)):
                        found[member] = value
        only = page.only.get(name, tuple(found))
        assert set(only) <= set(found), set(only) - set(found)
        yield from ((member, found[member]) for member in only)

    def text(self, page: Page) -> str:
        pieces = [f"# {page.title}\n\n{page.about}\n\n{WRITTEN}"]
        shown: set[str] = set()
        for name in page.names:
            of = getattr(ghoststore, name)
            pieces.append(self.of_class(page, name) if inspect.isclass(of) else self.of_function(name))
            pieces += self.results(of, shown)
        return "\n\n".join(pieces) + "\n"

    def of_function(self, name: str) -> str:
        of = getattr(ghoststore, name)
        kind = getattr(of, "options", None)
        shape = signature(f"ghoststore.{name}", of, typed=kind is None)
        pieces = [f"## {name}", f"```py\n{shape}\n```", docstring(of, self.links)]
        return "\n\n".join([*pieces, *([] if kind is None else [self.options(kind)])])

    def options(self, kind: type) -> str:
        """A table of the options of a function, or of a class of options."""
        help_of = {spec.name: option.help for spec, option in options_of(kind)}
        rows = []
        factories = {spec.name: spec.default_factory for spec in fields(kind) if spec.default_factory is not MISSING}
        for parameter in parameters_of(kind):
            of_type = type_words(parameter.annotation, {}, self.links)
            if parameter.name == "tokenizer":  # the same union
                of_type = of_type.replace("`Checkpoint`", "`TokenizerSource`")
            value = default(parameter.default)
            if parameter.name in factories:
                value = f"{factories[parameter.name].__name__}()"
            help_text = help_of.get(parameter.name, "")
            if not help_text and is_options(parameter.annotation):
                help_text = "See its own table, below."
            shown = f"`{value}`" if value else "*needed*"
            rows.append((f"`{parameter.name}`", of_type, shown, line(help_text, self.links)))
        return table(("parameter", "type", "default", ""), rows)

    def of_class(self, page: Page, name: str) -> str:
        of = getattr(ghoststore, name)
        pieces = [f"## {name}"]
        if name in MADE:
            shape = signature(f"ghoststore.{name}", of, typed=not is_dataclass(of))
            pieces.append(f"```py\n{shape}\n```")
        pieces += [docstring(of, self.links, name), *([self.options(of)] if is_options(of) else self.fields(of))]
        if is_options(of):
            held = [spec.type for spec in fields(of) if is_options(spec.type) and spec.type.__name__ not in FACE]
            pieces += [f"### {kind.__name__}\n\n{docstring(kind, self.links)}\n\n{self.options(kind)}" for kind in held]
        members = list(self.members(page, name))
        rows = [
            (
                f"`{member}`",
                type_words(result_of(value), names_of(of), self.links),
                line(value.__doc__, self.links, name),
            )
            for member, value in members
            if is_property(value)
        ]
        if rows:
            pieces.append(table(("attribute", "type", ""), rows))
        return "\n\n".join(
            [*pieces, *(self.of_method(name, member, value) for member, value in members if not is_property(value))]
        )

    def fields(self, of: type) -> list[str]:
        if not is_dataclass(of) and not hasattr(of, "__members__"):
            return []
        head = ("field", "type", "") if is_dataclass(of) else ("name", "number", "")
        rows = [
            (
                f"`{each.name}`",
                type_words(each.type, names_of(of), self.links),
                line(each.meaning or self.help_of(of, each.name), self.links, of.__name__),
            )
            for each in attributes(of)
        ]
        return [table(head, rows)] if rows else []

    def of_method(self, name: str, member: str, value: Any) -> str:
        of, called = value, member
        if isinstance(value, classmethod | staticmethod):
            of, called = value.__func__, f"{name}.{member}"
        shape = signature(called, of, typed=not hasattr(of, "options"))
        return f"### {name}.{member}\n\n```py\n{shape}\n```\n\n{docstring(value, self.links, name)}"

    def help_of(self, of: type, name: str) -> str:
        """The help of the option of this name, for the fields of a class that users make."""
        if of.__name__ not in MADE:
            return ""
        flat = {spec.name: option.help for spec, option in options_of(ghoststore.train.options)}
        of_projection = {f"proj_{spec.name}": option.help for spec, option in options_of(ghoststore.ProjectionConfig)}
        return {**of_projection, **flat}.get(name, "")

    def results(self, of: Any, shown: set[str]) -> Iterator[str]:
        """Classes that a function returns, or that the fields of one hold, and that have no public name."""
        names = names_of(of)
        given = [each.type for each in attributes(of)] if inspect.isclass(of) else []
        given += [] if inspect.isclass(of) else [str(inspect.signature(of).return_annotation)]
        for annotation in given:
            for word in annotation.replace("[", " ").replace("]", " ").replace(",", " ").strip("'").split():
                kind = names.get(word)
                is_ours = inspect.isclass(kind) and is_dataclass(kind) and kind.__module__.partition(".")[0] in OURS
                if is_ours and word not in ghoststore.__all__ and word not in shown and not is_options(kind):
                    shown.add(word)
                    yield "\n\n".join([f"### {word}", docstring(kind, self.links, word), *self.fields(kind)])
                    yield from self.results(kind, shown)

    def page_of_errors(self) -> str:
        pieces = [HEAD_OF_ERRORS]
        rows = [
            (f"[`{kind.__name__}`](#{kind.__name__.lower()})", ", ".join(f"`{b.__name__}`" for b in kind.__bases__),
             str(vars(kind).get("exit_code", kind.exit_code)))
            for kind in self.errors
        ]  # fmt: skip
        pieces.append(table(("error", "is a", "exit code"), rows))
        pieces += [f"## {kind.__name__}\n\n{docstring(kind, self.links)}" for kind in self.errors]
        about = "What `progress` of a function takes: an object with these methods; without one nothing is shown."
        pieces.append(f"## Progress\n\n`ghoststore.progress.Progress`. {about}")
        for kind in (progress.Progress, progress.Task):
            if kind is not progress.Progress:
                pieces.append(f"### {kind.__name__}\n\n{docstring(kind, self.links)}")
            for member, value in vars(kind).items():
                if inspect.isfunction(value) and member[0] != "_" and value.__doc__:
                    pieces.append(f"```py\n{signature(member, value)}\n```\n\n{docstring(value, self.links)}")
        return "\n\n".join(pieces) + "\n"

    def page_of_names(self) -> str:
        pieces = [HEAD_OF_NAMES]
        for page in PAGES:
            rows = []
            for name in page.names:
                first = (inspect.getdoc(getattr(ghoststore, name)) or "").split("\n\n")[0].removesuffix("::")
                rows.append((f"[`{name}`]({self.links.names[name]})", line(first, self.links, name)))
            pieces.append(f"## {page.title}\n\n{table(('name', 'what it is'), rows)}")
        pieces.append(f"## Errors and progress\n\n[All errors, and what listens to progress](errors.md).\n\n"
                      f"`ghoststore.__version__` is the version, `{ghoststore.__version__}`.")  # fmt: skip
        pieces.append(f"## Types\n\n{table(('type', 'is'), TYPES)}")
        return "\n\n".join(pieces) + "\n"

    def pages(self) -> dict[str, str]:
        """By file name, the text of every page."""
        return {
            "README.md": self.page_of_names(),
            **{f"{page.name}.md": self.text(page) for page in PAGES},
            "errors.md": self.page_of_errors(),
        }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for file, text in Reference().pages().items():
        (folder / file).write_text(text, encoding="utf-8")
