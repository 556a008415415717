"""The translating application: its losses, its files, and how it can be stopped."""

import csv
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import translate
from example_support import check_refusal, results
from problems import assert_trees_close, assert_trees_differ
from sam_examples.data.spelt_numbers import load_spelt_numbers
from sam_examples.data.subwords import learn_subwords
from sam_examples.data.token_batches import EncodedPairs, TokenBatch
from sam_examples.models.encoder_decoder import make_translator
from sam_examples.settings.methods import make_tx
from sam_examples.settings.run_options import as_json
from sam_examples.settings.translation import parse_translation
from sam_examples.training import run as runs
from sam_examples.training import translation
from sam_examples.training.build import Optimizer
from sam_examples.training.checkpoints import Checkpoints
from sam_examples.training.step import make_step_of
from sam_examples.training.translation import (
    after_begin,
    make_translation_loss_fn,
    make_translation_task,
    prepare,
    smoothed_cross_entropy,
)
from sam_examples.training.translator import judge

TINY = ["--layers", "1", "--width", "8", "--hidden", "8", "--vocabulary", "80"]
TINY += ["--batch-tokens", "400", "--epochs", "2", "--warmup-epochs", "0.5"]
TINY += ["--beams", "2", "--devices", "1"]
LOGITS = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32)
LABELS = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [6, 5, 0, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_spreads_a_share_of_each_label(smoothing):
    labels = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), smoothing)
    np.testing.assert_allclose(
        smoothed_cross_entropy(jnp.asarray(LOGITS), LABELS, smoothing),
        optax.softmax_cross_entropy(LOGITS, labels),
        rtol=1e-5,
    )


def test_losses_of_sentences_have_the_mean_over_all_tokens():
    model = make_translator("small", 9, num_layers=1, width=8, hidden=8)
    sources, targets = np.array([[5, 3, 0], [4, 6, 3]]), np.array([[7, 3], [3, 0]])
    params = model.init(jax.random.key(0), sources, targets, train=False)["params"]
    batch, key = prepare(TokenBatch(sources, targets), jax.random.key(1))
    loss_fn = make_translation_loss_fn(model, 0.0)
    losses, (_, accuracy) = jax.jit(loss_fn)(params, batch, {}, key)

    written = np.array([[2, 7], [2, 3]])
    logits = model.apply({"params": params}, sources, written, train=False)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    tokens = [log_probs[0, 0, 7], log_probs[0, 1, 3], log_probs[1, 0, 3]]
    np.testing.assert_allclose(np.mean(losses), -np.mean(tokens), rtol=1e-5)
    np.testing.assert_allclose(losses[1], -2 / 3 * tokens[2], rtol=1e-5)
    hits = [np.argmax(logits[i, t]) for i, t in ((0, 0), (0, 1), (1, 0))]
    assert accuracy == pytest.approx(np.mean(np.array(hits) == [7, 3, 3]))


def test_translations_are_judged_to_the_letter_and_in_parts():
    expected = ["a small dog runs over the grass .", "two men talk in a street ."]
    same = judge(expected, expected)
    assert same == pytest.approx((100, 100, 1))
    other = judge([expected[0], "two men sit in a street ."], expected)
    assert 40 < other.bleu < other.chrf < 100
    assert other.exact == 0.5


