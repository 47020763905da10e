"""Procedural problems of reasoning-gym: any generator, mixtures of them, held-out problems, the generators' own scorers.

A problem is stored as (generator, its settings, index) and generated again where it is scored, so that a scorer sees exactly
the entry its generator made, whatever it holds.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from jaxrl_llm.config import DataSet, GymTask
from jaxrl_llm.tasks.base import Record, RewardSpec, Task, fill

_CHUNK = 1000  # problems per generator instance; some generators prepare all of them when made
_PATIENCE = 2000  # repeated problems in a row after which a generator is taken to be exhausted


def load(config: GymTask, seed: int) -> Task:
    """Generate `eval_size` held-out and `size` training problems, all with different prompts.

    The held-out ones come first, so they depend on the seed and the generators, not on `size`. Raises ValueError for an
    unknown generator, bad settings of one, or one that cannot make enough different problems.
    """
    held_out, train = _with_fixed_hashes(config, seed)
    options = {"answer_pattern": config.answer_pattern} if config.answer_pattern else {}
    name = "+".join(d.name for d in config.datasets)
    return Task(name, train, held_out, (RewardSpec(name, "gym", 1.0, options),))


def generate(config: GymTask, seed: int) -> tuple[list[Record], list[Record]]:
    """(held-out, training) records; some generators follow the order of a set, so strings must hash alike every time."""
    rng = random.Random(f"mixture {seed}")
    streams = [_entries(d, f"{seed} {k}") for k, d in enumerate(config.datasets)]
    shares = [d.weight for d in config.datasets]
    wanted = config.eval_size + config.size
    seen: set[str] = set()

    def fresh() -> Record:
        k = rng.choices(range(len(streams)), shares)[0]
        for _ in range(_PATIENCE):
            record = _record(config, *next(streams[k]))
            if record["prompt"] not in seen:
                seen.add(record["prompt"])
                return record
        raise ValueError(
            f"task.datasets: {config.datasets[k].name} has no more different prompts after {len(seen)} of the {wanted} "
            "wanted, expected a smaller task.size or settings that make more problems"
        )

    records = [fresh() for _ in range(wanted)]
    return records[: config.eval_size], records[config.eval_size :]


def _with_fixed_hashes(config: GymTask, seed: int) -> tuple[list[Record], list[Record]]:
    """`generate`, in a Python whose string hashes are not random (PYTHONHASHSEED=0, as in reward workers)."""
    if not sys.flags.hash_randomization:
        return generate(config, seed)
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_llm.tasks.gym"],
        input=json.dumps({"config": config.model_dump(), "seed": seed}).encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    if done.returncode:
        raise ValueError(f"task.datasets: generating problems failed with exit status {done.returncode}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["held_out"], answer["train"]


def score(answer: str, record: Record) -> float:
    """What the generator that made the problem gives for an answer, in [0, 1]."""
    made = record["gym"]
    key = json.dumps(made["config"], sort_keys=True)
    entry = _entry(made["name"], key, made["index"])
    if entry["answer"] != record["answer"]:
        raise RuntimeError(f"{made['name']} made another problem this time; score in workers, with fixed string hashes")
    return _generator(made["name"], key).score_answer(answer, entry)


def _entries(dataset: DataSet, stream: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Endless (where it came from, entry) of one generator; neighbouring seeds of a run share no stream of problems."""
    seeds = random.Random(f"{dataset.name} {stream}")
    while True:
        settings = {**dataset.config, "seed": seeds.randrange(2**31), "size": _CHUNK}
        generator = _make(dataset.name, settings)
        for i in range(_CHUNK):
            yield {"name": dataset.name, "config": settings, "index": i}, generator[i]


def _record(config: GymTask, made: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    question = entry["question"]
    if config.question_pattern:
        found = re.search(config.question_pattern, question, re.DOTALL)
        if not found:
            raise ValueError(f"task.question_pattern: {config.question_pattern!r} does not occur in {question[:80]!r}")
        question = found.group(1)
    fields = {**entry["metadata"], "question": question, "answer": entry["answer"]}
    return {
        "prompt": fill("task.prompt", config.prompt, fields),
        "target": fill("task.target", config.target, fields),
        "answer": entry["answer"],
        "gym": made,
    }


def _make(name: str, settings: Mapping[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, 1)
        raise ValueError(f"task.datasets: no generator {name!r}" + (f", perhaps {near[0]!r}" if near else ""))
    try:
        return reasoning_gym.create_dataset(name, **settings)
    except (TypeError, AssertionError, ValueError) as error:  # their way to refuse settings
        raise ValueError(f"task.datasets: {name} refuses its settings {dict(settings)}: {error}") from None


@lru_cache(maxsize=64)
def _generator(name: str, settings: str) -> Any:
    return _make(name, json.loads(settings))


@lru_cache(maxsize=1024)
def _entry(name: str, settings: str, index: int) -> Mapping[str, Any]:
    return _generator(name, settings)[index]


def _main() -> None:
    asked = json.load(sys.stdin)
    try:
        held_out, train = generate(GymTask(**asked["config"]), asked["seed"])
        answer = {"held_out": held_out, "train": train}
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
