"""The command line: one subcommand per benchmark."""

from collections.abc import Sequence

from tyro.extras import SubcommandApp

from benchmarks.accuracy.bits import bits
from benchmarks.accuracy.bounds import bounds
from benchmarks.accuracy.choose import choose
from benchmarks.accuracy.demo import demo
from benchmarks.accuracy.depth import depth
from benchmarks.accuracy.finetune import finetune
from benchmarks.accuracy.llama import llama
from benchmarks.accuracy.lns import lns
from benchmarks.accuracy.lr_sensitivity import lr_sensitivity
from benchmarks.accuracy.minilm import minilm
from benchmarks.accuracy.moments import moments
from benchmarks.accuracy.muons import muons
from benchmarks.accuracy.no_tuning import no_tuning
from benchmarks.accuracy.pretrained import pretrained
from benchmarks.accuracy.scale import scale
from benchmarks.accuracy.smollm import smollm
from benchmarks.accuracy.stall import stall
from benchmarks.accuracy.state import state
from benchmarks.accuracy.survey import survey
from benchmarks.accuracy.why import why
from benchmarks.compilers.compiled import compiled
from benchmarks.compilers.newton_schulz import newton_schulz
from benchmarks.data.corpus import corpus, pack
from benchmarks.ideas import ideas
from benchmarks.report import report
from benchmarks.systems.fit import fit
from benchmarks.systems.init import init
from benchmarks.systems.large import large
from benchmarks.systems.layerwise import layerwise
from benchmarks.systems.memory import memory
from benchmarks.systems.ordinary import ordinary
from benchmarks.systems.others import others
from benchmarks.systems.speed import speed

app = SubcommandApp()
for command in (
    demo,
    lr_sensitivity,
    no_tuning,
    depth,
    bits,
    lns,
    stall,
    state,
    survey,
    choose,
    why,
    bounds,
    muons,
    moments,
    pretrained,
    speed,
    memory,
    ordinary,
    layerwise,
    fit,
    large,
    compiled,
    newton_schulz,
    init,
    llama,
    corpus,
    pack,
    scale,
    smollm,
    finetune,
    minilm,
    others,
    ideas,
    report,
):
    app.command(command)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line, on ``sys.argv`` if ``args`` is None."""
    app.cli(
        prog="python -m benchmarks",
        description="Benchmarks of the Madam optimizer, against Adam and SGD.",
        args=args,
    )


if __name__ == "__main__":
    main()
