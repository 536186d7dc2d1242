"""Rows of decode runs for compare to read, and the lines that it prints."""

from __future__ import annotations

import json

DECODE_ROW = {
    "benchmark": "decode",
    "settings": {"layers": 2, "head_dim": 128, "dtype": "bfloat16", "soft_cap": None, "seed": 0},
    "mesh": {"data": 4, "context": 1, "model": 4},
    "devices": {"TPU v5e": 16},
    "processes": 4,
    "workload": "the built-in workload",
    "requests": 96,
    "pool_pages": 512,
    "tokens": 9000,
    "prefill_tokens": 70000,
    "versions": {"python": "3.11", "jax": "0.10.2", "jaxlib": "0.10.2"},
    "git_commit": "aaaa",
    "time": "2025-01-01T00:00:00",
    "checksum": "00112233aabbccdd",
    "step_ms_p25": 9.0,
    "step_ms_p50": 10.0,
    "step_ms_p75": 12.0,
    "step_ms_p99": 20.0,
    "tokens_per_s": 1000.0,
    "tokens_per_s_per_chip": 62.5,
    "prefill_s": 3.0,
    "compile_s": 7.0,
}


def decode_rows(values, **changes):
    """A run for each of `values`, its tokens/s."""
    return [DECODE_ROW | {"tokens_per_s": float(v)} | changes for v in values]


def as_json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def printed_line(out, start):
    """The one line that starts with the word `start`, its words a space apart."""
    (found,) = (" ".join(line.split()) for line in out.splitlines() if line.split()[:1] == [start])
    return found
