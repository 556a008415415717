"""Ways to take SAM's ascent along a part of the network, by name.

A configuration says which weights are perturbed, and what the clean pass computes for
it. The names of layers are those of the ResNets in `models/resnet.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import optax

import optax_sam
from optax_sam import implicit
from sam_examples.data import Split
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet
from sam_examples.training.step import LossFn, make_loss_fn

# `ascent(rho, num_steps, epoch_steps)` makes an ascent, None for the base optimizer.
MakeAscent = Callable[[Any, int, int], optax.GradientTransformation | None]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is perturbed, and what the clean pass goes back through.

    Attributes:
      kind: what it saves by, for the figure.
      make_ascent: see `MakeAscent`; None where it depends on `chosen`.
      channels: share of the output channels of each convolution that the backward of
        the clean pass goes through.
      examples: share of the batch that the clean pass sees.
      chosen: if given, only layers of large Fisher score are perturbed, and this is the
        share of the weights that is left out.
      micro_batch_size: examples that ascend for themselves, if not all in one.
      descent: the first link of the base, if there is one before the optimizer.
      ascend_when: from the number of steps to what says which of them ascend, if not
        all do.
    """

    kind: str
    make_ascent: MakeAscent | None
    channels: float = 1.0
    examples: float = 1.0
    chosen: float | None = None
    micro_batch_size: int | None = None
    descent: optax.GradientTransformation | None = None
    ascend_when: Callable[[int], Any] | None = None

    def with_layers(self, mask: Any) -> "Configuration":
        """The configuration once the layers are chosen, by a tree of bools."""
        return dataclasses.replace(self, make_ascent=_only(mask), chosen=None)

    def make_tx(
        self,
        base: optax.GradientTransformation,
        rho: Any,
        num_steps: int,
        epoch_steps: int,
    ) -> optax.GradientTransformation:
        """The optimizer, for a rho that may be traced."""
        if self.make_ascent is None:
            raise ValueError("the layers are to be chosen first, see with_layers.")
        ascent = self.make_ascent(rho, num_steps, epoch_steps)
        if ascent is None:
            return base
        if self.descent is not None:
            base = optax.chain(self.descent, base)
        return optax_sam.sharpness_aware(
            base,
            ascent,
            ascend_when=self.ascend_when and self.ascend_when(num_steps),
            micro_batch_size=self.micro_batch_size,
            # A loop is slow on the CPU, and small networks have the memory.
            micro_batches_at_once=None,
        )

    def make_ascent_loss_fn(self, model: ResNet) -> LossFn | None:
        """The loss of the clean pass, None if it is that of the perturbed pass."""
        if self.channels == self.examples == 1:
            return None
        if self.channels < 1:
            backward = implicit.Channels(1 - self.channels)
            conv = partial(PatchConv, dot_general=backward.dot_general)
            model = model.clone(conv=conv)
        loss_fn = make_loss_fn(model)

        def of_first_examples(
            params: Any, batch: Split, batch_stats: Any, key: jax.Array
        ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            size = max(1, round(self.examples * len(batch.labels)))
            first = Split(*(x[:size] for x in batch))
            return loss_fn(params, first, batch_stats, key)

        return of_first_examples


def _nowhere(rho: Any, num_steps: int, epoch_steps: int) -> None:
    return None


def _everywhere(
    rho: Any, num_steps: int, epoch_steps: int
) -> optax.GradientTransformation:
    return optax_sam.scale_to_radius(rho)


def _only(mask: Any) -> MakeAscent:
    """Perturbs the leaves that a mask selects, by a vector of length rho."""
    return lambda rho, num_steps, epoch_steps: optax.chain(
        optax_sam.perturb_only(mask), optax_sam.scale_to_radius(rho)
    )


def _at_random(mask: Any) -> MakeAscent:
    """Perturbs these leaves as well, in a random direction: needs no gradient."""

    def make_ascent(
        rho: Any, num_steps: int, epoch_steps: int
    ) -> optax.GradientTransformation:
        draw = (optax.set_to_zero(), optax.add_noise(eta=1.0, gamma=0.0, key=0))
        radius = optax_sam.scale_to_radius(rho)
        return optax.chain(optax_sam.perturb_only(mask), *draw, radius)

    return make_ascent


def _masked(
    link: Callable[[int, int], optax.GradientTransformation], rescale: bool
) -> MakeAscent:
    """Scales to rho, then masks, as in the papers; or masks, then scales."""

    def make_ascent(
        rho: Any, num_steps: int, epoch_steps: int
    ) -> optax.GradientTransformation:
        radius, mask = optax_sam.scale_to_radius(rho), link(num_steps, epoch_steps)
        return optax.chain(mask, radius) if rescale else optax.chain(radius, mask)

    return make_ascent


def _fisher(sparsity: float, rescale: bool = False) -> MakeAscent:
    return _masked(
        lambda num_steps, epoch_steps: optax_sam.sparsify_by_fisher(
            optax_sam.unstructured(sparsity), refresh_every=epoch_steps
        ),
        rescale,
    )


def _dynamic(sparsity: float) -> MakeAscent:
    return _masked(
        lambda num_steps, epoch_steps: optax_sam.sparsify_dynamically(
            sparsity, refresh_every=epoch_steps, decay_steps=num_steps, key=0
        ),
        rescale=False,
    )


def _norms(path: str) -> bool:
    return "Norm_" in path


# Of a network of three stages of a block each.
_LAST_STAGE = optax_sam.select_layers("BasicBlock_2", "Dense_0")
_LAST_TWO = optax_sam.select_layers("BasicBlock_1", "BasicBlock_2", "Dense_0")
# The paths of the layers outside of blocks start with their names.
_FIRST = optax_sam.select_layers(
    "BasicBlock_0", lambda path: path.startswith(("PatchConv", "BatchNorm"))
)
_NORMS = optax_sam.select_layers(_norms)

SGD, SAM = "SGD", "SAM"
DENSE = "dense"
LAYERS, CHANNELS, EXAMPLES = "layers", "channels", "examples"
MASK, NOISE = "mask", "noise"
CONFIGURATIONS: Mapping[str, Configuration] = {
    SGD: Configuration(DENSE, _nowhere),
    SAM: Configuration(DENSE, _everywhere),
    "last stage, head": Configuration(LAYERS, _only(_LAST_STAGE)),
    "last two stages, head": Configuration(LAYERS, _only(_LAST_TWO)),
    "stem, first stage": Configuration(LAYERS, _only(_FIRST)),
    "normalisation": Configuration(LAYERS, _only(_NORMS)),
    "half the channels": Configuration(CHANNELS, _everywhere, channels=0.5),
    "quarter of the channels": Configuration(CHANNELS, _everywhere, channels=0.25),
    "last two stages, half the channels": Configuration(
        CHANNELS, _only(_LAST_TWO), channels=0.5
    ),
    "normalisation, quarter of the channels": Configuration(
        CHANNELS, _only(_NORMS), channels=0.25
    ),
    "half the examples": Configuration(EXAMPLES, _everywhere, examples=0.5),
    "quarter of the examples": Configuration(EXAMPLES, _everywhere, examples=0.25),
    "last two stages, quarter of the examples": Configuration(
        EXAMPLES, _only(_LAST_TWO), examples=0.25
    ),
    "normalisation, quarter of the examples": Configuration(
        EXAMPLES, _only(_NORMS), examples=0.25
    ),
    "layers chosen by Fisher, 50 %": Configuration(LAYERS, None, chosen=0.5),
    "layers chosen by Fisher, 90 %": Configuration(LAYERS, None, chosen=0.9),
    "layers chosen by Fisher, 50 %, quarter of the channels": Configuration(
        CHANNELS, None, channels=0.25, chosen=0.5
    ),
    "layers chosen by Fisher, 50 %, quarter of the examples": Configuration(
        EXAMPLES, None, examples=0.25, chosen=0.5
    ),
    "stem, first stage, quarter of the channels": Configuration(
        CHANNELS, _only(_FIRST), channels=0.25
    ),
    "stem, first stage, quarter of the examples": Configuration(
        EXAMPLES, _only(_FIRST), examples=0.25
    ),
    "stem, first stage, at random": Configuration(NOISE, _at_random(_FIRST)),
    "Fisher 50 %": Configuration(MASK, _fisher(0.5)),
    "Fisher 50 %, rescaled": Configuration(MASK, _fisher(0.5, rescale=True)),
    "Fisher 90 %": Configuration(MASK, _fisher(0.9)),
    "Fisher 90 %, rescaled": Configuration(MASK, _fisher(0.9, rescale=True)),
    "dynamic 50 %": Configuration(MASK, _dynamic(0.5)),
}
