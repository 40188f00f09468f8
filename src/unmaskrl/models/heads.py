"""The threshold head beside a model's weights: threshold.safetensors and threshold.json."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..core.threshold_head import ThresholdHead
from ..utils.files import json_text, write_whole

WEIGHTS = "threshold.safetensors"
CONFIG = "threshold.json"


def save_threshold(head: ThresholdHead, folder: str | os.PathLike[str]) -> None:
    """Write the head beside a model: threshold.safetensors and threshold.json."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}
    config = {
        "d_model": head.d_model,
        "gammas": head.grid,
        "start": head.start,
        "width": head.width,
        "floor": head.floor,
    }
    write_whole(target / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    write_whole(target / CONFIG, lambda part: part.write_text(json_text(config, indent=1) + "\n"))


def load_threshold(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> ThresholdHead | None:
    """The head beside a model; None if there is none, ValueError if it is damaged."""
    source = Path(folder)
    if not (source / CONFIG).is_file():
        return None
    try:
        config = json.loads((source / CONFIG).read_text())
        head = ThresholdHead(
            config.pop("d_model"), [float(gamma) for gamma in config.pop("gammas")], **config
        )
        head.load_state_dict(load_file(source / WEIGHTS))
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{source / CONFIG}: the threshold head cannot be read ({first}); save or download it "
            "again"
        ) from None
    return head.to(device).eval().requires_grad_(False)
