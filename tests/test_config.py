"""Configs: what is read, what is refused, and that refusals are one line that helps."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxrl_llm import algorithms, config_load

CONFIGS = Path(__file__).parent.parent / "configs"

BASE = """
model: {spec: {model_type: qwen3, hidden_size: 64, max_position_embeddings: 64}}
tokenizer: {chars: "0123456789+= "}
task: {kind: reasoning_gym, datasets: [{name: chain_sum}], eval_size: 64}
rollout: {prompts: 8, group_size: 4, max_prompt: 16, max_new: 8}
eval: {size: 64}
"""
FILE_TASK = "task: {kind: file, train: '%s', answer_field: null, reward: 'letter:e'}\n"


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def refusal(path, *overrides):
    with pytest.raises(ValueError) as error:
        config_load.load(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_fill_what_a_file_leaves_out(base):
    config = config_load.load(base)
    assert (config.rollout.prompts, config.rollout.temperature, config.optimizer.b2) == (8, 1.0, 0.999)
    assert config.algorithm["name"] == "grpo"


def test_overrides_are_yaml_values_at_dotted_keys(base):
    config = config_load.load(
        base,
        [
            "model.spec.hidden_size=128",
            "task.datasets.0.config={min_terms: 2}",
            "rollout.stop=[a, b]",
            "optimizer.total=null",
            "checkpoint.keep_best=true",
            "algorithm.clip_high=0.28",
        ],
    )
    assert config.model.spec is not None and config.model.spec["hidden_size"] == 128
    assert config.task.datasets[0].config == {"min_terms": 2}
    assert config.rollout.stop == ["a", "b"]
    assert config.checkpoint.keep_best and config.optimizer.total is None
    assert config.algorithm == {"name": "grpo", "clip_high": 0.28}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3", "+1e-4"])
def test_a_number_in_any_notation_is_a_number(base, text):
    assert config_load.load(base, [f"optimizer.lr={text}"]).optimizer.lr == 1e-4


def test_later_files_win_over_earlier_ones_and_overrides_over_files(base, tmp_path):
    above = tmp_path / "above.yaml"
    above.write_text("rollout: {group_size: 2, max_new: 4}\noptimizer: {lr: 3e-4}\n")
    config = config_load.load([base, above], ["rollout.max_new=6"])
    assert (config.rollout.prompts, config.rollout.group_size, config.rollout.max_new) == (8, 2, 6)


def test_another_method_starts_the_algorithm_section_afresh(base, tmp_path):
    above = tmp_path / "above.yaml"
    above.write_text("algorithm: {name: grpo, clip_high: 0.3}\n")
    data = config_load.load_unchecked([base, above], ["algorithm.alpha=2", "algorithm.name=other"])
    assert data.algorithm == {"name": "other", "alpha": 2}


def test_another_task_kind_starts_the_task_section_afresh(base):
    config = config_load.load_unchecked(base, ["task.kind=custom", "task.function=a:b"])
    assert config.task.model_dump() == {"kind": "custom", "function": "a:b", "options": {}}


def test_fields_without_a_name_are_those_of_the_default_method(base):
    assert config_load.load(base, ["algorithm.beta=0.1", "reference.mode=resident"]).algorithm["name"] == "grpo"


def test_a_config_written_out_reads_back_equal(base, tmp_path):
    config = config_load.load(base, ["optimizer.lr=1e-7", "algorithm.clip_high=0.28"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert config_load.load(again) == config


def test_a_run_directory_is_a_config_and_knows_where_it_is(base, tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "config.yaml").write_text(BASE)
    config = config_load.load(run)
    assert config.run.dir == str(run) and config.rollout.prompts == 8


@pytest.mark.parametrize(
    "override, line",
    [
        ("rollout.groupsize=3", "rollout.groupsize=3: no such key; did you mean rollout.group_size?"),
        ("temperature=1", "temperature=1: no such key; did you mean rollout.temperature?"),
        ("task.datasets.0.nam=x", "task.datasets.0.nam='x': no such key; did you mean task.datasets.0.name?"),
        ("task.datasets.3.name=x", "task.datasets.3.name='x': '3' is no item of task.datasets, expected 0 to 0"),
        ("rollout.prompts=true", "rollout.prompts=true: expected an integer"),
        ("rollout.prompts=2.5", "rollout.prompts=2.5: expected an integer"),
        ("optimizer.lr=abc", "optimizer.lr='abc': expected a number"),
        ("optimizer.lr='1e-4'", "optimizer.lr='1e-4': expected a number"),
        ("optimizer.lr=.nan", "optimizer.lr=NaN: expected a finite number"),
        ("rollout.top_p=2", "rollout.top_p=2: expected less than or equal to 1"),
        ("model.dtype=int8", "model.dtype='int8': expected 'float32', 'bfloat16' or 'float64'"),
        ("rollout=3", "rollout=3: expected a section with fields"),
        ("rollout.prompts.x=3", "rollout.prompts.x=3: rollout.prompts is 8 and has no fields"),
        ("rollout.prompts", "rollout.prompts: expected an override key=value, such as rollout.group_size=8"),
        ("task.kind=fil", "'fil': expected one of 'reasoning_gym', 'file', 'custom'; did you mean 'file'?"),
        ("task.kind=custom", "task.function: missing (module:function called with `options`, returning a Task)"),
        ("algorithm.name=grop", "did you mean 'grpo'?"),
        ("algorithm.clip_hi=1", "algorithm.clip_hi=1: grpo has no such field"),
        ("algorithm.clip_hi=1", "did you mean algorithm.clip_high?"),
        ("algorithm.clip_high=much", "algorithm.clip_high='much': expected a number"),
        ("algorithm.clip_high=-1", "algorithm.clip_high=-1.0: expected at least 0"),
        ("algorithm.name=3", "algorithm.name=3: expected the name of a method"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(base, override, line):
    assert line in refusal(base, override)


@pytest.mark.parametrize(
    "overrides, start",
    [
        (["model.path=somewhere"], "model.path='somewhere': model.spec is set too"),
        (["model.path=somewhere", "model.spec=null"], "model.path='somewhere': no readable config.json there"),
        (["model.spec=null"], "model.path: missing"),
        (["tokenizer.chars=null"], "tokenizer.path: missing"),
        (["tokenizer.path=x"], "tokenizer.path='x': tokenizer.chars is set too"),
        (["tokenizer.chat=true"], "tokenizer.chat=true: a character tokenizer has no chat template"),
        (["tokenizer.system=x"], "tokenizer.system='x'"),
        (["rollout.temperature=0"], "rollout.temperature=0: greedy completions"),
        (
            ["rollout.group_size=1", "algorithm.name=dpo", "reference.mode=resident"],
            "rollout.group_size=1: dpo compares the completions of a prompt, expected at least 2",
        ),
        (["rollout.max_new=60"], "rollout.max_new=60: with rollout.max_prompt=16 a row is 76 tokens, expected at most"),
        (["eval.k=[1, 4]"], "eval.samples=1: pass@4 needs that many"),
        (["eval.samples=4"], "eval.samples=4: greedy samples are all equal"),
        (["eval.size=100"], "eval.size=100: more than the task keeps apart, expected at most task.eval_size=64"),
        (["mesh.dp=-1"], "mesh.fsdp=-1: mesh.dp is -1 too"),
        (["mesh.tp=0"], "mesh.tp=0: expected a positive size"),
        (["mesh.fsdp=64"], "mesh.fsdp=64: dp × fsdp = 64 shards for the 32 rows of a minibatch"),
        (["algorithm.beta=0.1"], "reference.mode=none: grpo needs a reference policy, expected resident or host"),
        (["reference.mode=host"], "reference.mode=host: grpo with these settings uses none, expected none"),
        (["reference.sync_every=5"], "reference.sync_every=5: there is no reference"),
        (["critic={lr: 1e-3}"], "critic: grpo trains no critic, expected null"),
        (["algorithm.name=aepo_entropy", "learner.importance.mode=mask"], "learner.importance.mode=mask: aepo_entropy"),
        (
            ["algorithm.name=r2vpo", "algorithm.center=true", "learner.route=fused"],
            "learner.route=fused: the loss of r2vpo",
        ),
        (["algorithm.name=gigpo"], "algorithm.name='gigpo': needs traj, step_index"),
        (["algorithm.name=gdpo"], "algorithm.name='gdpo': its views come from the scorer 'elbo'"),
        (["learner.minibatches=5"], "learner.minibatches=5: does not divide the 32 rows of a step"),
        (["learner.microbatch_rows=5"], "learner.microbatch_rows=5: does not divide the 32 rows of a minibatch"),
        (
            ["learner.routing_replay=old"],
            "learner.routing_replay=old: model_type 'qwen3' has no experts, expected none",
        ),
        (
            ["learner.routing_replay=old", "model.spec.num_experts=4", "learner.old_logp=sampler"],
            "learner.old_logp=sampler: learner.routing_replay=old needs old log-probs of the learner's own forward",
        ),
        (
            [
                *["learner.routing_replay=rollout", "model.spec.num_experts=4"],
                *["algorithm.name=dpo", "algorithm.pairs=given", "reference.mode=resident"],
            ],
            "learner.routing_replay=rollout: dpo trains on given completions, of which no engine records experts",
        ),
        (["rewards.parts=[{reward: judge}]"], "rewards.parts: a part is named judge, expected rewards.judge"),
        (["rewards.judge={url: x, model: y}"], "rewards.judge: no part uses it"),
        (["rewards.overlong_cache=8"], "rewards.overlong_cache=8"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(base, overrides, start):
    assert refusal(base, *overrides).startswith(start)


def test_groups_of_one_are_warned_of_once_and_allowed(base):
    with pytest.warns(UserWarning) as warned:
        config = config_load.load(base, ["rollout.group_size=1"])
    assert config.rollout.group_size == 1
    assert [str(w.message) for w in warned] == [
        "rollout.group_size=1: grpo compares the completions of a prompt, expected at least 2; one alone is "
        "compared with nothing"
    ]


def test_the_context_of_a_model_directory_is_known(base, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 20}')
    line = refusal(base, "model.spec=null", f"model.path={model}")
    assert line.startswith("rollout.max_new=8") and line.endswith("the model's context of 20")


def test_a_task_file_must_exist_and_have_answers_for_a_warm_start(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    above = tmp_path / "above.yaml"
    above.write_text(FILE_TASK % rows)
    assert "no such file" in refusal([base, above])
    rows.write_text('{"prompt": "a"}\n')
    assert config_load.load([base, above]).task.train == str(rows)
    assert refusal([base, above], "warmstart.steps=3").startswith("warmstart.steps=3: needs answers")
    few = refusal([base, above], "task.eval_size=10")
    assert few == "eval.size=64: more than the task keeps apart, expected at most task.eval_size=10"


@pytest.mark.parametrize(
    "text, part",
    [
        ("a: [", "not valid YAML"),
        ("- 1", "holds a list, expected sections"),
        ("rollout: {prompts: 2}\nrollout: {prompts: 3}", "key 'rollout' occurs twice"),
        ("run: {dir: !!python/object:os.system x}", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, part):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = refusal(path)
    assert line.startswith(str(path)) and part in line


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "none.yaml")


def test_refusing_needs_no_jax(base):
    code = (
        "import sys\nfrom jaxrl_llm import config_load\n"
        f"try: config_load.load({str(base)!r}, ['rollout.temperature=0', 'algorithm.nonsense=1'])\n"
        "except ValueError as error: print(error)\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rollout.temperature=0")


def test_every_field_has_a_meaning():
    missing = [key for key, field in config_load.fields() if not field.description and not key.endswith(".kind")]
    assert missing == []


def test_help_shows_every_field_with_its_default():
    text = config_load.describe_fields()
    assert 'optimizer.name: adamw | sgd = "adamw"\n      optimizer' in text
    assert "warmstart.optimizer.lr: float = 0.001" in text
    for key, _ in config_load.fields():
        assert f"  {key}: " in text, key


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    overrides = []
    config = config_load.load_unchecked(path)
    if config.model.spec is None:  # its directory is the user's: stand in for it
        (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
        overrides.append(f"model.path={tmp_path}")
    for key in ("train", "eval"):
        name = getattr(config.task, key, None)
        if name and not Path(name).exists():
            rows = tmp_path / f"{key}.jsonl"
            rows.write_text("{}\n")
            overrides.append(f"task.{key}={rows}")
    config_load.load(path, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("algorithms/*.yaml")), ids=lambda p: p.stem)
def test_shipped_methods_are_valid_over_the_quickstart(path, tmp_path):
    layers, overrides = [CONFIGS / "quickstart.yaml", path], []
    name = config_load.load_unchecked(layers, overrides).algorithm["name"]
    if name in ("gdpo", "gigpo", "seeupo"):  # a masked-diffusion model, agents' turns: not what the quickstart has
        assert refusal(layers).startswith(f"algorithm.name='{name}'")
        return
    if name == "tgdpo":  # its guide is the export of another run, named on the command line
        (tmp_path / "config.json").write_text("{}")
        overrides = [f"guide.path={tmp_path}"]
    config = config_load.load(layers, overrides)
    alg = algorithms.make(**config.algorithm)
    assert alg.name == name
    if alg.needs.pool:  # or `train` refuses the quickstart's problems once it has made them
        assert getattr(alg.config, alg.needs.pool) >= config.task.size
    if getattr(alg.config, "pairs", "sampled") == "sampled" and hasattr(alg.config, "drop_ties"):
        assert alg.config.drop_ties  # sums are right or wrong: most pairs tie, and a tie has no better completion
