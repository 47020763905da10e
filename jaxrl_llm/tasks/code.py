"""Programs as answers: a function the completion defines is called in the sandbox, and its results are compared here.

A problem is a row {"prompt", "function": its name, "tests": [{"args": [...], "expected": value}, ...]} of JSON values, with
`prefix` if the completion continues a program that has begun. The sandbox is told the arguments, never what is expected.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.tasks import sandbox
from jaxrl_llm.tasks.base import Record, RewardFn

FENCE = r"```(?:python|py)?[ \t]*\n(.*?)```"


def code(pattern: str = FENCE, partial: bool = False, **limits: Any) -> RewardFn:
    """1 when the function passes every test of its problem, else 0; with `partial` the share of tests passed.

    Args:
      pattern: regular expression; the program is the first group of its last match, or the whole completion without one.
      limits: fields of `sandbox.Limits`.
    Raises ValueError (when called, and for bad options) if this machine has no sandbox; then nothing is run.
    """
    allowed, compiled = limits_of(limits), _compiled(pattern)
    if (found := sandbox.run("def f(x):\n    return x", "f", [[1]], allowed)) != [{"value": 1}]:
        raise ValueError(
            f"reward 'code': a program that returns 1 gave {found} within {allowed}, expected larger limits"
        )

    def reward(completion: str, record: Record) -> float:
        tests = record["tests"]
        source = record.get("prefix", "") + _program(completion, compiled)
        replies = sandbox.run(source, record["function"], [test["args"] for test in tests], allowed)
        passed = sum("value" in r and same(r["value"], t["expected"]) for r, t in zip(replies, tests))
        return passed / len(tests) if partial else float(passed == len(tests))

    return reward


def limits_of(options: Mapping[str, Any]) -> sandbox.Limits:
    """Limits from the options of a reward; those of `code` itself are ignored. Raises ValueError of one line."""
    given = {k: v for k, v in options.items() if k not in ("pattern", "partial")}
    default = sandbox.Limits()
    for name, value in given.items():
        if name not in default._fields:
            raise ValueError(
                f"reward 'code': no option {name!r}, expected pattern, partial, {', '.join(default._fields)}"
            )
        kind = type(getattr(default, name))
        fits = isinstance(value, kind) or (kind is float and type(value) is int)
        if not fits or isinstance(value, bool) != (kind is bool) or (kind is not bool and not 0 < value < math.inf):
            expected = "true or false" if kind is bool else f"a positive {'number' if kind is float else 'integer'}"
            raise ValueError(f"reward 'code': {name}={value!r}, expected {expected}")
    return default._replace(**given)


def same(found: Any, expected: Any) -> bool:
    """Whether two JSON values are one: numbers to 1e-9 when one is a float, true and 1 differ."""
    if isinstance(expected, bool) or isinstance(found, bool):
        return found is expected
    if isinstance(expected, int | float) and isinstance(found, int | float):
        if isinstance(expected, int) and isinstance(found, int):
            return found == expected
        try:
            return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)
        except OverflowError:  # an integer beyond every float
            return False
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict) and isinstance(found, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in expected)
    return type(found) is type(expected) and found == expected


def check_problem(record: Record, where: str) -> None:
    """Raises ValueError of one line, beginning with `where`, for a record that this reward cannot score."""
    name, tests = record.get("function"), record.get("tests")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{where}: field 'function' is {name!r}, expected the name of a Python function")
    if not isinstance(record.get("prefix", ""), str):
        raise ValueError(f"{where}: field 'prefix' is {record['prefix']!r}, expected text")
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"{where}: field 'tests' is {tests!r:.60}, expected a list of at least one test")
    for test in tests:
        if not isinstance(test, dict) or not isinstance(test.get("args"), list) or "expected" not in test:
            raise ValueError(f'{where}: test {test!r:.60}, expected {{"args": [...], "expected": value}}')


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward 'code': pattern={pattern!r}: {error}") from None
    if not compiled.groups:
        raise ValueError(f"reward 'code': pattern={pattern!r} has no group, expected one around the program")
    return compiled


def _program(text: str, pattern: re.Pattern[str]) -> str:
    found = [match.group(1) or "" for match in pattern.finditer(text)]
    return found[-1] if found else text
