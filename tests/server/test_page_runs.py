"""The explorer's runs and stores in a real browser: what grows while it is looked at, and a server that goes."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.support.browser import HOSTILE, new_page
from tests.support.score_runs import DOMAINS, LAYOUT, append, make, whole

if TYPE_CHECKING:
    from tests.conftest import Lab

pytestmark = pytest.mark.slow
WIDTHS = (390, 1000, 2000)


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them with hostile ids and domains, and a part."""
    folder = tmp_path_factory.mktemp("page") / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=lab.corpus, store=folder, name="part")
    whole(folder, "first")
    corpus = {"fingerprint": "sha256:c", "domains": HOSTILE[:2], "repeated_ids": None}
    append(make(folder, "second", corpus=corpus), 0, 10)
    return folder


@pytest.fixture(scope="module")
def explorer(store: Path) -> Iterator[ghoststore.Explorer]:
    with ghoststore.serve(store) as explorer:
        yield explorer


def opened(page: Any, explorer: ghoststore.Explorer, fragment: str, wait_for: str) -> None:
    page.goto(explorer.url + fragment)
    page.wait_for_selector(wait_for)


def numbers_of(page: Any, title: str) -> list[list[str]]:
    """The rows of the table beside a plot."""
    plot = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))
    if plot.locator("details[open]").count() == 0:
        plot.locator("summary").click()
    plot.locator("tbody tr").first.wait_for()
    return [row.locator("th, td").all_text_contents() for row in plot.locator("tr").all()]


def test_the_list_and_one_run(page: Any, explorer: ghoststore.Explorer, store: Path) -> None:
    opened(page, explorer, "#/runs", "#runs table")
    assert page.locator("#runs tbody a").all_text_contents() == ["first", "second"]
    assert page.locator("#runs .badge").all_text_contents() == ["finished", "stopped"]
    page.get_by_role("link", name="first", exact=True).click()
    page.locator(".samples").first.wait_for()
    frame = next(iter(ghoststore.watch(store=store, run="first", once=True)))
    assert page.get_by_role("heading", level=1).text_content() == "Run first"
    ids = page.locator(".samples").first.locator(".id").all_text_contents()
    assert [name.partition(" (row")[0] for name in ids] == [sample.id for sample in frame.best][: len(ids)]
    head, *rows = numbers_of(page, "Loss")
    assert head == ["step", "train", "val"]
    assert len(rows) == LAYOUT.steps - 5
    assert float(rows[0][1]) == pytest.approx(5.0)
    assert numbers_of(page, "By val group")[0] == ["step", "law", "code"]
    assert set(numbers_of(page, "By domain")[0][1:]) == {*DOMAINS, "(none)"}
    table = page.get_by_role("region", name="Domains")
    assert [row.locator("th").text_content() for row in table.locator("tbody tr").all()] == [
        domain.domain or "(none)" for domain in frame.domains
    ]
    assert "Loss: train from 5 to" in (page.get_by_role("img").first.get_attribute("aria-label") or "")
    assert page.said == []


def test_two_runs_beside_each_other(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer, "#/runs/first", ".samples")
    page.get_by_label("Beside").select_option("second")
    page.get_by_role("region", name="Two runs").wait_for()
    assert page.url.endswith("#/runs/first?with=second")
    assert numbers_of(page, "Loss")[0] == ["step", "first: train", "first: val", "second: train", "second: val"]
    page.get_by_label("Beside").select_option("")
    page.get_by_role("region", name="Two runs").wait_for(state="detached")
    assert page.said == []


def test_hostile_domains_and_names_are_text(page: Any, explorer: ghoststore.Explorer) -> None:
    opened(page, explorer, "#/runs/second", ".samples")
    assert set(HOSTILE[:2]) < set(numbers_of(page, "By domain")[0])
    opened(page, explorer, "#/runs/%3Cimg%20src=x%20onerror=alert(1)%3E", ".problem")
    assert "<img" in page.locator("#runs .problem").text_content()
    assert page.locator("#runs img, #runs script").count() == 0
    assert page.title() == "Runs · ghoststore"


