"""The rollout engine against plain teacher-forced forward passes of tiny models."""

import json
import weakref
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm import config
from jaxrl_llm.models import attention, decoder
from jaxrl_llm.models.attention import causal
from jaxrl_llm.rollout import decode
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.lanes import Cache, joined
from jaxrl_llm.rollout.rows import STOP_LENGTH, STOP_STRING, STOP_TOKEN
from jaxrl_llm.rollout.sampling import truncate
from jaxrl_llm.sharding import rules, target
from jaxrl_llm.sharding.mesh import make_mesh

DATA = Path(__file__).parents[2] / "shared" / "data"
SPEC = tiny.spec("qwen3", num_hidden_layers=2)
PROMPT, NEW = 12, 10
CONTEXTS = [tiny.tokens(1, n, seed=n)[0] for n in (1, 12, 4, 7, 3)]
COUNTS = [3, 1, 0, 5, 4]


def sharp(spec, seed=0):
    """Parameters with varied next-token distributions."""
    params = tiny.params(spec, seed)
    name = "embed" if spec.tied else "unembed"
    return {**params, name: params[name] * 2}


PARAMS = sharp(SPEC)


def engine(spec=SPEC, params=PARAMS, mesh=None, **settings):
    made = Engine(spec, mesh or make_mesh(), **{"max_prompt": PROMPT, "max_new": NEW, "slots": 4, **settings})
    made.set_weights(params, version=7)
    return made


@pytest.fixture(scope="module")
def plain():
    return engine()


