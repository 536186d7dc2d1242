"""The package as a user gets it: what wheel and sdist hold, what an installed one does, what its names say."""

import ast
import email
import importlib.util
import inspect
import io
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import numpy
import pytest
from commands import run_command
from repository import TREE

import paged_dist
import paged_dist.kernels
import paged_dist.launch

PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
LIMIT = 120  # seconds, for one command
SOURCES = {"paged_dist": "paged_dist", "kernels": "paged_dist/kernels", "launch": "paged_dist/launch"}


def run_checked(command, cwd, **more):
    """The finished process; fails the test with its output where the exit code is not 0."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT, **more
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def contents(wheel):
    """Name -> bytes of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()}


def build(source, out, *what):
    """Builds as a release does, but with the setuptools that is installed: no network. (In ./run, pip gets its own.)"""
    run_checked([sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", out, source], cwd=source)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist, wheel built from it), made from a copy: setuptools would leave its folders in the tree."""
    source = tmp_path_factory.mktemp("source") / "tree"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "__pycache__", "build", "dist", "*.egg-info", "*.jsonl", "runs"
    )
    shutil.copytree(TREE, source, ignore=left_out)
    build(source, source / "out")
    (sdist,), (wheel,) = (source / "out").glob("*.tar.gz"), (source / "out").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The bin folder of an environment with the wheel in it. Its dependencies are the running environment's, whose
    own paged_dist, installed editable from the tree, is not reachable there: its .pth file is not read."""
    home = tmp_path_factory.mktemp("clean") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run_checked([*pip, distributions[1]], cwd=home)
    site = run_checked(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=home
    ).stdout.strip()
    dependencies = pathlib.Path(numpy.__file__).parent.parent
    (pathlib.Path(site) / "dependencies.pth").write_text(f"{dependencies}\n")
    return home / "bin"


def test_wheel_holds_the_one_package_and_all_of_it(distributions):
    names = set(contents(distributions[1]))
    metadata = {n for n in names if n.startswith(f"paged_dist-{PROJECT['version']}.dist-info/")}
    platforms = {f"paged_dist/launch/platforms/{file.name}" for file in (TREE / "launch" / "platforms").iterdir()}
    expected = (
        platforms
        | {"paged_dist/py.typed"}
        | {
            f"{package}/{file.relative_to(TREE / folder).as_posix()}"
            for folder, package in SOURCES.items()
            for file in (TREE / folder).rglob("*.py")
        }
    )
    assert names - metadata == expected
    assert any(n.endswith("/licenses/LICENSE") for n in metadata)


def test_nothing_is_unpickled_or_evaluated_or_passed_to_a_shell():
    """What comes over a network, from a restored folder or in a flag is data."""
    forbidden = {"eval", "exec", "pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "system"}
    seen = []
    for folder in SOURCES:
        for file in (TREE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = {
                    alias.name.split(".")[0] for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)
                }
                if isinstance(node, ast.Call):
                    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    names.add(called)
                    options = {k.arg for k in node.keywords if getattr(k.value, "value", None) is not False}
                    names |= {"pickle"} if "allow_pickle" in options else set()
                    names |= {"system"} if "shell" in options else set()
                seen += [(file.name, name) for name in names & forbidden]
    assert seen == []


def test_nothing_at_the_wheels_top_level_can_collide(distributions):
    files = contents(distributions[1])
    top_level = next(files[n] for n in files if n.endswith(".dist-info/top_level.txt"))
    assert top_level.decode().split() == ["paged_dist"]
    assert {n.split("/")[0] for n in files} == {"paged_dist", f"paged_dist-{PROJECT['version']}.dist-info"}


def test_wheel_says_what_pyproject_says(distributions):
    files = contents(distributions[1])
    told = email.message_from_bytes(next(files[n] for n in files if n.endswith(".dist-info/METADATA")))
    assert told["Version"] == PROJECT["version"] == paged_dist.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Requires-Python"] == ">=3.11"
    needed = [re.split(r"[<>=!~\[; ]", r)[0] for r in told.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(needed) == ["absl-py", "jax", "jaxlib", "ml_dtypes", "numpy", "scipy"]


def test_sdist_holds_its_tests_and_builds_without_the_tree(distributions, tmp_path):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for folder in ("tests", "examples", "docs"):
        files = lambda tree, folder=folder: {
            p.relative_to(tree).as_posix() for p in (tree / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"
        }
        assert files(source) == files(TREE)
    for name in ("run", ".ci/run", "BUILD.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE"):
        assert (source / name).read_bytes() == (TREE / name).read_bytes()
    assert (source / "run").stat().st_mode & stat.S_IXUSR
    build(source, tmp_path / "out", "--wheel")
    (again,) = (tmp_path / "out").glob("*.whl")
    assert contents(again) == contents(wheel)


FROM_THE_WHEEL = """
import pathlib, sys
import paged_dist, paged_dist.kernels, paged_dist.launch
from paged_dist.kernels.seed import kernel
from paged_dist.kernels.cache_update import tiles
from paged_dist.launch import accuracy, compare, decode, local_pod, kernel_report, plan, scaling, xla_report
from paged_dist.launch.serving import engine
home = pathlib.Path(sys.prefix)
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "paged_dist":
        assert home in pathlib.Path(module.__file__).parents, (name, module.__file__)
assert list(map(pathlib.Path, paged_dist.__path__)) == [pathlib.Path(paged_dist.__file__).parent]
for name in ("kernels", "launch"):
    assert name not in sys.modules
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is importable at the top level")
from paged_dist._compat import backends_are_initialized
assert not backends_are_initialized(), "an import started a JAX back end"
import jax
jax.devices()
assert backends_are_initialized()
import importlib.metadata
print(importlib.metadata.version("paged-dist"), paged_dist.__version__)
"""


def test_installed_package_imports_whole_and_starts_no_back_end(installed, tmp_path):
    said = run_checked([installed / "python", "-c", FROM_THE_WHEEL], cwd=tmp_path).stdout.split()
    assert said == [PROJECT["version"]] * 2


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("paged-dist-local-pod", ["--help"], "--processes"),
        ("paged-dist-xla-report", ["--help"], "--table_tokens"),
        ("paged-dist-accuracy", ["--help"], "--context_lengths"),
        ("paged-dist-kernel-report", ["--help"], "--lengths_trace"),
        ("paged-dist-plan", ["--help"], "--topology"),
        ("paged-dist-scaling", ["--help"], "--runs"),
        ("paged-dist-compare", ["--help"], "--metrics"),
        ("paged-dist-decode", ["--num_requests=2", "--max_context=9", "--max_generated=2", "--layers=1"], "checksum"),
    ],
)
def test_console_script_of_the_installed_package_runs(installed, tmp_path, script, arguments, says):
    assert says in run_checked([installed / script, *arguments], cwd=tmp_path).stdout


def test_decode_console_script_names_its_flags(installed, tmp_path):
    text = run_checked([installed / "paged-dist-decode", "--help"], cwd=tmp_path).stdout
    assert "Continuous decoding" in text and "--trace:" in text and "--kv_dtype:" in text


def archived(to: pathlib.Path) -> None:
    """What `git archive` gives: symbolic links as they are."""
    files = subprocess.run(["git", "archive", "HEAD"], cwd=TREE, capture_output=True, check=True, timeout=60).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(to, filter="data")


def copied(to: pathlib.Path) -> None:
    """What a copy gives that knows no symbolic links: the files behind them, twice."""
    parts = ("paged_dist", "kernels", "launch")
    for part in parts:
        shutil.copytree(TREE / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize("made", [archived, copied])
def test_a_program_runs_from_the_root_of_an_archive_or_a_copy_of_the_tree(tmp_path, made):
    """`python -m` from the root takes that tree, whatever is installed."""
    if made is archived and not (TREE / ".git").exists():
        pytest.skip("this tree is no git checkout")
    made(tmp_path)
    told = "import paged_dist.launch.local_pod as m, paged_dist.kernels.decode as k; print(m.__file__, k.__file__)"
    code, out, err = run_command([sys.executable, "-c", told], cwd=tmp_path)
    assert code == 0 and [path.startswith(str(tmp_path)) for path in out.split()] == [True, True], (out, err)
    code, out, err = run_command([sys.executable, "-m", "paged_dist.launch.local_pod", "--help"], cwd=tmp_path)
    assert code == 0 and "--processes" in out, err


def test_every_console_script_is_a_launcher():
    for name, target in PROJECT["scripts"].items():
        module, function = target.split(":")
        assert name == "paged-dist-" + module.removeprefix("paged_dist.launch.").replace("_", "-")
        spec = importlib.util.find_spec(module)
        assert re.search(rf"^def {function}\(", pathlib.Path(spec.origin).read_text(), re.MULTILINE)


# What the docstrings of public names hold.

PUBLIC = [(m.__name__, n, getattr(m, n)) for m in (paged_dist, paged_dist.kernels) for n in m.__all__]
CALLABLE = [pytest.param(thing, id=f"{module}.{name}") for module, name, thing in PUBLIC if callable(thing)]
METHODS = [
    pytest.param(member, id=f"{thing.__name__}.{name}")
    for _, _, thing in PUBLIC
    if inspect.isclass(thing)
    for name, member in vars(thing).items()
    if not name.startswith("_") and (callable(getattr(thing, name)) or isinstance(member, property))
]
ARRAYS = {
    "query", "key", "value", "key_cache", "value_cache", "key_pages", "value_pages", "lengths", "context_lens",
    "block_tables", "positions", "starts", "ends", "rows", "sinks",
}  # fmt: skip
SHAPE = r"\[[A-Z0-9][^\]]*\]"
DTYPES = r"\b(u?int\d+|bf16|f32|float\d+|dtypes?)\b"
# Bodies that a launcher's pallas_call runs: nothing calls them with values to refuse.
KERNEL_BODIES = {"paged_flash_attention_kernel", "paged_flash_attention_kernel_inline_seq_dim"}


def own_doc(thing):
    """The docstring, without one inherited and without the one that dataclasses write."""
    doc = inspect.cleandoc(thing.__doc__ or "")
    return "" if inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(") else doc


def test_all_names_exist_once_and_sorted():
    for module in (paged_dist, paged_dist.kernels):
        # As ruff sorts: CONSTANTS, Classes, functions.
        order = lambda name: (not name.isupper(), not name[0].isupper(), name)
        assert list(module.__all__) == sorted(set(module.__all__), key=order)
        assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("thing", [*CALLABLE, *METHODS])
def test_public_docstring_starts_with_a_sentence(thing):
    first = own_doc(thing).split("\n\n")[0]
    assert len(first.split()) >= 3 and first[-1] in ".:", first


@pytest.mark.parametrize("thing", [p for p in CALLABLE if not inspect.isclass(p.values[0])])
def test_public_function_documents_arguments_shapes_dtypes_and_errors(thing):
    doc, parameters = own_doc(thing), set(inspect.signature(thing).parameters)
    if len(parameters) == 1:
        return  # its first line says it all
    # The _local forms and the second kernel body say what differs from the form that they name.
    like = re.search(r"`(\w+)`(?: inside a caller's| with the blocks in a loop)", doc)
    if like is None:
        undocumented = parameters - set(re.findall(r"\w+", doc))
        if thing.__name__ in KERNEL_BODIES:
            undocumented -= set(inspect.signature(paged_dist.kernels.page_attention).parameters)
        assert not undocumented
    if parameters & ARRAYS:
        assert len(re.findall(SHAPE, doc)) >= (1 if like else 3), "shapes of the arrays"
        assert like or re.search(DTYPES, doc), "their dtypes"
    if thing.__name__ not in KERNEL_BODIES:
        assert re.search(r"^Raises:\n  \w*Error", doc, re.MULTILINE)


# ./run, as far as it goes without setting anything up.


def fake_python(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def run_script(*arguments, **environment):
    done = subprocess.run(
        [TREE / "run", *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT, cwd="/"
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "it does not run"),
        ("exit 127", "it does not run"),  # a version manager's shim with nothing behind it
        ('case "$*" in *print*) echo 3.10 ;; *) exit 1 ;; esac', "it is Python 3.10"),
        ('case "$*" in *print*) echo 3.12 ;; *ensurepip*) exit 1 ;; esac', "it has no venv or pip"),
    ],
)
def test_run_refuses_a_python_that_will_not_do(tmp_path, body, reason):
    python = str(tmp_path / "python") if body is None else fake_python(tmp_path, "python", body)
    code, out, err = run_script("decode", PYTHON=python)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and f"PYTHON={python}: {reason}" in err and "3.11 or newer" in err


def test_run_names_its_commands_where_there_is_no_such_one():
    code, out, err = run_script("deocde")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "deocde" in err and err.split(":")[-1].split() == [
        "test",
        "lint",
        "test_device",
        "accuracy",
        "compare",
        "decode",
        "kernel_report",
        "local_pod",
        "plan",
        "scaling",
        "xla_report",
    ]
    assert run_script()[0] == 2


@pytest.mark.parametrize(("present", "required", "skips"), [(1, "", 0), (0, "", 1), (0, "1", 0), (1, "1", 0)])
def test_missing_tpu_compiler_skips_unless_it_is_required(monkeypatch, present, required, skips):
    monkeypatch.setattr("paged_dist.mesh.topology.has_libtpu", lambda: bool(present))
    monkeypatch.setenv("PAGED_DIST_REQUIRE_LIBTPU", required)
    spec = importlib.util.spec_from_file_location("aot_again", TREE / "tests" / "support" / "aot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.needs_libtpu.args == (bool(skips),)
