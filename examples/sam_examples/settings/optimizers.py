"""The optimizers beneath the methods: any of Optax by name, and learning rates."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax
import optax.contrib

# What an optimizer gets unless the command line says otherwise.
BASE_HYPERPARAMETERS: Mapping[str, Mapping[str, Any]] = {"sgd": {"momentum": 0.9}}


Schedule = Literal["cosine", "inverse_sqrt", "constant"]


def make_schedule(
    kind: Schedule,
    learning_rate: float,
    num_steps: int,
    num_warmup_steps: int = 0,
) -> optax.Schedule:
    """A learning rate that rises from 0 over some steps, if any, and then falls or not.

    Args:
      kind: "cosine" falls to 0 along half a cosine, "inverse_sqrt" as
        `sqrt(num_warmup_steps / step)` (Vaswani et al., 2017, arXiv 1706.03762, eq. 3).
      learning_rate: the largest one.
      num_steps: length of the training, the warm-up included.
      num_warmup_steps: length of the warm-up, in which it rises along a line.

    Raises:
      ValueError: if "inverse_sqrt" has no warm-up.
    """
    if kind == "inverse_sqrt" and not num_warmup_steps:
        raise ValueError(
            "--schedule inverse_sqrt needs a step of warm-up at least, from which on "
            "the learning rate falls; give --warmup-epochs."
        )

    def inverse_sqrt(count: Any) -> Any:
        # Optax asks for steps of the warm-up too, negative ones, and drops the answer.
        step = num_warmup_steps + jnp.maximum(count, 0)
        return learning_rate * jnp.sqrt(num_warmup_steps / step)

    schedule = {
        "cosine": optax.cosine_decay_schedule(
            learning_rate, num_steps - num_warmup_steps
        ),
        "inverse_sqrt": inverse_sqrt,
        "constant": optax.constant_schedule(learning_rate),
    }[kind]
    if not num_warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, learning_rate, num_warmup_steps)
    return optax.join_schedules([warmup, schedule], [num_warmup_steps])


def make_base(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    assignments: Sequence[str] = (),
) -> optax.GradientTransformation:
    """An optimizer of Optax by its name.

    Args:
      name: such as sgd, adamw or contrib.muon.
      learning_rate: a number or a schedule.
      weight_decay: given to an optimizer that has a weight decay of its own; for any
        other it is an L2 penalty, added to the gradient.
      assignments: further arguments of the optimizer, such as `b1=0.95`.

    Raises:
      ValueError: if Optax has no such optimizer, or it does not take an argument.
    """
    factory = _find(name)
    arguments = {"learning_rate": learning_rate}
    arguments |= BASE_HYPERPARAMETERS.get(name, {})
    parameters = inspect.signature(factory).parameters
    decays = "weight_decay" in parameters
    if decays:
        arguments["weight_decay"] = weight_decay
    for assignment in assignments:
        key, value = _parse(assignment)
        if key not in parameters or key in ("learning_rate", "weight_decay"):
            free = [p for p in parameters if p not in ("learning_rate", "weight_decay")]
            raise ValueError(
                f"--base-hyperparameters: {name} does not take {key!r}; it takes "
                f"{', '.join(free)}."
            )
        arguments[key] = value
    try:
        base: optax.GradientTransformation = factory(**arguments)
    except TypeError as error:
        raise ValueError(
            f"--base {name} cannot be made ({error}); --base-hyperparameters gives it "
            "what is missing, and --schedule constant a number for learning rate."
        ) from error
    if decays:
        return base
    penalised: optax.GradientTransformation = optax.chain(
        optax.add_decayed_weights(weight_decay), base
    )
    return penalised


def _find(name: str) -> Callable[..., optax.GradientTransformation]:
    place, _, function = name.rpartition(".")
    modules = {"": optax, "contrib": optax.contrib}
    factory = getattr(modules.get(place), function, None)
    if not callable(factory) or (
        "learning_rate" not in inspect.signature(factory).parameters
    ):
        raise ValueError(
            f"--base {name} is no optimizer of Optax that takes a learning rate; give "
            "a name such as sgd, adamw, lion or contrib.muon."
        )
    optimizer: Callable[..., optax.GradientTransformation] = factory
    return optimizer


def _parse(assignment: str) -> tuple[str, Any]:
    key, _, value = assignment.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"--base-hyperparameters: {assignment!r} has no number, True, False or "
            "quoted string after '='; write for example nesterov=True."
        ) from None


def momentum_sgd(
    learning_rate: float, num_steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with momentum 0.9, cosine learning rate down to 0 and L2 weight decay."""
    schedule = make_schedule("cosine", learning_rate, num_steps)
    return make_base("sgd", schedule, weight_decay)
