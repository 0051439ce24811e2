"""Records of writers of other machines."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ghoststore.store.base.writers import FOLDER

HOUR = 3600


def record(folder: Path, name: str, seconds_ago: float = 0, **fields: Any) -> Path:
    """The record of a process of another machine, touched so long ago."""
    path = folder / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"host": name.rsplit("-", 2)[0], "boot": "another", "processes": "pid:[1]", "pid": 4711, "start": "1"}
    path.write_text(json.dumps({**value, "command": "ghoststore build", "since": time.time() - 5 * HOUR, **fields}))
    touched = time.time() - seconds_ago
    os.utime(path, (touched, touched))
    return path
