"""A document as data: sections of text, lists, tables and pictures, written as Markdown and HTML.

Both come from the same blocks, so they cannot tell different stories. The HTML stands alone:
pictures are embedded, nothing is fetched.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from tabulate import tabulate


@dataclass(frozen=True)
class Link:
    """A table entry that leads to a file; href is relative to the report folder."""

    text: str
    href: str


@dataclass(frozen=True)
class Text:
    """A paragraph; style "answer" sets it off."""

    text: str
    style: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Items:
    """A bulleted list."""

    items: Sequence[str]
    kind: str = "items"


@dataclass(frozen=True)
class Table:
    """A table with its caption; strong: indices of the rows to set in bold."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    caption: str = ""
    strong: Collection[int] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A picture in the report folder with its caption."""

    file: str
    alt: str
    caption: str
    kind: str = "figure"


Block = Text | Items | Table | Figure


@dataclass(frozen=True)
class Section:
    """A titled run of blocks."""

    title: str
    blocks: Sequence[Block]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The document as Markdown, pictures by file name."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Text():
            return f"**{block.text}**" if block.style == "answer" else block.text
        case Items():
            return "\n".join(f"- {item}" for item in block.items)
        case Figure():
            return f"![{block.alt}]({block.file})\n\n*{block.caption}*"
        case Table():
            rows = [[_cell(c, i in block.strong) for c in row] for i, row in enumerate(block.rows)]
            text = tabulate(rows, [_cell(h, False) for h in block.header], tablefmt="pipe",
                            disable_numparse=True)
            return f"{text}\n\n*{block.caption}*" if block.caption else text


def _cell(value: str | Link, strong: bool) -> str:
    text = value.text if isinstance(value, Link) else value
    text = " ".join(text.replace("|", "\\|").split())
    text = f"**{text}**" if strong and text else text
    return f"[{text}]({value.href})" if isinstance(value, Link) else text


def html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The document as one HTML file, pictures read from `folder` and embedded."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["embed"] = lambda file: "data:image/png;base64," + base64.b64encode(
        (folder / file).read_bytes()).decode()
    return environment.get_template("report.html.jinja").render(title=title, sections=sections)
