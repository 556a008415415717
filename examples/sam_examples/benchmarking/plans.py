"""What a ledger is to hold: which runs there are, in order of worth."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sam_examples.benchmarking.fast_cifar import Run

NOISES = (0.0, 0.4)
LEARNING_RATE = 1.0  # Where SGD does best on the held-out split, with noise or without.


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A configuration, and the hyperparameters that it is tried with.

    Attributes:
      label: what it is called.
      method: out of `METHODS`, or several joined by +.
      grid: the hyperparameters of each trial, the likeliest first.
      epochs: passes over the training images.
    """

    label: str
    method: str
    grid: tuple[Mapping[str, Any], ...]
    epochs: int = 10

    def run(self, trial: Mapping[str, Any], noise: float, seed: int) -> Run:
        """The run of one trial."""
        values = tuple({"learning_rate": LEARNING_RATE, **trial}.items())
        return Run(self.label, self.method, values, noise, self.epochs, seed)


def _grid(*rhos: float, **others: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple({"rho": rho, **others} for rho in rhos)


_RATES = tuple({"learning_rate": rate} for rate in (1.0, 0.5, 0.25, 2.0))
_RHOS = (0.05, 0.1, 0.025)
_FAR = _grid(1.0, 0.3, 3.0)
_LAST_BLOCK = ("Conv_4", "Conv_5", "BatchNorm_4", "BatchNorm_5", "Dense_0")


class Group(NamedTuple):
    """Contestants whose runs are of the same worth.

    Attributes:
      contestants: first on one seed, all of their grids, then on others.
      noises: shares of wrong labels.
    """

    contestants: tuple[Contestant, ...]
    noises: tuple[float, ...] = NOISES

    @property
    def pairs(self) -> list[tuple[Contestant, float]]:
        """Each contestant with each share of noise."""
        return [(c, noise) for noise in self.noises for c in self.contestants]


_GPU = (
    (
        Contestant("SGD", "sgd", _RATES),
        Contestant(
            "SAM",
            "sam",
            (
                *_grid(*_RHOS, 0.2),
                *_grid(0.05, 0.1, 0.2, 0.4, 0.8, learning_rate=0.5),
            ),
        ),
        # As many gradients as SAM takes.
        Contestant("SGD, twice as long", "sgd", _RATES, epochs=20),
    ),
    (
        Contestant(
            "VaSSO", "vasso", (*_grid(*_RHOS, theta=0.9), *_grid(*_RHOS, theta=0.4))
        ),
        Contestant(
            "RW-SAM",
            "rw_sam",
            # Slopes over their mean, so that a strength means the same at any scale.
            _grid(*_RHOS, strength=1.0, estimator="jvp", normalize=True),
        ),
        Contestant(
            "m-SAM, m = 128", "m_sam", _grid(0.05, 0.025, 0.0125, micro_batch_size=128)
        ),
    ),
    (
        Contestant(
            "SSAM-F, half",
            "sparse_sam",
            _grid(*_RHOS, sparsity=0.5, fisher_estimator="probes"),
        ),
        Contestant("SSAM-D, half", "dynamic_sparse_sam", _grid(*_RHOS, sparsity=0.5)),
        Contestant("static: last block", "sam", _grid(*_RHOS, perturb=_LAST_BLOCK)),
        Contestant("ASAM", "asam", _grid(0.5, 1.0, 0.25)),
    ),
    (
        Contestant("Momentum-SAM", "momentum_sam", _FAR),
        Contestant(
            "Momentum-SAM, twice as long",
            "momentum_sam",
            _FAR,
            epochs=20,
        ),
        Contestant("LookSAM-5", "look_sam", _grid(0.05, 0.1, 0.2, every=5, alpha=0.1)),
        Contestant("GSAM", "gsam", _grid(*_RHOS, alpha=0.1)),
    ),
    (
        Contestant("SGD, four times as long", "sgd", _RATES[:2], epochs=40),
        Contestant(
            "SAM, four times as long", "sam", _grid(0.2, 0.1, 0.4, 0.05), epochs=40
        ),
        Contestant("Momentum-SAM, four times as long", "momentum_sam", _FAR, epochs=40),
    ),
)
# For a network that a CPU trains in a minute: three trials of each, one more of SGD,
# whose largest rate was best, and twice as long what takes half of SAM's time.
_BRIEF = 12
_RATE = 0.25
_SMALL_RATES = tuple({"learning_rate": rate} for rate in (_RATE, 0.125, 0.5, 1.0))
_AHEAD = _grid(2.0, 4.0, 3.0, learning_rate=_RATE)
_CPU = (
    (
        Contestant("SGD", "sgd", _SMALL_RATES, _BRIEF),
        Contestant("SAM", "sam", _grid(0.15, 0.2, 0.1, learning_rate=_RATE), _BRIEF),
        Contestant("Momentum-SAM", "momentum_sam", _AHEAD, _BRIEF),
    ),
    (
        Contestant("SGD, twice as long", "sgd", _SMALL_RATES, 2 * _BRIEF),
        Contestant("Momentum-SAM, twice as long", "momentum_sam", _AHEAD, 2 * _BRIEF),
        Contestant(
            "LookSAM-5",
            "look_sam",
            tuple(
                {"rho": rho, "every": 5, "alpha": alpha, "learning_rate": _RATE}
                for rho, alpha in ((0.2, 0.1), (0.3, 0.1), (0.2, 0.3))
            ),
            _BRIEF,
        ),
        Contestant(
            "GSAM",
            "gsam",
            _grid(0.15, 0.2, 0.1, alpha=0.1, learning_rate=_RATE),
            _BRIEF,
        ),
    ),
)
# What LookSAM's `alpha` may be: a row each.
_ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7)
_LOOK_SAM = tuple(
    Contestant(
        f"LookSAM-{k}, rho {rho:g}, alpha {alpha:g}",
        "look_sam",
        ({"rho": rho, "every": k, "alpha": alpha, "learning_rate": _RATE},),
        _BRIEF,
    )
    for k, rho, alphas in ((5, 0.3, _ALPHAS), (3, 0.3, _ALPHAS), (5, 0.05, (0.1, 0.7)))
    for alpha in alphas
)
# By the machine or the question they are for; the groups of each in order of worth.
PLANS: Mapping[str, Sequence[Group]] = {
    "look_sam": (Group(_LOOK_SAM, (0.4,)),),
    "gpu": (*map(Group, _GPU), Group(_GPU[0], (0.2, 0.6, 0.8))),
    "cpu": tuple(Group(group, (noise,)) for noise in (0.4, 0.0) for group in _CPU),
}
# Of Transformers that learn to translate.
_ADAMW = {"learning_rate": 1.2e-2}
_BRIEF_EPOCHS = 10


