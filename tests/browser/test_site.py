"""The documentation's site in a real browser (``make browser``): silent, and no other server is
asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.driver import Browser
from tests.browser.test_pages import PICTURES, ROOT, WIDTHS

SITE = ROOT / "build" / "site"
PAGES = ("index.html", "first-run/index.html", "settings/index.html", "metrics/index.html")


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the built site."""
    if not (SITE / "index.html").is_file():
        pytest.skip("no site: make docs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_site_is_silent_and_stays_at_home(
    browser: Browser, site: str, page: str
) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        browser.errors()
        browser.requests()
        browser.open(f"{site}/{page}", width=width)
        asked = browser.requests()
        assert browser.errors() == []
        assert f"{site}/{page}" in asked
        assert [address for address in asked if not is_at_home(address, site)] == []
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run("return document.querySelector('h1').textContent.length") > 3
        name = Path(page).parent.name or "index"
        browser.picture(PICTURES / f"site-{name}-{width}.png")


def is_at_home(address: str, site: str) -> bool:
    """Whether an address is the site's own, or none of a server at all."""
    return address.startswith((f"{site}/", "data:", "blob:"))
