"""What is built and installed: real files under our own name only, beside supervisord in either order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # installs from a package index

ROOT = Path(__file__).parent.parent
OURS = "import streamline_pool.supervisor as ours; print(ours.__name__)"
THEIRS = "import supervisor, supervisor.options; print(supervisor.options.VERSION)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist (which is what `build` does by default)."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(checkout(tmp_path_factory.mktemp("source")))])
    return folder


def checkout(folder: Path) -> Path:
    """A copy of what git would give a stranger: committed and staged files, links as links."""
    run(["git", "-C", str(ROOT), "checkout-index", "--all", f"--prefix={folder}/"])
    return folder


def run(command: list[str], *, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def make_venv(folder: Path) -> Path:
    """The `bin` of a new environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def pip_install(bin_dir: Path, *what: str) -> None:
    done = subprocess.run(
        [bin_dir / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what], capture_output=True, text=True
    )
    # pip says this when the index cannot be reached, and also when a name is unknown, which the names here are not.
    if "No matching distribution found" in done.stderr or "Temporary failure in name resolution" in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def tracked(folder: str) -> set[str]:
    return set(run(["git", "-C", str(ROOT), "ls-files", folder]).splitlines())


def test_the_wheel_holds_real_files_under_our_name_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {name.split("/")[0] for name in names} == {"streamline_pool", "streamline_pool-0.1.0.dist-info"}
        assert {"streamline_pool/py.typed", "streamline_pool/embedded/watcher.py"} <= names
        assert {f"streamline_pool/{name}" for name in tracked("supervisor")} <= names
        assert archive.read("streamline_pool/supervisor/__init__.py") == (ROOT / "supervisor/__init__.py").read_bytes()
        assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_real_files_and_no_link(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert members["streamline_pool/supervisor/__init__.py"].isfile()
    assert {"pyproject.toml", "LICENSE", "streamline_pool/py.typed", "streamline_pool/embedded/watcher.py"} <= set(members)
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]


