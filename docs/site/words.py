"""Docstrings, types and signatures of Python objects as Markdown."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from ghoststore.settings.option import KEY
from ghoststore.settings.shared import Checkpoint, Data, TokenizerSource

OURS = ("ghoststore", "indexer", "query")
ALIASES = {"Data": Data, "Checkpoint": Checkpoint, "TokenizerSource": TokenizerSource}
"""Types that parameters of many functions have; the page of the reference says what they are."""
WIDTH = 92

CODE = re.compile(r":(?:class|meth|func|attr|mod|data):`~?([^`]+)`|``(.+?)``|`([^`]+)`", re.DOTALL)
"""A reference, code, or a name."""
PAGE = re.compile(r"(?:docs/)?([a-z-]+)\.md")
ERROR = re.compile(r"\b[A-Z]\w+Error\b")


class Links(NamedTuple):
    """Where names lead."""

    names: Mapping[str, str]
    """By public name, or ``Class.member``, its address."""
    errors: Mapping[str, str]

    def code(self, word: str, within: str = "", *, named: bool = False) -> str:
        """``word`` as code, as a link if it is the name of something on a page.

        A word in small letters may be that of a parameter, too: it is taken for a public name only where the docstring
        says so (``named``), in the class ``within`` first.
        """
        page = PAGE.fullmatch(word)
        if page:
            return f"[{page[1]}](../{page[1]}.md)"
        bare = word.removesuffix("()")
        tail = re.sub(rf"^({'|'.join(OURS)})\.([a-z_.]+\.)?", "", bare)
        address = self.errors.get(bare)
        if tail in self.names and (named or tail != bare or tail[0].isupper()):
            address = self.names[tail]
        if named:
            address = self.names.get(f"{within}.{bare}", address)
        return f"`{word}`" if address is None else f"[`{word}`]({address})"

    def text(self, text: str, within: str = "") -> str:
        """Prose of a docstring as Markdown."""
        pieces, end = [], 0
        for found in CODE.finditer(text):
            word = found[1] or found[2] or found[3]
            code = self.code(word, within, named=found[1] is not None)
            pieces += [self._plain(text[end : found.start()]), code]
            end = found.end()
        return "".join([*pieces, self._plain(text[end:])])

    def _plain(self, text: str) -> str:
        def linked(found: re.Match[str]) -> str:
            return f"[{found[0]}]({self.errors[found[0]]})" if found[0] in self.errors else found[0]

        return ERROR.sub(linked, re.sub(r"([*<])", r"\\\1", text))


def docstring(of: Any, links: Links, within: str = "") -> str:
    """The docstring of an object as Markdown; blocks after ``::`` are Python."""
    given = inspect.getdoc(of)
    assert given, of
    blocks = []
    for block in re.split(r"\n\s*\n", given):
        if block.startswith("    ") and blocks:
            code = re.sub(r"^    ", "", block, flags=re.MULTILINE)
            if blocks[-1].endswith("\n```"):
                blocks[-1] = f"{blocks[-1][:-4]}\n\n{code}\n```"
            else:
                before = blocks.pop().removesuffix("::").rstrip()
                blocks += [f"{before}:"] if before else []
                blocks.append(f"```python\n{code}\n```")
        else:
            blocks.append(links.text(block, within))
    return "\n\n".join(blocks)


def line(text: str, links: Links, within: str = "") -> str:
    """A short text as one cell of a table."""
    return links.text(re.sub(r"\s+", " ", text).strip(), within).replace("|", "\\|")


def members(kind: Any, names: Mapping[str, Any]) -> Iterator[str]:
    """The words for each type of a union, given as a type or as the source of one that ``names`` resolve."""
    for alias, meaning in ALIASES.items():
        if kind in (meaning, alias):
            yield alias
            return
    if isinstance(kind, str):
        yield from _members_of_source(ast.parse(kind.strip("'\""), mode="eval").body, names)
    elif get_origin(kind) in (Union, UnionType):
        own = [member for member in get_args(kind) if member is not type(None)]
        for alias, meaning in ALIASES.items():
            if set(get_args(meaning)) == set(own):
                yield alias
                break
        else:
            for member in own:
                yield from members(member, names)
        if type(None) in get_args(kind):
            yield "None"
    elif get_origin(kind) is Literal:
        yield from _words(get_args(kind))
    else:
        yield short(kind)


def _words(words: Iterable[str]) -> Iterator[str]:
    """Sorted, because typing takes two Literals of the same words for one, in the order that it met first."""
    yield from (f'"{word}"' for word in sorted(words))


def _members_of_source(node: ast.expr, names: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(node, ast.BinOp):
        yield from _members_of_source(node.left, names)
        yield from _members_of_source(node.right, names)
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        words = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        yield from _words(ast.literal_eval(word) for word in words)
    elif isinstance(node, ast.Name) and get_origin(names.get(node.id)) in (Literal, Union, UnionType):
        yield from members(names[node.id], names)
    else:
        yield ast.unparse(node)


def short(kind: Any) -> str:
    """A type without the names of its modules."""
    if isinstance(kind, type) and not get_args(kind):
        return kind.__qualname__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(kind))


def type_words(kind: Any, names: Mapping[str, Any], links: Links) -> str:
    """A type in words: ``str`` or ``None``."""
    return " or ".join(links.code(word) for word in dict.fromkeys(members(kind, names))).replace("|", "\\|")


def default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    shown = repr(value)
    if len(shown) < 40 and "<" not in shown:
        return shown
    return "…" if type(value).__name__.startswith("_") else f"{type(value).__name__}()"  # the first: a factory's


def signature(called: str, of: Callable[..., Any], *, typed: bool = True) -> str:
    """``called(…) -> …`` as Python, on one line if there is room; without types if a table has them."""
    shape = inspect.signature(of)
    words, keyword_only = [], False
    for parameter in shape.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        keyword_only = keyword_only or star == "*"
        kind = "" if not typed or parameter.annotation is parameter.empty else source(parameter.annotation)
        value = default(parameter.default)
        equals = (" = " if kind else "=") + value if value else ""
        words.append(f"{star}{parameter.name}{f': {kind}' if kind else ''}{equals}")
    result = shape.return_annotation
    end = "" if result is shape.empty or inspect.isclass(of) else f" -> {source(result)}"
    whole = f"{called}({', '.join(words)}){end}"
    if len(whole) <= WIDTH:
        return whole
    if typed:
        inner = "".join(f"    {word},\n" for word in words)
    else:
        inner = textwrap.fill(", ".join(words) + ",", WIDTH, initial_indent="    ", subsequent_indent="    ") + "\n"
    return f"{called}(\n{inner}){end}"


def source(kind: Any) -> str:
    return kind.strip("'\"") if isinstance(kind, str) else short(kind)


class Attribute(NamedTuple):
    """One field of a class, with what its source says of it."""

    name: str
    type: Any
    meaning: str


def attributes(kind: type) -> list[Attribute]:
    """The public fields of a class and of its bases of ours: what is annotated, or a member of an enumeration."""
    found: dict[str, Attribute] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in OURS:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name, annotation = node.target.id, ast.unparse(node.annotation)
            elif isinstance(node, ast.Assign) and issubclass(kind, Enum) and isinstance(node.targets[0], ast.Name):
                name, annotation = node.targets[0].id, ast.unparse(node.value)
            else:
                continue
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            meaning = str(after.value.value) if is_text else ""
            if not name.startswith("_") and not annotation.startswith("ClassVar"):
                found[name] = Attribute(name, annotation, meaning)
    return list(found.values())


def is_options(kind: Any) -> bool:
    """Whether a class is one of options, whose fields have their help."""
    return any(KEY in spec.metadata for spec in getattr(kind, "__dataclass_fields__", {}).values())
