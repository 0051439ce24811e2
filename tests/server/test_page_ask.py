"""The Ask view in a real browser: a phrase, charts, domains, words beside."""

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
TEXT = "𝔘 the old dog runs"
QUOTED = "it's <b>'odd'</b>, isn''t it"


@pytest.fixture(scope="module")
def explorer(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ghoststore.Explorer]:
    folder = tmp_path_factory.mktemp("ask")
    domains = [*HOSTILE, QUOTED]
    rows: list[dict[str, Any]] = [
        {"id": f"odd {place}", "text": f"a dog {place}", "domain": name} for place, name in enumerate(domains)
    ]
    rows += [{"id": f"none {place}", "text": f"a dog {'runs ' * place}", "domain": None} for place in range(4)]
    corpus = lab.write(folder / "corpus.jsonl", [*rows, *lab.sample_rows(12)])
    ghoststore.build(checkpoint=lab.checkpoint, data=corpus, store=folder / "store", name="part")
    with ghoststore.serve(folder / "store") as explorer:
        yield explorer


def library(explorer: ghoststore.Explorer, **options: Any) -> ghoststore.QueryResult:
    wanted = {"val_set": [{"text": TEXT}]} | options
    return ghoststore.query(store=store_of(explorer), **wanted)


def opened(page: Any, explorer: ghoststore.Explorer) -> None:
    page.goto(explorer.url)
    page.wait_for_selector("#view-ask:not([hidden])")
    page.locator("#text").fill(TEXT)


def rank(page: Any, button: str = "Rank") -> list[str]:
    """Press the button; the ids that answer."""
    page.get_by_role("button", name=button, exact=True).click()
    page.wait_for_selector("#answer[aria-busy=false] .hit, #answer[aria-busy=false] .problem, #answer .empty")
    return list(page.locator("[aria-label='Ranked by gradients'] .hit .id").all_text_contents())


def ids(ranking: ghoststore.QueryHits) -> list[str]:
    return [hit.id for hit in ranking]


def test_selected_words_alone(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer)
    take = page.get_by_role("button", name="Only the selected words")
    assert take.is_disabled()
    start = TEXT.index("dog")
    wide = len(TEXT[:start].encode("utf-16-le")) // 2
    page.evaluate("([a, b]) => { const t = document.getElementById('text'); t.focus(); t.setSelectionRange(a, b); }",
                  [wide - 1, wide + 4])  # fmt: skip
    phrase = f"{start}:{start + 3}"
    found = rank(page, "Only the selected words")
    assert found == ids(library(explorer, phrase=phrase)[0])
    assert page.locator("#phrase-words").text_content() == "dog"
    assert f"phrase={phrase.replace(':', '%3A')}" in page.url
    assert f"--phrase {phrase} " in page.locator(".again pre").text_content()
    page.reload()
    page.wait_for_selector(".hit")
    assert page.locator("#phrase-words").text_content() == "dog"
    assert rank(page, "Ask with all of it") == ids(library(explorer)[0])
    assert "phrase" not in page.url
    assert page.said == []


def test_a_phrase_that_cannot_be_is_said_and_goes_with_its_text(page: Any, explorer: ghoststore.Explorer) -> None:
    page.goto(explorer.url.replace("?", "#/ask?", 0) + "#/ask?text=the+old+dog&phrase=0%3A3")
    page.get_by_text("its targets begin at character 1").wait_for()
    page.locator("#text").press("End")
    page.keyboard.type("s")
    assert page.locator("#phrase-shown").is_hidden()
    assert rank(page) != []
    page.get_by_label("Prompt and completion").check()
    page.locator("#prompt").fill("𝔘 the")
    page.locator("#completion").fill(" old dog")
    page.locator("#completion").select_text()
    found = rank(page, "Only the selected words")
    pair = [{"prompt": "𝔘 the", "completion": " old dog"}]
    assert found == ids(library(explorer, val_set=pair, phrase="6:13")[0])


def test_the_charts_are_of_the_library(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer)
    rank(page)
    answer = library(explorer, histogram=True)[0]
    counted = answer.histogram
    assert counted is not None
    bins = page.locator(".bin title").all_text_contents()
    assert [int(words.split(" ")[0].replace(",", "")) for words in bins] == counted.counts
    assert page.locator(".mark").count() == len(answer)
    heights = page.evaluate("[...document.querySelectorAll('.bin')].map(bin => Number(bin.getAttribute('height')))")
    assert [height > 0 for height in heights] == [count > 0 for count in counted.counts]
    shown = dict(
        zip(page.locator(".domains .chip").all_text_contents(), page.locator(".count").all_text_contents(), strict=True)
    )
    assert {name: int(words.split(" ")[0]) for name, words in shown.items()} == {
        domain.domain or "no domain": domain.hits for domain in counted.domains
    }
    assert page.locator("#answer b, #answer img, #chips b, #chips img").count() == 0
    assert page.title() == "Ask · ghoststore"
    assert page.said == []


