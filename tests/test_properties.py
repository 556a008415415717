"""What holds for any parameters, hyperparameters, chain and batch: generated cases.

How many for each test is in the profile of the tier, see conftest. Hypothesis draws
values and hyperparameters, which a compiled step takes as arguments, so that all cases
of a chain share one program; chains themselves are enumerated.
"""

import functools
import itertools
from typing import Any, NamedTuple

import hypothesis.extra.numpy as numpy_strategies
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import optax_sam

BATCH = 8
PRECISION = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


class Hyperparameters(NamedTuple):
    rho: Any
    theta: Any
    strength: Any


def matrices(params):
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def fisher(sparsity):
    return optax_sam.sparsify_by_fisher(
        optax_sam.unstructured(sparsity), refresh_every=2, num_examples=BATCH
    )


def dynamic(sparsity):
    return optax_sam.sparsify_dynamically(
        sparsity, refresh_every=2, decay_steps=10, key=0
    )


LINKS = {
    "reweight": lambda h: optax_sam.reweight_by_sharpness(
        h.strength, key=0, estimator="jvp"
    ),
    "average": lambda h: optax_sam.suppress_variance(h.theta),
    "radius": lambda h: optax_sam.scale_to_radius(h.rho),
    "adapt": lambda h: optax_sam.adapt_to_scale(h.rho),
    "static": lambda h: optax_sam.perturb_only(matrices),
    "fisher": lambda h: fisher(0.5),
    "dynamic": lambda h: dynamic(0.5),
    "rest": lambda h: optax_sam.remove_common_direction(h.theta, 0.5),
    "ahead": lambda h: optax_sam.follow_momentum(h.rho),
    "kept": lambda h: optax_sam.follow_average(),
}
# What leaves the direction as it is.
NEUTRAL = LINKS | {
    "static": lambda h: optax_sam.perturb_only(True),
    "fisher": lambda h: fisher(0.0),
    "dynamic": lambda h: dynamic(0.0),
    "rest": lambda h: optax_sam.remove_common_direction(0.0),
}
SCALES, MASKS = ("radius", "adapt", "ahead"), ("static", "fisher", "dynamic")
REPLACING = ("reweight", "ahead", "kept")  # The gradient, which they do not read.


def is_legal(links):
    """One scale and a mask at most; what replaces the gradient before all but a mask.

    ASAM's scale has its place where SAM's has, and is tried in shorter chains, as are
    directions in place of VaSSO's, of which one is enough.
    """
    scales, masks, replacing = (
        {*links} & {*kind} for kind in (SCALES, MASKS, REPLACING)
    )
    before = links[: links.index(*replacing)] if len(replacing) == 1 else ()
    long = {*links} & {"adapt", "rest", "ahead", "kept"}
    directions = {*links} & {"average", "rest", "ahead", "kept"}
    return (
        len(scales) == 1
        and len(masks) < 2
        and len(replacing) < 2
        and {*before} <= {"static"}
        and not (long and len(links) > 3 - ("adapt" in links))
        and len(directions) < 2
    )


CHAINS = [
    " ".join(links)
    for num in range(1, 5)
    for links in itertools.permutations(LINKS, num)
    if is_legal(links)
]


def is_one_pass(chain):
    """Whether it is along something the base keeps, which is zero at first."""
    return not {"ahead", "kept"}.isdisjoint(chain.split())


def reports_perturbed_pass(chain):
    """Whether it reads nothing of the clean pass, whose losses Fisher scores are of."""
    return is_one_pass(chain) and "fisher" not in chain.split()


f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16
TREES = {
    "nested": {
        "a": [((3, 4), f32), (((), f32), None)],
        "b": {"c": ((5,), bf16), "d": ((2, 2), f32)},
        "e": {},
    },
    "array": ((4, 3), f32),
    "layers": {"w": ((3, 2, 4), f32), "b": ((4,), f32), "g": ((2,), f32)},
    "half": (((4, 4), f16), ((2,), f32), ((0, 3), f32)),
}


def in_default_tier(values, chosen):
    return [
        pytest.param(x, marks=() if x in chosen else pytest.mark.full, id=str(x))
        for x in values
    ]


def is_spec(node):
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], type(f32))


def is_absent(node):
    return isinstance(node, optax.MaskedNode)


