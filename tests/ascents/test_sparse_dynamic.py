from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import cover

import optax_sam
from optax_sam._ascents import sparse_dynamic

SIZES = {"w": (4, 9), "b": (5,), "s": ()}
TOTAL = 42
PARAMS = {name: jnp.zeros(shape) for name, shape in SIZES.items()}
ABSENT = optax.MaskedNode()


def gradient(seed):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SIZES.items()}


def make(sparsity=0.5, refresh_every=1, decay_steps=10, key=0, **options):
    return optax_sam.sparsify_dynamically(
        sparsity,
        refresh_every=refresh_every,
        decay_steps=decay_steps,
        key=key,
        **options,
    )


def flat(tree):
    return np.concatenate([np.ravel(tree[name]) for name in SIZES])


@cover(grow_by=["random", "gradient"], sparsity=[0.0, 0.1, 0.2, 0.5, 0.8, 0.97, 1.0])
def test_density_is_constant_at_every_step_and_sparsity(sparsity, grow_by):
    link = make(sparsity, grow_by=grow_by, drop_fraction=0.9, decay_steps=30)
    state, update = link.init(PARAMS), jax.jit(link.update)
    for step in range(12):
        assert flat(state.mask).sum() == int(TOTAL * (1 - Fraction(str(sparsity))))
        masked, new = update(gradient(step), state)
        np.testing.assert_array_equal(flat(masked) != 0, flat(state.mask))
        state = new


