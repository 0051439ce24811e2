"""Chromium for tests of the explorer's page, and what its pages are measured by."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\u202eright to left \x1b[31m </li></ol><h1>owned</h1>",
]


@contextmanager
def chromium(*options: str) -> Iterator[Any]:
    """A browser, with ``options`` of its command line; the test is skipped where there is none."""
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason=f"the explorer needs {name}")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by Playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *options])
        yield browser
        browser.close()


@contextmanager
def new_page(browser: Any, **options: Any) -> Iterator[Any]:
    """A page of a context of its own; ``page.said`` collects what its console and its errors say."""
    context = browser.new_context(**{"viewport": {"width": 1024, "height": 800}, **options})
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    yield page
    context.close()


def contrast(page: Any, selector: str) -> float:
    """The least contrast (WCAG) of the text of the elements of ``selector`` on what is painted behind them."""
    script = """selector => {
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const paint = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); };
        const light = () => {
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
                .map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratios = [...document.querySelectorAll(selector)].map(element => {
            const grounds = [];
            for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
            canvas.clearRect(0, 0, 1, 1);
            grounds.forEach(paint);
            const ground = light();
            paint(getComputedStyle(element).color);
            const ink = light();
            return (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
        });
        return ratios.length ? Math.min(...ratios) : 0;
    }"""
    return float(page.evaluate(script, selector))
