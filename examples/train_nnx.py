"""Trains a Flax NNX model on the digits with one method, by an `nnx.Optimizer`."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from sam_examples.data import Dataset, Split, normalized
from sam_examples.models.nnx_resnet import NORMS, ResNet
from sam_examples.settings.command_line import (
    NoisyDigits,
    make_run_directory,
    one_line_errors,
    write_results,
)
from sam_examples.settings.methods import (
    METHODS,
    check_batch,
    hyperparameters,
    is_functional,
    make_tx,
)
from sam_examples.training.epochs import prepare_digits, shuffled_batches
from sam_examples.training.step import cross_entropies, make_loss
from tqdm import tqdm

from optax_sam.flax import nnx_value_and_update


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """Trains a Flax NNX model on the digits with label noise, with one method.

    Prints the accuracy on the test images after the last epoch; writes all figures to
    results.json.
    """

    method: Annotated[
        str, tyro.conf.arg(help=f"Out of {', '.join(METHODS)}, or some joined by +.")
    ] = "sam"
    dropout: float = 0.1
    """Dropout rate on the features before the last layer."""
    seed: int = 0
    """Draws label noise, parameters, batches and dropout."""
    hyperparameters: tuple[str, ...] = ()
    """Changes of the method's hyperparameters, such as rho=0.05 theta=0.2."""


def output_fn(model: ResNet, batch: Split) -> tuple[jax.Array, jax.Array]:
    """The logits of the examples, `[B, C]`, and the accuracy of the model."""
    logits = model(batch.images)
    return logits, jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)


def scoring_loss_fn(model: Any, batch: Split) -> jax.Array:
    """The losses that Sparse SAM scores weights by, those in evaluation mode.

    An example normalised by itself has no gradient worth the name.
    """
    model.eval()
    return cross_entropies(model(batch.images), batch)


def make_train_step(*, functional: bool = False) -> Any:
    """Makes `train_step(model, optimizer, batch) -> loss, accuracy`, compiled.

    It moves the model and the optimizer by one step of any method.

    Args:
      functional: whether the method takes the loss in two parts.
    """
    loss_fn = make_loss(output_fn, cross_entropies, functional=functional)
    return nnx.jit(
        nnx_value_and_update(loss_fn, has_aux=True, scoring_loss_fn=scoring_loss_fn)
    )


@nnx.jit
def count_correct(model: ResNet, batch: Split) -> jax.Array:
    """How many images a model in evaluation mode classifies as labelled."""
    return jnp.sum(jnp.argmax(model(batch.images), axis=-1) == batch.labels)


class Training:
    """A model in training.

    Attributes:
      curves: means of each epoch, lists by name.
    """

    def __init__(
        self, options: Options, dataset: Dataset, tx: optax.GradientTransformation
    ) -> None:
        """Draws the parameters."""
        self._splits = {
            name: normalized(getattr(dataset, name), dataset)
            for name in ("train", "valid", "test")
        }
        self._model: Any = ResNet(
            options.stages,
            dataset.num_classes,
            channels=dataset.train.images.shape[-1],
            width=options.width,
            norm=NORMS[options.norm],
            dropout_rate=options.dropout,
            rngs=nnx.Rngs(options.seed),
        )
        functional = is_functional(options.method)
        self._train_step = make_train_step(functional=functional)
        self._optimizer = nnx.Optimizer(self._model, tx, wrt=nnx.Param)
        self.curves: dict[str, list[float]] = defaultdict(list)

    def train_epoch(self, indices: np.ndarray, bar: Any) -> None:
        """Trains on `indices[steps, batch_size]`, then evaluates for the curves."""
        train = self._splits["train"]
        self._model.train()
        steps = []
        for index in indices:
            batch = train.take(index)
            steps.append(self._train_step(self._model, self._optimizer, batch))
            bar.update()
        loss, accuracy = np.mean(np.array(jax.device_get(steps)), axis=0).tolist()
        self.curves["train_loss"].append(loss)
        self.curves["train_accuracy"].append(accuracy)
        self.curves["valid_accuracy"].append(self.accuracy("valid"))
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}", refresh=False)

    def accuracy(self, split: str) -> float:
        """Accuracy on "valid" or "test", by the running statistics."""
        self._model.eval()
        batch = self._splits[split]
        return float(count_correct(self._model, batch)) / len(batch.labels)


def train(options: Options, training: Training, num_examples: int) -> None:
    """Trains all epochs."""
    steps = num_examples // options.batch_size
    with tqdm(total=options.epochs * steps, unit="step", mininterval=0.5) as bar:
        for epoch in range(options.epochs):
            bar.set_description(f"epoch {epoch + 1} of {options.epochs}")
            key = jax.random.fold_in(jax.random.key(options.seed), epoch)
            indices = shuffled_batches(key, num_examples, options.batch_size)
            training.train_epoch(indices, bar)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        chosen = hyperparameters([options.method], options.hyperparameters)
        dataset, num_steps, base = prepare_digits(options, options.seed)
        check_batch(chosen, options.batch_size)
        values: Mapping[str, Any] = chosen[options.method]
        tx = make_tx(options.method, base, values, num_steps)
        directory = make_run_directory(options.out, f"nnx-{options.method}")
    training = Training(options, dataset, tx)
    train(options, training, len(dataset.train.labels))
    path = directory / "results.json"
    accuracy = training.accuracy("test")
    figures = {"test_accuracy": accuracy, "epochs": training.curves}
    write_results(path, options, hyperparameters=values, **figures)
    print(
        f"{options.method}: test accuracy {100 * accuracy:.2f} % after epoch "
        f"{options.epochs}; {path}"
    )


if __name__ == "__main__":
    main()
