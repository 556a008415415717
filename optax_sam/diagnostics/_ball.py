"""The ball around the parameters that sharpness is measured in."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam.diagnostics import _vector
from optax_sam.diagnostics._estimate import check_number


def displacement(
    owner: str, params: optax.Params, rho: Any, adaptive: Any, eta: Any
) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    """The map from the unit ball to the one around the parameters.

    The ball is of radius `rho`, adaptive: relative to the size of each weight plus
    `eta`. The map takes and gives trees in float32 or wider.
    """
    rho = check_number(owner, "rho", rho)
    eta = check_number(owner, "eta", eta)
    if not isinstance(adaptive, bool):
        raise TypeError(f"{owner}: adaptive must be True or False, got {adaptive!r}.")

    def displace(u: chex.ArrayTree) -> chex.ArrayTree:
        def move(p: jax.Array, u: jax.Array) -> jax.Array:
            if adaptive:
                u = u * (jnp.abs(p) + jnp.asarray(eta, p.dtype))
            return p + jnp.asarray(rho, p.dtype) * u

        return jax.tree.map(move, _vector.widen(params), u)

    return displace


def random_unit(key: jax.Array, like: chex.ArrayTree) -> chex.ArrayTree:
    """A random vector, uniform on the unit sphere."""
    return _vector.unit(_vector.draw(jax.random.normal, key, like))
