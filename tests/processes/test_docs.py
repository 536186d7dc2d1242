"""The documentation holds: its code runs as printed, its commands are taken, its links lead somewhere.

A block of Python is run. A command is run, or dry-run, or parsed by the program's own flags. What is neither stands
below with the reason why not.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import pathlib
import re
import subprocess
import tomllib

import doc_pages
import flagsaver
import jax.numpy as jnp
import numpy as np
import pytest
from aot import needs_libtpu
from doc_pages import TREE, blocks
from jax.sharding import AbstractMesh

import paged_dist as pd
from paged_dist.kernels import ref_paged_attention
from paged_dist.launch.common import flag_registry as flags

PAGE_NAMES = [doc_pages.name_of(page) for page in doc_pages.PAGES]
PYTHON = [page for page in PAGE_NAMES if blocks(page, "python")]
PROGRAMS = [f.stem for f in (TREE / "paged_dist/launch").glob("*.py") if '__name__ == "__main__"' in f.read_text()]
EXTRAS = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# Blocks that are no Python, command or output, and first words of commands that nobody runs here.
OTHER_BLOCKS = {("docs/platforms.md", "dockerfile"): "no Docker here; test_package installs the wheel"}
NOT_RUN = {
    "gcloud": "needs a TPU VM; test_platforms plays it",
    "kubectl": "needs a cluster; test_platforms reads the JobSet",
    "sacct": "needs Slurm",
    "scancel": "needs Slurm",
    "sbatch": "needs Slurm; test_platforms plays srun. The launcher's flags are checked",
    "mpirun": "needs Open MPI. The launcher's flags are checked",
    "pip": "test_package installs the package; extras are checked",
    "pytest": "this is it; paths and options are checked",
}
OTHERS_FLAGS = {
    "--rehearse": "of tests/device",
    "--signal": "of scancel",
    "--xla_jf_dump_to": "of libtpu",
    "--xla_jf_dump_llo_text": "of libtpu",
}


def at(path: str) -> pathlib.Path:
    """A path as the pages name it; in an sdist kernels/ and launch/ are inside paged_dist/ alone."""
    inside = TREE / "paged_dist" / path
    return inside if path.startswith(("kernels", "launch")) and not (TREE / path).exists() else TREE / path


# Python


def run_page(page: str) -> dict:
    """The names that a page's Python leaves, run in the order of the page."""
    names: dict = {"__name__": "page"}
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(TREE / page), "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, names)
    return names


def check_readme(names):
    """The layer of the README gives what attention over its rows' tokens is."""
    spec, cache, pages, step = (names[n] for n in ("spec", "cache", "pages", "decode_step"))
    assert dict(names["mesh"].shape) == {"data": 2, "context": 1, "model": 4}

    rng = np.random.default_rng(0)
    width, q_heads = 64, 16
    sizes = dict(wq=(width, q_heads * 128), wk=(width, 8 * 128), wv=(width, 8 * 128), wo=(q_heads * 128, width))
    params = {k: jnp.asarray(rng.standard_normal(v) / 8, jnp.float32) for k, v in sizes.items()}
    rows = [0, 3, 15]
    for row in rows:
        pages.allocate(row, 0)
    seen = []
    for _ in range(3):
        positions = jnp.asarray(pages.grow_all(rows))
        x = jnp.asarray(rng.standard_normal((16, width)), jnp.float32)
        seen.append(x)
        tables = jnp.asarray(pages.block_tables)
        out, cache = step(params, x, cache, positions, jnp.asarray(pages.lengths), tables, jnp.int32(1))

    np.testing.assert_array_equal(np.delete(np.asarray(out - x), rows, axis=0), 0)  # idle rows: nothing is added
    heads = lambda name: np.stack([(t @ params[name]).reshape(16, -1, 128) for t in [*seen, *seen, *seen][:8]], axis=2)
    key, value = (heads(n).astype(jnp.bfloat16).swapaxes(0, 1) for n in ("wk", "wv"))  # [H, B, T, D], a page a row
    query = np.asarray(seen[-1] @ params["wq"]).reshape(16, q_heads, 128)
    threes, tables = np.full(16, 3, np.int32), np.arange(16, dtype=np.int32)[:, None]
    attended = ref_paged_attention(query * spec.head_dim**-0.5, key, value, threes, tables)
    expected = np.asarray(attended, np.float64).reshape(16, -1) @ np.asarray(params["wo"], np.float64)
    np.testing.assert_allclose(np.asarray(out - x)[rows], expected[rows], rtol=2e-3, atol=2e-3)


