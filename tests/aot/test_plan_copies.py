"""What a planned step copies besides its cache: found in the compiled text, printed, and counted in the floor."""

import flagsaver
import pytest
from aot import needs_libtpu

from paged_dist.launch import plan
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.planning import hlo_text, plan_text
from paged_dist.launch.planning.plan_record import plan_record

HLO = """
%fused (p.1: bf16[4,64,256]) -> bf16[4,64,256] {
  ROOT %inside = bf16[4,64,256]{2,1,0:T(16,128)(2,1)} copy(%p.1)
}

%handed_on (p.2: bf16[4,64,256]) -> bf16[4,64,256] {
  ROOT %copy.9 = bf16[4,64,256]{2,1,0:T(16,128)(2,1)} copy(%p.2)
}

%body (t: (s32[], bf16[4,64,256])) -> (s32[], bf16[4,64,256]) {
  %x = bf16[4,64,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %again = bf16[4,64,256]{2,1,0:T(8,128)(2,1)} copy(%x)
  %near = bf16[4,64,256]{2,1,0:T(8,128)(2,1)S(1)} copy(%x)
  %small = bf16[64,256]{1,0:T(8,128)(2,1)} copy(%x)
  ROOT %out = (s32[], bf16[4,64,256]) tuple(%i, %again)
}

%enough (t.2: (s32[], bf16[4,64,256])) -> pred[] {
  ROOT %lt = pred[] compare(%a.2, %b.2), direction=LT
}

ENTRY %main (w: bf16[4,64,256]) -> bf16[4,64,256] {
  %w = bf16[4,64,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %start = ((bf16[4,64,256]), bf16[4,64,256]{2,1,0:T(16,128)(2,1)}, u32[]) call-start(%w), to_apply=%handed_on
  %done = bf16[4,64,256]{2,1,0:T(16,128)(2,1)} call-done(%start)
  %fusion.1 = bf16[4,64,256]{2,1,0:T(16,128)(2,1)} fusion(%done), kind=kLoop, calls=%fused
  %while.1 = (s32[], bf16[4,64,256]) while(%t.3), condition=%enough, body=%body
  ROOT %out.2 = bf16[4,64,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""


def test_what_is_written_to_hbm_is_found_once_and_its_loops_counted():
    size = 2 * 4 * 64 * 256
    found = hlo_text.values_written_to_hbm(HLO, size)
    assert [(x.name, x.array, x.bytes, x.loops) for x in found] == [
        ("again", "bf16[4,64,256]", size, 1),  # not `near`, which is in vector memory
        ("done", "bf16[4,64,256]", size, 0),
        ("fusion.1", "bf16[4,64,256]", size, 0),
    ]


def planned(mlp_width, topology="tpu7x:2x2x1"):
    shape = ["--num_kv_heads=8", "--num_q_heads=16", "--layers=4", "--width=1024", "--num_pages=2048"]
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", f"--topology={topology}", *shape, f"--mlp_width={mlp_width}"])
        return plan_record(plan.plan_settings())


@needs_libtpu
def test_stacked_weights_are_not_copied_on_v7x():
    """As [layers, n, width] XLA stored them anew, in other tiles, in each step."""
    r = planned(8 * 256)
    assert r["other_copies"] == [] and r["floor"]["copied_bytes"] == 0 and "copies  " not in plan_text.plan_table(r)
    assert r["temp_bytes"] < r["cache_bytes"] // (2 * 4)  # a layer's pool


@needs_libtpu
def test_weights_that_are_copied_are_reported_and_counted():
    """A hidden width without whole rows of 128 on each device is stored as [layers, width, F], which XLA copies."""
    r = planned(8 * 192)
    copied = [c for c in r["other_copies"] if c["array"] == "bf16[4,1024,192]"]
    assert len(copied) == 3 and {(c["bytes"], c["times"]) for c in copied} == {(2 * 4 * 1024 * 192, 1)}
    total = sum(2 * c["bytes"] * c["times"] for c in r["other_copies"])
    assert r["floor"]["copied_bytes"] == total
    read = r["floor"]["live_kv_bytes"] + r["weights_bytes"] + total
    assert r["floor"]["hbm_s"] == pytest.approx(read / 3690e9)
    assert "copies     1 x bf16[4,1024,192], 1.57 MB, in each step" in plan_text.plan_table(r)
