"""Methods written out in plain JAX for one finite gradient: what they need at least.

Each makes `update(params, opt_state, *args) -> value, updates, opt_state` as a careful
user would who needs nothing else; SAM's is `measure.sam_by_hand`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_examples.benchmarking.measure import Update

# perturb(params, gradient, state) -> perturbed parameters, state
Perturb = Callable[[Any, Any, Any], tuple[Any, Any]]
# descend(perturbed gradient, clean gradient) -> what the base descends along
Descend = Callable[[Any, Any], Any]
# ascends(number of the step) -> whether it ascends, a bool if that is always the same
Ascends = Callable[[jax.Array], Any]


class State(NamedTuple):
    """What a method keeps, and what its base does.

    Attributes:
      own: the method's.
      base: the base optimizer's.
    """

    own: Any
    base: Any


def plain(value_and_grad: Any, base: optax.GradientTransformation) -> Update:
    """The base optimizer, as in any training loop with Optax."""

    def update(params: Any, opt_state: Any, *args: Any) -> Any:
        value, grads = value_and_grad(params, *args)
        return value, *base.update(grads, opt_state, params)

    return update


def make_contrib_sam(
    base: optax.GradientTransformation, rho: float
) -> optax.GradientTransformation:
    """Optax's own SAM; in opaque mode a step takes both gradients."""
    radius = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    tx: optax.GradientTransformation = optax.contrib.sam(base, radius, opaque_mode=True)
    return tx


def contrib_sam(value_and_grad: Any, tx: Any) -> Update:
    """Optax's own SAM, which looks for the perturbed gradient itself."""

    def update(params: Any, opt_state: Any, *args: Any) -> Any:
        value, grads = value_and_grad(params, *args)
        return value, *tx.update(
            grads, opt_state, params, grad_fn=lambda p, _: value_and_grad(p, *args)[1]
        )

    return update


def perturbed(
    value_and_grad: Any,
    base: optax.GradientTransformation,
    perturb: Perturb,
    descend: Descend = lambda perturbed, clean: perturbed,
) -> Update:
    """A method that takes a second gradient at parameters it has perturbed."""

    def update(params: Any, opt_state: State, *args: Any) -> Any:
        value, clean = value_and_grad(params, *args)
        elsewhere, own = perturb(params, clean, opt_state.own)
        _, perturbed = value_and_grad(elsewhere, *args)
        direction = descend(perturbed, clean)
        updates, base_state = base.update(direction, opt_state.base, params)
        return value, updates, State(own, base_state)

    return update


