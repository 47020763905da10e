"""The known answers of GRPO and its variants, GSPO, CISPO, SAPO, RLOO, REINFORCE++, PPO, DCPO and R2VPO, in float64 to the printed digits,
and what these methods keep across steps."""

import jax
import jax.numpy as jnp
import nasty
import numpy as np
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import ppo, r2vpo, reinforce_pp, rloo, sapo
from jaxrl_llm.algorithms.base import Report
from jaxrl_llm.objectives import ratios, surrogates
from jaxrl_llm.types import REPLAY, Credit, Mean, Rollouts, Views

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
OLD = np.array([[-1.0, -0.7, -2.0], [-0.5, -1.5, 0], [-0.3, 0, 0], [-2.2, -1.1, -0.9]])
LOGP = OLD + np.array([[0.1, 0.5, -0.4], [0.3, -0.6, 0], [0.05, 0, 0], [-0.02, 0.9, -1.2]])
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5])[:, None] + np.zeros((4, 3))
REF = OLD + np.array([[0.1, -0.2, 0.3], [0, 0.2, 0], [-0.1, 0, 0], [0.05, 0.05, -0.4]])
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double(x64):
    """Known answers are in float64."""


def rollouts(score, group, mask=MASK, old_logp=OLD, **extras) -> Rollouts:
    """Rows with NaN wherever nothing is trained."""
    b, t = mask.shape
    ids = np.arange(b, dtype=np.int32)
    hidden = {k: np.where(mask, v, np.nan) if np.shape(v) == mask.shape else v for k, v in extras.items()}
    return Rollouts(
        prompt_tokens=np.zeros((b, 1), np.int32),
        prompt_length=np.ones(b, np.int32),
        prompt=ids,
        group=np.array(group, np.int32),
        row_id=ids,
        tokens=np.zeros((b, t), np.int32),
        length=mask.sum(-1),
        mask=mask,
        stat=np.ones(b, bool),
        scored=np.ones(b, bool),
        reward=np.array(score, float)[:, None],
        truncated=np.zeros(b, bool),
        version=np.zeros((b, t), np.int32),
        sampler_logp=old_logp,
        old_logp=np.where(mask, old_logp, np.nan),
        source=np.zeros(b, np.int32),
        block=ids,
        extras=hidden,
    )


ROWS = rollouts([1, 0, 0.5, 1], [0, 0, 0, 0])


def loss_and_grad(name, rows=ROWS, advantage=None, logp=LOGP, state=None, **fields):
    """Loss and its gradient in logp; the advantage is the method's own unless given."""
    alg = algorithms.make(name, **fields)
    state = alg.init() if state is None else state
    credit = None if advantage is None else Credit(jnp.asarray(advantage))
    value, grads = algorithms.value_and_grad(alg, state, rows, Views(logp=jnp.asarray(logp)), credit=credit)
    return value, grads.logp


def row_advantage(name, score, group, **fields):
    rows = rollouts(score, group, np.ones((len(score), 1), bool), np.zeros((len(score), 1)))
    alg = algorithms.make(name, **fields)
    return alg.credit(alg.init(), rows, KEY).advantage[:, 0]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-9)


# GRPO, Dr.GRPO, DAPO, BNPO


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1.15469854, -0.57734927, -0.57734927, 0, 0, 0]),
        ({"ddof": 0}, [1.41421056, -0.70710528, -0.70710528, 0, 0, 0]),
        ({"scale": "none"}, [0.66666667, -0.33333333, -0.33333333, 0, 0, 0]),
        ({"scale": "batch"}, [1.29099195, -0.64549597, -0.64549597, 0, 0, 0]),
    ],
)
def test_grpo_advantages(fields, expected):
    close(row_advantage("grpo", [1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1], **fields), expected)


