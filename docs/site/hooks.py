"""What mkdocs needs beside its pages: files outside ``docs/`` that a page links to, and the explorer's icon.

The pages are written for a git host, where ``../examples/README.md`` is a link like any other. In the site these files
lie below ``repository/``, Markdown as pages, sources as pages of code, everything else as it is; links to them are
rewritten, and so are the links in them. What they link to comes along. Nothing is copied by hand, and no host is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = "repository"
LANGUAGES = {".py": "python", ".cff": "yaml", ".toml": "toml", "": "text"}
"""By suffix of a file, the language of the page that shows it."""
ALWAYS = ("CHANGELOG.md", "SECURITY.md")
"""Files outside ``docs/`` that the navigation names."""

FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(?=[)#])")


def target(link: str, of: str) -> str | None:
    """The path in the repository that ``link`` of its file ``of`` leads to; None if it leads out of it, or nowhere."""
    if ":" in link or link.startswith("/"):
        return None
    path = normpath(f"{PurePosixPath(of).parent}/{link}")
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def source_of(path: str) -> str:
    """The name in the site's sources of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}" + (".md" if PurePosixPath(path).suffix in LANGUAGES else "")


def path_of(source: str) -> str:
    """The reverse of :func:`source_of`, of pages."""
    if not source.startswith(f"{OUTSIDE}/"):
        return f"docs/{source}"
    path = source.removeprefix(f"{OUTSIDE}/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def links(path: str) -> Iterator[str]:
    """The files of the repository that a Markdown file of it links to."""
    for found in LINK.finditer(FENCED.sub("", (ROOT / path).read_text(encoding="utf-8"))):
        if leads_to := target(found[1], path):
            yield leads_to


def outside(pages: list[str]) -> set[str]:
    """All files outside ``docs/`` that these Markdown files lead to, over any number of links."""
    waiting, seen = [*pages, *ALWAYS], set(pages)
    while waiting:
        path = waiting.pop()
        seen.add(path)
        if path.endswith(".md"):
            waiting += [leads_to for leads_to in links(path) if leads_to not in seen]
    return {path for path in seen if not path.startswith("docs/")}


def on_files(files: Files, *, config: Any) -> Files:
    """Add what is outside ``docs/``."""
    for path in sorted(outside([f"docs/{page.src_uri}" for page in files.documentation_pages()])):
        if (language := LANGUAGES.get(PurePosixPath(path).suffix)) is not None:
            code = (ROOT / path).read_text(encoding="utf-8")
            content = {"content": f"# {path}\n\n```{language}\n{code}```\n"}
        else:
            content = {"abs_src_path": str(ROOT / path)}
        files.append(File.generated(config, source_of(path), **content))
    icon = ROOT / "ghoststore" / "server" / "pages" / "icon.svg"
    files.append(File.generated(config, "icon.svg", abs_src_path=str(icon)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links that lead out of ``docs/``, and those of files that lie outside it."""
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation"]  # it has but itself there

    def rewritten(found: re.Match[str]) -> str:
        leads_to = target(found[1], path_of(here))
        return found[1] if leads_to is None else relpath(source_of(leads_to), str(PurePosixPath(here).parent))

    pieces, end = [], 0
    for block in FENCED.finditer(markdown):
        pieces += [LINK.sub(rewritten, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*pieces, LINK.sub(rewritten, markdown[end:])])
