"""The measured fidelity of a part, in its folder ``fidelity/``: how far its rankings are from exact gradients'.

There is a record for each metric, with the number of rows that it covers. Rows that are committed later make it stale.
A stale record is still shown: it describes the projection, and rows that still exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ghoststore.errors import CorruptError
from ghoststore.store.base.disk import publish_group, storage_errors
from ghoststore.store.base.opening import refuse_links
from ghoststore.store.base.records import read_record, write_record
from ghoststore.store.part.part import Part

FOLDER = "fidelity"
FORMAT = 1
METRICS = ("cosine", "dot")
State = Literal["current", "stale", "damaged"]


@dataclass(frozen=True, slots=True)
class KeptFidelity:
    """The record of one metric."""

    metric: str
    state: State
    problem: str | None
    """Why it is stale or damaged."""
    value: dict[str, Any]
    """The report's JSON; empty if it is damaged."""

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``info`` and ``query`` show."""
        return {"metric": self.metric, "state": self.state, "problem": self.problem, **self.value}


def keep_fidelity(part: Part, metric: str, value: dict[str, Any]) -> None:
    """Write a measurement of all rows of ``part``, in place of an earlier one. StorageError if the disk refuses."""
    folder = part.caches / FOLDER
    refuse_links(part.caches)
    with storage_errors(str(folder)):
        part.caches.mkdir(parents=True, exist_ok=True)
        publish_group(folder, {})
        write_record(
            folder / f"{metric}.json",
            {
                "format": FORMAT,
                "manifest": part.identity,
                "covers": part.fingerprint(),
                "rows_covered": part.rows,
                "value": value,
            },
        )


def read_fidelity(part: Part, metric: str) -> KeptFidelity | None:
    """The record of ``metric``; None if there is none, or it is of another version or another part."""
    path = part.caches / FOLDER / f"{metric}.json"
    try:
        record = read_record(path, within=part.caches)
        if record["format"] != FORMAT or record["manifest"] != part.identity:
            return None
        value = {**record["value"], "rows_covered": int(record["rows_covered"])}
        check_value(value)
        covers = record["covers"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except CorruptError as error:
        return KeptFidelity(metric, "damaged", str(error), {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return KeptFidelity(metric, "damaged", f"{path} is damaged ({error!r:.200})", {})
    if covers == part.fingerprint():
        return KeptFidelity(metric, "current", None, value)
    problem = f"it was measured when {value['rows_covered']:,} rows were committed; {part.rows:,} are now"
    return KeptFidelity(metric, "stale", problem, value)


def kept_fidelities(part: Part) -> list[KeptFidelity]:
    """The records of all metrics that were measured."""
    return [measured for metric in METRICS if (measured := read_fidelity(part, metric)) is not None]


def check_value(value: dict[str, Any]) -> None:
    """Raise an error unless :func:`fidelity_line` can describe ``value``."""
    fidelity_line({"state": "current", "problem": None, "metric": "", **value})


def fidelity_line(measured: dict[str, Any]) -> str:
    """Describe the JSON of :meth:`KeptFidelity.to_json` in one line."""
    if measured["state"] == "damaged":
        return f"damaged: {measured['problem']}; `ghoststore fidelity` measures it again"
    layers, everything = measured["layers"], measured["all"]
    of_all = "" if everything is None else f", {everything['spearman']['value']:.2f} to all parameters"
    stale = "" if measured["state"] == "current" else f" (stale: {measured['problem']})"
    return (
        f"Spearman {layers['spearman']['value']:.2f} to exact gradients of the layers{of_all}, recall@{layers['at']} "
        f"{layers['recall']['value']:.2f}, relative error {layers['relative_error']['value']:.2f}; "
        f"{measured['rows']:,} rows × {measured['val_samples']:,} val samples by {measured['metric']}{stale}"
    )
