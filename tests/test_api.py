"""Public names, and the parameters, defaults and fields that they have."""

import importlib
import inspect
import pydoc
import re

import documents
import pytest

import optax_sam

# Of states and results, the fields. A signature goes on in lines that are indented.
API = {
    "optax_sam": """
AdaptToScaleState(count)
FollowAverageState()
FollowMomentumState(count)
GapDescentState(count)
KeepAverageState(count, average)
RemoveCommonDirectionState(count, common)
ReuseAscentState(count, direction)
ReweightBySharpnessState(key, count, effective_sample_size, largest_weight,
    mean_directional_norm)
ScaleToRadiusState(count)
SharpnessAwareState(ascent_state, base_state, step, clean_loss, perturbed_loss)
SparsifyByFisherState(count, mask, since, key)
SparsifyDynamicallyState(count, mask, since, key)
SuppressVarianceState(count, direction)
WeightedDescentState(count, base_state=())
adapt_to_scale(rho, *, eta=0.0)
asam(base, rho, *, eta=0.0)
between(first, last=None)
choose_layers(scores, sparsity, *, cost=None)
diagnostics
dynamic_sparse_sam(base, rho, sparsity, *, refresh_every, decay_steps,
    drop_fraction=0.5, drop_by='gradient', grow_by='random', key=0, rescale=False)
every(k)
fisher_diagonal(loss_fn, params, batch, *, num_examples=None, chunk_size=4,
    axis_name=None)
follow_average()
follow_momentum(rho)
friendly_sam(base, rho, sigma=1.0, decay=0.9)
functional_loss(output_fn, loss_fn, *, has_aux=False)
gap_descent(alpha)
gsam(base, rho, alpha)
keep_average(theta, accumulator_dtype=None)
look_sam(base, rho, every=5, alpha=0.7)
m_sam(base, rho, micro_batch_size, *, micro_batches_at_once=1)
momentum_sam(base, rho)
n_m(n, m, axis=-1)
perturb_only(mask)
remove_common_direction(sigma=1.0, decay=0.9)
reuse_ascent(alpha)
reweight_by_sharpness(strength, *, key, delta=0.0001, num_probes=1,
    estimator='auto', normalize=False)
rw_sam(base, rho, strength, *, key=0, delta=0.0001, num_probes=1,
    estimator='auto', normalize=False)
sam(base, rho)
scale_to_radius(rho)
select_layers(*layers)
sharpness_aware(base, ascent, *, ascend_when=None, micro_batch_size=None,
    micro_batches_at_once=1, axis_name=None, sync_ascent=True)
sparse_sam(base, rho, pattern, *, refresh_every, num_examples=128,
    estimator='per_example', chunk_size=4, num_probes=4, key=0, rescale=False)
sparsify_by_fisher(pattern, *, refresh_every, num_examples=128,
    estimator='per_example', chunk_size=4, num_probes=4, key=0)
sparsify_dynamically(sparsity, *, refresh_every, decay_steps, drop_fraction=0.5,
    drop_by='gradient', grow_by='random', key)
structured(sparsity, unit='layer')
suppress_variance(theta, accumulator_dtype=None)
unstructured(sparsity)
value_and_update(loss_fn, tx, *, has_aux=False, ascent_loss_fn=None,
    scoring_loss_fn=None, axis_name=None)
vasso(base, rho, theta, *, accumulator_dtype=None, one_pass=False)
weighted_descent(gamma)
wsam(base, rho, gamma, *, learning_rate=None)
""",
    "optax_sam.diagnostics": """
AscentMetrics(clean_loss, perturbed_loss, gap, perturbation_norm, mask_density,
    effective_sample_size)
AscentStability(variance, relative_variance, mean_cosine, mean_norm)
Eigenpairs(values, residuals, vectors)
Estimate(mean, standard_error)
SpectralDensity(nodes, weights)
ascent_metrics(loss_fn, ascent, *, has_aux=False, ascent_loss_fn=None,
    scoring_loss_fn=None)
ascent_stability(loss_fn, ascent, params, ascent_state, batches, *args, has_aux=False,
    ascent_loss_fn=None, scoring_loss_fn=None)
average_sharpness(loss_fn, params, batch, *, rho, num_samples=32, adaptive=False,
    eta=0.0, key)
filter_normalized_directions(params, *, key, count=2, orthogonal=False)
gradient_covariance_trace(loss_fn, params, batch, *, chunk_size=4)
hessian_trace(loss_fn, params, batch, *, num_probes=32, key)
hessian_vector_product(loss_fn, params, batch, vector)
loss_surface(loss_fn, params, batch, directions, xs, ys=None)
smooth_density(density, grid, *, width=None)
spectral_density(loss_fn, params, batch, *, iterations=64, num_probes=4, key)
top_eigenvalues(loss_fn, params, batch, *, count=1, iterations=32,
    return_vectors=False, key)
worst_case_sharpness(loss_fn, params, batch, *, rho, steps=20, step_size=1.0,
    adaptive=False, eta=0.0, micro_batch_size=None, micro_batches_at_once=1, key=None)
""",
    "optax_sam.flax": """
TrainState(step, apply_fn, params, tx, opt_state)
nnx_value_and_update(loss_fn, *, has_aux=False, ascent_loss_fn=None,
    scoring_loss_fn=None)
""",
    "optax_sam.implicit": """
Channels(sparsity, by='gradient')
Masked(mask, layer='the layer')
MaskedConvGeneralDilated()
MaskedDotGeneral()
sparsify(model, how)
""",
}


