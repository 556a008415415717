"""Which networks learn CIFAR-10: settings, and the runs of each in order of worth."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sam_examples.study.cifar10 import Recipe, Trainer
from sam_examples.study.contestants import Contestant, Group, Values, grid
from sam_examples.study.directions import DirectionTrainer


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that compare with one another, since they have a recipe in common.

    Attributes:
      title: what is trained, in a few words.
      recipe: see there.
      groups: the runs, in order of worth.
      trainer: carries them out.
    """

    title: str
    recipe: Recipe
    groups: Sequence[Group]
    trainer: type[Trainer] = Trainer


def _at(rate: float, trials: Sequence[Values]) -> tuple[Values, ...]:
    """Trials with a learning rate, unless they have one."""
    return tuple({"learning_rate": rate, **trial} for trial in trials)


def _rates(*rates: float, **others: Any) -> tuple[Values, ...]:
    return tuple({"learning_rate": rate, **others} for rate in rates)


NOISE, THETA, SPARSE, REWEIGHT = "noise", "theta", "sparse", "reweight"
PRICE, COMBINE, TRANSFER, ALPHA = "price", "combine", "transfer", "alpha"
WHEN, FARTHER = "when", "farther"
QUESTIONS: Mapping[str, str] = {
    NOISE: "SAM against SGD and AdamW, over label noise",
    THETA: "VaSSO over theta",
    SPARSE: "Sparse SAM: how much, which weights, how",
    REWEIGHT: "RW-SAM and m-SAM",
    PRICE: "What costs less than SAM",
    COMBINE: "Combinations",
    FARTHER: "Further radii",
    TRANSFER: "Whether rho goes over to a wider network",
    WHEN: "A training that cannot fit its labels",
    ALPHA: "LookSAM over alpha",
}

# Of the network that a GPU trains in seconds, on all images.
_FULL_RATE = 1.0  # Where SGD does best on the held-out split, with noise or without.
_RATES = _rates(1.0, 0.5, 0.25, 2.0)
_RHOS = (0.05, 0.1, 0.025)
_FAR = _at(_FULL_RATE, grid(1.0, 0.3, 3.0))
_BOTH = (0.0, 0.4)
LAST_BLOCK = ("Conv_4", "Conv_5", "BatchNorm_4", "BatchNorm_5", "Dense_0")
FIRST_BLOCK = ("Conv_0", "Conv_1", "BatchNorm_0", "BatchNorm_1")


def _full(label: str, method: str, *trials: Values, epochs: int = 10) -> Contestant:
    return Contestant(label, method, _at(_FULL_RATE, trials), epochs)


_FULL_BASICS = (
    Contestant("SGD", "sgd", _RATES),
    _full(
        "SAM",
        "sam",
        *grid(*_RHOS, 0.2),
        *_at(0.5, grid(0.05, 0.1, 0.2, 0.4, 0.8)),
    ),
    # As many gradients as SAM takes.
    Contestant("SGD, twice as long", "sgd", _RATES, epochs=20),
)
_FULL_LONG = (
    Contestant("SGD, four times as long", "sgd", _RATES[:2], epochs=40),
    _full("SAM, four times as long", "sam", *grid(0.2, 0.1, 0.4, 0.05), epochs=40),
    Contestant("Momentum-SAM, four times as long", "momentum_sam", _FAR, epochs=40),
)
_FULL: Sequence[Group] = (
    Group(NOISE, _FULL_BASICS, _BOTH),
    Group(
        NOISE,
        (
            _full(
                "VaSSO",
                "vasso",
                *grid(*_RHOS, theta=0.9),
                *grid(*_RHOS, theta=0.4),
            ),
            _full(
                "RW-SAM",
                "rw_sam",
                # Slopes over their mean: a strength means the same at any scale.
                *grid(*_RHOS, strength=1.0, estimator="jvp", normalize=True),
            ),
            _full(
                "m-SAM, m = 128",
                "m_sam",
                *grid(0.05, 0.025, 0.0125, micro_batch_size=128),
            ),
        ),
        _BOTH,
    ),
    Group(
        NOISE,
        (
            _full(
                "SSAM-F, half",
                "sparse_sam",
                *grid(*_RHOS, sparsity=0.5, fisher_estimator="probes"),
            ),
            _full("SSAM-D, half", "dynamic_sparse_sam", *grid(*_RHOS, sparsity=0.5)),
            _full("static: last block", "sam", *grid(*_RHOS, perturb=LAST_BLOCK)),
            _full("ASAM", "asam", *grid(0.5, 1.0, 0.25)),
        ),
        _BOTH,
    ),
    Group(
        NOISE,
        (
            Contestant("Momentum-SAM", "momentum_sam", _FAR),
            Contestant("Momentum-SAM, twice as long", "momentum_sam", _FAR, epochs=20),
            _full("LookSAM-5", "look_sam", *grid(0.05, 0.1, 0.2, every=5, alpha=0.1)),
            _full("GSAM", "gsam", *grid(*_RHOS, alpha=0.1)),
        ),
        _BOTH,
    ),
    Group(NOISE, _FULL_LONG, _BOTH),
    Group(NOISE, _FULL_BASICS, (0.2, 0.6, 0.8)),
)

