"""Report and comparison in a real browser (``make browser``): silent, without requests, readable.

Pictures of every page, width and theme go to build/browser/.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.browser.driver import Browser
from tests.unit.reporting.test_compare import changed
from tests.unit.reporting.test_report import make_run, sample, write_lines
from unmaskrl.reporting.compare import write_comparison
from unmaskrl.reporting.html import write_report

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "build" / "browser"
WIDTHS = (360, 800, 1400)
RIGHT = "\ue014"
LEFT = "\ue012"
HOME = "\ue011"
# texts of a drawing that share more than a hair
OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("figure svg")) {
  const texts = svg.querySelectorAll("text");
  const boxes = Array.from(texts, (t) => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (across > 1 && down > 3) found.push(a + " / " + b);
  }));
  for (const [a, p] of boxes)
    if (p.right > innerWidth || p.left < 0) found.push(a + " leaves the page");
}
return found;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report, one of a run with long and hostile texts, and a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "run")
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    write_lines(run / "samples.jsonl", [{**row, "gold": "( 12 * 2 ) - 7"} for row in rows])
    hard = make_run(folder / "a-long-name-of-a-run-of-a-large-recipe")
    write_lines(hard / "samples.jsonl", [long_sample()])
    runs = [
        changed(folder / name, steps, estimator__name=name)
        for name, steps in (("stp", 120), ("diffu_grpo", 100), ("a-long-name-of-a-run", 80))
    ]
    return {
        "report": write_report(run),
        "hard": write_report(hard),
        "comparison": write_comparison(runs, folder / "comparison.html"),
    }


def long_sample() -> dict[str, Any]:
    """256 tokens, a long prompt, and text that would be a script."""
    row = sample(100, "train", 0)
    evil = "<img src=http://127.0.0.1/x onerror=alert(1)><script>alert(1)</script>"
    tokens = [f" word{i}" for i in range(255)] + [evil]
    steps = [1 + i // 4 for i in range(256)]
    lines = "word " * 200 + "x" * 300 + evil
    more = {"pieces": tokens, "decoded_step": steps, "nfe": 64, "anchor": [False] * 256}
    more |= {"exit": [False] * 256, "logps": [math.log(0.3 + i / 400) for i in range(256)]}
    return {**row, **more, "prompt": lines, "completion": lines, "gold": evil}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "hard", "comparison"])
def test_a_page_is_silent_and_fits(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    page = pages[name]
    browser.errors()
    browser.requests()
    browser.open(page, width=width, dark=dark)
    assert browser.errors() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(OVERLAPS) == []
    PICTURES.mkdir(parents=True, exist_ok=True)
    browser.picture(PICTURES / f"{name}-{width}-{'dark' if dark else 'light'}.png")


def test_the_slider_moves_by_keys(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], width=800)
    sliders = browser.find(".decoding .steps input")
    assert len(sliders) == browser.run("return document.querySelectorAll('.decoding').length") > 5

    def state() -> dict[str, Any]:
        return browser.run(
            "const view = document.querySelector('.decoding');"
            "const count = (kind) => view.querySelectorAll('.tile.' + kind).length;"
            "return {value: Number(view.querySelector('input').value), open: count('open'),"
            " later: count('later'), now: count('now'),"
            " text: view.querySelector('output').textContent};"
        )

    before = state()
    calls = before["value"]
    assert (before["open"], before["later"], before["now"]) == (0, 0, 0)
    browser.type(sliders[0], HOME)
    start = state()
    assert start["value"] == 0 and start["now"] == 0
    assert start["text"] == "Before the first call: 25 positions are masked."
    assert start["later"] > 0  # blocks that have to wait
    hidden = start["open"] + start["later"]
    for call in range(1, calls):
        browser.type(sliders[0], RIGHT)
        seen = state()
        assert seen["value"] == call and seen["now"] >= 1
        assert seen["open"] + seen["later"] == hidden - seen["now"]
        hidden = seen["open"] + seen["later"]
        assert seen["text"].startswith(f"Call {call} of {calls}: chose {seen['now']} of ")
        assert "probability 78%" in seen["text"]  # exp(-0.25)
    browser.picture(PICTURES / "slider.png")
    browser.type(sliders[0], RIGHT)
    end = state()
    assert (end["open"], end["later"]) == (0, 0) and end["text"].startswith(f"Call {calls} of")
    browser.type(sliders[0], LEFT)
    assert state()["value"] == calls - 1
    assert browser.errors() == []


def test_the_browser_would_have_said_so(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page that asks, errs and overlaps."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src=http://127.0.0.1:9/x><script>missing()</script>"
        "<figure><svg><text y=20>one</text><text y=22>two</text></svg></figure>"
    )
    browser.open(page, width=360)
    assert any("missing is not defined" in line for line in browser.errors())
    assert "http://127.0.0.1:9/x" in browser.requests()
    assert browser.run(OVERLAPS) == ["one / two"]