def tree_of(chain):
    """A tree for each chain, all of them in turn."""
    specs = list(TREES.values())
    return specs[CHAINS.index(chain) % len(specs)]


def draw_tree(spec, seed, scale, leading=()):
    """Normal numbers, on the host, of the shapes and dtypes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(scale * rng.normal(size=(*leading, *x[0])), x[1]),
        spec,
        is_leaf=is_spec,
    )


@jax.custom_jvp
def rounded(x):
    return jnp.round(1024 * x) / 1024


rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))


def losses(params, batch):
    """Huber's, of any scale.

    Their gradients are sums of multiples of 2**-10, exact in any order, so that two
    programs give the same bits however compilers add up.
    """
    points, scale = batch

    def of_leaf(w, x):
        distances = rounded(jnp.asarray(w)[None].astype(f32) - x.astype(f32))
        each = optax.losses.huber_loss(distances)
        return jnp.sum(each, axis=tuple(range(1, each.ndim)))

    terms = jax.tree.leaves(jax.tree.map(of_leaf, params, points))
    return scale * sum(terms)


BASES = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2, eps=1e-4),  # The default is zero in float16.
    "lion": lambda: optax.lion(1e-3),
}


def base_of(chain):
    """A base for each chain, all of them in turn."""
    return list(BASES)[CHAINS.index(chain) // len(TREES) % len(BASES)]


def remember():
    """A last link, whose state is the perturbation, zeros where leaves are absent.

    In the parameters' dtypes: an average is in float32, if nothing scales it.
    """

    def update_fn(updates, state, params=None):
        del params
        return updates, jax.tree.map(
            lambda zero, e: 0 * zero if is_absent(e) else e.astype(zero.dtype),
            state,
            updates,
        )

    return optax.GradientTransformation(optax.tree.zeros_like, update_fn)


def base_optimizer(chain, base, theta=0.5):
    """With an average of what it descends along, if that is what a chain ascends by."""
    if "kept" in chain:
        return optax.chain(optax_sam.keep_average(theta), BASES[base]())
    return BASES[base]()


def optimizer(chain, base, links, h, **options):
    ascent = optax.chain(*(links[name](h) for name in chain.split()), remember())
    base = base_optimizer(chain, base, h.theta)
    return optax_sam.sharpness_aware(base, ascent, **options)


class Compiled(NamedTuple):
    """A chain around its base, compiled with the hyperparameters as arguments."""

    init: Any
    step: Any


@functools.cache
def compiled(chain, base, neutral=False, over_devices=False, **options):
    links = NEUTRAL if neutral else LINKS

    def step(h, params, opt_state, batch):
        tx = optimizer(chain, base, links, h, **options)
        axis_name = "data" if over_devices else None
        step = optax_sam.value_and_update(losses, tx, axis_name=axis_name)
        value, updates, opt_state = step(params, opt_state, batch)
        return value, updates, opt_state

    def init(params):
        h = Hyperparameters(0.1, 0.1, 0.1)
        return optimizer(chain, base, links, h).init(params)

    if over_devices:
        split = PartitionSpec("data")
        step = jax.shard_map(
            step,
            mesh=meshes.mesh(),
            in_specs=(PartitionSpec(),) * 3 + (split,),
            out_specs=PartitionSpec(),
        )
    return Compiled(jax.jit(init), jax.jit(step))


def displace(p, e):
    return (jnp.asarray(p, f32) + jnp.asarray(e, f32)).astype(p.dtype)


@functools.cache
def compiled_base(chain):
    """A step of the base alone, at a displacement."""
    tx = base_optimizer(chain, base_of(chain))

    def step(params, opt_state, epsilon, batch):
        def losses_there(params, batch):
            return losses(jax.tree.map(displace, params, epsilon), batch)

        step = optax_sam.value_and_update(losses_there, tx)
        return step(params, opt_state, batch)[:2]

    return jax.jit(step)


class Case(NamedTuple):
    """A seed of parameters and batches, which shows shorter than they do."""

    chain: str
    seed: int
    size: float
    h: Hyperparameters
    factor: float = 1.0

    @property
    def params(self):
        return draw_tree(tree_of(self.chain), self.seed, self.size)

    @property
    def batches(self):
        spec, scale = tree_of(self.chain), np.full(BATCH, self.factor, np.float32)
        return [(draw_tree(spec, self.seed + i, 1, (BATCH,)), scale) for i in (1, 2)]

    def scaled(self, factor):
        """With losses times a factor, and what has their unit with them."""
        strength = np.float32(self.h.strength / (factor or 1))
        return self._replace(factor=factor, h=self.h._replace(strength=strength))


@st.composite
def cases(draw, chain, **fixed):
    numbers = {
        "rho": st.just(0.0) | st.floats(2**-10, 2, width=32),
        "theta": st.floats(0, 1, width=32),
        "strength": st.just(0.0) | st.floats(2**-10, 2**10, width=32),
    } | fixed
    h = {name: np.float32(draw(number)) for name, number in numbers.items()}
    seed, size = st.integers(0, 2**32 - 3), st.sampled_from([0.1, 1.0, 20.0])
    return Case(chain, draw(seed), draw(size), Hyperparameters(**h))


@pytest.fixture(autouse=True)
def few_programs():
    """Frees the programs of a test.

    With eight devices each takes a dozen memory maps, of which Linux lets a process
    have 65,530; XLA crashes where it cannot have another.
    """
    yield
    jax.clear_caches()


def train(program, case):
    """The parameters before, value, updates, perturbation and state of every step."""
    params, opt_state = case.params, program.init(case.params)
    for batch in case.batches:
        before, state = params, opt_state
        value, updates, opt_state = program.step(case.h, params, opt_state, batch)
        params = jax.device_get(optax.apply_updates(params, updates))
        yield before, state, value, updates, opt_state.ascent_state[-1], opt_state


def description(tree):
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in leaves]


def precision(tree):
    return max(PRECISION[str(np.asarray(x).dtype)] for x in jax.tree.leaves(tree))


def length(chain, epsilon, params):
    if "adapt" in chain:
        epsilon = jax.tree.map(
            lambda e, p: np.divide(
                np.float64(e),
                np.abs(np.float64(p)),
                out=np.zeros(np.shape(p)),
                where=np.asarray(p) != 0,
            ),
            epsilon,
            params,
        )
    return problems.norm(epsilon)


def check_epsilon(chain, rho, epsilon, params, is_first):
    """Its length and how many entries it has."""
    links = chain.split()
    rho = 0.0 if is_first and is_one_pass(chain) else rho
    after = links[[name in SCALES for name in links].index(True) + 1 :]
    found, tolerance = length(chain, epsilon, params), 2 * precision(params)
    if not after:
        np.testing.assert_allclose(found, rho, rtol=tolerance, atol=1e-6)
    elif not ("adapt" in links and "average" in after) and "rest" not in after:
        # Else it is relative to other weights, or what is removed from it is longer.
        assert found <= rho * (1 + tolerance) + 1e-6
    total = sum(np.size(x) for x in jax.tree.leaves(params))
    if links[-1] in ("fisher", "dynamic"):
        leaves = map(np.count_nonzero, jax.tree.leaves(epsilon))
        assert sum(leaves) <= total // 2
    if "static" in links:
        for e, keep in zip(
            *map(jax.tree.leaves, (epsilon, matrices(params))), strict=True
        ):
            assert keep or not np.any(e)


def check_mask(opt_state, params):
    """Its density and shape."""
    mask = optax.tree.get(opt_state, "mask")
    if mask is not None:
        assert jax.tree.map(np.shape, mask) == jax.tree.map(np.shape, params)
        total = sum(np.size(x) for x in jax.tree.leaves(params))
        assert sum(map(np.sum, jax.tree.leaves(jax.device_get(mask)))) == total // 2


SOME_CHAINS = (
    "radius",
    "static average radius",
    "reweight average radius fisher",
    "dynamic adapt",
    "static ahead",
)


@pytest.mark.parametrize("chain", in_default_tier(CHAINS, SOME_CHAINS))
@given(data=st.data())
def test_a_step_of_any_chain(chain, data):
    case = data.draw(cases(chain))
    base = base_of(chain)
    program, reference = compiled(chain, base), compiled_base(chain)
    tolerance, is_first = 20 * precision(case.params), True
    for (params, state, value, updates, epsilon, after), batch in zip(
        train(program, case), case.batches, strict=True
    ):
        assert description(updates) == description(params)
        assert description(after) == description(state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
        check_epsilon(chain, case.h.rho, epsilon, params, is_first)
        is_first = False
        check_mask(after, params)
        at = functools.partial(reference, params, state.base_state, batch=batch)
        nowhere = optax.tree.zeros_like(epsilon)
        reported = at(epsilon if reports_perturbed_pass(chain) else nowhere)[0]
        np.testing.assert_allclose(value, reported, rtol=tolerance)
        if case.h.rho == 0:
            problems.assert_trees_equal(updates, at(nowhere)[1])
        problems.assert_trees_close(
            updates, at(epsilon)[1], rtol=tolerance, atol=tolerance
        )
    assert program.step._cache_size() == 1


# Without those of three links that one of four has in the same order.
WITHIN_LONGER = {
    " ".join(links)
    for chain in CHAINS
    if chain.count(" ") == 3
    for links in itertools.combinations(chain.split(), 3)
}
FEWER_CHAINS = [chain for chain in CHAINS if chain not in WITHIN_LONGER]


@pytest.mark.parametrize("chain", in_default_tier(FEWER_CHAINS, SOME_CHAINS[2:4]))
@given(data=st.data(), factor=st.sampled_from([0.0] + [2.0**i for i in range(-6, 7)]))
def test_a_factor_of_the_loss_does_not_change_the_perturbation(chain, data, factor):
    case = data.draw(cases(chain))
    program = compiled(chain, base_of(chain))
    # What the base keeps there is only after the first step.
    which = 1 if is_one_pass(chain) and "adapt" not in chain else 0
    plain, scaled = (
        next(itertools.islice(train(program, c), which, None))
        for c in (case, case.scaled(factor))
    )
    (*_, plain, _), (*_, updates, found, after) = plain, scaled
    if factor == 0:
        plain = optax.tree.zeros_like(plain)
    tolerance = 2 * precision(case.params)
    problems.assert_trees_close(
        found, plain, rtol=tolerance, atol=tolerance * case.h.rho
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, after)))


NEUTRAL_CHAINS = [chain for chain in FEWER_CHAINS if " " in chain]
NEUTRAL_DEFAULT = ("static reweight average radius", "adapt fisher")


@pytest.mark.parametrize("chain", in_default_tier(NEUTRAL_CHAINS, NEUTRAL_DEFAULT))
@given(data=st.data())
def test_links_that_change_nothing_change_no_bit(chain, data):
    """And, around every other chain, one micro-batch that is the whole batch."""
    case = data.draw(cases(chain, theta=st.just(1.0), strength=st.just(0.0)))
    size = (None, BATCH)[CHAINS.index(chain) % 2]
    base = base_of(chain)
    program = compiled(chain, base, neutral=True, micro_batch_size=size)
    own = [n for n in chain.split() if n == "kept" or n in SCALES]
    plain = compiled(" ".join(own), base)
    for found, expected in zip(train(program, case), train(plain, case), strict=True):
        problems.assert_trees_equal(found[3], expected[3])


SHORT_CHAINS = [chain for chain in CHAINS if chain.count(" ") < 2]
# Along what the base keeps, all of them ascend as one.
MICRO_CHAINS = [chain for chain in SHORT_CHAINS if not is_one_pass(chain)]


@pytest.mark.parametrize("chain", in_default_tier(MICRO_CHAINS, ("average radius",)))
@given(data=st.data())
def test_micro_batches_ascend_each_for_itself(chain, data):
    """The mean, by hand, of the gradients that each part of the batch leads to."""
    case = data.draw(cases(chain))
    size = BATCH // 4
    program = compiled(chain, base_of(chain), micro_batch_size=size)
    batch, params = case.batches[0], case.params
    *_, updates, _, _ = next(train(program, case))
    by_hand = compiled_by_hand(chain, base_of(chain), size)
    tolerance = 20 * precision(params)
    problems.assert_trees_close(
        updates,
        by_hand(case.h, params, program.init(params), batch),
        rtol=tolerance,
        atol=tolerance,
    )


@functools.cache
def compiled_by_hand(chain, base, size):
    @jax.jit
    def step(h, params, opt_state, batch):
        ascent = optax.chain(*(LINKS[name](h) for name in chain.split()))
        gradients = []
        for i in range(0, BATCH, size):
            part = jax.tree.map(lambda x, i=i: x[i : i + size], batch)
            gradient_at = jax.grad(lambda p, part=part: jnp.mean(losses(p, part)))
            epsilon, _ = ascent.update(
                gradient_at(params),
                opt_state.ascent_state[:-1],
                params,
                loss_fn=losses,
                batch=part,
                scoring_batch=batch,
            )
            displaced = jax.tree.map(
                lambda e, p: p if is_absent(e) else displace(p, e),
                epsilon,
                params,
                is_leaf=is_absent,
            )
            gradients.append(gradient_at(displaced))
        mean = jax.tree.map(
            lambda *g: (sum(x.astype(f32) for x in g) / len(g)).astype(g[0].dtype),
            *gradients,
        )
        return BASES[base]().update(mean, opt_state.base_state, params)[0]

    return step


@pytest.mark.parametrize("chain", in_default_tier(SHORT_CHAINS, ()))
@given(data=st.data())
def test_eight_devices_are_one(chain, data):
    case = data.draw(cases(chain))
    here, there = (
        compiled(chain, base_of(chain), over_devices=over) for over in (False, True)
    )
    tolerance = 20 * precision(case.params)
    for one, eight in zip(train(here, case), train(there, case), strict=True):
        problems.assert_trees_close(
            eight[2:5], one[2:5], rtol=tolerance, atol=tolerance
        )


LARGEST = {f32: 2.0**127, bf16: 2.0**127, f16: 2.0**15}
SMALLEST = {f32: 2.0**-126, bf16: 2.0**-126, f16: 2.0**-14}


@st.composite
def leaves(draw):
    """Any numbers of a dtype but those below its normal ones, which CPUs may drop."""
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 3), (0, 2)]))
    dtype = draw(st.sampled_from(list(LARGEST)))
    sizes = st.floats(SMALLEST[dtype], LARGEST[dtype], width=32)
    numbers = st.just(0.0) | sizes | sizes.map(lambda x: -x)
    return draw(numpy_strategies.arrays(np.float32, shape, elements=numbers)).astype(
        dtype
    )


def trees():
    def nodes(children):
        lists = st.lists(children, max_size=3)
        return lists | lists.map(tuple) | st.dictionaries(st.text("ab"), children)

    return st.recursive(st.none() | leaves(), nodes, max_leaves=6)


def zeros_of(tree):
    return jax.tree.map(np.zeros_like, tree)


@given(grads=trees(), rho=st.just(0.0) | st.floats(2**-10, 8, width=32))
def test_any_gradient_is_scaled_to_the_radius(grads, rho):
    """Also where squares overflow or underflow, and in mixed dtypes."""
    ascent = optax_sam.scale_to_radius(rho)
    epsilon, _ = ascent.update(grads, ascent.init(grads))
    assert description(epsilon) == description(grads)
    expected = rho if problems.norm(grads) else 0.0
    tolerance = 2 * max([0.0, *map(precision, jax.tree.leaves(grads))])
    np.testing.assert_allclose(problems.norm(epsilon), expected, rtol=tolerance)
    for e, g in zip(*map(jax.tree.leaves, (epsilon, grads)), strict=True):
        assert np.all(np.float64(e) * np.float64(g) >= 0)


@given(params=st.tuples(trees()), rho=st.floats(2**-10, 8, width=32))
def test_a_step_on_any_tree(params, rho):
    """Down the gradient w of |w|^2 / 2 at w + epsilon, which is along w."""
    params = jax.tree.map(lambda x: np.clip(x, -100, 100).astype(x.dtype), params)
    tx = optax_sam.sam(optax.sgd(1.0), rho)
    state = tx.init(params)
    updates, after = tx.update(params, state, params, grad_fn=lambda p: p)
    assert description(updates) == description(params)
    assert description(after) == description(state)
    size = problems.norm(params)
    tolerance = 2 * max([0.0, *map(precision, jax.tree.leaves(params))])
    expected = size + rho if size else 0.0
    np.testing.assert_allclose(problems.norm(updates), expected, rtol=tolerance)


DESCENTS = {
    "gap": optax_sam.gap_descent,
    "weighted": lambda x: optax_sam.weighted_descent(0.9 * x),
    "reuse": optax_sam.reuse_ascent,
    "keep": optax_sam.keep_average,
}


@functools.cache
def compiled_descent(name):
    """Descents of an ascent, and of a step after it that does not ascend."""

    def steps(x, pairs, factor):
        link = DESCENTS[name](x)
        pairs = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), pairs)
        state = link.init(pairs[0])
        first, state = link.update(pairs[0], state, grad=pairs[1], ascended=True)
        after, state = link.update(pairs[2], state, grad=pairs[2], ascended=False)
        return (first, after), state

    return jax.jit(steps)


def in_two(tree):
    """Other leaves of the same numbers, in another order."""
    leaves = [x.reshape(-1) for x in jax.tree.leaves(tree)]
    return [half for x in leaves[::-1] for half in (x[1::2], x[::2])]


@pytest.mark.parametrize("name", DESCENTS)
@given(
    seed=st.integers(0, 2**32 - 3),
    spec=st.sampled_from(list(TREES.values())),
    x=st.floats(0, 1, width=32),
    factor=st.sampled_from([2.0**i for i in range(-4, 5)]),
)
def test_a_descent_scales_with_the_loss_and_is_of_the_whole_tree(
    name, seed, spec, x, factor
):
    pairs = [draw_tree(spec, seed + i, 1) for i in range(3)]
    run = compiled_descent(name)
    found, state = run(x, pairs, 1.0)
    assert description(found) == description((pairs[0], pairs[2]))
    assert all(np.isfinite(n).all() for n in jax.tree.leaves(state))
    tolerance = 4 * precision(pairs)
    scaled, _ = run(x, pairs, factor)
    problems.assert_trees_close(
        scaled,
        jax.tree.map(lambda n: factor * np.float64(n), found),
        rtol=tolerance,
        atol=factor * tolerance,
    )
    others, _ = run(x, list(map(in_two, pairs)), 1.0)
    expected = tuple(map(in_two, jax.device_get(found)))
    problems.assert_trees_close(others, expected, rtol=tolerance, atol=tolerance)
    neutral, _ = run(0.5 / 0.9 if name == "weighted" else 0.0, pairs, 1.0)
    if name == "keep":
        neutral = found  # Whatever the average.
    if name != "weighted":  # Whose weight need not be one to the last bit.
        problems.assert_trees_equal(jax.device_get(neutral), (pairs[0], pairs[2]))


PATTERNS = {
    f"{kind} {sparsity}": (
        optax_sam.unstructured(sparsity)
        if kind == "entry"
        else optax_sam.structured(sparsity, kind)
    )
    for kind in ("entry", "filter", "layer")
    for sparsity in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
}


@functools.cache
def compiled_pattern(name):
    return jax.jit(PATTERNS[name])


@pytest.mark.parametrize("name", in_default_tier(PATTERNS, ("entry 0.3", "filter 0.7")))
@given(
    seed=st.integers(0, 2**32 - 1),
    spec=st.sampled_from(list(TREES.values())[1:]),
    distinct=st.sampled_from([1, 3, 1000]),
)
def test_the_largest_are_kept_and_as_many_as_there_have_to_be(
    name, seed, spec, distinct
):
    """Of scores that are equal as well: of one unit less there would be too few."""
    scores = draw_tree(spec, seed, distinct)
    scores = jax.tree.map(lambda x: np.round(np.abs(x)).astype(x.dtype), scores)
    masks = jax.device_get(compiled_pattern(name)(scores))
    kind, sparsity = name.split()
    kept, dropped, total = [], [], 0
    for x, mask in zip(*map(jax.tree.leaves, (scores, masks)), strict=True):
        assert (mask.shape, mask.dtype) == (x.shape, np.bool_)
        total += x.size
        columns = (-1, x.shape[-1] if x.ndim else 1)
        shape = {"entry": (1, -1), "filter": columns, "layer": (-1, 1)}[kind]
        if x.size:
            for score, chosen in zip(
                np.float64(x).reshape(shape).T, mask.reshape(shape).T, strict=True
            ):
                assert chosen.all() or not chosen.any()
                unit = score.mean(), score.size
                (kept if chosen.all() else dropped).append(unit)
    goal = total * (10 - round(10 * float(sparsity))) // 10
    sizes = [size for _, size in kept]
    lowest = min(kept, default=(np.inf, 0))
    assert sum(sizes) >= goal
    assert max(dropped, default=(0, 0))[0] <= lowest[0] * (1 + 1e-6)
    ties = [size for score, size in kept if score <= lowest[0] * (1 + 1e-6)]
    assert sum(sizes) - max(ties, default=1) < max(goal, 1)
    if kind == "entry":
        assert sum(sizes) == goal
