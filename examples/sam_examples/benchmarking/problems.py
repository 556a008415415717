"""Networks to compile training steps of, from shapes alone."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sam_examples import models
from sam_examples.benchmarking.sharded import Layout, Problem
from sam_examples.data import Split
from sam_examples.data.token_batches import TokenBatch
from sam_examples.devices.sharding import (
    as_shapes,
    by_examples,
    of_params,
    replicated,
)
from sam_examples.models.encoder_decoder import make_translator
from sam_examples.models.transformer import Transformer, make_language_loss_fn
from sam_examples.settings.command_line import require
from sam_examples.training import translation
from sam_examples.training.step import make_loss_fn, make_scoring_loss_fn

Placement = Literal["jit", "fully_sharded", "shard_map", "pmap"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a network and of its batch; None where it has none to choose.

    Attributes:
      batch_size: examples for each device.
      layers: number of layers.
      width: inputs and outputs of each.
      image_size: height and width of images.
    """

    batch_size: int
    layers: int | None = None
    width: int | None = None
    image_size: int | None = None


class Network(NamedTuple):
    """A network before it lies anywhere.

    Attributes:
      init: makes its variables, `{"params": ..., "batch_stats": ...}` or the first.
      batch: shapes of a batch over all devices.
      loss_fn: `loss_fn(params, batch, batch_stats)` returns losses, and a pair of the
        new statistics and the accuracy.
      scoring_loss_fn: takes the same, and returns the losses in evaluation mode.
      last: names of the last layers, for a static mask.
    """

    init: Callable[[], Any]
    batch: Any
    loss_fn: Callable[..., Any]
    scoring_loss_fn: Callable[..., jax.Array]
    last: tuple[str, ...]


class Case(NamedTuple):
    """A problem on devices, and what some methods want to know of it beside.

    Attributes:
      problem: the loss and the places of everything.
      scoring_loss_fn: see `Network`.
      last: see `Network`.
      batch_size: examples for each device.
    """

    problem: Problem
    scoring_loss_fn: Callable[..., jax.Array]
    last: tuple[str, ...]
    batch_size: int


def make_case(name: str, sizes: Sizes, mesh: Mesh, placement: Placement) -> Case:
    """Puts a network on devices.

    Args:
      name: out of `NETWORKS`.
      sizes: all that the network has, see `choose`.
      mesh: the devices.
      placement: how they share the work. Every one has a copy of the parameters or,
        fully sharded, a part of every large array.
    """
    fully_sharded = placement == "fully_sharded"
    layout: Layout = "jit" if placement == "fully_sharded" else placement
    network = NETWORKS[name].make(sizes, mesh, fully_sharded)
    everywhere = replicated(mesh)
    variables = jax.eval_shape(network.init)
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    problem = Problem(
        network.loss_fn,
        as_shapes(params, of_params(mesh, params, fully_sharded)),
        as_shapes(
            network.batch, jax.tree.map(lambda _: by_examples(mesh), network.batch)
        ),
        mesh,
        others=(as_shapes(stats, jax.tree.map(lambda _: everywhere, stats)),),
        layout=layout,
    )
    return Case(problem, network.scoring_loss_fn, network.last, sizes.batch_size)


def choose(name: str, **asked: int | None) -> Sizes:
    """The sizes of a network: its own, or those asked for.

    Raises:
      ValueError: if one is asked for that the network does not have.
    """
    sizes = NETWORKS[name].sizes
    for size, value in asked.items():
        if value is not None:
            flag = size.replace("_", "-")
            has = getattr(sizes, size) is not None
            require(has, f"{name} has no --{flag} to choose", value)
            require(value >= 1, f"--{flag} must be at least 1", value)
    given = {size: value for size, value in asked.items() if value is not None}
    return dataclasses.replace(sizes, **given)


