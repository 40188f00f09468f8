"""The arguments of every command as typed values; Typer reads options and help from them.

Words like ``decode.exit_at=0.9`` change settings; they may stand before, between and after options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from typer import Argument, Option

MODEL_HELP = (
    "folder of a checkpoint, an adapter or a run, hub id (owner/name), or a shipped one: mini, "
    "mini-block, zero"
)
TASK_HELP = (
    "countdown, sudoku, gsm8k, math, reasoning_gym or jsonl (docs/tasks.md), or your own: "
    "module:factory or file.py:factory; settings as task.key=value"
)

Recipe = Annotated[
    str,
    Argument(help="name of a shipped recipe (`unmaskrl recipes`), a YAML file, or a run's folder"),
]
Changes = Annotated[
    list[str],
    Argument(metavar="[KEY=VALUE]...", help="change settings, e.g. decode.exit_at=0.9"),
]
Model = Annotated[str, Argument(help=MODEL_HELP)]
Task = Annotated[str, Option(help=TASK_HELP)]
Data = Annotated[
    str | None,
    Option(
        metavar="F.jsonl",
        help="task.data: problems from a JSONL file; gsm8k, math and jsonl also take a folder or "
        "a hub id",
    ),
]
Resume = Annotated[
    bool, Option("--resume", help="go on from the newest whole checkpoint of the run")
]
Force = Annotated[
    bool,
    Option(
        "--force",
        help="move a run that is already in the folder aside (NAME-old-1); a folder with other "
        "files is left alone",
    ),
]
Quiet = Annotated[bool, Option("--quiet", help="no progress display, only the closing table")]
Split = Annotated[Literal["train", "validation", "test"], Option(help="which problems")]
Temperature = Annotated[float, Option(help="0 is greedy")]
TopK = Annotated[
    int | None, Option(help="draw from so many of the most probable tokens (default: decode.top_k)")
]
TopP = Annotated[
    float | None, Option(help="and from the fewest that reach this probability (decode.top_p)")
]
Seed = Annotated[int, Option(help="of every random draw")]
Threads = Annotated[int, Option(help="CPU threads; 0 measures")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float64", "auto"],
    Option(help="of the weights; auto: what the checkpoint has"),
]
Device = Annotated[str, Option(help="cpu, cuda, mps or auto (a GPU if there is one)")]
Quantize = Annotated[Literal["nf4"] | None, Option(help="4-bit blocks by bitsandbytes")]
Family = Annotated[
    str | None,
    Option(
        metavar="MODULE:FACTORY",
        help="model family of your own that reads the checkpoint (docs/extend.md)",
    ),
]
Size = Annotated[int, Option(help="number of problems")]
BatchSize = Annotated[int, Option(help="completions decoded at once")]
Json = Annotated[str | None, Option(metavar="OUT", help="write every figure")]
Plot = Annotated[str | None, Option(metavar="OUT.png", help="write a picture")]


@dataclass(kw_only=True)
class Arguments:
    """What a command line says. ``runs`` is ``module:function`` in this package, loaded late."""

    command: ClassVar[str]
    panel: ClassVar[str]
    runs: ClassVar[str]


@dataclass(kw_only=True)
class TrainArguments(Arguments):
    """RL: improve a model on a task with a verifiable reward."""

    command = "train"
    panel = "Training"
    runs = "train:train_command"

    recipe: Recipe
    overrides: Changes = field(default_factory=list)
    resume: Resume = False
    force: Force = False
    quiet: Quiet = False


@dataclass(kw_only=True)
class SFTArguments(Arguments):
    """Supervised masked-diffusion training, e.g. of the shipped base."""

    command = "sft"
    panel = "Training"
    runs = "sft:sft_command"

    recipe: Annotated[
        str, Argument(help="mini-base, mini-block-base, zero-base, a YAML file, or a run's folder")
    ]
    overrides: Changes = field(default_factory=list)
    resume: Resume = False
    force: Force = False


@dataclass(kw_only=True)
class CheckArguments(Arguments):
    """Resolve a recipe: cost per update in denoiser calls, memory, warnings."""

    command = "check"
    panel = "Training"
    runs = "show.check:check_command"

    recipe: Recipe
    overrides: Changes = field(default_factory=list)
    yaml: Annotated[
        bool,
        Option("--yaml", help="write the whole recipe, and nothing else: a file for `train`"),
    ] = False
    processes: Annotated[int, Option(help="of the run, for the memory plan")] = 1


@dataclass(kw_only=True)
class InitArguments(Arguments):
    """Write a task, a reward and a recipe of your own into a new folder; they run as they are."""

    command = "init"
    panel = "Training"
    runs = "init:init_command"

    folder: Annotated[str, Argument(help="a new folder, or an empty one")]


@dataclass(kw_only=True)
class RecipesArguments(Arguments):
    """List the shipped recipes, show one as it is, or copy it to a file."""

    command = "recipes"
    panel = "Help"
    runs = "show.recipes:recipes_command"

    name: Annotated[str | None, Argument(help="show this one")] = None
    copy: Annotated[
        str | None, Option(metavar="F.yaml", help="write it to a new file, for changes of your own")
    ] = None


@dataclass(kw_only=True)
class SettingsArguments(Arguments):
    """Every setting of a recipe: its default, and what it means."""

    command = "settings"
    panel = "Help"
    runs = "show.settings:settings_command"

    name: Annotated[
        str | None, Argument(metavar="[NAME]", help="one section or setting, e.g. decode")
    ] = None


@dataclass(kw_only=True)
class DoctorArguments(Arguments):
    """What this machine has, and what each missing package would give."""

    command = "doctor"
    panel = "Help"
    runs = "show.doctor:doctor_command"


@dataclass(kw_only=True)
class ReportArguments(Arguments):
    """Write report.html of a run folder (curves, decodings), or compare several runs."""

    command = "report"
    panel = "Training"
    runs = "show.report:report_command"

    folders: Annotated[
        list[str], Argument(metavar="RUN...", help="run folders, e.g. runs/sudoku-mini-s0")
    ]
    out: Annotated[
        str, Option(metavar="F.html", help="the file of a comparison of several runs")
    ] = "comparison.html"


@dataclass(kw_only=True)
class ModelArguments(Arguments):
    """What the commands share that load one model."""

    model: Model
    overrides: Changes = field(default_factory=list)
    task: Task
    data: Data = None
    temperature: Temperature = 0.0
    top_k: TopK = None
    top_p: TopP = None
    seed: Seed = 0
    threads: Threads = 0
    dtype: Dtype = "float32"
    device: Device = "auto"
    quantize: Quantize = None
    family: Family = None


@dataclass(kw_only=True)
class EvalArguments(ModelArguments):
    """Accuracy, NFE and tokens per call of a model on a task."""

    command = "eval"
    panel = "Models"
    runs = "eval:eval_command"

    split: Split = "test"
    size: Size = 512
    samples: Annotated[int, Option(help="completions per problem, for pass@k")] = 1
    decode: Annotated[
        list[str] | None,
        Option(
            metavar="WORDS",
            help="a way of decoding, as changes of the model's settings, e.g. \"select=eb "
            'gamma=0.1"; may be given several times',
        ),
    ] = None
    seeds: Annotated[
        str | None,
        Option(
            metavar="0,1,2",
            help="several seeds instead of --seed: mean and spread (not if greedy)",
        ),
    ] = None
    batch_size: BatchSize = 256
    json: Annotated[
        str | None, Option(metavar="OUT", help="write summary, decode settings and every item")
    ] = None
    items: Annotated[
        str | None,
        Option(
            metavar="F.jsonl",
            help="keep finished completions here; started again, it continues (default: beside "
            "--json until that is written)",
        ),
    ] = None


@dataclass(kw_only=True)
class SampleArguments(ModelArguments):
    """Decode one prompt and show in which order the tokens appeared."""

    command = "sample"
    panel = "Models"
    runs = "sample:sample_command"

    task: Annotated[str | None, Option(help=TASK_HELP)] = None
    prompt: Annotated[str | None, Option(help="text of the user's message (instead of --task)")] = (
        None
    )
    index: Annotated[int, Option(help="which test problem of --task, from 0")] = 0
    keep: Annotated[float, Option(help="fix this share of the reference answer")] = 0.0


@dataclass(kw_only=True)
class PriorArguments(ModelArguments):
    """Generate prior answers for spatial pruning; resumes after an interruption."""

    command = "prior"
    panel = "Models"
    runs = "prior:prior_command"

    out: Annotated[str, Option(metavar="F", help="JSONL file to write")]
    size: Annotated[int, Option(help="number of training problems")] = 512
    samples: Annotated[int, Option(help="answers per problem; the first right is kept")] = 1
    batch_size: BatchSize = 64


@dataclass(kw_only=True)
class VarianceArguments(ModelArguments):
    """Variance of likelihood estimates on the same completions, with and without pruning."""

    command = "variance"
    panel = "Models"
    runs = "variance:variance_command"

    temperature: Temperature = 1.0
    keep: Annotated[float, Option(help="share of the reference answer that is fixed")] = 0.3
    exit_at: Annotated[
        float | None,
        Option(help="share decided before the exit call (default: the model's decode.json)"),
    ] = None
    select: Annotated[
        Literal["random", "protect_answer", "most_predictable", "protect_answer+most_predictable"],
        Option("--select-anchors", help="which tokens are fixed"),
    ] = "protect_answer"
    size: Annotated[int, Option(help="number of training problems")] = 16
    samples: Annotated[int, Option(help="completions per problem")] = 1
    draws: Annotated[int, Option(help="draws of masks per completion")] = 64
    estimators: Annotated[str, Option(help="comma-separated; settings as name:key=value")] = "elbo"
    num_mc: Annotated[int, Option(help="num_mc of estimators that have it")] = 3
    max_canvases: Annotated[int, Option(help="canvases per denoiser call")] = 1024
    json: Json = None
    plot: Plot = None


@dataclass(kw_only=True)
class FrontierArguments(ModelArguments):
    """Accuracy against denoiser calls: fixed steps, thresholds, learned sampler."""

    command = "frontier"
    panel = "Models"
    runs = "frontier:frontier_command"

    overrides: Annotated[
        list[str],
        Argument(metavar="[MODEL | KEY=VALUE]...", help="more models, and changes for all"),
    ] = field(default_factory=list)
    split: Split = "test"
    size: Size = 512
    gammas: Annotated[
        str | None,
        Option(help="fixed thresholds in nats, comma-separated (default: the head's grid)"),
    ] = None
    json: Json = None
    plot: Plot = None


COMMANDS: tuple[type[Arguments], ...] = (
    TrainArguments,
    SFTArguments,
    CheckArguments,
    InitArguments,
    ReportArguments,
    EvalArguments,
    SampleArguments,
    PriorArguments,
    VarianceArguments,
    FrontierArguments,
    RecipesArguments,
    SettingsArguments,
    DoctorArguments,
)
