"""Supervised fine-tuning on worked answers, before RL: next-token loss on the answer's tokens only.

The batch of a step is a function of (seed, step) and the state is a pytree, so a run resumes from any step exactly.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm import config
from jaxrl_llm.compile_cache import in_place
from jaxrl_llm.models import decoder
from jaxrl_llm.models.attention import causal
from jaxrl_llm.models.scorers import token_views
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.sharding import processes, target
from jaxrl_llm.sharding.rules import batch_sharding
from jaxrl_llm.training import optim
from jaxrl_llm.types import Params


class Examples(NamedTuple):
    """Prompts followed by their worked answers and an end-of-sequence token, right-padded. N examples, S positions."""

    tokens: Int[np.ndarray, "N S"]
    prompt_length: Int[np.ndarray, "N"]
    length: Int[np.ndarray, "N"]  # prompt and answer
    answer_length: int  # of the longest answer, T


class State(NamedTuple):
    """What a checkpoint of the warm start keeps."""

    params: Params
    opt: optax.OptState
    step: Int[Array, ""]


class Step(NamedTuple):
    """What one step measured."""

    loss: Float[Array, ""]  # mean negative log-likelihood per answer token, nats
    grad_norm: Float[Array, ""]
    applied: Bool[Array, ""]  # False: the loss or gradient was not finite and the update was skipped


def examples(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], eos: int, max_prompt: int, max_new: int) -> Examples:
    """Pack (prompt tokens, answer tokens) as fixed-shape arrays; pairs over either limit (the end-of-sequence token
    counts as part of the answer) are left out.

    Raises ValueError when none is left.
    """
    kept = [(list(p), [*a, eos]) for p, a in pairs if 0 < len(p) <= max_prompt and len(a) < max_new]
    if not kept:
        raise ValueError(
            f"warmstart: none of {len(pairs)} worked answers fits rollout.max_prompt={max_prompt} and "
            f"rollout.max_new={max_new}"
        )
    prompt_length = np.array([len(p) for p, _ in kept], np.int32)
    length = np.array([len(p) + len(a) for p, a in kept], np.int32)
    tokens = np.zeros((len(kept), int(-(-length.max() // 8) * 8)), np.int32)
    for row, (p, a) in zip(tokens, kept):
        row[: len(p) + len(a)] = p + a
    return Examples(tokens, prompt_length, length, int((length - prompt_length).max()))


def batch_indices(size: int, batch: int, seed: int, step: int) -> Int[np.ndarray, "batch"]:
    """Which examples step `step` (from 0) trains on: consecutive pieces of one shuffled order per epoch."""
    at = step * batch + np.arange(batch)
    orders = {int(e): np.random.default_rng((seed, int(e))).permutation(size) for e in np.unique(at // size)}
    return np.array([orders[int(i // size)][i % size] for i in at])


def loss(
    spec: ModelSpec,
    params: Params,
    tokens: Int[Array, "B S"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    answer_length: int,
    *,
    dtype: Any = jnp.float32,
    remat: decoder.Remat = "none",
) -> Float[Array, ""]:
    """Mean negative log-likelihood of the answer tokens at temperature 1, every answer token of the batch the same."""
    b, s = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(s), (b, s))
    hidden, _ = decoder.forward(spec, params, tokens, positions, causal(), dtype=dtype, remat=remat)
    target = prompt_length[:, None] + jnp.arange(answer_length)  # [B, T] positions of the answer tokens
    mask = target < length[:, None]
    target = jnp.where(mask, target, 1)
    before = jnp.take_along_axis(hidden, target[..., None] - 1, axis=1)  # a token is predicted one position earlier
    words = jnp.take_along_axis(tokens, target, axis=1)
    unembed = decoder.unembed(spec, params).astype(dtype)
    logp = token_views(before.reshape(-1, before.shape[-1]), unembed, words.reshape(-1), ("logp",), 1.0)["logp"]
    logp = logp.reshape(mask.shape)
    return -jnp.sum(jnp.where(mask, logp, 0)) / jnp.maximum(jnp.sum(mask), 1)


def init(optimizer: config.Optimizer, steps: int, params: Params) -> State:
    """State before the first step; the optimizer's moments are sharded like the parameters."""
    return State(params, optim.init(optim.make(optimizer, steps), params), jnp.zeros((), jnp.int32))


def sft_step(
    spec: ModelSpec,
    tx: optax.GradientTransformation,
    state: State,
    tokens: Int[Array, "B S"],
    prompt_length: Int[Array, "B"],
    length: Int[Array, "B"],
    answer_length: int,
    *,
    dtype: Any = jnp.float32,
    remat: decoder.Remat = "none",
) -> tuple[State, Step]:
    """One update. A non-finite loss or gradient leaves parameters and optimizer as they were."""
    value, grads = jax.value_and_grad(
        lambda p: loss(spec, p, tokens, prompt_length, length, answer_length, dtype=dtype, remat=remat)
    )(state.params)
    grads = optim.wide(grads)
    norm = optax.tree.norm(grads)
    applied = jnp.isfinite(value) & jnp.isfinite(norm)
    params, opt = optim.apply(tx, grads, state.opt, state.params, applied)
    return State(params, opt, state.step + 1), Step(value, norm, applied)


def run(
    settings: config.WarmStart,
    spec: ModelSpec,
    state: State,
    data: Examples,
    mesh: Mesh,
    *,
    seed: int,
    dtype: Any = jnp.float32,
    remat: decoder.Remat = "none",
    accuracy: Callable[[Params], float] | None = None,
    spent: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[State, Step, float | None]]:
    """Train from `state.step` on, yielding after every step the state, what the step measured, and the held-out greedy
    accuracy where it was checked.

    Ends after `settings.steps`, when `seconds` of wall-clock time are spent, or when `accuracy` reaches `until`. The
    state passed in, and each yielded one once the next is asked for, is donated: save it or copy it before going on.

    Args:
      accuracy: parameters -> held-out greedy accuracy; called every `eval_every` steps when `until` is set.
      spent: seconds that earlier parts of a resumed run took.
    Raises ValueError when the mesh does not divide the batch, or `until` is set without `accuracy`.
    """
    if settings.until is not None and accuracy is None:
        raise ValueError(f"warmstart.until={settings.until}: needs a task with held-out problems")
    layout = batch_sharding(mesh)
    ways = mesh.shape["dp"] * mesh.shape["fsdp"]
    if settings.batch % ways:
        raise ValueError(f"warmstart.batch={settings.batch}: expected a multiple of the mesh's dp x fsdp = {ways}")
    tx = optim.make(settings.optimizer, settings.steps)
    step = jax.jit(
        partial(sft_step, spec, tx, dtype=dtype, remat=remat),
        static_argnames="answer_length",
        donate_argnums=0,
        compiler_options=in_place(target.of(mesh).platform),
    )
    began = clock() - spent
    for i in range(int(state.step), settings.steps):
        chosen = batch_indices(len(data.length), settings.batch, seed, i)
        rows = [processes.put(x[chosen], layout) for x in (data.tokens, data.prompt_length, data.length)]
        with jax.set_mesh(mesh):
            state, measured = step(state, *rows, answer_length=data.answer_length)
        reached = None
        if settings.until is not None and accuracy is not None and (i + 1) % settings.eval_every == 0:
            reached = accuracy(state.params)
        yield state, measured, reached
        if reached is not None and settings.until is not None and reached >= settings.until:
            return
        if settings.seconds is not None and processes.from_lead(lambda: clock() - began, "a clock") >= settings.seconds:
            return
