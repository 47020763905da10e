"""From YAML files and dotted overrides to a `Config`; every error is one line: key, value, what is expected.

Layers are merged left to right: later files over earlier ones, then the overrides. Choosing another `task.kind` or
`algorithm.name` than the layers below starts that section afresh, because the old fields would mean nothing there.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from jaxrl_llm import config_check
from jaxrl_llm.config import Config

TAGS = {"task": "kind", "algorithm": "name"}  # sections whose fields depend on one of them


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number (YAML 1.1 wants `1.0e-4`), keeps dates as text and refuses double keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute, copied so that others keep theirs)
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read, merge, override and check a config; the method's own section last, because that imports jax.

    Args:
      path: a YAML file, a run directory (its `config.yaml`), or several of them, later ones over earlier ones.
      overrides: `a.b=value` with the value in YAML; list items by index (`task.datasets.0.name=chain_sum`).
    Raises: ValueError of one line.
    """
    config = load_unchecked(path, overrides)
    config_check.check(config)
    return config_check.check_method(config)


def load_unchecked(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """`load` without the checks across fields: keys, types and ranges only."""
    paths = [path] if isinstance(path, str | Path) else list(path)
    data: dict[str, Any] = {"algorithm": Config.model_fields["algorithm"].default}  # fields alone keep its name
    for one in paths:
        data = _merge(data, _read(Path(one)))
        if Path(one).is_dir():  # it may have moved since it wrote its config
            data = _merge(data, {"run": {"dir": str(one)}})
    assignments = [assignment(text) for text in overrides]
    tags = [f"{section}.{tag}" for section, tag in TAGS.items()]
    for key, value in sorted(assignments, key=lambda kv: kv[0] not in tags):  # tags first: they may clear a section
        data = _assign(data, key, value)
    return validate(data)


def validate(data: Mapping[str, Any]) -> Config:
    """A `Config` from plain data; types are strict (no text where a number belongs)."""
    try:
        # By way of JSON: what JSON cannot say has no place in a config, and tuples and lists are one thing there.
        return Config.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise ValueError(_explain(details[0], data)) from None
    except (TypeError, RecursionError) as error:
        raise ValueError(f"config: {error}; expected plain YAML data") from None


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.yaml" if path.is_dir() else path
    try:
        data = yaml.load(file.read_text(), _Loader)
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read ({error.strerror}), expected a YAML file or a run directory"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML: {_yaml_problem(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{file}: holds a {type(data).__name__}, expected sections such as `task:` and `rollout:`")
    return data