def test_a_training_appears_while_it_is_watched(page: Any, lab: Lab, tmp_path: Path) -> None:
    """A list that was empty, a run that begins, its page until its last step: nothing is loaded again."""
    store = tmp_path / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=lab.corpus, store=store, name="part")
    with ghoststore.serve(store) as explorer:
        opened(page, explorer, "#/runs", ".empty")
        page.evaluate("window.same = true")
        pid = lab.start(
            *("train", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--val-set", lab.corpus, "--store", store),
            *("--output-dir", tmp_path / "out", "--name", "live", "--max-steps", "60", "--batch-size", "4", "--quiet"),
        )
        page.get_by_role("link", name="live").click(timeout=120_000)
        page.locator(".badge.finished").wait_for(timeout=120_000)
        page.get_by_text("60 of 60").wait_for()
        outcome = lab.wait(pid)
        assert outcome.code == 0, outcome.err
        assert len(numbers_of(page, "Loss")) > 50
        assert page.evaluate("window.same")
        page.locator(".samples a").first.click()  # of the very corpus of the part
        page.locator("#sample article.card").wait_for()
        assert page.locator("#sample h2.id").text_content() in [row["id"] for row in lab.rows]
        assert page.said == []


def test_steps_appear_as_they_are_committed(browser: Any, page: Any, tmp_path: Path) -> None:
    """In two tabs; the table that is open stays open, and a hidden tab catches up."""
    run = make(tmp_path / "store")
    append(run, 0, 5)
    with ghoststore.serve(tmp_path / "store") as explorer, new_page(browser) as other:
        for tab in (page, other):
            opened(tab, explorer, "#/runs/run", ".samples")
            assert len(numbers_of(tab, "Loss")) == 1 + 5
        append(run, 5, 10)
        for tab in (page, other):
            tab.get_by_text("10 of 23").wait_for()
            assert len(numbers_of(tab, "Loss")) == 1 + 10
        append(run, 15, LAYOUT.steps)
        for tab in (page, other):
            tab.locator(".badge.finished").wait_for()
            assert tab.said == []


def test_verify(page: Any, explorer: ghoststore.Explorer, store: Path) -> None:
    opened(page, explorer, "#/store", ".parts")
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("are as they were written").wait_for()
    chunk = next(path for path in (store / "parts/part/vectors").rglob("*") if path.is_file() and path.suffix == "")
    bytes_before = chunk.read_bytes()
    chunk.write_bytes(b"\0" + bytes_before[1:])
    page.get_by_role("button", name="Verify again").click()
    page.get_by_role("region", name="Damage").wait_for()
    assert "vectors" in page.get_by_role("region", name="Damage").text_content()
    chunk.write_bytes(bytes_before)
    assert page.said == []


def test_a_verification_is_stopped(page: Any, explorer: ghoststore.Explorer) -> None:
    """By its button, and by leaving the page; the next one begins anew."""
    opened(page, explorer, "#/store", ".parts")
    page.route("**/api/verify/events", lambda route: None)  # it takes as long as that of a large store
    button = page.locator("section[aria-label=Verify] button")
    button.click()
    page.get_by_role("button", name="Stop").wait_for()
    with page.expect_event("requestfailed") as failed:
        button.click()
    assert failed.value.url.endswith("/api/verify/events")
    page.get_by_text("Stopped: not all was read.").wait_for()
    button.click()
    page.get_by_role("button", name="Stop").wait_for()
    with page.expect_event("requestfailed"):
        page.get_by_role("link", name="Ask").click()
    page.locator("#text").wait_for()
    page.unroute_all()
    page.get_by_role("link", name="Store").click()
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("are as they were written").wait_for()


def test_the_command_of_a_store_whose_path_has_a_space(page: Any, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "it's a store"
    shutil.copytree(built, store)
    with ghoststore.serve(store) as explorer:
        opened(page, explorer, "#/store", ".parts")
        command = page.locator("section[aria-label=Verify] code").text_content()
    assert shlex.split(command) == ["ghoststore", "verify", "--store", str(store)]


def test_indexes_and_fidelity(page: Any, lab: Lab, built: Path, tmp_path: Path) -> None:
    """What was measured of a part stands on its card, with the numbers of `info`."""
    pytest.importorskip("faiss", reason="an index needs FAISS")
    store = tmp_path / "store"
    shutil.copytree(built, store)
    ghoststore.index(store=store)
    ghoststore.fidelity(store=store, val_set=lab.corpus)
    [part] = ghoststore.info(store).parts
    with ghoststore.serve(store) as explorer:
        opened(page, explorer, "#/store", ".parts")
        card = page.locator(".parts .card").first.text_content()
        recall = next(iter(part.indexes[0]["recall"].values()))["at_10"]
        assert f"recall@10 {recall:.4}"[:15] in card
        assert part.indexes[0]["factory"] in card
        assert "Spearman" in card
        assert f"{part.fidelity[0]['rows']} rows × {part.fidelity[0]['val_samples']} val samples" in card
        assert page.said == []


def test_a_store_is_chosen(page: Any, lab: Lab, store: Path, built: Path) -> None:
    with ghoststore.serve({"runs": store, "plain": built}) as explorer:
        opened(page, explorer, "#/store", ".parts")
        choice = page.get_by_role("combobox", name="Store")
        assert choice.locator("option").all_text_contents() == ["runs", "plain"]
        assert page.locator("#store-name").text_content() == str(store)
        choice.select_option("plain")
        page.get_by_text(str(built), exact=True).wait_for()
        assert page.url.endswith("/?store=plain#/store")
        page.get_by_text("No training run").wait_for()
        page.get_by_role("link", name="Ask").click()
        page.locator("#text").fill("the old dog")
        page.get_by_role("button", name="Rank").click()
        page.locator(".hit").first.wait_for()
        assert f"--store {built}" in page.locator("#answer .again pre").text_content()
        page.reload()
        page.locator(".hit").first.wait_for()
        assert page.said == []


@pytest.fixture
def served(built: Path) -> Iterator[Any]:
    """Starts `ghoststore serve` in a process of its own and gives its address; all are ended at the end."""
    processes: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], str]:
        words = [sys.executable, "-m", "ghoststore", "serve", "--store", str(built), *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("same_port", [True, False])
def test_a_server_that_is_killed_and_started_again(page: Any, served: Any, same_port: bool) -> None:
    """The page says so, refuses what is no address, and goes on where it was with the new one."""
    process, url = served()
    page.goto(url)
    page.locator("#text").fill("the old dog")
    page.get_by_role("button", name="Rank").click()
    page.locator(".hit").first.wait_for()
    ids = page.locator(".hit .id").all_text_contents()
    process.send_signal(signal.SIGKILL)
    process.wait()
    page.get_by_role("button", name="Rank").click()
    page.get_by_text("The server has ended, or cannot be reached").wait_for()
    port = re.search(r":(\d+)/", url)
    assert port is not None
    _, again = served("--port", port[1]) if same_port else served()
    if same_port:
        page.get_by_role("button", name="Rank").click()
        page.get_by_text("The server does not know this page").wait_for()
    address = page.get_by_label("The address that")
    for wrong, said in (("nonsense", "This is no address"), ("http://example.org/?token=x", "Give the whole address")):
        address.fill(wrong)
        page.get_by_role("button", name="Go on").click()
        page.get_by_text(said).wait_for()
    address.fill(again)
    page.get_by_role("button", name="Go on").click()
    page.locator(".hit").first.wait_for()
    assert page.locator(".hit .id").all_text_contents() == ids
    assert page.locator("#lost").is_hidden()
    assert page.locator("#text").input_value() == "the old dog"
    assert "token" not in page.url


def test_a_run_goes_on_when_the_server_comes_back(page: Any, tmp_path: Path) -> None:
    """The page of a run says that the server has gone, and goes on by itself with the new address."""
    run = make(tmp_path / "store")
    append(run, 0, 5)
    with ghoststore.serve(tmp_path / "store") as explorer:
        opened(page, explorer, "#/runs/run", ".samples")
        port = explorer.port
    page.locator("#lost").wait_for()
    with ghoststore.serve(tmp_path / "store", port=port) as explorer:
        append(run, 5, 10)
        page.get_by_label("The address that").fill(explorer.url)
        page.get_by_role("button", name="Go on").click()
        page.get_by_text("10 of 23").wait_for()
        assert page.locator("#lost").is_hidden()


def test_a_part_that_is_removed_while_served(page: Any, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(built, store)
    with ghoststore.serve(store) as explorer:
        page.goto(explorer.url)
        page.locator("#text").fill("the old dog")
        page.get_by_role("button", name="Rank").click()
        page.locator(".hit").first.wait_for()
        ghoststore.remove(store=store, part="part")
        page.get_by_role("button", name="Rank").click()
        page.locator("#answer .problem").wait_for()
        assert "part" in page.locator("#answer .problem").text_content()
        page.get_by_role("link", name="Store").click()
        page.get_by_text("No part yet").wait_for()
        assert "500" not in "".join(page.said)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(browser: Any, explorer: ghoststore.Explorer, width: int) -> None:
    with new_page(browser, viewport={"width": width, "height": 800}) as page:
        for fragment, wait_for in (
            ("#/runs", "#runs table"),
            ("#/runs/first?with=second", "[aria-label='Two runs']"),
            ("#/store", ".parts"),
        ):
            opened(page, explorer, fragment, wait_for)
            assert page.evaluate("document.documentElement.scrollWidth") == width, fragment
            wider = "[...document.querySelectorAll('.stacks')].some(e => e.scrollWidth > e.clientWidth)"
            assert not page.evaluate(wider), fragment
