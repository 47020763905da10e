"""AEPO, arXiv 2510.08141: known answers, the extra rollouts and the rows that `select` substitutes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import aepo_entropy
from jaxrl_llm.algorithms.base import Report
from jaxrl_llm.rollout.rows import pack
from jaxrl_llm.types import Mean, Views

KEY = jax.random.key(0)
LOGP = [[-1.0, -0.5], [-0.8, -0.3], [-1.2, -0.4], [-0.6, -0.9], [-2.0, -1.5], [-0.9, -1.4]]
OLD = [[-1.0, -0.5], [-0.8, -0.3], [-1.1, -0.4], [-0.7, -0.9], [-2.0, -1.5], [-1.0, -1.4]]
MASK = [[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1]]
EXTRA = np.array([0, 0, 0, 0, 1, 1])
A = 0.7071057811879616


def example(reward=(1.0, 0, 1, 0, 0, 1)):
    """Four rows of the normal batch and the extra pool of one group of two."""
    rows = rollouts(MASK, reward, [0, 0, 1, 1, 2, 2], OLD, {"extra": EXTRA})
    return rows.with_(stat=jnp.asarray(EXTRA == 0))


def make(**fields):
    return algorithms.make("aepo_entropy", **fields)


def state(entropy):
    return {"entropy": jnp.asarray(entropy, jnp.float32)}


def select(rows, entropy=0.3, **fields):
    alg = make(**fields)
    return alg.select(state(entropy), {}, rows, alg.credit(state(entropy), rows, KEY), KEY)


def collector_temperature(entropy):
    alg = make()
    plan = alg.plan(state(entropy))
    _, requests = scripted.collect(
        plan._replace(group_size=2), PROMPTS, lambda *_: scripted.completion([1]), lambda _: 0.0
    )
    return requests[1].temperature


PROMPTS = [scripted.prompt(i, [i]) for i in range(5)]


def test_temperature_follows_the_last_entropy():
    assert collector_temperature(0.0) == 1.2
    assert collector_temperature(0.5) == 1.2
    assert collector_temperature(0.51) == 0.8


def test_rows_with_a_good_extra_advantage_replace_the_first_rows(x64):
    chosen = select(example())
    assert chosen.rows.row_id.tolist() == [5, 1, 2, 3]
    np.testing.assert_allclose(chosen.credit.advantage[:, 0], [1, -A, A, -A], rtol=1e-12)


def test_loss_and_gradient(x64):
    chosen = select(example())
    value, grad = loss_and_grad(make(), chosen.rows, np.array(LOGP)[[5, 1, 2, 3]], chosen.credit)
    np.testing.assert_allclose(value, -0.17948688, atol=5e-9)
    expected = [[-0.15788156, -0.14285714], [0.10101511, 0], [-0.09140225, -0.10101511], [0.11163896, 0.10101511]]
    np.testing.assert_allclose(grad, expected, atol=5e-9)


def test_above_the_target_half_as_many_rows_are_substituted():
    config = aepo_entropy.Config(sample_num=5)
    good, yes = np.ones(9), np.ones(9, bool)
    assert len(aepo_entropy.substitutes(good, yes, 99, config, 0.3)) == 5
    assert len(aepo_entropy.substitutes(good, yes, 99, config, 0.7)) == 2


def test_at_most_a_whole_batch_is_substituted():
    good = aepo_entropy.substitutes(np.ones(9), np.ones(9, bool), 3, aepo_entropy.Config(), 0.0)
    assert good.tolist() == [0, 1, 2]


@pytest.mark.parametrize("reward", [[1.0, 0, 1, 0, 1, 1], [1.0, 0, 1, 0, 0, 0]])
def test_without_a_qualifying_row_the_batch_is_grpos(reward, x64):
    chosen = select(example(reward))
    assert chosen.rows.row_id.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(chosen.credit.advantage[:, 0], [A, -A, A, -A], rtol=1e-12)


def test_unscored_extra_rows_are_not_chosen():
    rows = example([1.0, 0, 1, 0, 0, np.nan])
    chosen = select(rows.with_(scored=jnp.arange(6) < 5))
    assert chosen.rows.row_id.tolist() == [0, 1, 2, 3]


def test_extra_rows_do_not_change_the_advantages_of_the_batch(x64):
    alg = make()
    with_pool = alg.credit(state(0.0), example(), KEY).advantage[:4]
    alone = jax.tree.map(lambda x: x[:4], example())
    np.testing.assert_allclose(alg.credit(state(0.0), alone, KEY).advantage, with_pool)


def test_a_quarter_of_the_prompts_is_rolled_out_again():
    alg = make()
    plan = alg.plan(alg.init())._replace(group_size=2)
    rows, requests = scripted.collect(plan, PROMPTS, lambda _, i: scripted.completion([i, i]), lambda t: float(t[0]))
    assert [len(r.contexts) for r in requests] == [5, 1]
    assert requests[0].temperature is None
    assert [r.group for r in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [r.extras["extra"] for r in rows] == [0] * 10 + [1, 1]
    assert [r.stat for r in rows] == [True] * 10 + [False] * 2
    contexts, size = plan.capacity(5, 2)
    batch = pack(rows, contexts=contexts, prompt_len=1, size=size, length=2, parts=1, extras=alg.needs.row_extras)
    chosen = select(jax.tree.map(jnp.asarray, batch))
    assert chosen.rows.row_id.tolist() == [11, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_few_prompts_have_no_extra_rollouts():
    plan = make().plan(make().init())._replace(group_size=2)
    rows, requests = scripted.collect(plan, PROMPTS[:3], lambda *_: scripted.completion([1]), lambda _: 0.0)
    assert len(requests) == 1 and len(rows) == 6


def test_the_entropy_is_the_mean_over_updates_of_the_sampled_estimate():
    alg, rows = make(), example()
    updates = tuple({"entropy/sampled": Mean(jnp.asarray(s), jnp.asarray(n))} for s, n in ((4.0, 8.0), (3.0, 2.0)))
    report = Report({}, updates[-1], 2, updates)
    after, _ = alg.observe(alg.init(), {}, rows, credit_of(np.zeros(6), rows), report, None)
    assert float(after["entropy"]) == 1.0 and after["entropy"].dtype == jnp.float32


def test_the_loss_reports_the_sampled_entropy(x64):
    chosen = select(example())
    alg = make()
    credit = alg.weigh((), chosen.rows, chosen.credit)
    views = Views(logp=jnp.asarray(np.array(LOGP)[[5, 1, 2, 3]]))
    _, metrics = alg.loss((), views, chosen.rows, credit)
    metric = metrics["entropy/sampled"]
    np.testing.assert_allclose(metric.sum / metric.count, (0.9 + 1.4 + 0.8 + 1.2 + 0.4 + 0.6 + 0.9) / 7)
