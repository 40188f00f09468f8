"""The command ``unmaskrl``. Every sub-command has --help; bad input gets one line and a non-zero
exit code.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..utils.plain_text import printable
from ..utils.stopping import Stopped, is_main, raise_stopped, signals_to
from .hints import way_on

# priors imports torch
SELECTIONS = ("random", "protect_answer", "most_predictable", "protect_answer+most_predictable")
MODEL_HELP = (
    "folder of a checkpoint, an adapter or a run, hub id (owner/name), or a shipped one: mini, zero"
)
TASK_HELP = (
    "countdown, sudoku, gsm8k, math, reasoning_gym or jsonl (docs/tasks.md); settings as "
    "task.key=value"
)
DATA_HELP = (
    "task.data: problems from a JSONL file; gsm8k, math and jsonl also take a folder or a hub id"
)
RECIPE_HELP = "name of a shipped recipe (`unmaskrl recipes`), a YAML file, or a run's folder"
FORCE_HELP = (
    "move a run that is already in the folder aside (NAME-old-1); a folder with other "
    "files is left alone"
)
SEED_HELP = "of every random draw (default 0)"
SPLIT_HELP = "which problems (default test)"
EPILOG = (
    "Shipped recipes: see `unmaskrl recipes`. Settings are changed as section.key=value, e.g. "
    "decode.exit_at=0.9."
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as every other error is."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2; the usage is what --help is for."""
        self.exit(2, f"unmaskrl: error: {message}; see `{self.prog} --help`\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 for bad input or an unwritten result, 130 or 143 if SIGINT
    or SIGTERM stopped it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = parse(words)
    if os.getcwd() not in sys.path:
        # reward functions of the user's own; last, so that nothing installed is shadowed
        sys.path.append(os.getcwd())
    try:
        with signals_to(raise_stopped, (signal.SIGTERM,)):
            return args.run(args) or 0
    except (ValueError, OSError) as error:
        say_error(error)
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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of a command; settings (section.key=value) may stand anywhere after it."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    stray = [
        word
        for word in rest
        if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")
    ]
    if stray:
        top.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:  # argparse takes positional words in one place only
        args.overrides = [*args.overrides, *rest]
    return args


def parser() -> argparse.ArgumentParser:
    """The argument parser with all sub-commands."""
    top = Parser(
        prog="unmaskrl",
        description="RL post-training of masked diffusion language models.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"unmaskrl {__version__}")
    commands = top.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    _add_training(commands)
    _add_models(commands)
    _add_variance(commands)
    _add_frontier(commands)
    _add_inspection(commands)
    return top


def _add_training(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train", help="RL: improve a model on a task with a verifiable reward", epilog=EPILOG
    )
    train.add_argument("recipe", help=RECIPE_HELP)
    train.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes a setting of the recipe"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint of the run"
    )
    train.add_argument("--force", action="store_true", help=FORCE_HELP)
    train.add_argument(
        "--quiet", action="store_true", help="no progress display, only the closing table"
    )
    train.set_defaults(run=_train)
    sft = commands.add_parser(
        "sft", help="supervised masked-diffusion training, e.g. of the shipped base"
    )
    sft.add_argument("recipe", help="mini-base, zero-base, a YAML file, or a run's folder")
    sft.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes a setting of the recipe"
    )
    sft.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint of the run"
    )
    sft.add_argument("--force", action="store_true", help=FORCE_HELP)
    sft.set_defaults(run=_sft)


