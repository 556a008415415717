"""Sparse SAM's implicit perturbation in Flax layers (arXiv 2210.05177, 2306.17504).

A dense layer or a convolution multiplies its input by its kernel. The classes here
give that product another backward and leave its values as they are, bit for bit, for
the *clean* pass of a sharpness-aware step, whose gradient only sets the perturbation:

* :class:`Channels` leaves output features out and computes less;
* :class:`Masked` leaves out single weights, with the arithmetic of the dense backward.

Each has a `dot_general` and a `conv_general_dilated`, the names by which a Flax layer
takes its product, and :func:`sparsify` puts them in a Flax NNX model. With linen,
:class:`MaskedDotGeneral` and :class:`MaskedConvGeneralDilated` find the masks among the
variables. The *perturbed* pass should stay dense: give the sparse loss as
`optax_sam.value_and_update(loss_fn, tx, ascent_loss_fn=sparse_loss_fn)` or, by hand,
its gradient as `grads` next to the dense `loss_fn`.

The products can be differentiated backward only: `jax.jvp` refuses them, as it does
every `jax.custom_vjp`. This module needs Flax, and the rest of the package does not.
"""

import abc
import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from optax_sam._base import trees
from optax_sam._base.checks import shown
from optax_sam._base.hyperparameters import as_decimal

__all__ = [
    "Channels",
    "Masked",
    "MaskedConvGeneralDilated",
    "MaskedDotGeneral",
    "sparsify",
]

_Product = Callable[[jax.Array, jax.Array], jax.Array]
_CONVOLUTION = inspect.signature(lax.conv_general_dilated)
_Model = TypeVar("_Model", bound=nnx.Module)


class _Features(NamedTuple):
    """Where the output features of a product are."""

    kernel: int  # Their axis in the kernel, and in the output.
    output: int
    grouped: bool  # Whether leaving some out breaks up the groups of a convolution.


class _Backward(abc.ABC):
    """A rule for the backward of products, and the products that follow it."""

    @property
    def dot_general(self) -> "_DotGeneral":
        """`jax.lax.dot_general` with this backward."""
        return _DotGeneral(self)

    @property
    def conv_general_dilated(self) -> "_ConvGeneralDilated":
        """`jax.lax.conv_general_dilated` with this backward."""
        return _ConvGeneralDilated(self)

    @abc.abstractmethod
    def _multiply(
        self, product: _Product, lhs: Any, rhs: Any, features: _Features | None
    ) -> jax.Array:
        """The product, whose output features are of `features` where it has any."""


# Objects rather than closures: NNX keeps them in its graph definitions, which jit
# compares, and two that do the same must be equal for a step not to be compiled anew.
@dataclasses.dataclass(frozen=True)
class _DotGeneral:
    backward: _Backward

    def __call__(
        self, lhs: Any, rhs: Any, dimension_numbers: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)

        (_, contracted), (_, batch) = dimension_numbers
        bound = {axis % rhs.ndim for axis in (*contracted, *batch)}
        free = [axis for axis in range(rhs.ndim) if axis not in bound]
        features = _Features(free[-1], -1, grouped=False) if free else None
        return self.backward._multiply(product, lhs, rhs, features)


