"""The learner: one gradient whatever the split, route and mesh; and what it does when numbers go wrong."""

import logging
import warnings
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning import (
    KEY,
    ROWS,
    SPEC,
    T,
    algorithm,
    assert_close,
    assert_same,
    config,
    coupled_loss,
    credit,
    gradient,
    learner,
    rollouts,
    row_loss,
)

from jaxrl_llm.algorithms.base import Needs, Plan
from jaxrl_llm.models import decoder
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training.gradients import importance_weighted
from jaxrl_llm.training.learner import Learner, NoGradientError, NonFiniteError
from jaxrl_llm.training.metrics import Compilations
from jaxrl_llm.training.minibatches import minibatches
from jaxrl_llm.types import GIVEN, Credit, Mean, Views, metric_value, take_rows

# ------------------------------------------------------------------------------------------------------- one gradient


def test_joint_gradient_is_independent_of_microbatch_split(x64):
    rows, alg = rollouts(dtype=np.float64), algorithm(coupled_loss)
    whole, value = gradient(alg, rows)
    for microbatch_rows in (8, 4, 2):
        split, same = gradient(alg, rows, route="joint", microbatch_rows=microbatch_rows)
        assert_close(split, whole, 1e-10)
        assert same == pytest.approx(value, rel=1e-10)


def test_fused_gradient_is_the_joint_one_for_any_split(x64):
    rows, alg = rollouts(dtype=np.float64), algorithm()
    joint, value = gradient(alg, rows, route="joint")
    for microbatch_rows in (8, 4, 2):
        fused, same = gradient(alg, rows, route="fused", microbatch_rows=microbatch_rows)
        assert_close(fused, joint, 1e-10)
        assert same == pytest.approx(value, rel=1e-10)


def test_known_views_give_the_joint_gradient_without_another_forward():
    rows = rollouts()
    made = learner(algorithm(coupled_loss), learner={"microbatch_rows": 4})
    made.step((), rows, credit(rows))
    after = jax.device_get(made.train.params)
    made = learner(algorithm(coupled_loss), learner={"microbatch_rows": 4})
    current = made.views(rows, ("logp", "entropy"))
    made._score = None  # a forward without gradient would raise
    made.step((), rows, credit(rows), current=current)
    assert_close(jax.device_get(made.train.params), after, 1e-6)
    learner.__globals__["_compiled"].cache_clear()
