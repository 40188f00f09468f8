"""The README's pictures from the report of a run: ``make pictures RUN=runs/sudoku-mini-s0``.

They are what a headless Chromium shows of report.html, so they change with the report.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser.driver import Browser, installed  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
WIDTH = 1100
# what the page's first screens hold: accuracies, cost and the first curves
TOP = 880
# one whose answer is right, if there is such
DECODING = """const all = Array.from(document.querySelectorAll(".decoding"));
const view = all.find((one) => one.textContent.trim().startsWith("right")) || all[0];
const box = view.getBoundingClientRect();
return [box.x - 8, box.y + scrollY - 8, box.width + 16, box.height + 16];"""


def main(run: str) -> int:
    """Write demo.png and decoding.png."""
    page = Path(run) / "report.html"
    found = installed()
    if not page.is_file() or found is None:
        what = f"no {page}: train first" if found else "no browser: install chromium and its driver"
        sys.stderr.write(f"dev/pictures.py: {what}\n")
        return 2
    with Browser(*found) as browser:
        browser.open(page, width=WIDTH)
        browser.picture(FIGURES / "demo.png", (0, 0, WIDTH, TOP))
        browser.picture(FIGURES / "decoding.png", browser.run(DECODING))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
