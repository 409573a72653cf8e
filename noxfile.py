"""Build, test and measure: ``nox -l`` lists the sessions, ``nox -s NAME -- ARGS`` passes arguments on."""

from __future__ import annotations

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
    """Build into dist/ an sdist and from it the pure wheel and the manylinux wheel, and check them; --pure: no kernels.

    The kernels take minutes; TOME_CUDA_ARCHS=90a-real builds them for one architecture.
    """
    shutil.rmtree("dist", ignore_errors=True)
    session.install(*nox.project.dependency_groups(PROJECT, "build"))
    session.run("uv", "build", "--sdist", "--out-dir", "dist")
    (sdist,) = Path("dist").glob("*.tar.gz")
    session.run("uv", "build", "--wheel", str(sdist), "--out-dir", "dist", env={"TOME_BUILD_CUDA": None})
    if "--pure" not in session.posargs:
        raw = Path(session.create_tmp(), "linux")
        shutil.rmtree(raw, ignore_errors=True)
        session.run("uv", "build", "--wheel", str(sdist), "--out-dir", str(raw), env={"TOME_BUILD_CUDA": "1"})
        (linux,) = raw.glob("*-py3-none-linux_*.whl")
        # The oldest manylinux that the library's symbols allow. PyTorch's libraries are those of the user's PyTorch.
        session.run("auditwheel", "repair", "--exclude", "libtorch*.so", "--wheel-dir", "dist", str(linux))
    wheels = sorted(Path("dist").glob("*.whl"))
    session.run("twine", "check", "--strict", str(sdist), *map(str, wheels))
    session.run("check-wheel-contents", *map(str, wheels))
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        if ("manylinux" in wheel.name) != any(name.endswith(".so") for name in names):
            session.error(f"{wheel.name} and {len(names)} files in it: with a library or without?")
    if "--pure" not in session.posargs:
        (wheel,) = (wheel for wheel in wheels if "manylinux" in wheel.name)
        session.install(str(wheel), *nox.project.dependency_groups(PROJECT, "cuda-wheel"))
        session.install("--force-reinstall", "--no-deps", str(wheel))  # the environment may hold an earlier build
        # Without a library that loads, its tests would skip.
        session.run("python", "-c", "import tome_cuda; assert tome_cuda.build_info(), tome_cuda.unavailable()")
        session.run("pytest", "tests/test_cuda_library.py", "tests/test_cuda_ops.py")
    for made in sorted(Path("dist").glob("token_merging*")):
        session.log(f"{made}: {made.stat().st_size / 1e6:.1f} MB")


@nox.session(python=nox.project.python_versions(PROJECT))
def smoke(session: nox.Session) -> None:
    """Install each wheel of dist/ on every Python that the project claims, and use it a little."""
    wheels = sorted(Path("dist").absolute().glob("*.whl"))
    if not wheels:
        session.error("dist/ is empty: nox -s build comes first")
    program = Path("tests", "smoke.py").absolute()
    with session.chdir(session.create_tmp()):  # away from the checkout
        for wheel in wheels:
            session.install(str(wheel))
            session.install("--force-reinstall", "--no-deps", str(wheel))
            session.run("python", "-I", str(program), wheel.name)


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
    done = Path(session.create_tmp()).resolve()
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
    """Check style and format, and the workflows of .github."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    workflows = sorted(map(str, Path(".github", "workflows").glob("*.yml")))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--quiet", "--min-severity", "medium", *workflows)


@nox.session
def types(session: nox.Session) -> None:
    """Check types of the packages, strictly."""
    install(session, "types")
    session.run("mypy")