# Of a network that a core trains in seconds, on 4,096 images without augmentation.
_RATE = 0.25
_RADII = (0.2, 0.1, 0.3, 0.05)
_EPOCHS = 24
_SLOPES = {"estimator": "jvp", "normalize": True, "num_probes": 1}


def _small(
    label: str, method: str, *trials: Values, epochs: int = _EPOCHS
) -> Contestant:
    return Contestant(label, method, _at(_RATE, trials), epochs)


def _like_sam(label: str, method: str, **others: Any) -> Contestant:
    return _small(label, method, *grid(*_RADII, **others))


def _sgd(label: str, epochs: int) -> Contestant:
    trials = (
        *_rates(0.25, 1.0, weight_decay=5e-4),
        *_rates(0.25, 1.0, weight_decay=2e-3),
    )
    return Contestant(label, "sgd", trials, epochs)


def _sam(label: str, epochs: int) -> Contestant:
    return _small(label, "sam", *grid(*_RADII), epochs=epochs)


SGD, SAM = _sgd("SGD", _EPOCHS), _sam("SAM", _EPOCHS)
_EARLY = _sgd("SGD, a quarter as long", _EPOCHS // 4)


def _adamw(label: str, *pairs: tuple[float, float]) -> Contestant:
    trials = tuple(
        {"learning_rate": rate, "weight_decay": decay, "base": "adamw"}
        for rate, decay in pairs
    )
    return Contestant(label, "sgd", trials, _EPOCHS)


_ADAMW = _adamw("AdamW", (1e-3, 0.01), (4e-3, 0.01), (4e-3, 0.1), (1e-2, 0.1))
_BASICS = (
    SGD,
    SAM,
    _ADAMW,
    _EARLY,
    _sgd("SGD, half as long", _EPOCHS // 2),
    _sgd("SGD, twice as long", 2 * _EPOCHS),
    _sam("SAM, a quarter as long", _EPOCHS // 4),
    _sam("SAM, half as long", _EPOCHS // 2),
)
_MOMENTUM_SAM = _small("Momentum-SAM", "momentum_sam", *grid(2.0, 1.0, 3.0, 4.0))
_STATIC = (
    _small("static: first block", "sam", *grid(*_RADII, perturb=FIRST_BLOCK)),
    _small("static: last block", "sam", *grid(*_RADII, perturb=LAST_BLOCK)),
)
# Along the momentum of the first block: four radii, and four larger ones.
_AHEAD_FIRST = (
    _small(
        "Momentum-SAM, first block",
        "momentum_sam",
        *grid(2.0, 1.0, 3.0, 4.0, perturb=FIRST_BLOCK),
    ),
    _small(
        "Momentum-SAM, first block, farther",
        "momentum_sam",
        *grid(6.0, 8.0, 12.0, 16.0, perturb=FIRST_BLOCK),
    ),
)
_CHEAP = (
    _MOMENTUM_SAM,
    _small(
        "Momentum-SAM, twice as long",
        "momentum_sam",
        *grid(2.0, 1.0, 3.0, 4.0),
        epochs=2 * _EPOCHS,
    ),
    _small("VaSSO of one pass", "one_pass_vasso", *grid(0.3, 0.2, 0.5, 0.1, theta=0.4)),
    _small("LookSAM-5", "look_sam", *grid(0.3, 0.2, 0.4, 0.1, every=5, alpha=0.1)),
    _small("SAM, every 2nd step", "every", *grid(0.3, 0.2, 0.4, 0.1, k=2)),
    _small("SAM, every 5th step", "every", *grid(0.3, 0.2, 0.4, 0.1, k=5)),
    *_STATIC,
)
_TWO_GRADIENTS = (
    _like_sam("GSAM", "gsam", alpha=0.1),
    _like_sam("WSAM", "wsam", gamma=0.6),
    _like_sam("Friendly SAM", "friendly_sam", sigma=0.5, decay=0.9),
    _small("ASAM", "asam", *grid(1.0, 0.5, 2.0, 0.25)),
    _like_sam("Functional SAM", "functional_sam"),
)
_THETAS = tuple(
    _like_sam(f"VaSSO, theta {theta:g}", "vasso", theta=theta)
    for theta in (0.2, 0.4, 0.9)
)

# With 1 the direction is SAM's.
_AT_ONE_RHO = tuple(
    _small(f"VaSSO, theta {theta:g}", "vasso", {"rho": 0.2, "theta": theta})
    for theta in (1.0, 0.9, 0.4, 0.2)
)


def _reweighted(label: str, strength: float, **others: Any) -> Contestant:
    return _like_sam(label, "rw_sam", strength=strength, **{**_SLOPES, **others})


_REWEIGHTED = (
    *(_reweighted(f"RW-SAM, strength {s:g}", s) for s in (1.0, 0.3, 3.0)),
    _reweighted("RW-SAM, 4 probes", 1.0, num_probes=4),
    _reweighted("RW-SAM, differences", 1.0, estimator="finite_difference"),
)
# SAM's rho, times about the root of the share of the batch that ascends together.
_MICRO = tuple(
    _small(f"m-SAM, m = {m}", "m_sam", *grid(*rhos, micro_batch_size=m))
    for m, rhos in (
        (32, (0.15, 0.1, 0.2, 0.05)),
        (16, (0.1, 0.05, 0.15, 0.2)),
        (8, (0.05, 0.1, 0.025, 0.15)),
    )
)
# A mask that keeps weights at random, or those that change little, makes the
# perturbation shorter: rho makes up for it.
_LONGER = {
    0.5: (0.3, 0.2, 0.4, 0.6),
    0.8: (0.4, 0.3, 0.6, 0.9),
    0.9: (0.6, 0.4, 0.9, 1.3),
    0.99: (2.0, 1.0, 3.0, 0.6),
}
_NEVER = 10**9


def _masked(
    sparsity: float,
    rhos: Sequence[float] | None = None,
    rhos_by_fisher: Sequence[float] = (0.2, 0.3, 0.1, 0.4),
    end: str = "",
) -> tuple[Contestant, ...]:
    share = f"{100 * sparsity:g} %{end}"
    dynamic = grid(*(rhos or _LONGER[sparsity]), sparsity=sparsity)
    never = tuple({**trial, "refresh_every": _NEVER} for trial in dynamic)
    by_fisher = grid(*rhos_by_fisher, sparsity=sparsity)
    return (
        _small(f"Fisher, {share}", "sparse_sam", *by_fisher),
        _small(f"dynamic, {share}", "dynamic_sparse_sam", *dynamic),
        _small(f"random, {share}", "dynamic_sparse_sam", *never),
    )


def _pattern(label: str, pattern: str) -> Contestant:
    rhos = (0.2, 0.3, 0.1, 0.4)
    return _small(label, "sparse_sam", *grid(*rhos, sparsity=0.5, pattern=pattern))


_PATTERNS = (
    _pattern("Fisher, layers, 50 %", "layer"),
    _pattern("Fisher, filters, 50 %", "filter"),
    _pattern("Fisher, 2:4", "2:4"),
    _like_sam("implicit, half of the channels", "sam", implicit=0.5),
    _like_sam("implicit, a quarter of the channels", "sam", implicit=0.75),
)
_COMBINED = (
    _small(
        "VaSSO + Sparse SAM",
        "vasso+sparse_sam",
        *grid(0.2, 0.3, 0.1, 0.4, theta=0.4, sparsity=0.5),
    ),
    _like_sam("RW-SAM + VaSSO", "rw_sam+vasso", strength=1.0, theta=0.4, **_SLOPES),
    _AHEAD_FIRST[0],
)
_PARTS = (SGD, SAM, _THETAS[1], _masked(0.5)[0], _REWEIGHTED[0], _MOMENTUM_SAM)
_RADII_AT_SGD_S = grid(*_RADII, learning_rate=1.0, weight_decay=2e-3)
_FAR_STATIC = _small(
    "static: first block, farther",
    "sam",
    *grid(0.4, 0.6, 0.8, 1.2, perturb=FIRST_BLOCK),
)
_FAR_AHEAD = _small("Momentum-SAM, farther", "momentum_sam", *grid(5.0, 6.0, 8.0, 12.0))


def _grown(rhos: Sequence[float], **others: Any) -> tuple[Values, ...]:
    """Trials of RW-SAM at radii that fit its strength."""
    return grid(*rhos, **{"strength": 1.0, **_SLOPES, **others})


_FAR_OFF = (
    # Whose best had worse neighbours on both sides: between them.
    _small("SAM, finer", "sam", *grid(0.25, 0.15, 0.22, 0.18)),
    _FAR_AHEAD,
    _AHEAD_FIRST[1],
    _small(
        "LookSAM-5, farther",
        "look_sam",
        *grid(0.5, 0.6, 0.8, 1.2, every=5, alpha=0.1),
    ),
    _small("SAM, every 2nd step, farther", "every", *grid(0.5, 0.6, 0.8, 1.2, k=2)),
    _FAR_STATIC,
    *_masked(0.8, (1.2, 1.6, 2.2, 3.0), (0.5, 0.6, 0.8, 1.2), end=", farther"),
    *_masked(0.9, (1.8, 2.5, 3.5, 5.0), (0.6, 0.9, 1.3, 2.0), end=", farther"),
    *_masked(0.99, (4.0, 6.0, 9.0, 14.0), (0.6, 0.9, 1.3, 2.0), end=", farther"),
    *_masked(0.99, (20.0, 30.0, 45.0, 60.0), (3.0, 4.5, 7.0, 10.0), end=", farthest"),
    _small("ASAM, farther", "asam", *grid(3.0, 4.0, 6.0, 8.0)),
    _small("VaSSO, theta 0.2, farther", "vasso", *grid(0.4, 0.5, 0.6, 0.9, theta=0.2)),
    _small(
        "RW-SAM + VaSSO, farther",
        "rw_sam+vasso",
        *grid(0.4, 0.6, 0.9, 1.3, strength=1.0, theta=0.4, **_SLOPES),
    ),
    *(
        _small(f"RW-SAM, {name}, farther", "rw_sam", *_grown(rhos, **others))
        for name, rhos, others in (
            ("strength 1", (0.4, 0.6, 0.9, 1.3), {}),
            ("strength 0.3", (0.4, 0.5, 0.6, 0.9), {"strength": 0.3}),
            ("strength 3", (0.6, 1.0, 1.6, 2.4), {"strength": 3.0}),
            ("4 probes", (0.9, 0.6, 1.3, 0.4), {"num_probes": 4}),
            ("differences", (0.9, 0.6, 1.3, 0.4), {"estimator": "finite_difference"}),
        )
    ),
    _small("SAM, every 5th step, farther", "every", *grid(0.6, 1.0, 1.6, 2.4, k=5)),
    _small(
        "LookSAM-5, farthest",
        "look_sam",
        *grid(2.0, 3.0, 4.5, 7.0, every=5, alpha=0.1),
    ),
    _small(
        "VaSSO of one pass, farther",
        "one_pass_vasso",
        *grid(1.0, 2.0, 4.0, 8.0, theta=0.4),
    ),
    _small(
        "implicit, a quarter of the channels, farther",
        "sam",
        *grid(0.4, 0.6, 1.0, 1.6, implicit=0.75),
    ),
    # At the learning rate and the weight decay that suit SGD best there.
    _small("SAM, SGD's rate", "sam", *_RADII_AT_SGD_S),
    _small(
        "static: first block, SGD's rate",
        "sam",
        *({**trial, "perturb": FIRST_BLOCK} for trial in _RADII_AT_SGD_S),
    ),
)
# Whose best radius with fewer wrong labels, or in fewer epochs, was at the end.
_FARTHER = (0.4, 0.5, 0.6, 0.8)
_FAR_SAM = _small("SAM, farther", "sam", *grid(*_FARTHER))
_FAR_THETAS = tuple(
    _small(f"VaSSO, theta {theta:g}, farther", "vasso", *grid(*_FARTHER, theta=theta))
    for theta in (0.4, 0.9)
)
_NEAR_SAMS = tuple(
    _small(
        f"{c.label}, nearer",
        "sam",
        *grid(0.025, 0.035, 0.0125, 0.00625),
        epochs=c.epochs,
    )
    for c in (*_BASICS[-2:], SAM)
)
# The bases, whose best had been at a corner.
_FAR_BASES = (
    Contestant(
        "SGD, farther",
        "sgd",
        (
            *_rates(1.0, 0.25, weight_decay=5e-3),
            *_rates(2.0, weight_decay=2e-3),
            *_rates(0.25, weight_decay=1e-2),
        ),
        _EPOCHS,
    ),
    _adamw("AdamW, farther", (1e-2, 0.3), (2e-2, 0.1), (2e-2, 0.3), (1e-2, 1.0)),
)
# What did best with 40 %, and whether it does elsewhere.
_BEST = (_STATIC[0], *_AHEAD_FIRST)
_AT_40 = (0.4,)
_BY_WORTH: Sequence[Group] = (
    Group(NOISE, _BASICS, _AT_40),
    Group(PRICE, (*_BASICS, *_CHEAP), _AT_40),
    Group(THETA, (SAM, *_THETAS), _AT_40),
    Group(REWEIGHT, (SGD, SAM, *_REWEIGHTED, *_MICRO), _AT_40),
    Group(NOISE, _BASICS),
    Group(SPARSE, (SGD, SAM, *_masked(0.5), *_masked(0.9), *_STATIC), _AT_40),
    Group(COMBINE, (*_PARTS, *_COMBINED), _AT_40),
    Group(FARTHER, _FAR_OFF, _AT_40),
    Group(NOISE, _BASICS, (0.8,)),
    Group(SPARSE, _PATTERNS, _AT_40),
    Group(PRICE, _TWO_GRADIENTS, _AT_40),
    Group(NOISE, _BASICS, (0.2, 0.6)),
    Group(SPARSE, (*_masked(0.99), *_masked(0.8)), _AT_40),
    Group(THETA, (SAM, *_THETAS)),
    Group(REWEIGHT, (SGD, SAM, *_REWEIGHTED[:1], *_MICRO), (0.8,)),
    Group(NOISE, (_MOMENTUM_SAM, *_BEST), (0.0, 0.2, 0.4, 0.6, 0.8)),
    Group(NOISE, _FAR_BASES, (0.4, 0.2, 0.0, 0.6, 0.8)),
    Group(NOISE, _NEAR_SAMS[:1], (0.0, 0.2, 0.4, 0.6)),
    Group(NOISE, (_FAR_SAM, _FAR_STATIC, _FAR_AHEAD), (0.0, 0.2)),
    Group(THETA, _FAR_THETAS),
)
_SMALL: Sequence[Group] = (
    *_BY_WORTH,
    *(group._replace(seeds=5) for group in _BY_WORTH),
)
_SMALL_RECIPE = Recipe(
    widths=(32, 64, 64),
    batch_size=64,
    weight_decay=5e-4,
    label_smoothing=0.0,
    pad=0,
    dtype="float32",
    flip=False,
    num_images=4096,
    stride=2,
    shrink=2,
    measured=512,
)
# One radius a row: what is best for the small network, next to its neighbours.
_TRANSFERRED = tuple(
    _small(f"SAM, rho {rho:g}", "sam", {"rho": rho})
    for rho in (0.1, 0.2, 0.4, 0.3, 0.05)
)
_WIDER = (_EARLY, *_BEST)

# As long as it takes to stop before wrong labels are learnt, of larger images.
_BRIEF = 12
_BRIEF_RATES = _rates(_RATE, 0.125, 0.5, 1.0)
_AHEAD = _at(_RATE, grid(2.0, 4.0, 3.0))


def _brief(
    label: str, method: str, *trials: Values, epochs: int = _BRIEF
) -> Contestant:
    return Contestant(label, method, _at(_RATE, trials), epochs)


_BRIEF_GROUPS: Sequence[Group] = (
    Group(
        PRICE,
        (
            Contestant("SGD", "sgd", _BRIEF_RATES, _BRIEF),
            _brief("SAM", "sam", *grid(0.15, 0.2, 0.1)),
            Contestant("Momentum-SAM", "momentum_sam", _AHEAD, _BRIEF),
        ),
        _AT_40,
    ),
    Group(
        PRICE,
        (
            Contestant("SGD, twice as long", "sgd", _BRIEF_RATES, 2 * _BRIEF),
            Contestant(
                "Momentum-SAM, twice as long", "momentum_sam", _AHEAD, 2 * _BRIEF
            ),
            _brief(
                "LookSAM-5",
                "look_sam",
                *(
                    {"rho": rho, "every": 5, "alpha": alpha}
                    for rho, alpha in ((0.2, 0.1), (0.3, 0.1), (0.2, 0.3))
                ),
            ),
            _brief("GSAM", "gsam", *grid(0.15, 0.2, 0.1, alpha=0.1)),
        ),
        _AT_40,
    ),
    # What LookSAM's `alpha` may be: a row each.
    Group(
        ALPHA,
        tuple(
            _brief(
                f"LookSAM-{k}, rho {rho:g}, alpha {alpha:g}",
                "look_sam",
                {"rho": rho, "every": k, "alpha": alpha},
            )
            for k, rho, alphas in (
                (5, 0.3, (0.0, 0.1, 0.3, 0.5, 0.7)),
                (3, 0.3, (0.0, 0.1, 0.3, 0.5, 0.7)),
                (5, 0.05, (0.1, 0.7)),
            )
            for alpha in alphas
        ),
        _AT_40,
        seeds=1,
    ),
)


def _quick(*contestants: Contestant) -> tuple[Contestant, ...]:
    return tuple(dataclasses.replace(c, grid=c.grid[:1], epochs=1) for c in contestants)


SETTINGS: Mapping[str, Setting] = {
    "small": Setting("4,096 images, labels are fitted", _SMALL_RECIPE, _SMALL),
    "directions": Setting(
        "those of small, and how the direction varies",
        _SMALL_RECIPE,
        (Group(THETA, _AT_ONE_RHO, _AT_40),),
        DirectionTrainer,
    ),
    "full": Setting("all images, on a GPU", Recipe(), _FULL),
    "augmented": Setting(
        "4,096 images, cropped and flipped",
        dataclasses.replace(_SMALL_RECIPE, pad=1, flip=True),
        (
            Group(WHEN, (*_BASICS, _sam("SAM, twice as long", 2 * _EPOCHS)), _AT_40),
            Group(WHEN, _NEAR_SAMS, _AT_40),
        ),
    ),
    "wide": Setting(
        "4,096 images, twice the width",
        dataclasses.replace(_SMALL_RECIPE, widths=(64, 128, 128)),
        (
            Group(TRANSFER, (SGD, *_TRANSFERRED), _AT_40),
            Group(TRANSFER, _WIDER, _AT_40),
            Group(TRANSFER, (SGD, *_TRANSFERRED, *_WIDER), _AT_40, seeds=5),
        ),
    ),
    "quick": Setting(
        "256 images, an epoch: whether all of it works",
        dataclasses.replace(_SMALL_RECIPE, num_images=256, measured=64),
        (Group(PRICE, _quick(SGD, SAM, _MOMENTUM_SAM), _AT_40, seeds=1),),
    ),
    "brief": Setting(
        "4,096 larger images, 12 epochs",
        dataclasses.replace(_SMALL_RECIPE, widths=(16, 64, 64), shrink=1, measured=0),
        _BRIEF_GROUPS,
    ),
}
