"""The explorer's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.support.browser import HOSTILE, new_page
from tests.support.explorers import store_of

if TYPE_CHECKING:
    from tests.conftest import Lab

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def explorer(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ghoststore.Explorer]:
    """Of a store whose ids, domains and texts are markup."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"id": f"{text} {number}", "text": text, "domain": text} for number, text in enumerate(HOSTILE)]
    corpus = lab.write(folder / "corpus.jsonl", [*rows, *lab.sample_rows(5)])
    ghoststore.build(checkpoint=lab.checkpoint, data=corpus, store=folder / "store", name="part")
    with ghoststore.serve(folder / "store") as explorer:
        yield explorer


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with new_page(browser, viewport={"width": 390, "height": 800}) as page:
        yield page


def asked(page: Any, explorer: ghoststore.Explorer, text: str) -> Any:
    page.goto(explorer.url)
    page.locator("#text").fill(text)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".hit, .problem")
    return page.locator(".hit")


def test_hostile_texts_are_text(page: Any, explorer: ghoststore.Explorer) -> None:
    hits = asked(page, explorer, HOSTILE[0])
    answer = ghoststore.query(store=store_of(explorer), val_set=[{"text": HOSTILE[0]}])[0]
    assert hits.locator(".id").all_text_contents() == [hit.id for hit in answer]
    assert hits.locator(".text").all_text_contents() == [hit.text for hit in answer]
    assert page.locator("#answer script, #answer img, #answer h1").count() == 0
    assert page.title() == "Ask · ghoststore"
    hits.locator(".id").first.click()
    page.wait_for_selector("#sample .card")
    assert page.locator("#sample article.card > .text").text_content() == answer[0].text
    page.get_by_role("link", name="Store").click()
    page.wait_for_selector("#store .card")
    assert page.locator("#store img, #store script").count() == 0
    assert page.said == []


def test_the_token_leaves_the_address_and_a_link_shows_the_view_again(
    page: Any, browser: Any, explorer: ghoststore.Explorer
) -> None:
    texts = asked(page, explorer, "the old dog").locator(".id").all_text_contents()
    assert explorer.token not in page.url
    page.reload()
    page.wait_for_selector(".hit")
    assert page.locator(".hit .id").all_text_contents() == texts
    link = page.evaluate("import('/static/api.js').then((api) => api.link())")
    with new_page(browser) as again:
        again.goto(link)
        again.wait_for_selector(".hit")
        assert again.locator(".hit .id").all_text_contents() == texts
        assert again.locator("#text").input_value() == "the old dog"


def test_errors_are_said(page: Any, explorer: ghoststore.Explorer) -> None:
    page.goto(explorer.url)
    page.locator("#text").fill("the old dog")
    page.locator("#where").fill("nonesuch = 1")
    page.get_by_role("button", name="Rank").click()
    page.wait_for_selector(".problem")
    assert "nonesuch" in page.locator(".problem").text_content()
    assert page.locator("#go").is_enabled()
    page.locator("#where").fill("")
    page.locator("#text").fill("")
    page.get_by_role("button", name="Rank").click()
    page.get_by_text("there is no text yet").wait_for()
    page.get_by_label("Prompt and completion").check()
    page.locator("#prompt").fill("the old")
    page.get_by_role("button", name="Rank").click()
    page.get_by_text("A completion is missing").wait_for()


def test_without_the_token_nothing_is_shown(page: Any, explorer: ghoststore.Explorer) -> None:
    page.goto(explorer.url.partition("?")[0])
    page.wait_for_selector(".problem")
    assert "the token is missing" in page.locator(".problem").text_content()


def test_a_file_is_asked(page: Any, explorer: ghoststore.Explorer, tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    file.write_text('{"text": "a river"}\n{"text": "the moon"}\n')
    page.goto(explorer.url)
    page.get_by_label("File", exact=True).check()
    page.locator("#file").set_input_files(file)
    page.get_by_role("button", name="Rank").click()
    page.wait_for_selector(".hit")
    val_set = [{"text": "a river"}, {"text": "the moon"}]
    answer = ghoststore.query(store=store_of(explorer), val_set=val_set)[0]
    assert page.locator(".hit .id").all_text_contents() == [hit.id for hit in answer]
    texts = tmp_path / "val.txt"
    texts.write_bytes(b"a river\r\n\r\nthe moon\r\n")
    page.locator("#file").set_input_files(texts)
    page.get_by_role("button", name="Rank").click()
    page.wait_for_selector("#go:enabled")
    assert '{"text": "a river"}' in page.locator(".again pre").text_content()
    assert page.locator(".hit .id").all_text_contents() == [hit.id for hit in answer]


def test_a_file_is_dropped(page: Any, explorer: ghoststore.Explorer) -> None:
    page.goto(explorer.url)
    page.wait_for_selector("#view-ask:not([hidden])")
    page.evaluate(
        """() => {
            const held = new DataTransfer();
            held.items.add(new File(['{"text": "a river"}'], "val.jsonl"));
            const dropped = new DragEvent("drop", { dataTransfer: held, bubbles: true, cancelable: true });
            document.getElementById("text").dispatchEvent(dropped);
        }"""
    )
    page.get_by_role("button", name="Rank").click()
    page.wait_for_selector(".hit")
    assert '{"text": "a river"}' in page.locator("#answer .again pre").text_content()
    assert page.locator("input[name=kind][value=file]").is_checked()


def test_a_file_that_is_too_large_is_refused(page: Any, explorer: ghoststore.Explorer, tmp_path: Path) -> None:
    """The page says why, and does not take the server for lost."""
    file = tmp_path / "val.txt"
    file.write_text("the old dog\n" * 800_000)
    page.goto(explorer.url)
    page.get_by_label("File", exact=True).check()
    page.locator("#file").set_input_files(file)
    page.get_by_role("button", name="Rank").click()
    page.get_by_text("a request holds at most 8 MiB").wait_for()
    assert page.locator("#lost").is_hidden()


@pytest.mark.parametrize("width", [390, 1024, 2000])
def test_nothing_is_wider_than_the_window(page: Any, explorer: ghoststore.Explorer, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    asked(page, explorer, HOSTILE[1])
    for name in ("Ask", "Store"):
        page.get_by_role("link", name=name, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
