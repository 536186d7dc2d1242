"""paged-dist-compare as a command: its exit codes, and that it starts without jax."""

from __future__ import annotations

import json
import subprocess
import sys

from compared_rows import as_json_lines, decode_rows, printed_line
from repository import TREE

MODULE = [sys.executable, "-P", "-m", "paged_dist.launch.compare"]


LIMIT = 60  # seconds


def program(folder, *arguments):
    done = subprocess.run([*MODULE, *arguments], cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout, done.stderr


def test_exit_codes_of_the_program(tmp_path):
    contents = {
        "a": decode_rows([1000] * 4),
        "b": decode_rows([1200, 1201, 1202, 1203]),
        "other": decode_rows([1], requests=1),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.jsonl").write_text(as_json_lines(content))
    code, out, err = program(tmp_path, "a.jsonl", "b.jsonl", "--output=out.jsonl")
    assert (code, err) == (0, "") and "faster" in printed_line(out, "tokens_per_s")
    assert json.loads((tmp_path / "out.jsonl").read_text())["groups"][0]["metrics"][0]["verdict"] == "faster"
    code, out, err = program(tmp_path, "a.jsonl", "other.jsonl")
    assert (code, out) == (1, "") and "requests: 96 | 1" in err
    code, out, err = program(tmp_path, "a.jsonl", "none.jsonl")
    assert (code, out) == (2, "") and err == (
        "paged-dist-compare: error: none.jsonl: cannot be read: No such file or directory\n"
    )


def test_its_own_modules_import_neither_jax_nor_the_package_unless_it_writes(tmp_path):
    """As `launch.compare`, for the package `paged_dist` imports jax, whatever is imported from it."""
    (tmp_path / "few.jsonl").write_text(as_json_lines(decode_rows([1000] * 3)))
    (tmp_path / "a.jsonl").write_text(as_json_lines(decode_rows([1000] * 4)))
    script = f"""
import sys
sys.path.insert(0, {str(TREE)!r})
from launch.compare import main
loaded = lambda *names: print("loaded", [name for name in names if name in sys.modules])
assert main(["few.jsonl", "few.jsonl"]) == 0
loaded("jax", "jaxlib", "absl", "paged_dist", "scipy")
assert main(["a.jsonl", "a.jsonl"]) == 0
loaded("jax", "jaxlib", "absl", "paged_dist", "scipy")
assert main(["a.jsonl", "a.jsonl", "--output=out.jsonl"]) == 0
loaded("jax", "paged_dist")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert told == ["loaded []", "loaded ['scipy']", "loaded ['jax', 'paged_dist']"]
    tree = [sys.executable, "-m", "launch.compare", str(tmp_path / "few.jsonl"), str(tmp_path / "a.jsonl")]
    assert subprocess.run(tree, cwd=TREE, capture_output=True, timeout=LIMIT).returncode == 0
