"""Contradictions in a config, found before any device work. Each check raises ValueError of one line:
key, value, what is expected. What runs but teaches nothing is a warning."""

import dataclasses
import difflib
import importlib.util
import json
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from jaxrl_llm import redaction
from jaxrl_llm.config import Config, FileTask, GymTask

FLAT_EXTRAS = ("prompt_id",)  # row data that `rollout.collectors.flat` gives every method


def check(config: Config) -> None:
    """Everything that can be said without importing jax; the method's section is `check_method`."""
    redaction.check(config.model_dump(mode="json"))
    _model(config)
    _tokenizer(config)
    _task(config)
    _rewards(config)
    _batch(config)
    _routing(config)
    _lengths(config)
    _evaluation(config)
    _checkpoint(config)
    _mesh(config)
    _distributed(config)


def model_json(config: Config) -> dict[str, Any]:
    """The model's config.json: that of `model.path`, or `model.spec`."""
    if config.model.path is None:
        return dict(config.model.spec or {})
    return _config_json("model.path", config.model.path)


def _config_json(key: str, path: str) -> dict[str, Any]:
    try:
        return json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{key}={path!r}: no readable config.json there, expected a Hugging Face directory") from None


def _model(config: Config) -> None:
    path, spec = config.model.path, config.model.spec
    if path is not None and spec is not None:
        raise ValueError(f"model.path={path!r}: model.spec is set too, expected one of them (drop one with =null)")
    if path is None and not spec:
        raise ValueError("model.path: missing, expected a Hugging Face directory, or model.spec to build a model")
    model_json(config)
    if config.guide is not None:
        _config_json("guide.path", config.guide.path)


def _tokenizer(config: Config) -> None:
    t = config.tokenizer
    if t.path is not None and t.chars is not None:
        raise ValueError(f"tokenizer.path={t.path!r}: tokenizer.chars is set too, expected one of them")
    if t.path is None and t.chars is None and config.model.path is None:
        raise ValueError("tokenizer.path: missing, expected a directory, or tokenizer.chars, as model.path is not set")
    if t.chars is not None and t.chat:
        raise ValueError("tokenizer.chat=true: a character tokenizer has no chat template, expected false")
    if t.system is not None and not t.chat:
        raise ValueError(f"tokenizer.system={t.system!r}: only the chat template uses it, expected tokenizer.chat=true")


def _task(config: Config) -> None:
    task = config.task
    if isinstance(task, FileTask):
        for key, name in (("train", task.train), ("eval", task.eval)):
            if name is None or name.startswith("hub:"):
                continue
            if not Path(name).is_file():
                raise ValueError(f"task.{key}={name!r}: no such file, expected a .jsonl or .parquet file, or hub:NAME")
            if Path(name).suffix not in (".jsonl", ".parquet"):
                raise ValueError(f"task.{key}={name!r}: expected a file that ends in .jsonl or .parquet")
        if (task.chosen_field is None) != (task.rejected_field is None):
            raise ValueError(
                f"task.chosen_field={task.chosen_field!r}: task.rejected_field is {task.rejected_field!r}, expected both or "
                "neither"
            )
        if config.warmstart.steps and task.answer_field is None:
            raise ValueError(f"warmstart.steps={config.warmstart.steps}: needs answers, expected task.answer_field")
    if isinstance(task, GymTask | FileTask) and config.eval.size > task.eval_size:
        raise ValueError(
            f"eval.size={config.eval.size}: more than the task keeps apart, expected at most "
            f"task.eval_size={task.eval_size}"
        )


def _rewards(config: Config) -> None:
    r = config.rewards
    judged = [p for p in r.parts if p.reward == "judge"]
    if judged and r.judge is None:
        raise ValueError("rewards.parts: a part is named judge, expected rewards.judge with url and model")
    if r.judge is not None and not judged:
        raise ValueError("rewards.judge: no part uses it, expected an entry of rewards.parts with reward: judge")
    if r.overlong_cache >= config.rollout.max_new and r.overlong_cache:
        raise ValueError(
            f"rewards.overlong_cache={r.overlong_cache}: the penalty would start before the first token, "
            f"expected less than rollout.max_new={config.rollout.max_new}"
        )

    task = config.task
    programs = (
        [("task.reward_options", task.reward_options)] if isinstance(task, FileTask) and task.reward == "code" else []
    )
    programs += [(f"rewards.parts.{i}.options", p.options) for i, p in enumerate(r.parts) if p.reward == "code"]
    for key, options in programs:
        from jaxrl_llm.tasks.code import limits_of

        seconds = limits_of(options).seconds
        if seconds >= r.timeout:  # a program without end is wrong; one that loses its worker would be unscored
            raise ValueError(f"{key}.seconds={seconds:g}: expected less than rewards.timeout={r.timeout:g}")


