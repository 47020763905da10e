"""Problems from rows: jsonl and parquet files, hub data sets, a user's function."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.config import CustomTask, FileTask
from jaxrl_llm.tasks.base import Record, RewardSpec, Task, fill, import_function, reward_name

Row = Mapping[str, Any]


def load(config: FileTask, seed: int) -> Task:
    """Problems of the named rows; without `eval`, `eval_size` of them chosen by the seed are kept apart.

    No prompt of the held-out problems stays in training: such training rows are left out. Raises ValueError for a missing
    file, field or answer, and when no training row is left.
    """
    if config.answer_field is None and config.reward in ("math", "exact"):
        raise ValueError(f"task.answer_field: is null, but reward {config.reward!r} needs the reference answer")
    rows = [_record(config, row, f"task.train {config.train} row {i + 1}") for i, row in enumerate(read(config.train))]
    if config.eval is not None:
        where = f"task.eval {config.eval}"
        held_out = [_record(config, row, f"{where} row {i + 1}") for i, row in enumerate(read(config.eval))]
        if len(held_out) > config.eval_size:
            held_out = random.Random(seed).sample(held_out, config.eval_size)
    else:
        distinct = list({r["prompt"]: r for r in rows}.values())
        if config.eval_size >= len(distinct):
            raise ValueError(
                f"task.eval_size: {config.eval_size}, expected less than the {len(distinct)} distinct rows"
            )
        held_out = random.Random(seed).sample(distinct, config.eval_size)
    kept_apart = {r["prompt"] for r in held_out}
    train = [r for r in rows if r["prompt"] not in kept_apart]
    if not train:
        raise ValueError(f"task.train: {config.train} has no row that is not held out")
    reward = RewardSpec(reward_name(config.reward), config.reward, 1.0, config.reward_options)
    return Task(Path(config.train).stem, train, held_out, (reward,))


def custom(config: CustomTask) -> Task:
    """What the user's function returns. Raises ValueError when it is no Task."""
    task = import_function("task.function", config.function)(**config.options)
    if not isinstance(task, Task):
        raise ValueError(f"task.function: {config.function} returned {type(task).__name__}, expected tasks.base.Task")
    return task


def read(source: str) -> Sequence[Row]:
    """Rows of PATH.jsonl, PATH.parquet or hub:NAME[[:SUBSET]:SPLIT] (split train unless named)."""
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(f"task: no file {source!r}, expected a .jsonl or .parquet file, or hub:NAME[[:SUBSET]:SPLIT]")
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"task: reading {source!r} needs pyarrow: pip install pyarrow") from None
        return parquet.read_table(path).to_pylist()
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"task: {source!r} ends in {path.suffix!r}, expected .jsonl or .parquet")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"task: {source} line {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"task: {source} line {number} is {type(row).__name__}, expected an object")
            rows.append(row)
    return rows


def _hub(source: str) -> Sequence[Row]:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(f"task: {source} needs the extra `hub`: pip install 'jaxrl_llm[hub]'") from None
    _, name, *rest = source.split(":")
    *subset, split = rest or ["train"]
    try:
        return [dict(row) for row in datasets.load_dataset(name, *subset, split=split)]
    except Exception as error:  # no such name, subset, split, or no network: the library's many ways
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"task: {source} cannot be loaded, expected hub:NAME[[:SUBSET]:SPLIT]: {why}") from error


def _record(config: FileTask, row: Row, where: str) -> Record:
    question = _field(row, config.prompt_field, where)
    if not isinstance(question, str):
        raise ValueError(f"{where}: field {config.prompt_field!r} is {type(question).__name__}, expected text")
    record = {**_jsonable(row), "prompt": fill("task.prompt", config.prompt, {**row, "prompt": question})}
    if isinstance(others := row.get("phrasings"), list):
        record["phrasings"] = [fill("task.prompt", config.prompt, {**row, "prompt": other}) for other in others]
    record |= (given := _given(config, row, where))
    if config.answer_field is not None and not (given and config.answer_field not in row):
        worked = str(_field(row, config.answer_field, where))
        answer = worked
        if config.answer_pattern:
            found = re.search(config.answer_pattern, worked, re.DOTALL)
            if not found:
                raise ValueError(
                    f"{where}: task.answer_pattern {config.answer_pattern!r} not found in {worked[-60:]!r}"
                )
            answer = found.group(1)
        record |= {"answer": answer.strip(), "target": worked}
    if config.target_field is not None:
        record["target"] = str(_field(row, config.target_field, where))
    return record


def _given(config: FileTask, row: Row, where: str) -> dict[str, list[str]]:
    """The chosen and rejected completions of a row as lists of different texts; nothing for a row without either field."""
    names = {"chosen": config.chosen_field, "rejected": config.rejected_field}
    fields = {side: name for side, name in names.items() if name is not None and row.get(name) is not None}
    given: dict[str, list[str]] = {}
    for side, name in fields.items():
        said = [row[name]] if isinstance(row[name], str) else row[name]
        if not isinstance(said, list) or not said or not all(isinstance(text, str) for text in said):
            raise ValueError(f"{where}: field {name!r} is {str(row[name])[:60]!r}, expected text or a list of texts")
        given[side] = said
    if len(given) == 1:
        (there,) = fields.values()
        (missing,) = (name for side, name in names.items() if side not in given)
        raise ValueError(f"{where}: no field {missing!r}, expected it beside {there!r}")
    if both := set(given.get("chosen", ())) & set(given.get("rejected", ())):
        raise ValueError(
            f"{where}: {sorted(both)[0][:60]!r} is both chosen and rejected, expected different completions"
        )
    return given


def _field(row: Row, name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}, expected one of {sorted(row)}")
    return row[name]


def _jsonable(row: Row) -> dict[str, Any]:
    """The row as a reward worker will see it: dates, bytes and the like as text."""
    return json.loads(json.dumps(dict(row), default=str))
