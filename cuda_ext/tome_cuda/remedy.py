"""The one command that builds the kernels for this environment, from where this copy of the project came."""

from __future__ import annotations

import functools
import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "token-merging"
FRESH = f"--no-cache-dir --no-binary {NAME}"  # pip's cache may hold a wheel that was built without kernels


@functools.cache
def build_command() -> str:
    """A line of shell; whoever installed from an index has no checkout, and needs none."""
    tool, source = "pip", ""
    if (checkout := Path(__file__).parents[2]).joinpath("cuda_ext", "CMakeLists.txt").exists():
        source = shlex.quote(str(checkout))
    try:
        installed = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        source = source or f"{FRESH} {NAME}"
    else:
        tool = "uv pip" if (installed.read_text("INSTALLER") or "").strip() == "uv" else "pip"
        fresh = FRESH if tool == "pip" else f"--no-binary {NAME}"
        source = source or _source(installed) or f"{fresh} {NAME}=={installed.version}"
    return f"TOME_BUILD_CUDA=1 {tool} install --force-reinstall --no-deps {source}"


def _source(installed: metadata.Distribution) -> str | None:
    """What was installed, if sources are still there: a folder, an archive or a repository (PEP 610)."""
    told = json.loads(installed.read_text("direct_url.json") or "{}")
    url = told.get("url", "")
    if url.startswith("file:"):
        path = Path(unquote(urlsplit(url).path))
        return shlex.quote(str(path)) if path.exists() and path.suffix != ".whl" else None
    if vcs := told.get("vcs_info"):
        return shlex.quote(f"{vcs['vcs']}+{url}@{vcs['commit_id']}")
    return shlex.quote(url) if url and not urlsplit(url).path.endswith(".whl") else None
