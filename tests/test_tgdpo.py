"""TGDPO, arXiv 2506.14574: known answers, its limits, and a frozen guide in the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts
from test_loop import assert_same_run, configured, letters

from jaxrl_llm import algorithms, config_check
from jaxrl_llm.algorithms import tgdpo
from jaxrl_llm.training import loop

LOGP = [[-0.8, -0.7, -1.0], [-0.9, -1.0, -0.6]]
REF = [[-1.0, -0.5, -2.0], [-0.7, -1.1, -0.3]]
GUIDE = [[-0.2, -1.5, -1.2], [-1.7, -0.6, -0.5]]
MASK = [[1, 1, 1], [1, 1, 0]]
KEY = jax.random.key(0)


def run(logp=LOGP, ref=REF, guide=GUIDE, name="tgdpo", **fields):
    alg = algorithms.make(name, **fields)
    rows = rollouts(MASK, [1.0, 0.0], [0, 0], extras={"ref_logp": np.asarray(ref), "guide_logp": np.asarray(guide)})
    chosen = alg.select(alg.init(), {}, rows, alg.credit(alg.init(), rows, KEY), KEY)
    return loss_and_grad(alg, chosen.rows, logp, chosen.credit)


def test_rewards_and_weights_of_the_tokens(x64):
    r = tgdpo.token_reward(jnp.asarray(GUIDE), jnp.asarray(REF), jnp.ones((2, 3), bool), 0.1)
    np.testing.assert_allclose(r, [[0.08, -0.1, 0.08], [-0.1, 0.05, -0.02]], atol=1e-12)
    role = jnp.array([1.0, -1.0])
    np.testing.assert_allclose(tgdpo.token_weights(r, role, 2.0), [[1.16, 0.8, 1.16], [1.2, 0.9, 1.04]], atol=1e-12)
    limited = tgdpo.token_weights(r, role, 2.0, f_min=1.0)
    np.testing.assert_allclose(limited, [[1.16, 1, 1.16], [1.2, 1, 1.04]], atol=1e-12)


def test_loss_and_gradient(x64):
    value, grad = run(alpha=2.0)
    np.testing.assert_allclose(value, 0.62643269, atol=5e-9)
    expected = [[-0.05399857, -0.03724039, -0.05399857], [0.05586059, 0.04189544, 0]]
    np.testing.assert_allclose(grad, expected, atol=5e-9)
    np.testing.assert_allclose(run(alpha=2.0, beta_reward=0.01)[0], 0.63832738, atol=5e-9)


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"guide": REF, "alpha": 2.0}])
def test_without_guidance_it_is_dpo(x64, change):
    value, grad = run(**change)
    same, same_grad = run(name="dpo")
    np.testing.assert_allclose(value, 0.63965892, atol=5e-9)
    np.testing.assert_allclose(value, same, rtol=1e-12)
    np.testing.assert_allclose(grad, same_grad, rtol=1e-12)


def test_a_row_chosen_in_one_pair_and_rejected_in_another_has_other_weights_in_each(x64):
    alg = algorithms.make("tgdpo", pairing="all", alpha=2.0)
    extras = {"ref_logp": np.zeros((3, 1)), "guide_logp": np.full((3, 1), 0.5)}
    rows = rollouts(np.ones((3, 1)), [2.0, 1.0, 0.0], [0, 0, 0], extras=extras)
    chosen = alg.select((), {}, rows, alg.credit((), rows, KEY), KEY)
    _, grad = loss_and_grad(alg, chosen.rows, np.zeros((6, 1)), chosen.credit)
    middle = grad[np.asarray(chosen.rows.row_id) == 1, 0]
    np.testing.assert_allclose(sorted(middle), [-1.1 * 0.05 / 3, 0.9 * 0.05 / 3], rtol=1e-12)


def test_masked_tokens_may_be_anything_to_the_guide(x64):
    dirty = np.where(np.asarray(MASK, bool), 0, np.nan)
    value, grad = run(np.add(LOGP, dirty), np.add(REF, dirty), np.add(GUIDE, dirty), alpha=2.0)
    same, same_grad = run(alpha=2.0)
    assert value == same
    np.testing.assert_array_equal(grad, same_grad)


RUN = {
    "run": {"steps": 3},
    "learner": {"epochs": 1, "minibatches": 1},
    "reference": {"mode": "resident"},
    "eval": {"size": 0},
}


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A preference-trained model: the export of a run of dpo."""
    directory = tmp_path_factory.mktemp("guide")
    config = configured(directory, **RUN, algorithm={"name": "dpo"}, checkpoint={"export": True})
    assert loop.train(config, on_rows=letters) == 0
    return str(directory / "export")


def test_a_run_is_guided_by_the_export_of_another_and_resumes_to_the_same_numbers(guide, tmp_path):
    def crash(step, rows):
        letters(step, rows)
        if step == 2:
            raise RuntimeError("power cut")

    sections = {**RUN, "algorithm": {"name": "tgdpo"}, "guide": {"path": guide}}
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert loop.train(configured(straight, **sections), on_rows=letters) == 0
    with pytest.raises(RuntimeError, match="power cut"):
        loop.train(configured(cut, **sections), on_rows=crash)
    assert loop.train(configured(cut, **sections), on_rows=letters) == 0
    assert_same_run(straight, cut)
    metrics = (straight / "metrics.jsonl").read_text()
    assert '"guide/reward": 0.0,' not in metrics and "guide/reward" in metrics


def test_a_guide_built_otherwise_is_refused_in_one_line(guide, tmp_path):
    spec = {**configured(tmp_path).model.spec, "num_hidden_layers": 1}
    sections = {**RUN, "model": {"spec": spec}, "algorithm": {"name": "tgdpo"}, "guide": {"path": guide}}
    with pytest.raises(ValueError, match="layers, windows differ from the policy's, expected a model built like it"):
        loop.train(configured(tmp_path, **sections))


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"algorithm": {"name": "tgdpo"}}, "guide.path: missing; tgdpo needs a frozen guide, expected a Hugging Face"),
        ({"algorithm": {"name": "dpo"}, "guide": {"path": "somewhere"}}, "guide.path='somewhere': dpo uses none"),
    ],
)
def test_a_guide_is_named_where_it_is_needed_and_nowhere_else(tmp_path, sections, line):
    with pytest.raises(ValueError) as error:
        config_check.check_method(configured(tmp_path, **{**RUN, **sections}))
    assert str(error.value).startswith(line)


def test_a_guide_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"guide.path='nowhere': no readable config.json there"):
        config_check.check(configured(tmp_path, guide={"path": "nowhere"}))
