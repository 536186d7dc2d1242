"""The flags that name the requests, shared by the programs that serve them or count how many fit."""

from __future__ import annotations

from paged_dist._errors import bad_value, require
from paged_dist.launch.common import flag_checks, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.serving.traces import FORMATS, read_trace
from paged_dist.launch.serving.workload import MOST_TOKENS, Request, draw_requests, repeated, shorten

TRACE = flags.DEFINE_string(
    "trace",
    None,
    "File of requests: Azure's or BurstGPT's CSV, Mooncake's JSON lines or ShareGPT's JSON, also gzipped. Default: "
    "requests whose lengths are drawn like those of a production conversation service.",
)
TRACE_FORMAT = flags.DEFINE_string(
    "trace_format", None, f"Format of --trace: {', '.join(FORMATS)}. Default: found out from its columns."
)
NUM_REQUESTS = flags.DEFINE_integer(
    "num_requests", None, "Requests to serve: the trace's first. Default: the whole trace, or 96 drawn ones."
)
LENGTH_SCALE = flags.DEFINE_float("length_scale", 1.0, "Factor on every request's lengths.")
MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "Cap on a request's prompt tokens.")
MAX_GENERATED = flags.DEFINE_integer("max_generated", None, "Cap on a request's generated tokens.")

REPEAT_REQUESTS = flags.DEFINE_integer("repeat_requests", 1, "Serve the requests so many times over.")

_DRAWN_REQUESTS = 96


def are_given() -> bool:
    """Whether any flag that names requests is on the command line."""
    return any(f.present for f in (TRACE, NUM_REQUESTS, LENGTH_SCALE, MAX_CONTEXT, MAX_GENERATED, REPEAT_REQUESTS))


def requests_from_flags() -> tuple[list[Request], str]:
    """The requests that the flags name, and what to call them in a report.

    Raises:
      ValueError: a flag outside its rule, or a trace that cannot be read.
    """
    flag_checks.at_least(
        1,
        num_requests=NUM_REQUESTS.value,
        max_context=MAX_CONTEXT.value,
        max_generated=MAX_GENERATED.value,
        repeat_requests=REPEAT_REQUESTS.value,
    )
    flag_checks.check_seed()
    for name, most in (
        ("pages_per_sequence", MOST_TOKENS // shared_flags.PAGE_SIZE.value),
        ("context_tokens", MOST_TOKENS),
    ):
        value = flags.FLAGS[name].value
        require(value is None or value <= most, f"--{name}", value, f"must be at most {most}: positions are 32-bit")
    require(
        TRACE.value is not None or TRACE_FORMAT.value is None, "--trace_format", TRACE_FORMAT.value, "needs --trace"
    )
    scale = LENGTH_SCALE.value
    flag_checks.above_zero(length_scale=scale)
    if TRACE.value is not None:
        trace = read_trace(TRACE.value, NUM_REQUESTS.value, TRACE_FORMAT.value)
        requests, name = trace.requests, trace.name
        if NUM_REQUESTS.value and len(requests) < NUM_REQUESTS.value:
            raise bad_value("--num_requests", NUM_REQUESTS.value, f"the trace has {len(requests)}")
    else:
        requests = draw_requests(NUM_REQUESTS.value or _DRAWN_REQUESTS, shared_flags.SEED.value)
        name = "the built-in workload"
    if scale != 1:
        name += f", lengths x {scale:g}"
    for what, most in (("prompts", MAX_CONTEXT.value), ("answers", MAX_GENERATED.value)):
        if most is not None:
            name += f", {what} of at most {most}"
    requests = shorten(requests, scale, MAX_CONTEXT.value, MAX_GENERATED.value)
    longest = max(requests, key=lambda r: r.tokens)
    require(
        longest.tokens <= MOST_TOKENS,
        "--trace" if TRACE.value is not None else "--length_scale",
        TRACE.value if TRACE.value is not None else scale,
        f"request {longest.id} has {longest.tokens} tokens, prompt and answer, a sequence has at most {MOST_TOKENS}",
        f"--max_context={MOST_TOKENS // 2} --max_generated={MOST_TOKENS // 2} work",
    )
    if REPEAT_REQUESTS.value > 1:
        name += f", {REPEAT_REQUESTS.value} times over"
    return repeated(requests, REPEAT_REQUESTS.value), name
