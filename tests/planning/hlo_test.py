"""Tests `dlrm_jax/planning/hlo.py` on lines as backends write them."""

from dlrm_jax.planning.hlo import Collective, collectives, largest_result, serial_loops, totals

TEXT = """HloModule jit_step
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%inner (p: f32[4]) -> f32[4] {
  ROOT %a2a.9 = (f32[1,4]{1,0}, f32[1,4]{1,0}) all-to-all(%p, %p), replica_groups={{0,1}}
}
%body.1 (carry: (f32[4])) -> (f32[4]) {
  %call.1 = f32[4]{0} call(%carry), to_apply=%inner
  ROOT %t = (f32[4]{0}) tuple(%call.1)
}
%cond.1 (carry: (f32[4])) -> pred[] {
  ROOT %all-reduce.7 = pred[] all-reduce(%x), to_apply=%add
}
ENTRY %main (a: f32[100,16]) -> f32[100,16] {
  %all-to-all.1 = (s32[1,200]{1,0}, s32[1,200]{1,0}) all-to-all(%a, %b), replica_groups={{0,1}}
  %ag = f32[800,16]{1,0:T(8,128)} all-gather(%a), dimensions={0}
  %ags = (f32[100,16]{1,0}, f32[800,16]{1,0}) all-gather-start(%a), dimensions={0}
  %agd = f32[800,16]{1,0} all-gather-done(%ags)
  %all-reduce-start.1 = (f32[64]{0}, bf16[64,13]{1,0}) all-reduce-start(%g, %h), to_apply=%add
  %copy.1 = f32[100,16]{0,1} copy(%a)
  %while.1 = (f32[4]{0}) while(%init), condition=%cond.1, body=%body.1
}
"""


def test_kinds_bytes_and_loops():
    found = collectives(TEXT)
    assert Collective("all-to-all", 1600, ("s32[1,200]", "s32[1,200]"), False) in found
    assert [one.num_bytes for one in found if one.kind == "all-gather"] == [51200, 51200]
    assert Collective("all-reduce", 64 * 4 + 64 * 13 * 2, ("f32[64]", "bf16[64,13]"), False) in found
    assert Collective("all-to-all", 32, ("f32[1,4]", "f32[1,4]"), True) in found
    assert len(found) == 6


def test_totals_leave_out_control_and_keep_loops_apart():
    assert totals(collectives(TEXT)) == {"all-to-all": 1600, "all-gather": 102400, "all-reduce": 1920}
    assert totals(collectives(TEXT), in_loop=True) == {}


def test_largest_result():
    assert largest_result(TEXT, ("copy",)) == 6400
    assert largest_result(TEXT, ("sort",)) == 0


def test_loops_that_the_program_does_not_have_are_told_from_its_own():
    loop = '%while.2 = (s32[], f32[9,16]) while(%t), condition=%c, body=%b, metadata={op_name="jit(step)/update/NAME"}'
    assert serial_loops(loop.replace("NAME", "scatter-add")) == 1
    assert serial_loops(loop.replace("NAME", "while")) == 0
    assert serial_loops(TEXT) == 1, "a loop of unknown origin counts"


def test_an_asynchronous_collective_counts_once_though_several_fusions_name_it():
    step = '  %ag.{i} = s32[2048,6]{{0,1}} all-gather(%p), dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}'
    lines = [step.format(i=i, chain=chain) for i, chain in enumerate("0001")]
    assert totals(collectives("\n".join(["ENTRY %main (p: s32[256,6]) -> s32[2048,6] {", *lines, "}"]))) == {
        "all-gather": 2 * 2048 * 6 * 4
    }
