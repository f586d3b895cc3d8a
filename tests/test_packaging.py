"""What pyproject.toml, Makefile and README promise about the package is there; tracked files name no machine."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

import edgec
from edgec import cli
from edgec.subprocesses import run

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Written apart, so that this file does not hold them.
FORBIDDEN_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("huggingface", "co"),
        ("debian", "org"),
        ("conda", "anaconda", "org"),
        ("registry", "npmjs", "org"),
        ("crates", "io"),
    )
)
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|opt|mnt)/[\w.]")


def tracked() -> list[Path]:
    """Every file in the index; skips where this is no git checkout (an unpacked source archive)."""
    listed = run(["git", "-C", ROOT, "ls-files", "-z"], timeout_s=60)
    if not listed.ok or not listed.stdout:
        pytest.skip(f"no git checkout: {listed.reason()}")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def readable(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def readme_commands() -> list[str]:
    """Lines of the README's shell blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_one_version() -> None:
    assert importlib.metadata.version("edgec") == edgec.__version__
    assert "version" in PYPROJECT["project"]["dynamic"]


def test_entry_point_resolves() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="edgec")
    assert entry.load() is cli.main


def test_package_data_globs_match() -> None:
    for package, globs in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for glob in globs:
            assert list((ROOT / package).glob(glob)), f"{package}: {glob} matches nothing"


def test_every_data_file_of_the_package_is_shipped() -> None:
    globs = PYPROJECT["tool"]["setuptools"]["package-data"]["edgec"]
    shipped = {path for glob in globs for path in (ROOT / "edgec").glob(glob)}
    data = {path for path in tracked() if path.is_relative_to(ROOT / "edgec") and path.suffix != ".py"}
    assert data <= shipped, "package-data in pyproject.toml misses them"


def test_every_folder_of_the_package_is_a_package() -> None:
    """setuptools leaves a folder without __init__.py out of the wheel."""
    folders = {path.parent for path in tracked() if path.is_relative_to(ROOT / "edgec")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_dependencies_have_upper_bounds() -> None:
    project = PYPROJECT["project"]
    own = [r for name, extra in project["optional-dependencies"].items() if name != "demo" for r in extra]
    for requirement in [*project["dependencies"], *own, *PYPROJECT["build-system"]["requires"]]:
        assert "<" in requirement, requirement


def test_readme_commands_exist() -> None:
    commands = readme_commands()
    assert {"make demo", "make test"} <= set(commands)
    verbs = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    for command in commands:
        words = command.split()
        if words[0] == "make":
            assert words[1] in make_targets(), command
        elif words[0] == "edgec":
            assert words[1] in verbs, command
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), command
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= make_targets()
    assert set(re.findall(r"^\| `edgec ([a-z-]+)` \|", README, re.MULTILINE)) == verbs, "the table lists every verb"


def test_readme_options_exist() -> None:
    group = typer.main.get_command(cli.app)
    for command in readme_commands():
        words = command.split()
        if words[0] == "edgec" and len(words) > 2:
            known = {name for p in group.commands[words[1]].params for name in (*p.opts, *p.secondary_opts)}  # type: ignore[attr-defined]
            assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= known, command


def test_readme_names_real_files() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"\brecipes/[\w.-]+\.yaml", README):
        assert (ROOT / path).is_file(), path


def test_readme_targets_are_the_targets() -> None:
    from edgec.export.targets import all_targets

    assert set(re.findall(r"^\| `((?:onnx|gguf)[\w-]*)` \|", README, re.MULTILINE)) == set(all_targets())


def test_ci_runs_lint_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "executable"
    assert "make lint test" in script.read_text(encoding="utf-8")
    assert {"setup", "demo", "test", "test-fast", "lint", "clean"} <= make_targets()


def test_tracked_files_name_no_registry_and_no_machine() -> None:
    hosts = re.compile("|".join(re.escape(host) for host in FORBIDDEN_HOSTS), re.IGNORECASE)
    found = []
    for path in tracked():
        text = readable(path)
        for pattern in (hosts, MACHINE_PATH):
            if match := pattern.search(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {match.group()}")
    assert not found


def test_no_weights_or_artifacts_are_tracked() -> None:
    forbidden = {".onnx", ".data", ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".npy", ".whl", ".so"}
    files = tracked()
    assert not [str(path) for path in files if path.suffix in forbidden]
    assert not [str(path) for path in files if path.stat().st_size > 1_000_000]
