"""Every table and figure again, from the records alone."""

from pathlib import Path

from benchmarks.accuracy.bits import bits_report
from benchmarks.accuracy.bounds import bounds_report
from benchmarks.accuracy.choose import choose_report
from benchmarks.accuracy.demo import demo_report
from benchmarks.accuracy.depth import depth_report
from benchmarks.accuracy.finetune import finetune_report
from benchmarks.accuracy.llama_report import clip_report, llama_report
from benchmarks.accuracy.lr_sensitivity import lr_sensitivity_report
from benchmarks.accuracy.minilm import minilm_report
from benchmarks.accuracy.moments import hard_report, moments_report
from benchmarks.accuracy.muons_report import muons_report
from benchmarks.accuracy.no_tuning import no_tuning_report
from benchmarks.accuracy.pretrained import pretrained_report
from benchmarks.accuracy.scale_report import scale_report
from benchmarks.accuracy.smollm import smollm_report
from benchmarks.accuracy.stall import stall_report
from benchmarks.accuracy.state import state_report
from benchmarks.accuracy.survey import survey_report
from benchmarks.accuracy.why import why_report
from benchmarks.compilers.compiled_report import compiled_report
from benchmarks.compilers.newton_schulz import newton_schulz_report
from benchmarks.systems.fit import fit_report
from benchmarks.systems.init import init_report
from benchmarks.systems.large import large_report
from benchmarks.systems.layerwise import layerwise_report
from benchmarks.systems.memory import memory_report
from benchmarks.systems.ordinary import ordinary_report
from benchmarks.systems.others import others_report
from benchmarks.systems.speed import speed_report

REPORTS = (
    lr_sensitivity_report,
    no_tuning_report,
    depth_report,
    bits_report,
    speed_report,
    memory_report,
    ordinary_report,
    fit_report,
    large_report,
    compiled_report,
    newton_schulz_report,
    init_report,
    layerwise_report,
    others_report,
    llama_report,
    clip_report,
    scale_report,
    smollm_report,
    finetune_report,
    minilm_report,
    demo_report,
    stall_report,
    state_report,
    survey_report,
    choose_report,
    hard_report,
    moments_report,
    why_report,
    muons_report,
    bounds_report,
    pretrained_report,
)


def report(out: Path = Path("benchmarks/results")) -> None:
    """Rebuild all tables and figures from the records, without running anything.

    Args:
        out: Folder; files of records are looked for in it and in all below.
    """
    for raw in sorted(out.rglob("*.jsonl")):
        for write in REPORTS:
            if raw.stem == (write.source or write.name):
                print(f"\n{raw}\n\n{write(raw.parent)}")