def held(cache, pages, row, tokens):
    """(keys, values) [tokens, Hkv, D] of the first tokens of a row, as its pages hold them."""
    t = np.arange(tokens)
    ids, size = pages.block_tables[row, t // cache.spec.page_size], cache.spec.page_size
    return [np.asarray(pool, np.float32)[:, ids, t % size].swapaxes(0, 1) for pool in cache.to_pages()]


def rounded(x):
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float32)


def check_sharing(names):
    """Both forks hold the prompt and their own token, and the new prompt begins with the first one's full pages."""
    cache, pages = names["cache"], names["pages"]
    assert pages.lengths.tolist()[:3] == [151, 151, 150]
    for row in (0, 1):
        prompts, own = (names["prompt_key"], names["prompt_value"]), (names["key"], names["value"])
        for got, prompt, new in zip(held(cache, pages, row, 151), prompts, own, strict=True):
            np.testing.assert_array_equal(got, rounded(np.concatenate([prompt[0], new[row][None]])))
    assert names["num_cached"] == 128 and names["new_prompt"] == 2
    np.testing.assert_array_equal(pages.block_tables[2, :2], pages.block_tables[0, :2])


def check_moving(names):
    """The row is what it was, in a pool of another size, on another mesh, from the disk."""
    cache, pages = names["cache"], names["pages"]
    assert cache.spec.num_pages == 64 and dict(cache.mesh.shape) == dict(data=1, context=4, model=2)
    for got, prompt in zip(held(cache, pages, 0, 70), (names["key"], names["value"]), strict=True):
        np.testing.assert_array_equal(got, rounded(prompt[0]))


def function(code: str, name: str) -> str:
    """The function of that name in `code`, its comments and docstring left out."""
    (found,) = (x for x in ast.walk(ast.parse(code)) if isinstance(x, ast.FunctionDef) and x.name == name)
    return ast.unparse([x for x in found.body if not isinstance(x, ast.Expr)]) + ast.unparse(found.args)


def check_pod_models(names):
    """Its layer is that of the example, which test_layers.py runs, and its loop attends to what it wrote."""
    page = "\n".join(block.text for block in blocks("docs/pod_models.md", "python"))
    example = (TREE / "examples" / "plain_jax_layer.py").read_text()
    for name in ("decoder_layer", "put_rows"):
        assert function(page, name) == function(example, name)
    assert names["lengths"].tolist() == [0, 0, 0, 0] and np.all(np.isfinite(np.asarray(names["out"], np.float32)))


CHECKS = {
    "README.md": check_readme,
    "docs/sharing_and_prefixes.md": check_sharing,
    "docs/moving_and_saving.md": check_moving,
    "docs/pod_models.md": check_pod_models,
}


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[needs_libtpu] if "topology=" in str(blocks(p, "python")) else []) for p in PYTHON]
)
def test_the_python_of_a_page_runs_in_its_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # which remembers the folder of before
    names = run_page(page)
    if page in CHECKS:
        CHECKS[page](names)


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_block_is_python_a_command_or_output(page):
    for block in blocks(page):
        known = block.language in ("python", "sh", "text") or (page, block.language) in OTHER_BLOCKS
        assert known, f"{block}: ```{block.language}: write python, sh (commands) or text (output)"
        if block.language == "text":
            looks_run = re.findall(r"^(?:\$ |\./run|pip |python -|paged-dist-|import ).*", block.text, flags=re.M)
            assert not looks_run, f"{block}: what runs stands in a block of its own: {looks_run}"


# Commands

COMMANDS = {" ".join(words): (where, words) for page in PAGE_NAMES for where, words in doc_pages.commands(page)}


