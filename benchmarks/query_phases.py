"""One query in a fresh Python, each of its phases timed: ``query_phases.py STORE VAL_SET VAL_SAMPLES``.

Prints JSON of wall seconds by phase. Called by ``search.py --query-command``; imports come first, and are timed.
"""

from __future__ import annotations

import json
import sys
import time

BEGAN = time.perf_counter()

from common import SelfTimes  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402, F401
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402, F401

import ghoststore.same_model  # noqa: E402
import query.asked  # noqa: E402
import query.part_encoder  # noqa: E402
import query.query  # noqa: E402
from ghoststore.checkpoint import Checkpoint  # noqa: E402
from indexer.encoder import RowEncoder  # noqa: E402

IMPORTED = time.perf_counter()

PHASES = (
    (Checkpoint, "fingerprint", "fingerprint of the weights"),
    (query.part_encoder, "load_tokenizer", "tokenizer load"),
    (ghoststore.same_model, "tokenizer_identity", "identity of the tokenizer"),
    (query.part_encoder, "load_model", "model load"),
    (query.part_encoder, "projection_of", "drawing the projection"),
    (RowEncoder, "__enter__", "attaching the engine"),
    (RowEncoder, "__call__", "val pass"),
    (query.asked, "search", "search"),
    (query.query, "_hits", "ids and texts of the hits"),
)


def main() -> None:
    """Run the query of the command line's three arguments."""
    store, val_set, val_samples = sys.argv[1:]
    times = SelfTimes(clock=time.perf_counter)
    with times.wrapped(*PHASES):
        query.query.query(store=store, val_set=val_set, max_samples=int(val_samples))
    phases = {"imports": IMPORTED - BEGAN, **times.seconds}
    phases["everything else"] = time.perf_counter() - BEGAN - sum(phases.values())
    print(json.dumps(phases))


if __name__ == "__main__":
    main()
