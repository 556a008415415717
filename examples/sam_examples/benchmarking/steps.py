"""The training steps to compile: methods by hand, and those of the library."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

import optax_sam
from sam_examples.benchmarking import by_hand
from sam_examples.benchmarking.measure import RHO, Update, sam_by_hand
from sam_examples.benchmarking.problems import Case

Base: TypeAlias = optax.GradientTransformation
BASE = "base"
THETA, STRENGTH, SPARSITY = 0.4, 0.1, 0.5
SIGMA, DECAY, ALPHA, GAMMA = 1.0, 0.9, 0.2, 0.8
PERIOD, REUSED = 5, 0.7
BETWEEN = 1  # Masks are made at the first step; at a count past it none is due.


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      make: from the case and the base to the optimizer and its update.
      by_hand: the row that does the same in plain JAX, if one does.
      at: the count of steps it is compiled for, see `sharded.compile_step`.
    """

    make: Callable[[Case, Base], tuple[Base, Update]]
    by_hand: str | None = None
    at: int | None = None


def value_and_grad(case: Case) -> Any:
    """Of the mean loss, with auxiliary data; gradients are means over devices."""
    own = jax.value_and_grad(mean_loss(case), has_aux=True)
    axis = case.problem.axis_name
    pmean: Any = jax.lax.pmean

    def averaged(*args: Any) -> Any:
        value, grads = own(*args)
        return value, grads if axis is None else pmean(grads, axis)

    return averaged


def mean_loss(case: Case) -> Any:
    """The mean loss of a device's examples, and auxiliary data."""

    def loss(*args: Any) -> tuple[jax.Array, Any]:
        losses, aux = case.problem.loss_fn(*args)
        return losses.mean(), aux

    return loss


def library(make_tx: Callable[[Case, Base], Base]) -> Any:
    """Any optimizer, through `optax_sam.value_and_update`."""

    def make(case: Case, base: Base) -> tuple[Base, Update]:
        tx = make_tx(case, base)
        return tx, optax_sam.value_and_update(
            case.problem.loss_fn,
            tx,
            has_aux=True,
            scoring_loss_fn=case.scoring_loss_fn,
            axis_name=case.problem.axis_name,
        )

    return make


def perturbed(
    perturb: by_hand.Perturb, init: Callable[[Any], Any], *descend: by_hand.Descend
) -> Any:
    """A method by hand that keeps something, which `init` makes of the parameters."""

    def make(case: Case, base: Base) -> tuple[Base, Update]:
        update = by_hand.perturbed(value_and_grad(case), base, perturb, *descend)
        return by_hand.with_state(base, init), update

    return make


def contrib_sam(case: Case, base: Base) -> tuple[Base, Update]:
    """Optax's own SAM."""
    tx = by_hand.make_contrib_sam(base, RHO)
    return tx, by_hand.contrib_sam(value_and_grad(case), tx)


def rw_sam_by_hand(case: Case, base: Base) -> tuple[Base, Update]:
    """RW-SAM by differences, of all examples in one program."""
    update = by_hand.rw_sam(case.problem.loss_fn, base, RHO, STRENGTH)
    return by_hand.with_state(base, lambda _: jnp.zeros([], jnp.int32)), update


def m_sam_by_hand(case: Case, base: Base) -> tuple[Base, Update]:
    """m-SAM of all examples in one program."""
    size = micro_batch_size(case)
    return base, by_hand.m_sam(value_and_grad(case), base, RHO, size)


def sam_of_layers_by_hand(case: Case, base: Base) -> tuple[Base, Update]:
    """SAM of the last layers, of all examples in one program."""
    select = optax_sam.select_layers(*case.last)
    return base, by_hand.sam_of_layers(mean_loss(case), base, RHO, select)


def m_sam(case: Case, base: Base) -> Base:
    """m-SAM, all at once: the compiler counts the FLOPs of a loop's body once."""
    tx: Base = optax_sam.m_sam(
        base, RHO, micro_batch_size(case), micro_batches_at_once=None
    )
    return tx