def _add_models(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "eval", help="accuracy, NFE and tokens per call of a model on a task"
    )
    _model_arguments(evaluate)
    evaluate.add_argument(
        "--split", default="test", choices=("train", "validation", "test"), help=SPLIT_HELP
    )
    evaluate.add_argument("--size", type=int, default=512, help="number of problems (default 512)")
    evaluate.add_argument(
        "--samples", type=int, default=1, help="completions per problem, for pass@k (default 1)"
    )
    evaluate.add_argument(
        "--decode",
        action="append",
        metavar='"key=value ..."',
        help='a way of decoding, as changes of the model\'s settings, e.g. "select=eb gamma=0.1"; '
        "may be given several times",
    )
    evaluate.add_argument(
        "--seeds",
        metavar="0,1,2",
        help="several seeds instead of --seed: mean and spread (not if greedy)",
    )
    evaluate.add_argument(
        "--batch-size", type=int, default=256, help="completions decoded at once (default 256)"
    )
    evaluate.add_argument(
        "--json", metavar="OUT", help="write summary, decode settings and every item"
    )
    evaluate.add_argument(
        "--items",
        metavar="F.jsonl",
        help="keep finished completions here; started again, it goes on (default: beside --json "
        "until that is written)",
    )
    evaluate.set_defaults(run=_eval)
    sample = commands.add_parser(
        "sample", help="decode one prompt and show in which order the tokens appeared"
    )
    _model_arguments(sample, task_required=False)
    sample.add_argument("--prompt", help="text of the user's message (instead of --task)")
    sample.add_argument(
        "--index", type=int, default=0, help="which test problem of --task, from 0 (default 0)"
    )
    sample.add_argument(
        "--keep", type=float, default=0.0, help="fix this share of the reference answer (default 0)"
    )
    sample.set_defaults(run=_sample)
    prior = commands.add_parser(
        "prior",
        help="build static prior answers for spatial pruning; killed and started again, it goes on",
    )
    _model_arguments(prior)
    prior.add_argument("--out", required=True, metavar="F", help="JSONL file to write")
    prior.add_argument(
        "--size", type=int, default=512, help="number of training problems (default 512)"
    )
    prior.add_argument(
        "--samples",
        type=int,
        default=1,
        help="answers per problem (default 1); the first right is kept",
    )
    prior.add_argument(
        "--batch-size", type=int, default=64, help="answers decoded at once (default 64)"
    )
    prior.set_defaults(run=_prior)


def _add_variance(commands: argparse._SubParsersAction) -> None:
    variance = commands.add_parser(
        "variance",
        help="variance of likelihood estimates over their masks, with and without pruning, on the "
        "same completions",
    )
    _model_arguments(variance)
    variance.set_defaults(temperature=1.0)
    variance.add_argument(
        "--keep",
        type=float,
        default=0.3,
        help="share of the reference answer that is fixed (default 0.3)",
    )
    variance.add_argument(
        "--exit-at",
        type=float,
        help="share decided before the exit call (default: the model's decode.json)",
    )
    variance.add_argument(
        "--select-anchors",
        dest="select",
        default="protect_answer",
        choices=SELECTIONS,
        help="which tokens are fixed",
    )
    variance.add_argument(
        "--size", type=int, default=16, help="number of training problems (default 16)"
    )
    variance.add_argument(
        "--samples", type=int, default=1, help="completions per problem (default 1)"
    )
    variance.add_argument(
        "--draws", type=int, default=64, help="draws of masks per completion (default 64)"
    )
    variance.add_argument(
        "--estimators",
        default="elbo",
        help="comma-separated; settings as name:key=value (default elbo)",
    )
    variance.add_argument(
        "--num-mc", type=int, default=3, help="num_mc of estimators that have it (default 3)"
    )
    variance.add_argument(
        "--max-canvases", type=int, default=1024, help="canvases per denoiser call (default 1024)"
    )
    variance.add_argument(
        "--json", metavar="OUT", help="write every figure, and the variance of each row"
    )
    variance.add_argument(
        "--plot", metavar="OUT.png", help="write a picture: variance per row in the three versions"
    )
    variance.set_defaults(run=_variance)


def _add_frontier(commands: argparse._SubParsersAction) -> None:
    frontier = commands.add_parser(
        "frontier", help="accuracy against denoiser calls: fixed steps, thresholds, learned sampler"
    )
    frontier.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="checkpoint folders, hub ids, or shipped ones: mini, zero",
    )
    frontier.add_argument(
        "--task",
        required=True,
        help=TASK_HELP,
    )
    frontier.add_argument("--data", metavar="F.jsonl", help=DATA_HELP)
    frontier.add_argument(
        "--split", default="test", choices=("train", "validation", "test"), help=SPLIT_HELP
    )
    frontier.add_argument("--size", type=int, default=512, help="number of problems (default 512)")
    frontier.add_argument(
        "--gammas", help="fixed thresholds in nats, comma-separated (default: the head's grid)"
    )
    frontier.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    frontier.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    frontier.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 (default) measures"
    )
    frontier.add_argument("--json", metavar="OUT", help="write every point")
    frontier.add_argument("--plot", metavar="OUT.png", help="write a picture")
    frontier.set_defaults(run=_frontier, overrides=[], dtype="float32")


