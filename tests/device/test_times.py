"""Times of every claim on the chip, from its own trace, beside their projections and the peers' kernels.

Prints a table a claim, which docs/performance.md can take over, and appends the rows to device_times.jsonl in pytest's
folder (`--basetemp` chooses it).
"""

import importlib
import json

import pytest
from report import PROJECTIONS, table


@pytest.mark.parametrize("claim", PROJECTIONS)
def test_times_beside_projections(rehearsed, claim, tmp_path_factory):
    import jax

    rows = list(importlib.import_module(claim).measure(rehearsed, 2 if rehearsed else 20))
    assert {row.kernel for row in rows} >= {"paged-dist"}
    if jax.process_index() == 0:
        print(f"\n{claim}: {PROJECTIONS[claim]['claim']}\n\n{table(rows)}")
        with (tmp_path_factory.getbasetemp() / "device_times.jsonl").open("a") as file:
            file.writelines(json.dumps(row.as_json()) + "\n" for row in rows)
    for row in rows:
        assert row.times.median > 0
        # Less time than HBM takes for the live bytes: the clock or the count of bytes is wrong.
        assert row.share is None or row.share < 1.05, row
        assert rehearsed or row.times.clock == "device trace"
