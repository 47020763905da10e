"""The cases of `jaxrl_llm check`: every method's, as a file too, in every dtype and padding; and the command itself."""

import dataclasses
import json

import numpy as np
import plain_losses as plain
import pytest
from nasty import REQUIRED

from jaxrl_llm import algorithms, cli
from jaxrl_llm.checking import cases, causes, check

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", algorithms.names())
def test_every_method_is_exported_and_agrees_with_itself(name, tmp_path):
    fields = REQUIRED.get(name, {})
    of = check.prepare(name, fields, count=1)
    own = causes.Comparison(of, "loss", [of.mutated((), 0, "loss")], of.reference, check.TOLERANCES["float64"])
    assert causes.disagreeing(own) == {}
    check.write(tmp_path / "cases", of, {"seed": 0})
    with np.load(tmp_path / "cases", allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        assert meta["method"] == name and {"jaxrl_llm", "jax", "numpy", "python"} == set(meta["versions"])
        assert set(meta["config"]) == {f.name for f in dataclasses.fields(algorithms.config_class(name))}
        assert file["0/loss"] == of.reference[0].value and np.isfinite(file["0/loss"])
        for view in meta["differentiable"]:
            np.testing.assert_array_equal(file[f"0/grad/{view}"], of.reference[0].grads[view])
            assert file[f"0/input/{view}"].shape == file["0/input/mask"].shape
        np.testing.assert_array_equal(file["0/input/reward"], of.cases[0].rows.score)


def test_what_is_exported_is_enough_to_compute_the_loss_elsewhere(tmp_path):
    text, code = check.run("grpo", {}, export=str(tmp_path / "cases.npz"), count=4)
    assert code == 0 and text == f"wrote 4 cases to {tmp_path / 'cases.npz'}"
    with np.load(tmp_path / "cases.npz", allow_pickle=False) as file:
        for i in range(4):
            given = {name: file[f"{i}/input/{name}"] for name in ("logp", "old_logp", "mask", "reward", "group")}
            loss, grad = plain.grpo_with_gradient(**given)
            np.testing.assert_allclose(loss, file[f"{i}/loss"], rtol=1e-10, atol=1e-15)
            np.testing.assert_allclose(grad, file[f"{i}/grad/logp"], rtol=1e-10, atol=1e-15)


def test_nan_in_the_padding_is_seen_by_a_loss_that_multiplies_its_mask_in():
    def multiplies(logp, old_logp, mask, reward, group):
        a = plain.group_advantage(reward, group)[:, None]
        token = plain.surrogate(np.exp((logp - old_logp) * mask), a, 0.2, 0.2) * mask
        n = mask.sum(1)
        return (token.sum(1) / np.maximum(n, 1)).sum() / (n > 0).sum()

    for padding, disagreeing in (("finite", 0), ("nan", 3)):
        of = check.prepare("grpo", {}, count=4, padding=padding)
        assert len(causes.disagreeing(check.compare(of, multiplies, "theirs")[0])) == disagreeing
        assert causes.disagreeing(check.compare(of, plain.grpo, "theirs")[0]) == {}


def test_float32_is_given_and_compared_with_float64_of_the_same_numbers():
    seen = set()

    def loss(logp, old_logp, mask, reward, group):
        seen.add(logp.dtype)
        return plain.grpo_jax(logp, old_logp, mask, reward, group)

    compared, _ = check.compare(check.prepare("grpo", {}, 4, dtype="float32"), loss, "theirs", "jax", "float32")
    assert causes.disagreeing(compared) == {} and seen == {np.dtype("float32")}
    assert 1e-9 < max(causes.difference(a, b, "value") for a, b in zip(compared.theirs, compared.reference)) < 1e-3


def test_rows_that_do_not_count_are_shown_to_functions_that_ask_which_do():
    whole, some = (check.prepare("grpo", {}, 1, unscored=unscored).inputs[0] for unscored in (False, True))
    assert whole.arrays["counted"].all() and not some.arrays["counted"].all()


def test_cases_have_no_kink_near_them():
    of = check.prepare("gspo", {}, count=4)
    assert not any(cases._kinked(of.alg, case).any() for case in of.cases)


HERE = "plain_losses"


@pytest.mark.parametrize(
    "words, code, text",
    [
        (["grpo", "--against", f"{HERE}:grpo"], 0, f"grpo: {HERE}:grpo (numpy, float64) agrees in 2 cases"),
        (["grpo", "--against", f"{HERE}:wrong_grpo"], 1, "likely cause: ddof"),
        (["gspo", "--against", f"{HERE}:gspo_torch", "--framework", "torch"], 0, "(torch, float64) agrees in 2 cases"),
        (["grpo", "algorithm.clip_high=0.28", "--against", f"{HERE}:grpo"], 1, "the reference has `clip_high`=0.28"),
    ],
)
def test_the_exit_code_says_whether_it_agrees(capsys, words, code, text):
    assert cli.main(["check", *words, "--cases", "2"]) == code
    out = capsys.readouterr()
    assert text in out.out and out.err == ""


@pytest.mark.parametrize(
    "words, line",
    [
        (["gspo"], "nothing to do, expected --against MODULE:FUNCTION, --export FILE.npz, or both"),
        (["gspo", "--against", "plain_losses"], "--against plain_losses: expected MODULE:FUNCTION"),
        (["gspo", "--against", "no_such_module:f"], "importing no_such_module raised ModuleNotFoundError"),
        (["gspo", "--against", f"{HERE}:nothing"], "plain_losses has no function nothing"),
        (
            ["gspo", "--against", f"{HERE}:asks_for_too_much"],
            "nothing is called 'temperature_of_the_room'; on offer are",
        ),
        (["gspo", "--against", f"{HERE}:fails"], "raised RuntimeError with numpy arrays (it is broken)"),
        (["gspo", "--against", f"{HERE}:fails", "--framework", "jax"], "raised RuntimeError: it is broken"),
        (["gspo", "--against", f"{HERE}:returns_a_matrix"], "returned an array of shape (2, 2), expected a loss []"),
        (["gspoo", "--against", f"{HERE}:gspo"], "did you mean 'gspo'?"),
        (["gspo", "clip_hihg=0.28", "--against", f"{HERE}:gspo"], "did you mean algorithm.clip_high?"),
        (["gspo", "clip_high=wide", "--against", f"{HERE}:gspo"], "algorithm.clip_high='wide': expected"),
        (["gspo", "--cases", "0", "--against", f"{HERE}:gspo"], "--cases 0: expected at least 1"),
    ],
)
def test_a_wrong_use_is_one_line_and_code_2(capsys, words, line):
    assert cli.main(["check", "--cases", "1", *words]) == 2
    out = capsys.readouterr()
    assert out.out == "" and line in out.err and out.err.count("\n") == 1