def _add_inspection(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check", help="resolve a recipe: cost per update in denoiser calls, memory, warnings"
    )
    check.add_argument("recipe", help=RECIPE_HELP)
    check.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes a setting of the recipe"
    )
    check.add_argument(
        "--yaml",
        action="store_true",
        help="write the whole recipe, and nothing else: a file for `train`",
    )
    check.add_argument(
        "--processes", type=int, default=1, help="of the run, for the memory plan (default 1)"
    )
    check.set_defaults(run=_check)
    report = commands.add_parser(
        "report", help="write report.html of a run folder: curves and decodings, one file"
    )
    report.add_argument("folder", help="run folder, e.g. runs/sudoku-mini-s0")
    report.set_defaults(run=_report)
    recipes = commands.add_parser("recipes", help="list the shipped recipes")
    recipes.set_defaults(run=_recipes)


def _model_arguments(sub: argparse.ArgumentParser, task_required: bool = True) -> None:
    sub.add_argument("model", help=MODEL_HELP)
    sub.add_argument(
        "--task",
        required=task_required,
        help=TASK_HELP,
    )
    sub.add_argument("--data", metavar="F.jsonl", help=DATA_HELP)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    sub.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    sub.add_argument("--threads", type=int, default=0, help="CPU threads; 0 (default) measures")
    sub.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float64"),
        help="of the weights (default float32)",
    )
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes a setting: decode.key=value or task.key=value",
    )


def _train(args: argparse.Namespace) -> int:
    from ..recipes.checks import warnings_for
    from ..recipes.load import load_recipe
    from ..reporting.progress import SilentProgress, TrainProgress, summary_table
    from ..training.loop import train
    from ..utils.terminal import PlainConsole
    from .hints import what_next

    recipe = load_recipe(args.recipe, args.overrides)
    console = PlainConsole(quiet=not is_main())  # a table per process would be 64 tables
    for note in warnings_for(recipe):
        console.print(f"warning: {note}", style="yellow")
    progress = SilentProgress() if args.quiet or not is_main() else TrainProgress(console)
    summary = train(recipe, resume=args.resume, force=args.force, progress=progress)
    console.print(
        summary_table(
            summary["before"], summary["after"], summary["wall_minutes"], summary["report"]
        )
    )
    for line in what_next(recipe, summary):
        console.print(line, soft_wrap=True)
    if summary["unsaved"]:
        raise OSError(f"the run is complete, but {summary['unsaved']}")
    return 0


def _sft(args: argparse.Namespace) -> int:
    from ..recipes.load import load_recipe
    from ..recipes.schema import SFTRecipe
    from ..reporting.progress import SFTProgress
    from ..training.sft import run_sft
    from ..utils.terminal import PlainConsole
    from .sft import finish_sft

    recipe = load_recipe(args.recipe, args.overrides, SFTRecipe)
    console = PlainConsole()
    progress = SFTProgress(console)
    progress.start(recipe.train.steps, f"{recipe.name} seed {recipe.train.seed}")
    try:
        out = run_sft(recipe, resume=args.resume, force=args.force, report=progress.step)
    finally:
        progress.stop()
    finish_sft(recipe, out, console)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from .eval import eval_command

    return eval_command(args)


def _sample(args: argparse.Namespace) -> int:
    from .sample import sample_command

    return sample_command(args)


def _frontier(args: argparse.Namespace) -> int:
    from .frontier import frontier_command

    args.overrides += [word for word in args.models if "=" in word]
    args.models = [word for word in args.models if "=" not in word]
    return frontier_command(args)


def _prior(args: argparse.Namespace) -> int:
    from .prior import prior_command

    return prior_command(args)


def _variance(args: argparse.Namespace) -> int:
    from .variance import variance_command

    if args.exit_at is not None:
        args.overrides = [*args.overrides, f"decode.exit_at={args.exit_at}"]
    return variance_command(args)


def _check(args: argparse.Namespace) -> int:
    from .check import check_command

    return check_command(args)


def _report(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..reporting.html import write_report
    from ..utils.terminal import PlainConsole

    PlainConsole().print(f"report: {write_report(Path(args.folder))}", highlight=False)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from .recipes import recipes_command

    return recipes_command()