def test_bnpo_advantages():
    a, b, c = 0.68017476, 0.22672492, 0.39269908
    score = [int(r) for r in "100011001110"]
    actual = row_advantage("grpo", score, np.repeat([5, 2, 9], 4), scale="bnpo")
    close(actual, [a, -b, -b, -b, c, c, -c, -c, b, b, b, -a])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0.06602429),
        ({"aggregation": "token-mean"}, 0.08540369),
        ({"aggregation": "seq-mean-token-sum"}, 0.19215830),
        ({"aggregation": "seq-mean-token-sum-norm"}, 0.06405277),
        ({"aggregation": "seq-mean-token-sum-norm", "max_length": 3}, 0.06405277),
        ({"aggregation": "token-mean", "clip_high": 0.28}, 0.07651480),
        ({"aggregation": "token-mean", "dual_clip": 2.0}, 0.05987018),
    ],
)
def test_grpo_losses(fields, expected):
    close(loss_and_grad("grpo", advantage=ADVANTAGE, **fields)[0], expected)


def test_grpo_gradient():
    expected = [
        [-0.09209758, 0, -0.05586000],
        [0.16873235, 0, 0],
        [-0.13140889, 0, 0],
        [0.04084161, 0.10248346, 0],
    ]
    close(loss_and_grad("grpo", advantage=ADVANTAGE)[1], expected)


def test_dapo_gradient():
    expected = [
        [-0.12279677, 0, -0.07448001],
        [0.14998431, 0, 0],
        [-0.05840395, 0, 0],
        [0.05445548, 0.13664462, 0],
    ]
    close(loss_and_grad("grpo", advantage=ADVANTAGE, aggregation="token-mean", clip_high=0.28)[1], expected)


@pytest.mark.parametrize(("kind", "expected"), [("k1", 0.07462429), ("k2", 0.07251246), ("k3", 0.07213179)])
def test_grpo_with_a_kl_term(kind, expected):
    rows = rollouts([0, 0, 0, 0], [0, 0, 0, 0], ref_logp=OLD - 0.25)
    close(loss_and_grad("grpo", rows, ADVANTAGE, beta=0.04, kl_kind=kind)[0], expected)


def test_a_batch_of_solved_prompts_leaves_the_kl_term_only():
    rows = rollouts([1, 1, 1, 1], [0, 0, 1, 1], ref_logp=OLD - 0.25)
    with_kl, without = (loss_and_grad("grpo", rows, beta=beta)[0] for beta in (0.04, 0.0))
    assert without == 0 and with_kl > 0


def test_dynamic_sampling_replaces_the_collector():
    plan = algorithms.make("grpo", dynamic_sampling=True, max_draws=3).plan(())
    assert plan.collector is not None
    assert algorithms.make("grpo").plan(()).collector is None


def test_overlong_filter_takes_truncated_rows_out_of_the_loss_but_not_out_of_the_statistics():
    rows = ROWS.with_(truncated=np.array([True, False, False, False]))
    _, grad = loss_and_grad("grpo", rows, overlong_filter=True)
    assert not np.any(grad[0]) and np.any(grad[1])
    alg = algorithms.make("grpo", overlong_filter=True)
    np.testing.assert_array_equal(alg.credit((), rows, KEY).advantage, alg.credit((), ROWS, KEY).advantage)


# GSPO


def test_gspo_sequence_ratios():
    close(ratios.sequence(LOGP, OLD, MASK)[:, 0], [1.06893911, 0.86070798, 1.05127110, 0.89882523])


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_gspo(form):
    value, grad = loss_and_grad("gspo", advantage=ADVANTAGE, form=form)
    close(value, -0.00026250)
    assert not np.any(grad)  # every row is clipped
    value, grad = loss_and_grad("gspo", advantage=ADVANTAGE, form=form, clip_low=0.1, clip_high=0.1)
    close(value, -0.06114366)
    close(grad, [[-0.08907826] * 3, [0, 0, 0], [-0.13140889, 0, 0], [0, 0, 0]])