@dataclasses.dataclass(frozen=True)
class _ConvGeneralDilated:
    backward: _Backward

    def __call__(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

        call = _CONVOLUTION.bind(lhs, rhs, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        layout = lax.conv_dimension_numbers(
            lhs.shape, rhs.shape, given["dimension_numbers"]
        )
        grouped = given["feature_group_count"] > 1 or given["batch_group_count"] > 1
        features = _Features(layout.rhs_spec[0], layout.out_spec[1], grouped)
        return self.backward._multiply(product, lhs, rhs, features)


@dataclasses.dataclass(frozen=True)
class Channels(_Backward):
    r"""A backward over a part of the output features only, by smaller products.

    .. math::
      dX = dY_K W_K^\top, \qquad dW_K = X^\top dY_K, \qquad
      dW_c = 0 \text{ for } c \notin K

    :math:`K` holds the `max(1, C - floor(C * sparsity))` of the `C` output features
    with the largest :math:`\|dY_c\| \|W_c\|`, the norms of the terms that make up
    :math:`dX`, or with the largest :math:`\|W_c\|`. It is chosen anew in each
    backward, their number is fixed, and nothing is compiled again. Of equals the first
    are kept, and features whose norm is not finite before all others, so that a bad
    gradient stays one. Under `vmap` every example may keep other features.

    The output features are the last axis of the kernel that is neither contracted nor
    batched; convolutions have one such axis. Grouped convolutions cannot be cut, and
    give the same gradient by the arithmetic of the dense backward.

    Attributes:
      sparsity: Part of the output features to leave out, a number in [0, 1). At 0 the
        backward is the dense one, bit for bit.
      by: What decides which stay: "gradient" or "weight".

    Raises:
      TypeError: If `sparsity` is no number.
      ValueError: If `sparsity` is outside [0, 1), or `by` unknown.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from optax_sam import implicit
      >>> x = jnp.ones([2, 3])
      >>> dense = nn.Dense(4)
      >>> sparse = nn.Dense(4, dot_general=implicit.Channels(0.5).dot_general)
      >>> params = dense.init(jax.random.key(0), x)
      >>> grads = jax.grad(lambda p: sparse.apply(p, x).sum())(params)
      >>> int(grads["params"]["kernel"].any(axis=0).sum())
      2

    References:
      Mi et al., `Systematic Investigation of Sparse Perturbed Sharpness-Aware
      Minimization Optimizer <https://arxiv.org/abs/2306.17504>`_, 2023
    """

    sparsity: float
    by: Literal["gradient", "weight"] = "gradient"

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(
            self.sparsity, numbers.Real
        ):
            raise TypeError(
                "Channels: sparsity must be a Python number, since it sets the shapes "
                f"of products; got {shown(self.sparsity)}. Pass a number in [0, 1)."
            )
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"Channels: sparsity = {self.sparsity:g} is out of range; pass a "
                "number in [0, 1), the part of the output features to leave out."
            )
        if self.by not in ("gradient", "weight"):
            raise ValueError(
                f"Channels: by must be 'gradient' or 'weight', got {self.by!r}; pass "
                "what the output features to keep are chosen by."
            )

    def _multiply(
        self, product: _Product, lhs: Any, rhs: Any, features: _Features | None
    ) -> jax.Array:
        size = rhs.shape[features.kernel] if features else 0
        count = max(1, size - math.floor(size * as_decimal(self.sparsity)))
        if features is None or count >= size:
            return product(lhs, rhs)

        def backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> Any:
            lhs, rhs = residuals
            kept = self._choose(rhs, dy, features, count)
            if features.grouped:
                dy = _zero_others(kept, dy, features.output)
                return _pull_back(product, dy, lhs, rhs)
            select = partial(jnp.take, indices=kept, mode="clip")
            dx, dw = _pull_back(
                product,
                select(dy, axis=features.output),
                lhs,
                select(rhs, axis=features.kernel),
            )
            return dx, _spread(dw, kept, rhs, features.kernel)

        return _with_backward(product, backward, lhs, rhs)

    def _choose(
        self, rhs: jax.Array, dy: jax.Array, features: _Features, count: int
    ) -> jax.Array:
        """Indices of the output features to keep, in rising order."""
        score = _squared_norms(rhs, features.kernel)
        if self.by == "gradient":
            score *= _squared_norms(dy, features.output)
        score = jnp.where(jnp.isnan(score), jnp.inf, score)
        return jnp.sort(lax.top_k(score, count)[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Masked(_Backward):
    r"""A backward through a part of the weights only, by dense products.

    .. math::
      dX = dY (W \odot M)^\top, \qquad dW = X^\top dY

    The gradient of the kernel is dense in what it is given: masking it is left to the
    ascent. Nothing is saved, and no mask has to have a structure.

    Attributes:
      mask: Bool array of the kernel's shape: True for weights to go back through.

    Raises:
      ValueError: In the product, if `mask` is no bool array of the kernel's shape.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_sam import implicit
      >>> product = implicit.Masked(jnp.array([[True], [False]])).dot_general
      >>> last_with_first = (((1,), (0,)), ((), ()))
      >>> x, w = jnp.ones([1, 2]), jnp.ones([2, 1])
      >>> print(jax.grad(lambda x: product(x, w, last_with_first).sum())(x))
      [[1. 0.]]

    References:
      Mi et al., `Systematic Investigation of Sparse Perturbed Sharpness-Aware
      Minimization Optimizer <https://arxiv.org/abs/2306.17504>`_, 2023
    """

    mask: chex.Array
    layer: str = "the layer"

    def _multiply(
        self, product: _Product, lhs: Any, rhs: Any, features: _Features | None
    ) -> jax.Array:
        del features
        shape, dtype = jnp.shape(self.mask), jnp.result_type(self.mask)
        if shape != rhs.shape or dtype != jnp.bool_:
            raise ValueError(
                f"Masked: the mask of {self.layer} must be a bool array of the "
                f"kernel's shape {rhs.shape}, got {dtype} of shape {shape}; pass one "
                "made from the parameters, or none for a dense backward."
            )

        def backward(residuals: tuple[jax.Array, ...], dy: jax.Array) -> Any:
            lhs, rhs, mask = residuals
            masked = jnp.where(mask, rhs, 0)
            (dx,) = _pull_back(lambda lhs: product(lhs, masked), dy, lhs)
            (dw,) = _pull_back(lambda rhs: product(lhs, rhs), dy, rhs)
            return dx, dw, None

        return _with_backward(product, backward, lhs, rhs, jnp.asarray(self.mask))


class _FromMasks(nn.Module):
    """A product whose mask is the variable `masks/kernel` of the layer it is in."""

    def _product(self, name: str) -> Callable[..., jax.Array]:
        layer: Any = self.parent
        mask = layer.get_variable("masks", "kernel")
        if mask is None or trees.is_absent(mask):
            return getattr(lax, name)  # type: ignore[no-any-return]
        backward = Masked(mask, "/".join(layer.path) or "the layer")
        return getattr(backward, name)  # type: ignore[no-any-return]


class MaskedDotGeneral(_FromMasks):
    """`dot_general_cls` of linen's `Dense` and `DenseGeneral`, for :class:`Masked`.

    The masks are a collection of variables in the form of the parameters. Without it,
    as in `init`, and in layers whose mask is missing or `optax.MaskedNode`, the
    backward is the dense one: a single model serves both passes. Under `nn.scan` and
    `nn.vmap` name "masks" next to "params" in `variable_axes`.

    Raises:
      ValueError: In the product, if a mask is no bool array of the kernel's shape; the
        message names the layer's path.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from optax_sam import implicit
      >>> model = nn.Dense(2, dot_general_cls=implicit.MaskedDotGeneral)
      >>> x = jnp.ones([1, 3])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> masks = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
      >>> variables = {"params": params, "masks": masks}
      >>> print(jax.grad(lambda x: model.apply(variables, x).sum())(x))
      [[0. 0. 0.]]
    """

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Multiplies like `jax.lax.dot_general`."""
        return self._product("dot_general")(*args, **kwargs)


class MaskedConvGeneralDilated(_FromMasks):
    """`conv_general_dilated_cls` of linen's `Conv`; see :class:`MaskedDotGeneral`."""

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Convolves like `jax.lax.conv_general_dilated`."""
        return self._product("conv_general_dilated")(*args, **kwargs)


def sparsify(model: _Model, how: Channels | Mapping[Any, Any]) -> _Model:
    """Gives the layers of a Flax NNX model a sparse backward.

    Like `nnx.with_attributes` this leaves `model` as it is, and returns a model that
    shares its Variables: what updates the batch statistics of one updates the other's.
    Layers are `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Conv`, wherever they are in
    the model; others stay dense, and so do layers without a mask.

    Args:
      model: The model, for example just merged inside of a loss function.
      how: A :class:`Channels`, or masks for :class:`Masked`: a tree in the form of the
        `nnx.Param` state, an `nnx.State` or nested dicts, with bool arrays as leaves.

    Returns:
      The model with the sparse backward. With masks it holds them in attributes that
      are no state: make it where it is used, inside the compiled function.

    Raises:
      TypeError: If a layer has a product of its own, which would be lost.
      ValueError: If the masks fit no layer; in the product, if a mask is no bool array
        of the kernel's shape.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_sam import implicit
      >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> sparse = implicit.sparsify(model, implicit.Channels(0.5))
      >>> x = jnp.ones([2, 3])
      >>> grads = nnx.grad(lambda model: model(x).sum())(sparse)
      >>> int(grads["kernel"].any(axis=0).sum())
      2
      >>> masks = nnx.as_pure(nnx.map(lambda _, p: p[...] > 0, nnx.state(model)))
      >>> sparse = implicit.sparsify(model, masks)
    """
    changed = []

    def change(path: tuple[Any, ...], node: Any) -> Any:
        is_conv = isinstance(node, nnx.Conv)
        if is_conv or isinstance(node, nnx.Linear | nnx.LinearGeneral):
            name = "conv_general_dilated" if is_conv else "dot_general"
            backward = how if isinstance(how, Channels) else _find(how, path)
            if backward is not None:
                _check_plain(node, name, path)
                setattr(node, name, getattr(backward, name))
                changed.append(path)
        return node

    model = nnx.recursive_map(change, model)
    if not changed:
        raise ValueError(
            f"sparsify: found nothing to change in {type(model).__name__}; pass a "
            "model with Linear, LinearGeneral or Conv layers, and masks in the form of "
            "its nnx.Param state."
        )
    return model


def _find(masks: Any, path: tuple[Any, ...]) -> Masked | None:
    """The rule for the layer at `path`, None if there is no mask for it."""
    for key in (*path, "kernel"):
        if not isinstance(masks, Mapping) or key not in masks:
            return None
        masks = masks[key]
    if trees.is_absent(masks):
        return None
    return Masked(masks, "/".join(map(str, path)) or "the layer")


def _check_plain(layer: Any, name: str, path: tuple[Any, ...]) -> None:
    product = getattr(layer, name)
    plain = product is None or product is getattr(lax, name)
    sparse = isinstance(product, _DotGeneral | _ConvGeneralDilated)
    if not (plain or sparse) or getattr(layer, "dot_general_cls", None) is not None:
        raise TypeError(
            f"sparsify: the layer {'/'.join(map(str, path))} has a {name} of its own, "
            f"{product!r}; make it with the default one."
        )


def _with_backward(
    product: _Product, backward: Callable[..., Any], *args: jax.Array
) -> jax.Array:
    """Multiplies the first two of `args`; `backward` gets them all, and `dY`."""

    @jax.custom_vjp
    def fn(lhs: jax.Array, rhs: jax.Array, *_: jax.Array) -> jax.Array:
        return product(lhs, rhs)

    fn.defvjp(lambda *args: (product(*args[:2]), args), backward)
    out: jax.Array = fn(*args)
    return out


def _pull_back(fn: Callable[..., jax.Array], dy: jax.Array, *primals: Any) -> Any:
    # Not jax.linear_transpose, which forgets over which mesh axes the primals vary.
    return jax.vjp(fn, *primals)[1](dy)


def _squared_norms(x: jax.Array, axis: int) -> jax.Array:
    """Squared norms of the slices along `axis`, up to a factor they have in common."""
    x = x.astype(trees.accumulator_dtype(x.dtype))
    largest = jnp.max(jnp.abs(x), initial=0, where=jnp.isfinite(x))
    x = jnp.square(trees.ratio(x, largest))
    return jnp.sum(x, axis=[i for i in range(x.ndim) if i != axis % x.ndim])


def _zero_others(kept: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Zeros all slices of `x` along `axis` but those kept."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    keep = jnp.zeros(x.shape[axis], bool).at[kept].set(True)
    return jnp.where(keep.reshape(shape), x, 0)


def _spread(dw: jax.Array, kept: jax.Array, rhs: jax.Array, axis: int) -> jax.Array:
    """Spreads the gradient of the kept slices over the kernel, and zeros the others."""
    # A gather, since XLA on the CPU takes longer to scatter than to multiply.
    position = jnp.searchsorted(kept, jnp.arange(rhs.shape[axis]))
    dw = jnp.take(dw, position, axis, mode="clip")
    # The zeros come as a transposition, which also sums over the mesh axes that the
    # choice varies over and the kernel does not.
    (dw,) = _pull_back(lambda rhs: _zero_others(kept, rhs, axis), dw, rhs)
    return dw
