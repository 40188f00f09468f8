"""README.md beside saved weights: where they come from, what they can, how to load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...recipes.schema import Recipe, SFTRecipe
from ...utils.files import json_text, read_jsonl, write_text
from ...utils.torch_setup import installed

CARD = "README.md"
_PACKAGES = ("unmaskrl", "torch", "transformers")
Figure = tuple[str, Mapping[str, Any]]  # what was measured, and its row of eval.jsonl


def write_card(
    folder: Path, recipe: Recipe | SFTRecipe, step: int, weights: str, figures: Sequence[Figure]
) -> None:
    """The card of a model in ``folder``; ``weights``: raw, or ema (their average)."""
    base = recipe.model.path
    is_hub_id = base.count("/") == 1 and not Path(base).exists()
    head: dict[str, Any] = {"library_name": "unmaskrl"}
    head |= {"base_model": base} if is_hub_id else {}
    head["tags"] = ["masked-diffusion", "rl" if isinstance(recipe, Recipe) else "sft"]
    versions = installed(*_PACKAGES)
    facts = {
        "base": f"{base} {recipe.model.revision or ''}".strip() or "none: trained from scratch",
        **_made_by(recipe),
        "steps": f"{step}, seed {recipe.run.seed}",
        "weights": "average over updates" if weights == "ema" else "of the last update",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    # where it ran is nobody else's business, and a moved run is the same
    settings = recipe.model_dump(mode="json", exclude={"run": {"out"}})
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {recipe.name}\n",
        "A masked diffusion language model, trained with unmaskrl.\n",
        "| | |\n|---|---|",
        *(f"| {name} | {_cell(text)} |" for name, text in facts.items()),
        *_measured(figures),
        '\n## Load\n\n```python\nimport unmaskrl as u\n\nmodel = u.load("this folder")\n```\n',
        "## Recipe\n\n```yaml",
        yaml.safe_dump(settings, sort_keys=False) + "```\n",
    ]
    write_text(folder / CARD, "\n".join(parts))


def figures_of(out: Path, weights: str) -> list[Figure]:
    """Test accuracy of a run before training and of ``weights`` after it, as far as it is known."""
    rows = {
        row.get("weights"): row
        for row in read_jsonl(out / "eval.jsonl")
        if row.get("split") == "test"
    }
    wanted = {"before": rows.get("base"), "after": rows.get(weights)}
    return [(name, row) for name, row in wanted.items() if row]


def _made_by(recipe: Recipe | SFTRecipe) -> dict[str, str]:
    """Data and method in one line each."""
    if isinstance(recipe, SFTRecipe):
        data = "; ".join(json_text(part.task) for part in recipe.data)
        return {"data": data, "method": "supervised masked diffusion"}
    method = {
        "estimator": recipe.estimator,
        "loss": recipe.loss,
        "advantage": recipe.advantage,
        "prior": recipe.prior.name,
        "exit_at": recipe.decode.exit_at,
    }
    return {"data": json_text(recipe.task), "method": json_text(method)}


def _measured(figures: Sequence[Figure]) -> list[str]:
    if not figures:
        return []
    lines = ["\n## Held-out accuracy\n", "| | accuracy | problems | denoiser calls |"]
    lines.append("|---|---:|---:|---:|")
    for name, row in figures:
        accuracy = f"{100 * row['accuracy']:.1f}%"
        lines.append(f"| {name} | {accuracy} | {row['num_problems']} | {row['nfe']:.1f} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
