"""Checks what was built: `python .ci/check_distributions.py dist`.

A wheel and a source distribution hold the package, what people read, and nothing else;
their metadata are those of the checkout.
"""

import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
READ = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}


def check(what, actual, expected):
    """Raises a SystemExit unless both are equal."""
    if actual != expected:
        raise SystemExit(f"{what}: got {actual}, expected {expected}.")


def check_files(distribution, actual, expected):
    """The same for sets of files, saying which there are too many or too few."""
    check(f"{distribution} has unexpected files", sorted(actual - expected), [])
    check(f"{distribution} lacks files", sorted(expected - actual), [])


def package():
    """The files of the package, and nothing that lies beside them by accident."""
    modules = (ROOT / "optax_sam").rglob("*.py")
    return {str(path.relative_to(ROOT)) for path in modules} | {"optax_sam/py.typed"}


def check_wheel(path):
    """Checks files and metadata; returns the version."""
    files = set(zipfile.ZipFile(path).namelist())
    info = f"{'-'.join(path.name.split('-')[:2])}.dist-info/"
    about = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    check_files(path.name, files, package() | {info + name for name in about})

    wheel = PathDistribution(zipfile.Path(path, info))
    metadata, requires = wheel.metadata, wheel.requires
    check("Name", metadata["Name"], PROJECT["name"])
    check("License", metadata["License-Expression"], PROJECT["license"])
    check("Requires-Python", metadata["Requires-Python"], PROJECT["requires-python"])
    core = {line for line in requires if "extra ==" not in line}
    check("Requires-Dist of the core", core, set(PROJECT["dependencies"]))
    extras = set(metadata.get_all("Provides-Extra"))
    check("Provides-Extra", extras, PROJECT["optional-dependencies"].keys())
    readme = (ROOT / PROJECT["readme"]).read_text()
    check("the description", metadata.get_payload().strip(), readme.strip())
    return wheel.version


def check_sdist(path):
    """Checks the files, from which the wheel has been built."""
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    # Hatch adds the last, so that it leaves out the same files again.
    needed = {"pyproject.toml", "PKG-INFO", ".gitignore"}
    check_files(path.name, files, package() | READ | needed)


def main(folder):
    """Checks the one wheel and the one source distribution of a folder."""
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    version = check_wheel(wheel)
    check("the name of the source", sdist.name, f"optax_sam-{version}.tar.gz")
    check_sdist(sdist)
    cited = f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    check(f"version {version} in CITATION.cff", cited, True)
    print(f"{wheel.name} and {sdist.name} hold what they should.")


if __name__ == "__main__":
    main(*sys.argv[1:])