def test_defaults_are_those_of_the_text(tmp_path):
    numbers, text = (parse_translation(a) for a in ([], ["--data-dir", "somewhere"]))
    assert (numbers.vocabulary, numbers.layers, text.layers) == (200, 2, None)
    assert text.base == "adamw"
    assert parse_translation(["--base", "sgd"]).base_hyperparameters == ()
    assert parse_translation(["--method", "base"]).method == "sgd"
    # What a run wrote down is what it is used by.
    run = parse_translation(["--layers", "3", "--out", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(as_json(run), default=str))
    used = parse_translation(["--translate", "x.de", "--out", str(tmp_path)])
    assert used.layers == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-dir", "nowhere"], "nowhere is no directory; --data-dir is that of"),
        (["--source", "xx"], "num2words spells no numbers in 'xx'; choose from am"),
        (["--target", "de"], "--source and --target must be two languages, got de."),
        (["--max-length", "3"], "--max-length must be at least 4, got 3."),
        (["--shapes", "0"], "--shapes must be at least 1, got 0."),
        (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and below"),
        (["--method", "sgd", "--perturb", "x"], "--perturb needs an ascent, got sgd."),
        (["--translate", "x.de"], "--translate needs --out, the directory of a finish"),
        (["--translate", "x.de", "--out", "."], "parameters.msgpack is missing; --out"),
        (["--translate", "x.de", "--resume"], "--resume needs --out"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    check_refusal(capsys, message, translate.main, options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def few_numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            translation,
            "load_spelt_numbers",
            lambda *languages: load_spelt_numbers(
                *languages, num_train=200, num_valid=20, num_test=10
            ),
        )
        yield


def run(out, *options):
    translate.main([*TINY, *options, "--out", str(out)])
    return results(out)


def curves(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(few_numbers, tmp_path_factory):
    out = tmp_path_factory.mktemp("translate") / "run"
    run(out)
    return out


@pytest.mark.full
def test_a_run_leaves_its_figures_and_translations(finished):
    figures, rows = results(finished), curves(finished)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["valid_loss"]) < float(rows[0]["valid_loss"])
    assert float(rows[1]["train_gap"]) > 0
    for name, size in (("valid", 20), ("test", 10)):
        lines = (finished / "translations" / name).read_text().split("\n")
        assert len(lines) == size + 1
        quality = figures["quality"][name]
        assert 0 <= quality["bleu"] <= 100
        assert 0 <= quality["exact"] <= 1
        assert quality["sentences_per_second"] > 0


@pytest.mark.full
def test_a_finished_run_translates_a_file(finished, tmp_path, capsys):
    text = load_spelt_numbers("de", "en", num_train=200, num_valid=20, num_test=10)
    sentences = tmp_path / "numbers.de"
    sentences.write_text("\n".join(text.tests["test"].sources) + "\n")
    capsys.readouterr()
    translate.main(["--out", str(finished), "--translate", str(sentences)])
    written = (finished / "translations" / "test").read_text()
    assert capsys.readouterr().out == written
    check_refusal(
        capsys,
        "of another model",
        translate.main,
        ["--out", str(finished), "--translate", str(sentences), "--layers", "2"],
    )


@pytest.mark.full
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch, capsys):
    advance, calls = runs.Run.advance, []
    steps = int(curves(finished)[0]["step"])

    def interrupt(*args):
        calls.append(None)
        if len(calls) == steps + 2:
            os.kill(os.getpid(), signal.SIGINT)
        advance(*args)

    monkeypatch.setattr(runs.Run, "advance", interrupt)
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit) as status:
        run(out)
    assert status.value.code == 128 + signal.SIGINT
    assert Checkpoints(out / "checkpoints", 3).steps() == [steps, steps + 2]
    check_refusal(
        capsys_cleared(capsys),
        "has checkpoints of an earlier run; give --resume",
        translate.main,
        [*TINY, "--out", str(out)],
    )
    translate.main(["--out", str(out), "--resume"])
    assert curves(out) == curves(finished)
    for name in ("parameters.msgpack", "subwords.model"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def capsys_cleared(capsys):
    capsys.readouterr()
    return capsys


@pytest.mark.full
@pytest.mark.parametrize("method", ["m_sam", "functional_sam+m_sam"])
def test_eight_devices_with_parts_of_the_parameters_do_what_one_does(
    few_numbers, tmp_path, method
):
    # Batches have the same rows if eight divides them on one device too.
    options = ["--method", method, "--hyperparameters", "micro_batch_size=8"]
    options += ["--shapes", "1", "--dropout", "0"]
    alone = run(tmp_path / "alone", *options)
    sharded = run(tmp_path / "sharded", *options, "--devices", "8", "--fully-sharded")
    for name in ("train_loss", "valid_loss"):
        np.testing.assert_allclose(
            sharded["epochs"][name], alone["epochs"][name], rtol=2e-3
        )


def make_model():
    return make_translator("small", 80, num_layers=1, width=8, hidden=8)


def make_task(config):
    text = load_spelt_numbers("de", "en", num_train=200, num_valid=20, num_test=1)
    subwords = learn_subwords([*text.train.sources, *text.train.targets], 80)
    train, valid = (
        EncodedPairs(*(subwords.encode(sentences) for sentences in pairs))
        for pairs in (text.train, text.valid)
    )
    return make_translation_task(config, train, valid, make_model(), 1)


@pytest.mark.full
def test_a_shape_is_compiled_for_once():
    config = parse_translation([*TINY, "--shapes", "3", "--method", "sgd"])
    task = make_task(config)
    shapes = {task.batches[step].sources.shape for step in range(task.num_steps)}
    assert len(shapes) == 3
    optimizer = Optimizer(config, {}, task.steps_per_epoch)
    trainer = runs.Trainer(config, task, optimizer, 1)
    for step in range(task.steps_per_epoch):
        batch = jax.tree.map(lambda x: x[None], task.batches[step])
        trainer.train(batch)
    assert trainer._train._cache_size() == 3


@pytest.mark.full
def test_functional_sam_pulls_back_the_clean_derivative_at_the_cost_of_sam():
    options = [*TINY, "--shapes", "1", "--dropout", "0", "--method"]
    tx, found = make_tx("sam", optax.sgd(1.0), {"rho": 0.5}, 1), {}
    for method in ("sam", "functional_sam"):
        task = make_task(parse_translation([*options, method]))
        state = task.init(0, tx)
        inputs = state, task.batches[0], jax.random.key(0)
        step = jax.jit(make_step_of(task.objective, tx)).lower(*inputs).compile()
        found[method] = step.cost_analysis()["flops"], step(*inputs)[0].params
    model, batch = make_model(), task.batches[0]
    labels = optax.smooth_labels(jax.nn.one_hot(batch.targets, 80), 0.1)
    written = after_begin(batch.targets)
    is_token = (batch.targets != 0)[..., None]

    def outputs_fn(params):
        return model.apply({"params": params}, batch.sources, written, train=False)

    @jax.jit
    def by_hand(params):
        logits, pullback = jax.vjp(outputs_fn, params)
        derivative = is_token * (jax.nn.softmax(logits) - labels) / is_token.sum()
        (uphill,) = pullback(derivative)
        scale = 0.5 / optax.tree.norm(uphill)
        ahead = jax.tree.map(lambda p, u: p + scale * u, params, uphill)
        (gradient,) = jax.vjp(outputs_fn, ahead)[1](derivative)
        return jax.tree.map(lambda p, g: p - g, params, gradient)

    (of_sam, sam), (flops, actual) = found.values()
    assert flops <= 1.01 * of_sam
    assert_trees_close(actual, by_hand(state.params), rtol=1e-4, atol=1e-5)
    assert_trees_differ(actual, sam)