def _batch(config: Config) -> None:
    r, l = config.rollout, config.learner
    rows = r.prompts * r.group_size
    if config.run.steps and r.temperature == 0:
        raise ValueError("rollout.temperature=0: greedy completions of a prompt are all equal, expected more than 0")
    if rows % l.minibatches:
        raise ValueError(
            f"learner.minibatches={l.minibatches}: does not divide the {rows} rows of a step (rollout.prompts × "
            f"rollout.group_size), expected one of {_divisors(rows)}"
        )
    per_update = rows // l.minibatches
    if l.microbatch_rows and per_update % l.microbatch_rows:
        raise ValueError(
            f"learner.microbatch_rows={l.microbatch_rows}: does not divide the {per_update} rows of a minibatch "
            f"(rollout.prompts × rollout.group_size / learner.minibatches), expected one of {_divisors(per_update)}"
        )
    if config.reference.mode == "none" and config.reference.sync_every:
        raise ValueError(
            f"reference.sync_every={config.reference.sync_every}: there is no reference with reference.mode=none"
        )


def _routing(config: Config) -> None:
    mode, model = config.learner.routing_replay, model_json(config)
    if mode == "none":
        return
    if not (model.get("num_experts") or model.get("num_local_experts")):
        raise ValueError(
            f"learner.routing_replay={mode}: model_type {model.get('model_type')!r} has no experts, expected none"
        )
    if config.learner.old_logp != "rescore":
        raise ValueError(
            f"learner.old_logp={config.learner.old_logp}: learner.routing_replay={mode} needs old log-probs of the learner's "
            "own forward, expected rescore"
        )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _lengths(config: Config) -> None:
    limit = model_json(config).get("max_position_embeddings")
    total = config.rollout.max_prompt + config.rollout.max_new
    if isinstance(limit, int) and total > limit:
        raise ValueError(
            f"rollout.max_new={config.rollout.max_new}: with rollout.max_prompt={config.rollout.max_prompt} a row is "
            f"{total} tokens, expected at most the model's context of {limit}"
        )


def _evaluation(config: Config) -> None:
    e = config.eval
    if min(e.k) < 1:
        raise ValueError(f"eval.k={e.k}: expected numbers of at least 1")
    if e.samples < max(e.k):
        raise ValueError(f"eval.samples={e.samples}: pass@{max(e.k)} needs that many, expected at least {max(e.k)}")
    if e.samples > 1 and e.temperature == 0:
        raise ValueError(f"eval.samples={e.samples}: greedy samples are all equal, expected eval.temperature above 0")


def _checkpoint(config: Config) -> None:
    where = config.checkpoint.dir
    key, path = ("run.dir", config.run.dir) if where is None else ("checkpoint.dir", where)
    if marks := sorted(set("*?[") & set(path if "://" in path else str(Path(path).absolute()))):
        # Orbax would take no part of an array into a step, and call it whole.
        raise ValueError(f"{key}={path!r}: has {' and '.join(marks)} in its path, expected one without * ? [")
    if where is None:
        return
    scheme, found, rest = where.partition("://")
    if not where or (found and (scheme != "gs" or not rest.partition("/")[0])):
        raise ValueError(f"checkpoint.dir={where!r}: expected a directory, or gs://BUCKET/PATH")
    for package in ("gcsfs", "google.cloud.storage") if found else ():
        if not _installed(package):
            raise ValueError(
                f"checkpoint.dir={where!r}: the package {package} is missing, expected the extra gcs "
                "(pip install 'jaxrl_llm[gcs]')"
            )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a package around it
        return False


def _mesh(config: Config) -> None:
    sizes = config.mesh.model_dump()
    for axis, size in sizes.items():
        if size == 0:
            raise ValueError(f"mesh.{axis}=0: expected a positive size, or -1 for the devices the others leave")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh.{free[1]}=-1: mesh.{free[0]} is -1 too, expected at most one")
    rows = config.rollout.prompts * config.rollout.group_size // config.learner.minibatches
    shards = max(sizes["dp"], 1) * max(sizes["fsdp"], 1)
    if shards > rows:
        axis = max(("dp", "fsdp"), key=lambda a: sizes[a])
        raise ValueError(
            f"mesh.{axis}={sizes[axis]}: dp × fsdp = {shards} shards for the {rows} rows of a minibatch, expected at "
            f"most {rows}"
        )


def _distributed(config: Config) -> None:
    d = config.distributed
    given = [name for name in ("processes", "process") if getattr(d, name) is not None]
    if d.coordinator is None or d.coordinator == "auto":
        if given:
            where = "is not set" if d.coordinator is None else "finds them itself"
            raise ValueError(
                f"distributed.{given[0]}={getattr(d, given[0])}: distributed.coordinator {where}, expected HOST:PORT there"
            )
        return
    host, _, port = d.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"distributed.coordinator={d.coordinator!r}: expected HOST:PORT of process 0, or auto")
    for name in ("processes", "process"):
        if name not in given:
            raise ValueError(
                f"distributed.{name}: missing, expected a number with distributed.coordinator={d.coordinator}"
            )
    if d.process is not None and d.processes is not None and d.process >= d.processes:
        raise ValueError(
            f"distributed.process={d.process}: with distributed.processes={d.processes}, expected 0 to {d.processes - 1}"
        )


# --------------------------------------------------------------------------------------------------------- the method


