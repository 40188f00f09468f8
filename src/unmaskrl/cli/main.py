"""The command ``unmaskrl``: bad input gets one line and a non-zero exit code.

Typer reads a command line into the values of ``arguments.py``. The command runs after that,
outside of Typer, which would turn an interrupt into an exit without a word.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Annotated, Any, get_type_hints

import typer

from .. import __version__
from ..utils.plain_text import printable
from ..utils.stopping import Stopped, is_main, raise_stopped, signals_to
from .arguments import COMMANDS, Arguments
from .hints import way_on

# ClickException: click's in older versions of Typer, its own copy in newer ones.
UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]

SMALLER = (
    "decode fewer rows at once (train.prompts_per_step, eval.batch_size, --batch-size), or see "
    "what `unmaskrl check` proposes"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 for bad input or an unwritten result, 130 or 143 if SIGINT
    or SIGTERM stopped it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse(words)
    if isinstance(args, int):
        return args
    if os.getcwd() not in sys.path:
        # reward functions of the user's own; last, so that nothing installed is shadowed
        sys.path.append(os.getcwd())
    try:
        with signals_to(raise_stopped, (signal.SIGTERM,)):
            return command_of(args)(args) or 0
    except (ValueError, OSError) as error:
        say_error(error)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not loaded here
            raise
        reason = str(error).strip().partition("\n")[0]
        say_error(ValueError(f"out of memory ({reason}); {SMALLER}"))
        return 2
    except KeyboardInterrupt as interrupt:
        stopped = interrupt if isinstance(interrupt, Stopped) else Stopped(signal.SIGINT)
        if is_main():
            sys.stderr.write(
                f"unmaskrl: {printable(stopped.place)}; {way_on(stopped, args, words)}\n"
            )
        return stopped.code


def say_error(error: Exception) -> None:
    """One line; a process that is not the main one adds its number, because the main one may have
    met the same.
    """
    whose = "" if is_main() else f"process {os.environ['RANK']}: "
    sys.stderr.write(f"unmaskrl: error: {whose}{printable(str(error))}\n")


def parse(words: Sequence[str]) -> Arguments | int:
    """The arguments of a command, or the exit code where there is nothing to run (--help, a wrong
    option).
    """
    try:
        return typer.main.get_command(app())(
            args=list(words), prog_name="unmaskrl", standalone_mode=False
        )
    except UsageProblem as problem:
        context = getattr(problem, "ctx", None)
        path = context.command_path if context else "unmaskrl"
        # as click words it: "Missing option '--task'."
        text = getattr(problem, "format_message", problem.__str__)().strip().rstrip(".")
        text = text.replace(": Value error, ", ": ")  # pydantic's, before an error of ours
        say_error(ValueError(f"{text[:1].lower()}{text[1:]}; see `{path} --help`"))
        return 2


def app() -> typer.Typer:
    """The command line as Typer sees it: every command returns its arguments."""
    result = typer.Typer(
        help="RL post-training of masked diffusion language models.",
        epilog="Settings are changed as section.key=value, e.g. decode.exit_at=0.9.",
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    result.callback(invoke_without_command=True)(_before)
    for kind in COMMANDS:
        result.command(kind.command, help=inspect.getdoc(kind), rich_help_panel=kind.panel)(
            _reader(kind)
        )
    return result


def command_of(args: Arguments) -> Any:
    """The function that runs a command; its module is loaded only now."""
    module, _, name = args.runs.partition(":")
    return getattr(import_module(f".{module}", __package__), name)


def _before(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="say the version and stop")] = False,
) -> None:
    if version:
        sys.stdout.write(f"unmaskrl {__version__}\n")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        sys.stdout.write(f"{context.get_help()}\n")
        raise typer.Exit(2)


def _reader(kind: type[Arguments]) -> Any:
    """A function whose parameters are the fields of ``kind``."""
    hints = get_type_hints(kind, include_extras=True)

    def read(**values: Any) -> Arguments:
        return kind(**values)

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    read.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    read.__annotations__ = {field.name: hints[field.name] for field in fields(kind)}
    return read


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
