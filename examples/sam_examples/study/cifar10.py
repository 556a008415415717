"""A training on CIFAR-10 that takes a GPU seconds: data, epochs and evaluation on it.

What differs between two runs of a method is traced, so that they share one compiled
program: an epoch, over data that stay on the device.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam
from optax_sam import diagnostics, implicit
from sam_examples.data import (
    Dataset,
    Split,
    augment,
    flip_labels,
    normalize,
    normalized,
)
from sam_examples.models.airbench import Airbench, whitening_filters
from sam_examples.models.convolution import fastest_convolution
from sam_examples.settings.command_line import require
from sam_examples.settings.methods import (
    METHODS,
    is_functional,
    make_ascent,
    sharpen,
)
from sam_examples.study.contestants import Run, Values
from sam_examples.training.evaluation import make_evaluate
from sam_examples.training.step import (
    TrainState,
    cross_entropies,
    make_init,
    make_loss,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all runs have in common.

    Of a run the hyperparameters may also be `learning_rate`, the largest one,
    `weight_decay` in place of the recipe's, `base` (sgd or adamw), `perturb`, the names
    of the layers of a static mask, and `implicit`, the share of the channels that the
    backward pass of the ascent leaves out.

    Attributes:
      widths: channels of the three blocks of the network.
      batch_size: images of a step.
      momentum: of SGD, Nesterov's.
      weight_decay: L2 penalty of all parameters.
      label_smoothing: share of each target that is spread over all classes.
      warmup: share of the steps in which the learning rate rises from 0; it then falls
        to 0, along lines.
      pad: pixels of padding on each side, from which crops are taken, 0 for no crops.
      dtype: type of the computation; parameters are float32.
      flip: whether images are flipped at random.
      num_images: training images, the first ones; without it, all.
      stride: pixels from one patch that the network whitens to the next.
      shrink: pixels a side whose mean is one pixel of an image as it is trained on.
      measured: training images that curvature and noise of the final parameters are
        measured on, the first ones; 0 for no measurement.
    """

    widths: tuple[int, int, int] = (64, 256, 256)
    batch_size: int = 512
    momentum: float = 0.9
    weight_decay: float = 1e-3
    label_smoothing: float = 0.2
    warmup: float = 0.2
    pad: int = 2
    dtype: str = "bfloat16"
    flip: bool = True
    num_images: int | None = None
    stride: int = 1
    shrink: int = 1
    measured: int = 0


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      valid: accuracy on the held-out split after the last epoch.
      test: accuracy on the test split.
      train_loss: mean loss of the last epoch's clean passes.
      fitted: accuracy on the training labels as they are given, wrong ones included,
        in evaluation mode.
      step_seconds: time of a step, the median over epochs: wall time, but on the CPU
        that of the processor, all threads together, which others do not lengthen.
      seconds: wall time of the training and its evaluation.
      measures: curvature and noise of the final parameters, see `Measure`, none unless
        the recipe asks for them; and means over the last epoch, see `Trainer.observe`.
    """

    valid: float
    test: float
    train_loss: float
    fitted: float
    step_seconds: float
    seconds: float
    measures: Mapping[str, float]


TRACED = ("learning_rate", "weight_decay", "rho", "theta", "strength", "alpha")
_BASES = ("sgd", "adamw")


class Trainer:
    """Trains runs of one recipe on one data set, each program compiled once.

    Attributes:
      recipe: what all runs have in common.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        """Puts the data on the device.

        Args:
          dataset: in memory, labels without noise.
          recipe: what all runs have in common.
        """
        train, valid, test = (
            shrunk(split, recipe.shrink)
            for split in (
                dataset.train.take(slice(recipe.num_images)),
                dataset.valid,
                dataset.test,
            )
        )
        self._labels = np.asarray(train.labels)
        self._dataset = dataset._replace(
            train=jax.device_put(train),
            valid=jax.device_put(valid),
            test=jax.device_put(test),
        )
        self.recipe = recipe
        self._epoch_steps = len(self._labels) // recipe.batch_size
        self._model = make_model(recipe, dataset.num_classes)
        first = normalize(train.images[:5000], dataset.mean, dataset.std)
        self._whitening = jnp.asarray(whitening_filters(first))
        self._init = make_init(self._model, dataset)
        self._evaluate = make_evaluate(self._model, dataset)
        self._measure = Measure(self._model, dataset, recipe)
        self._programs: dict[Any, Any] = {}

    def program(self, run: Run) -> Any:
        """What the compiled program of a run depends on: runs that share it are equal.

        Hashable.
        """
        fixed = {k: v for k, v in self._values(run).items() if k not in TRACED}
        return run.method, tuple(sorted(fixed.items()))

    def is_compiled(self, run: Run) -> bool:
        """Whether `train` would start at once."""
        return self.program(run) in self._programs

    def compile(self, run: Run) -> None:
        """Compiles the program of a run."""
        values, split = self._values(run), self._dataset.train
        traced = _traced(values, run, self._epoch_steps)
        state = self._first_state(run, values)
        epoch = jax.jit(self._make_epoch(run.method, values), donate_argnums=0)
        lowered = epoch.lower(state, split, traced, jax.random.key(0))
        self._programs[self.program(run)] = lowered.compile()

    def train(self, run: Run) -> Outcome:
        """Trains and evaluates, with a compiled program."""
        start = time.perf_counter()
        values = self._values(run)
        traced = _traced(values, run, self._epoch_steps)
        labels = flip_labels(
            self._labels, run.noise, self._dataset.num_classes, run.seed
        )
        split = self._dataset.train._replace(labels=jnp.asarray(labels))
        state, key = self._first_state(run, values), jax.random.key(run.seed)
        program, seconds = self._programs[self.program(run)], []
        clock = _clock()
        for epoch in range(run.epochs):
            epoch_start = clock()
            state, means = program(state, split, traced, jax.random.fold_in(key, epoch))
            means["loss"].block_until_ready()
            seconds.append(clock() - epoch_start)
        valid, test, fitted = (
            float(self._evaluate(state, split).accuracy)
            for split in (self._dataset.valid, self._dataset.test, split)
        )
        loss = float(means.pop("loss"))
        seen = {name: float(mean) for name, mean in means.items()}
        return Outcome(
            valid=valid,
            test=test,
            train_loss=loss,
            fitted=fitted,
            step_seconds=float(np.median(seconds)) / self._epoch_steps,
            seconds=time.perf_counter() - start,
            measures={**seen, **self.measure(run, state, split)},
        )

    def observe(self, before: TrainState, after: TrainState) -> dict[str, jax.Array]:
        """What is averaged over the steps of an epoch, beside the loss, by name."""
        del before, after
        return {}

    def measure(self, run: Run, state: TrainState, split: Split) -> dict[str, float]:
        """What is measured after the last epoch, by name."""
        del run
        return self._measure(state, split) if self.recipe.measured else {}

    def loss_fns(self, method: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The loss of a step, and the one in evaluation mode that masks are scored by.

        Both take `(params, batch, batch_stats)`; the first has the new statistics as
        auxiliary data.
        """
        return _make_loss_fns(self._model, self.recipe, is_functional(method))

    def turn(self, run: Run) -> Callable[[], float]:
        """A function that trains for an epoch, and returns the seconds of a step.

        On the CPU they are those of the processor, which others do not lengthen.
        """
        if not self.is_compiled(run):
            self.compile(run)
        values, split = self._values(run), self._dataset.train
        state, key = self._first_state(run, values), jax.random.key(run.seed)
        traced = _traced(values, run, self._epoch_steps)
        program, clock = self._programs[self.program(run)], _clock()

        def epoch() -> float:
            nonlocal state
            start = clock()
            state, means = program(state, split, traced, key)
            means["loss"].block_until_ready()
            return (clock() - start) / self._epoch_steps

        return epoch

    def _values(self, run: Run) -> dict[str, Any]:
        """The hyperparameters of a run, those that it leaves out included."""
        defaults = {
            name: value
            for part in run.method.split("+")
            for name, value in METHODS[part].items()
        }
        # A new mask each epoch.
        if "refresh_every" in defaults:
            defaults["refresh_every"] = self._epoch_steps
        common = {"base": _BASES[0], "weight_decay": self.recipe.weight_decay}
        return {**common, **defaults, **dict(run.hyperparameters)}

    def _first_state(self, run: Run, values: Values) -> TrainState:
        tx = self._make_tx(run.method, values, run.epochs * self._epoch_steps, run.seed)
        state = self._init(run.seed, tx)
        stats = {**state.batch_stats, "whitening": jnp.copy(self._whitening)}
        return state._replace(batch_stats=stats)

    def _make_tx(
        self, method: str, values: Values, num_steps: Any, seed: int
    ) -> optax.GradientTransformation:
        values = dict(values)
        base = make_base(self.recipe, values, num_steps)
        perturb = values.pop("perturb", ())
        ascent = make_ascent(method, values, num_steps, key=seed, perturb=perturb)
        # A loop is slow on the CPU, and elsewhere spares convolutions in groups.
        at_once = None if jax.default_backend() == "cpu" else 1
        return sharpen(method, base, ascent, values, at_once)

    def _make_epoch(self, method: str, values: Values) -> Callable[..., Any]:
        """Makes `epoch(state, split, traced, key) -> state, means`, to be compiled."""
        fixed = {k: v for k, v in values.items() if k not in TRACED}
        loss_fn, scoring_loss_fn = self.loss_fns(method)
        ascent_loss_fn = None
        if "implicit" in values:
            backward = implicit.Channels(values["implicit"])
            sparse = make_model(self.recipe, self._dataset.num_classes, backward)
            ascent_loss_fn, _ = _make_loss_fns(sparse, self.recipe, functional=False)

        def epoch(
            state: TrainState, split: Split, traced: Values, key: jax.Array
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            numbers = dict(traced)
            num_steps = numbers.pop("num_steps")
            # What a method draws with is in its state.
            tx = self._make_tx(method, {**fixed, **numbers}, num_steps, seed=0)
            take = optax_sam.value_and_update(
                loss_fn,
                tx,
                has_aux=True,
                ascent_loss_fn=ascent_loss_fn,
                scoring_loss_fn=scoring_loss_fn,
            )

            def step(
                before: TrainState, step_input: tuple[jax.Array, jax.Array]
            ) -> tuple[TrainState, dict[str, jax.Array]]:
                index, key = step_input
                batch = self.batch(split, index, key)
                params, stats, opt_state = before
                (loss, stats), updates, opt_state = take(
                    params, opt_state, batch, stats
                )
                params = optax.apply_updates(params, updates)
                after = TrainState(params, stats, opt_state)
                return after, {"loss": loss, **self.observe(before, after)}

            order_key, steps_key = jax.random.split(key)
            size = (self._epoch_steps, self.recipe.batch_size)
            order = jax.random.permutation(order_key, len(split.labels))
            indices = order[: math.prod(size)].reshape(size)
            keys = jax.random.split(steps_key, len(indices))
            state, seen = jax.lax.scan(step, state, (indices, keys))
            return state, jax.tree.map(jnp.mean, seen)

        return epoch

    def batch(self, split: Split, index: jax.Array, key: jax.Array) -> Split:
        """The images of a step, cropped and flipped."""
        dataset = self._dataset
        images = normalize(split.images[index], dataset.mean, dataset.std)
        recipe = self.recipe
        images = augment(
            key, images, pad=recipe.pad, flip=recipe.flip, cutout_probability=0.0
        )
        return Split(images, split.labels[index])


class Measure:
    """Measures curvature and noise of a trained network, on some training images.

    Of the cross-entropy with the labels as they are given, in evaluation mode:

    * `top_eigenvalue`, the largest of the Hessian, by ten iterations of Lanczos;
    * `hessian_trace`, by eight probes;
    * `covariance_trace`, that of the gradients of single images.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, recipe: Recipe) -> None:
        """Compiles nothing yet."""
        self._count = recipe.measured

        def measure(params: Any, stats: Any, split: Split) -> dict[str, jax.Array]:
            def loss_fn(params: Any, batch: Split) -> jax.Array:
                variables = {"params": params, "batch_stats": stats}
                logits: Any = model.apply(variables, batch.images, train=False)
                return cross_entropies(logits, batch)

            problem = (loss_fn, params, Split(*normalized(split, dataset)))
            top = diagnostics.top_eigenvalues(*problem, iterations=10, key=0)
            trace = diagnostics.hessian_trace(*problem, num_probes=8, key=1)
            noise = diagnostics.gradient_covariance_trace(*problem, chunk_size=64)
            return {
                "top_eigenvalue": top.values[0],
                "hessian_trace": trace.mean,
                "covariance_trace": noise,
            }

        self._compiled: Any = jax.jit(measure)

    def __call__(self, state: TrainState, split: Split) -> dict[str, float]:
        """The figures of a network in training on this split."""
        some = split.take(slice(self._count))
        figures = self._compiled(state.params, state.batch_stats, some)
        return {name: float(figure) for name, figure in figures.items()}