def _shape(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    make: Any = jax.ShapeDtypeStruct
    return make(shape, dtype)


def _without_statistics(
    init: Callable[[], Any],
    batch: Any,
    losses: Callable[[Any, Any], jax.Array],
    last: str,
) -> Network:
    """A network from `losses(params, batch)`."""

    def loss_fn(params: Any, batch: Any, stats: Any) -> Any:
        return losses(params, batch), (stats, ())

    def scoring_loss_fn(params: Any, batch: Any, stats: Any) -> jax.Array:
        return losses(params, batch)

    return Network(lambda: {"params": init()}, batch, loss_fn, scoring_loss_fn, (last,))


def _layered(
    layer: Callable[[Any, jax.Array], jax.Array],
    arrays: Mapping[str, int],
    sizes: Sizes,
    mesh: Mesh,
    fully_sharded: bool,
) -> Network:
    """Layers of the same width in a row, and the mean square of what comes out.

    Args:
      layer: from the arrays of a layer and its input to its output.
      arrays: the number of axes of each array, all of the length of the width.
      sizes: number of layers, width, batch size.
      mesh: the devices, each of which has a batch.
      fully_sharded: changes nothing.
    """
    num_layers, width = sizes.layers or 0, sizes.width or 0
    names = [f"layer_{i:03}" for i in range(num_layers)]

    def init() -> Any:
        return {
            name: {key: jnp.zeros((width,) * ndim) for key, ndim in arrays.items()}
            for name in names
        }

    def losses(params: Any, x: jax.Array) -> jax.Array:
        for name in names:
            x = layer(params[name], x)
        return jnp.mean(x**2, axis=-1)

    batch = _shape((mesh.size * sizes.batch_size, width))
    return _without_statistics(init, batch, losses, names[-1])


def _matrix(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["kernel"])


def _normalised(params: Any, x: jax.Array) -> jax.Array:
    """A layer around a shortcut, normalised over the batch without running means."""
    y = x @ params["kernel"]
    y = (y - y.mean(0, keepdims=True)) / (y.std(0, keepdims=True) + 1e-5)
    return x + jnp.tanh(y * params["scale"][None] + params["bias"][None])


def _transformer(sizes: Sizes, mesh: Mesh, fully_sharded: bool) -> Network:
    width, length, vocabulary = sizes.width or 0, 128, 32_768
    require(width % 128 == 0, "--width must be a multiple of 128, a head's", width)
    options: dict[str, Any] = {}
    if fully_sharded:
        # Else the compiler may share out the tokens of a layer in another way.
        constrain = jax.lax.with_sharding_constraint
        options["place"] = partial(constrain, shardings=by_examples(mesh))
    model = Transformer(
        vocabulary, width, sizes.layers or 0, width // 128, 4 * width, **options
    )
    tokens = _shape((mesh.size * sizes.batch_size, length + 1), jnp.int32)

    def init() -> Any:
        inputs = jnp.zeros((mesh.size, length), jnp.int32)
        return model.init(jax.random.key(0), inputs)["params"]

    return _without_statistics(init, tokens, make_language_loss_fn(model), "logits")


def _images(
    model: str,
    classes: int,
    last: tuple[str, ...],
    sizes: Sizes,
    mesh: Mesh,
    fully_sharded: bool,
) -> Network:
    """A network of images that computes in bfloat16, with float32 parameters."""
    size = sizes.image_size or 0
    net = models.make(model, classes, image_size=size, dtype=jnp.bfloat16)
    number = mesh.size * sizes.batch_size
    batch = Split(_shape((number, size, size, 3)), _shape((number,), jnp.int32))

    def init() -> Any:
        images = jnp.zeros((1, size, size, 3))
        return net.init(jax.random.key(0), images, train=False)

    def keyed(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        # There is no dropout to draw for.
        return lambda *args: loss_fn(*args, jax.random.key(0))

    return Network(
        init,
        batch,
        keyed(make_loss_fn(net)),
        keyed(make_scoring_loss_fn(net)),
        last,
    )


def _translation(sizes: Sizes, mesh: Mesh, fully_sharded: bool) -> Network:
    """The Transformer that translates, in bfloat16 with float32 parameters.

    As `translate.py` trains it, but for dropout: from and to 64 tokens, with one table
    of 37,000 subwords, the published number.
    """
    width = sizes.width or 0
    require(width % 64 == 0, "--width must be a multiple of 64, a head's", width)
    net = make_translator(
        "base",
        37_000,
        num_layers=sizes.layers,
        width=width,
        num_heads=width // 64,
        hidden=4 * width,
        dtype=jnp.bfloat16,
    )
    smoothing = 0.1
    tokens = _shape((mesh.size * sizes.batch_size, 64), jnp.int32)

    def init() -> Any:
        one = jnp.zeros((1, 64), jnp.int32)
        return net.init(jax.random.key(0), one, one, train=False)

    def prepared(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        def fn(params: Any, batch: TokenBatch, stats: Any) -> Any:
            seen, key = translation.prepare(batch, jax.random.key(0))
            return loss_fn(params, seen, stats, key)

        return fn

    return Network(
        init,
        TokenBatch(tokens, tokens),
        prepared(translation.make_translation_loss_fn(net, smoothing)),
        prepared(translation.make_scoring_loss_fn(net, smoothing)),
        (f"decoder_{net.num_layers - 1}",),
    )


class Recipe(NamedTuple):
    """How a network is made.

    Attributes:
      sizes: the default ones.
      make: from sizes, mesh and whether all is sharded to the network.
      layout: how devices share it by default.
    """

    sizes: Sizes
    make: Callable[[Sizes, Mesh, bool], Network]
    layout: Placement = "jit"


NETWORKS: Mapping[str, Recipe] = {
    # Parameters dominate: few large arrays, or many small ones.
    "matrices": Recipe(Sizes(8, 6, 4096), partial(_layered, _matrix, {"kernel": 2})),
    "leaves": Recipe(
        Sizes(8, 100, 256),
        partial(_layered, _normalised, {"kernel": 2, "scale": 1, "bias": 1}),
    ),
    "resnet8": Recipe(
        Sizes(128, image_size=32),
        partial(_images, "resnet8", 10, ("BasicBlock_2", "Dense_0")),
    ),
    "resnet18": Recipe(
        Sizes(128, image_size=32),
        partial(_images, "resnet18", 10, ("BasicBlock_7", "Dense_0")),
    ),
    "resnet50": Recipe(
        Sizes(128, image_size=224),
        partial(_images, "resnet50", 1000, ("BottleneckBlock_15", "Dense_0")),
    ),
    "vit_b": Recipe(
        Sizes(64, image_size=224),
        partial(_images, "vit_b", 1000, ("layer_11", "norm", "head")),
    ),
    "transformer": Recipe(Sizes(1, 20, 2048), _transformer, "fully_sharded"),
    # Of 4,096 tokens of either language on each device.
    "translation": Recipe(Sizes(64, 6, 512), _translation, "fully_sharded"),
}
