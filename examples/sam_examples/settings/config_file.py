"""Where the settings of a run come from.

Each comes from the first of these that has it: the command line, the file given by
--config or, with --resume or --translate, that of the run, and what suits the data.
"""

import argparse
import dataclasses
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from sam_examples.settings.config import Config, suitable
from sam_examples.settings.run_options import RunOptions

Options = TypeVar("Options", bound=RunOptions)


def parse(args: Sequence[str]) -> Config:
    """The configuration of train.py that a command line asks for, see `parse_as`."""
    return parse_as(Config, args, suitable, ("dataset", "method", "base", "model"))


def parse_as(
    kind: type[Options],
    args: Sequence[str],
    suitable: Callable[..., Options],
    names: Sequence[str],
) -> Options:
    """The configuration that a command line asks for.

    Args:
      kind: the class of the configuration.
      args: the command line.
      suitable: the defaults, given settings by keyword, None where one is not given.
      names: those settings.

    Raises:
      ValueError: if a file of settings cannot be read, is none, or has an unknown one.
    """
    first = _first(args, names)
    given: dict[str, Any] = {}
    uses_run = (first["resume"] or first.get("translate")) and first["out"]
    if uses_run and (first["out"] / "config.json").is_file():
        given |= read_settings(first["out"] / "config.json", kind)
    if first["config"]:
        given |= read_settings(first["config"], kind)
    known = {name: first[name] or given.get(name) for name in names}
    if known["method"] == "base":
        known["method"] = "sgd"
    # Checked as if they stood on the command line, before what does.
    from_file = [arg for name, value in given.items() for arg in _as_args(name, value)]
    config = tyro.cli(kind, default=suitable(**known), args=[*from_file, *args])
    if config.method == "base":
        config = dataclasses.replace(config, method="sgd")
    return config


def _first(args: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """What has to be known before the defaults are, None where it is not given."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}")
    for name in ("config", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    try:
        return vars(parser.parse_known_args(args)[0])
    except argparse.ArgumentError:  # The whole command line will be refused.
        return dict.fromkeys((*names, "config", "out", "resume"))


def read_settings(path: Path, kind: type[RunOptions]) -> dict[str, Any]:
    """The settings in a JSON or TOML file, by name, of a kind of configuration.

    Raises:
      ValueError: if it cannot be read, is neither, or has something else in it.
    """
    read: Any = tomllib.loads if path.suffix == ".toml" else json.loads
    try:
        content = read(path.read_text())
    except OSError as error:
        raise ValueError(
            f"the settings in {path} cannot be read ({error.strerror}); give --config "
            "a JSON or TOML file, such as the config.json of a run."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON or TOML file ({error}).") from error
    fields = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON or TOML file of settings by name.")
    content = {name.replace("-", "_"): value for name, value in content.items()}
    unknown = [name for name in content if name not in fields]
    if unknown:
        raise ValueError(
            f"{path} has {', '.join(unknown)}, which is no setting; those are "
            f"{', '.join(fields)}."
        )
    settings: dict[str, Any] = content
    return settings


def _as_args(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, *map(str, value if isinstance(value, list) else [value])]
