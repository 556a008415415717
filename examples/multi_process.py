"""Trains on the devices of several processes, which may be on several machines.

Nothing here is special to sharpness-aware methods, and nothing to more than one
process: parameters and batches are arrays over all devices, and the step is compiled
for all of them. Every process runs this script and has a part of each batch, the same
examples in the same order whatever the number of processes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from sam_examples.data import (
    Dataset,
    Split,
    normalize,
    prefetched,
    training_batches,
)
from sam_examples.devices.processes import ProcessOptions, check_processes, start
from sam_examples.devices.sharding import (
    by_examples,
    make_mesh,
    of_opt_state,
    of_params,
    replicated,
)
from sam_examples.settings.command_line import (
    NoisyDigits,
    make_run_directory,
    one_line_errors,
    require,
    write_results,
)
from sam_examples.settings.methods import (
    METHODS,
    check_batch,
    hyperparameters,
    is_functional,
    make_tx,
)
from sam_examples.training.build import make_network
from sam_examples.training.epochs import prepare_digits
from sam_examples.training.evaluation import make_evaluate
from sam_examples.training.step import TrainState, make_step


@dataclasses.dataclass(frozen=True)
class Options(ProcessOptions, NoisyDigits):
    """Trains a small ResNet with one method, on all devices of several processes.

    Start the script once for each process, with the same options but for --process-id.
    Without --coordinator and --cluster it is the same training by one process. The
    first process reports, and writes results.json and the parameters.
    """

    method: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(METHODS)}.")] = "sam"
    hyperparameters: tuple[str, ...] = ()
    """Changes of the method's hyperparameters, such as rho=0.05 theta=0.2."""
    fully_sharded: bool = False
    """Whether devices share parameters and state, in place of a copy on each."""
    seed: int = 0
    """Draws label noise, parameters and batches."""


def batches(
    options: Options, dataset: Dataset, sharding: NamedSharding
) -> Iterator[Split]:
    """The batches of the training, each an array over all devices.

    Every process draws the same order, and prepares its own rows of each batch only.
    """
    own_rows = prefetched(
        training_batches(
            dataset.train,
            batch_size=options.batch_size,
            epochs=options.epochs,
            seed=options.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    )
    from_own_rows: Any = jax.make_array_from_process_local_data
    for stacked in own_rows:
        images, labels = (rows[0] for rows in stacked)
        images = normalize(images, dataset.mean, dataset.std)
        yield Split(*(from_own_rows(sharding, np.asarray(x)) for x in (images, labels)))


def make_state(
    options: Options, tx: optax.GradientTransformation, dataset: Dataset, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """The state before the first step, and how it lies on the devices.

    It is made where it is to be: no device ever has more than its part.
    """
    model = make_network(options, dataset)
    images = jnp.zeros((1, *dataset.train.images.shape[1:]))

    def init(key: jax.Array) -> TrainState:
        variables = model.init(key, images, train=False)
        params = variables["params"]
        return TrainState(params, variables.get("batch_stats", {}), tx.init(params))

    key = jax.random.key(options.seed)
    abstract = jax.eval_shape(init, key)
    everywhere = replicated(mesh)
    params = of_params(mesh, abstract.params, options.fully_sharded)
    shardings = TrainState(
        params,
        jax.tree.map(lambda _: everywhere, abstract.batch_stats),
        of_opt_state(tx, abstract.opt_state, abstract.params, params),
    )
    return jax.jit(init, out_shardings=shardings)(key), shardings


def train(
    options: Options, tx: optax.GradientTransformation, dataset: Dataset
) -> tuple[list[float], float, dict[str, Any]]:
    """The losses of the clean passes, the test accuracy and the parameters by path."""
    mesh = make_mesh()
    state, shardings = make_state(options, tx, dataset, mesh)
    model = make_network(options, dataset)
    # Compiled for all devices; the batches are normalized already.
    step = jax.jit(
        make_step(model, tx, functional=is_functional(options.method)),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    losses = []
    for count, batch in enumerate(batches(options, dataset, by_examples(mesh))):
        key = jax.random.fold_in(jax.random.key(options.seed), count)
        state, metrics = step(state, batch, key)
        losses.append(metrics.loss)
    evaluate = make_evaluate(model, dataset)
    accuracy = float(evaluate(state, dataset.test).accuracy)
    # Each process can read a copy of its own, and no part of the others'.
    gather = jax.jit(lambda params: params, out_shardings=replicated(mesh))
    leaves = jax.tree.leaves_with_path(gather(state.params))
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in leaves
    }
    return [float(loss) for loss in losses], accuracy, arrays


def report(
    options: Options,
    chosen: Mapping[str, Any],
    losses: Sequence[float],
    accuracy: float,
    params: dict[str, Any],
) -> None:
    """Prints the summary; writes results.json and params.npz."""
    directory = make_run_directory(options.out, f"multi_process-{options.method}")
    figures = {"processes": jax.process_count(), "devices": jax.device_count()}
    np.savez(directory / "params.npz", **params)
    write_results(
        directory / "results.json",
        options,
        hyperparameters=chosen,
        **figures,
        test_accuracy=accuracy,
        losses=losses,
    )
    print(
        f"{options.method} on {figures['devices']} devices of {figures['processes']} "
        f"processes: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps, "
        f"test accuracy {100 * accuracy:.2f} %; {directory / 'results.json'}"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the part of the training that falls to this process."""
    options = tyro.cli(Options, args=args)
    method = options.method
    with one_line_errors():
        check_processes(options)
        chosen = hyperparameters([method], options.hyperparameters)[method]
        dataset, num_steps, base = prepare_digits(options, options.seed)
        check_batch({method: chosen}, options.batch_size)
        start(options)
        devices = jax.device_count()
        require(
            options.batch_size % devices == 0,
            f"--batch-size must be a multiple of the number of devices, {devices}",
            options.batch_size,
        )
        tx = make_tx(method, base, chosen, num_steps)
    losses, accuracy, params = train(options, tx, dataset)
    if jax.process_index() == 0:
        report(options, chosen, losses, accuracy, params)


if __name__ == "__main__":
    main()
