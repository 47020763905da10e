"""`jaxrl_llm check`: strangers' losses agree with the reference, and each mistake people make is named."""

import inspect
from functools import partial

import jax
import numpy as np
import plain_losses as plain
import pytest

from jaxrl_llm.checking import causes, check, report

pytestmark = pytest.mark.usefixtures("x64")

METHODS = {
    "grpo": ("grpo", {}),
    "dapo": ("grpo", {"clip_high": 0.28, "aggregation": "token-mean"}),
    "gspo": ("gspo", {}),
    "sums": ("grpo", {"aggregation": "seq-mean-token-sum"}),
    "cispo": ("cispo", {}),
    "ppo": ("ppo", {}),
    "dpo": ("dpo", {}),
}


@pytest.fixture(scope="module")
def subject():
    """Methods on one case of every kind, made once."""
    made = {}

    def of(name):
        if name not in made:
            with jax.enable_x64(True):
                made[name] = check.prepare(*METHODS[name], count=4)
        return made[name]

    return of


def causes_of(subject, function):
    compared, _ = check.compare(subject, function, "theirs")
    return {cause.name for cause in causes.explain(compared)}


AGREE = [
    ("grpo", plain.grpo, "numpy"),
    ("grpo", plain.grpo_jax, "jax"),
    ("grpo", plain.grpo_with_gradient, "numpy"),
    ("dapo", plain.numpy_loss("dapo"), "numpy"),
    ("gspo", plain.gspo, "numpy"),
    ("gspo", plain.gspo_torch, "torch"),
    ("cispo", plain.cispo_jax, "jax"),
    ("ppo", plain.ppo_torch, "torch"),
    ("dpo", plain.dpo, "numpy"),
]


@pytest.mark.parametrize("name, function, framework", AGREE)
def test_a_plain_implementation_agrees_in_its_framework(subject, name, function, framework):
    compared, foreign = check.compare(subject(name), function, "theirs")
    assert foreign.framework == framework
    assert causes.disagreeing(compared) == {}
    assert list(compared.theirs[0].grads) == [v for v in subject(name).alg.needs.loss if v in foreign.takes]
    assert "agrees in 4 cases" in report.agreement(compared, "theirs")


EVERYWHERE = [  # what is wrong, and what it is called; in every method with group-normalised advantages and a clip
    ({"sign": -1}, {"sign"}),
    ({"a_sign": -1}, {"sign"}),
    ({"ddof": 0}, {"ddof"}),
    ({"eps": 1e-4}, {"eps"}),
    ({"eps": 1e-8}, {"eps"}),
    ({"eps": 1e-4, "inside": True}, {"eps"}),
    ({"bare": True}, {"group of one", "eps"}),  # 0/0 in both
    ({"std": "none"}, {"std"}),
    ({"std": "batch"}, {"std"}),
    ({"mean": "none"}, {"baseline"}),
    ({"rule": "max"}, {"clip side"}),
    ({"rule": "clip only"}, {"clip side"}),
    ({"low": 1.0}, {"clip side"}),
    ({"high": 1e9}, {"clip side"}),
    ({"low": 1.0, "high": 1e9}, {"clip side"}),
    ({"ignore": "all"}, {"missing mask"}),
]


def words(value):
    """The same name in every process, as workers must agree on it; sets have no order."""
    return " + ".join(sorted(value)) if isinstance(value, set) else str(value)


