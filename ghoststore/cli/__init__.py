"""The command line: one file a command, each a translation of one public function.

Data go to stdout, progress and notes to stderr. Exit codes: 0 done, 1 unexpected, 2 usage, 3 mismatch,
4 corrupt, 5 busy, 6 storage, 7 unsound (``doctor`` found what would make a store wrong), 130 interrupted, 141 the
reader of stdout has gone, 143 terminated.
"""

from __future__ import annotations

import importlib
import signal
import sys
from gc import freeze  # not `gc`, which is a command of this package
from typing import Any, TextIO, cast

import click

from ghoststore import __version__, lazy
from ghoststore.cli.ending import refuse_unreadable, report_error, say_bug, say_error
from ghoststore.cli.events import FLAG, logging_to
from ghoststore.cli.streams import EventStderr, guarded
from ghoststore.interrupts import Interrupted, terminating, word
from ghoststore.software import versions_that_matter

COMMANDS = {
    "tokenize": "a corpus to token shards, in parallel; resumes by itself",
    "train": "train a GPT-2 and score every sample of every step, live; resumes by itself",
    "build": "a checkpoint and a corpus to a part of a store; resumes by itself",
    "query": "a val set to the training samples whose gradients point the same way",
    "select": "a val set to a training set: the original rows of the best samples",
    "self-influence": "the samples that are unlike the rest: rare, noisy or mislabelled ones",
    "index": "a FAISS index of a part, its recall measured",
    "evaluate": "do scores predict what training without some samples does?",
    "fidelity": "how far a store's rankings are from those of the exact gradients",
    "plot-error": "error of inner products against the numbers of a vector, measured and by theory",
    "full-gradients": "exact gradients of a few samples, in full, as safetensors; resumes by itself",
    "scores": "which samples helped while the model trained: top, bottom, by domain, of one",
    "watch": "a live view of a training run, from another terminal",
    "info": "what a store holds",
    "verify": "check every byte that was committed",
    "repair": "make again what is damaged, and nothing else",
    "gc": "remove what no record names",
    "rm": "remove a part or a training run",
    "mv": "give a part or a training run another name",
    "cp": "a checked copy of a part or a training run, also to another store",
    "export": "a part to parquet, npy, safetensors, datasets or a map",
    "serve": "a page to ask a store and look at it, and the same as JSON",
    "doctor": "would a store of this model, on this machine, be right?",
    "demo": "the whole story on this machine, nothing downloaded",
}
"""By command, its line in the help. The module ``ghoststore.cli.<command>``, '-' as '_', defines ``command``."""


STARTS_OVER = "Nothing is left half-written; run again, it starts over."
RESUMES = "Whatever was committed is intact: the same command resumes."
AFTER_INTERRUPT = {
    **dict.fromkeys(("tokenize", "build", "full-gradients", "evaluate"), RESUMES),
    # Once it may have written something, it says so itself.
    "train": "The same command starts again, or goes on from its newest checkpoint.",
    "watch": "",
    "serve": "",
}
"""What to say after Ctrl-C or SIGTERM, by command; of the others STARTS_OVER."""


class LazyGroup(click.Group):
    """A group that imports a command when it is used: ``--help`` stays fast."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            message = error.message if isinstance(error, Interrupted) else None
            if message is None:
                message = f"{word(number)}. {AFTER_INTERRUPT.get(str(ctx.invoked_subcommand), STARTS_OVER)}".strip()
            raise Interrupted(number, message) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"ghoststore.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message} Commands: {', '.join(COMMANDS)}.", ctx) from None


def _say_versions(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    for line in versions_that_matter(__version__):
        click.echo(line)
    ctx.exit()


VERSION = click.Option(
    ["--version"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_versions,
    help="Show the version, and those of what its numbers depend on, and exit.",
)


@click.group(
    cls=LazyGroup,
    params=[VERSION],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
def cli() -> None:
    """A vector store of gradients: which of my training samples make the model better at this?"""


def _interrupted(error: BaseException) -> int:
    """Say what a signal left behind. Returns the exit code."""
    cause = error if isinstance(error, Interrupted) else error.__cause__
    interrupt = cause if isinstance(cause, Interrupted) else Interrupted(signal.SIGINT)
    message = f"{word(interrupt.number)}." if interrupt.message is None else interrupt.message
    return say_error(interrupt, message, interrupt.exit_code, intro="") if message else interrupt.exit_code


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit. The ``ghoststore`` script calls this."""
    arguments = sys.argv[1:] if args is None else args
    lazy.process_is_ours = True
    with guarded():
        code = _logged(arguments) if FLAG in arguments else _run(arguments)
    freeze()  # the process ends: nothing has to be looked through for garbage once more
    sys.exit(code)


def _logged(arguments: list[str]) -> int:
    """Run a command as :func:`_run` does, with nothing but events on stderr."""
    with logging_to(sys.stderr, arguments, __version__) as log:
        stderr = EventStderr(sys.stderr, log)
        sys.stderr = cast("TextIO", stderr)
        code = 1
        try:
            code = _run(arguments)
        except Exception as error:  # noqa: BLE001 - a bug: its traceback is in the event
            say_bug(error)
        finally:
            stderr.finish()
            log.end(code)
    return code


def _run(arguments: list[str]) -> int:
    """Run a command. Returns its exit code; an unforeseen error is raised."""
    try:
        refuse_unreadable(arguments)
        with terminating():
            code = cli.main(args=arguments, prog_name="ghoststore", standalone_mode=False)
            sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort) as error:  # click turns the first into the second
        return _interrupted(error)
    except click.exceptions.Exit as end:
        return end.exit_code
    except Exception as error:
        if (code := report_error(error)) is None:
            raise
    return code if isinstance(code, int) else 0
