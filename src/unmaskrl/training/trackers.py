"""Trackers: a run's settings, metrics and samples in TensorBoard, W&B, trackio or MLflow.

Accelerate starts them and hands on the metrics. A resumed run continues the tracker's own run: its
id is kept in ``trackers.json`` in the run folder. Only the main process tracks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import yaml
from accelerate.utils import LoggerType

from ..utils.files import read_json, write_json

if TYPE_CHECKING:
    from .state import Training

STATE = "trackers.json"
EXTRAS = {"tensorboard": "train"}  # others have an extra of their own name
TABLE = "samples"
COLUMNS = ("step", "split", "id", "prompt", "completion", "reward", "correct")
Row = dict[str, Any]


def check_trackers(names: Sequence[str]) -> None:
    """ValueError if a tracker that was asked for is not installed: a run of hours without it is
    not what was wanted.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"run.log_with: {name} is not installed; pip install "
                f"'unmaskrl[{EXTRAS.get(name, name)}]', or leave it out of run.log_with"
            )


def start_trackers(run: Training) -> None:
    """Start the trackers of ``run.log_with``, or continue theirs, and hand over the settings."""
    names = run.recipe.run.log_with
    if not names:
        return
    asked: list[Any] = [LoggerType(name) for name in names]
    run.accelerator.log_with = asked
    path = run.out / STATE
    known = read_json(path) if path.is_file() else {}
    with warnings.catch_warnings():
        # third-party start-up warnings say nothing about the run
        warnings.simplefilter("ignore")
        run.accelerator.init_trackers(
            run.recipe.run.project,
            init_kwargs={name: options(run, name, known.get(name)) for name in names},
        )
    run.trackers = True
    if run.accelerator.is_main_process:
        settings = run.recipe.model_dump(mode="json")
        ids = {name: _hand_over(run, name, settings) for name in names}
        write_json(path, known | {name: its for name, its in ids.items() if its})


def track(run: Training, values: Row, step: int) -> None:
    """Numbers of one step."""
    if run.trackers:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        for key in [k for k in numbers if any(other.startswith(f"{k}/") for other in numbers)]:
            # where names are paths, "seconds" cannot stand beside "seconds/rollout"
            numbers[f"{key}/total"] = numbers.pop(key)
        run.accelerator.log(numbers, step=step)


def track_samples(run: Training, rows: Sequence[Row], step: int) -> None:
    """A table of decoded answers, the form that each tracker has for one."""
    if not run.trackers or not run.accelerator.is_main_process:
        return
    data = [[_cell(row, column) for column in COLUMNS] for row in rows]
    for name in run.recipe.run.log_with:
        _LOG_TABLE[name](run.accelerator.get_tracker(name), data, step)


def options(run: Training, name: str, known: str | None) -> Row:
    """What a tracker is started with; ``known`` is the id under which it knows this run already."""
    r = run.recipe.run
    group = r.group or run.recipe.name
    if name == "tensorboard":
        # steps that are done again after a resume replace those in the files
        return {"purge_step": run.step + 1} if run.step else {}
    if name == "wandb":
        told: Row = {"name": run.out.name, "group": group, "tags": list(r.tags)}
        return told | ({"id": known, "resume": "allow"} if known else {})
    if name == "trackio":
        return {"name": known or run.out.name, "group": group, "resume": "allow"}
    tags = {"group": group, **dict.fromkeys(r.tags, "true")}
    return {"run_id": known} if known else {"run_name": run.out.name, "tags": tags}


def _hand_over(run: Training, name: str, settings: Row) -> str | None:
    """Give a tracker the settings; its id of the run, None if it needs none."""
    tracker: Any = run.accelerator.get_tracker(name)
    if name == "tensorboard":
        text = yaml.safe_dump(settings, sort_keys=False)
        tracker.writer.add_text("config", "    " + text.replace("\n", "\n    "), run.step)
        return None
    if name == "mlflow" and run.step:
        return tracker.active_run.info.run_id  # its parameters are written once
    tracker.store_init_configuration(_flat(settings))
    if name == "wandb":
        return tracker.run.id
    return tracker.run.name if name == "trackio" else tracker.active_run.info.run_id


def _flat(settings: Row) -> Row:
    """Settings as section.key; what is no number or text is written as text."""
    flat: Row = {}
    for section, values in settings.items():
        pairs = (
            {section: values}
            if not isinstance(values, dict)
            else {f"{section}.{key}": value for key, value in values.items()}
        )
        flat |= {k: v if isinstance(v, int | float | str) else str(v) for k, v in pairs.items()}
    return flat


def _cell(row: Row, column: str) -> str | float | bool:
    value = row.get(column, "")
    return value if isinstance(value, int | float | str) else str(value)


def _tensorboard_table(tracker: Any, data: list[list[Any]], step: int) -> None:
    def line(cells: Sequence[Any]) -> str:
        words = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells)
        return f"| {' | '.join(words)} |"

    rule = f"|{'---|' * len(COLUMNS)}"
    tracker.writer.add_text(TABLE, "\n".join([line(COLUMNS), rule, *map(line, data)]), step)


def _wandb_table(tracker: Any, data: list[list[Any]], step: int) -> None:
    tracker.log_table(TABLE, columns=list(COLUMNS), data=data, step=step)


def _trackio_table(tracker: Any, data: list[list[Any]], step: int) -> None:
    import pandas

    table = import_module("trackio").Table(dataframe=pandas.DataFrame(data, columns=list(COLUMNS)))
    tracker.run.log({TABLE: table}, step=step)


def _mlflow_table(tracker: Any, data: list[list[Any]], step: int) -> None:
    columns = {name: [row[i] for row in data] for i, name in enumerate(COLUMNS)}
    import_module("mlflow").log_table(
        columns, artifact_file=f"{TABLE}.json", run_id=tracker.active_run.info.run_id
    )


_LOG_TABLE = {
    "tensorboard": _tensorboard_table,
    "wandb": _wandb_table,
    "trackio": _trackio_table,
    "mlflow": _mlflow_table,
}
