"""Builds the folder in which the aarch64 wheels run: Debian packages for arm64, four wheels, one emulator.

`apt-get` works on an apt state of its own (nothing on the machine is installed or changed, so no root rights are
needed) and resolves the dependencies itself, from the package sources that this machine is configured for;
signatures are checked as always. Turned down: a chroot or container (needs rights that CI often lacks; qemu's `-L`
is enough), a list of packages and versions here (goes stale with every point release), installing
`qemu-user-static` on the machine (registers a binfmt handler for everyone).

The root appears whole or not at all (built beside its place, then renamed), and one builder works at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from edgec.bench.devices._arm64_root import python_command, python_environment

CACHE = Path(__file__).resolve().parents[2] / ".cache"
"""Where roots are kept, below the repository; ignored by git."""

ARM64_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
"""What the wheels need, without what apt finds by itself (libc6, zlib1g, libffi8, ...)."""

EMULATOR_PACKAGE = "qemu-user-static"
EMULATOR_NAMES = ("qemu-aarch64-static", "qemu-aarch64")
"""The program's name; newer Debian releases drop the suffix."""

WHEEL_PLATFORMS = (
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)
"""Tags that pip may pick from; it does not deduce the older ones from the newest."""

FETCH_TIMEOUT_S = 300
"""Longest single download step [seconds]."""

CHECK_TIMEOUT_S = 120
"""Longest first start of the emulated python [seconds]."""

_CORE = """processor\t: {index}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
CPUINFO = _CORE.format(index=0) + _CORE.format(index=1)
"""/proc/cpuinfo of a two-core Cortex-A76. The emulator before version 8.1 shows the host's own file, in which
onnxruntime finds no arm core; from 1.28 on it then crashes at import. Kernels are chosen by the emulated
hardware capabilities, not by this text."""

_SELF_CHECK = (
    "import json, numpy, onnxruntime, onnxruntime_genai, tokenizers, platform, pickle, zipfile; "
    "print(platform.machine())"
)
"""First start: proves that the wheels load, and leaves compiled modules behind (later starts take half the time)."""


class PackagesOutOfReachError(Exception):
    """The root cannot be built here because a tool or a package cannot be had; tests skip with this message."""


class BrokenRootError(Exception):
    """Every package was there and the result still does not run: a failure, not a reason to skip."""


WHEELS = ("numpy", "onnxruntime", "onnxruntime-genai", "tokenizers")
"""What the measuring worker imports (edgec/bench/worker.py), for sentence encoders and for causal LMs."""


def wheels() -> tuple[str, ...]:
    """Requirements of the wheels: the versions installed here, so that both sides run the same code."""
    return tuple(f"{name}=={version(name)}" for name in WHEELS)


def recipe_hash() -> str:
    """Twelve hex digits that change whenever anything that goes into the root changes."""
    recipe = [ARM64_PACKAGES, EMULATOR_PACKAGE, WHEEL_PLATFORMS, CPUINFO, _SELF_CHECK, wheels()]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def ensure_root(cache: Path = CACHE) -> Path:
    """The finished root folder, built now when it is missing. Raises `PackagesOutOfReachError` when it cannot be."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise PackagesOutOfReachError(
            f"the comparison runs on x86-64 Linux, not on {sys.platform} {platform.machine()}"
        )
    root = cache / f"arm64-root-{recipe_hash()}"
    if root.is_dir():
        return root
    with _one_builder(cache):
        if root.is_dir():
            return root
        for leftover in cache.glob("arm64-root-*.tmp"):
            shutil.rmtree(leftover)
        building = cache / f"{root.name}.tmp"
        building.mkdir()
        try:
            _build(building)
            building.rename(root)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return root