def micro_batch_size(case: Case) -> int:
    """The examples of a device, or where there is only one a quarter of them."""
    alone = case.problem.mesh.size == 1
    return max(1, case.batch_size // 4) if alone else case.batch_size


def sam_of_layers(case: Case, base: Base) -> Base:
    """SAM of the last layers."""
    mask = optax_sam.select_layers(*case.last)
    ascent = optax.chain(optax_sam.perturb_only(mask), optax_sam.scale_to_radius(RHO))
    tx: Base = optax_sam.sharpness_aware(base, ascent)
    return tx


def fisher(case: Case, base: Base) -> Base:
    """SSAM-F, which scores by probes where devices share the work."""
    tx: Base = optax_sam.sparse_sam(
        base,
        RHO,
        optax_sam.unstructured(SPARSITY),
        refresh_every=1000,
        estimator="per_example" if case.problem.mesh.size == 1 else "probes",
    )
    return tx


def dynamic(case: Case, base: Base) -> Base:
    """SSAM-D."""
    tx: Base = optax_sam.dynamic_sparse_sam(
        base, RHO, SPARSITY, refresh_every=1000, decay_steps=10**6, key=0
    )
    return tx


def sam_in_some_steps_by_hand(ascends: by_hand.Ascends) -> Any:
    """SAM in some steps, which counts them."""

    def make(case: Case, base: Base) -> tuple[Base, Update]:
        update = by_hand.sam_in_some_steps(value_and_grad(case), base, RHO, ascends)
        return by_hand.with_state(base, lambda _: jnp.zeros([], jnp.int32)), update

    return make


def look_sam_by_hand(ascends: by_hand.Ascends) -> Any:
    """LookSAM, which counts its steps and keeps a direction."""

    def make(case: Case, base: Base) -> tuple[Base, Update]:
        update = by_hand.look_sam(value_and_grad(case), base, RHO, REUSED, ascends)
        tx = by_hand.with_state(
            base, lambda params: tuple(by_hand.init_average(params))
        )
        return tx, update

    return make


def vasso_of_one_pass_by_hand(case: Case, base: Base) -> tuple[Base, Update]:
    """VaSSO of one pass, with the average of the base's gradients."""
    update = by_hand.vasso_of_one_pass(value_and_grad(case), base, RHO, THETA)
    return by_hand.with_state(base, by_hand.init_average), update


def sam_in_some_steps(ascends: by_hand.Ascends) -> Any:
    """SAM in some steps and the base in the others."""
    ascent = optax_sam.scale_to_radius(RHO)
    return library(
        lambda _, base: optax_sam.sharpness_aware(base, ascent, ascend_when=ascends)
    )


def look_sam(ascends: by_hand.Ascends) -> Any:
    """LookSAM."""
    return library(
        lambda _, base: optax_sam.sharpness_aware(
            optax.chain(optax_sam.reuse_ascent(REUSED), base),
            optax_sam.scale_to_radius(RHO),
            ascend_when=ascends,
        )
    )


def in_some_steps(name: str, make_by_hand: Any, make: Any) -> dict[str, Method]:
    """The rows of a method that ascends every few steps, and of each branch alone."""
    branches: Mapping[str, by_hand.Ascends] = {
        "": optax_sam.every(PERIOD),
        "_ascending": lambda _: True,
        "_skipping": lambda _: False,
    }
    rows = {}
    for branch, ascends in branches.items():
        other = f"{name}{branch}_by_hand"
        rows[other] = Method(make_by_hand(ascends))
        rows[f"{name}{branch}"] = Method(make(ascends), other)
    return rows


def nothing(params: Any) -> tuple[()]:
    """The state of a method by hand that keeps nothing."""
    return ()


# "between" leaves out what is done only when a new mask is due.
METHODS: Mapping[str, Method] = {
    BASE: Method(lambda case, base: (base, by_hand.plain(value_and_grad(case), base))),
    "sam_by_hand": Method(
        lambda case, base: (
            base,
            sam_by_hand(value_and_grad(case), base, RHO),
        )
    ),
    "contrib_sam": Method(contrib_sam, "sam_by_hand"),
    "sam": Method(library(lambda _, base: optax_sam.sam(base, RHO)), "sam_by_hand"),
    "asam_by_hand": Method(perturbed(by_hand.asam(RHO), nothing)),
    "asam": Method(library(lambda _, base: optax_sam.asam(base, RHO)), "asam_by_hand"),
    "vasso_by_hand": Method(perturbed(by_hand.vasso(RHO, THETA), by_hand.init_average)),
    "vasso": Method(
        library(lambda _, base: optax_sam.vasso(base, RHO, theta=THETA)),
        "vasso_by_hand",
    ),
    "momentum_sam_by_hand": Method(
        lambda case, base: (
            base,
            by_hand.momentum_sam(value_and_grad(case), base, RHO),
        )
    ),
    "momentum_sam": Method(
        library(lambda _, base: optax_sam.momentum_sam(base, RHO)),
        "momentum_sam_by_hand",
    ),
    "vasso_of_one_pass_by_hand": Method(vasso_of_one_pass_by_hand),
    "vasso_of_one_pass": Method(
        library(lambda _, base: optax_sam.vasso(base, RHO, THETA, one_pass=True)),
        "vasso_of_one_pass_by_hand",
    ),
    **in_some_steps("every_5", sam_in_some_steps_by_hand, sam_in_some_steps),
    **in_some_steps("look_sam_5", look_sam_by_hand, look_sam),
    "friendly_sam_by_hand": Method(
        perturbed(by_hand.friendly_sam(RHO, SIGMA, DECAY), by_hand.init_average)
    ),
    "friendly_sam": Method(
        library(lambda _, base: optax_sam.friendly_sam(base, RHO, SIGMA, DECAY)),
        "friendly_sam_by_hand",
    ),
    "gsam_by_hand": Method(perturbed(by_hand.sam(RHO), nothing, by_hand.gap(ALPHA))),
    "gsam": Method(
        library(lambda _, base: optax_sam.gsam(base, RHO, ALPHA)), "gsam_by_hand"
    ),
    "wsam_by_hand": Method(
        perturbed(by_hand.sam(RHO), nothing, by_hand.weighted(GAMMA))
    ),
    "wsam": Method(
        library(lambda _, base: optax_sam.wsam(base, RHO, GAMMA)), "wsam_by_hand"
    ),
    "mask_by_hand": Method(perturbed(by_hand.masked_sam(RHO), by_hand.init_mask)),
    "sparse_sam_between": Method(library(fisher), "mask_by_hand", BETWEEN),
    "sparse_sam": Method(library(fisher), "mask_by_hand"),
    "dynamic_between": Method(library(dynamic), "mask_by_hand", BETWEEN),
    "dynamic": Method(library(dynamic), "mask_by_hand"),
    "rw_sam_by_hand": Method(rw_sam_by_hand),
    "rw_sam": Method(
        library(
            lambda _, base: optax_sam.rw_sam(
                base, RHO, strength=STRENGTH, estimator="finite_difference"
            )
        ),
        "rw_sam_by_hand",
    ),
    "rw_sam_jvp": Method(
        library(
            lambda _, base: optax_sam.rw_sam(
                base, RHO, strength=STRENGTH, estimator="jvp"
            )
        ),
        "rw_sam_by_hand",
    ),
    "m_sam_by_hand": Method(m_sam_by_hand),
    "m_sam": Method(library(m_sam), "m_sam_by_hand"),
    "perturb_only_by_hand": Method(sam_of_layers_by_hand),
    "perturb_only": Method(library(sam_of_layers), "perturb_only_by_hand"),
}
ONE_PROGRAM = {"rw_sam_by_hand", "m_sam_by_hand", "perturb_only_by_hand"}


def names(case: Case) -> list[str]:
    """The methods that can be had of a case."""
    left_out = set() if case.problem.layout == "jit" else ONE_PROGRAM
    return [name for name in METHODS if name not in left_out]
