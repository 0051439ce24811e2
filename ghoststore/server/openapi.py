"""The JSON interface, described as an OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from ghoststore import __version__
from ghoststore.server.choosing import FORMS
from ghoststore.server.choosing import OFFERED as CHOOSING
from ghoststore.server.questions import MOST_ROWS, OFFERED, ROWS
from ghoststore.settings.option import KEY, choices_of, members_of
from ghoststore.settings.question import QueryOptions, SelectOptions

ERRORS = {
    "400": "The question cannot be used as given (exit code 2).",
    "401": "The token is missing, or another one.",
    "403": "Another host or origin.",
    "404": "There is no such row, run or store; of a part see 400.",
    "409": "Settings do not fit what is stored (exit code 3).",
    "413": "The body is too large.",
    "415": "The body is not said to be JSON.",
    "500": "Stored bytes are damaged (exit code 4), or a bug (1).",
    "503": "Too many questions wait, or streams are open (exit code 5).",
    "507": "The disk failed (exit code 6).",
}
EVENTS = "text/event-stream"
TYPES: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def document() -> dict[str, Any]:
    """The OpenAPI document. The options of a question are those of ``ghoststore query``, with their help."""
    specs = {spec.name: spec for spec in fields(QueryOptions)}
    question = {
        "type": "object",
        "anyOf": [{"required": ["val_set"]}, {"required": ["near"]}],
        "additionalProperties": False,
        "properties": {name: _rows(specs[name]) if name in ROWS else _schema(specs[name]) for name in OFFERED},
    }
    body = {"required": True, "content": {"application/json": {"schema": question}}}
    own = {
        "store": {"get": _operation("What `ghoststore info --json` prints.", "400 500 507")},
        "query": {
            "post": {
                **_operation(
                    "What `ghoststore query --json` prints, and `explorer`: words about it.",
                    "400 409 413 415 500 503 507",
                ),
                "requestBody": body,
            }
        },
        "sample/{part}/{row}": {
            "get": {
                **_operation("A sample, by its row in the corpus: text, kept fields, status.", "400 404 500 507"),
                "parameters": [_name("part"), _name("row", {"type": "integer", "minimum": 0})],
            }
        },
        "runs": {"get": _operation("The training runs as `ghoststore info --json` has them, and `state`.", "500 507")},
        "runs/{run}": {
            "get": {
                **_operation(
                    "What `ghoststore watch --once --json` prints, `spread`: its scores over the steps, `explorer`.",
                    "404 500 507",
                ),
                "parameters": [_name("run")],
            }
        },
        "runs/{run}/events": {
            "get": {
                **_operation(
                    "A run while it grows: `frame` (as of `runs/{run}`) whenever steps were committed, `end` when the "
                    "last one was, `problem` with an error.",
                    "404 500 503 507",
                    EVENTS,
                ),
                "parameters": [_name("run")],
            }
        },
        "verify/events": {
            "get": {
                **_operation(
                    "`progress` (what, done, total, unit), then `report`, what `ghoststore verify --json` "
                    "prints, or `problem` with an error. It stops when its reader goes.",
                    "400 503",
                    EVENTS,
                ),
                "parameters": [
                    {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}
                    for name in ("part", "run")
                ],
            }
        },
    }
    own |= _views()
    listed = {"get": _operation("The stores of this server: `stores`, each with `name` and `store`, its path.", "")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ghoststore", "version": __version__},
        "security": [{"token": []}],
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/api/stores": listed,
            **{f"/api/{path}": item for path, item in own.items()},
            **{f"/api/stores/{{store}}/{path}": {**item, "parameters": [_name("store")]} for path, item in own.items()},
        },
    }


def _views() -> dict[str, Any]:
    """What stands behind a sample and a ranking, by its path."""
    specs = {spec.name: spec for spec in fields(SelectOptions)}
    properties = {name: _rows(specs[name]) if name in ROWS else _schema(specs[name]) for name in CHOOSING}
    properties["source_rows"] = {
        "description": "In the place of how much: these rows of the corpus, all of them, and no others.",
        "type": "array",
        "minItems": 1,
        "items": {"type": "integer", "minimum": 0},
    }
    properties["quota"] = {
        "description": "In the place of `quotas`: DOMAIN=0.3, a share, or DOMAIN=100, rows. Others share the rest.",
        "type": "array",
        "minItems": 1,
        "items": {"type": "string"},
    }
    properties["form"] = {"description": "Of the file.", "enum": list(FORMS), "default": FORMS[0]}
    schema = {"type": "object", "required": ["val_set"], "additionalProperties": False, "properties": properties}
    row = [_name("part"), _name("row", {"type": "integer", "minimum": 0})]
    runs = "Where a sample was trained on, by run: what `ghoststore scores --sample --json` prints."
    near = "Samples of the corpus that hold half of this one's runs of 8 words."
    chosen = "What `ghoststore select` writes: its report, and `files` in base64."
    return {
        "sample/{part}/{row}/runs": {"get": {**_operation(runs, "400 404 500 503 507"), "parameters": row}},
        "sample/{part}/{row}/duplicates": {"get": {**_operation(near, "400 404 409 500 503 507"), "parameters": row}},
        "select": {
            "post": {
                **_operation(chosen, "400 409 413 415 500 503 507"),
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            }
        },
    }


def _name(name: str, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema or {"type": "string"}}


def _operation(summary: str, errors: str, kind: str = "application/json") -> dict[str, Any]:
    codes = sorted({*errors.split(), "401", "403"})
    error = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "type": {"type": "string"},
                    "message": {"type": "string"},
                    "exit_code": {"type": ["integer", "null"]},
                },
            }
        },
    }
    content = {"application/json": {"schema": error}}
    answer = {kind: {"schema": {"type": "string" if kind == EVENTS else "object"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": answer},
            **{code: {"description": ERRORS[code], "content": content} for code in codes},
        },
    }


def _rows(spec: Field[Any]) -> dict[str, Any]:
    texts = {"type": "array", "minItems": 1, "items": {"type": "string"}}
    rows = {"type": "array", "minItems": 1, "items": {"type": "object"}}
    return {"description": f"Texts, or rows as in a jsonl file. {_help(spec)}", "oneOf": [texts, rows]}


def _help(spec: Field[Any]) -> str:
    metadata: Mapping[str, Any] = spec.metadata
    return str(metadata[KEY].help)


def _schema(spec: Field[Any]) -> dict[str, Any]:
    members = members_of(spec.type)
    kinds = [TYPES[member] for member in members if member in TYPES]
    schema: dict[str, Any] = {"description": _help(spec)}
    if choices := choices_of(spec):
        schema |= {"enum": list(choices)}
    elif spec.name in ("layers", "exclude_layers"):
        schema |= {"type": "array", "items": {"type": "string"}}
    else:
        schema |= {"type": kinds[0]} if kinds else {}
    if spec.name in ("top_k", "bottom_k"):
        schema |= {"minimum": 0, "maximum": MOST_ROWS}
    if spec.default not in (MISSING, None, ()):
        schema |= {"default": spec.default}
    return schema
