"""The bench: exact shapes, exact counts, formulas by hand. Nothing here looks at how long anything took."""

import json

import jax
import numpy as np
import pytest
import tiny

from jaxrl_llm import cli
from jaxrl_llm.benching import bench, clocks, measure, shapes, task
from jaxrl_llm.training import parts

SMALL = [
    "model.spec.hidden_size=16",
    "model.spec.num_hidden_layers=1",
    "model.spec.head_dim=8",
    "model.spec.intermediate_size=16",
    "model.spec.vocab_size=40",
    "rollout.prompts=2",
    "rollout.group_size=3",
    "rollout.max_prompt=5",
    "rollout.max_new=4",
    "rewards.workers=0",
    "mesh.fsdp=1",
]
PEAKS = {"peak_flops": 1e12, "peak_bandwidth": 1e11}


@pytest.fixture(scope="module")
def report():
    return bench.run(shapes.config_of("qwen3-4m", SMALL), repeats=2, stop_rate=0.0, **PEAKS)


def test_every_prompt_has_the_asked_length_and_ids_inside_the_vocabulary():
    made, _ = parts.make(shapes.config_of("qwen3-4m", SMALL))
    with made.scorer:
        drawn = made.prompts.draw(20)
    assert {len(p.tokens) for p in drawn} == {5}
    assert max(p.tokens.max() for p in drawn) < made.spec.vocab == 40


def test_an_override_changes_one_key_of_the_model():
    config = shapes.config_of("qwen2-5m", ["model.spec.num_hidden_layers=24"])
    assert config.model.spec is not None
    assert config.model.spec["num_hidden_layers"] == 24
    assert config.model.spec["intermediate_size"] == 1024


@pytest.mark.parametrize(("rate", "vocab", "count"), [(0.0, 100, 0), (0.02, 4096, 82), (1e-9, 100, 1), (1.0, 100, 97)])
def test_stop_ids_are_the_rate_of_the_vocabulary_without_special_tokens(rate, vocab, count):
    ids = shapes.stop_ids(rate, vocab)
    assert len(ids) == count
    assert all(shapes.SPECIALS <= i < vocab for i in ids)


def test_all_four_measurements_count_their_tokens_exactly(report):
    assert [w for w in bench.WHAT if w in report] == list(bench.WHAT)
    rows, prompt, new = 6, 5, 4
    assert report["rollout"]["tokens"] == {"min": rows * new, "median": rows * new, "max": rows * new, "n": 2}
    assert report["logprob"]["tokens"] == report["train"]["tokens"] == rows * (prompt + new)
    assert report["step"]["tokens"]["median"] == rows * new
    assert report["rollout"]["decode_steps"]["median"] == new - 1


def test_rates_are_counts_over_seconds(report):
    for name in bench.WHAT:
        r = report[name]
        tokens = r["tokens"] if isinstance(r["tokens"], int) else r["tokens"]["max"]
        assert r["tokens_per_s"]["max"] == pytest.approx(tokens / r["seconds"]["min"])
        assert r["seconds"]["n"] == 2


def test_mfu_is_the_formula_over_the_given_peak(report):
    train, rows, length = report["train"], 6, 9
    parameters, layers, width = report["shape"]["parameters"], 1, 4 * 8  # heads × head_dim
    flops = 6 * parameters * rows * length + 6 * layers * width * rows * length**2
    assert train["flops"] == flops
    assert report["logprob"]["flops"] == pytest.approx(flops / 3)
    assert report["device"]["count"] == 1  # of the mesh, not of the machine
    assert train["mfu"]["max"] == pytest.approx(flops / train["seconds"]["min"] / 1e12)


def test_bandwidth_utilisation_is_the_bytes_over_the_given_peak(report):
    r = report["rollout"]
    assert r["bandwidth_utilisation"]["max"] == pytest.approx(r["decode_bandwidth"]["max"] / 1e11)


def test_weights_are_read_whole_but_only_rows_of_an_untied_embedding():
    tied, untied = tiny.spec("qwen2"), tiny.spec("qwen3")
    assert clocks.weight_bytes(tied, 4) == 4 * sum(x.size for x in jax.tree.leaves(tiny.params(tied)))
    numbers = sum(x.size for x in jax.tree.leaves(tiny.params(untied)))
    assert clocks.weight_bytes(untied, 2) == 2 * (numbers - untied.vocab * untied.embed)


def test_keys_and_values_read_are_those_of_every_live_token():
    spec = tiny.spec("qwen3")
    token = 2 * spec.layers * spec.kv_heads * spec.head_dim * 2  # bytes of keys and values in bfloat16
    by_hand = sum(c + t for c, n in [(5, 3), (7, 1)] for t in range(n))
    assert clocks.kv_bytes(spec, 2, [5, 7], [3, 1]) == by_hand * token
    assert clocks.kv_bytes(spec, 2, [5, 7], [3, 1], skip=1) == (by_hand - 5 - 7) * token


def test_a_shared_context_is_read_once_while_its_longest_row_lives():
    spec = tiny.spec("qwen3")
    token = clocks.kv_bytes(spec, 4, [1], [1])
    lengths = np.array([[3, 2], [1, 1]])
    alone, shared = measure.decode_bytes(spec, 4, [np.zeros(5, int), np.zeros(7, int)], lengths, steps=2)
    own = (1 + 2) + 1  # own tokens read at positions 1, 2 of the first row, 1 of the second
    weights = 2 * clocks.weight_bytes(spec, 4)
    assert alone == weights + token * (5 * 3 + own)
    assert shared == weights + token * (5 * 2 + own)


def test_geometric_rows_stop_and_are_counted_as_kept():
    config = shapes.config_of("qwen3-4m", [*SMALL, "rollout.max_new=32"])
    report = bench.run(config, what=("rollout", "train"), repeats=1, stop_rate=0.5, **PEAKS)
    assert 6 <= report["rollout"]["tokens"]["max"] < 6 * 32
    assert 6 * 6 <= report["train"]["tokens"] < 6 * (5 + 32)


def test_programs_are_counted_by_name_and_forgotten_when_taken():
    programs = clocks.Programs()
    jax.jit(lambda x: x + 1)(np.ones(3))
    first, second = programs.take(), programs.take()
    programs.close()
    assert first["count"] == first["by_name"]["<lambda>"]["count"] == 1
    assert second["count"] == 0
    assert second["by_name"] == {}


def test_the_reward_varies_with_the_completion():
    assert task.variety("abc", {}) > task.variety("aaa", {}) > task.variety("", {}) == 0


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    words = ["bench", *SMALL, "--what", "train", "--repeats", "1", "--json", str(out)]
    assert cli.main([*words, "--peak-flops", "1e12", "--peak-bandwidth", "1e11"]) == 0
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert "train" in shown
    assert {"device", "machine", "versions", "date", "command", "peaks", "shape", "temporaries", "train"} <= set(report)
    assert report["peaks"] == {"flops": 1e12, "bandwidth": 1e11, "measured": False}
    assert report["train"]["programs"]["count"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--what", "speed"], "--what 'speed'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--stop-rate", "2"], "--stop-rate 2"),
        (["--model", "gpt"], "--model 'gpt'"),
        (["model.spec.vocab_size=3"], "model.spec.vocab_size=3"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(words, said, capsys):
    assert cli.main(["bench", *SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