def _translating(
    label: str, method: str, *grid: Mapping[str, Any], longer: int = 1
) -> Group:
    trials = tuple({**_ADAMW, **trial} for trial in grid)
    epochs = longer * _BRIEF_EPOCHS
    return Group((Contestant(label, method, trials, epochs),), (0.0,))


_TWO_RHOS = _grid(0.05, 0.2)
TRANSLATION: Sequence[Group] = (
    _translating(
        "AdamW", "sgd", *({"learning_rate": rate} for rate in (1.2e-2, 6e-3, 2.4e-2))
    ),
    _translating("SAM", "sam", *_TWO_RHOS),
    _translating("Functional SAM", "functional_sam", *_TWO_RHOS),
    _translating("Momentum-SAM", "momentum_sam", *_grid(0.5, 2.0)),
    _translating("VaSSO, theta 0.9", "vasso", *_grid(0.05, 0.2, theta=0.9)),
    _translating("VaSSO, theta 0.4", "vasso", *_grid(0.05, 0.2, theta=0.4)),
    _translating("preconditioned SAM", "preconditioned_sam", *_grid(0.2, 0.8)),
    _translating("AdamW, twice as long", "sgd", {}, longer=2),
    _translating(
        "Momentum-SAM, twice as long", "momentum_sam", *_grid(0.5, 2.0), longer=2
    ),
)
MORE_SEEDS = (1, 2)

# Accuracy on the held-out split, of the runs that are there.
Scores = Mapping[Run, float]


def in_order(groups: Sequence[Group], scores: Scores) -> Iterator[Run]:
    """All runs in order of worth.

    Other seeds than the first come for the trial that did best on the held-out split,
    as far as `scores` knows, of each contestant and share of noise.
    """
    for group in groups:
        for contestant, noise in group.pairs:
            for trial in contestant.grid:
                yield contestant.run(trial, noise, seed=0)
        for seed in MORE_SEEDS:
            for contestant, noise in group.pairs:
                best = best_trial(contestant, noise, scores)
                if best is not None:
                    yield contestant.run(best, noise, seed)


def best_trial(
    contestant: Contestant, noise: float, scores: Scores
) -> Mapping[str, Any] | None:
    """The trial that did best on the held-out split with the first seed, if any ran."""
    known = {
        i: scores[run]
        for i, trial in enumerate(contestant.grid)
        if (run := contestant.run(trial, noise, seed=0)) in scores
    }
    if not known:
        return None
    return contestant.grid[max(known, key=lambda i: known[i])]
