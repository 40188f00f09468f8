"""Generated pages are what the tables in the code say, and every page is in the site's index."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.reference import settings, sft_settings
from unmaskrl.recipes.schema import SFTRecipe

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("pages", ROOT / "dev" / "pages.py")
assert _spec is not None and _spec.loader is not None
pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pages)


@pytest.mark.parametrize("name", pages.PAGES)
def test_pages_are_as_generated(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == pages.PAGES[name](), "run python dev/pages.py"


def test_every_setting_says_what_it_means() -> None:
    silent = [one.name for one in settings() + sft_settings() if not one.meaning]
    assert not silent, "a description is missing in recipes/schema.py"


def test_every_page_is_in_the_index() -> None:
    listed: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, str):
            listed.append(node)
        elif isinstance(node, dict):
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    site = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())
    walk(yaml.safe_load(site)["nav"])
    there = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted(there)


def test_links_between_pages_lead_somewhere() -> None:
    pattern = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target, _ in pattern.findall(page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_to_files_of_the_repository_lead_somewhere() -> None:
    """The site has docs/ alone, so what lies outside is linked where the repository is."""
    start = "https://github.com/unmaskrl/unmaskrl"
    pattern = re.compile(rf"{start}/(?:tree|blob)/main/([^)#\s]+)")
    found = [
        (page.name, target)
        for page in (ROOT / "docs").glob("*.md")
        for target in pattern.findall(page.read_text(encoding="utf-8"))
    ]
    assert found
    assert not [(page, target) for page, target in found if not (ROOT / target).exists()]


def test_the_supervised_recipe_of_the_page_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(# sft\.yaml\n.*?)```", page, re.S)
    (tmp_path / "sft.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "sft.yaml"), [], SFTRecipe)
    assert recipe.model.lora and recipe.data[0].gen_length == recipe.eval_decode["jsonl"].gen_length
