"""Methods in two processes make the steps of one: between them these do all that a method may do (methods.py runs the rest)."""

from functools import cache
from pathlib import Path

import methods
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import Algorithm, Needs, Plan

pytestmark = [pytest.mark.processes, pytest.mark.timeout(3600)]  # the first test runs all

TRAINED = ("bupo", "dapo_direct", "dcpo", "hapo", "mini_rl_moe", "oblr_po", "oorl_gepo", "spo_single", "tgdpo")
ELSEWHERE = ("ppo", "r2vpo_off")  # trained by test_processes


@cache
def mechanisms(slug):
    """What a method does of its own: where it differs from the defaults of the interface."""
    data = methods.data_of(slug, Path("unused"))
    fields = dict(data["algorithm"])
    alg = algorithms.make(fields.pop("name"), **fields)
    plan = alg.plan(alg.init())
    own = {name for name, usual in Algorithm._field_defaults.items() if getattr(alg, name) is not usual}
    own |= {f"plan.{name}" for name, usual in Plan._field_defaults.items() if getattr(plan, name) is not usual}
    models = {view.split("_")[0] for view in alg.needs.rescore} | ({"ref"} if alg.needs.reference else set())
    needs = alg.needs._replace(rescore=(), reference=False)  # a reference that samples only is the one that scores
    own |= {f"needs.{name}" for name, usual in Needs._field_defaults.items() if getattr(needs, name) != usual}
    own |= {f"views of {model}" for model in models}
    return own | {f"couples {alg.couples}", f"routing_replay {data['learner']['routing_replay']}"}


@pytest.mark.parametrize("slug", methods.SLUGS)
def test_whatever_a_method_does_is_done_by_one_that_is_trained_in_processes(slug):
    done = set().union(*map(mechanisms, [*TRAINED, *ELSEWHERE]))
    assert mechanisms(slug) <= done, f"add {slug} to TRAINED: {mechanisms(slug) - done}"


@pytest.mark.parametrize("name", algorithms.names())
def test_every_method_is_a_file_or_refused(name, tmp_path):
    if name in methods.REFUSED:
        with pytest.raises(ValueError, match=rf"^algorithm\.name='{name}': .*, expected "):
            methods.checked(methods.data_of(name, tmp_path))
    else:
        assert name in {methods.data_of(slug, tmp_path)["algorithm"]["name"] for slug in methods.SLUGS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of the runs, and what stopped any."""
    directory = tmp_path_factory.mktemp("methods")
    return directory, methods.run(directory, TRAINED)


@pytest.mark.parametrize("slug", TRAINED)
def test_two_processes_train_a_method_as_one(trained, slug):
    directory, failed = trained
    assert slug not in failed, failed[slug]
    assert methods.assert_agree(directory, slug).moved > 1e-3  # else nothing was compared
