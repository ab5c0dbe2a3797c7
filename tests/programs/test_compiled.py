"""What compilers make of a step: kernels, bytes and operations do not become more.

The first half counts on a CPU; the second asks the compilers of a TPU and a GPU, of
the extra ``compilers``, where they are, about chips that are not. What they are given
by the first ``init`` comes last.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import mostly_nightly
from jax.sharding import SingleDeviceSharding

from benchmarks import RESULTS
from benchmarks.compilers import compiled, compiled_report, programs
from benchmarks.compilers.chips import compiler, footprint
from benchmarks.lib import records
from benchmarks.systems import init
from madax._core.vectors import _scalars, _scalars_apart

# For the step on four leaves: StableHLO operations over those of optax.adam, kernels of
# the CPU's compiler, peak memory over parameters, state and gradients, operations per
# parameter. These are the numbers found; lower them when the code gets better.
CPU = {
    "madam": (3.1, 11, 1.01, 67.1),
    "native 8, 8-bit v": (7.0, 28, 1.26, 91.1),
    "native 16": (3.2, 12, 1.01, 60.1),
    "native 8 adam": (5.2, 22, 1.05, 174.1),
    "bbit_madam": (7.5, 16, 1.05, 314.1),
    "adamw, 8-bit state": (5.2, 79, 1.88, 240.1),
    # Twice the step, for floats of no whole leaf: a peak of 3.2 and 6.6 without that.
    "native 8 adam, error feedback": (10.0, 37, 1.19, 313.1),
    "native 8 adam, 8-bit state, error feedback": (18.8, 121, 2.86, 883.1),
}
# For chips: kernels of four leaves, operations per parameter, a TPU's cycles over those
# of Adam.
LIMITS = {
    ("TPU v5e", "adam"): (4, 13.1, 1),
    ("TPU v5e", "madam"): (8, 39.1, 0.71),
    ("TPU v5e", "native 8, 8-bit v"): (11, 56.1, 0.42),
    ("TPU v5e", "native 16"): (7, 52.1, 0.45),
    ("TPU v5e", "native 8 adam"): (7, 170.1, 0.78),
    ("TPU v5e", "bbit_madam"): (9, 281.1, 1.12),
    ("H100", "adam"): (6, 13.1, None),
    ("H100", "madam"): (5, 35.1, None),
    ("H100", "madam, floor, b1"): (5, 42.1, None),
    ("H100", "native 8, 8-bit v"): (13, 48.4, None),
    ("H100", "native 8"): (5, 42.4, None),
    ("H100", "native 16"): (5, 42.4, None),
    ("H100", "native 8 adam"): (14, 143.1, None),
    ("H100", "native 8 adam, error feedback"): (19, 201.1, None),
    ("H100", "bbit_madam"): (6, 235.1, None),
    ("H100", "lns_madam"): (6, 235.1, None),
}
# For GPUs: peak memory over parameters, state and gradients, with kernels of each leaf.
# It is 1.8 to 2.6 where one steps all four.
PEAKS = {
    ("B200", "adamw bfloat16, 8-bit state"): 1.35,
    ("B200", "adamw, 8-bit state"): 1.21,
    ("B200", "native 8 adam, 8-bit state"): 1.41,
}
FEW = [job for job in LIMITS if job[1] in ("adam", "madam", "native 8, 8-bit v")]


# --- counting -------------------------------------------------------------------------


def counts(f, *args):
    return programs.count(jax.jit(f).lower(*args).compile().as_text())


def test_a_kernel_is_counted_with_its_bytes_and_operations():
    x = jnp.ones(1000)
    assert counts(lambda x: jnp.abs(x * 3 + 1), x) == programs.Counts(1, 8000, 3000)
    # Neither roots nor conversions of type without work count as operations.
    once = counts(lambda x: jnp.sqrt(x.astype(jnp.float32)) + 1, x)
    assert once == programs.Counts(1, 8000, 1000)


def test_loops_are_unrolled_and_the_lesser_branch_is_taken():
    x = jnp.ones(1000)
    loop = lambda x: jax.lax.fori_loop(0, 7, lambda i, x: jnp.cumsum(jnp.sin(x)), x)
    once = counts(lambda x: jnp.cumsum(jnp.sin(x)), x)
    many = counts(loop, x)
    # A counter beside them, for each.
    assert 7 * once.kernels <= many.kernels <= 7 * (once.kernels + 2)
    assert 7 * once.operations <= many.operations <= 7 * (once.operations + 4)

    f = lambda p, x: jax.lax.cond(p, lambda x: jnp.sort(x) @ jnp.sort(x), jnp.sum, x)
    branches = counts(f, True, x)
    assert counts(jnp.sum, x).bytes <= branches.bytes < counts(jnp.sort, x).bytes


def test_a_loop_of_a_tpu_has_the_rounds_of_its_condition():
    text = """
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %x = f32[8]{0:T(256)} get-tuple-element(%t), index=1
  %f = f32[8]{0:T(256)} fusion(%x), calls=%c, x={"estimated_cycles":"7"}
}

