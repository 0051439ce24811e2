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

import ghoststore.checkpoint.same_model  # noqa: E402
import query.answer.query  # noqa: E402
import query.ask.encoder  # noqa: E402
from ghoststore.checkpoint.find import Checkpoint  # noqa: E402
from indexer.encode.encoder import RowEncoder  # noqa: E402

IMPORTED = time.perf_counter()

PHASES = (
    (Checkpoint, "fingerprint", "fingerprint of the weights"),
    (query.ask.encoder, "load_tokenizer", "tokenizer load"),
    (ghoststore.checkpoint.same_model, "tokenizer_identity", "identity of the tokenizer"),
    (query.ask.encoder, "load_model", "model load"),
    (query.ask.encoder, "projection_of", "drawing the projection"),
    (RowEncoder, "__enter__", "attaching the engine"),
    (RowEncoder, "__call__", "val pass"),
    (query.answer.query, "search", "search"),
    (query.answer.query, "hits_of", "ids and texts of the hits"),
)


def main() -> None:
    """Run the query of the command line's three arguments."""
    store, val_set, val_samples = sys.argv[1:]
    times = SelfTimes(clock=time.perf_counter)
    with times.wrapped(*PHASES):
        query.answer.query.query(store=store, val_set=val_set, max_samples=int(val_samples))
    phases = {"imports": IMPORTED - BEGAN, **times.seconds}
    phases["everything else"] = time.perf_counter() - BEGAN - sum(phases.values())
    print(json.dumps(phases))


if __name__ == "__main__":
    main()
