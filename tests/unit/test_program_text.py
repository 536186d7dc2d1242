"""What is read from the text of a compiled program: loops, collectives, sends, copies, kernels and their memory."""

from paged_dist.launch.planning import hlo_text

LOOPS_AND_SENDS = """
%adds (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%called (param.9: f32[4,8]) -> f32[4,8] {
  %param.9 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.9 = f32[4,8]{1,0:T(8,128)} all-reduce(%param.9), replica_groups={{0,2},{1,3}}, to_apply=%adds
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %inside.1 = f32[4,8]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%adds
  %start.1 = ((f32[4,8]), f32[4,8]) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  %tok = token[] after-all()
  %send.1 = (f32[4,8], u32[], token[]) send(%inside.1, %tok), channel_id=7
  ROOT %out = (s32[], f32[4,8]) tuple(%i, %inside.1)
}

%enough (p.2: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%a.2, %b.2), direction=LT
}

ENTRY %main (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0:T(8,128)} parameter(0)
  %once = f32[4,8]{1,0:T(8,128)} all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%adds
  %while.1 = (s32[], f32[4,8]) while(%t), condition=%enough, body=%body
  ROOT %out.2 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""


def test_what_stands_in_a_loop_is_told_from_what_does_not():
    assert {c.groups: c.loops for c in hlo_text.collectives(LOOPS_AND_SENDS)} == {
        ((0, 2), (1, 3)): 1,  # in a computation that the loop's body calls
        ((0, 1), (2, 3)): 1,
        ((0, 1, 2, 3),): 0,
    }
    (sent,) = hlo_text.sends(LOOPS_AND_SENDS)
    assert sent == (("f32[4,8]",), 128, 1)


KERNEL_AND_COPIES = """
%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %n = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%p)
}

ENTRY %main (q: bf16[8,128], k: bf16[64,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %c = s32[1]{0:T(128)} constant({0})
  %copy-start.1 = (s32[8]{0:T(128)S(1)}, s32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%c)
  %copy-done.1 = s32[8]{0:T(128)S(1)} copy-done(%copy-start.1)
  %fusion.2 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%q), kind=kLoop, calls=%fused
  %copy.3 = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%k)
  %kernel.4 = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}) custom-call(%c, %fusion.2, %copy.3), \
custom_call_target="tpu_custom_call", backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"0",\
"size":"99"}],"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"5120"}]}
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%kernel.4), index=0
}
"""


def test_what_is_read_from_a_compiled_program_s_text():
    assert hlo_text.ops_around_kernels(KERNEL_AND_COPIES) == [
        "copy-start copy-start.1",
        "fusion fusion.2",
        "copy copy.3",
    ]
    assert hlo_text.kernel_vmem(KERNEL_AND_COPIES) == [5120]
    pool = 64 * 128 * 2
    assert [value.split()[:2] for value in hlo_text.values_as_large_as(KERNEL_AND_COPIES, pool)] == [["copy", "copy.3"]]
    assert hlo_text.values_as_large_as(KERNEL_AND_COPIES, pool + 1) == []


COPIES_AND_FUSIONS = """
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
    found = hlo_text.values_written_to_hbm(COPIES_AND_FUSIONS, size)
    assert [(x.name, x.array, x.bytes, x.loops) for x in found] == [
        ("again", "bf16[4,64,256]", size, 1),  # not `near`, which is in vector memory
        ("done", "bf16[4,64,256]", size, 0),
        ("fusion.1", "bf16[4,64,256]", size, 0),
    ]