INJECTED = [(name, *one) for name in ("grpo", "gspo") for one in EVERYWHERE] + [
    ("grpo", {"how": "sum"}, {"sum for mean"}),
    ("grpo", {"how": "row sums"}, {"sum for mean"}),
    ("grpo", {"how": "token-mean"}, {"wrong aggregation"}),
    ("grpo", {"how": "row means, empty rows too"}, {"wrong aggregation"}),
    ("grpo", {"how": "all positions"}, {"wrong aggregation", "missing mask"}),  # it is both
    ("grpo", {"ddof": 0, "eps": 1e-4}, {"ddof and eps"}),
    ("grpo", {"ddof": 0, "how": "token-mean"}, {"ddof and wrong aggregation"}),
    ("grpo", {"sequence": True, "low": 3e-4, "high": 4e-4}, {"another method"}),
    ("grpo", {"ddof": 0, "how": "token-mean", "low": 0.1}, set()),  # three at once are not recognised
    ("dapo", {"sign": -1}, {"sign"}),
    ("dapo", {"ddof": 0}, {"ddof"}),
    ("dapo", {"how": "row means"}, {"wrong aggregation"}),
    ("dapo", {"how": "sum"}, {"sum for mean"}),
    ("dapo", {"how": "all positions"}, {"wrong aggregation", "missing mask"}),
    ("dapo", {"low": 0.28, "high": 0.2}, {"clip side"}),
    ("dapo", {"high": 0.2}, {"clip side"}),
    ("dapo", {"ignore": "all"}, {"missing mask"}),
    ("gspo", {"how": "sum"}, {"sum for mean"}),
    ("gspo", {"how": "token-mean"}, {"wrong aggregation"}),
    ("gspo", {"low": 4e-4, "high": 3e-4}, {"clip side"}),
    ("gspo", {"low": 0.2, "high": 0.28}, {"clip width"}),
    ("gspo", {"ignore": "ratio"}, {"missing mask"}),
    ("sums", {"how": "row means"}, {"mean for sum"}),
    ("sums", {"how": "token-mean"}, {"mean for sum"}),
]


@pytest.mark.parametrize("name, wrong, cause", INJECTED, ids=words)
def test_an_injected_mistake_is_named(subject, name, wrong, cause):
    assert causes_of(subject(name), plain.numpy_loss(name, **wrong)) == cause


@pytest.mark.parametrize(
    "wrong, cause",
    [
        ({"sign": -1}, {"sign"}),
        ({"how": "sum"}, {"sum for mean"}),
        ({"how": "row means"}, {"wrong aggregation"}),
        ({"ignore": True}, {"missing mask"}),
        ({"low": 1.0}, {"clip side"}),
        ({"ddof": 0}, {"ddof"}),
        ({"leak": True}, {"stop-gradient"}),
        ({"value_gradient": False}, {"stop-gradient"}),
    ],
    ids=words,
)
def test_a_mistake_injected_into_ppo_is_named(subject, wrong, cause):
    assert causes_of(subject("ppo"), partial(plain.ppo_torch, **wrong)) == cause


@pytest.mark.parametrize(
    "name, function, cause",
    [
        ("gspo", plain.gspo_torch_detached, "stop-gradient"),
        ("gspo", plain.gspo_torch_own, "stop-gradient"),
        ("cispo", partial(plain.cispo_jax, hold=lambda x: x), "stop-gradient"),
        ("grpo", partial(plain.grpo_jax, own=True), "old policy"),
    ],
    ids=["ratio detached", "old policy not detached", "weight not held constant", "ratio always 1"],
)
def test_what_a_gradient_wrongly_flows_through_is_named(subject, name, function, cause):
    assert causes_of(subject(name), function) == {cause}


def test_a_gradient_may_come_by_name_and_metrics_may_come_along(subject):
    def named(**given):
        loss, grad = plain.grpo_with_gradient(**given)
        return loss, {"logp": grad}

    def with_metrics(logp, old_logp, mask, reward, group):
        return plain.grpo_jax(logp, old_logp, mask, reward, group), {"tokens": mask.sum()}

    named.__signature__ = inspect.signature(plain.grpo_with_gradient)
    for function in (named, with_metrics):
        compared, _ = check.compare(subject("grpo"), function, "theirs")
        assert causes.disagreeing(compared) == {} and list(compared.theirs[0].grads) == ["logp"]


def test_a_forgotten_reference_policy_is_named_by_the_setting_that_forgets_it(subject):
    assert causes_of(subject("dpo"), partial(plain.dpo, reference=False)) == {"reference_free"}