%c (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0:T(256)} parameter(0)
}

%test (t: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  %t = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %a = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%a), condition=%test, body=%body
}
"""
    assert programs.count(text) == programs.Counts(32, 32 * 64, 0, 32 * 7)
    other = text.replace("direction=LT", "direction=GT")
    assert programs.count(other).cycles == 7


def test_what_is_kept_on_a_tpu_is_not_in_main_memory():
    text = """
%c (p: f32[256], q: f32[]) -> f32[256] {
  %p = f32[256]{0:T(256)S(1)} parameter(0)
  %q = f32[]{:T(128)} parameter(1)
  %b = f32[256]{0:T(256)} broadcast(%q), dimensions={}
  ROOT %m = f32[256]{0:T(256)} multiply(%p, %b)
}

ENTRY %main (x: f32[512], s: f32[]) -> f32[256] {
  %x = f32[512]{0:T(512)} parameter(0)
  %s = f32[]{:T(128)} parameter(1)
  %n = f32[]{:T(128)S(6)} negate(%s)
  %start = ((f32[512]{0:T(512)}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %done = f32[256]{0:T(256)S(1)} slice-done(%start)
  ROOT %f = f32[256]{0:T(256)} fusion(%done, %n), calls=%c, x={"estimated_cycles":"77"}
}
"""
    assert programs.count(text) == programs.Counts(1, 2048, 256, 77)


def test_of_an_operand_that_is_only_sliced_a_kernel_reads_the_slices():
    text = """
%c (p: f32[4096], q: f32[4]) -> f32[4] {
  %p = f32[4096]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %s = f32[4]{0} slice(%p), slice={[0:4]}
  %t = f32[4]{0} slice(%p), slice={[4:8]}
  %a = f32[4]{0} add(%s, %t)
  ROOT %m = f32[4]{0} multiply(%a, %q)
}

ENTRY %main (x: f32[4096], y: f32[4]) -> f32[4] {
  %x = f32[4096]{0} parameter(0)
  %y = f32[4]{0} parameter(1)
  ROOT %f = f32[4]{0} fusion(%x, %y), kind=kLoop, calls=%c
}
"""
    assert programs.count(text) == programs.Counts(1, 4 * 4 * 4, 8)


# --- the CPU's ------------------------------------------------------------------------


def lowered(name):
    device = SingleDeviceSharding(jax.devices("cpu")[0])
    return compiled.leaves(4, compiled.OPTIMIZERS[name]).lower(device)


@pytest.mark.parametrize("name", mostly_nightly(CPU, "madam", "native 8, 8-bit v"))
def test_steps_do_not_take_more_operations_and_kernels(name):
    if "feedback" in name and jax.__version_info__ < (0, 12):
        pytest.skip("older compilers for CPUs drop the barriers between steps")
    ratio, kernels, peak, operations = CPU[name]
    program = lowered(name)
    given = compiled.stablehlo(program)
    assert given <= ratio * compiled.stablehlo(lowered("adam"))
    program = program.compile()
    done = programs.count(program.as_text())
    assert done.kernels <= kernels
    assert done.operations <= operations * 2**24
    used = footprint(program)
    assert used["peak"] <= peak * used["arguments"]


# --- those of chips -------------------------------------------------------------------


def compile_for_chips(raw, wanted):
    for chip in ("TPU v5e", "H100"):
        if compiler(chip) is None:
            pytest.skip(f"no compiler for {chip}: pip install '.[compilers]'")
    jobs = [compiled.Job(chip, "4 leaves", name) for chip, name in wanted]
    compiled.in_a_process(raw, jobs)
    lines = raw.read_text().splitlines()
    runs = {(r["chip"], r["optimizer"]): r for r in map(json.loads, lines)}
    assert list(runs) == list(wanted)
    for run in runs.values():
        assert "error" not in run, run
    return runs


def check(raw, limits):
    runs = compile_for_chips(raw, limits)
    found = {}
    for job, run in runs.items():
        kernels, operations, cycles = LIMITS[job]
        over_adam = run["cycles"] / max(runs[job[0], "adam"]["cycles"], 1)
        is_good = (
            run["kernels"] <= kernels
            and run["operations"] / run["parameters"] <= operations
            and (cycles is None or over_adam <= cycles)
            # All that must be moved is moved, scalars aside, and hardly more; in place.
            and 0.999 < run["bytes"] / run["floor"] < 1.05
            and run["peak"] < 1.05 * run["arguments"]
        )
        if not is_good:
            found[job] = {"cycles over adam": over_adam, **run}
    assert not found


def test_a_chip_takes_no_more_kernels_bytes_and_operations(tmp_path):
    check(tmp_path / "compiled.jsonl", FEW)


@pytest.mark.nightly
def test_a_chip_takes_no_more_with_any_optimizer(tmp_path):
    check(tmp_path / "compiled.jsonl", LIMITS)


def test_a_gpu_steps_leaves_one_by_one_where_it_keeps_floats_of_them(tmp_path):
    runs = compile_for_chips(tmp_path / "compiled.jsonl", PEAKS)
    peaks = {job: run["peak"] / run["arguments"] for job, run in runs.items()}
    assert all(peak <= PEAKS[job] for job, peak in peaks.items()), peaks


def test_numbers_of_a_leaf_are_the_same_apart():
    vectors = [
        jnp.array([-5, 2**31 - 1, 0], jnp.int32),
        jnp.array([-0.0, jnp.nan, 1e-45], jnp.float32),
        jnp.array([0x7FC12345, 2**32 - 1, 7], jnp.uint32),
    ]
    for some in (vectors, vectors[:1], vectors[1:2]):
        together, apart = map(jax.jit, (_scalars, _scalars_apart))
        for leaf, other in zip(together(some), apart(some), strict=True):
            for x, y in zip(leaf, other, strict=True):
                assert (x.shape, x.dtype) == (y.shape, y.dtype) == ((), x.dtype)
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- the command ----------------------------------------------------------------------


def run(optimizer, chip="TPU v5e", **changed):
    count = 2.0**24
    numbers = {"kernels": 4, "bytes": 28 * count, "operations": 13 * count}
    numbers |= {"cycles": 9e5, "stablehlo": 140, "lowering_s": 0.1, "compile_s": 1.5}
    numbers |= {"cpu_s": 1.6, "peak": 12 * count, "floor": 28 * count}
    numbers |= {"parameters": count, "leaves": 4, "compiler": "libtpu 1"}
    numbers |= {"foreign": 0}
    return (
        {"chip": chip, "tree": "4 leaves", "optimizer": optimizer} | numbers | changed
    )


def test_failures_stay_in_the_table_with_their_error(tmp_path):
    raw = tmp_path / "compiled.jsonl"
    records.append(raw, run("adam"), run("madam", cycles=4.5e5, cpu_s=4.8))
    failed = {"chip": "TPU v5e", "tree": "4 leaves", "optimizer": "muon"}
    failed |= {"compiler": "libtpu 1"}
    records.append(raw, failed | {"error": "ValueError: too large\nby far"})
    records.append(raw, run("madam", chip="H100", cycles=0, foreign=4))
    text = compiled_report.compiled_report(tmp_path)
    assert text == (tmp_path / "compiled.md").read_text()
    assert text.count("compiled for, not run") == 3
    lines = text.splitlines()
    (madam,) = [line for line in lines if "madam" in line and "0.50" in line]
    assert "3.00" in madam
    (foreign,) = [line for line in lines if "madam" in line and "0.50" not in line]
    assert foreign.split("|")[5].strip() == "-"
    (muon,) = [line for line in lines if line.startswith("| muon")]
    assert set(muon.split()) == {"|", "muon", "-"}
    assert "muon failed: ValueError: too large" in lines
    assert (tmp_path / "compiled.png").stat().st_size > 10_000


@pytest.mark.nightly
def test_the_command_compiled_writes_its_records_and_table(
    tmp_path, capfd, monkeypatch
):
    compiled.compiled(tmp_path, profile="smoke")
    runs = records.read(tmp_path / "compiled.jsonl")
    assert list(runs["optimizer"]) == ["adam", "madam"]
    assert runs["parameters"].to_list() == [2**24] * 2
    assert "| madam" in capfd.readouterr().out
    # What there is, is not compiled again.
    monkeypatch.setattr(compiled, "in_a_process", None)
    compiled.compiled(tmp_path, profile="smoke", optimizers=("adam",))


@pytest.mark.nightly
def test_a_compiler_that_ends_its_process_is_recorded(tmp_path, monkeypatch):
    raw = tmp_path / "compiled.jsonl"
    compiled.in_a_process(raw, [compiled.Job("CPU", "no such tree", "adam")])
    monkeypatch.setattr(compiled.sys, "executable", "false")
    compiled.in_a_process(raw, [compiled.Job("CPU", "4 leaves", "adam")])
    errors = records.read(raw)["error"].to_list()
    assert errors == ["KeyError: 'no such tree'", "1: no message"]


def test_chips_without_a_compiler_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"trees must be of .* got \['4 tree'\]"):
        compiled.compiled(tmp_path, trees=("4 tree",))
    monkeypatch.setattr(compiled, "compiler", {"CPU": "jaxlib"}.get)
    with pytest.raises(ModuleNotFoundError, match=r"compiler for .*'\.\[compilers\]'"):
        compiled.compiled(tmp_path, chips=("TPU v5e", "CPU"))


def committed(name, table):
    """The records behind each committed table, which must be what they make."""
    found = sorted(RESULTS.rglob(f"{name}.jsonl"))
    assert found
    for raw in found:
        runs = records.read(raw)
        assert raw.with_suffix(".md").read_text(encoding="utf-8") == table(runs)
        yield runs


def test_committed_tables_match_the_records():
    for runs in committed("compiled", compiled_report.compiled_table):
        assert np.isin(list(compiled.MAIN), runs["optimizer"]).all()


# --- the first init -------------------------------------------------------------------


def test_programs_of_an_init_are_counted_once_a_shape(monkeypatch):
    # Shapes of no other test, so that nothing is known of them yet.
    shapes = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (1013, 1019, 1013)]
    monkeypatch.setitem(init.VALUES, "three", lambda: shapes)
    monkeypatch.setitem(init.MAKERS, "zeros", lambda tree: jax.tree.map(zeros, tree))
    zeros = jax.jit(jnp.zeros_like)
    found = [init.measure("three", "zeros") for _ in range(2)]
    assert [run["programs"] for run in found] == [2, 0]
    assert (found[0]["leaves"], found[0]["parameters"]) == (3, 3045)
    assert found[0]["cpu_s"] > 0


def test_by_shapes_an_init_compiles_nothing():
    run = init.measure("Llama-2 7B", "madam")
    assert (run["leaves"], run["parameters"]) == (291, 6_738_415_616)
    assert run["programs"] == 0


def test_the_least_of_several_inits_is_in_the_table():
    run = {"tree": "GPT-2 124M", "leaves": 148, "parameters": 124e6, "programs": 9}
    seconds = {"adam": (0.5, 0.9), "madam": (4.0, 2.0)}
    runs = [
        run | {"optimizer": name, "cpu_s": s} for name in seconds for s in seconds[name]
    ]
    line = init.init_table(pd.DataFrame(runs)).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:5]] == [
        "madam",
        "2.00",
        "4.0",
        "9",
    ]


@pytest.mark.nightly
def test_the_command_init_writes_its_records_and_table(tmp_path, capfd):
    init.init(tmp_path, profile="smoke")
    (raw,) = tmp_path.rglob("init.jsonl")
    runs = records.read(raw)
    assert list(runs["optimizer"]) == list(init.MAKERS)
    assert (runs["programs"] > 0).all() and (runs["cpu_s"] > 0).all()
    assert (raw.parent / "init.md").read_text() in capfd.readouterr().out


def test_committed_tables_of_init_match_the_records():
    for runs in committed("init", init.init_table):
        assert set(init.MAKERS) == set(runs["optimizer"])
