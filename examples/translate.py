"""Trains a Transformer to translate with one method, and reports BLEU and chrF."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sam_examples.data.parallel_text import Pairs, ParallelText, read_lines
from sam_examples.data.subwords import Subwords, learn_subwords, load_subwords
from sam_examples.data.token_batches import EncodedPairs
from sam_examples.settings.command_line import (
    make_run_directory,
    one_line_errors,
    require,
    versions,
    write_json,
)
from sam_examples.settings.config import scaled_hyperparameters
from sam_examples.settings.methods import hyperparameters
from sam_examples.settings.run_options import as_json, num_devices
from sam_examples.settings.translation import (
    TranslationConfig,
    check_translation,
    parse_translation,
)
from sam_examples.training.build import Optimizer, check_layers
from sam_examples.training.checkpoints import Checkpoints
from sam_examples.training.loop import (
    carry_out,
    describe_extension,
    find_progress,
    stopped_in_a_line,
)
from sam_examples.training.run import Run, training_settings
from sam_examples.training.translation import (
    load_text,
    make_model,
    make_translation_task,
)
from sam_examples.training.translator import (
    PARAMETERS,
    SUBWORDS,
    Translator,
    judged,
    load_finished,
    save_parameters,
)


def warn(note: str) -> None:
    """Prints a warning."""
    print(f"warning: {note}", file=sys.stderr)


def encode(pairs: Pairs, name: str, subwords: Subwords, longest: int) -> EncodedPairs:
    """Cuts pairs into subwords, and warns of those that are too long."""
    encoded = EncodedPairs(*(subwords.encode(sentences) for sentences in pairs))
    if too_long := int(np.sum(encoded.lengths > longest)):
        warn(
            f"{too_long:,} of {len(pairs.sources):,} pairs of {name} are longer than "
            f"--max-length {longest} and cut off"
        )
    return encoded.cut_off(longest)


def choose_hyperparameters(config: TranslationConfig, steps: int) -> dict[str, Any]:
    """Those of the method, for so many steps an epoch.

    Raises:
      ValueError: if one is unknown, no number, or no size of a micro-batch.
    """
    defaults = scaled_hyperparameters(1.0, config.epochs, steps)
    names = [config.method]
    (chosen,) = hyperparameters(names, config.hyperparameters, defaults).values()
    require(
        chosen.get("micro_batch_size", 1) >= 1,
        "micro_batch_size must be at least 1",
        chosen.get("micro_batch_size"),
    )
    return chosen


def report(
    run: Run,
    translator: Translator,
    text: ParallelText,
    directory: Path,
    header: str,
    settings: Mapping[str, Any],
) -> None:
    """Translates held-out and test text, writes results.json and prints a line a set.

    Args:
      run: a finished one.
      translator: of its parameters.
      text: what to translate.
      directory: where translations/ and results.json go.
      header: begins the lines.
      settings: what results.json begins with.
    """
    # A call compiled; where it was the only one, there is no figure.
    seconds = float(np.median(run.step_seconds)) if run.step_seconds else None
    sets = {"valid": text.valid, **text.tests}
    quality = {}
    for name, pairs in sets.items():
        path = directory / "translations" / name
        found = judged(translator, pairs, path)
        speed = translator.sentences_per_second
        quality[name] = found._asdict() | {"sentences_per_second": speed}
        print(
            f"{header}, {name}: BLEU {found.bleu:.2f}, chrF {found.chrf:.2f}, "
            f"{100 * found.exact:.2f} % exact after epoch {run.epoch}; {path}"
        )
    curves = {"step_seconds": seconds, "quality": quality, "epochs": run.curves}
    write_json(directory / "results.json", {**settings, **curves})


def translate_file(config: TranslationConfig, sentences: Path, directory: Path) -> None:
    """Translates a file by a finished run, and prints the translations."""
    finished = load_finished(config, directory)
    lines = read_lines(sentences)
    if lines:
        translator = Translator(config, *finished, num_devices(config))
        print("\n".join(translator(lines)))


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training, or the translation, that the command line asks for."""
    with stopped_in_a_line():
        _main(sys.argv[1:] if args is None else args)


def _main(args: Sequence[str]) -> None:
    with one_line_errors():
        config = parse_translation(args)
        check_translation(config)
        if config.translate is not None and config.out is not None:
            translate_file(config, config.translate, config.out)
            return
        text = load_text(config)
        for note in text.notes:
            warn(note)
        devices = num_devices(config)
        name = f"{text.name}-{config.source}-{config.target}"
        directory = make_run_directory(config.out, f"{name}-{config.method}")
        kept = directory / SUBWORDS
        if config.resume and kept.is_file():
            subwords = load_subwords(kept)
        else:
            sentences = [*text.train.sources, *text.train.targets]
            subwords = learn_subwords(sentences, config.vocabulary)
        train, valid = (
            encode(pairs, split, subwords, config.max_length)
            for split, pairs in (("train", text.train), ("valid", text.valid))
        )
        model = make_model(config, len(subwords))
        together = choose_hyperparameters(config, 1).get("micro_batch_size", 1)
        task = make_translation_task(
            config, train, valid, model, math.lcm(devices, together)
        )
        steps = task.steps_per_epoch
        chosen = choose_hyperparameters(config, steps)
        check_layers(config, task)
        optimizer = Optimizer(config, chosen, steps)
        checkpoints = Checkpoints(directory / "checkpoints", config.keep)
        content = [*train, *valid, text.tests, subwords.proto]
        settings = training_settings(config, chosen, content)
        progress = find_progress(checkpoints, settings, resume=config.resume)
        run = Run(config, task, optimizer, devices)
        if progress is not None:
            run.resume(checkpoints, progress)
            if progress.settings["epochs"] < config.epochs:
                print(describe_extension(progress, config, chosen, steps))
    kept.write_bytes(subwords.proto)
    carry_out(run, config, directory, checkpoints, settings)
    params = run.trainer.state.params
    save_parameters(directory / PARAMETERS, params)
    report(
        run,
        Translator(config, model, subwords, params, devices),
        text,
        directory,
        f"{config.method} on {name}, {config.model}",
        {
            "settings": as_json(config) | {"devices": devices},
            "hyperparameters": chosen,
            "versions": versions(),
        },
    )


if __name__ == "__main__":
    main()