def make_model(
    recipe: Recipe, num_classes: int, backward: implicit.Channels | None = None
) -> Airbench:
    """The network of a recipe, with the usual backward by default."""
    return Airbench(
        num_classes,
        recipe.widths,
        conv=fastest_convolution(jax.default_backend(), backward),
        dtype=jnp.dtype(recipe.dtype),
        stride=recipe.stride,
    )


def make_base(
    recipe: Recipe, values: dict[str, Any], num_steps: Any
) -> optax.GradientTransformation:
    """The base optimizer, whose values are taken out of those of the run."""
    rate = triangle(values.pop("learning_rate"), recipe.warmup, num_steps)
    decay, base = values.pop("weight_decay"), values.pop("base")
    require(base in _BASES, f"base must be one of {', '.join(_BASES)}", base)
    if base == "adamw":
        return optax.adamw(rate, weight_decay=decay)
    sgd = optax.sgd(rate, momentum=recipe.momentum, nesterov=True)
    return optax.chain(optax.add_decayed_weights(decay), sgd)


def shrunk(split: Split, factor: int) -> Split:
    """Images with a mean over `factor` by `factor` pixels in place of each pixel."""
    if factor == 1:
        return split
    images = np.asarray(split.images, np.float32)
    count, height, width, channels = images.shape
    tiles = images.reshape(
        count, height // factor, factor, width // factor, factor, channels
    )
    return split._replace(images=np.rint(tiles.mean((2, 4))).astype(np.uint8))