@pytest.mark.parametrize("order", [("supervisor", "ours"), ("ours", "supervisor")], ids=" then ".join)
def test_supervisord_and_we_work_side_by_side(order: tuple[str, str], built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    bin_dir = make_venv(tmp_path / "venv")
    for what in order:
        # supervisord imports pkg_resources, which came with setuptools until 82.
        pip_install(bin_dir, *(("supervisor", "setuptools<82") if what == "supervisor" else (str(wheel),)))
    version = run([str(bin_dir / "python"), "-c", THEIRS], cwd=tmp_path)
    assert run([str(bin_dir / "supervisord"), "--version"], cwd=tmp_path) == version
    assert run([str(bin_dir / "python"), "-c", OURS], cwd=tmp_path) == "streamline_pool.supervisor"
    assert run([str(bin_dir / "streamline-pool"), "--version"], cwd=tmp_path)
    pip_uninstall = [str(bin_dir / "python"), "-m", "pip", "uninstall", "--yes", "--quiet", "streamline-pool"]
    run(pip_uninstall, cwd=tmp_path)
    assert run([str(bin_dir / "supervisord"), "--version"], cwd=tmp_path) == version  # nothing of theirs went with us


def test_an_editable_install_sees_the_working_tree_under_our_name_only(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source")
    bin_dir = make_venv(tmp_path / "venv")
    pip_install(bin_dir, "-e", str(source))
    python = str(bin_dir / "python")
    where = run([python, "-c", "import streamline_pool.supervisor as ours; print(ours.__file__)"], cwd=tmp_path)
    assert Path(where).resolve() == source / "supervisor" / "__init__.py"
    missing = "import importlib.util; print(importlib.util.find_spec('supervisor'))"
    # The only way to the top-level name is the working tree as current folder; the installed package does not offer it.
    assert run([python, "-c", missing], cwd=tmp_path) == "None"


def test_the_installed_demo_runs_in_an_empty_folder_and_says_what_it_lacks(built: Path, tmp_path: Path) -> None:
    """Who has installed the package has no checkout, and `demo` is the first command to try."""
    (wheel,) = built.glob("*.whl")
    bin_dir = make_venv(tmp_path / "venv")
    (empty := tmp_path / "empty").mkdir()
    pip_install(bin_dir, str(wheel))
    demo = [str(bin_dir / "streamline-pool"), "demo"]
    assert "--limit" in run([*demo, "--help"], cwd=empty)
    if shutil.which("mongod") is None:
        lacking = subprocess.run(demo, cwd=empty, capture_output=True, text=True)
        assert lacking.returncode == 3
        assert "pip install 'streamline-pool[embedded]'" in lacking.stderr
    pip_install(bin_dir, f"{wheel}[embedded]")
    printed = run([*demo, "--limit", "300"], cwd=empty)
    assert re.search(r"killed worker \d+ with SIGKILL", printed)
    assert printed.endswith("equal")
    assert list(empty.iterdir()) == []


def test_what_the_readme_tells_a_stranger_to_type_works_as_typed(tmp_path: Path) -> None:
    """From the clone to the first run: the shell, the environment and the installation are real, only the address is this one's."""
    source = (ROOT / "README.md").read_text().partition("## See it work")[2].partition("## A first workflow")[0]
    blocks = [
        re.findall(r"^\$ (.+)$", block, re.MULTILINE) for block in re.findall(r"^```console\n(.*?)^```$", source, re.DOTALL | re.MULTILINE)
    ]
    (clone, change, make), (*install, pool), (start,) = blocks
    assert clone == "git clone <this repository's address> streamline-pool"
    checkout(tmp_path / "streamline-pool")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMLINE_", "PYTHON", "VIRTUAL_ENV"))}
    until_ready = "until grep --quiet ' ready ' pool.log; do kill -0 $pool; sleep 0.1; done"
    lines = [
        change,
        make.replace("make ", "make --dry-run "),
        *install,
        f"{pool} 2>pool.log & pool=$!",
        until_ready,
        start,
        "kill $pool",
        "wait $pool",
    ]
    script = "\n".join(line.replace("~/", f"{tmp_path}/") for line in lines)
    done = subprocess.run(["bash", "-euxc", script], cwd=tmp_path, env=environ, capture_output=True, text=True)
    if "No matching distribution found" in done.stderr or "Temporary failure in name resolution" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert '\noutput: {"greeting":"Hello, Ann!","characters":11}\n' in done.stdout


@pytest.mark.parametrize("platform", ["manylinux1_x86_64", "macosx_11_0_arm64", "macosx_10_13_x86_64"])
def test_the_extra_embedded_brings_a_mongod_that_is_found(platform: str, tmp_path: Path) -> None:
    """The wheels of other platforms are installed here, not run: their `mongod` must exist, where we look for it."""
    system, _, machine = platform.partition("_")
    markers = {"sys_platform": "darwin" if system == "macosx" else "linux", "platform_machine": machine.lstrip("0123456789_")}
    (wanted,) = embedded_requirements(markers)
    target = tmp_path / "site"
    foreign = ("--no-deps", "--only-binary=:all:", "--platform", platform, "--target", str(target))
    pip_install(make_venv(tmp_path / "venv"), *foreign, str(wanted).partition(";")[0])
    code = "from streamline_pool import embedded; print(embedded.find_mongod())"
    environ = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(target), *sys.path])}
    found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(target / "fiftyone" / "db" / "bin" / "mongod")


def embedded_requirements(markers: dict[str, str]) -> list[Requirement]:
    """What the extra `embedded` installs on a machine with these values of environment markers."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["embedded"]
    return [one for one in map(Requirement, listed) if one.marker is None or one.marker.evaluate(markers)]


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert [one for one in wanted if f"| `{one.split(';')[0]}` |" not in explained] == []


def test_every_extra_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    explained = re.findall(r"^## Extra `(\w+)`$", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(project["optional-dependencies"])


def test_the_base_dependencies_are_these_five() -> None:
    """A sixth is a decision (docs/decisions/), not an import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["pymongo>=4.13", "multiprocess", "psutil", "click", "orjson"]


def test_the_public_modules_are_attributes_of_the_package_and_errors_name_their_public_path() -> None:
    """`except streamline_pool.errors.WorkflowError` after `import streamline_pool` alone is in programs elsewhere."""
    code = "import streamline_pool as s; print(s.errors.WorkflowError.__module__, s.settings.Settings is s.Settings)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["streamline_pool.errors", "True"]
