"""Breaks the package in one place after another and runs the tests that should see it.

    python tests/mutations.py [--only WORD] [--jobs N]

Each mutant is a line of `MUTANTS`: a file, a piece of its text that occurs once, what
takes its place, and the arguments of pytest for the tests that should fail. They run on
a copy of the working tree. What survives is printed in the end.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str


def mutants(file, tests, *changes):
    """Mutants of one file; a change is (old, new), or (old, new, other tests)."""
    for old, new, *other in changes:
        yield Mutant(file, old, new, *(other or [tests]))


ALIASES = "tests/ascents/test_aliases.py"
COUNTS = "tests/test_contract.py -k recompiles"
DEVICES = "tests/engine/test_devices.py"
FINITE = "tests/engine/test_not_finite.py"
REWEIGHTED = "tests/ascents/test_rw_sam.py"
GROUPS = "tests/engine/test_micro_batches.py"
WHEN = "tests/engine/test_when.py"
ONE_PASS = "tests/engine/test_one_pass.py"
INCREMENT = "optax.safe_increment(state.count)", "state.count + 1", COUNTS
# Not among them, since no value changes:
# - floats of eight bits as they are in `sort_keys`: their bits order them as well;
# - the sum of two arrays of one dtype in `displace`, rounded once in any case;
# - an `advance` that chooses twice, which costs memory;
# - what an ascent hands on as it is, not taken for read: the result is looked at;
# - all groups' ascent that is not told whether theirs were finite: the mean of their
#   gradients says so, but a perturbation is computed that nobody needs.
MUTANTS = [
    *mutants(
        "_base/trees.py",
        "tests/base/test_trees.py tests/ascents/test_sam.py",
        (
            "x / jnp.where(size == 0, 1, size)",
            "x / size",
            REWEIGHTED,
        ),
        (
            "jnp.promote_types(dtype, jnp.float32)",
            "dtype",
            "tests/ascents/test_vasso.py",
        ),
        ("jnp.sqrt(jnp.where(total == 0, 1, total))", "jnp.sqrt(total)"),
        ("float) * scale * factor", "float) * (scale * factor)"),
        ("its_total < scales[0] ** 0.75", "its_total < 0"),
        ("jnp.sum(x - x)", "jnp.sum(0 * x.size)", FINITE),
        ("if clip or x.size <= jax.device_count():", "if clip:"),
        (
            "if clip or x.size <= jax.device_count():",
            "if clip or x.size == 1:",
            "tests/engine/test_distributed.py -k has_one_entry",
        ),
    ),
    *mutants(
        "_base/random.py",
        "tests/base/test_random.py",
        ("position ^ first", "position"),
        ("+ second", ""),
        ("% 2**32", "% 2**16"),
        ("shape[axis + 1 :]", "shape[axis:]"),
    ),
    *mutants(
        "_base/hyperparameters.py",
        "tests/base/test_hyperparameters.py",
        ("in_range = low <= number", "in_range = low < number"),
        (
            "(positive and number == 0)",
            "(positive and number < 0)",
            "tests/diagnostics/test_sharpness.py -k refuse",
        ),
        ("Fraction(str(number))", "Fraction(number)", "tests/masks/test_patterns.py"),
        ("jax.random.fold_in(key, count)", "key", REWEIGHTED),
    ),
    *mutants(
        "_base/losses.py",
        "tests/engine/test_value_and_update.py",
        ("1 / losses.size", "1.0"),
        ("if shape == () or", "if", REWEIGHTED),
    ),
    *mutants(
        "_base/devices.py",
        DEVICES,
        (
            "return psum(x / jnp.asarray(self.size(), x.dtype), axis_name)",
            "return psum(x, axis_name) / self.size()",
        ),
        ("jnp.where(flag, 0, 1)) == 0", "jnp.where(flag, 0, 1)) < self.size()"),
    ),
    *mutants(
        "_base/batching.py",
        GROUPS,
        (
            "jnp.swapaxes(groups, 0, 1)",
            "groups.reshape(-1, at_once, *groups.shape[2:])",
        ),
        ("reshape(at_once, rounds).T", "reshape(rounds, at_once)"),
    ),
    *mutants(
        "_engine/ascend.py",
        FINITE,
        ("_floating(leaves, self._read))", "leaves)"),
        ("a = jnp.where(self._condition, a, b)", "pass"),
        ("Ascended(zero_unless(finite, epsilon), new", "Ascended(epsilon, new"),
        (
            "finite &= trees.all_finite(own + seen if moves else seen)",
            "pass",
            REWEIGHTED,
        ),
        ("new = _Advance(finite)(new, self._state)", "pass", REWEIGHTED),
        (
            "finite, new = self._checked(finite, epsilon, new, moves=False)",
            "pass",
            f"{WHEN} -k own",
        ),
        ("any(self._read + clean_read) or ", "", ONE_PASS),
        ("clean_read) or called", "clean_read)", ONE_PASS),
    ),
    *mutants(
        "_engine/batch_loss.py",
        "tests/descents/test_functional_sam.py",
        ("self.derivative or own", "own"),
        ("size=size, derivative=None", "size=size"),
        (
            'and "required positional arg" in str(error)',
            "",
            "tests/engine/test_protocol.py -k such_note",
        ),
    ),
    *mutants(
        "_engine/groups.py",
        GROUPS,
        ('{"scoring_batch": self.arguments["batch"]} | ', ""),
        ("x / (rounds * at_once)", "x / rounds"),
        ("jnp.ones([], bool)", "jnp.zeros([], bool)"),
        ("finite = self.devices.all(passes.finite)", "finite = passes.finite", DEVICES),
        ("numbers + self.devices.index() * numbers.size", "numbers", DEVICES),
        ("n: fn.of_group(number)", "n: fn.of_group(None)"),
        (
            "jnp.where(finite, a, b), grad",
            "a, grad",
            "tests/engine/test_sharpness_aware.py -k clean_gradient",
        ),
        ("finite = trees.all_finite(grad)", "finite = jnp.ones([], bool)", ONE_PASS),
        ("(moves_if_finite and not", "(not", ONE_PASS),
        (
            "and not is_other and",
            "and",
            "tests/engine/test_sharpness_aware.py -k clean_gradient",
        ),
        ("self.finite & ascends", "ascends", f"{WHEN} -k clean_gradient"),
        ("jnp.all(passes.finite), (clean", "True, (clean"),
    ),
    *mutants(
        "_engine/sharpness_aware.py",
        GROUPS,
        ("if sync_ascent and examples", "if examples", DEVICES),
        (
            "withhold=protocol.ARGUMENTS",
            "withhold=frozenset()",
            "tests/engine/test_protocol.py tests/engine/test_sharpness_aware.py",
        ),
        ("examples.sharing_scores(size)", "examples"),
        (
            'group.pass_at(params) if "ascent_loss_fn" in given else found',
            "found",
            f"{WHEN} -k whatever",
        ),
        (
            'given.get("grad", clean.gradient)',
            "clean.gradient",
            "tests/test_contract.py -k chain_around",
        ),
        ("epsilon = zero_unless(jnp.asarray(ascends), epsilon)", "pass", ONE_PASS),
        ("._replace(loss=only.loss)", "", ONE_PASS),
        ("finite, only)", "finite, clean)", ONE_PASS),
    ),
    *mutants(
        "_engine/when.py",
        WHEN,
        ("lambda count: count % k == 0", "lambda count: count % k == 1"),
        ("(first <= count) & (count <= last)", "(first <= count) & (count < last)"),
        ("cond(ascends, one, other)", "cond(ascends, other, one)"),
        ("one() if ascends in (None, True)", "one() if ascends is None"),
    ),
    *mutants(
        "_engine/value_and_update.py",
        DEVICES,
        (
            "if clean_fn is of_batch",
            "if of_batch",
            "tests/descents/test_functional_sam.py",
        ),
        ("(g * x).astype(x.dtype)", "x"),
        ("devices.mean((clean.value, clean.grad))", "(clean.value, clean.grad)"),
    ),
    *mutants(
        "_ascents/sam.py",
        "tests/ascents/test_sam.py",
        INCREMENT,
        ("radius(state.count)", "radius(0)"),
    ),
    *mutants(
        "_ascents/asam.py",
        "tests/ascents/test_asam.py",
        INCREMENT,
        ("t * (t * e)", "t * e"),
        ("jnp.where(p < 0, p - added, p + added)", "p + added"),
        ("added = offset(state.count)", "added = offset(0)"),
    ),
    *mutants(
        "_ascents/vasso.py",
        "tests/ascents/test_vasso.py",
        INCREMENT,
        ("jnp.where(state.count == 0, 1, newest(state.count))", "newest(state.count)"),
        (
            "jnp.where(w == 1, g, before + w * (g - before))",
            "before + w * (g - before)",
            f"tests/ascents/test_vasso.py {ALIASES}",
        ),
        ("jnp.clip(mean, limit.min, limit.max)", "mean", FINITE),
        ("count = advance(after.count, state.count)", "count = after.count"),
        (
            "link.update(updates, before, advance=advance)",
            "link.update(updates, before)",
        ),
        (
            "return updates, KeepAverageState",
            "return after.direction, KeepAverageState",
        ),
        ("protocol.require_gradient(owner, updates, is_gradient, _FIRST)", "pass"),
    ),
    *mutants(
        "_ascents/sparse_dynamic.py",
        "tests/ascents/test_sparse_dynamic.py",
        INCREMENT,
        ("initial / 2", "initial"),
        ("jnp.minimum(progress, 1)", "progress"),
        ("jnp.minimum(kept, free)", "kept"),
        ("jnp.where(due, count, state.since)", "count"),
        ("share = jnp.where(_any_nonzero(updates), share, 0)", "pass"),
    ),
    *mutants(
        "_engine/trial.py",
        "tests/engine/test_trial.py",
        ("np.sum(along[p]) < 0 < np.sum(against[p])", "np.sum(along[p]) < 0"),
        ("_STEPS = 32", "_STEPS = 1"),
        ("np.all(e == g)", "np.all(e == e)"),
        (
            'not getattr(state, "descends", False)',
            "True",
            "tests/engine/test_distributed.py -k placed",
        ),
    ),
    *mutants(
        "_ascents/friendly_sam.py",
        "tests/ascents/test_friendly_sam.py",
        INCREMENT,
        ("jnp.where(state.count == 0, 1, 1 - decay_at(state.count))", "1 - decay"),
        ("removed.astype(m.dtype) * m", "m"),
        ("m + w * (jnp.asarray(g, m.dtype) - m)", "m + w * jnp.asarray(g, m.dtype)"),
    ),
    *mutants(
        "_ascents/momentum_sam.py",
        "tests/ascents/test_momentum_sam.py",
        ("map_present(jnp.negative, behind)", "map_present(jnp.positive, behind)"),
        ('("trace", "mu", ', '("trace", '),
        ("protocol.require_gradient(owner, updates, is_gradient, _FIRST)", "pass"),
    ),
    *mutants(
        "_engine/kept.py",
        "tests/ascents/test_momentum_sam.py",
        ("if min(sums) < 0:", "if min(sums) > 0:"),
        ("if len(present) > 1:", "if len(present) > 2:"),
        ("if jax.tree.leaves(params) and not", "if not"),
        ("absent = trees.is_absent(p) or trees.is_absent(x)", "absent = False"),
        ("alike = jax.tree.map(are_alike,", "alike = jax.tree.map(lambda *_: True,"),
    ),
    *mutants(
        "_descents/look_sam.py",
        "tests/descents/test_look_sam.py",
        (*INCREMENT[:2],),
        ("renewed = jnp.isfinite(along)", "renewed = jnp.asarray(ascended)"),
        ("jnp.where(is_part, trees.ratio(x, size), 0)", "trees.ratio(x, size)"),
        ("jnp.abs(along)", "along"),
        ("jnp.asarray(x, u.dtype) - along * u", "jnp.asarray(x, u.dtype)"),
        ("alpha_at(state.count) * length", "alpha_at(state.count)"),
        ("p + length * d", "p - length * d"),
        ("default=0.0", ""),
    ),
    *mutants(
        "_descents/gsam.py",
        "tests/descents/test_gsam.py",
        (*INCREMENT[:2],),
        ("p - weight * across", "p + weight * across"),
        ("jnp.asarray(g, unit.dtype) - length * unit", "jnp.asarray(g, unit.dtype)"),
    ),
    *mutants(
        "_descents/wsam.py",
        "tests/descents/test_wsam.py",
        ("jnp.where(weight == 1, p, g + weight * (p - g))", "g + weight * (p - g)"),
        ("return gamma / (1 - gamma)", "return gamma"),
        ("u - step * (p - g)", "u + step * (p - g)"),
        ("grad, state.base_state, params,", "updates, state.base_state, params,"),
    ),
    *mutants(
        "_ascents/sparse_fisher.py",
        "tests/ascents/test_sparse_fisher.py",
        INCREMENT,
        ("state.count % refresh_every == 0", "state.count % refresh_every == 1"),
        ("jnp.where(due, state.count, state.since)", "state.count"),
    ),
    *mutants(
        "_ascents/rw_sam.py",
        REWEIGHTED,
        ("count=optax.safe_increment(state.count)", "count=state.count + 1", COUNTS),
        ("jnp.where(finite, s - devices.max(jnp.max(s)), 0)", "s"),
        ("jnp.where(gaps == 0, 0, strength * gaps)", "strength * gaps"),
    ),
    *mutants(
        "_masks/top_k.py",
        "tests/masks/test_top_k.py",
        ("(positions < end)", "(positions <= end)"),
        ("jnp.where(bits == sign, 0, bits)", "bits"),
        ("& (x > 0) & (k > 0)", "& (x > 0)"),
        ("& (x > 0) & (k > 0)", "& (k > 0)"),
    ),
    *mutants(
        "_masks/patterns.py",
        "tests/masks/test_patterns.py",
        ("(rank < n) & (groups > 0)", "rank < n"),
        ("((other == own) & earlier)", "((other == own) & ~earlier)"),
    ),
    *mutants(
        "_masks/masking.py",
        "tests/ascents/test_sparse_dynamic.py",
        (
            "trees.fill(make(), mask)",
            "trees.fill(make(), jax.tree.map(jnp.zeros_like, mask))",
        ),
    ),
    *mutants(
        "diagnostics/_sharpness.py",
        "tests/diagnostics/test_sharpness.py",
        ("jnp.minimum(length, step_size)", "length"),
        ("jnp.where(higher, 1, 0.5)", "1"),
    ),
    *mutants(
        "diagnostics/_surface.py",
        "tests/diagnostics/test_sharpness.py -k directions",
        ("<= len(others)", "< len(others)"),
        ("<= len(others)", "<= len(others) + 1"),
    ),
    *mutants(
        "diagnostics/_spectrum.py",
        "tests/diagnostics/test_curvature.py -k smooth",
        (
            "0.01 * jnp.where(spread == 0, level, spread)",
            "0.01 * jnp.where(spread == 0, 1, spread)",
        ),
        ("jnp.where(nodes[0] == 0, 1, jnp.abs(nodes[0]))", "jnp.abs(nodes[0])"),
    ),
]


def survives(mutant):
    """Whether the tests pass; runs them on a copy with the mutant in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("optax_sam", "tests", "examples", "pyproject.toml"):
            source = ROOT / name
            into = shutil.copytree if source.is_dir() else shutil.copy
            into(source, copy / name)
        file = copy / "optax_sam" / mutant.file
        file.write_text(mutated(mutant))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [*command, *split(mutant.tests)],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    if run.returncode not in (0, 1):
        raise RuntimeError(f"{mutant}:\n{run.stdout}{run.stderr}")
    return run.returncode == 0


def split(tests):
    paths, _, expression = tests.partition(" -k ")
    return [*paths.split(), *(["-k", expression] if expression else [])]


def mutated(mutant):
    text = (ROOT / "optax_sam" / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.old!r} is not once in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="part of the name of a file")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.file]
    for mutant in chosen:
        compile(mutated(mutant), mutant.file, "exec")
    left = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, alive in zip(chosen, pool.map(survives, chosen), strict=True):
            left += [mutant] if alive else []
            word = "SURVIVED" if alive else "killed"
            print(
                f"{word:9}{mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True
            )
    print(f"{len(chosen) - len(left)} killed, {len(left)} left")


if __name__ == "__main__":
    main()
