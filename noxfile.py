"""Build, test and measure: ``nox -l`` lists the sessions, ``nox -s NAME -- ARGS`` passes arguments on."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "test"]

PROJECT = nox.project.load_toml("pyproject.toml")
# torch is large: environments are kept, and uv links its files into all of them from one cache.
nox.options.reuse_venv = "yes"
# A process for each core, and few on large machines: each one imports torch, and may use a GPU.
PARALLEL = ("-n", "logical", "--maxprocesses", "4", "--dist", "worksteal")


def install(session: nox.Session, *groups: str) -> None:
    """Install the project from this checkout, as a user would, and dependency groups."""
    packages = [p for group in groups for p in nox.project.dependency_groups(PROJECT, group)]
    session.install(".[plot]", *packages)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel into dist/; with TOME_BUILD_CUDA=1 with the kernels, whose library is then inspected."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build[uv]")
    session.run("python", "-m", "build", "--wheel", "--installer", "uv", "--outdir", "dist")
    (wheel,) = Path("dist").glob("*.whl")
    with_kernels = bool(os.environ.get("TOME_BUILD_CUDA"))
    expected = "py3-none-linux" if with_kernels else "py3-none-any"
    if expected not in wheel.name:
        session.error(f"{wheel.name} is not a {expected} wheel")
    session.run("python", "-m", "zipfile", "--list", str(wheel))
    names = zipfile.ZipFile(wheel).namelist()
    if with_kernels != any(name.endswith(".so") for name in names):
        session.error(f"{wheel.name} should hold {'a' if with_kernels else 'no'} library")
    if with_kernels:
        session.install(str(wheel), *nox.project.dependency_groups(PROJECT, "cuda-wheel"))
        session.install("--force-reinstall", "--no-deps", str(wheel))  # the environment may hold an earlier build
        # Without a library that loads, its tests would skip.
        session.run("python", "-c", "import tome_cuda; assert tome_cuda.build_info(), tome_cuda.unavailable()")
        session.run("pytest", "tests/test_cuda_library.py", "tests/test_cuda_ops.py", *session.posargs)


@nox.session
def test(session: nox.Session) -> None:
    """Run the tests; what needs a GPU is skipped where there is none, and counted."""
    install(session, "test")
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the code in one place at a time: each time a test must fail. Takes a quarter of an hour."""
    install(session, "test")
    session.run("python", "tests/mutants.py", *session.posargs)


@nox.session
def survey(session: nox.Session) -> None:
    """Ask of every model of every library whether it is supported, and write the table of docs/hosts.md."""
    install(session, "test")
    session.run("python", "tests/survey.py", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests on the oldest versions of everything that pyproject.toml claims to work with."""
    project = PROJECT["project"]
    claimed = [
        *project["dependencies"],
        *(requirement for extra in project["optional-dependencies"].values() for requirement in extra),
    ]
    groups = nox.project.dependency_groups(PROJECT, "test")
    session.install(*(requirement.replace(">=", "==") for requirement in claimed), *groups)
    session.install("--no-deps", ".")
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Build the kernels and run the whole suite on a GPU; where they cannot run this session fails, not skips."""
    session.env["TOME_BUILD_CUDA"] = "1"
    install(session, "test", "cuda-wheel")
    session.run("python", "-c", "import tome_cuda, sys; sys.exit(tome_cuda.unavailable())")
    session.run("pytest", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Time every operation on every backend, with its byte floor; figures go to .benchmarks/ as JSON."""
    install(session, "bench")
    session.run("pytest", "benchmarks", "--benchmark-autosave", "--benchmark-storage=.benchmarks", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small ViT on digits, merge its tokens without retraining, print the table and draw the pictures."""
    install(session, "demo")
    session.run("python", "benchmarks/demo.py", *session.posargs)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Execute examples/notebooks/ as Jupyter does; arguments are papermill's, such as -y "random_weights: true"."""
    install(session, "notebooks")
    done = session.create_tmp()
    session.chdir("examples/notebooks")
    for notebook in sorted(Path().glob("*.ipynb")):
        session.run("papermill", "--kernel", "python3", notebook.name, f"{done}/{notebook.name}", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/, to be read without a network; whatever is warned of is an error."""
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    said = session.run("zensical", "build", "--strict", "--clean", silent=True) or ""
    warned = [line for line in said.splitlines() if line.startswith(("griffe:", "mkdocstrings:", "Warning"))]
    if warned:  # those of the code's documentation are no errors to it
        session.error("\n".join(warned))
    session.run("python", ".ci/check_site.py", "site")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types of the packages, strictly."""
    install(session, "types")
    session.run("mypy")