@contextlib.contextmanager
def _one_builder(cache: Path) -> Iterator[None]:
    """Hold the builder's lock; the system drops it when the holder dies, so a crash never blocks the next one."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "arm64-root.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(root: Path) -> None:
    """Fill an empty folder: `sysroot/` (Debian), `site/` (wheels), `emulator`."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise PackagesOutOfReachError(f"no {tool} here: the arm64 root is built from Debian packages")
    host_architecture = _run(["dpkg", "--print-architecture"], CHECK_TIMEOUT_S).strip()
    sysroot, host, apt = root / "sysroot", root / "host", root / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "status").touch()
    _fetch([*_apt(apt, "arm64", host_architecture), "update"])
    _unpack(_apt(apt, "arm64", host_architecture), apt / "arm64", ARM64_PACKAGES, sysroot)
    _unpack(_apt(apt, host_architecture, "arm64"), apt / host_architecture, (EMULATOR_PACKAGE,), host)
    shutil.rmtree(apt)
    _merge_usr(sysroot)
    (sysroot / "proc").mkdir()
    (sysroot / "proc" / "cpuinfo").write_text(CPUINFO, encoding="utf-8")
    programs = [path for name in EMULATOR_NAMES if (path := host / "usr" / "bin" / name).exists()]
    if not programs:
        raise BrokenRootError(f"the package {EMULATOR_PACKAGE} holds none of {', '.join(EMULATOR_NAMES)}")
    shutil.copy(programs[0], root / "emulator")
    shutil.rmtree(host)
    _install_wheels(root)
    _check(root)


def _apt(apt: Path, architecture: str, other: str) -> list[str]:
    """`apt-get` with a state of its own, in which nothing is installed and packages of one architecture are native."""
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": f"{architecture},{other}",
        "APT::Get::Assume-Yes": "true",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "20",
        "Acquire::https::Timeout": "20",
        "Dir::Cache": str(apt),
        "Dir::Cache::archives": str(apt / architecture),
        "Dir::State": str(apt),
        "Dir::State::lists": str(apt / "lists"),
        "Dir::State::status": str(apt / "status"),
    }
    return ["apt-get", "-qq", *(part for item in settings.items() for part in ("-o", "=".join(item)))]


def _unpack(apt: Sequence[str], archives: Path, packages: Sequence[str], target: Path) -> None:
    """Fetch packages with all that they depend on into `archives`, and unpack them into `target`."""
    (archives / "partial").mkdir(parents=True)
    _fetch([*apt, "install", "--download-only", *packages])
    for package in sorted(archives.glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(target)], CHECK_TIMEOUT_S)


def _merge_usr(sysroot: Path) -> None:
    """Link /lib to /usr/lib where no package brought a /lib: Debian 13 leaves that to `base-files`."""
    if not (sysroot / "lib").exists():
        (sysroot / "lib").symlink_to("usr/lib")


def _install_wheels(root: Path) -> None:
    """Unpack the wheels into `site/`, for the python that Debian brought."""
    python_version = Path(python_command(root, "max")[-1]).name.removeprefix("python")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore", "--python-version", python_version]
    command += [part for tag in WHEEL_PLATFORMS for part in ("--platform", tag)]
    _fetch([*command, "--target", str(root / "site"), *wheels()])


def _check(root: Path) -> None:
    """Start the python once and see that it is an aarch64 one."""
    machine = _run([*python_command(root, "max"), "-c", _SELF_CHECK], CHECK_TIMEOUT_S, python_environment(root))
    if machine.split() != ["aarch64"]:
        raise BrokenRootError(f"the arm64 root says that it runs on {machine.strip()!r}, expected 'aarch64'")


def _fetch(command: Sequence[str]) -> None:
    """Run a download step without a terminal and without questions; its failure means: out of reach."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    try:
        _run(command, FETCH_TIMEOUT_S, environment)
    except BrokenRootError as error:
        raise PackagesOutOfReachError(f"packages for the arm64 root are out of reach: {error}") from error


def _run(command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of one command; a failure is raised with the last lines of what it wrote."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise BrokenRootError(f"{_words(command)} took more than {timeout_s:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise BrokenRootError(f"{_words(command)} ended with {done.returncode}: {' | '.join(lines[-3:])}")
    return done.stdout


def _words(command: Sequence[str]) -> str:
    """A command in a few words: the program and its first two arguments that are plain words."""
    verbs = [word for word in command[1:] if re.fullmatch(r"[a-z][a-z-]+", word)]
    return " ".join([Path(command[0]).name, *verbs[:2]])
