"""Routing replay: the experts a row's tokens went to, recorded once and used again in every update on that row.

Recorded by the learner's forward with the old policy ("R2"), replay keeps the model that is updated close to the one that
sampled; recorded by the engine ("R3"), it also does away with what their routing differs in, and the old log-probs are taken
under replay too. Router weights always come from the current parameters. Names and rules as in MiniRL, arXiv 2512.01374:

                        none    old (R2)     rollout (R3)
    sampler_logp        own     own          own, records
    old_logp            own     records      replays
    logp of updates     own     replays      replays

`Rollouts.extras["routes"]` is [B, L + T, M, k]: positions of the context, then of the completion; M layers with experts, k
experts of a token. -1 where nothing was recorded: there the router chooses.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_llm.models.experts import ROUTE
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.training.layouts import Piece
from jaxrl_llm.types import ROUTES, Rollouts


def empty(spec: ModelSpec, rows: Rollouts) -> Int[Array, "B S M k"]:
    """Nothing recorded of these rows."""
    positions = rows.prompt_tokens.shape[1] + rows.tokens.shape[1]
    return jnp.full((len(rows.tokens), positions, *spec.routes), -1, ROUTE)


def replayed(rows: Rollouts | None, piece: Piece) -> Int[Array, "M n S k"] | None:
    """The recorded experts of a piece's places, as `decoder.forward` replays them; None where rows bring none."""
    if rows is None or ROUTES not in rows.extras:
        return None
    recorded = rows.extras[ROUTES]
    flat = recorded.reshape(-1, *recorded.shape[2:])
    return jnp.moveaxis(flat.at[piece.origin].get(mode="fill", fill_value=-1), 2, 0)


def shared(routes: Int[Array, "B S M k"], rows: Rollouts) -> Int[Array, "B S M k"]:
    """Recorded experts with those of a context given to all its rows; the shared layout runs it for one of them."""
    count, context = len(routes), rows.prompt_tokens.shape[1]
    own, has = jnp.arange(count), routes[:, 0, 0, 0] >= 0
    first = jax.ops.segment_min(jnp.where(has, own, count), rows.prompt, rows.prompt_tokens.shape[0])
    source = jnp.where(has, own, first[rows.prompt])
    contexts = routes[:, :context].at[source].get(mode="fill", fill_value=-1)
    return jnp.concatenate([contexts, routes[:, context:]], axis=1)
