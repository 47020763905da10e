"""The methods, one paper a file. `make(name, **fields)` builds one; `names()` lists them."""

import dataclasses
import difflib
import importlib
import pkgutil
from typing import Any, NamedTuple

from jaxrl_llm.algorithms.base import Algorithm, value_and_grad

__all__ = ["Algorithm", "Paper", "config_class", "make", "names", "paper", "value_and_grad"]


class Paper(NamedTuple):
    """What `jaxrl_llm list` shows of a method; each algorithm module has one as `PAPER`."""

    title: str
    arxiv: str
    axis: str  # what it changes: "advantage", "ratio", "trust region", "entropy", "preference", ...
    confidence: str  # "code", "paper" or "abstract"
    cost: str = "none"  # extra passes beyond GRPO's
    state: str = "none"  # what it keeps across steps


def names() -> list[str]:
    """Slugs of all methods: every module of this package that is not the interface."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def _module(name: str) -> Any:
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"algorithm.name={name!r}: unknown method, expected one of {', '.join(names())}{hint}")
    return importlib.import_module(f"{__name__}.{name}")


def config_class(name: str) -> type:
    """The method's frozen config dataclass, `Config` in its module."""
    return _module(name).Config


def paper(name: str) -> Paper:
    return _module(name).PAPER


def make(name: str, **fields: Any) -> Algorithm:
    """Build a method from its config fields; an unknown field raises and lists the valid ones."""
    module = _module(name)
    valid = [f.name for f in dataclasses.fields(module.Config)]
    for key in fields:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"algorithm.{key}: not a field of {name!r}, expected one of {', '.join(valid)}{hint}")
    return module.build(module.Config(**fields))