def _yaml_problem(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{problem} in line {mark.line + 1}" if mark and problem else " ".join(str(error).split())


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _restarts(key, old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _restarts(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    tag = TAGS.get(section)
    return tag is not None and tag in new and new[tag] != old.get(tag)


def assignment(text: str) -> tuple[str, Any]:
    """The dotted key and the value, read as YAML, of an override."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text}: expected an override key=value, such as rollout.group_size=8")
    try:
        return key, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value}: the value is not valid YAML: {_yaml_problem(error)}") from None


def _assign(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the value at a dotted key; missing sections are made, list items must exist."""
    section, _, tag = key.partition(".")
    below = data.get(section)
    if TAGS.get(section) == tag and isinstance(below, dict) and below.get(tag) != value:
        return {**data, section: {tag: value}}

    def at(node: Any, path: list[str], done: str) -> Any:
        if not path:
            return value
        head, rest = path[0], path[1:]
        here = f"{done}.{head}" if done else head
        if isinstance(node, list):
            if not head.isdigit() or int(head) >= len(node):
                raise ValueError(f"{key}={value!r}: {head!r} is no item of {done}, expected 0 to {len(node) - 1}")
            i = int(head)
            return [*node[:i], at(node[i], rest, here), *node[i + 1 :]]
        if node is not None and not isinstance(node, dict):
            raise ValueError(f"{key}={value!r}: {done} is {node!r} and has no fields")
        return {**(node or {}), head: at((node or {}).get(head), rest, here)}

    return at(data, key.split("."), "")


# ---------------------------------------------------------------------------------------------------- errors and help


def _explain(error: ErrorDetails, data: Mapping[str, Any]) -> str:
    """One line for one pydantic error: key=value, what is expected, nearest valid key."""
    loc = _without_tags(error["loc"], data)
    key, kind, ctx = ".".join(map(str, loc)), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key}={_short(error['input'])}: no such key{_nearest(loc, data)}"
    if kind == "missing":
        field = _field_at(loc, data)
        meaning = f" ({field.description})" if field is not None and field.description else ""
        return f"{key}: missing{meaning}"
    if kind == "union_tag_not_found":
        return f"{key}.{TAGS[key]}: missing, expected reasoning_gym, file or custom"
    if kind == "union_tag_invalid":
        near = difflib.get_close_matches(str(ctx["tag"]), [t.strip(" '") for t in ctx["expected_tags"].split(",")], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}.{TAGS[key]}={ctx['tag']!r}: expected one of {ctx['expected_tags']}{hint}"
    return f"{key}={_short(error['input'])}: expected {config_check.expectation(error)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_tags(loc: Sequence[str | int], data: Any) -> list[str | int]:
    """Pydantic's location without the names of union members it passes through."""
    path: list[str | int] = []
    node = data
    for i, step in enumerate(loc):
        if i == 1 and loc[0] in TAGS and isinstance(node, Mapping) and step == node.get(TAGS[str(loc[0])]):
            continue
        path.append(step)
        node = _child(node, step)
    return path


def _child(node: Any, step: str | int) -> Any:
    if isinstance(node, Mapping):
        return node.get(step)
    return node[step] if isinstance(node, list) and isinstance(step, int) else None


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The config sections a field's annotation can hold (inside Optional, Annotated, list and unions)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for arg in typing.get_args(annotation) for s in sections(arg)]


def _models_at(loc: Sequence[str | int], data: Any) -> list[type[BaseModel]]:
    """The sections whose fields are valid at a location, by the union member the data chose."""
    models: list[type[BaseModel]] = [Config]
    node = data
    for step in loc:
        node = _child(node, step)
        if isinstance(step, int):
            continue
        models = [s for m in models if step in m.model_fields for s in sections(m.model_fields[step].annotation)]
        tag = TAGS.get(step)
        if tag and isinstance(node, Mapping):
            models = [m for m in models if tag not in m.model_fields or m.model_fields[tag].default == node.get(tag)]
    return models


def _field_at(loc: Sequence[str | int], data: Any) -> FieldInfo | None:
    fields = [m.model_fields[str(loc[-1])] for m in _models_at(loc[:-1], data) if str(loc[-1]) in m.model_fields]
    return fields[0] if fields else None


def _nearest(loc: Sequence[str | int], data: Any) -> str:
    """`; did you mean ...?`, or the keys of the section when nothing is close."""
    section, wrong = ".".join(map(str, loc[:-1])), str(loc[-1])
    here = [name for m in _models_at(loc[:-1], data) for name in m.model_fields]
    elsewhere = [key for key, _ in fields() if key.split(".")[-1] == wrong]
    near = difflib.get_close_matches(wrong, here, 1)
    if near:
        return f"; did you mean {section + '.' if section else ''}{near[0]}?"
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f", expected one of {', '.join(here)}"


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf field of the tree with its dotted key; items of lists under `.0`, shared keys of a union once."""
    for name, field in model.model_fields.items():
        key = prefix + name
        inner = sections(field.annotation)
        is_list = typing.get_origin(field.annotation) is list
        if not inner or is_list or type(None) in typing.get_args(field.annotation):
            yield key, field
        for section in inner:
            yield from fields(section, f"{key}.0." if is_list else f"{key}.")


def describe_fields() -> str:
    """Every field with its type, default and meaning, for `train --help-config`."""
    lines, seen, top = [], set(), ""
    for key, field in fields():
        text = f"{key}: {type_name(field.annotation)}{_default(field)}"
        if (text, field.description) in seen:
            continue
        seen.add((text, field.description))
        if key.split(".")[0] != top:
            top = key.split(".")[0]
            lines.append("")
        lines.append(f"  {text}\n      {field.description or 'chooses the kind of this section'}")
    return "\n".join(lines[1:])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    return f" = {json.dumps(value, ensure_ascii=False)}"


def type_name(annotation: Any) -> str:
    """A type as users write it: `float`, `float or null`, `adamw | sgd`, `list of text`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        names = [type_name(a) for a in args if a is not type(None)]
        return " | ".join(names) + (" or null" if type(None) in args else "")
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin is typing.Annotated:
        return type_name(args[0])
    if origin in (list, tuple):
        inner = [a for a in args if a is not Ellipsis]
        return f"list of {type_name(inner[0])}" if inner else "list"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", bool: "true | false"}.get(annotation, getattr(annotation, "__name__", str(annotation)))
