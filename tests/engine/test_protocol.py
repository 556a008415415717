"""What the user sees when an argument is missing or wrong."""

import functools

import jax
import jax.numpy as jnp
import optax
import problems
import pytest

import optax_sam

PARAMS = {"w": jnp.ones(3), "b": jnp.ones(1)}
TX = optax_sam.sam(optax.sgd(0.1), rho=0.1)


def losses(params, batch):
    return jnp.sum(params["w"]) * batch + params["b"]


def update(grads=PARAMS, params=PARAMS, tx=TX, **extra_args):
    return tx.update(grads, tx.init(PARAMS), params, **extra_args)


def test_missing_params():
    with pytest.raises(ValueError, match=r"params is None.*tx\.update"):
        update(params=None, loss_fn=losses, batch=jnp.ones(4))


@pytest.mark.parametrize(
    ("extra_args", "missing"),
    [({}, "loss_fn"), ({"batch": 1.0}, "loss_fn"), ({"loss_fn": losses}, "batch")],
)
def test_missing_loss_or_batch(extra_args, missing):
    with pytest.raises(
        ValueError, match=f"^sam: {missing} is missing.*grad_fn.*TrainState"
    ):
        update(**extra_args)


@pytest.mark.parametrize("fn", [1.0, "loss", lambda params: 0.0, lambda p, b, c: 0.0])
def test_loss_fn_that_cannot_be_called(fn):
    with pytest.raises(TypeError, match=r"loss_fn.*called as loss_fn\(params, batch\)"):
        update(loss_fn=fn, batch=jnp.ones(4))


def test_grad_fn_with_the_step_index_of_optax_contrib_sam():
    with pytest.raises(TypeError, match=r"grad_fn\(params\).*1 positional argument"):
        update(grad_fn=jax.grad(lambda params, _: losses(params, 1.0)))


def test_functions_that_can_be_called_are():
    update(grad_fn=functools.partial(lambda p, scale: p, scale=2.0))
    update(grad_fn=jax.jit(lambda p: p))
    update(loss_fn=lambda *args: losses(*args), batch=jnp.ones(4))
    update(loss_fn=lambda p, _: jnp.sum(p["w"]), batch=None)

    def with_key(params, batch, key):
        return losses(params, batch) + key

    @functools.wraps(with_key)
    def loss_fn(params, batch):
        return with_key(params, batch, 0.0)

    update(loss_fn=loss_fn, batch=jnp.ones(4))


def test_a_type_error_inside_the_loss_stays_what_it_is():
    with pytest.raises(TypeError, match="unsupported operand"):
        update(loss_fn=lambda params, batch: params["w"] + "text", batch=jnp.ones(4))
    # A builtin, of which nobody knows how it can be called.
    with pytest.raises(TypeError, match=r"^attribute name must be string"):
        update(loss_fn=getattr, batch=jnp.ones(4))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda p, b: (losses(p, b), 1), TypeError, "got tuple.*has_aux=True"),
        (lambda p, b: 1.0, TypeError, "got float.*jax.numpy"),
        (lambda p, b: (losses(p, b), 1, 2), TypeError, "got tuple"),
        (lambda p, b: jnp.ones(0), ValueError, "no losses"),
        (lambda p, b: jnp.zeros(4, jnp.int32), TypeError, "floating-point.*int32"),
        (lambda p, b: jnp.ones((4, 2)), ValueError, r"shape \(4, 2\).*Reduce"),
    ],
)
def test_losses_of_the_wrong_kind(wrong, error, message):
    with pytest.raises(error, match=message):
        update(loss_fn=wrong, batch=jnp.ones(4))
    step = optax_sam.value_and_update(wrong, optax.sgd(0.1))
    with pytest.raises(error, match=message):
        step(PARAMS, optax.sgd(0.1).init(PARAMS), jnp.ones(4))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_parameters_that_cannot_be_perturbed(dtype):
    params = {"w": jnp.ones(3), "index": jnp.ones(2, dtype)}
    with pytest.raises(TypeError, match=r"params\['index'\] has dtype"):
        TX.init(params)
    with pytest.raises(TypeError, match=r"params\['index'\] has dtype"):
        TX.update(params, None, params, grad_fn=lambda p: p)
    step = optax_sam.value_and_update(lambda p: jnp.sum(p["w"]), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"params\['index'\] has dtype"):
        step(params, optax.sgd(0.1).init(params))


