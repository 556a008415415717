"""Where the settings of train.py come from.

Each comes from the first of these that has it: the command line, the file given by
--config or, with --resume, that of the run, and what suits the data set.
"""

import argparse
import dataclasses
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tyro

from sam_examples.settings.command_line import require
from sam_examples.settings.config import Config, suitable


def parse(args: Sequence[str]) -> Config:
    """The configuration that a command line asks for.

    Raises:
      ValueError: if a file of settings cannot be read, is none, or has an unknown one.
    """
    first = _Names.parse(args)
    given: dict[str, Any] = {}
    if first.resume and first.out and (first.out / "config.json").is_file():
        given |= read_settings(first.out / "config.json")
    if first.config:
        given |= read_settings(first.config)
    names = {
        name: getattr(first, name) or given.get(name, getattr(Config, name))
        for name in ("dataset", "method", "base")
    }
    known = get_args(get_type_hints(Config)["dataset"])
    require(
        names["dataset"] in known,
        f"--dataset must be one of {', '.join(known)}",
        names["dataset"],
    )
    if names["method"] == "base":
        names["method"] = "sgd"
    default = suitable(**names, model=first.model or given.get("model"))
    # Checked as if they stood on the command line, before what does.
    from_file = [arg for name, value in given.items() for arg in _as_args(name, value)]
    config: Config = tyro.cli(Config, default=default, args=[*from_file, *args])
    return dataclasses.replace(config, method=names["method"])


@dataclasses.dataclass(frozen=True)
class _Names:
    """What has to be known before the defaults are."""

    dataset: str | None
    method: str | None
    base: str | None
    model: str | None
    config: Path | None
    out: Path | None
    resume: bool | None

    @classmethod
    def parse(cls, args: Sequence[str]) -> "_Names":
        parser = argparse.ArgumentParser(
            add_help=False, allow_abbrev=False, exit_on_error=False
        )
        for name in ("dataset", "method", "base", "model"):
            parser.add_argument(f"--{name}")
        for name in ("config", "out"):
            parser.add_argument(f"--{name}", type=Path)
        parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
        try:
            return cls(**vars(parser.parse_known_args(args)[0]))
        except argparse.ArgumentError:  # The whole command line will be refused.
            return cls(*[None] * 7)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON or TOML file, by name.

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
    fields = [field.name for field in dataclasses.fields(Config)]
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