@partial(jax.jit, static_argnums=0)
def all_logits(spec, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.forward(spec, params, tokens, positions, causal(), dtype=params["norm"].dtype)
    return hidden @ decoder.unembed(spec, params)


def teacher_forced(contexts, answers, spec=SPEC, params=PARAMS, rows=32, width=PROMPT + NEW):
    """Logits [rows, NEW, V] that the completions' tokens were drawn from, and the tokens; padded to fixed shapes."""
    pairs = [(context, c.tokens) for context, completions in zip(contexts, answers) for c in completions]
    assert len(pairs) <= rows
    tokens, completion, start = np.zeros((rows, width), np.int32), np.zeros((rows, NEW), np.int32), np.zeros(rows, int)
    for i, (context, new) in enumerate(pairs):
        tokens[i, : len(context) + len(new)] = np.concatenate([context, new])
        completion[i, : len(new)] = new
        start[i] = len(context) - 1
    logits = all_logits(spec, params, tokens)
    return np.take_along_axis(np.asarray(logits), (start[:, None] + np.arange(NEW))[..., None], 1), completion


@jax.jit
def reference_logps(logits, tokens, tau, sampling_tau, top_k, top_p, min_p):
    """policy_logp and sampler_logp [rows, NEW] from logits."""

    def one(logits, tokens, tau, *sampling):
        full = jax.nn.log_softmax(logits / tau, -1)
        kept = jax.nn.log_softmax(truncate(logits, *(jnp.full(NEW, x) for x in sampling)), -1)
        return tuple(jnp.take_along_axis(x, tokens[:, None], -1)[:, 0] for x in (full, kept))

    return jax.vmap(one, (0, 0, None, 0, None, None, None))(logits, tokens, tau, sampling_tau, top_k, top_p, min_p)


def assert_logps_are_teacher_forced(
    contexts, answers, tau=1.0, rule=(0, 1.0, 0.0), params=PARAMS, spec=SPEC, temperature=None
):
    logits, tokens = teacher_forced(contexts, answers, spec, params)
    temperature = np.full(len(logits), tau, np.float32) if temperature is None else temperature
    policy, sampler = reference_logps(logits, tokens, tau, temperature, *rule)
    for i, c in enumerate(flat(answers)):
        n = len(c.tokens)
        np.testing.assert_allclose(c.policy_logp, policy[i, :n], atol=1e-5)
        np.testing.assert_allclose(c.sampler_logp, sampler[i, :n], atol=1e-5)


def flat(answers):
    return [c for completions in answers for c in completions]


def assert_same(a, b, margins, atol=1e-5):
    """The margin rule: equal log-probs, and equal tokens unless some choice was closer than 1e-5."""
    assert len(a) == len(b) == len(margins)
    sure = margins > 1e-5
    assert sure.mean() > 0.7
    for x, y in [(x, y) for x, y, s in zip(a, b, sure) if s]:
        np.testing.assert_array_equal(x.tokens, y.tokens)
        np.testing.assert_allclose(x.policy_logp, y.policy_logp, atol=atol)
        np.testing.assert_allclose(x.sampler_logp, y.sampler_logp, atol=atol)
        assert x.stop == y.stop


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"])
def test_greedy_is_the_argmax_of_a_plain_forward_pass(family):
    spec = tiny.spec(family)
    params = sharp(spec, 3)
    made = engine(spec, params, temperature=0.0)
    answers = made.generate(CONTEXTS, [1] * len(CONTEXTS), seed=0, step=0)
    logits, _ = teacher_forced(CONTEXTS, answers, spec, params)
    for i, c in enumerate(flat(answers)):
        np.testing.assert_array_equal(c.tokens, logits[i].argmax(-1))
        assert len(c.tokens) == NEW and c.stop == STOP_LENGTH and c.version == 7
        assert (c.sampler_logp == 0).all()
        np.testing.assert_allclose(c.policy_logp, jax.nn.log_softmax(logits[i])[np.arange(NEW), c.tokens], atol=1e-5)


@pytest.fixture(scope="module")
def cool():
    return engine(temperature=0.8)


@pytest.mark.parametrize("rule", [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (9, 0.9, 0.02)])
def test_both_logps_are_those_of_a_teacher_forced_pass(cool, rule):
    answers = cool.generate(CONTEXTS, COUNTS, seed=1, step=2, top_k=rule[0], top_p=rule[1], min_p=rule[2])
    assert [len(a) for a in answers] == COUNTS
    assert_logps_are_teacher_forced(CONTEXTS, answers, 0.8, rule)


def test_policy_logp_is_at_the_default_temperature_whatever_the_call_samples_at(plain):
    answers = plain.generate(CONTEXTS, [2, 2, 1, 2, 2], seed=0, step=0, temperature=[0.5, 2.0, 0.0, 1.0, 0.7])
    taus = np.ones(32, np.float32)
    taus[:9] = [0.5, 0.5, 2, 2, 1, 1, 1, 0.7, 0.7]
    greedy = answers[2][0]
    assert (greedy.sampler_logp == 0).all()
    answers[2][0] = greedy._replace(sampler_logp=greedy.policy_logp)
    assert_logps_are_teacher_forced(CONTEXTS, answers, temperature=taus)


def test_two_streams_on_a_cpu_write_what_one_does(plain):
    counts = [9, 1, 3, 9, 10]  # a context's rows are in both streams
    limits = [3, 10, 1, 7, 5]
    two = engine(slots=16)
    assert [len(shards[0]) for shards in two._streams(sum(counts))] == [16, 16]
    assert len(plain._streams(sum(counts))) == len(two._streams(15)) == 1
    told: dict[int, int] = {}
    got = two.generate(
        CONTEXTS, counts, seed=6, step=2, max_new=limits, on_finished=lambda i, c: told.update({i: len(c.tokens)})
    )
    want = plain.generate(CONTEXTS, counts, seed=6, step=2, max_new=limits)
    assert_same(flat(got), flat(want), plain.stats["item_margins"])
    assert told == {i: len(c.tokens) for i, c in enumerate(flat(got))}
    assert two.stats["tokens"] == sum(told.values()) and two.stats["item_margins"].shape == (32,)
    assert_logps_are_teacher_forced(CONTEXTS, got)
    compiled = two.compilations
    two.generate(CONTEXTS, counts, seed=7, step=2, max_new=limits)
    assert two.compilations == compiled, "both run the same programs"


@pytest.mark.parametrize("tied", [True, False])
def test_off_a_cpu_weights_lie_as_in_training_and_the_answers_are_the_same(tied, monkeypatch):
    spec = tiny.spec("qwen3", num_hidden_layers=2, tie_word_embeddings=tied)
    params = sharp(spec, 4)
    with monkeypatch.context() as patch:
        patch.setattr(target, "of", lambda mesh: target.Target("gpu", "some"))
        elsewhere = engine(spec, params)
    here = engine(spec, params)
    assert here.settings.turned and not elsewhere.settings.turned
    assert ("unembed" in here._weights) == (not tied), "one copy of a tied embedding"
    up = [made._weights["layers"][0]["up"].shape for made in (here, elsewhere)]
    assert up == [(spec.mlp, spec.embed), (spec.embed, spec.mlp)]
    got, want = (made.generate(CONTEXTS, COUNTS, seed=3, step=1) for made in (here, elsewhere))
    assert_same(flat(got), flat(want), elsewhere.stats["item_margins"])
    assert_logps_are_teacher_forced(CONTEXTS, want, params=params, spec=spec)


@pytest.mark.parametrize("axis", ["fsdp", "tp"])
def test_several_devices_have_one_stream(axis):
    """Two threads would not start their programs in the same order on all devices."""
    assert len(engine(slots=16, mesh=make_mesh(config.Mesh(**{"fsdp": 1, axis: 2})))._streams(64)) == 1


def test_nothing_cached_survives_a_weight_update(plain):
    before = plain.generate(CONTEXTS, COUNTS, seed=0, step=0)
    newer = sharp(SPEC, 5)
    plain.set_weights(newer, version=8)
    after = plain.generate(CONTEXTS, COUNTS, seed=0, step=0)
    plain.set_weights(PARAMS, version=7)
    assert_logps_are_teacher_forced(CONTEXTS, before)
    assert_logps_are_teacher_forced(CONTEXTS, after, params=newer)
    assert {c.version for c in flat(after)} == {8}


def test_a_row_does_not_depend_on_slots_batch_mates_or_bucket(plain):
    together = flat(plain.generate(CONTEXTS, COUNTS, seed=4, step=1))
    margins = plain.stats["item_margins"]
    wide = engine(slots=16)
    assert_same(together, flat(wide.generate(CONTEXTS, COUNTS, seed=4, step=1)), margins)
    invariant = engine(slots=6, batch_invariant=True)
    assert_same(together, flat(invariant.generate(CONTEXTS, COUNTS, seed=4, step=1)), margins)
    # Alone: other buckets of contexts and items, and other mates.
    for i in (1, 3):
        first, n = sum(COUNTS[:i]), COUNTS[i]
        alone = plain.generate([CONTEXTS[i]], [n], seed=4, step=1, first_item=first)
        assert_same(together[first : first + n], alone[0], margins[first : first + n])


def test_samples_differ_between_items_steps_and_seeds_and_repeat_otherwise(plain):
    def tokens(**kw):
        return [tuple(c.tokens) for c in flat(plain.generate([CONTEXTS[3]], [6], **kw))]

    base = tokens(seed=0, step=0)
    assert len(set(base)) == 6
    assert tokens(seed=0, step=0) == base
    assert tokens(seed=0, step=0, first_item=2)[:4] == base[2:]
    assert not set(base) & {*tokens(seed=1, step=0), *tokens(seed=0, step=1)}


def test_first_tokens_have_the_frequencies_of_the_model():
    made = engine(max_new=1, slots=64)
    draws = 3000
    (answers,) = made.generate([CONTEXTS[2]], [draws], seed=0, step=0)
    counts = np.bincount([c.tokens[0] for c in answers], minlength=SPEC.vocab)
    p = np.asarray(jax.nn.softmax(teacher_forced([CONTEXTS[2]], [answers[:1]])[0][0, 0]), np.float64)
    common = p * draws >= 5
    observed, expected = (
        np.append(counts[common], counts[~common].sum()),
        np.append(p[common], p[~common].sum()) * draws,
    )
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert chi2 < len(observed) + 4 * np.sqrt(2 * len(observed))


@pytest.fixture(scope="module")
def stopping():
    """Stops on a fifth of the tokens, the padding token among them; the host looks every 7 steps."""
    return engine(eos_ids=(0, 3, 4, 5, 6, 7), chunk=7)


def test_slots_are_refilled_until_many_more_items_than_slots_are_done(stopping):
    counts = [13, 1, 9, 0, 7]
    seen = {}
    answers = stopping.generate(
        CONTEXTS, counts, seed=0, step=0, on_finished=lambda i, c: seen.setdefault(i, []).append(c)
    )
    assert [len(a) for a in answers] == counts
    assert_logps_are_teacher_forced(CONTEXTS, answers)
    lengths = [len(c.tokens) for c in flat(answers)]
    assert len(set(lengths)) > 3
    assert stopping.stats["tokens"] == sum(lengths)
    assert stopping.stats["slot_utilisation"] > 0.8
    assert stopping.stats["steps"] > 2 * NEW, "the ring of own tokens went round"
    assert [seen[i] for i in range(sum(counts))] == [[c] for c in flat(answers)], "each was announced once"


def test_stop_tokens_end_a_completion_and_are_kept(plain, stopping):
    ends = set()
    for limit in (NEW, 2):
        long = flat(plain.generate(CONTEXTS, COUNTS, seed=0, step=3, max_new=limit))
        for x, y in zip(long, flat(stopping.generate(CONTEXTS, COUNTS, seed=0, step=3, max_new=limit))):
            hits = np.flatnonzero(np.isin(x.tokens, (0, 3, 4, 5, 6, 7)))
            end = hits[0] + 1 if len(hits) else limit
            np.testing.assert_array_equal(y.tokens, x.tokens[:end])
            assert y.stop == (STOP_TOKEN if len(hits) else STOP_LENGTH)
            ends |= {
                "pad" if y.tokens[-1] == 0 else "other",
                "at the limit" if len(hits) and end == limit else "before",
            }
    assert ends == {"pad", "other", "at the limit", "before"}


def test_stop_strings_end_a_completion_with_the_token_that_completes_them(plain):
    rng = np.random.default_rng(0)
    pieces = ["".join(rng.choice(list("ab"), rng.integers(1, 4))).encode() for _ in range(SPEC.vocab)]
    strings = ["abba", "bbbb"]
    made = engine(stop_strings=strings, pieces=pieces)
    kinds = set()
    for x, y in zip(
        flat(plain.generate(CONTEXTS, COUNTS, seed=0, step=3)),
        flat(made.generate(CONTEXTS, COUNTS, seed=0, step=3)),
    ):
        texts = [b"".join(pieces[t] for t in x.tokens[: i + 1]).decode() for i in range(NEW)]
        hits = [i for i, text in enumerate(texts) if any(s in text for s in strings)]
        end = hits[0] + 1 if hits else NEW
        np.testing.assert_array_equal(y.tokens, x.tokens[:end])
        assert y.stop == (STOP_STRING if hits else STOP_LENGTH)
        kinds.add("none" if not hits else "at the end" if texts[end - 1].endswith(tuple(strings)) else "overshoots")
    assert {"at the end", "overshoots"} <= kinds


def test_limits_differ_by_context_without_changing_the_tokens(plain):
    full = plain.generate(CONTEXTS, COUNTS, seed=0, step=0)
    limits = [1, 4, 10, 6, 2]
    for a, b, limit in zip(full, plain.generate(CONTEXTS, COUNTS, seed=0, step=0, max_new=limits), limits):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(y.tokens, x.tokens[:limit])
            assert y.stop == STOP_LENGTH


def test_nothing_compiles_when_temperatures_limits_and_counts_vary(plain):
    plain.generate(CONTEXTS, COUNTS, seed=0, step=0)
    compiled = plain.compilations
    with counting_compilations() as count:
        plain.generate(CONTEXTS, COUNTS, seed=5, step=9, temperature=0.3, max_new=4, first_item=100)
        plain.generate(CONTEXTS, [4, 4, 0, 1, 3], seed=5, step=9, temperature=[0, 1, 2, 3, 0.1])
        plain.generate(CONTEXTS[::-1], COUNTS[::-1], seed=5, step=9, max_new=[1, 2, 3, 4, 5])
        plain.set_weights(sharp(SPEC, 9), version=9)
        plain.generate(CONTEXTS, COUNTS, seed=0, step=0)
        plain.set_weights(PARAMS, version=7)
    assert count == [] and plain.compilations == compiled


class counting_compilations:
    """Names of XLA compilations inside the block."""

    def __enter__(self):
        self.names = []
        self.listener = lambda event, duration, **kw: (
            self.names.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
        )
        jax.monitoring.register_event_duration_secs_listener(self.listener)
        return self.names

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self.listener)


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 2, "tp": 2}], ids=str)
def test_the_experts_of_context_and_completion_are_recorded(sizes):
    spec = tiny.spec("qwen3_moe")
    params, mesh = sharp(spec), make_mesh(config.Mesh(**sizes), jax.devices()[: int(np.prod([*sizes.values()]))])
    split = jax.device_put(params, rules.shardings(decoder.logical_axes(spec), params, mesh))
    answers = engine(spec, split, mesh, record=True, chunk=3, eos_ids=(1, 2, 3)).generate(
        CONTEXTS, COUNTS, seed=0, step=0
    )
    assert len({len(c.tokens) for c in flat(answers)}) > 2
    for context, completions in zip(CONTEXTS, answers):
        for c in completions:
            tokens = np.concatenate([context, c.tokens])[None]
            at = jnp.arange(tokens.shape[1])[None]
            _, kept = decoder.forward(spec, params, tokens, at, causal())
            assert c.routes.dtype == np.int16
            np.testing.assert_array_equal(c.routes, jnp.moveaxis(kept.routes[:, 0], 0, 1)[:-1])