def test_gspo_token_with_token_advantages():
    advantage = np.array([[1, 2, -1], [-1, 0.5, 0], [0.5, 0, 0], [-0.5, -0.5, 1]])
    value, grad = loss_and_grad("gspo", advantage=advantage, form="token", clip_low=0.1, clip_high=0.1)
    close(value, -0.25076176)
    expected = [
        [-0.08907826, -0.17815652, 0.08907826],
        [0, -0.05379425, 0],
        [-0.13140889, 0, 0],
        [0, 0, -0.07490210],
    ]
    close(grad, expected)


# CISPO


@pytest.mark.parametrize(
    ("fields", "loss", "expected"),
    [
        (
            {"cap_high": 2.0},
            0.00420271,
            [
                [-0.12279677, -0.18319125, -0.07448001],
                [0.14998431, 0.06097907, 0],
                [-0.05840395, 0, 0],
                [0.05445548, 0.11111111, 0.01673301],
            ],
        ),
        (
            {"cap_low": 0.8, "cap_high": 1.2},
            -0.07577309,
            [
                [-0.12279677, -0.13333333, -0.08888889],
                [0.13333333, 0.08888889, 0],
                [-0.05840395, 0, 0],
                [0.05445548, 0.06666667, 0.04444444],
            ],
        ),
        (
            {},
            -0.00090399,
            [
                [-0.12279677, -0.18319125, -0.07448001],
                [0.14998431, 0.06097907, 0],
                [-0.05840395, 0, 0],
                [0.05445548, 0.13664462, 0.01673301],
            ],
        ),
        (
            {"clip_low": 0.2, "clip_high": 0.2},
            0.12565314,
            [[-0.12279677, 0, -0.07448001], [0.14998431, 0, 0], [-0.05840395, 0, 0], [0.05445548, 0.13664462, 0]],
        ),
    ],
)
def test_cispo(fields, loss, expected):
    value, grad = loss_and_grad("cispo", advantage=ADVANTAGE, **fields)
    close(value, loss)
    close(grad, expected)


def test_cispo_masked_and_without_caps_has_the_gradient_of_ppo():
    fields = {"clip_low": 0.2, "clip_high": 0.2}
    _, masked = loss_and_grad("cispo", advantage=ADVANTAGE, cap_high=None, **fields)
    _, clipped = loss_and_grad("grpo", advantage=ADVANTAGE, aggregation="token-mean", **fields)
    close(masked, clipped)


# SAPO


@pytest.mark.parametrize(
    ("taus", "loss", "expected"),
    [
        (
            (1.0, 1.05),
            -0.06554153,
            [
                [-0.09184337, -0.12389488, -0.05436924],
                [0.16316548, 0.06489181, 0],
                [-0.13132257, 0, 0],
                [0.04083720, 0.05987846, 0.01100138],
            ],
        ),
        (
            (2.0, 4.0),
            -0.22930872,
            [
                [-0.09108636, -0.09262759, -0.05020293],
                [0.10713766, 0.03328961, 0],
                [-0.13106405, 0, 0],
                [0.04077762, 0.00118740, 0.00272415],
            ],
        ),
    ],
)
def test_sapo(taus, loss, expected):
    value, grad = loss_and_grad("sapo", advantage=ADVANTAGE, tau_pos=taus[0], tau_neg=taus[1])
    close(value, loss)
    close(grad, expected)


def test_sapo_gates():
    ratio = jnp.array([0.25, 0.8, 1, 1.5, 4])
    close(sapo.gate(ratio, 1.0), [1.28328520, 1.80066401, 2, 2.48983732, 3.81029651])
    close(sapo.gate_weight(ratio, 1.0), [0.87157998, 0.99006629, 1, 0.94001485, 0.18070664])
    close(sapo.gate_weight(ratio, 1.05), [0.85968341, 0.98905553, 1, 0.93413982, 0.15761114])


def test_sapo_on_policy_has_the_gradient_of_grpo_without_a_clip():
    _, soft = loss_and_grad("sapo", advantage=ADVANTAGE, logp=OLD)
    _, hard = loss_and_grad("grpo", advantage=ADVANTAGE, logp=OLD, clip_high=1e9)
    close(soft, hard)