@pytest.mark.parametrize(
    "other",
    [
        optax.sgd(0.1),
        optax_sam.vasso(optax.sgd(0.1), 0.1, theta=0.5),
    ],
)
def test_state_of_another_optimizer(other):
    state = other.init(PARAMS)
    with pytest.raises(TypeError, match=r"^sam: the state is .*tx\.init\(params\)"):
        TX.update(PARAMS, state, PARAMS, grad_fn=lambda p: p)
    step = optax_sam.value_and_update(losses, TX)
    with pytest.raises(TypeError, match="value_and_update: the state is of another"):
        step(PARAMS, state, jnp.ones(4))


@pytest.mark.parametrize("tx", [TX, optax.sgd(0.1), optax.adam(0.1)])
def test_swapped_parameters_and_state(tx):
    step, state = optax_sam.value_and_update(losses, tx), tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"are swapped.*call step"):
        step(state, PARAMS, jnp.ones(4))
    with pytest.raises(TypeError, match=r"after the batch.*float32\[4\]; call step"):
        step(PARAMS, jnp.ones(4), state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda s: s.base_state,
            r"state must be Sharp.*got tuple\(0, 1\); .*\(base_state",
        ),
        (
            lambda s: s._replace(base_state=()),
            r"state.base_state must be.*got tuple\(\)",
        ),
        (
            lambda s: jax.tree.map(lambda x: x[None], s),
            r"state\.ascent_state\.count must be int32\[\], got int32\[1\]; start",
        ),
        (lambda s: {str(i): i for i in range(10)}, r"got dict\(0, .*, 7, \.\.\.\);"),
        (lambda s: None, r"got NoneType\(\); start"),
    ],
)
def test_where_a_state_does_not_fit(state, message):
    state = state(TX.init(PARAMS))
    with pytest.raises(TypeError, match=f"^value_and_update: .*{message}") as caught:
        optax_sam.value_and_update(lambda p, b: p["w"] @ state[0], TX)(
            PARAMS, state, jnp.ones(4)
        )
    assert len(str(caught.value)) < 350


def test_a_state_that_differs_in_what_is_no_array():
    def base(schedule):
        count = jax.tree_util.Partial(schedule, jnp.zeros(()))
        return optax.GradientTransformation(
            lambda params: count,
            lambda updates, state, params=None: (updates, state.func(updates)),
        )

    state = base(jnp.sin).init(PARAMS)
    message = r"opt_state must be Partial\(.*\), got Partial\("
    with pytest.raises(TypeError, match=message):
        optax_sam.value_and_update(losses, base(len))(PARAMS, state, jnp.ones(4))


def test_the_state_of_a_base_goes_on_as_the_message_says():
    state = TX.init(PARAMS)._replace(base_state=optax.sgd(0.1).init(PARAMS))
    optax_sam.value_and_update(losses, TX)(PARAMS, state, jnp.ones(4))


def test_a_failing_loss_fails_as_it_does():
    def fails(params, batch):
        raise KeyError("its own")

    for tx in (TX, optax.sgd(0.1)):
        with pytest.raises(KeyError, match="its own"):
            optax_sam.value_and_update(fails, tx)(PARAMS, tx.init(PARAMS), 1.0)
    with pytest.raises(KeyError, match="its own"):
        update(loss_fn=fails, batch=1.0)


@pytest.mark.parametrize(
    "loss_fn",
    [
        losses,
        lambda params, batch, key: losses(params, batch),
        optax_sam.functional_loss(losses, lambda outputs, batch: outputs),
    ],
)
@pytest.mark.parametrize("tx", [TX, optax.sgd(0.1)])
def test_a_forgotten_batch_is_told_of(tx, loss_fn):
    with pytest.raises(TypeError, match=r"missing . required positional arg") as caught:
        optax_sam.value_and_update(loss_fn, tx)(PARAMS, tx.init(PARAMS))
    (note,) = [x for x in caught.value.__notes__ if "no batch" in x]
    assert note.startswith("value_and_update: the step got no batch, or one without")
    assert "call step(params, opt_state, batch), or" in note


def test_other_type_errors_have_no_such_note():
    def fails(params):
        return params["w"] + "text"

    for loss_fn, batch in [(fails, ()), (lambda params, x, y: x, (jnp.ones(4),))]:
        with pytest.raises(TypeError) as caught:
            optax_sam.value_and_update(loss_fn, TX)(PARAMS, TX.init(PARAMS), *batch)
        assert not any("no batch" in x for x in getattr(caught.value, "__notes__", ()))


