"""paged-dist-compare as a command: its exit codes, and that it starts without jax."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

from compared_rows import as_json_lines, decode_rows, printed_line

from paged_dist.launch import compare

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


def test_nothing_of_it_imports_jax_unless_it_writes(tmp_path):
    """The file is loaded by itself: its package imports jax before it, whatever it does."""
    (tmp_path / "a.jsonl").write_text(as_json_lines(decode_rows([1000] * 4)))
    source = pathlib.Path(compare.__file__).resolve()
    script = f"""
import runpy, sys
main = runpy.run_path({os.fspath(source)!r}, run_name="alone")["main"]
assert main(["a.jsonl", "a.jsonl"]) == 0
print(sorted({{"jax", "jaxlib", "absl", "paged_dist"}} & set(sys.modules)))
assert main(["a.jsonl", "a.jsonl", "--output=out.jsonl"]) == 0
print(sorted({{"jax", "paged_dist"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line[0:1] == "["] == ["[]", "['jax', 'paged_dist']"]