def check_program(name: str, arguments: list[str], folder: pathlib.Path) -> None:
    """That the program takes these arguments: a dry run where it has one, else each flag is one of its own."""
    module = importlib.import_module(f"paged_dist.launch.{name}")
    if name == "local_pod":
        assert module.main(["--dry_run", *arguments]) == 0
        arguments = arguments[arguments.index("--") + 1 :] if "--" in arguments else arguments
        check_program(*(next((a, arguments[i + 1 :]) for i, a in enumerate(arguments) if a[0] != "-")), folder)
        return
    if name == "compare":
        for file in arguments:
            (folder / file).write_text("{}\n")
        assert module.main(arguments) == 1  # nothing comparable, but the command line was taken
        return
    own = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)}
    given = {re.match(r"--(?:no(?=jax\b))?(\w+)", argument)[1] for argument in arguments if argument.startswith("--")}
    assert given <= own | {"help"}, f"{name} has no {given - own}"
    with flagsaver.flagsaver():
        dry = ["--dry_run"] if name in ("decode", "scaling") else []
        rest = flags.FLAGS([name, *dry, *(a for a in arguments if a != "--help")])
        assert rest == [name]
        if dry:
            assert module.main([]) == 0


def check_tests(arguments: list[str]) -> None:
    """That arguments of pytest name options that are used here and paths that are there."""
    options = {"-m": ("slow", "not slow"), "-k": None, "-n": None}
    arguments = iter(arguments)
    for word in arguments:
        if word == "--rehearse":  # of tests/device, see test_device_tests.py
            continue
        if word.startswith("-"):
            value = next(arguments)
            assert options[word] is None or value in options[word], (word, value)
        else:
            assert at(word).exists(), word