def check_method(config: Config) -> Config:
    """Check `algorithm` against the method's own fields and needs (imports jax).

    Returns: the config with `algorithm` holding values of the types the method declares.
    """
    fields = dict(config.algorithm)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"algorithm.name={name!r}: expected the name of a method (jaxrl_llm list)")
    alg, fields = method(name, fields)
    _needs(config, alg.name, alg)
    return config.model_copy(update={"algorithm": {"name": name, **fields}})


def method(name: str, fields: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A method from plain values of its fields (imports jax), and the values in the types it declares."""
    from jaxrl_llm import algorithms

    cls = algorithms.config_class(name)
    hints = typing.get_type_hints(cls)
    valid = [f.name for f in dataclasses.fields(cls)]
    typed = {}
    for key, value in fields.items():
        if key not in valid:
            near = difflib.get_close_matches(key, valid, 1)
            hint = f"; did you mean algorithm.{near[0]}?" if near else ""
            raise ValueError(
                f"algorithm.{key}={value!r}: {name} has no such field, expected one of {', '.join(valid)}{hint}"
            )
        try:
            typed[key] = coerce(hints[key], value)
        except ValueError as error:
            raise ValueError(f"algorithm.{key}={value!r}: {error}") from None
    try:
        return algorithms.make(name, **typed), typed
    except ValueError as error:
        text = " ".join(str(error).split())
        raise ValueError(text if text.startswith("algorithm") else f"algorithm: {name}: {text}") from None


def coerce(hint: Any, value: Any) -> Any:
    """A plain value as the type a method's dataclass field declares; ValueError says what was expected."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(f"expected {expectation(error.errors(include_url=False)[0])}") from None


def expectation(error: ErrorDetails) -> str:
    """Pydantic's message as the end of a sentence that begins with "expected"."""
    message = error["msg"].removeprefix("Input should be ").replace("a valid integer", "an integer")
    message = message.replace("a valid ", "a ").replace("an object", "a section with fields")
    return message[0].lower() + message[1:]


def _needs(config: Config, name: str, alg: Any) -> None:
    from jaxrl_llm.algorithms.base import check_inner

    needs, reference = alg.needs, config.reference
    wants_reference = needs.reference or any(view.startswith("ref_") for view in needs.rescore)
    if needs.scorer != "causal":
        raise ValueError(
            f"algorithm.name={name!r}: its views come from the scorer {needs.scorer!r}, expected a method whose views "
            "come from a decoder; this one is called from Python (training.learner)"
        )
    if isinstance(layers := model_json(config).get("num_hidden_layers"), int):
        check_inner(needs.inner, layers)
    unknown = [extra for extra in needs.row_extras if extra not in FLAT_EXTRAS]
    if unknown and alg.plan(alg.init()).collector is None:
        raise ValueError(
            f"algorithm.name={name!r}: needs {', '.join(unknown)} of every row, which single-turn sampling does not give, "
            "expected another method, or a collector from Python"
        )
    if wants_reference and reference.mode == "none":
        raise ValueError(f"reference.mode=none: {name} needs a reference policy, expected resident or host")
    if not wants_reference and reference.mode != "none":
        raise ValueError(f"reference.mode={reference.mode}: {name} with these settings uses none, expected none")
    if needs.given == "none" and isinstance(config.task, FileTask) and config.task.chosen_field is not None:
        raise ValueError(
            f"task.chosen_field={config.task.chosen_field!r}: {name} with these settings samples its completions, expected null"
        )
    guided = any(view.startswith("guide_") for view in needs.rescore)
    if guided and config.guide is None:
        raise ValueError(f"guide.path: missing; {name} needs a frozen guide, expected a Hugging Face directory")
    if config.guide is not None and not guided:
        raise ValueError(f"guide.path={config.guide.path!r}: {name} uses none, expected guide=null")
    if config.critic is not None and not needs.critic:
        raise ValueError(f"critic: {name} trains no critic, expected null")
    if config.learner.importance.mode != "none" and not needs.importance:
        raise ValueError(
            f"learner.importance.mode={config.learner.importance.mode}: {name} corrects for the sampler itself, "
            "expected none"
        )
    if config.learner.routing_replay == "rollout" and needs.given == "all":
        raise ValueError(
            f"learner.routing_replay=rollout: {name} trains on given completions, of which no engine records experts, "
            "expected none or old"
        )
    if config.learner.route == "fused" and alg.couples == "minibatch":
        raise ValueError(
            f"learner.route=fused: the loss of {name} couples the rows of a minibatch, expected auto or joint"
        )
    groups = config.rollout.prompts // config.learner.minibatches
    if needs.noise and groups < 2:
        raise ValueError(
            f"learner.minibatches={config.learner.minibatches}: {name} compares the gradients of a minibatch's prompts, "
            f"expected at least 2 of the {config.rollout.prompts} prompts in each"
        )
    if config.rollout.group_size < needs.min_group:
        message = (
            f"rollout.group_size={config.rollout.group_size}: {name} compares the completions of a prompt, expected "
            f"at least {needs.min_group}"
        )
        if alg.couples == "block":  # no loss without several rows; others give a row without company advantage 0
            raise ValueError(message)
        warnings.warn(f"{message}; one alone is compared with nothing", stacklevel=2)
