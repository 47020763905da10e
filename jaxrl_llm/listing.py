"""What `jaxrl_llm list` shows: the methods from their `PAPER`, a method's fields from its `Config`."""

import dataclasses
import inspect
import typing
from collections.abc import Sequence

from jaxrl_llm import algorithms
from jaxrl_llm.config_load import type_name


def methods() -> str:
    """A table of all methods."""
    rows = [("method", "axis", "arXiv", "spec from", "keeps", "extra cost")]
    for name in algorithms.names():
        p = algorithms.paper(name)
        rows.append((name, p.axis, p.arxiv, p.confidence, p.state, p.cost))
    return _columns(rows)


def by_axis() -> str:
    """The lines of README.md: the methods by what they change."""
    return "\n".join(f"- {axis}: {', '.join(f'`{name}`' for name in found)}" for axis, found in _axes().items())


def document() -> str:
    """docs/algorithms.md: one table of all methods by axis, then each with what its module says and its fields."""
    table = [
        "| method | axis | paper | spec from | keeps | extra cost |",
        "|---|---|---|---|---|---|",
    ]
    pages = []
    for axis, found in _axes().items():
        for name in found:
            p = algorithms.paper(name)
            paper = f"[{p.arxiv}](https://arxiv.org/abs/{p.arxiv})" if p.arxiv else p.title
            table.append(f"| [`{name}`](#{name}) | {axis} | {paper} | {p.confidence} | {p.state} | {p.cost} |")
            pages += ["", f"## {name}", "", "```text", method(name), "```"]
    return "\n".join([_HEAD, *table, *pages, ""])


_HEAD = """# The methods

Made by `jaxrl_llm list --document > docs/algorithms.md` from the modules themselves; a test compares them.

"Spec from" says how sure we are: *code*, we read the authors' (or a well-known trainer's) code; *paper*, its full text or its
formulas at second hand; *abstract*, only an abstract or reviews, so more than elsewhere is our reconstruction. Each module says
what is our choice.
"""


def _axes() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in algorithms.names():
        found.setdefault(algorithms.paper(name).axis, []).append(name)
    return dict(sorted(found.items()))


def method(name: str) -> str:
    """One method: its paper, module docstring and config fields. Raises ValueError for an unknown name."""
    paper, cls = algorithms.paper(name), algorithms.config_class(name)
    module = inspect.getmodule(cls)
    about = inspect.cleandoc(module.__doc__ or "") if module else ""
    head = f"{name}: {paper.title}" + (f", arXiv {paper.arxiv}" if paper.arxiv else "")
    facts = f"axis: {paper.axis}; spec from: {paper.confidence}; keeps: {paper.state}; extra cost: {paper.cost}"
    return "\n".join([head, facts, "", about, "", "algorithm:", f"  name: {name}", *_fields(cls)])


def _fields(cls: type) -> list[str]:
    hints = typing.get_type_hints(cls)
    comments = _comments(cls)
    lines = []
    for f in dataclasses.fields(cls):
        default = "required" if f.default is dataclasses.MISSING else repr(f.default)
        meaning = f"  # {comments[f.name]}" if f.name in comments else ""
        lines.append(f"  {f.name}: {default}  ({type_name(hints[f.name])}){meaning}")
    return lines


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field in the class's source."""
    found = {}
    for line in inspect.getsource(cls).splitlines():
        name, colon, rest = line.strip().partition(":")
        if colon and name.isidentifier() and "  # " in rest:
            found[name] = rest.partition("  # ")[2]
    return found


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