def test_domains_are_chips_that_write_the_condition(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer)
    chips = page.locator("#chips .chip")
    by_name = {chip.text_content(): chip for chip in chips.all()}
    assert set(by_name) == {*HOSTILE, QUOTED, "sky", "earth"}
    by_name[QUOTED].click()
    by_name["sky"].click()
    assert [chip.get_attribute("aria-pressed") for chip in (by_name[QUOTED], by_name["earth"])] == ["true", "false"]
    found = rank(page)
    assert page.locator("#where").input_value() == "domain IN ('it''s <b>''odd''</b>, isn''''t it', 'sky')"
    assert found == ids(library(explorer, where=page.locator("#where").input_value())[0])
    by_name[QUOTED].click()
    by_name["sky"].click()
    assert page.locator("#where").input_value() == ""
    page.locator("#where").fill("n_tokens > 10 OR (id = 'x')")
    by_name["sky"].click()
    where = "(n_tokens > 10 OR (id = 'x')) AND domain IN ('sky')"
    assert page.locator("#where").input_value() == where
    assert rank(page) == ids(library(explorer, where=where)[0])
    page.reload()
    page.wait_for_selector(".hit")
    assert page.locator("#chips [aria-pressed=true]").all_text_contents() == ["sky"]
    page.locator("#chips [aria-pressed=true]").click()
    assert page.locator("#where").input_value() == "n_tokens > 10 OR (id = 'x')"
    rank(page)
    page.locator(".domains .chip", has_text="earth").click()  # of the chart: it ranks at once
    page.wait_for_selector("#answer[aria-busy=false] .hit")
    where = "(n_tokens > 10 OR (id = 'x')) AND domain IN ('earth')"
    assert page.locator(".hit .id").all_text_contents() == ids(library(explorer, where=where)[0])


def test_rows_without_a_domain_keep_the_condition_as_those_of_a_domain_do(
    page: Any, explorer: ghoststore.Explorer
) -> None:
    opened(page, explorer)
    page.locator("#where").fill("n_tokens > 4")
    rank(page)
    where = "(n_tokens > 4) AND domain IS NULL"
    page.locator(".domains .chip", has_text="no domain").click()
    page.locator(".domains .chip", has_text="sky").wait_for(state="detached")
    page.wait_for_selector("#answer[aria-busy=false] .hit")
    assert page.locator("#where").input_value() == where
    found = page.locator("[aria-label='Ranked by gradients'] .hit .id").all_text_contents()
    assert found == ids(library(explorer, where=where)[0])
    page.locator("#chips .chip", has_text="sky").click()
    assert page.locator("#where").input_value() == "(n_tokens > 4) AND domain IN ('sky')"


def test_a_condition_of_two_brackets_is_one(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer)
    where = "(n_tokens > 99) OR (id = 'odd 0)') AND domain IN ('sky')"
    page.locator("#where").fill(where)
    page.locator("#chips .chip", has_text="earth").click()
    assert page.locator("#where").input_value() == f"({where}) AND domain IN ('earth')"
    assert page.locator("#chips [aria-pressed=true]").all_text_contents() == ["earth"]
    page.locator("#chips .chip", has_text="earth").click()
    assert page.locator("#where").input_value() == where


def test_words_beside(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer)
    page.get_by_label("Rank by words, too").check()
    rank(page)
    page.locator("[aria-label='Ranked by words'] .hit").first.wait_for()
    words = library(explorer, lexical=1.0)[0]
    assert page.locator("[aria-label='Ranked by words'] .hit .id").all_text_contents() == ids(words)
    first = page.locator("[aria-label='Ranked by words'] .score").first.text_content()
    assert first == f"{words[0].bm25:.4g} BM25"  # type: ignore[attr-defined]
    by_gradients = ids(library(explorer)[0])
    both = [name for name in ids(words) if name in by_gradients]
    assert page.get_by_text("by gradients").count() == len(both)
    assert "words=1" in page.url


def test_layers_left_out(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Without layers").fill("attn")
    assert rank(page) == ids(library(explorer, exclude_layers=("attn",))[0])
    assert "exclude-layers=attn" in page.url


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 2000])
def test_it_fits_and_can_be_read(browser: Any, explorer: ghoststore.Explorer, theme: str, width: int) -> None:
    with new_page(browser, color_scheme=theme, viewport={"width": width, "height": 800}) as page:
        opened(page, explorer)
        page.get_by_label("Rank by words, too").check()
        page.get_by_label("Shade tokens").check()
        page.locator("#chips .chip").first.click()
        rank(page)
        page.locator("[aria-label='Ranked by words'] .hit").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert contrast(page, ".chip, .count, .count .hint, .ends span, .about, .hint, .plain, .check, label") >= 4.5
