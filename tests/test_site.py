"""The documentation site: it builds from this checkout alone, every link in it leads somewhere, and its pages fetch
nothing from anywhere else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from tests.test_docs import PAGES

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data", "use": "href"}
"""By element, the attribute with what a browser fetches for it; of a ``link`` that is its href."""
EXTENSIONS = ("tables", "sane_lists", "pymdownx.superfences")
"""Those of mkdocs.yml that decide what is a list, a table or a block of code."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    for tool in ("mkdocs", "material"):
        pytest.importorskip(tool, reason=f"{tool} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    done = subprocess.run(
        [*map(str, command), "--site-dir", str(folder)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@dataclass
class Page(HTMLParser):
    """What a page of the site links to and loads, and its anchors."""

    path: Path
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.anchors |= {has[name] for name in ("id", "name") if name in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if tag == "link":
            self.loads.append(has.get("href", ""))
        if LOADS.get(tag) in has:
            self.loads.append(has[LOADS[tag]])
        self.loads += re.findall(r"url\(([^)]+)\)", has.get("style", ""))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def elsewhere(address: str) -> bool:
    parts = urlsplit(address.strip("'\""))
    return bool(parts.netloc) or parts.scheme not in ("", "data")


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 50
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            to = to / "index.html" if to.is_dir() else to
            assert to.is_file(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and to in pages:
                assert unquote(parts.fragment) in pages[to].anchors, f"{path.relative_to(site)}: {link}"


@pytest.mark.slow
def test_what_pages_load_is_there_and_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [address for address in page.loads if elsewhere(address)], path
        loaded = [urlsplit(address.strip("'\"")) for address in page.loads]
        files = [unquote(parts.path) for parts in loaded if not parts.scheme and parts.path]
        assert not [file for file in files if not (path.parent / file).exists()], path
    for sheet in site.rglob("*.css"):
        fetched = re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", sheet.read_text(encoding="utf-8"))
        assert not [found for found in fetched if elsewhere(found[0] or found[1])], sheet


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the pages are opened by Playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "cli", "query", "models", "design/index"])
def test_a_page_in_a_browser(browser: Any, site: Path, name: str) -> None:
    """It asks no other host for anything, and on a telephone nothing but tables and code scrolls sideways."""
    page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / f"{name}.html").as_uri())
    page.wait_for_load_state("networkidle")
    assert asked
    assert not [address for address in asked if not address.startswith("file://")]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.context.close()


def counts(html: str) -> dict[str, int]:
    found = {tag: len(re.findall(rf"<{tag}[ >]", html)) for tag in ("li", "ol", "ul", "table", "td", "h2", "h3")}
    return {**found, "code": len(re.findall(r"<pre", html))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_site_reads_a_page_as_a_git_host_does(page: Path) -> None:
    """The site's Markdown wants an empty line before a list, CommonMark does not: an item would be lost there."""
    markdown = pytest.importorskip("markdown", reason="mkdocs is not installed: pip install '.[docs]'")
    pytest.importorskip("pymdownx", reason="mkdocs is not installed: pip install '.[docs]'")
    text = page.read_text(encoding="utf-8")
    in_the_site = counts(markdown.markdown(text, extensions=EXTENSIONS))
    assert in_the_site == counts(MarkdownIt("commonmark").enable("table").render(text))


def test_the_list_of_design_notes_is_whole() -> None:
    notes = sorted((ROOT / "docs/design").glob("0*.md"))
    titles = [note.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for note in notes]
    lines = [title.replace(". ", ". [", 1) + f"]({note.name})" for title, note in zip(titles, notes, strict=True)]
    assert (ROOT / "docs/design/README.md").read_text(encoding="utf-8").rstrip().endswith("\n".join(lines))


def test_the_tables_of_the_comparison_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/site"))
    import comparison

    page = comparison.PAGE.read_text(encoding="utf-8")
    assert comparison.written(page) == page, "run `make docs`"
    assert {found[2] for found in comparison.BLOCK.finditer(page)} == set(comparison.TABLES)
    for name in ("demo", "real"):
        for row in comparison.results(name)["tables"][0]["rows"]:
            assert f"| {row['library']} | {row['way']} |" in page
            assert row["LDS"] in page or row["LDS"] == "see below"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs/site"))
    import hooks

    return hooks


def test_links_out_of_the_docs(hooks: ModuleType) -> None:
    assert hooks.target("../README.md", "docs/query.md") == "README.md"
    assert hooks.target("docs/design/", "README.md") == "docs/design/README.md"
    assert hooks.target("query.md", "docs/index.md") == "docs/query.md"
    for nowhere in ("../../outside.md", "nothing.md", "https://example.org/query.md", "/query.md"):
        assert hooks.target(nowhere, "docs/query.md") is None
    for path, source in (
        ("docs/design/README.md", "design/README.md"),
        ("examples/README.md", "repository/examples/README.md"),
        ("examples/session.py", "repository/examples/session.py.md"),
        ("LICENSE", "repository/LICENSE.md"),
        ("benchmarks/results/facts.json", "repository/benchmarks/results/facts.json"),
    ):
        assert hooks.source_of(path) == source
        assert hooks.path_of(source) == path


@pytest.mark.slow
def test_the_site_is_searched_from_a_folder(browser: Any, site: Path) -> None:
    """Without a server, and without asking anyone."""
    page = browser.new_context().new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "design/index.html").as_uri())
    page.locator(".md-search__input").click()
    page.keyboard.type("facility location")
    page.locator(".md-search-result__link[href*='select.html']").first.click()
    page.wait_for_url("**/select.html**")
    assert not [address for address in asked if not address.startswith("file://")]
    page.context.close()