def with_state(
    base: optax.GradientTransformation, init: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """What makes the `State` of a method; its update is the base's, and never called.

    Args:
      base: the base optimizer.
      init: from the parameters to what the method keeps.
    """
    return optax.GradientTransformation(
        lambda params: State(init(params), base.init(params)), base.update
    )


def sam(rho: float) -> Perturb:
    """Perturbs along the gradient."""

    def perturb(params: Any, grads: Any, own: Any) -> tuple[Any, Any]:
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        return jax.tree.map(lambda p, g: p + scale * g, params, grads), own

    return perturb


def momentum_sam(
    value_and_grad: Any, base: optax.GradientTransformation, rho: float
) -> Update:
    """The gradient further along the momentum of SGD, or Adam's, and no other."""

    def update(params: Any, opt_state: Any, *args: Any) -> Any:
        momentum = optax.tree.get(opt_state, "trace")
        if momentum is None:
            momentum = optax.tree.get(opt_state, "mu")
        elsewhere, _ = sam(-rho)(params, momentum, ())
        value, grads = value_and_grad(elsewhere, *args)
        return value, *base.update(grads, opt_state, params)

    return update


def vasso_of_one_pass(
    value_and_grad: Any, base: optax.GradientTransformation, rho: float, theta: float
) -> Update:
    """The gradient further along the average of those before, which then takes it."""

    def update(params: Any, opt_state: State, *args: Any) -> Any:
        elsewhere, _ = sam(rho)(params, opt_state.own.mean, ())
        value, grads = value_and_grad(elsewhere, *args)
        own = add_to_average(opt_state.own, grads, theta)
        updates, base_state = base.update(grads, opt_state.base, params)
        return value, updates, State(own, base_state)

    return update


def sam_in_some_steps(
    value_and_grad: Any,
    base: optax.GradientTransformation,
    rho: float,
    ascends: Ascends,
) -> Update:
    """SAM in some steps and the base in the others, which take one gradient."""

    def update(params: Any, opt_state: State, *args: Any) -> Any:
        value, clean = value_and_grad(params, *args)

        def ascend() -> Any:
            elsewhere, _ = sam(rho)(params, clean, ())
            return value_and_grad(elsewhere, *args)[1]

        grads = either(ascends(opt_state.own), ascend, lambda: clean)
        updates, base_state = base.update(grads, opt_state.base, params)
        return value, updates, State(opt_state.own + 1, base_state)

    return update


def look_sam(
    value_and_grad: Any,
    base: optax.GradientTransformation,
    rho: float,
    alpha: float,
    ascends: Ascends,
) -> Update:
    """SAM in some steps; the others add what it has changed across the gradient."""

    def update(params: Any, opt_state: State, *args: Any) -> Any:
        value, clean = value_and_grad(params, *args)
        count, kept = opt_state.own

        def ascend() -> tuple[Any, Any]:
            elsewhere, _ = sam(rho)(params, clean, ())
            _, perturbed = value_and_grad(elsewhere, *args)
            share = optax.tree.vdot(clean, perturbed)
            share /= optax.tree.norm(clean, squared=True) + 1e-12
            across = jax.tree.map(lambda p, g: p - share * g, perturbed, clean)
            scale = 1 / (optax.tree.norm(across) + 1e-12)
            return perturbed, jax.tree.map(lambda x: scale * x, across)

        def reuse() -> tuple[Any, Any]:
            length = alpha * optax.tree.norm(clean)
            return jax.tree.map(lambda g, v: g + length * v, clean, kept), kept

        grads, kept = either(ascends(count), ascend, reuse)
        updates, base_state = base.update(grads, opt_state.base, params)
        return value, updates, State((count + 1, kept), base_state)

    return update


def either(condition: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """A branch of the program, or the only one where the condition is a bool."""
    if isinstance(condition, bool):
        return one() if condition else other()
    cond: Any = jax.lax.cond
    return cond(condition, one, other)


def gap(alpha: float) -> Descend:
    """Takes from the perturbed gradient what of the clean one is across it."""

    def descend(perturbed: Any, clean: Any) -> Any:
        share = optax.tree.vdot(clean, perturbed)
        share /= optax.tree.norm(perturbed, squared=True) + 1e-12
        return jax.tree.map(lambda p, g: p - alpha * (g - share * p), perturbed, clean)

    return descend


def weighted(gamma: float) -> Descend:
    """Adds the difference of the two gradients to the clean one, with a weight."""
    weight = gamma / (1 - gamma)

    def descend(perturbed: Any, clean: Any) -> Any:
        return jax.tree.map(lambda p, g: g + weight * (p - g), perturbed, clean)

    return descend


def asam(rho: float) -> Perturb:
    """Perturbs each weight in proportion to its size."""

    def perturb(params: Any, grads: Any, own: Any) -> tuple[Any, Any]:
        scaled = jax.tree.map(lambda p, g: jnp.abs(p) * g, params, grads)
        scale = rho / (optax.tree.norm(scaled) + 1e-12)

        def add(p: jax.Array, g: jax.Array) -> jax.Array:
            moved: jax.Array = p + scale * jnp.abs(p) * g
            return moved

        return jax.tree.map(add, params, scaled), own

    return perturb


class Average(NamedTuple):
    """An average of gradients.

    Attributes:
      size: how many gradients it is of.
      mean: a tree like the parameters.
    """

    size: jax.Array
    mean: Any


def init_average(params: Any) -> Average:
    """The average of no gradients."""
    return Average(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))


def add_to_average(own: Average, grads: Any, theta: float) -> Average:
    """The moving average with one gradient more, of which the first is all there is."""
    share = jnp.where(own.size == 0, 1.0, theta)
    mean = jax.tree.map(lambda d, g: (1 - share) * d + share * g, own.mean, grads)
    return Average(own.size + 1, mean)


def vasso(rho: float, theta: float) -> Perturb:
    """Perturbs along a moving average, which begins with the first gradient."""

    def perturb(params: Any, grads: Any, own: Average) -> tuple[Any, Average]:
        own = add_to_average(own, grads, theta)
        return sam(rho)(params, own.mean, ())[0], own

    return perturb


def friendly_sam(rho: float, sigma: float, decay: float) -> Perturb:
    """Perturbs along the gradient less the average of those before."""

    def perturb(params: Any, grads: Any, own: Average) -> tuple[Any, Average]:
        rest = jax.tree.map(lambda m, g: g - sigma * m, own.mean, grads)
        elsewhere, _ = sam(rho)(params, rest, ())
        return elsewhere, add_to_average(own, grads, 1 - decay)

    return perturb


def init_mask(params: Any) -> Any:
    """A mask for each array of weights."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)


def masked_sam(rho: float) -> Perturb:
    """Perturbs the weights that the masks select, on the scale that SAM has."""

    def perturb(params: Any, grads: Any, own: Any) -> tuple[Any, Any]:
        scale = rho / (optax.tree.norm(grads) + 1e-12)

        def add(p: jax.Array, g: jax.Array, selected: jax.Array) -> jax.Array:
            return p + jnp.where(selected, scale * g, 0)

        return jax.tree.map(add, params, grads, own), own

    return perturb


def sam_of_layers(
    mean_loss: Any,
    base: optax.GradientTransformation,
    rho: float,
    select: Callable[[Any], Any],
) -> Update:
    """SAM that perturbs a part of the leaves, and takes no clean gradient of others."""

    def update(params: Any, opt_state: Any, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        selected = jax.tree.leaves(select(params))

        def merge(chosen: list[jax.Array]) -> Any:
            rest = iter(chosen)
            pairs = zip(selected, leaves, strict=True)
            return jax.tree.unflatten(
                structure, [next(rest) if s else p for s, p in pairs]
            )

        def of_chosen(chosen: list[jax.Array]) -> Any:
            return mean_loss(merge(chosen), *args)

        chosen = [p for s, p in zip(selected, leaves, strict=True) if s]
        value, grads = jax.value_and_grad(of_chosen, has_aux=True)(chosen)
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        elsewhere = merge([p + scale * g for p, g in zip(chosen, grads, strict=True)])
        grads = jax.grad(mean_loss, has_aux=True)(elsewhere, *args)[0]
        return value, *base.update(grads, opt_state, params)

    return update


def rw_sam(
    loss_fn: Any,
    base: optax.GradientTransformation,
    rho: float,
    strength: float,
    delta: float = 1e-4,
) -> Update:
    """SAM along a gradient that weighs examples by the slopes of their losses."""

    def signs(params: Any, count: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(params)
        # The cheapest generator that there is.
        key = jax.random.fold_in(jax.random.key(0, impl="rbg"), count)
        keys = jax.random.split(key, len(leaves))
        draw = jax.random.rademacher
        return jax.tree.unflatten(
            structure,
            [draw(key, p.shape, p.dtype) for key, p in zip(keys, leaves, strict=True)],
        )

    def update(params: Any, opt_state: State, *args: Any) -> Any:
        losses, pullback, aux = jax.vjp(
            lambda p: loss_fn(p, *args), params, has_aux=True
        )
        direction = signs(params, opt_state.own)
        nearby = jax.tree.map(lambda p, z: p + delta * z, params, direction)
        slopes = jnp.abs(loss_fn(nearby, *args)[0] - losses) / delta
        (grads,) = pullback(jax.nn.softmax(strength * slopes))
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        elsewhere = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        grads = jax.grad(lambda p: loss_fn(p, *args)[0].mean())(elsewhere)
        updates, base_state = base.update(grads, opt_state.base, params)
        return (losses.mean(), aux), updates, State(opt_state.own + 1, base_state)

    return update


def m_sam(
    value_and_grad: Any, base: optax.GradientTransformation, rho: float, size: int
) -> Update:
    """SAM of micro-batches side by side; value and auxiliary data are their means."""

    def update(params: Any, opt_state: Any, batch: Any, *args: Any) -> Any:
        def of_one(batch: Any) -> Any:
            value, grads = value_and_grad(params, batch, *args)
            scale = rho / (optax.tree.norm(grads) + 1e-12)
            elsewhere = jax.tree.map(lambda p, g: p + scale * g, params, grads)
            return value, value_and_grad(elsewhere, batch, *args)[1]

        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        of_all = jax.vmap(of_one)(parts)
        value, grads = jax.tree.map(lambda x: x.mean(0), of_all)
        return value, *base.update(grads, opt_state, params)

    return update