def test_sapo_is_finite_at_ratios_beyond_float32():
    value, grad = loss_and_grad("sapo", advantage=ADVANTAGE, logp=OLD + 100.0)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_sapo_weighs_a_row_of_similar_tokens_as_gspo_with_a_soft_gate():
    """The mean of its token weights is the gate's weight at the sequence ratio, up to tau^2 / 4 times the variance of log r,
    where r - 1 is near log r."""
    tau = 1.0
    for spread in (0.02, 0.05):
        log_r = 0.01 + spread * np.random.default_rng(0).normal(size=1000)
        token = np.mean(sapo.gate_weight(jnp.exp(log_r), tau))
        sequence = 1 / np.cosh(tau / 2 * np.mean(log_r)) ** 2
        assert 0 < sequence - token <= tau**2 / 4 * np.var(log_r) + 1e-4


# RLOO


def test_rloo_advantages():
    close(row_advantage("rloo", [1, 0, 0.5, 1], [0] * 4, beta=0.0), [0.5, -0.83333333, -0.16666667, 0.5])


def test_rloo_reinforce_form():
    value, grad = loss_and_grad("rloo", beta=0.0, form="reinforce")
    close(value, 0.51291667)
    close(grad, [[-0.125] * 3, [0.20833333, 0.20833333, 0], [0.04166667, 0, 0], [-0.125] * 3])


def test_rloo_clipped_form():
    value, grad = loss_and_grad("rloo", beta=0.0)
    close(value, -0.03029900)
    close(grad, [[0, 0, 0], [0, 0, 0], [0.04380296, 0, 0], [-0.09076863] * 3])


def test_rloo_puts_the_kl_into_the_reward():
    rows = rollouts([1, 0, 0.5, 1], [0] * 4, ref_logp=OLD - 0.25)
    close(rloo.shaped_reward(rows, 0.1), [0.925, -0.05, 0.475, 0.925])


def test_rloo_forms_agree_on_policy():
    clipped, reinforce = (loss_and_grad("rloo", logp=OLD, beta=0.0, form=f)[1] for f in ("clipped", "reinforce"))
    np.testing.assert_allclose(clipped, reinforce, atol=1e-15)


# REINFORCE++

PLUS = rollouts([1, 0, 1, 0], [0, 1, 2, 3], ref_logp=REF)


def test_reinforce_pp():
    expected = [[1.02, 1.01, 1.03], [0.02, 0.02, 0], [0.99, 0, 0], [-0.03, -0.035, -0.04]]
    close(reinforce_pp.returns(reinforce_pp.Config(beta=0.1), PLUS), expected)
    alg = algorithms.make("reinforce_pp", beta=0.1)
    expected = [
        [1.06692968, 1.04844581, 1.08541354],
        [-0.78145667, -0.78145667, 0],
        [1.01147809, 0, 0],
        [-0.87387599, -0.88311792, -0.89235986],
    ]
    close(alg.credit((), PLUS, KEY).advantage, expected)
    value, grad = loss_and_grad("reinforce_pp", PLUS, beta=0.1)
    close(value, 0.13271270)
    expected = [
        [-0.13101552, 0, -0.08084161],
        [0.11720624, 0, 0],
        [-0.11814863, 0, 0],
        [0.09517468, 0.24134662, 0],
    ]
    close(grad, expected)


def test_reinforce_pp_baseline():
    rows = rollouts([1, 0, 1, 1], [0, 0, 1, 1], ref_logp=REF)
    alg = algorithms.make("reinforce_pp", baseline=True, beta=0.01)
    a, b, c = 1.13707045, -1.42133806, -0.14213381
    close(alg.credit((), rows, KEY).advantage, [[a, a, a], [b, b, 0], [c, 0, 0], [c, c, c]])
    close(loss_and_grad("reinforce_pp", rows, baseline=True, beta=0.01)[0], 0.04887479)


