"""The explorer's pages by axe-core: names, roles, contrast, order of headings, in both themes; and by the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.support.browser import new_page
from tests.support.score_runs import append, make, whole

if TYPE_CHECKING:
    from tests.conftest import Lab

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python has axe-core")
pytestmark = pytest.mark.slow
VIEWS = {
    "ask": ("#/ask", ".empty"),
    "answer": ("#/ask?text=the+old+dog&bottom-k=2", ".hit"),
    "no answer": ("#/ask?text=the+old+dog&where=nonesuch", ".problem"),
    "sample": ("#/sample/part/3", "#sample .card"),
    "runs": ("#/runs", "#runs table"),
    "run": ("#/runs/first", ".samples"),
    "two runs": ("#/runs/first?with=second", "[aria-label='Two runs']"),
    "store": ("#/store", ".parts"),
}
RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
}


@pytest.fixture(scope="module")
def explorer(lab: Lab, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ghoststore.Explorer]:
    folder = tmp_path_factory.mktemp("access") / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=lab.corpus, store=folder, name="part")
    whole(folder, "first")
    append(make(folder, "second"), 0, 10)
    with ghoststore.serve({"first": folder, "other": built}) as explorer:
        yield explorer


def findings(page: Any) -> list[str]:
    """What axe-core finds on the page: rule, how bad it is, and where."""
    violations = axe.Axe().run(page, options=RULES).response["violations"]
    return [
        f"{found['id']} ({found['impact']}): {node['html'][:120]} {node.get('failureSummary', '')[:200]}"
        for found in violations
        for node in found["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1000])
def test_axe_finds_nothing(browser: Any, explorer: ghoststore.Explorer, theme: str, width: int) -> None:
    found: dict[str, list[str]] = {}
    with new_page(browser, viewport={"width": width, "height": 900}, color_scheme=theme) as page:
        for name, (fragment, wait_for) in VIEWS.items():
            page.goto(f"{explorer.url}&store=first{fragment}")
            page.wait_for_selector(wait_for)
            for summary in page.locator("details:visible > summary").all():
                summary.click()
            if of_view := findings(page):
                found[name] = of_view
    assert found == {}


def test_axe_finds_nothing_when_the_server_has_gone(browser: Any, built: Path) -> None:
    with new_page(browser) as page:
        with ghoststore.serve(built) as explorer:
            page.goto(explorer.url)
            page.wait_for_selector(".empty")
        page.get_by_role("link", name="Store").click()
        page.locator("#lost").wait_for()
        assert findings(page) == []


def test_the_keyboard_is_enough(browser: Any, explorer: ghoststore.Explorer) -> None:
    """From the address to the numbers of a run's plot, in the order of the page; what is focused can be seen."""
    with new_page(browser) as page:
        page.goto(f"{explorer.url}&store=first#/runs/first")
        page.wait_for_selector(".samples")
        seen = []
        for _ in range(14):
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate(
                    "(e => [e.tagName, e.id || e.textContent.trim().slice(0, 20), getComputedStyle(e).outlineStyle])"
                    "(document.activeElement)"
                )
            )
        assert all(style == "solid" for _, _, style in seen), seen
        names = [name for _, name, _ in seen]
        assert names[:5] == ["Skip to content", "nav-ask", "nav-runs", "nav-store", "stores"]
        assert names[5:7] == ["All runs", "compare"]
        assert [tag for tag, _, _ in seen[8:10]] == ["SUMMARY", "SUMMARY"]
        page.locator(".plots summary").first.focus()
        page.keyboard.press("Enter")
        page.locator("figure tbody tr").first.wait_for()
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"


def test_reduced_motion(browser: Any, explorer: ghoststore.Explorer) -> None:
    with new_page(browser, reduced_motion="reduce") as page:
        page.goto(f"{explorer.url}&store=first#/runs/first")
        page.wait_for_selector(".samples")
        moving = "document.getAnimations().length"
        assert page.evaluate(moving) == 0