def test_a_model_without_experts_has_none_to_record(plain):
    assert flat(plain.generate(CONTEXTS[:1], [1], seed=0, step=0))[0].routes is None
    with pytest.raises(ValueError, match="record=True: qwen3 has no experts to record"):
        engine(record=True)


def test_a_mesh_splits_experts_and_samples_the_same():
    spec = tiny.spec("qwen3_moe")
    params, sizes = sharp(spec), {"fsdp": 2, "tp": 2}
    mesh = make_mesh(config.Mesh(**sizes), jax.devices()[:4])
    alone = engine(spec, params, slots=8)
    expected = flat(alone.generate(CONTEXTS, COUNTS, seed=0, step=0))
    split = jax.device_put(params, rules.shardings(decoder.logical_axes(spec), params, mesh))
    found = flat(engine(spec, split, mesh, slots=8).generate(CONTEXTS, COUNTS, seed=0, step=0))
    assert_same(expected, found, alone.stats["item_margins"])


@pytest.mark.parametrize("shape", [{"fsdp": 4}, {"fsdp": 2, "tp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_meshes_give_the_same_completions(plain, shape):
    one = flat(plain.generate(CONTEXTS, COUNTS, seed=2, step=2))
    margins = plain.stats["item_margins"]
    mesh = make_mesh(config.Mesh(**{"fsdp": 1, **shape}), jax.devices()[:4])
    params = jax.device_put(PARAMS, rules.shardings(decoder.logical_axes(SPEC), PARAMS, mesh))
    made = engine(params=params, mesh=mesh, slots=16)
    decode_, heads = made._run.decode, set()

    def watched(*args):
        out = slots, *_ = decode_(*args)
        caches = (*(args[2] or ()), *slots.context, *slots.own)  # args[2]: the contexts'
        heads.update(x.data.shape[2] for cache in caches for x in cache.k.addressable_shards)
        return out

    made._run = made._run._replace(decode=watched)
    assert_same(one, flat(made.generate(CONTEXTS, COUNTS, seed=2, step=2)), margins)
    assert heads == {SPEC.kv_heads // shape.get("tp", 1)}


def test_a_hook_sets_each_temperature_from_the_logits():
    def by_entropy(logits, temperature, state):
        """HAPO's kind: hotter where the policy is unsure."""
        logp = jax.nn.log_softmax(logits, -1)
        entropy = -(jnp.exp(logp) * logp).sum(-1)
        return temperature * jnp.where(entropy > state["threshold"], 1.5, 0.5)

    made = engine(hook=by_entropy)
    state = {"threshold": jnp.float32(1.5)}
    answers = made.generate(CONTEXTS, COUNTS, seed=0, step=0, hook_state=state)
    logits, tokens = teacher_forced(CONTEXTS, answers)
    tau = np.asarray(by_entropy(logits, np.ones(tokens.shape, np.float32), state))
    assert 0.05 < (tau > 1).mean() < 0.95
    for i, c in enumerate(flat(answers)):
        for got, x in ((c.sampler_logp, logits[i] / tau[i, :, None]), (c.policy_logp, logits[i])):
            np.testing.assert_allclose(got, jax.nn.log_softmax(x)[np.arange(NEW), c.tokens], atol=1e-5)


def test_sliding_windows_hide_old_context_and_own_tokens():
    spec = tiny.spec("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=3)
    assert set(spec.windows) == {0, 4}
    params = sharp(spec, 1)
    made = engine(spec, params)
    for counts in (COUNTS, [5, 4, 4, 4, 5]):  # contexts of their own, and shared ones
        answers = made.generate(CONTEXTS, counts, seed=0, step=0)
        assert_logps_are_teacher_forced(CONTEXTS, answers, params=params, spec=spec)


def test_an_engine_in_float64_samples_the_same(plain, x64):
    want = flat(plain.generate(CONTEXTS, COUNTS, seed=3, step=3))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
    made = engine(params=params, dtype=jnp.float64, batch_invariant=True)
    assert_same(want, flat(made.generate(CONTEXTS, COUNTS, seed=3, step=3)), made.stats["item_margins"])


def test_slots_that_share_a_lane_write_what_slots_alone_do(plain):
    counts = [9, 1, 0, 6, 10]  # of one context more than a lane has places
    limits = [3, 10, 1, 7, 5]  # so places and lanes fall free at different times
    shared, alone = engine(), engine(batch_invariant=True)
    got, want = (e.generate(CONTEXTS, counts, seed=3, step=3, max_new=limits) for e in (shared, alone))
    assert shared._shape(CONTEXTS, np.repeat(range(5), counts), streams=1, items=sum(counts)) == (4, (2, 4))
    assert_same(flat(got), flat(want), alone.stats["item_margins"])
    assert_logps_are_teacher_forced(CONTEXTS, got)


def test_decode_attention_is_that_of_the_models(x64):
    rng = np.random.default_rng(0)
    s, kv, r, hd, length, own = 3, 2, 2, 4, 5, 6
    q = jnp.asarray(rng.normal(size=(s, kv * r, hd)))
    k_ctx, v_ctx = (jnp.asarray(rng.normal(size=(s, length, kv, hd))) for _ in range(2))
    k_own, v_own = (jnp.asarray(rng.normal(size=(s, own, kv, hd))) for _ in range(2))
    seen_ctx = np.arange(length) < np.array([[0], [3], [5]])  # an empty context among them
    seen_own = np.arange(own) < np.array([[1], [6], [3]])
    lanes = np.array([0, 2, 2])  # the context of each slot
    seats = (jnp.array([[0, 0], [0, 0], [2, 1]]), jnp.asarray(lanes), jnp.array([1, 1, 0]))
    got = jax.jit(joined, static_argnums=6)(
        q,
        seats,
        Cache(k_ctx.transpose(0, 2, 3, 1), v_ctx.transpose(0, 2, 1, 3)),
        jnp.broadcast_to(seen_ctx[:, None], (s, 2, length)),
        Cache(k_own.transpose(0, 2, 3, 1), v_own.transpose(0, 2, 1, 3)),
        jnp.asarray(seen_own),
        0.3,
    )
    k_ctx, v_ctx = k_ctx[lanes], v_ctx[lanes]
    ctx_mask, own_mask = (jnp.asarray(m)[:, None, None] for m in (seen_ctx[lanes], seen_own))
    parts = [attention.Part(k_ctx, v_ctx, ctx_mask), attention.Part(k_own[:, None], v_own[:, None], own_mask)]
    want = jax.jit(attention.joined, static_argnums=2)(q[:, None, None], parts, 0.3)
    np.testing.assert_allclose(got, want[:, 0, 0], atol=1e-12)


@pytest.mark.parametrize("lanes", [(64, 1), (16, 8)])
def test_the_decode_loop_neither_calls_the_host_nor_copies_its_caches(plain, lanes):
    text, temporaries, caches = lowered(plain, lanes)
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text
    assert temporaries < caches / 2


def lowered(made, lanes):
    spec = made.spec
    slots, columns, items = 64, 512, 64
    settings = made.settings._replace(max_new=512, chunk=4)
    queue = jax.eval_shape(lambda: queue_of(items))
    pool = jax.eval_shape(lambda: decode.idle_slots(spec, jnp.float32, 1, (8, 1), 1, columns, queue_of(items)).context)
    state = jax.eval_shape(
        lambda: decode.idle_slots(spec, jnp.float32, slots, lanes, settings.max_new, columns, queue_of(items))
    )
    weights = made.weight_shapes(PARAMS)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    f = jax.jit(partial(decode.decode, settings, False), donate_argnums=7)
    compiled = f.lower(weights, pool, queue, number, number, None, (), state).compile()
    caches = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.context, state.own)))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= caches  # donated buffers are used again
    return compiled.as_text(), memory.temp_size_in_bytes, caches


def queue_of(items):
    from jaxrl_llm.rollout.sampling import Sampling

    zeros = jnp.zeros(items, jnp.int32)
    floats = jnp.ones(items)
    return decode.Job(
        zeros, zeros, zeros, zeros, zeros, jnp.zeros((items, 2), jnp.uint32), Sampling(floats, zeros, floats, floats)
    )


@pytest.mark.parametrize("name", ["stories260k", "babyllama105"])
def test_greedy_on_a_real_checkpoint_is_the_recorded_text(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here")
    from jaxrl_llm.models import hf

    expected = json.loads((DATA / name / "expected.json").read_text())
    want = np.array(expected["greedy_ids"], np.int32)
    spec, params = hf.load(DATA / name, dtype=jnp.float32)
    bos, new = np.array([spec.bos_id], np.int32), 128
    want = want[want != spec.bos_id][:new] if want[0] == spec.bos_id else want[:new]
    made = engine(spec, params, max_prompt=64, max_new=new, temperature=0.0, slots=4)
    texts = [bos, np.concatenate([bos, want[:40]])]
    for prefix, (c,) in zip(texts, made.generate(texts, [1, 1], seed=0, step=0)):
        rest = want[len(prefix) - 1 :]
        logits = np.sort(all_logits(spec, params, np.append(bos, want)[None])[0, len(prefix) - 1 : -1], -1)
        close = np.flatnonzero(logits[:, -1] - logits[:, -2] < 1e-4)
        sure = min(close[0] if len(close) else len(rest), len(c.tokens))
        assert sure > 20
        np.testing.assert_array_equal(c.tokens[:sure], rest[:sure])


def test_bad_input_is_refused_in_one_line(plain):
    with pytest.raises(ValueError, match="1 to 12"):
        plain.generate([np.zeros(0, np.int32)], [1], seed=0, step=0)
    with pytest.raises(ValueError, match="1 to 12"):
        plain.generate([np.zeros(13, np.int32)], [1], seed=0, step=0)
    with pytest.raises(ValueError, match=r"rollout\.max_new: 11"):
        plain.generate(CONTEXTS[:1], [1], seed=0, step=0, max_new=11)
    with pytest.raises(ValueError, match=r"rollout\.top_p: 0\.0"):
        plain.generate(CONTEXTS[:1], [1], seed=0, step=0, top_p=0.0)
    with pytest.raises(ValueError, match="positions"):
        engine(max_new=100)
    with pytest.raises(ValueError, match=r"rollout\.stop"):
        engine(stop_strings=["x"])
    with pytest.raises(RuntimeError, match="set_weights"):
        Engine(SPEC, make_mesh(), max_prompt=4, max_new=4).generate([], [], seed=0, step=0)


def test_no_items_give_no_completions(plain):
    assert plain.generate([], [], seed=0, step=0) == []
    assert plain.generate(CONTEXTS[:2], [0, 0], seed=0, step=0) == [[], []]


def test_without_weights_there_is_room_for_other_things_and_no_generation():
    made = engine()
    before = made.generate(CONTEXTS, COUNTS, seed=3, step=0)
    held = weakref.ref(made._weights["embed"])
    made.drop_weights()
    assert held() is None
    with pytest.raises(RuntimeError, match="set_weights"):
        made.generate(CONTEXTS, COUNTS, seed=3, step=0)
    made.set_weights(PARAMS, version=8)
    assert [c.tokens.tolist() for c in flat(made.generate(CONTEXTS, COUNTS, seed=3, step=0))] == [
        c.tokens.tolist() for c in flat(before)
    ]
