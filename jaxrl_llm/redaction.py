"""Secrets stay out of logs and run directories: they belong in the environment, and a config names variables, not values."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_OPTION = re.compile(
    r"((api|access|secret|private)_?key|(api|access|auth|hf)_token|secret|password|passwd)$", re.IGNORECASE
)
_WITH_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE)
_SHORTEST = 8  # characters; shorter values occur by chance


def secrets() -> dict[str, str]:
    """The variables of this environment whose names say that they hold a secret, longest value first."""
    found = {k: v for k, v in os.environ.items() if _VARIABLE.search(k) and len(v) >= _SHORTEST}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def redact(text: str) -> str:
    """The text with the values of `secrets`, and the user part of URLs, taken out."""
    for name, value in secrets().items():
        text = text.replace(value, f"[{name}]")
    return _WITH_PASSWORD.sub(r"\1[...]@", text)


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError of one line for a config (plain data) that holds a secret, naming its key and not its value."""
    held = secrets()
    for key, value in _texts(config, ""):
        for name, secret in held.items():
            if secret in value:
                raise ValueError(f"{key}: holds the value of {name}, expected no secret in a config; name the variable")
        if _WITH_PASSWORD.search(value):
            raise ValueError(f"{key}: a URL with a user or password, expected no secret in a config")
        if value and _OPTION.search(key):
            raise ValueError(f"{key}: is named like a secret, expected none in a config; rewards.env names variables")


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text in plain data with its dotted key."""
    if isinstance(node, str):
        yield path, node
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in items:
        yield from _texts(value, f"{path}.{key}" if path else str(key))