def described(name, value):
    """A name with its parameters and their defaults, without annotations."""
    if inspect.ismodule(value):
        return name
    signature = inspect.signature(value)
    parameters = [
        p.replace(annotation=p.empty)
        for p in signature.parameters.values()
        if p.name not in ("parent", "name")  # Of every Flax module.
    ]
    return f"{name}{inspect.Signature(parameters)}"


@pytest.mark.parametrize("module", API)
def test_names_parameters_and_fields(module):
    if module in ("optax_sam.flax", "optax_sam.implicit"):
        pytest.importorskip("flax")
    public = importlib.import_module(module)
    found = {described(name, getattr(public, name)) for name in public.__all__}
    expected = {" ".join(x.split()) for x in re.split(r"\n(?! )", API[module].strip())}
    assert expected <= found, expected - found
    # A new method need not be listed here, what is no method has to be.
    new = {name.partition("(")[0] for name in found - expected}
    assert {n for n in new if not is_of_a_method(getattr(public, n))} == set()


def is_of_a_method(value):
    return value.__module__.startswith("optax_sam._ascents.")


@pytest.mark.parametrize("module", API)
def test_the_reference_has_every_public_name(module):
    if module in ("optax_sam.flax", "optax_sam.implicit"):
        pytest.importorskip("flax")
    pages = [path.read_text() for path in documents.ROOT.glob("docs/api/*.md")]
    shown = re.findall(r"^\.\. auto\w+:: (\S+)$", "\n".join(pages), re.MULTILINE)
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert names <= set(shown), names - set(shown)


def test_help_lists_the_entry_points():
    functions = {n for n in optax_sam.__all__ if callable(getattr(optax_sam, n))}
    states = {name for name in functions if name.endswith("State")}
    for name in functions - states:
        assert re.search(rf"`{name}\b", optax_sam.__doc__), name
    assert "`optax_sam.diagnostics`" in optax_sam.__doc__


@pytest.mark.parametrize("module", ["optax_sam", "optax_sam.diagnostics"])
def test_help_names_types_as_the_source_does(module):
    public = importlib.import_module(module)
    for name in public.__all__:
        value = getattr(public, name)
        if inspect.isfunction(value):
            signature = pydoc.plain(pydoc.render_doc(value)).splitlines()[2]
            assert not re.search(r"Union|numpy|jaxlib|_src", signature), signature
