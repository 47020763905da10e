"""GUI grounding by a list of candidate points: parsing answers, and the Adaptive Exploration Reward of AEPO (InfiGUI-G1),
arXiv 2508.05731.

An answer is a list [{"point_2d": [x, y]}, ...] in the order of confidence; more candidates explore, and cost.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from jaxrl_llm.tasks.base import Record, RewardFn

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2; borders are inside
Measure = Literal["reward", "num_pred", "has_correct", "first_correct", "only_correct", "is_collinear"]


def points(text: str, think: bool = True) -> list[Point] | None:
    """The candidate points of a completion, None when its format is wrong.

    The first "[" with its closing bracket must be such a list, whatever is around it. With `think` the text begins with the only
    <think>...</think>, and neither that nor what follows is empty.
    """
    if think:
        if not text.startswith("<think>") or text.count("<think>") != 1 or text.count("</think>") != 1:
            return None
        thought, _, text = text.removeprefix("<think>").partition("</think>")
        if not thought.strip() or not text.strip():
            return None
    block = _first_list(text)
    try:
        entries = json.loads(block) if block else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, list):
        return None
    found = [_point(entry) for entry in entries]
    return None if None in found else found  # type: ignore[return-value]


def _first_list(text: str) -> str | None:
    start, depth = text.find("["), 0
    for end in range(max(start, 0), len(text)):
        depth += (text[end] == "[") - (text[end] == "]")
        if start >= 0 and depth == 0:
            return text[start : end + 1]
    return None


def _point(entry: Any) -> Point | None:
    pair = entry.get("point_2d") if isinstance(entry, dict) else None
    if not isinstance(pair, list) or len(pair) != 2:
        return None
    try:
        x, y = (float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan for v in pair)
    except OverflowError:
        return None
    return (x, y) if math.isfinite(x) and math.isfinite(y) else None


def inside(point: Point, box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def collinear(candidates: Sequence[Point]) -> bool:
    """Whether any three points lie on a line, to a relative 1e-9; a repeated point does with every third."""
    return any(
        math.isclose((b[1] - a[1]) * (c[0] - a[0]), (c[1] - a[1]) * (b[0] - a[0]))
        for a, b, c in itertools.combinations(candidates, 3)
    )


def exploration(candidates: Sequence[Point], box: Box) -> float:
    """AER: 1 / sqrt(N k) when the k-th of N points is the first inside the box, -1 / N when none is, -1 for no points."""
    n = len(candidates)
    for k, point in enumerate(candidates, 1):
        if inside(point, box):
            return 1 / math.sqrt(n * k)
    return -1 / n if n else -1.0


def grounding(
    measure: Measure = "reward", think: bool = True, format_weight: float = 1.0, accuracy_weight: float = 1.0
) -> RewardFn:
    """`format_weight + accuracy_weight AER` against the problem's "box" [x1, y1, x2, y2].

    -1 when the format is wrong or three points lie on a line, which outlaws scanning the screen. Other measures are for metrics,
    as parts of weight 0 ("grounding:num_pred"): how many points, whether any, the first, or the only one is right, whether
    three are on a line; 0 when the format is wrong.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"reward: 'grounding:{measure}', expected one of {', '.join(get_args(Measure))}")

    def reward(completion: str, record: Record) -> float:
        box, found = _box(record["box"]), points(completion, think)
        if measure == "reward":
            if found is None or collinear(found):
                return -1.0
            return format_weight + accuracy_weight * exploration(found, box)
        hits = [inside(point, box) for point in found or ()]
        return float(
            {
                "num_pred": len(hits),
                "has_correct": any(hits),
                "first_correct": any(hits[:1]),
                "only_correct": hits == [True],
                "is_collinear": collinear(found or ()),
            }[measure]
        )

    return reward


def _box(value: Any) -> Box:
    numbers = [float(v) for v in value] if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or not (numbers[0] <= numbers[2] and numbers[1] <= numbers[3]):
        raise ValueError(f"grounding: box={value!r}, expected [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2")
    return numbers[0], numbers[1], numbers[2], numbers[3]
