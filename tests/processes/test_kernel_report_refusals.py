"""kernel_report as a command: a bad flag ends it with one line."""

import pytest
from commands import run_launcher


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--chips=v9", "--chips='v9': must be some of v4, v5e, v5p, v6e, v7x"),
        ("--context=8", "--context=8: is no flag of this launcher; give --context_tokens"),
    ],
)
def test_a_bad_flag_ends_the_run_with_one_line(argument, message):
    assert run_launcher("kernel_report", argument) == (2, "", f"paged-dist-kernel-report: error: {message}\n")
