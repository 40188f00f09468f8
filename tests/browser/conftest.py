"""The one browser that all pages are opened in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.driver import Browser, installed

NOTE = "no browser: install chromium and chromedriver (Debian: chromium chromium-driver)"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = installed()
    if found is None:
        pytest.skip(NOTE)
    with Browser(*found) as window:
        yield window
