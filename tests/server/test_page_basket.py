"""The Sample view and the rows to train on, in a real browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.support.browser import HOSTILE, contrast, new_page
from tests.support.explorers import store_of
from tests.support.score_runs import whole

if TYPE_CHECKING:
    from tests.conftest import Lab

pytestmark = pytest.mark.slow
TEXT = "the old dog runs"
LONG = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def explorer(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ghoststore.Explorer]:
    """Ids are those of a run's samples, or markup; two rows are near-duplicates; one has no vector."""
    folder = tmp_path_factory.mktemp("basket")
    rows = [row | {"id": f"s{place}"} for place, row in enumerate(lab.sample_rows(10))]
    rows += [{"id": text, "text": f"{LONG} {place}", "domain": text} for place, text in enumerate(HOSTILE)]
    rows.append({"id": "empty", "text": "", "domain": "sky"})
    corpus = lab.write(folder / "corpus.jsonl", rows)
    ghoststore.build(checkpoint=lab.checkpoint, data=corpus, store=folder / "store", name="part")
    whole(folder / "store", "a_run")
    with ghoststore.serve(folder / "store") as explorer:
        yield explorer


def at(page: Any, explorer: ghoststore.Explorer, fragment: str) -> None:
    page.goto(f"{explorer.url}#/{fragment}")


def section(page: Any, name: str) -> Any:
    return page.locator(f"section[aria-label='{name}']")


def test_rows_near_a_sample(page: Any, explorer: ghoststore.Explorer) -> None:
    at(page, explorer, "sample/part/11")
    near = section(page, "Nearest rows")
    near.locator(".hit").first.wait_for()
    answer = ghoststore.query(store=store_of(explorer), near=11, metric="cosine", top_k=8)[0]
    assert near.locator(".hit .id").all_text_contents() == [hit.id for hit in answer]
    assert "--near 11" in near.locator("pre").text_content()
    near.locator(".hit .id").first.click()
    page.wait_for_url(f"**/#/sample/part/{answer[0].source_row}")
    assert page.locator("#sample img, #sample script, #sample h1").count() == 0
    assert page.title() == "Sample · ghoststore"
    assert page.said == []


def test_a_sample_that_is_left_is_given_up(page: Any, explorer: ghoststore.Explorer) -> None:
    """Its answer comes after that of the next one, whose page stays; what it asked does not fill the queue."""
    held: list[Any] = []
    page.route("**/api/sample/part/1", lambda route: held.append(route))
    with page.expect_request("**/api/sample/part/1"):
        at(page, explorer, "sample/part/1")
    page.evaluate("location.hash = '#/sample/part/2'")
    page.locator("#sample h2.id", has_text="s2").wait_for()
    with suppress(Exception):  # a request that was given up cannot be answered
        held[0].continue_()
    section(page, "Nearest rows").locator(".hit").first.wait_for()
    assert page.locator("#sample h2.id").all_text_contents() == ["s2"]
    page.unroute_all()
    for row in reversed(range(10)):  # through many, fast
        page.evaluate("row => { location.hash = `#/sample/part/${row}`; }", row)
        page.locator("#sample h2.id", has_text=f"s{row}").wait_for()
    section(page, "Nearest rows").locator(".hit").first.wait_for()
    section(page, "Trained on").locator("tbody tr").first.wait_for()
    assert page.locator("#sample .problem").count() == 0
    assert page.said == []


def test_where_a_sample_was_trained_on(page: Any, explorer: ghoststore.Explorer) -> None:
    at(page, explorer, "sample/part/0")
    trained = section(page, "Trained on")
    trained.locator("tbody tr").first.wait_for()
    history = ghoststore.scores(store=store_of(explorer), run="a_run", sample="s0").to_json()["history"]
    steps = trained.locator("tbody tr td:first-child").all_text_contents()
    assert steps == [str(visit["step"]) for visit in history]
    drawn = [visit for visit in history if visit["cumulative"] is not None]
    assert trained.locator(".dot").count() == len(drawn)
    colours = trained.evaluate("e => ['.dot', '.worth'].map(name => getComputedStyle(e.querySelector(name)).stroke)")
    assert colours[0] == colours[1] != "none"
    at(page, explorer, "sample/part/13")
    section(page, "Trained on").get_by_text("has no sample with the id").wait_for()
    assert section(page, "Nearest rows").count() == 0, "a row without a vector"
    assert page.locator("#sample .pick").count() == 0