def check_command(words: list[str], folder: pathlib.Path) -> None:
    """Runs, dry-runs or parses a command, or finds it among those that nobody runs here."""
    first, *rest = words
    if first == "./run" and rest[0] in ("lint", "test", "test_device"):
        check_tests(rest[1:])
    elif first == "./run":
        assert rest[0] in PROGRAMS, f"{rest[0]} is no program"
        check_program(rest[0], rest[1:], folder)
    elif first.startswith("paged-dist-"):
        check_program(first.removeprefix("paged-dist-").replace("-", "_"), rest, folder)
    elif words[:2] == ["python", "-m"] and rest[1].startswith("paged_dist.launch."):
        check_program(rest[1].removeprefix("paged_dist.launch."), rest[2:], folder)
    elif words[:2] == ["python", "-c"]:
        exec(rest[1], {})
    elif first == "python" and rest[0].startswith("examples/"):
        assert (TREE / rest[0]).exists()  # test_layers.py runs the examples
    elif first == "launch/platforms/tpu_vm.sh":
        done = subprocess.run([at(first), "--dry_run", *rest], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 and done.stdout.startswith("gcloud "), done.stderr
        check_program("decode", rest[rest.index("--") + 1 :], folder)
    else:
        assert first in NOT_RUN, f"{words} is not run: check it here, or say in NOT_RUN why not"
        if first == "pytest":
            check_tests(rest)
        for word in rest if first == "pip" else ():
            assert set(re.findall(r"[\w-]+", *re.findall(r"^\.\[(.*)\]$", word) or [""])) <= set(EXTRAS), word
        for word in rest if first in ("sbatch", "kubectl") else ():
            assert not word.startswith("launch/") or at(word).exists(), word
        after = {"sbatch": "launch/platforms/slurm.sbatch", "mpirun": "paged-dist-decode"}
        if first in after:
            check_program("decode", rest[rest.index(after[first]) + 1 :], folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_taken(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"2023-11-16 18:00:00.{i:07},{100 + i},{20 + i % 7}" for i in range(256)]
    trace = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n"
    (tmp_path / "AzureLLMInferenceTrace_conv.csv").write_text(trace)  # stands for the file that a page names
    where, words = COMMANDS[command]
    try:
        check_command(words, tmp_path)
    except BaseException as error:
        error.add_note(f"in {where}: {command}\n{capsys.readouterr().err}")
        raise


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_a_flag_in_the_prose_is_one_of_a_program(page):
    for name in PROGRAMS:
        importlib.import_module(f"paged_dist.launch.{name}")
    known = set(flags.FLAGS) | {"processes", "devices", "grace_seconds", "metrics", "help"}
    for code in doc_pages.inline_code(page):
        for flag in re.findall(r"(?:^| )--(\w+)", code):
            assert flag in known or flag.removeprefix("no") in known or f"--{flag}" in OTHERS_FLAGS, f"{page}: --{flag}"


# Output that is printed in a page is what is printed today. That of whole runs stands as it was on the day it was run.


@needs_libtpu
def test_the_described_mesh_is_what_is_printed():
    (printed,) = (b.text for b in blocks("docs/pod_models.md", "text") if b.text.startswith("mesh: "))
    mesh = pd.make_pod_mesh(num_kv_heads=8, model_parallelism=32, topology="v5p:4x4x8", num_slices=2)
    spec = pd.CacheSpec(8, 128, 8192, num_layers=32)
    text = pd.describe_mesh(mesh, spec, num_q_heads=64, batch=128, output_heads="scattered")
    assert printed.split() == text.split()  # in the page one line is broken in two


@needs_libtpu
def test_the_plan_is_what_is_printed(capsys):
    """But for what is another number with each version: times, sizes of programs, what the compiler gives kernels."""
    plan = importlib.import_module("paged_dist.launch.plan")
    (command,) = blocks("docs/plan.md", "sh")
    (printed,) = blocks("docs/plan.md", "text")
    with flagsaver.flagsaver():
        flags.FLAGS(doc_pages.words_of(command.text)[1:])
        assert plan.main([]) == 0
    text = capsys.readouterr().out

    def kept(lines):
        text = re.sub(r"^(versions|compile) .*\n( .*\n)*", "", lines + "\n", flags=re.M)
        return re.sub(r"[\d.]+ (KiB of|kB, program|MB\n)", r"\1", text).split()

    assert kept(text.rstrip()) == kept(printed.text.rstrip())


# Links, paths, pictures


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_links_lead_somewhere(page):
    for link in doc_pages.links(page):
        if link.startswith("https://"):
            continue  # no network in tests
        path, _, anchor = link.partition("#")
        target = ((TREE / page).parent / path).resolve() if path else TREE / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in doc_pages.anchors(doc_pages.name_of(target)), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_headings_are_distinct_and_paths_are_there(page):
    anchors = doc_pages.anchors(page)
    if page != "CHANGELOG.md":
        assert len(set(anchors)) == len(anchors)
    for code in doc_pages.inline_code(page):
        if re.fullmatch(r"(paged_dist|kernels|launch|tests|docs|examples|benchmarks)/[\w./]*", code):
            assert at(code).exists(), f"{page}: {code}"


def test_every_page_is_linked_from_the_readme_which_is_short():
    linked = {link.partition("#")[0] for link in doc_pages.links("README.md")}
    assert set(PAGE_NAMES) - {"README.md"} <= linked
    assert len((TREE / "README.md").read_text().splitlines()) <= 200


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, TREE / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_sharding_is_drawn_by_its_script_from_what_the_allocator_gives():
    draw = script("draw_sharding")
    assert (TREE / "docs" / "sharding.svg").read_text() == draw.svg(), "run: python docs/draw_sharding.py"

    mesh = AbstractMesh((draw.DATA, draw.CONTEXT, draw.MODEL), ("data", "context", "model"))
    spec, rows = pd.CacheSpec(draw.NUM_KV_HEADS, 128, draw.NUM_PAGES), len(draw.BLOCK_TABLES)
    pages = pd.PageAllocator(spec, mesh, num_sequences=rows, pages_per_sequence=max(map(len, draw.BLOCK_TABLES)))
    for row, table in enumerate(draw.BLOCK_TABLES):
        pages.allocate(row, len(table) * spec.page_size)
        assert tuple(pages.block_tables[row, : len(table)]) == table
    shown = [
        page
        for row in range(rows)
        for context in range(draw.CONTEXT)
        for _, page in draw.pages_of(row, pages.shard_of(row), context)
    ]
    assert sorted(shown) == sorted(itertools.chain(*draw.BLOCK_TABLES))


# The map of the tree


def test_the_map_of_the_tree_has_each_file_once():
    structure = script("list_structure")
    assert structure.problems() == [], "run: python docs/list_structure.py"


def test_this_file_has_a_reason_for_what_it_leaves_out():
    used = {words[0] for _, words in COMMANDS.values()}
    assert set(NOT_RUN) <= used, "no page has these any more"
    assert {language for _, language in OTHER_BLOCKS} <= {b.language for page in PAGE_NAMES for b in blocks(page)}
    assert all(len(reason) > 5 for reason in [*NOT_RUN.values(), *OTHER_BLOCKS.values(), *OTHERS_FLAGS.values()])
