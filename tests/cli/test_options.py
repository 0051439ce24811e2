"""Options are said once: commands, keywords, help and messages come from the same dataclasses."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest

import ghoststore
import ghoststore.settings
from ghoststore import ProjectionConfig, build, query
from ghoststore.cli import COMMANDS, cli
from ghoststore.cli.options import MOST_USED, SECTIONS, OptionsCommand
from ghoststore.errors import UsageError
from ghoststore.settings.fields import Fields
from ghoststore.settings.flags import Flags, entries_of
from ghoststore.settings.measure import METHODS
from ghoststore.settings.option import choices_of, options_of
from ghoststore.settings.sizes import parse_bytes, shown_bytes
from ghoststore.settings.train import TrainConfig

if TYPE_CHECKING:
    from tests.conftest import Lab

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    importlib.import_module(f"ghoststore.settings.{module.name}")
    for module in pkgutil.iter_modules(ghoststore.settings.__path__)
]
KINDS = sorted(
    {
        kind
        for module in SETTINGS
        for kind in vars(module).values()
        if inspect.isclass(kind) and is_dataclass(kind) and kind.__module__.startswith("ghoststore.settings.")
    }
    - {TrainConfig},
    key=lambda kind: kind.__name__,
)


def command(name: str) -> OptionsCommand:
    found = importlib.import_module(f"ghoststore.cli.{name.replace('-', '_')}").command
    assert isinstance(found, OptionsCommand)
    return found


OTHERWISE = {"rm": "remove", "mv": "rename", "cp": "copy"}
"""Commands that have the names of a shell, and functions that have those of Python."""


def name_of(command: str) -> str:
    return OTHERWISE.get(command, command.replace("-", "_"))


def function(name: str) -> Any:
    return getattr(ghoststore, name_of(name))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_help_and_a_section(kind: type) -> None:
    said = {spec.name: option for spec, option in options_of(kind)}
    assert list(said) == [spec.name for spec in fields(kind)]
    for name, option in said.items():
        assert re.match(r"[\w`.].*[.)]$", option.help), f"{kind.__name__}.{name}: {option.help!r}"
        assert option.section in SECTIONS
        own_words = re.sub(r"`ghoststore [^`]*`", "", option.help)
        assert "--" not in own_words, f"help of {kind.__name__}.{name} speaks of flags: name the parameter"


def test_no_help_stands_twice() -> None:
    texts = Counter(
        node.value
        for module in SETTINGS
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 2
    )
    assert [text for text, times in texts.items() if times > 1] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_function(name: str) -> None:
    made = command(name)
    kind, *others = made.kinds
    assert function(name).options is kind
    assert all("Of the command line alone" in str(other.__doc__) for other in others)
    entries = [entry for one in made.kinds for entry in entries_of(one)]
    shown = Counter(flag for entry in entries for word in entry.declarations.split("/") for flag in word.split())
    shown += Counter(entry.option.shortcut[0] for entry in entries if entry.option.shortcut)
    assert Counter(flag for one in made.params for flag in (*one.opts, *one.secondary_opts)) == shown
    assert set(shown.values()) == {1}
    required = {one.name for one in made.params if one.required}
    assert required == {spec.name for spec, option in options_of(kind) if spec.default is MISSING or option.required}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_function_has_the_keywords_of_its_options(name: str) -> None:
    signature = inspect.signature(function(name))
    assert {one.name: one.default for one in signature.parameters.values() if one.default is not one.empty} == {
        spec.name: spec.default for spec in fields(function(name).options) if spec.default is not MISSING
    }
    assert {*signature.parameters} == {spec.name for spec in fields(function(name).options)}
    for spec in fields(function(name).options):
        assert signature.parameters[spec.name].annotation is spec.type


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_sections(name: str) -> None:
    made = command(name)
    # click keeps the help option of the first context: without the names of the group, later tests would see no -h.
    context = click.Context(made, info_name=name, terminal_width=100, **cli.context_settings)
    headings = re.findall(r"^(\S.*):$", made.get_help(context), flags=re.MULTILINE)
    assert [heading for heading in (MOST_USED, *SECTIONS) if heading in headings] == headings
    first = [one for one in made.sections.items() if one[1] == MOST_USED and not one[0].endswith("__shortcut")]
    assert len(first) <= 10
    assert bool(first) == (len(made.params) > 10)


def defaults_of(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """(name, default) of every parameter and every field of a class that has one which is a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            last = [*node.args.posonlyargs, *node.args.args][-len(node.args.defaults) or None :]
            pairs = [
                *zip(last, node.args.defaults, strict=False),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            found = [(arg.arg, default) for arg, default in pairs if default is not None]
        elif isinstance(node, ast.ClassDef):
            found = [
                (str(ast.unparse(one.target)), one.value)
                for one in node.body
                if isinstance(one, ast.AnnAssign) and one.value
            ]
        else:
            continue
        for name, default in found:
            try:
                yield name, ast.literal_eval(default)
            except ValueError:
                continue


OTHER_FACES = {
    "indexer/dotprod/engine.py",
    "indexer/dotprod/exact.py",
    "indexer/integrations/callback.py",
    "indexer/integrations/config.py",
    "indexer/integrations/session.py",
    "indexer/training/retrain.py",
}
"""Engine, manager and callback have options of their own, and so has the recipe of an evaluation."""
ELSEWHERE = {"device", "dtype", "text", "overlong"}
"""Names of parameters below the public face that have a default for their callers there."""


def test_no_default_stands_anywhere_else() -> None:
    """Neither in a command, nor as the default of a parameter or field of the same name below."""
    known = {
        (spec.name, repr(spec.default))
        for kind in KINDS
        for spec in fields(kind)
        if spec.name not in ELSEWHERE and spec.default not in (MISSING, None, False, ())
    }
    again = {
        f"{path.relative_to(ROOT)}: {name} = {default!r}"
        for package in ("ghoststore", "indexer", "query")
        for path in (ROOT / package).rglob("*.py")
        if "settings" not in path.parts and path.relative_to(ROOT).as_posix() not in OTHER_FACES
        for name, default in defaults_of(ast.parse(path.read_text()))
        if (name, repr(default)) in known
    }
    assert again == set()
    for path in (ROOT / "ghoststore/cli").glob("*.py"):
        assert "click.option(" not in path.read_text(), f"{path.name}: options come from ghoststore.settings"


def test_the_methods_of_an_evaluation_are_those_that_it_knows() -> None:
    from query.evaluate.predictors import BASELINES, GRADIENTS

    assert (*GRADIENTS, *BASELINES) == METHODS


FLAGS = Flags([entry for one in command("query").kinds for entry in entries_of(one)])
BUILD = Flags([entry for one in command("build").kinds for entry in entries_of(one)])
TRAIN = Flags([entry for one in command("train").kinds for entry in entries_of(one)])


@pytest.mark.parametrize(
    ("flags", "message", "rendered"),
    [
        (BUILD, "`batch_tokens` must be at least 1, not 0", "--batch-tokens must be at least 1, not 0"),
        (BUILD, "give `batch_tokens=1`, or `max_length`", "give --batch-tokens 1, or --max-length"),
        (BUILD, "`rank_total=4` of `projection.rank_total`", "--proj-rank-total 4 of --proj-rank-total"),
        (BUILD, "`calibration_samples` and `seed`", "--calibration-samples and --proj-seed"),
        (BUILD, "`fields.text`, `text`, `fields.id`", "--text-field, --text-field, --id-field"),
        (BUILD, "`store_text=True`, `dry_run`, `as_json`", "--store-text, --dry-run, --json"),
        (BUILD, "run `ghoststore verify`, see `build`", "run `ghoststore verify`, see `build`"),
        (BUILD, "`top_k` and `each=True` are of `query`", "`top_k` and `each=True` are of `query`"),
        (BUILD, "`dry_run=False` and `name=None`", "`dry_run=False` and `name=None`"),
        (BUILD, "`proj_dtype='int8'` or `proj_dtype=\"int8\"`", "--proj-dtype int8 or --proj-dtype int8"),
        (BUILD, "`batch_tokens={1}`, {'a': `b`}", "--batch-tokens {1}, {'a': `b`}"),
        (FLAGS, "`each=True`, `each=False`, `each`", "--each, --mean, --each"),
        (FLAGS, "`text=False`, `text=True`, `fields.text`", "--no-text, --text, --text-field"),
        (
            FLAGS,
            "`damping` belongs to `precondition=second-moment`",
            "--damping belongs to --precondition second-moment",
        ),
        (TRAIN, "`exclude_layers=['h.0.gate', 'h.1.gate']`", "--exclude-layers h.0.gate,h.1.gate"),
        (TRAIN, "`store=['a` and `store=[a]`", "--store ['a and --store [a]"),
        (TRAIN, "`seed` and `projection.seed`", "--seed and --proj-seed"),
        (TRAIN, "`keep_checkpoints=None`", "--keep-checkpoints all"),
        (TRAIN, "`domains`, `compress_by`", "--domain, `compress_by`"),
    ],
)
def test_messages_name_flags(flags: Flags, message: str, rendered: str) -> None:
    assert flags.render(message) == rendered


@pytest.mark.slow
def test_errors_of_the_library_reach_the_terminal_as_flags(lab: Lab, tmp_path: Path) -> None:
    outcome = lab.build(tmp_path / "store", "--proj-damping", "0")
    assert (outcome.code, outcome.err) == (2, "Error: --proj-damping must be above 0, not 0.0\n")
    with pytest.raises(UsageError, match=r"^`damping` must be above 0, not 0\.0$"):
        ghoststore.ProjectionConfig(damping=0.0)


def needed(name: str) -> dict[str, Any]:
    return {spec.name: "x" for spec in fields(function(name).options) if spec.default is MISSING}


@pytest.mark.parametrize("name", COMMANDS)
def test_keywords_that_are_wrong(name: str) -> None:
    python = name_of(name)
    with pytest.raises(TypeError, match=rf"{python}\(\) has no keyword 'stoer'; the nearest is '"):
        function(name)(**needed(name), stoer=1)
    if needed(name):
        with pytest.raises(TypeError, match=rf"{python}\(\): missing a required argument"):
            function(name)()
    for spec, _ in options_of(function(name).options):
        if known := choices_of(spec):
            message = rf"^`{spec.name}` 'nonesuch' is unknown; known: {re.escape(', '.join(known))}$"
            with pytest.raises(UsageError, match=message):
                function(name)(**needed(name) | {spec.name: "nonesuch"})


def test_the_nearest_keyword_is_named() -> None:
    with pytest.raises(TypeError, match="the nearest is 'batch_tokens'"):
        ghoststore.build(**needed("build"), bach_tokens=1)


TYPED = """
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.keywords import takes

@takes(BuildOptions)
def build(options: BuildOptions) -> int:
    return options.batch_tokens or 0

rows: int = build(checkpoint="m", data="d", store="s", batch_tokens=4, overlong="skip")
"""


WRONG = {
    'build(checkpoint="m", data="d", store="s", bach_tokens=4)': 'Unexpected keyword argument "bach_tokens"',
    'build(checkpoint="m", data="d", store="s", batch_tokens="4")': 'incompatible type "str"; expected "int | None"',
    'build(checkpoint="m", data="d", store="s", overlong="cut")': "incompatible type \"Literal['cut']\"",
    'build(checkpoint="m", data="d")': 'Missing named argument "store"',
    'build("m", checkpoint="m", data="d", store="s")': "Too many positional arguments",
    'rows = str(build(checkpoint="m", data="d", store="s"))': "Incompatible types in assignment",
}


@pytest.mark.slow
def test_type_checkers_know_the_keywords(tmp_path: Path) -> None:
    """As those of every function: they are made by `takes`, see the tests above."""
    caller = tmp_path / "caller.py"
    caller.write_text(TYPED + "\n".join(WRONG))
    words = ["--strict", "--follow-imports=silent", "--no-error-summary", f"--cache-dir={tmp_path}", str(caller)]
    done = subprocess.run([sys.executable, "-m", "mypy", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    first = len(TYPED.splitlines()) + 1
    found = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error: " in line}
    assert list(found) == list(range(first, first + len(WRONG))), done.stdout + done.stderr
    for line, error in zip(found.values(), WRONG.values(), strict=True):
        assert error in line


PATHS: dict[str, Any] = {"store": "no store", "checkpoint": "no model", "data": "no corpus"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(**PATHS, keep_fields=None), "`keep_fields` is a list of words, not None; leave it out"),
        (lambda: build(**PATHS, keep_fields=("a", 3)), "`keep_fields` is a list of words, not"),
        (lambda: build(**PATHS, max_samples=2.5), "`max_samples` is a whole number, not 2.5"),
        (lambda: build(**PATHS, store_text="yes"), "`store_text` is True or False, not 'yes'"),
        (lambda: query(store="no store", val_set="x", rerank="5"), "`rerank` is a whole number, not '5'"),
        (lambda: query(store="no store", val_set="x", top_k=True), "`top_k` is a whole number, not True"),
        (lambda: query(store="no store", val_set="x", damping="1"), "`damping` is a number, not '1'"),
        (lambda: query(store="no store", val_set="x", combine=3), "`combine` is a word, not 3"),
        (lambda: ProjectionConfig(layers="mlp"), "`layers` is a list of words, not 'mlp'"),  # type: ignore[arg-type]
        (lambda: ProjectionConfig(seed="1"), "`seed` is a whole number, not '1'"),  # type: ignore[arg-type]
        (lambda: Fields(text=1), "`fields.text` is a word, not 1"),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_another_type(call: Callable[[], Any], message: str) -> None:
    """They ended in a TypeError somewhere below, or as something else than was meant."""
    with pytest.raises(UsageError, match=re.escape(message)):
        call()


def test_values_of_numpy_are_numbers() -> None:
    settings: dict[str, Any] = {"top_k": np.int64(3), "text": np.bool_(False), "bottom_k": np.int32(1)}
    with pytest.raises(UsageError, match="there is no store"):
        query(store="no store", val_set="x", **settings)


def test_sizes_are_read_and_shown_as_people_write_them(lab: Lab) -> None:
    for count in (0, 1, 1000, 1024, 64 << 20, 3 << 30, 1 << 40, (1 << 40) + 1):
        assert parse_bytes(shown_bytes(count)) == count
    assert [parse_bytes(word) for word in ("64 MiB", "64mib", "67108864")] == [64 << 20] * 3
    assert shown_bytes(64 << 20) == "64MiB"
    words = ["query", "--store", "s", "--val-set", lab.corpus, "--max-record-bytes"]
    for word in ("64MB", "1.5GiB", "-1", "many"):
        outcome = lab.run(*words, word)
        assert outcome.code == 2
        assert f"{word!r} is no number of bytes, such as 67108864 or 64MiB" in outcome.err
    assert "[default: 64MiB]" in lab.run("query", "--help").out
    limited = lab.run("tokenize", "--data", lab.corpus, "--tokenizer", lab.checkpoint, "--out", "x", *words[-1:], "1 B")
    assert "a record of more than 1 bytes" in limited.err


def test_a_part_that_is_given_twice_is_refused_where_one_is_taken() -> None:
    """click would take the last, and say nothing, while `query` and `index` take all."""
    of_one = {
        name
        for name in COMMANDS
        for kind in command(name).kinds
        for entry in entries_of(kind)
        if entry.spec.name == "part" and not entry.option.repeated
    }
    assert of_one >= {"self-influence", "fidelity", "export", "info", "verify", "repair", "rm"}
    for name in of_one:
        with pytest.raises(click.BadParameter, match="a, b: this command takes one"):
            command(name).make_context(name, ["--part", "a", "--part", "b"])
