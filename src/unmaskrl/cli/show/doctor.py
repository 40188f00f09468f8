"""`unmaskrl doctor`: what this machine has, and what each missing package would give."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch
from rich.table import Table

from ...utils.terminal import PlainConsole
from ...utils.torch_setup import installed
from ..arguments import DoctorArguments

# Optional packages: the extra that installs them, and what they give.
OPTIONAL = {
    "datasets": ("tasks", "problems from the hub or a dataset folder"),
    "math_verify": ("tasks", "a second judge of mathematical answers"),
    "reasoning_gym": ("tasks", "the task reasoning_gym"),
    "lm_eval": ("lm-eval", "lm-evaluation-harness with unmaskrl's decoding"),
    "bitsandbytes": ("quantize", "4-bit base weights (CUDA)"),
    "wandb": ("wandb", "tracking: log_with=[wandb]"),
    "trackio": ("trackio", "tracking: log_with=[trackio]"),
    "mlflow": ("mlflow", "tracking: log_with=[mlflow]"),
    "tensorboard": ("train", "tracking: log_with=[tensorboard]"),
}
NEEDED = ("unmaskrl", "torch", "transformers", "accelerate", "pydantic", "safetensors", "rich")
GIB = 2**30


def doctor_command(args: DoctorArguments) -> int:
    """unmaskrl doctor."""
    console = PlainConsole()
    table = Table("name", "value", box=None, show_header=False, pad_edge=False)
    table.columns[1].overflow = "fold"
    for name, value in facts():
        table.add_row(name, value)
    console.print(table)
    console.print()
    extras = Table("optional package", "version", "gives", "install", box=None, pad_edge=False)
    for column in extras.columns:
        column.overflow = "fold"
    for package, (extra, use) in OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        version = installed(package.replace("_", "-"))[package.replace("_", "-")] if there else "-"
        extras.add_row(package, version, use, "" if there else f"pip install 'unmaskrl[{extra}]'")
    console.print(extras, highlight=False)
    return 0


def facts() -> list[tuple[str, str]]:
    """Versions, processor, memory, accelerators, disks."""
    result = [("python", f"{platform.python_version()} on {platform.platform()}")]
    result += list(installed(*NEEDED).items())
    result.append(
        ("processor", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    )
    result.append(("threads", f"{torch.get_num_threads()} of torch (OMP_NUM_THREADS sets them)"))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        result.append(("memory", f"{memory:.1f} GiB"))
    result += accelerators()
    result += [(f"disk of {folder}", free(folder)) for folder in (Path.cwd(), hub_folder())]
    return result


def accelerators() -> list[tuple[str, str]]:
    """Every GPU with its memory, or one line that says there is none."""
    if torch.cuda.is_available():
        return [
            (
                f"gpu {i}",
                f"{torch.cuda.get_device_name(i)}, "
                f"{torch.cuda.get_device_properties(i).total_memory / GIB:.1f} GiB, "
                f"bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}",
            )
            for i in range(torch.cuda.device_count())
        ]
    if torch.backends.mps.is_available():
        return [("gpu", "Apple (mps), untried: --device mps for eval and sample")]
    built = torch.version.cuda or "without CUDA"
    return [("gpu", f"none found; torch is built {built}")]


def hub_folder() -> Path:
    """Where downloaded checkpoints are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def free(folder: Path) -> str:
    """Free space where a folder is, or would be."""
    while not folder.exists():
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / GIB:.1f} GiB free"
    except OSError as error:
        return f"unreadable ({error.strerror})"
