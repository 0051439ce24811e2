"""A part of default options: signs of a sketch, or of whole blocks where those of a small model are few numbers.

Either way it is continued, mended, asked, exported, and built anew from what its manifest says.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig, Store
from ghoststore.store.part.build_command import build_command
from tests.support.harms import delete, flip_middle
from tests.support.parts import unbuild, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

SMALL = Path(__file__).parents[1] / "data/format1/model"
"""A model whose blocks are 1,680 numbers in 8 layers: fewer than a sketch of 2,048 a layer has."""
CASES: dict[str, tuple[bool, ProjectionConfig | None]] = {
    "sketched": (False, None),
    "whole": (True, None),
    "whole-by-layer": (True, ProjectionConfig(compress_by="layer", precondition="none")),
    "whole-pca": (True, ProjectionConfig(kind="pca")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_from_the_build_to_the_next(lab: Lab, tmp_path: Path, case: str) -> None:
    small, projection = CASES[case]
    store = tmp_path / "store"
    given: dict[str, Any] = {"data": lab.corpus, "store": store, "name": "part", "span_rows": 6, "device": "cpu"}
    given |= {"checkpoint": SMALL if small else lab.checkpoint, "projection": projection}
    manifest = ghoststore.build(**given).manifest
    assert manifest["storage"]["dtype"] == "onebit"
    assert manifest["projection"]["compress"] == (None if small else 2048 * len(manifest["layers"]))
    assert manifest["projection"]["dimension"] == (1680 if small else 8192)
    whole = lab.tree(store)

    assert ghoststore.build(**given).resumed_rows == len(lab.rows)
    unbuild(Store.open(store).part(), 2)
    assert ghoststore.build(**given).resumed_rows == len(lab.rows) - 6
    assert lab.tree(store) == whole

    flip_middle(store / "parts/part/vectors/c/1/0")
    delete(store / "parts/part/commits/00000003.json")
    assert not ghoststore.verify(store).sound
    assert ghoststore.repair(store, device="cpu").sound
    assert ghoststore.verify(store).sound
    assert lab.tree(store) == whole

    answer = ghoststore.query(store=store, val_set=lab.corpus, each=True, top_k=1, device="cpu")
    assert all(result.hits for result in answer.results)
    ghoststore.export(store=store, out=tmp_path / "vectors.npy")
    part = Store.open(store).part()
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), vectors_of(part))

    words = shlex.split(build_command(part.manifest, store, "part"))[1:]
    assert lab.run(*words, "--quiet").code == 0
    assert lab.tree(store) == whole
    shutil.rmtree(store)
    assert lab.run(*words, "--quiet").code == 0
    assert lab.tree(store / "parts") == {
        name.removeprefix("parts/"): data for name, data in whole.items() if name.startswith("parts/")
    }