def test_gradients_in_a_tuple():
    def loss(params):
        return jnp.sum(losses(params, jnp.ones(4)))

    for grad_fn in (
        jax.value_and_grad(loss),
        jax.grad(lambda p: (loss(p), p), has_aux=True),
    ):
        with pytest.raises(ValueError, match=r"gradient alone.*grad_fn=jax\.grad"):
            update(grad_fn=grad_fn)


@pytest.mark.parametrize("constant", [jax.nn.relu, "same", jnp.dtype("float32")])
def test_parameters_that_are_no_arrays(constant):
    params = {"w": jnp.ones(3), "layer": {"how": constant}}
    message = r"params\['layer'\]\['how'\].*eqx.partition\(model, eqx.is_inexact_array"
    with pytest.raises(TypeError, match=message):
        TX.init(params)
    step = optax_sam.value_and_update(losses, optax.sgd(0.1))
    with pytest.raises(TypeError, match=message):
        step(params, optax.sgd(0.1).init(PARAMS), jnp.ones(4))


def test_gradients_that_do_not_fit():
    with pytest.raises(ValueError, match="grads must have the tree structure"):
        update(grads={"w": jnp.ones(3)}, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match=r"grads\['w'\] has shape \(2,\).*\(3,\)"):
        update(grads={"w": jnp.ones(2), "b": jnp.ones(1)}, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match=r"grad_fn\(params\) must have the tree"):
        update(grad_fn=lambda p: p["w"])


@pytest.mark.parametrize("dtype", [int, bool, complex])
def test_gradients_that_are_not_real(dtype):
    def rounded(params):
        return params | {"b": params["b"].astype(dtype)}

    message = r"\['b'\] has dtype .*must be real floating point; do not round"
    with pytest.raises(TypeError, match=r"^sam: grad_fn\(params\)" + message):
        update(grad_fn=rounded)
    with pytest.raises(TypeError, match="^sam: grads" + message):
        update(grads=rounded(PARAMS), grad_fn=lambda p: p)


@pytest.mark.parametrize("bad", [0.1, optax.sgd, None, jnp.ones(2)])
def test_what_is_no_transformation(bad):
    with pytest.raises(TypeError, match="base must be an Optax gradient transf"):
        optax_sam.sam(bad, rho=0.1)
    with pytest.raises(TypeError, match=r"ascent must be .*such as optax_sam\.scale_t"):
        optax_sam.sharpness_aware(optax.sgd(0.1), bad)
    with pytest.raises(TypeError, match="tx must be an Optax gradient transf"):
        optax_sam.value_and_update(losses, bad)


RADIUS = optax_sam.scale_to_radius(0.1)


def trace_step(ascent, params=PARAMS, **extra_args):
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    step = optax_sam.value_and_update(losses, tx, **extra_args)
    return jax.eval_shape(step, params, tx.init(params), jnp.ones(4))


REWEIGHT = optax_sam.reweight_by_sharpness(0.1, key=0)


@pytest.mark.parametrize(
    "link", [optax_sam.suppress_variance(0.5), RADIUS, optax.clip(1.0)]
)
def test_links_whose_gradient_is_made_anew_are_refused(link):
    with pytest.raises(
        ValueError, match=r"reweight_by_sharpness: a link before.*first"
    ):
        trace_step(optax.chain(link, REWEIGHT, RADIUS))


@pytest.mark.parametrize(
    "links",
    [
        (optax.identity(), optax_sam.perturb_only({"w": True, "b": False}), REWEIGHT),
        (optax.conditionally_transform(REWEIGHT, lambda count: count < 5),),
    ],
)
def test_links_that_leave_the_gradient_alone_are_not(links):
    trace_step(optax.chain(*links, RADIUS))


@pytest.mark.parametrize("first", [(), (optax_sam.suppress_variance(0.5),)])
def test_gradients_handed_on_by_optax_masked_are_refused(first):
    def ascent(inner):
        mask = {"w": True, "b": False}
        return optax.masked(optax.chain(*first, inner), mask)

    with pytest.raises(ValueError, match=r"params\['b'\] as it is.*perturb_only\(mask"):
        trace_step(ascent(RADIUS))
    trace_step(optax.chain(ascent(RADIUS), RADIUS))
    radii = {"w": RADIUS, "b": optax_sam.scale_to_radius(0.2)}
    trace_step(optax.partition(radii, {"w": "w", "b": "b"}))