def test_near_duplicates_of_a_sample(page: Any, explorer: ghoststore.Explorer) -> None:
    at(page, explorer, "sample/part/10")
    page.get_by_role("button", name="Look for them").click()
    twins = section(page, "Near-duplicates")
    twins.get_by_text("2 rows of the corpus hold").wait_for()
    assert twins.locator(".id").all_text_contents() == HOSTILE[1:]
    assert page.locator("#sample img, #sample script").count() == 0


def rank(page: Any, explorer: ghoststore.Explorer) -> None:
    at(page, explorer, "ask")
    page.wait_for_selector("#view-ask:not([hidden])")
    page.locator("#text").fill(TEXT)
    page.get_by_role("button", name="Rank", exact=True).click()
    page.wait_for_selector("#answer[aria-busy=false] .hit")


def downloaded(page: Any, button: str = "Choose and download") -> bytes:
    with page.expect_download() as download:
        page.get_by_role("button", name=button, exact=True).click()
    return Path(download.value.path()).read_bytes()


def test_a_ranking_is_exported_as_select_writes_it(page: Any, explorer: ghoststore.Explorer, tmp_path: Path) -> None:
    rank(page, explorer)
    page.get_by_label("How much").select_option("count")
    page.get_by_label("Number").fill("5")
    page.get_by_label("By domain").select_option("equal")
    found = downloaded(page)
    wanted: dict[str, Any] = {"store": store_of(explorer), "val_set": [{"text": TEXT}], "count": 5, "quotas": "equal"}
    report = ghoststore.select(**wanted, out=tmp_path / "chosen.jsonl")
    assert found == (tmp_path / "chosen.jsonl").read_bytes()
    assert downloaded(page, "chosen.jsonl.report.rows.jsonl") == Path(report.rows_file).read_bytes()
    made = section(page, "Rows to train on")
    assert f"5 of {report.available} rows" in made.locator(".done").text_content()
    assert "ghoststore select " in made.locator("pre").text_content()
    assert "--count 5 --quotas equal" in made.locator("pre").text_content()
    assert "\u202e" not in made.locator(".done").text_content()
    page.get_by_label("Number").fill("500")
    page.get_by_label("How much").select_option("fraction")
    page.get_by_label("Number").fill("7")
    page.get_by_role("button", name="Choose and download").click()
    made.locator(".problem").wait_for()
    assert page.said == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]


def test_quotas_of_ones_own_diversity_and_a_card(
    page: Any, browser: Any, explorer: ghoststore.Explorer, tmp_path: Path
) -> None:
    """As `select` writes them; the command line and the link say the same again."""
    rank(page, explorer)
    made = section(page, "Rows to train on")
    assert page.get_by_label("Weight of diversity").is_hidden()
    page.get_by_label("How much").select_option("count")
    page.get_by_label("Number").fill("5")
    page.get_by_label("Diversity", exact=True).select_option("mmr")
    assert page.get_by_label("Weight of diversity").input_value() == "0.5"
    page.get_by_label("Weight of diversity").fill("0.3")
    page.get_by_label("By domain").select_option("own")
    page.get_by_role("button", name="Choose and download").click()
    made.get_by_text("There is no quota yet").wait_for()
    labels = made.locator("fieldset label").all_text_contents()
    assert labels == ghoststore.info(store_of(explorer)).parts[0].manifest["corpus"]["domains"]
    assert set(HOSTILE) < set(labels)
    page.get_by_label("sky", exact=True).fill("0.4")
    page.get_by_label(HOSTILE[0], exact=True).fill("1")
    page.get_by_label("With a dataset card").check()
    rows = downloaded(page)
    quotas = {HOSTILE[0]: 1, "sky": 0.4}
    wanted: dict[str, Any] = {"val_set": [{"text": TEXT}], "count": 5, "diversity": "mmr", "diversity_weight": 0.3}
    report = ghoststore.select(store=store_of(explorer), **wanted, quotas=quotas, out=tmp_path / "chosen.jsonl")
    assert rows == (tmp_path / "chosen.jsonl").read_bytes()
    assert {of.domain: of.chosen for of in report.domains}[HOSTILE[0]] == 1
    assert b"## By domain" in downloaded(page, "README.md")
    command = made.locator("pre").text_content().replace("| ghoststore ", f"| {sys.executable} -m ghoststore ")
    (tmp_path / "again").mkdir()
    subprocess.run(["bash", "-c", command], cwd=tmp_path / "again", check=True, capture_output=True)
    assert (tmp_path / "again/chosen.jsonl").read_bytes() == rows
    link = page.evaluate("import('/static/api.js').then((api) => api.link())")
    with new_page(browser) as again:
        again.goto(link)
        again.wait_for_selector(".hit")
        assert again.get_by_label("sky", exact=True).input_value() == "0.4"
        assert again.get_by_label("With a dataset card").is_checked()
        assert downloaded(again) == rows
    page.get_by_role("button", name="Rank", exact=True).click()  # another question keeps the choice
    page.wait_for_selector("#answer[aria-busy=false] .hit")
    assert page.get_by_label("Weight of diversity").input_value() == "0.3"
    assert page.said == []


