"""What packages say of themselves, and the command that builds the kernels."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import tome
from tome_cuda import remedy

ROOT = Path(__file__).parents[1]


def test_the_changelog_has_this_version_with_its_date():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    dated = [version for version in versions if version[0] != "Unreleased"]
    assert dated[0][0] == tome.__version__
    assert all(date for _, date in dated)
    for version, _ in versions:
        assert re.search(rf"^\[{re.escape(version)}\]: https://", changelog, re.MULTILINE), version


def test_the_project_s_address_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    (repository,) = re.findall(r'^Repository = "https://github\.com/(.+)"', text, re.MULTILINE)
    named = re.findall(r"https://(?:raw\.githubusercontent|github)\.com/([^/\s\"]+/[^/\s\"]+)", text)
    assert set(named) == {repository}
    owner, name = repository.split("/")
    assert f'Documentation = "https://{owner}.github.io/{name}' in text


class Installed:
    """A distribution as pip or uv leaves it."""

    version = "9.8.7"

    def __init__(self, installer, url):
        self.files = {"INSTALLER": installer, "direct_url.json": url and json.dumps(url)}

    def read_text(self, name):
        return self.files[name]


INDEX = "--no-cache-dir --no-binary token-merging token-merging==9.8.7"


@pytest.mark.parametrize(
    ("installer", "url", "command"),
    [
        ("pip\n", None, f"pip install --force-reinstall --no-deps {INDEX}"),
        ("uv", None, f"uv pip install --force-reinstall --no-deps {INDEX.removeprefix('--no-cache-dir ')}"),
        (None, {"url": "file:///no/such/folder", "dir_info": {}}, f"pip install --force-reinstall --no-deps {INDEX}"),
        ("pip", {"url": "file://TMP/a%20b", "dir_info": {}}, "pip install --force-reinstall --no-deps 'TMP/a b'"),
        ("pip", {"url": "file://TMP/x.whl", "archive_info": {}}, f"pip install --force-reinstall --no-deps {INDEX}"),
        ("pip", {"url": "file://TMP/x.tar.gz"}, "pip install --force-reinstall --no-deps TMP/x.tar.gz"),
        ("pip", {"url": "https://a.b/x.whl#y"}, f"pip install --force-reinstall --no-deps {INDEX}"),
        (
            "pip",
            {"url": "https://a.b/c", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
            "pip install --force-reinstall --no-deps git+https://a.b/c@12ab",
        ),
    ],
)
def test_the_command_builds_what_was_installed(monkeypatch, tmp_path, installer, url, command):
    (tmp_path / "a b").mkdir()
    for name in ("x.whl", "x.tar.gz"):
        (tmp_path / name).touch()
    url = url and json.loads(json.dumps(url).replace("TMP", str(tmp_path)))
    monkeypatch.setattr(remedy, "__file__", "/site-packages/tome_cuda/remedy.py")
    monkeypatch.setattr(remedy.metadata, "distribution", lambda name: Installed(installer, url))
    told = remedy.build_command.__wrapped__()
    assert told == "TOME_BUILD_CUDA=1 " + command.replace("TMP", str(tmp_path))


def test_the_command_in_a_checkout_and_where_nothing_is_installed(monkeypatch):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(remedy.metadata, "distribution", distribution)
    monkeypatch.setattr(remedy, "__file__", str(ROOT / "cuda_ext" / "tome_cuda" / "remedy.py"))
    assert remedy.build_command.__wrapped__().endswith(f"--no-deps {ROOT}")
    monkeypatch.setattr(remedy, "__file__", "/site-packages/tome_cuda/remedy.py")
    assert remedy.build_command.__wrapped__().endswith("--no-cache-dir --no-binary token-merging token-merging")


def test_the_page_of_an_index_has_absolute_links(tmp_path):
    """The wheel is built as pip would, without a network."""
    pytest.importorskip("hatch_fancy_pypi_readme")
    pytest.importorskip("scikit_build_core")
    code = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"token_merging-{tome.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (each for each in opened.namelist() if each.endswith("METADATA"))
        page = opened.read(name).decode()
        assert not [each for each in opened.namelist() if each.endswith((".so", ".cu"))]
    assert f"\nVersion: {tome.__version__}\n" in page
    links = re.findall(r"\]\(([^)\s]+)", page.partition("\n\n")[2])
    assert links
    assert [link for link in links if not re.match(r"https://|#", link)] == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert all(picture.startswith("https://raw.githubusercontent.com/") for picture in pictures)
    assert f"/v{tome.__version__}/" in page


@pytest.mark.parametrize(
    ("tag", "address", "is_fine"),
    [
        (f"v{tome.__version__}", "https://github.com/token-merging/token-merging", True),
        ("v9.9.9", "https://github.com/token-merging/token-merging", False),
        (f"v{tome.__version__}", "https://github.com/somebody/token-merging", False),
    ],
)
def test_a_release_that_disagrees_with_itself_is_refused(tag, address, is_fine):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    (step,) = (step for step in workflow["jobs"]["agree"]["steps"] if "run" in step)
    env = {**os.environ, "TAG": tag, "ADDRESS": address}
    assert set(step["env"]) == {"TAG", "ADDRESS"}
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=ROOT, env=env, capture_output=True, check=False)
    assert (done.returncode == 0) is is_fine


def test_the_page_of_a_release_is_its_entry_of_the_changelog(tmp_path):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    (step,) = (step for step in workflow["jobs"]["page"]["steps"] if "run" in step)
    text = "## [Unreleased]\nnew\n## [1.2.0] - 2026-01-02\n\n### Added\n- this\n\n"
    text += "## [1.1.0] - 2025-01-01\nold\n\n[1.2.0]: x\n"
    (tmp_path / "CHANGELOG.md").write_text(text)
    script = step["run"].partition("gh release")[0]
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env={**os.environ, "TAG": "v1.2.0"}, check=True)
    assert (tmp_path / "notes.md").read_text() == "\n### Added\n- this\n\n"
