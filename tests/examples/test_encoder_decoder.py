"""The encoder-decoder Transformer, and its decoding with what it keeps of the past."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_examples.models.decoding import (
    SpecialTokens,
    beam_search,
    length_penalty,
    translate,
)
from sam_examples.models.encoder_decoder import (
    TRANSLATORS,
    EncoderDecoder,
    make_translator,
    sinusoids,
)

SPECIAL = SpecialTokens(pad=0, begin=2, end=3)
TINY = {"width": 8, "num_layers": 2, "num_heads": 2, "hidden": 12}
# Padded sources of 4, 2 and 3 tokens.
SOURCES = np.array([[4, 5, 6, 3, 0], [7, 3, 0, 0, 0], [8, 4, 3, 0, 0]])
WRITTEN = np.array([[2, 9, 4, 5], [2, 6, 6, 7], [2, 4, 8, 9]])
either_norm = pytest.mark.parametrize(
    "pre_norm", [False, pytest.param(True, marks=pytest.mark.full)]
)


@cache
def tiny(pre_norm=False, dtype="float32"):
    """A model whose attention is far from uniform, and its parameters."""
    model = make_translator(
        "small", 10, **TINY, pre_norm=pre_norm, dropout_rate=0.5, dtype=dtype
    )
    init = jax.jit(partial(model.init, train=False))
    params = init(jax.random.key(0, impl="rbg"), SOURCES, WRITTEN)["params"]
    return model, jax.tree.map(lambda leaf: 2 * leaf, params)


@cache
def logits_fn(pre_norm=False, dtype="float32"):
    model, params = tiny(pre_norm, dtype)
    return jax.jit(lambda s, t: model.apply({"params": params}, s, t, train=False))


def count(model):
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), tokens, tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_models_have_the_published_numbers_of_parameters():
    base = count(make_translator("base", 37_000))
    assert (
        round(base / 1e6) == 63
    )  # Published as 65, with a vocabulary of about 37,000.
    # The layers of torch.nn.Transformer(512, 8, 6, 6, 2048), with its last two norms.
    assert base - 37_000 * 512 + 2 * 2 * 512 == 44_140_544
    # Of transformer_iwslt_de_en with dictionaries of 8,848 and 6,632 words.
    iwslt = make_translator("iwslt", 8848 + 6632)
    assert count(iwslt) == 39_469_056
    # The big one with the norm first and two tables of 70,000.
    big = make_translator(
        "base", 70_000, width=1024, num_heads=16, hidden=4096, pre_norm=True
    )
    assert count(big) + 70_000 * 1024 == 319_721_472


# In float64, since these weights magnify rounding: logits by some thousands.
@either_norm
@pytest.mark.usefixtures("x64")
def test_padding_changes_nothing(pre_norm):
    logits = logits_fn(pre_norm, "float64")
    padded = logits(SOURCES, WRITTEN)
    longer = np.pad(SOURCES, ((0, 0), (0, 2)))
    np.testing.assert_allclose(logits(longer, WRITTEN), padded, rtol=1e-5, atol=1e-5)
    alone = logits(SOURCES[1:2, :2], WRITTEN[1:2])
    np.testing.assert_allclose(alone[0], padded[1], rtol=1e-5, atol=1e-5)


def test_a_position_sees_no_later_one_and_all_of_the_source():
    logits = logits_fn()
    before = logits(SOURCES, WRITTEN)
    written = WRITTEN.copy()
    written[:, 2] = 7
    after = logits(SOURCES, written)
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert np.all(np.abs(after - before)[:, 2:].max(axis=-1) > 1e-3)
    sources = SOURCES.copy()
    sources[:, 0] = 9
    differ = np.abs(logits(sources, WRITTEN) - before).max(axis=-1)
    assert np.all(differ > 1e-3)


@either_norm
@pytest.mark.usefixtures("x64")
def test_steps_give_the_logits_of_all_positions_at_once(pre_norm):
    model, params = tiny(pre_norm, "float64")
    # Two candidates for each source, next to each other.
    written = np.concatenate([WRITTEN, WRITTEN[::-1]], axis=1).reshape(6, 4)

    @jax.jit
    def stepwise(sources, written):
        apply = partial(model.apply, {"params": params})
        memory = apply(sources, method="encode")

        def step(past, inputs):
            tokens, position = inputs
            logits, past = apply(tokens, position, memory, past, method="step")
            return past, logits

        positions = jnp.arange(written.shape[1])
        past = model.no_past(len(written), 6)  # Longer than what is written.
        return jax.lax.scan(step, past, (written.T, positions))[1].swapaxes(0, 1)

    logits = logits_fn(pre_norm, "float64")
    expected = logits(np.repeat(SOURCES, 2, axis=0), written)
    out = stepwise(SOURCES, written)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def rolled_out(logits, sources, length):
    """The likeliest next token, by the whole model, again and again."""
    written = np.full((len(sources), 1 + length), SPECIAL.pad)
    written[:, 0] = SPECIAL.begin
    done = np.zeros(len(sources), bool)
    for position in range(length):
        # Neither padding nor a beginning.
        scores = np.array(logits(sources, written[:, :length])[:, position])
        scores[:, [SPECIAL.pad, SPECIAL.begin]] = -np.inf
        latest = np.argmax(scores, axis=-1)
        if position == length - 1:
            latest[:] = SPECIAL.end
        written[:, position + 1] = np.where(done, SPECIAL.pad, latest)
        done |= latest == SPECIAL.end
    return written[:, 1:]


def test_greedy_translations_are_those_of_the_whole_model():
    model, params = tiny()
    search = partial(translate, model, special=SPECIAL, length=4)
    written = jax.jit(search)(params, SOURCES)
    np.testing.assert_array_equal(written, rolled_out(logits_fn(), SOURCES, 4))


@pytest.mark.full
def test_scores_of_beams_are_those_of_the_whole_model():
    model, params = tiny()

    @jax.jit
    def search(sources):
        apply = partial(model.apply, {"params": params})
        memory = apply(sources, method="encode")

        def next_logits(tokens, position, past):
            return apply(tokens, position, memory, past, method="step")

        past = model.no_past(9, 4)
        return beam_search(
            next_logits, past, SPECIAL, rows=3, length=4, beams=3, alpha=1.0
        )

    tokens, scores = map(np.asarray, search(SOURCES))
    best = partial(translate, model, special=SPECIAL, length=4, beams=3, alpha=1.0)
    np.testing.assert_array_equal(jax.jit(best)(params, SOURCES), tokens[:, 0])
    for k in range(3):
        begin = np.full((3, 1), SPECIAL.begin)
        written = np.concatenate([begin, tokens[:, k, :-1]], axis=1)
        log_probs = jax.nn.log_softmax(logits_fn()(SOURCES, written))
        each = np.take_along_axis(np.asarray(log_probs), tokens[:, k, :, None], -1)
        total = np.sum(each[..., 0] * (tokens[:, k] != SPECIAL.pad), axis=-1)
        size = np.sum(tokens[:, k] != SPECIAL.pad, axis=-1)
        expected = total / length_penalty(size, 1.0)
        np.testing.assert_allclose(scores[:, k], expected, rtol=1e-4)


@pytest.mark.full
def test_bfloat16_is_the_type_of_the_computation_alone():
    model, params = tiny(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # Attention is less sharp with the parameters of the start.
    variables = {"params": jax.tree.map(lambda leaf: leaf / 2, params)}
    low, full = (
        jax.jit(partial(m.apply, train=False))(variables, SOURCES, WRITTEN)
        for m in (model, tiny()[0])
    )
    assert low.dtype == jnp.float32
    error = np.abs(low - full).max() / np.abs(full).max()
    assert 1e-4 < error < 5e-2
    assert model.no_past(1, 2)[0][0].dtype == jnp.bfloat16


def test_positions_are_the_published_sinusoids():
    table = sinusoids(jnp.arange(5), 8)
    for p in range(5):
        for i in range(4):
            angle = p / 10_000 ** (2 * i / 8)
            pair = table[p, 2 * i : 2 * i + 2]
            np.testing.assert_allclose(pair, [np.sin(angle), np.cos(angle)], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("large", {}, "unknown model 'large'; choose from base, iwslt, small."),
        ("base", {"num_heads": 7}, "multiple of twice the 7 heads, got 512."),
        ("base", {"hidden": 0}, "hidden must be at least 1, got 0."),
        ("base", {"dropout_rate": 1.0}, "below 1, got 1.0."),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_translator(name, 10, **options)


def test_none_leaves_an_attribute_as_the_model_has_it():
    model = make_translator("iwslt", 10, width=None, num_layers=1)
    assert model == EncoderDecoder(10, **{**TRANSLATORS["iwslt"], "num_layers": 1})


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.full
@either_norm
def test_the_model_computes_what_the_paper_says(pre_norm):
    _, variables = tiny(pre_norm)
    # Biases that are not zero, scales that are not one.
    variables = jax.tree.map(lambda x: x + 0.1 if x.ndim == 1 else x, variables)
    params = in_float64(variables)
    width, heads = 8, 2

    def norm(p, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p["bias"]

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def attention(p, x, memory, may_read):
        def in_heads(name, x):
            return dense(p[name], x).reshape(*x.shape[:-1], heads, width // heads)

        query, keys = in_heads("query", x), in_heads("key", memory)
        scores = np.einsum("bthd,bshd->bhts", query, keys) / np.sqrt(width // heads)
        scores = np.exp(scores) * may_read
        weights = scores / scores.sum(-1, keepdims=True)
        y = np.einsum("bhts,bshd->bthd", weights, in_heads("value", memory))
        return dense(p["out"], y.reshape(x.shape))

    def part(p, x, f):
        return x + f(norm(p, x)) if pre_norm else norm(p, x + f(x))

    def perceptron(p, x):
        return part(
            p["perceptron_norm"],
            x,
            lambda y: dense(p["down"], np.maximum(dense(p["up"], y), 0)),
        )

    def embed(tokens):
        at = np.asarray(sinusoids(jnp.arange(tokens.shape[1]), width), np.float64)
        return np.sqrt(width) * params["tokens"][tokens] + at

    present = (SOURCES != 0)[:, None, None]
    x = embed(SOURCES)
    for layer in range(2):
        p = params[f"encoder_{layer}"]
        itself = partial(attention, p["self_attention"], may_read=present)
        x = part(p["self_attention_norm"], x, lambda y, f=itself: f(y, y))
        x = perceptron(p, x)
    memory = norm(params["encoder_norm"], x) if pre_norm else x
    x = embed(WRITTEN)
    causal = np.tri(4)[None, None]
    for layer in range(2):
        p = params[f"decoder_{layer}"]
        itself = partial(attention, p["self_attention"], may_read=causal)
        source = partial(
            attention, p["memory_attention"], memory=memory, may_read=present
        )
        x = part(p["self_attention_norm"], x, lambda y, f=itself: f(y, y))
        x = part(p["memory_norm"], x, source)
        x = perceptron(p, x)
    x = norm(params["decoder_norm"], x) if pre_norm else x

    model = tiny(pre_norm)[0]
    apply = jax.jit(partial(model.apply, train=False))
    logits = apply({"params": variables}, SOURCES, WRITTEN)
    expected = x @ params["tokens"].T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_dropout_is_drawn_from_its_key_in_training_alone():
    model, params = tiny()

    @jax.jit
    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, SOURCES, WRITTEN, True, rngs=rngs)

    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert np.abs(dropped(0) - dropped(1)).max() > 0.1