def test_reinforce_pp_trains_a_prompt_with_one_completion():
    assert np.any(loss_and_grad("reinforce_pp", PLUS, beta=0.0)[1])


# PPO

VALUES = np.array([[0.5, 0.6, 0.7], [0.4, 0.3, 0], [0.8, 0, 0], [0.2, 0.1, 0.3]])
NEW_VALUES = VALUES + np.array([[0.1, -0.7, 0.2], [0.6, 0, 0], [0, 0, 0], [-0.9, 0.4, 0.1]])
CRITIC = rollouts([1, 0, 1, 0], [0, 1, 2, 3], ref_logp=REF, old_values=VALUES)
WHITENED = [
    [1.40008976, 1.13342748, 0.94595939],
    [-1.10880896, -0.85491517, 0],
    [0.53264391, 0, 0],
    [-0.63969590, -0.37665013, -1.03205038],
]
RETURNS = [[0.983825, 0.9935, 1.03], [0.034, 0.02, 0], [0.99, 0, 0], [-0.0071, -0.018, -0.04]]


def test_ppo_advantages_and_returns():
    raw = algorithms.make("ppo", beta=0.1, whiten=False)
    credit = raw.credit(raw.init(), CRITIC, KEY)
    expected = [[0.483825, 0.3935, 0.33], [-0.366, -0.28, 0], [0.19, 0, 0], [-0.2071, -0.118, -0.34]]
    close(credit.advantage, expected)
    close(credit.extras["returns"], RETURNS)
    whitened = algorithms.make("ppo", beta=0.1)
    close(whitened.credit(whitened.init(), CRITIC, KEY).advantage, WHITENED)


def ppo_loss(**fields):
    alg = algorithms.make("ppo", beta=0.1, **fields)
    views = Views(logp=jnp.asarray(LOGP), values=jnp.asarray(NEW_VALUES))
    return algorithms.value_and_grad(alg, alg.init(), CRITIC, views)


@pytest.mark.parametrize(("dual_clip", "policy_loss"), [(None, 0.05091630), (3.0, 0.05091630), (1.5, 0.01075690)])
def test_ppo_loss_is_policy_loss_plus_value_loss(dual_clip, policy_loss):
    value, grads = ppo_loss(dual_clip=dual_clip)
    close(value, policy_loss + 0.18609191)
    expected = [
        [-0.04264722, -0.1215, -0.01444444],
        [0.10733333, 0.03111111, 0],
        [-0.02111111, 0, 0],
        [-0.07698889, 0.05755556, 0.04888889],
    ]
    close(grads.values, expected)


def test_ppo_policy_gradient():
    expected = [
        [-0.17192650, 0, -0.07045506],
        [0.16630395, 0, 0],
        [-0.06221702, 0, 0],
        [0.06966990, 0.10293442, 0],
    ]
    close(ppo_loss(dual_clip=None)[1].logp, expected)


def test_ppo_skips_masked_tokens_without_discounting():
    mask = np.array([[True, False, True]])
    rewards, values = np.array([[0.0, 5, 1]]), np.array([[0.5, 99, 0.25]])
    close(ppo.gae.gae(rewards, values, mask, 0.9, 0.8), [[0.265, 0, 0.75]])


def test_ppo_bootstraps_when_a_value_after_the_end_is_given():
    alg = algorithms.make("ppo", beta=0.0, whiten=False)
    ended = alg.credit(alg.init(), CRITIC, KEY).advantage
    cut = alg.credit(alg.init(), CRITIC.with_(extras={"bootstrap": np.full(4, 0.5)}), KEY).advantage
    last = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]], bool)
    close((cut - ended)[last], 0.5)


def test_kl_controller():
    close(ppo.kl_controller(0.1, 0.3, 256, target=0.1, horizon=10_000), 0.100512)


