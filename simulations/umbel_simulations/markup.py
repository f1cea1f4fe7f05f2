"""Parts of the pages that the demo and the simulations write: one style, and what stands in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Final

STYLE: Final = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
"""For a page's `<style>`: light and dark, and the colours that `umbel_simulations.charts` names."""


def figures(found: Mapping[str, str]) -> str:
    """A row of large figures by what they tell."""
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found.items())
    return f'<dl class="figures">{entries}</dl>'


def figure(title: str, chart: str) -> str:
    """A chart under its title."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table, which scrolls by itself where it is too wide."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
