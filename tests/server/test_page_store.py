"""The explorer's Store view of stores that are not as they were: caches that went stale, bytes that changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.support.browser import contrast

if TYPE_CHECKING:
    from tests.conftest import Lab

pytestmark = pytest.mark.slow


def flip(path: Path) -> None:
    """Change a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def card(page: Any, explorer: ghoststore.Explorer) -> dict[str, str]:
    """What the card of the first part says, by the names of its facts."""
    page.goto("about:blank")
    page.goto(f"{explorer.url}#/store")
    page.wait_for_selector(".parts")
    facts = page.locator(".parts .card").first.locator("dl").first
    names, values = (facts.locator(kind).all_text_contents() for kind in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def test_indexes_and_fidelity_that_are_stale_or_damaged(page: Any, lab: Lab, built: Path, tmp_path: Path) -> None:
    """Measured in the middle of a build that was killed; then it goes on; then bytes change."""
    pytest.importorskip("faiss", reason="an index needs FAISS")
    store = tmp_path / "store"
    kill = {"call": "name", "path": r"commits/00000002\.json", "act": "kill"}
    assert lab.build(store, fault=kill).code == -9
    ghoststore.index(store=store, name="early")
    ghoststore.index(store=store, name="late")
    ghoststore.fidelity(store=store, val_set=lab.corpus, rows=11, val_samples=3)
    caches = store / "parts/part"
    with ghoststore.serve(store) as explorer:
        shown = card(page, explorer)
        assert shown["rows"] == f"12 of {len(lab.rows)} committed"
        assert shown["indexes"].startswith("early (current); ")
        assert page.locator("#store .badge").count() == 0
        assert lab.build(store).code == 0
        shown = card(page, explorer)
        assert "early stale index 'early' is stale: it covers 2 spans, part 'part' has" in shown["indexes"]
        assert "`ghoststore index` builds it again" in shown["indexes"]
        assert "Spearman" in shown["fidelity"]
        assert f"stale it was measured when 12 rows were committed; {len(lab.rows)} are now" in shown["fidelity"]
        assert page.locator("#store .badge.stale").count() == 3
        assert contrast(page, "#store .badge") >= 4.5

        flip(caches / "index/early/index.json")
        next((caches / "index/late").glob("*.faiss")).unlink()
        flip(caches / "fidelity/dot.json")
        shown = card(page, explorer)
        assert "early damaged " in shown["indexes"]
        assert "late damaged " in shown["indexes"]
        assert ".faiss is missing or cut; ghoststore index builds it again" in shown["indexes"]
        assert shown["fidelity"].startswith("by dot damaged ")
        assert "ghoststore fidelity measures it again" in shown["fidelity"]
        assert contrast(page, "#store .badge") >= 4.5

        # Those of a part with other matrices.
        other = tmp_path / "other"
        assert lab.build(other, "--proj-seed", "5").code == 0
        ghoststore.index(store=other, name="early")
        ghoststore.fidelity(store=other, val_set=lab.corpus, rows=11, val_samples=3)
        for name in ("index", "fidelity"):
            shutil.rmtree(caches / name)
            shutil.copytree(other / "parts/part" / name, caches / name)
        shown = card(page, explorer)
        assert "early stale index 'early' was built of other vectors than those of part 'part'" in shown["indexes"]
        assert shown["fidelity"] == "none: ghoststore fidelity measures it"
    assert page.said == []


def test_a_store_that_cannot_be_described_can_be_verified(page: Any, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(built, store)
    flip(store / "parts/part/zarr.json")
    with ghoststore.serve(store) as explorer:
        page.goto(f"{explorer.url}#/store")
        page.locator("#store > .problem").wait_for()
        assert f"ghoststore verify --store {store}" in page.locator("#store").text_content()
        page.get_by_role("button", name="Verify").click()
        page.get_by_role("region", name="Damage").wait_for()
        assert "parts/part/zarr.json" in page.get_by_role("region", name="Damage").text_content()