def test_ppo_adapts_its_kl_coefficient_only_when_it_has_a_target():
    adaptive = algorithms.make("ppo", beta=0.1, kl_target=0.001, kl_horizon=4)
    report = Report({}, {}, 1)
    state, _ = adaptive.observe(adaptive.init(), {}, PLUS, None, report, None)
    rows = [(OLD - REF)[i][m].mean() for i, m in enumerate(MASK)]
    np.testing.assert_allclose(state["kl_coef"], ppo.kl_controller(0.1, np.mean(rows), 4, 0.001, 4), rtol=1e-6)
    fixed = algorithms.make("ppo", beta=0.1)
    assert fixed.observe(fixed.init(), {}, PLUS, None, report, None)[0]["kl_coef"] == np.float32(0.1)


# DCPO

DCPO_LOGP = np.array([[-0.9, -0.4, -1.2], [-0.7, -2.0, -0.3], [-0.5, -1.1, -0.2], [-1.5, -0.6, -0.8]])
DCPO_MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], bool)
DCPO_ROWS = rollouts(
    [1, 0, 1, 1],
    [0, 0, 1, 1],
    DCPO_MASK,
    np.array([[-1.0, -0.5, -1.0], [-0.7, -1.6, -0.3], [-0.5, -1.0, -0.6], [-1.5, -0.6, -0.8]]),
    old_tempered_logp=np.array([[-1.1, -0.6, -1.0], [-0.8, -1.5, -0.4], [-0.6, -1.0, -0.7], [-1.4, -0.7, -0.9]]),
)


def entropy(value):
    return {"entropy": jnp.asarray(value)}


def test_dcpo():
    alg = algorithms.make("dcpo", h0=0.5)
    np.testing.assert_allclose(alg.plan(entropy(0.2)).score_temperature, 1.2)
    np.testing.assert_allclose(alg.plan(entropy(0.6)).score_temperature, 0.8)
    expected = [
        [0.73036833, 0.73036833, 0.74156392],
        [-0.62391687, -0.62391687, 0],
        [0.10645146, 0.11764706, 0.10645146],
        [0.13002011, 0, 0],
    ]
    close(alg.credit(entropy(0.2), DCPO_ROWS, KEY).advantage, expected)
    value, grad = loss_and_grad("dcpo", DCPO_ROWS, logp=DCPO_LOGP, state=entropy(0.2), h0=0.5)
    close(value, -0.17434659)
    expected = [
        [-0.08968687, -0.08968687, -0.06746013],
        [0.06932410, 0, 0],
        [-0.01182794, -0.01182794, 0],
        [-0.01444668, 0, 0],
    ]
    close(grad, expected)


def test_dcpo_carries_the_mean_over_updates_of_the_sampled_entropy():
    alg = algorithms.make("dcpo")
    _, metrics = alg.loss(
        alg.init(), Views(logp=jnp.asarray(DCPO_LOGP)), DCPO_ROWS, alg.weigh((), DCPO_ROWS, Credit(ADVANTAGE))
    )
    report = Report(metrics, metrics, 1, (metrics,))
    state, _ = alg.observe(alg.init(), {}, DCPO_ROWS, None, report, None)
    np.testing.assert_allclose(state["entropy"], 0.94444444, rtol=1e-7)
    other = {"sampled_entropy": Mean(jnp.asarray(100.0), jnp.asarray(50.0))}
    state, _ = alg.observe(alg.init(), {}, DCPO_ROWS, None, report._replace(per_update=(metrics, other)), None)
    np.testing.assert_allclose(state["entropy"], (0.94444444 + 2) / 2, rtol=1e-7)


def test_dcpo_without_a_correct_answer_trains_nothing_and_makes_no_nan():
    alg = algorithms.make("dcpo", h0=0.5)
    wrong = DCPO_ROWS.with_(reward=np.zeros((4, 1)))
    for h in (0.2, 0.5):
        assert not np.any(alg.credit(entropy(h), wrong, KEY).advantage)


def test_dcpo_at_its_target_entropy_is_grpo():
    at_target = algorithms.make("dcpo", h0=0.5).credit(entropy(0.5), DCPO_ROWS, KEY).advantage
    np.testing.assert_array_equal(at_target, algorithms.make("grpo").credit((), DCPO_ROWS, KEY).advantage)