def test_a_length_in_place_of_a_mask_with_holes_is_named(subject):
    def loss(logp, old_logp, length, reward, group):
        return plain.grpo(logp, old_logp, np.arange(logp.shape[1]) < length[:, None], reward, group)

    (cause,) = causes.explain(check.compare(subject("grpo"), loss, "theirs")[0])
    assert cause.name == "missing mask" and "tokens within `length` that the mask leaves out" in cause.says


def test_a_missing_term_is_named_by_its_coefficient():
    of = check.prepare("grpo", {"beta": 0.04}, count=2)
    (cause,) = causes.explain(check.compare(of, plain.grpo, "theirs")[0])
    assert cause.name == "beta" and cause.says == "as with `beta=0.0`, the reference has `beta=0.04`"


def test_settings_are_given_to_parameters_without_a_default_of_their_own():
    of = check.prepare("grpo", {"clip_high": 0.3, "aggregation": "token-mean", "eps": 1e-3}, count=2)
    compared, foreign = check.compare(of, plain.dapo_of_the_settings, "theirs")
    assert causes.disagreeing(compared) == {}
    assert "clip_high" in foreign.takes and "ddof" not in foreign.takes


def test_a_mistake_in_the_gradient_alone_is_placed_there(subject):
    def wrong(logp, old_logp, mask, reward, group):
        loss, grad = plain.grpo_with_gradient(logp, old_logp, mask, reward, group)
        return loss, -grad

    compared, _ = check.compare(subject("grpo"), wrong, "theirs")
    (cause,) = causes.explain(compared)
    assert cause.name == "sign" and cause.scope == "in the gradient of logp only"


def test_a_constant_factor_is_named_with_its_value(subject):
    def loss(logp, old_logp, mask, reward, group):
        return 0.7 * plain.grpo(logp, old_logp, mask, reward, group)

    (cause,) = causes.explain(check.compare(subject("grpo"), loss, "theirs")[0])
    assert cause.name == "factor" and "0.7 times the reference" in cause.says


def test_advantages_alone_are_compared_by_token(subject):
    good, _ = check.compare(subject("gspo"), plain.group_advantages_only, "theirs")
    assert good.stage == "credit" and causes.disagreeing(good) == {}
    assert causes_of(subject("gspo"), partial(plain.group_advantage, ddof=0)) == {"ddof"}


def test_the_report_says_which_token_both_numbers_their_ratio_and_the_inputs(subject):
    compared, foreign = check.compare(subject("grpo"), plain.numpy_loss("grpo", ddof=0), "mine:loss")
    text = report.disagreement(compared, "mine:loss", foreign.takes, causes.explain(compared))
    case, mine = compared.subject.cases[0], compared.theirs[0].grads["logp"]
    b, t = np.argwhere(mine != compared.reference[0].grads["logp"])[0]
    theirs = compared.reference[0].grads["logp"][b, t]
    assert f"gradient of logp, row {b}, token {t}: yours {mine[b, t]:.9g}, reference {theirs:.9g}, ratio " in text
    assert f"logp {case.views.logp[b, t]:.6g}, old_logp {case.rows.old_logp[b, t]:.6g}, mask True, reward " in text
    assert "likely cause: ddof: the variance divides by n (ddof=0), the reference by n - 1 (ddof=1)" in text


def test_zero_over_zero_in_rows_without_tokens_is_pointed_out(subject):
    def loss(logp, old_logp, mask, reward, group):
        a, n = plain.group_advantage(reward, group)[:, None], mask.sum(1)
        token = plain.surrogate(np.exp(np.where(mask, logp - old_logp, 0)), a, 0.2, 0.2)
        return (np.where(mask, token, 0).sum(1) / n).mean()

    compared, _ = check.compare(subject("grpo"), loss, "theirs")
    text = report.disagreement(compared, "theirs", (), [])
    assert "not finite in 3 of 4 cases, exactly those with a row without trained tokens (0/0?)" in text
