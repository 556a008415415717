"""Which Transformers learn to translate, in order of worth."""

from collections.abc import Sequence

from sam_examples.study.contestants import Contestant, Group, Values, grid

QUESTION = "translation"
_ADAMW = {"learning_rate": 1.2e-2}
_BRIEF = 10


def _group(label: str, method: str, *trials: Values, longer: int = 1) -> Group:
    trials = tuple({**_ADAMW, **trial} for trial in trials)
    return Group(QUESTION, (Contestant(label, method, trials, longer * _BRIEF),))


_RHOS = grid(0.05, 0.2)
GROUPS: Sequence[Group] = (
    _group(
        "AdamW", "sgd", *({"learning_rate": rate} for rate in (1.2e-2, 6e-3, 2.4e-2))
    ),
    _group("SAM", "sam", *_RHOS),
    _group("Functional SAM", "functional_sam", *_RHOS),
    _group("Momentum-SAM", "momentum_sam", *grid(0.5, 2.0)),
    _group("VaSSO, theta 0.9", "vasso", *grid(0.05, 0.2, theta=0.9)),
    _group("VaSSO, theta 0.4", "vasso", *grid(0.05, 0.2, theta=0.4)),
    _group("preconditioned SAM", "preconditioned_sam", *grid(0.2, 0.8)),
    _group("AdamW, twice as long", "sgd", {}, longer=2),
    _group("Momentum-SAM, twice as long", "momentum_sam", *grid(0.5, 2.0), longer=2),
)
