"""The explorer's shaded tokens in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.support.browser import HOSTILE, contrast, new_page
from tests.support.explorers import store_of

if TYPE_CHECKING:
    from tests.conftest import Lab

pytestmark = pytest.mark.slow
ASKED = "a\u202e b <b>old</b> 𝔘𝔫𝔦 dog"


@pytest.fixture(scope="module")
def explorer(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ghoststore.Explorer]:
    """Of texts that are markup, turn the direction, and have characters beyond 16 bits."""
    folder = tmp_path_factory.mktemp("tokens")
    texts = [*HOSTILE, "𝔘𝔫𝔦 \u05d0\u05d1\u05d2 \x00\x07 end"]
    rows = [{"id": text, "text": text, "domain": text} for text in texts]
    corpus = lab.write(folder / "corpus.jsonl", [*rows, *lab.sample_rows(5)])
    ghoststore.build(checkpoint=lab.checkpoint, data=corpus, store=folder / "store", name="part")
    with ghoststore.serve(folder / "store") as explorer:
        yield explorer


def shade(page: Any, explorer: ghoststore.Explorer, text: str = ASKED) -> ghoststore.QueryResult:
    """Ask for ``text`` with its tokens shaded; the library's answer."""
    page.goto(explorer.url)
    page.locator("#text").fill(text)
    page.get_by_label("Shade tokens").check()
    page.get_by_role("button", name="Rank", exact=True).click()
    page.wait_for_selector(".shaded, .problem")
    store = store_of(explorer)
    return ghoststore.query(store=store, val_set=[{"text": text}], tokens=True)


def test_tokens_are_those_of_the_library(page: Any, explorer: ghoststore.Explorer) -> None:
    answer = shade(page, explorer)[0]
    texts = page.locator(".shaded").all_text_contents()
    for shown, hit in zip(texts[0::2], answer, strict=True):
        read, more, _ = shown.partition(" … ")  # what the build cut off
        assert hit.text is not None
        assert hit.text.startswith(read) if more else shown == hit.text
    assert texts[1::2] == [ASKED] * len(answer)
    counts = page.evaluate(
        "[...document.querySelectorAll('.shaded')].map(box => [...box.querySelectorAll('.tok')].length)"
    )
    for hit, of_row, of_question in zip(answer, counts[0::2], counts[1::2], strict=True):
        assert hit.tokens is not None
        assert hit.val_sample is not None
        # the tokens of one character are one piece
        assert of_row == len({token.end for token in hit.tokens if token.start is not None})
        assert of_question == len({token.end for token in hit.val_sample.tokens if token.start is not None})
    assert page.locator("#answer b, #answer script, #answer img").count() == 0
    assert page.title() == "Ask · ghoststore"
    assert page.said == []


def test_the_numbers_by_pointer_and_keys(page: Any, explorer: ghoststore.Explorer) -> None:
    result = shade(page, explorer, "the old dog")
    unit = result.settings["unit"]
    sums: list[dict[int, float]] = []
    for hit in result[0]:
        assert hit.tokens is not None
        sums.append({})
        for token in hit.tokens:
            assert token.end is not None
            sums[-1][token.end] = sums[-1].get(token.end, 0.0) + token.score
    # A row in which a character has several tokens; the question's own tokens stand behind those of each row.
    place = next(place for place, hit in enumerate(result[0]) if len(sums[place]) < len(hit.tokens or ()))
    pieces = list(sums[place].values())
    box, said = page.locator(".shaded").nth(2 * place), page.locator(".readout").nth(2 * place)

    def words(score: float) -> str:
        value = abs(score) * unit["factor"] / unit["rounding"]
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{'takes off' if score < 0 else 'adds'} {mantissa}e{int(exponent):+d}".replace("-", "\u2212")

    box.locator(".tok").first.hover()
    assert words(pieces[0]) in said.text_content()
    page.mouse.move(0, 0)
    assert said.text_content() == ""
    box.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert words(pieces[1]) in said.text_content()
    page.keyboard.press("End")
    assert words(pieces[-1]) in said.text_content()
    strongest = max(pieces, key=abs)
    marked = box.locator(".tok").nth(pieces.index(strongest))
    assert marked.get_attribute("class").split()[0] == ("off5" if strongest < 0 else "adds5")
    page.keyboard.press("Tab")  # one stop a text
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_characters_that_are_not_seen_are_written_out_in_the_numbers(page: Any, explorer: ghoststore.Explorer) -> None:
    shade(page, explorer, "a\u202eb \x1b[31m")
    box = page.locator(".asked .shaded").first
    box.focus()
    page.keyboard.press("Home")
    said = set()
    for _ in range(box.locator(".tok").count()):
        said.add(page.locator(".asked .readout").first.text_content())
        page.keyboard.press("ArrowRight")
    assert any("\\u{202e}" in words for words in said)
    assert not any("\u202e" in words or "\x1b" in words for words in said)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_shades_leave_texts_readable(browser: Any, explorer: ghoststore.Explorer, theme: str) -> None:
    with new_page(browser, color_scheme=theme) as page:
        shade(page, explorer, "the old dog")
        classes = set(page.evaluate("[...document.querySelectorAll('.tok')].flatMap(token => [...token.classList])"))
        assert {"adds5", "off1"} <= classes
        assert contrast(page, ".tok") >= 4.5
        assert contrast(page, ".readout, .legend .hint, .asked summary") >= 4.5
        adds, off = (
            page.evaluate("name => getComputedStyle(document.querySelector(name)).backgroundColor", name)
            for name in (".legend .adds5", ".legend .off5")
        )
        assert adds != off


def test_the_switch_asks_again_and_stands_in_the_link(page: Any, explorer: ghoststore.Explorer) -> None:
    shade(page, explorer)
    assert "tokens=1" in page.url
    page.get_by_label("Shade tokens").uncheck()
    page.wait_for_selector(".hit .text:not(.shaded)")
    assert "tokens" not in page.url
    page.go_back()
    page.wait_for_selector(".shaded")
    assert page.get_by_label("Shade tokens").is_checked()