# R2VPO


def lam(value):
    return {"lam": jnp.asarray(value)}


R2VPO_GRADS = {
    0.0: [
        [-0.12279677, -0.18319125, -0.07448001],
        [0.14998431, 0.06097907, 0],
        [-0.05840395, 0, 0],
        [0.05445548, 0.13664462, 0.01673301],
    ],
    0.5: [
        [-0.10988212, -0.06435119, -0.09903457],
        [0.20245764, 0.03346602, 0],
        [-0.05241508, 0, 0],
        [0.05229890, 0.53553843, -0.00665324],
    ],
    2.5: [
        [-0.05822352, 0.41100906, -0.19725283],
        [0.41235097, -0.07658616, 0],
        [-0.02845960, 0, 0],
        [0.04367257, 2.13111370, -0.10019824],
    ],
}


@pytest.mark.parametrize(("multiplier", "expected"), [(0.0, -0.02007548), (0.5, 0.15372190), (2.5, 0.84891141)])
def test_r2vpo_primal(multiplier, expected):
    value, grad = loss_and_grad("r2vpo", advantage=ADVANTAGE, state=lam(multiplier))
    close(value, expected)
    close(grad, R2VPO_GRADS[multiplier])


@pytest.mark.parametrize(("center", "expected"), [(False, 0.38759476), (True, 0.37224217)])
def test_r2vpo_ratio_variance(center, expected):
    ratio = ratios.token(LOGP, OLD, MASK)
    variance = r2vpo.ratio_variance(ratio, MASK / MASK.sum(), center)
    close(variance.sum, expected)
    close(variance.count, 1)


def test_r2vpo_effective_advantage():
    expected = [
        [0.89482908, 0.35127873, 1.32967995],
        [-1.34985881, -0.54881164, 0],
        [0.44872890, 0, 0],
        [-0.48019867, -1.95960311, 0.19880579],
    ]
    actual = surrogates.effective_advantage(ratios.token(LOGP, OLD, MASK), ADVANTAGE, 0.5)
    close(np.where(MASK, actual, 0), expected)


def test_r2vpo_dual_path():
    alg = algorithms.make("r2vpo", lam0=0.1, delta=0.04, eta=1.0)
    state, path = alg.init(), []
    for v in [0.02, 0.05, 0.30, 0.01, 0, 0]:
        state = alg.tune(state, {"ratio/variance": Mean(jnp.asarray(v), jnp.asarray(1.0))})
        path.append(float(state["lam"]))
    np.testing.assert_allclose(path, [0.08, 0.09, 0.35, 0.32, 0.28, 0.24], rtol=1e-6)


def test_r2vpo_multiplier_stays_within_bounds_and_waits_for_trained_tokens():
    alg = algorithms.make("r2vpo", lam0=1.0, eta=1000.0, lam_min=0.5, lam_max=2.0)

    def tuned(v, n):
        return float(alg.tune(alg.init(), {"ratio/variance": Mean(jnp.asarray(v), jnp.asarray(n))})["lam"])

    assert (tuned(0.0, 1.0), tuned(1.0, 1.0), tuned(0.0, 0.0)) == (0.5, 2.0, 1.0)


def test_r2vpo_facts_behind_the_constraint():
    old = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    new = np.log(np.array([0.12, 0.18, 0.33, 0.37]))
    r, mu = np.exp(new - old), np.exp(old)
    np.testing.assert_allclose(mu @ r, 1)
    np.testing.assert_allclose(mu @ (r - 1) ** 2, np.sum((np.exp(new) - mu) ** 2 / mu))  # chi-square divergence
    np.testing.assert_allclose(mu @ (r - 1) ** 2, 2 * np.exp(new) @ (new - old), rtol=0.1)  # about 2 KL