@pytest.mark.parametrize("kept", [16_777_217, 16_777_219, 2**31 + 255, 2**32 - 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_more_are_dropped_than_are_kept(kept, share):
    """Counts above 2**24 have no float32."""
    for free in (1, 25_165_829, 2**32 - 1 - kept):
        counts = jnp.uint32(kept), jnp.uint32(free), jnp.float32(share)
        stay, grown = map(int, sparse_dynamic._counts(*counts))
        assert stay + grown == kept
        assert grown <= free
        assert grown == pytest.approx(min(Fraction(share) * kept, free), rel=2**-23)


@pytest.mark.parametrize("drop_by", ["gradient", "weight"])
def test_drops_the_smallest_and_grows_the_largest(drop_by):
    params, grads = gradient(100), gradient(0)
    link = make(0.5, drop_by=drop_by, grow_by="gradient", drop_fraction=0.3)
    state = link.init(PARAMS)
    before = flat(state.mask)
    _, after = link.update(grads, state, params)
    after = flat(after.mask)
    score = np.abs(flat(grads))
    if drop_by == "weight":
        score = np.abs(flat(params) + np.where(before, flat(grads), 0))
    dropped, grown = before & ~after, ~before & after
    assert dropped.sum() == grown.sum() == int(0.3 * 21)
    assert score[dropped].max() < score[before & after].min()
    growth = np.abs(flat(grads))
    assert growth[grown].min() > growth[~before & ~after].max()


def test_growth_is_random_among_those_not_kept_before():
    link = make(0.5, drop_fraction=1.0)
    state = link.init(PARAMS)
    _, after = jax.jit(link.update)(gradient(0), state)
    np.testing.assert_array_equal(flat(after.mask), ~flat(state.mask))
    counts, update = np.zeros(TOTAL), jax.jit(make(0.5, drop_fraction=0.5).update)
    for key in range(60):
        data = jax.random.key_data(jax.random.key(key))
        _, after = update(gradient(0), state._replace(key=data))
        counts += flat(after.mask)
    grown = counts[~flat(state.mask)]  # 10 of 21 in each of 60 draws.
    assert grown.sum() == 600
    assert np.abs(grown - 600 / 21).max() < 4.5 * (60 * 10 / 21 * 11 / 21) ** 0.5


def test_the_share_dropped_follows_a_cosine_and_ends():
    link = make(0.5, decay_steps=10, drop_fraction=0.8)
    state, update = link.init(PARAMS), jax.jit(link.update)
    for step in range(13):
        _, after = update(gradient(step), state)
        share = 0.4 * (1 + np.cos(np.pi * min(step, 10) / 10))
        dropped = int((flat(state.mask) & ~flat(after.mask)).sum())
        assert dropped == int(np.float32(share) * 21)
        state = after


def test_refreshes_after_every_so_many_steps_and_the_first():
    link = make(refresh_every=3, drop_fraction=optax.constant_schedule(0.5))
    state, update = link.init(PARAMS), jax.jit(link.update)
    for step in range(7):
        _, after = update(gradient(step), state)
        changed = np.any(flat(after.mask) != flat(state.mask))
        assert changed == (step % 3 == 0)
        assert after.count == step + 1
        assert after.since == step - step % 3 + 1  # Its mask is that of the next step.
        state = after


def test_the_perturbed_pass_waits_for_the_refresh():
    """Else compilers may put it off to where most of the memory is in use."""
    link = make()
    jaxpr = jax.make_jaxpr(link.update)(gradient(0), link.init(PARAMS)).jaxpr
    (refresh,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    masked = jaxpr.outvars[: len(SIZES)]
    assert set(masked) <= set(refresh.outvars)


def test_updates_of_zero_tell_nothing():
    link = make()
    state = link.init(PARAMS)
    _, after = link.update(PARAMS, state)
    problems.assert_trees_equal(after.mask, state.mask)


def test_first_masks_depend_on_the_key_alone():
    masks = [flat(make(key=key).init(PARAMS).mask) for key in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert np.any(masks[0] != masks[2])
    for key in (jax.random.key(0), jax.random.PRNGKey(0), np.int64(0)):
        np.testing.assert_array_equal(flat(make(key=key).init(PARAMS).mask), masks[0])


def test_first_mask_is_drawn_from_all_entries():
    init = jax.jit(lambda key: make(0.5, key=key).init(PARAMS).mask)
    counts = sum(flat(init(key)).astype(int) for key in range(60))
    assert counts.sum() == 60 * 21
    assert np.abs(counts - 30).max() < 4.5 * 15**0.5


def test_absent_leaves_take_no_part():
    link = make(drop_fraction=0.5)
    state = link.init(PARAMS)
    masked, after = link.update(gradient(0) | {"w": ABSENT}, state)
    assert masked["w"] == ABSENT
    problems.assert_trees_equal(after.mask["w"], state.mask["w"])
    kept = sum(int(after.mask[n].sum()) for n in ("b", "s"))
    assert kept == sum(int(state.mask[n].sum()) for n in ("b", "s"))


def test_ranks_by_weight_need_parameters():
    link = make(drop_by="weight")
    with pytest.raises(ValueError, match="sparsify_dynamically: params is missing"):
        link.update(gradient(0), link.init(PARAMS))


def test_masks_that_do_not_fit():
    state = make().init(PARAMS)
    wrong = state._replace(mask=state.mask | {"b": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match=r"state.mask\['b'\] has shape \(3,\)"):
        make().update(gradient(0), wrong)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"sparsity = 1.5 is out of range", {"sparsity": 1.5}),
        (TypeError, "sparsity must be a Python number", {"sparsity": "half"}),
        (ValueError, "refresh_every = 0 is out of range", {"refresh_every": 0}),
        (ValueError, "decay_steps = 0 is out of range", {"decay_steps": 0}),
        (TypeError, "decay_steps must be an integer", {"decay_steps": 10.0}),
        (ValueError, "drop_fraction = 1.5", {"drop_fraction": 1.5}),
        (ValueError, "drop_by = 'fisher' is unknown", {"drop_by": "fisher"}),
        (ValueError, "grow_by = 'weight' is unknown", {"grow_by": "weight"}),
        (TypeError, "key must be", {"key": 0.5}),
    ],
)
def test_bad_arguments(error, message, options):
    with pytest.raises(error, match=message):
        make(**options)