def _clock() -> Callable[[], float]:
    on_cpu = jax.default_backend() == "cpu"
    return time.process_time if on_cpu else time.perf_counter


def _traced(values: Values, run: Run, epoch_steps: int) -> dict[str, jax.Array]:
    """The numbers that a compiled program is called with."""
    numbers = {k: jnp.float32(v) for k, v in values.items() if k in TRACED}
    return {**numbers, "num_steps": jnp.int32(run.epochs * epoch_steps)}


def triangle(peak: Any, warmup: float, num_steps: Any) -> optax.Schedule:
    """Rises from 0 over a share of the steps, then falls to 0, along lines."""

    def schedule(count: Any) -> jax.Array:
        done = (count + 1) / (num_steps + 1)
        rate: jax.Array = peak * jnp.minimum(done / warmup, (1 - done) / (1 - warmup))
        return rate

    return schedule


def _make_loss_fns(
    model: nn.Module, recipe: Recipe, functional: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The loss of a step, and the one in evaluation mode that masks are scored by."""

    def losses_of(logits: Any, batch: Split, *_: Any) -> jax.Array:
        targets = jax.nn.one_hot(batch.labels, logits.shape[-1])
        targets = optax.smooth_labels(targets, recipe.label_smoothing)
        losses: jax.Array = optax.softmax_cross_entropy(logits, targets)
        return losses

    def output_fn(params: Any, batch: Split, stats: Any) -> tuple[Any, Any]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": stats},
            batch.images,
            train=True,
            mutable=["batch_stats"],
        )
        return logits, updated["batch_stats"]

    def scoring_loss_fn(params: Any, batch: Split, stats: Any) -> jax.Array:
        variables = {"params": params, "batch_stats": stats}
        return losses_of(model.apply(variables, batch.images, train=False), batch)

    loss_fn = make_loss(output_fn, losses_of, functional=functional)
    return loss_fn, scoring_loss_fn
