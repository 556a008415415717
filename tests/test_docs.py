"""The code of the pages in docs/ runs, and no page has a link that leads nowhere."""

import os.path
import re

import documents
import jax.numpy as jnp
import numpy as np
import optax
import pytest

# What a reader needs first; the code of other pages runs in the full tier.
FIRST_PAGES = {documents.TUTORIAL, "docs/choosing.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.full] * (page not in FIRST_PAGES))
        for page in documents.PAGES
        if documents.python(page)
    ],
)
def test_code_runs(page):
    documents.run(page)


@pytest.mark.parametrize("page", documents.PAGES)
def test_links_lead_somewhere(page):
    for link in documents.links(page):
        name, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), name))
        target = target if name else page
        assert (documents.ROOT / target).exists(), link
        if anchor:
            assert target in documents.PAGES, link
            assert anchor in documents.anchors(target), link


# What a page was to be filled in at, and tables to be made that were not.
LEFTOVER = re.compile(r"^[A-Z][A-Z0-9-]{3,}$|<!--[^>]*-->\s*<!-- / -->", re.M)


@pytest.mark.parametrize("page", documents.PAGES)
def test_nothing_is_left_to_be_filled_in(page):
    assert not LEFTOVER.findall((documents.ROOT / page).read_text())


def test_anchors_are_those_of_github():
    found = documents.anchors("examples/benchmarks/README.md")
    assert "sharded_memorypy-a-billion-parameters-fully-sharded" in found
    assert "flax-linens-trainstate" in documents.anchors("docs/recipes/frameworks.md")


def test_adding_a_method():
    scope = {"__name__": "sign_sam"}
    exec(documents.python("CONTRIBUTING.md")["Adding a method"], scope)
    base, params = optax.sgd(1.0), jnp.array([1.0, -3.0])
    # The gradient at w is that of half the squared length.
    for rho, expected in ((0.5, [-1.5, 3.5]), (0.0, [-1.0, 3.0])):
        tx = scope["sign_sam"](base, rho)
        state = tx.init(params)
        updates, _ = tx.update(params, state, params, grad_fn=lambda w: w)
        np.testing.assert_array_equal(updates, expected)
    nothing, state = tx.update(params * jnp.nan, state, params, grad_fn=lambda w: w)
    np.testing.assert_array_equal(nothing, -params)
    assert state.ascent_state.count == 0
    with pytest.raises(ValueError, match=r"^sign_sam: rho = -1 "):
        scope["sign_sam"](base, rho=-1.0)