def test_rows_are_picked_by_hand_in_every_view(
    page: Any, browser: Any, explorer: ghoststore.Explorer, tmp_path: Path
) -> None:
    rank(page, explorer)
    by_hand = page.get_by_label("The rows picked by hand")
    assert by_hand.is_disabled()
    hits = ghoststore.query(store=store_of(explorer), val_set=[{"text": TEXT}])[0]
    page.get_by_label(f"Pick {hits[1].id}", exact=True).check()
    other = next(row for row in range(10) if row not in {hit.source_row for hit in hits[:2]})
    page.evaluate("row => { location.hash = `#/sample/part/${row}`; }", other)
    page.locator("#sample article .pick").check()
    page.go_back()
    page.wait_for_selector("#view-ask:not([hidden]) .hit")
    wanted = sorted({hits[1].source_row, other})
    by_hand.check()
    rows = downloaded(page)
    corpus = (store_of(explorer).parent / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    assert rows == b"".join(corpus[row] for row in wanted)
    assert (
        f"source_row IN ({wanted[0]}, {wanted[1]})" in section(page, "Rows to train on").locator("pre").text_content()
    )
    page.locator(f"#answer input[aria-label='Pick {hits[0].id}']").check()
    link = page.evaluate("import('/static/api.js').then((api) => api.link())")
    with new_page(browser) as again:  # the link holds what is picked
        again.goto(link)
        again.wait_for_selector(".hit")
        assert again.get_by_label(f"Pick {hits[0].id}", exact=True).is_checked()
        assert "picked by hand: 3" in section(again, "Rows to train on").text_content()
        again.get_by_role("button", name="Empty").click()
        assert not again.get_by_label(f"Pick {hits[0].id}", exact=True).is_checked()
        assert again.get_by_label("The rows picked by hand").is_disabled()
        assert "picks" not in again.url


def test_keys_reach_everything_in_order(page: Any, explorer: ghoststore.Explorer) -> None:
    """From the skip link to the download, without a pointer; where the focus is can be seen."""
    rank(page, explorer)
    page.reload()
    page.wait_for_selector("#answer[aria-busy=false] .hit")
    page.keyboard.press("Tab")
    seen = []
    for _ in range(120):
        seen.append(
            page.evaluate(
                "(() => { const e = document.activeElement, seen = getComputedStyle(e).outlineStyle !== 'none';"
                "return [e.id || e.className || e.tagName, seen, e.textContent]; })()"
            )
        )
        if "Choose and download" in seen[-1][2] and seen[-1][0] == "BUTTON":
            break
        page.keyboard.press("Tab")
    names = [name for name, _, _ in seen]
    assert names[-1] == "BUTTON"
    order = [
        "skip",
        "nav-ask",
        "text",
        "part",
        "where",
        "tokens",
        "words",
        "go",
        "pick",
        "take-by",
        "take-diversity",
        "take-form",
    ]
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert [name for name, visible, _ in seen if not visible] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 2000])
def test_they_fit_and_can_be_read(browser: Any, explorer: ghoststore.Explorer, theme: str, width: int) -> None:
    with new_page(browser, color_scheme=theme, viewport={"width": width, "height": 800}) as page:
        at(page, explorer, "sample/part/12")
        section(page, "Nearest rows").locator(".hit").first.wait_for()
        page.get_by_role("button", name="Look for them").click()
        section(page, "Near-duplicates").locator(".id").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert contrast(page, "#sample p, #sample td, #sample a, #sample button, #sample .picks") >= 4.5
        rank(page, explorer)
        page.get_by_role("button", name="Choose and download").click()
        page.wait_for_selector(".done")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert contrast(page, ".done, .taking label, .taking button, .picks") >= 4.5


def test_nothing_moves_where_motion_is_not_wanted(browser: Any, explorer: ghoststore.Explorer) -> None:
    with new_page(browser, reduced_motion="reduce") as page:
        rank(page, explorer)
        durations = "new Set([...document.querySelectorAll('*')].map(e => getComputedStyle(e).transitionDuration))"
        assert page.evaluate("document.getAnimations().length") == 0
        assert page.evaluate(f"[...{durations}]") == ["0s"]