def test_value_and_update_with_the_wrong_loss_fn():
    with pytest.raises(TypeError, match="value_and_update: loss_fn must be a function"):
        optax_sam.value_and_update(None, TX)
    step = optax_sam.value_and_update(losses, TX, has_aux=True)
    with pytest.raises(TypeError, match="must return a pair"):
        step(PARAMS, TX.init(PARAMS), jnp.ones(4))
    three = optax_sam.value_and_update(
        lambda p, b: (losses(p, b), 1, 2), TX, has_aux=True
    )
    with pytest.raises(TypeError, match="must return a pair"):
        three(PARAMS, TX.init(PARAMS), jnp.ones(4))


HALF = optax_sam.unstructured(0.5)
EVERY = {"refresh_every": 1}


@pytest.mark.parametrize(
    ("alias", "arguments", "wrong"),
    [
        (optax_sam.sam, {"rho": 0.1}, {"rho": -1.0}),
        (optax_sam.asam, {"rho": 0.1}, {"eta": "0.1"}),
        (optax_sam.vasso, {"rho": 0.1, "theta": 0.5}, {"theta": 2.0}),
        (optax_sam.vasso, {"rho": 0.1, "theta": 0.5}, {"accumulator_dtype": int}),
        (optax_sam.rw_sam, {"rho": 0.1, "strength": 0.1}, {"num_probes": 0}),
        (optax_sam.m_sam, {"rho": 0.1, "micro_batch_size": 2}, {"rho": jnp.ones(2)}),
        (
            optax_sam.m_sam,
            {"rho": 0.1, "micro_batch_size": 2},
            {"micro_batches_at_once": 0},
        ),
        (optax_sam.sparse_sam, {"rho": 0.1, "pattern": HALF} | EVERY, {"key": 0.5}),
        (
            optax_sam.dynamic_sparse_sam,
            {"rho": 0.1, "sparsity": 0.5, "decay_steps": 9} | EVERY,
            {"drop_by": "size"},
        ),
    ],
)
def test_messages_name_what_was_called(alias, arguments, wrong):
    with pytest.raises((TypeError, ValueError), match=f"^{alias.__name__}: "):
        alias(optax.sgd(0.1), **arguments | wrong)
    with pytest.raises(TypeError, match=f"^{alias.__name__}: base must be"):
        alias(0.1, **arguments)
    with pytest.raises(ValueError, match=r"^scale_to_radius: rho = -1"):
        optax_sam.scale_to_radius(-1.0)


def test_messages_of_an_update_name_what_was_called():
    tx = optax_sam.rw_sam(optax.sgd(0.1), rho=0.1, strength=0.1)
    with pytest.raises(ValueError, match=r"^rw_sam: loss_fn is missing"):
        update(tx=tx, grad_fn=lambda p: p)
    for arguments, message in [
        ({"params": None}, "^sam: params is None"),
        ({"params": {"n": 1}}, r"^sam: params\['n'\] has dtype int32"),
        (
            {"grads": {"w": jnp.ones(3)}, "grad_fn": lambda p: p},
            "^sam: grads must have",
        ),
        ({"grad_fn": lambda p: {}}, r"^sam: grad_fn\(params\) must have"),
        ({"grad_fn": PARAMS}, "^sam: grad_fn must be a function"),
        ({"loss_fn": lambda p, b: 0.0, "batch": 0}, "^sam: loss_fn must return"),
        ({"loss_fn": lambda p, b: b, "batch": jnp.ones((2, 3))}, "^sam: loss_fn must"),
        (
            {"loss_fn": losses, "ascent_loss_fn": 0, "batch": 0},
            "^sam: ascent_loss_fn must be a function",
        ),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            jax.eval_shape(lambda arguments=arguments: update(**arguments))


def test_parameters_of_lookahead_for_another_base():
    both = optax.LookaheadParams.init_synced(PARAMS)
    with pytest.raises(TypeError, match=r"^sam: params are .*optax\.lookahead\(base"):
        TX.init(both)
    lookahead = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    jax.eval_shape(optax_sam.sam(optax.chain(lookahead), 0.1).init, both)


def test_values_in_messages_are_cut_short():
    params = {"w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
    step = optax_sam.value_and_update
    for call in [
        lambda: optax_sam.sam(optax.sgd(0.1), params),
        lambda: optax_sam.sam(params, 0.1),
        lambda: step(params, TX),
        lambda: step(losses, params),
        lambda: step(losses, TX, ascent_loss_fn=params),
        lambda: TX.update(params, TX.init(params), params, grad_fn=params),
    ]:
        with pytest.raises(
            TypeError, match=r"got float32\[64\], float32\[64, 64\]"
        ) as e:
            call()
        assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    "pattern", [optax_sam.unstructured, optax_sam.structured, optax_sam.n_m, 0.5]
)
def test_a_pattern_that_was_not_called(pattern):
    with pytest.raises(TypeError, match=r"pattern must.*unstructured\(0\.5\), say"):
        optax_sam.sparse_sam(optax.sgd(0.1), 0.1, pattern, refresh_every=1)


@pytest.mark.parametrize(
    "outer",
    [
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition(
            {"sam": tx, "sgd": optax.sgd(0.1)}, {"w": "sam", "b": "sgd"}
        ),
    ],
    ids=["masked", "partition"],
)
def test_inside_masked_the_remedy_is_named(outer):
    with pytest.raises(ValueError, match=r"\['b'\] is optax.MaskedNode.*outside"):
        outer(TX).init(PARAMS)


def test_problems_are_reported_under_jit_too():
    step = jax.jit(lambda g: update(g, loss_fn=lambda p, b: jnp.ones((4, 2)), batch=1))
    with pytest.raises(ValueError, match=r"shape \(4, 2\)"):
        step(PARAMS)


MULTI_STEPS = optax.MultiSteps(TX, 2).gradient_transformation()


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.chain(optax.clip(1.0), TX), "changed the gradient.*around the base"),
        (optax.chain(optax.identity(), optax.chain(optax.scale(2.0), TX)), "changed"),
        (optax.inject_hyperparams(lambda c: optax.chain(optax.clip(c), TX))(1.0), "ch"),
        (MULTI_STEPS, r"last batch alone.*sam\(optax\.MultiSteps"),
        (optax.apply_if_finite(TX, 3), r"not see.*sam\(optax\.apply_if_finite"),
        (optax.chain(optax.identity(), optax.apply_if_finite(TX, 3)), "not see"),
    ],
)
def test_wrappers_around_the_step_are_warned_of(tx, message):
    step, state = optax_sam.value_and_update(losses, tx), tx.init(PARAMS)
    for run in (step, jax.jit(step)):
        with pytest.warns(UserWarning, match=message) as seen:
            run(PARAMS, state, jnp.ones(4))
        assert len(seen) == 1


