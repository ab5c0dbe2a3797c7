"""Every table and figure again, from the records alone."""

from pathlib import Path

from benchmarks.accuracy.bits import bits_report
from benchmarks.accuracy.bounds import bounds_report
from benchmarks.accuracy.choose import choose_report
from benchmarks.accuracy.demo import demo_report
from benchmarks.accuracy.depth import depth_report
from benchmarks.accuracy.llama_report import llama_report
from benchmarks.accuracy.lr_sensitivity import lr_sensitivity_report
from benchmarks.accuracy.moments import hard_report, moments_report
from benchmarks.accuracy.no_tuning import no_tuning_report
from benchmarks.accuracy.pretrained import pretrained_report
from benchmarks.accuracy.stall import stall_report
from benchmarks.accuracy.state import state_report
from benchmarks.accuracy.survey import survey_report
from benchmarks.accuracy.why import why_report
from benchmarks.compilers.compiled_report import compiled_report
from benchmarks.systems.fit import fit_report
from benchmarks.systems.init import init_report
from benchmarks.systems.large import large_report
from benchmarks.systems.layerwise import layerwise_report
from benchmarks.systems.memory import memory_report
from benchmarks.systems.speed import speed_report

# For each name of a file of records, the reports that it gives, in its folder.
REPORTS = {
    "runs": (lr_sensitivity_report, no_tuning_report, depth_report),
    "bits": (bits_report,),
    "speed": (speed_report,),
    "memory": (memory_report,),
    "fit": (fit_report,),
    "large": (large_report,),
    "compiled": (compiled_report,),
    "init": (init_report,),
    "layerwise": (layerwise_report,),
    "llama": (llama_report,),
    "demo": (demo_report,),
    "stall": (stall_report,),
    "state": (state_report,),
    "survey": (survey_report,),
    "choose": (choose_report,),
    "hard": (hard_report,),
    "moments": (moments_report,),
    "why": (why_report,),
    "bounds": (bounds_report,),
    "pretrained": (pretrained_report,),
}


def report(out: Path = Path("benchmarks/results")) -> None:
    """Rebuild all tables and figures from the records, without running anything.

    Args:
        out: Folder; files of records are looked for in it and in all below.
    """
    for raw in sorted(out.rglob("*.jsonl")):
        for write in REPORTS.get(raw.stem, ()):
            print(f"\n{raw}\n")
            write(raw.parent)