def test_r2vpo_keeps_zero_advantage_tokens_in_the_variance_unless_told_not_to():
    rows = rollouts([1, 0, 1, 1], [0, 0, 1, 1])
    (_, kept), (_, dropped) = (loss_and_grad("r2vpo", rows, drop_zero_advantage=d) for d in (False, True))
    assert np.all(np.asarray(kept)[2:][MASK[2:]] != 0) and not np.any(dropped[2:])


def test_r2vpo_trains_on_replayed_groups_with_the_advantage_they_were_collected_with():
    alg = algorithms.make("r2vpo", replay=1.0, max_age=2)
    state, memory, seen = alg.init(), {}, []
    for step in range(4):
        rows = nasty.rollouts(step, alg.needs)
        credit = alg.credit(state, rows, KEY)
        selected, selected_credit, memory = alg.select(state, memory, rows, credit, jax.random.fold_in(KEY, step))
        seen.append(int(selected.trained[nasty.ROWS :].any(-1).sum()))
        assert selected.mask.shape[0] == 2 * nasty.ROWS
        assert set(memory["replay"]["step"].tolist()) <= {step, step - 1}
        # Recomputed on the mixed batch, replayed rows keep their advantage and stay out of fresh statistics.
        again = alg.credit(state, selected, KEY).advantage
        np.testing.assert_allclose(again, np.where(selected.trained, selected_credit.advantage, 0), atol=1e-12)
    assert seen[0] == 0 and all(n > 0 for n in seen[1:])
    assert np.all(selected.source[nasty.ROWS :] == REPLAY)


def test_r2vpo_replay_is_a_function_of_the_key_and_resumes_from_its_memory():
    alg = algorithms.make("r2vpo", replay=0.5)
    rows = nasty.rollouts(0, alg.needs)
    credit = alg.credit(alg.init(), rows, KEY)
    memory = alg.select(alg.init(), {}, rows, credit, KEY).memory
    restored = jax.tree.map(np.copy, memory)
    once, twice = (alg.select(alg.init(), m, rows, credit, KEY) for m in (memory, restored))
    jax.tree.map(np.testing.assert_array_equal, once.rows, twice.rows)


# Configs


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("grpo", {"clip_low": 2.0}, "algorithm.clip_low=2.0: expected 0 to 1"),
        ("grpo", {"dual_clip": 1.0}, "algorithm.dual_clip=1.0: expected more than 1"),
        ("grpo", {"delta": 1.1}, "algorithm.delta=1.1: expected more than 1 + clip_high = 1.2"),
        ("grpo", {"aggregation": "mean"}, "algorithm.aggregation='mean': expected one of token-mean"),
        ("grpo", {"kl_ratio": True}, "algorithm.kl_ratio=True: expected false without a KL term"),
        ("grpo", {"max_length": 8}, "algorithm.max_length=8: expected none with seq-mean-token-mean"),
        ("gspo", {"form": "rows"}, "algorithm.form='rows': expected one of sequence, token"),
        ("cispo", {"cap_high": 0.9}, "algorithm.cap_high=0.9: expected at least 1, or null"),
        ("cispo", {"clip_high": 0.2}, "algorithm.clip_high=0.2: expected both clip_low and clip_high, or neither"),
        ("sapo", {"tau_neg": 0.0}, "algorithm.tau_neg=0.0: expected more than 0"),
        ("rloo", {"beta": -1.0}, "algorithm.beta=-1.0: expected at least 0"),
        ("reinforce_pp", {"baseline": True, "gamma": 0.9}, "algorithm.gamma=0.9: expected 1 with baseline=true"),
        ("ppo", {"beta": 0.0, "kl_target": 0.1}, "algorithm.kl_target=0.1: expected none without a KL term"),
        ("dcpo", {"t_high": 0.5}, "algorithm.t_high=0.5: expected at least t_low = 0.8"),
        ("r2vpo", {"lam_min": 2.0}, "algorithm.lam_min=2.0: expected 0 to lam0 = 1.0"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(name, fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make(name, **fields)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
