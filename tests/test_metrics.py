"""The numbers of a step: known values from rows and arrays, clocks, FLOPs, compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm.rollout.rows import Row, pack
from jaxrl_llm.tasks.base import Prompt, RewardSpec
from jaxrl_llm.training import metrics
from jaxrl_llm.types import REPLAY, Max, Mean, Min

REWARDS = (RewardSpec("exact", "exact"), RewardSpec("short", "length_penalty", weight=0.5))


def row(group, exact=None, short=0.0, length=3, **fields):
    scored = exact is not None
    return Row(
        prompt=Prompt(0, np.array([1], np.int32), {}),
        context=np.array([1], np.int32),
        tokens=np.full(length, 2, np.int32),
        mask=np.ones(length, bool),
        sampler_logp=np.zeros(length, np.float32),
        policy_logp=np.zeros(length, np.float32),
        group=group,
        reward=np.array([exact, 0.5 * short] if scored else [np.nan, np.nan], np.float32),
        parts={"exact": exact, "short": short} if scored else {},
        scored=scored,
        **fields,
    )


def test_rewards_are_reported_as_total_and_by_part():
    m = metrics.of_rows([row(0, 1.0, -1.0), row(0, 0.0, 0.0)], REWARDS, correct_at=1.0)
    assert m["reward/mean"] == pytest.approx(0.25)
    assert m["reward/std"] == pytest.approx(0.25)
    assert m["reward/exact"] == 0.5
    assert m["reward/short"] == -0.5  # unweighted
    assert m["accuracy"] == 0.5


def test_accuracy_is_of_the_tasks_own_reward_and_not_of_the_total():
    assert metrics.of_rows([row(0, 1.0, -1.0)], REWARDS, correct_at=1.0)["accuracy"] == 1.0


def test_unscored_and_replayed_rows_leave_the_statistics():
    rows = [row(0, 1.0), row(0, 1.0), row(0, None), row(0, 0.0, stat=False, source=REPLAY)]
    m = metrics.of_rows(rows, REWARDS, correct_at=1.0)
    assert m["reward/mean"] == 1.0
    assert m["reward/std"] == 0.0
    assert m["unscored/rows"] == 1


def test_groups_whose_rewards_agree_are_counted_and_groups_of_one_are_not():
    rows = [row(0, 1.0), row(0, 1.0 + 1e-7), row(1, 0.0), row(1, 1.0), row(2, 1.0)]
    assert metrics.of_rows(rows, REWARDS, correct_at=1.0)["frac_reward_zero_std"] == 0.5


def test_completion_lengths_and_truncation():
    m = metrics.of_rows([row(0, 1.0, length=2), row(0, 1.0, length=6, truncated=True)], REWARDS, correct_at=1.0)
    assert (m["completions/min_length"], m["completions/mean_length"], m["completions/max_length"]) == (2, 4, 6)
    assert m["completions/clipped_ratio"] == 0.5


@pytest.mark.parametrize("rows", [[], [row(0, None)], [row(0, 0.0, length=0)]])
def test_metrics_are_finite_without_rows_scores_or_tokens(rows):
    assert np.isfinite(list(metrics.of_rows(rows, REWARDS, correct_at=1.0).values())).all()
    packed = pack(rows, contexts=2, prompt_len=2, size=2, length=4, parts=2)
    assert np.isfinite(list(metrics.of_batch(packed, np.full((2, 4), np.nan), rescored=True).values())).all()


def test_logp_differences_are_of_trained_tokens_sampled_now():
    rows = [row(0, 1.0, length=2), row(0, 1.0, length=2, source=REPLAY), row(0, None, length=2)]
    packed = pack(rows, contexts=1, prompt_len=1, size=4, length=3, parts=2)
    old = np.full((4, 3), np.nan)
    old[0, :2], old[1], old[2] = [0.1, -0.3], 9, 9
    m = metrics.of_batch(packed.with_(old_logp=old), rescored=True)
    assert m["sampling/logp_difference_mean"] == pytest.approx(0.2)
    assert m["sampling/logp_difference_max"] == pytest.approx(0.3)
    assert "sampling/logp_difference_mean" not in metrics.of_batch(packed)


def test_advantages_are_of_trained_tokens():
    packed = pack([row(0, 1.0, length=2)], contexts=1, prompt_len=1, size=2, length=3, parts=2)
    advantage = np.array([[1.0, -3.0, np.nan], [np.nan] * 3])
    m = metrics.of_batch(packed, advantage)
    assert (m["advantages/mean"], m["advantages/min"], m["advantages/max"]) == (-1, -3, 1)
    assert m["advantages/std"] == 2


def test_device_metrics_become_numbers():
    found = metrics.values(
        {
            "kl": Mean(jnp.float32(3), jnp.float32(2)),
            "none": Mean(jnp.float32(0), jnp.float32(0)),
            "top": Max(jnp.float32(4)),
            "low": Min(jnp.float32(-1)),
        }
    )
    assert found == {"kl": 1.5, "none": 0.0, "top": 4.0, "low": -1.0}


def test_phases_nest_without_counting_time_twice():
    now = [0.0]
    timer = metrics.Timer(clock=lambda: now[0])

    def work(seconds):
        now[0] += seconds

    with timer.phase("collect"):
        work(1)
        with timer.phase("generate"):
            work(4)
        work(2)
    work(8)
    t = timer.take()
    assert (t["timing/collect"], t["timing/generate"], t["timing/other"], t["timing/step"]) == (3, 4, 8, 15)
    assert t["timing/update"] == 0
    work(1)
    assert timer.take()["timing/step"] == 1


def test_a_phase_that_raises_is_closed():
    timer = metrics.Timer(clock=lambda: 0.0)
    with pytest.raises(KeyError), timer.phase("collect"):
        raise KeyError
    assert timer._stack == []


def test_tokens_per_second_counts_completion_tokens_of_fresh_rows():
    rows = [row(0, 1.0, length=6), row(0, 1.0, length=4, stat=False)]
    m = metrics.throughput(rows, {"timing/step": 3.0, "timing/generate": 2.0})
    assert m == {"tokens_per_second": 2.0, "tokens_per_second/generate": 3.0}


def test_training_flops_are_six_per_parameter_and_token_plus_causal_attention():
    spec = tiny.spec("qwen3")  # 2 layers, 4 heads of width 8
    assert metrics.training_flops(spec, 1000, [10, 2]) == 6 * 1000 * 12 + 6 * 2 * 4 * 8 * (100 + 4)
    moe = tiny.spec("qwen3_moe")  # of 4 experts of width 12 in 2 of 3 layers, a token takes 2
    used = 5000 - 2 * 2 * 3 * 16 * 12
    assert metrics.training_flops(moe, 5000, [10]) == 6 * used * 10 + 6 * 3 * 4 * 8 * 100
    assert metrics.mfu(3e12, 2.0, devices=3, peak=1e12) == 0.5


def test_an_unknown_device_is_measured_and_a_known_one_is_looked_up():
    class Known:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert metrics.peak_flops(Known()) == 989e12
    assert metrics.peak_flops() > 1e8


def test_compilations_are_counted_once_per_program():
    count = metrics.Compilations()
    f = jax.jit(lambda x: x * 3 + 1)
    x, y = np.zeros(3, np.float32), np.zeros(4, np.float32)
    f(x)
    f(x)
    assert count.take() == 1
    f(x)
    assert count.take() == 0
    f(y)
    count.close()
    assert count.take() == 1


def test_memory_of_the_host_is_known():
    assert 0.01 < metrics.memory()["memory/host_peak_gib"] < 1000