@pytest.mark.parametrize(
    "tx",
    [
        TX,
        optax.chain(optax.identity(), TX, optax.scale(0.5)),
        optax.inject_hyperparams(lambda rho: optax_sam.sam(optax.sgd(0.1), rho))(0.1),
        optax_sam.sam(optax.MultiSteps(optax.sgd(0.1), 2), 0.1),
        optax_sam.sam(optax.apply_if_finite(optax.chain(optax.clip(1.0)), 3), 0.1),
        optax.apply_if_finite(optax.sgd(0.1), 3),
        optax.contrib.schedule_free(TX, 0.1),
        optax.conditionally_transform(TX, lambda count: count < 5),
    ],
)
def test_others_are_not(tx):
    step = optax_sam.value_and_update(losses, tx)
    step(PARAMS, tx.init(PARAMS), jnp.ones(4))


def lookahead(tx):
    return optax.lookahead(tx, sync_period=2, slow_step_size=0.5)


@pytest.mark.parametrize(
    ("tx", "fast"),
    [
        (lookahead(optax.sgd(0.1)), optax.sgd(0.1)),
        (optax_sam.sam(lookahead(optax.sgd(0.1)), 0.1), TX),
    ],
)
def test_lookahead_takes_gradients_at_the_fast_parameters(tx, fast):
    params = optax.LookaheadParams.init_synced(PARAMS)
    step, state = optax_sam.value_and_update(losses, tx), tx.init(params)
    fast_step, fast_state = optax_sam.value_and_update(losses, fast), fast.init(PARAMS)
    expected = PARAMS
    for _ in range(2):
        _, updates, state = step(params, state, jnp.arange(4.0))
        params = optax.apply_updates(params, updates)
        _, updates, fast_state = fast_step(expected, fast_state, jnp.arange(4.0))
        expected = optax.apply_updates(expected, updates)
    halfway = jax.tree.map(lambda a, b: (a + b) / 2, PARAMS, expected)
    problems.assert_trees_close(params.slow, halfway, rtol=1e-6)
    problems.assert_trees_close(params.fast, halfway, rtol=1e-6)


def test_lookahead_around_the_step_is_refused():
    tx, params = lookahead(TX), optax.LookaheadParams.init_synced(PARAMS)
    step = optax_sam.value_and_update(losses, tx)
    with pytest.raises(ValueError, match=r"hands no loss on.*sam\(optax\.lookahead"):
        step(params, tx.init(params), jnp.ones(4))
