"""Token shards as tests make them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ghoststore
from ghoststore.tokens.shards import TokenShards

if TYPE_CHECKING:
    from tests.conftest import Lab


def tokenize(lab: Lab, data: Path | str, out: Path, **more: Any) -> TokenShards:
    ghoststore.tokenize(data=data, tokenizer=lab.checkpoint, out=out, workers=1, **{"shard_samples": 3, **more})
    return TokenShards.open(out, verify=True)
