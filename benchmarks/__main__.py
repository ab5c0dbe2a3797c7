"""The command line: one subcommand per benchmark."""

from collections.abc import Sequence

from tyro.extras import SubcommandApp

from benchmarks.bits import bits
from benchmarks.bounds import bounds
from benchmarks.choose import choose
from benchmarks.compiled import compiled
from benchmarks.demo import demo
from benchmarks.depth import depth
from benchmarks.fit import fit
from benchmarks.init import init
from benchmarks.large import large
from benchmarks.layerwise import layerwise
from benchmarks.llama import llama
from benchmarks.lns import lns
from benchmarks.lr_sensitivity import lr_sensitivity
from benchmarks.memory import memory
from benchmarks.moments import moments
from benchmarks.no_tuning import no_tuning
from benchmarks.pretrained import pretrained
from benchmarks.report import report
from benchmarks.speed import speed
from benchmarks.stall import stall
from benchmarks.state import state
from benchmarks.survey import survey
from benchmarks.why import why

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
    moments,
    pretrained,
    speed,
    memory,
    layerwise,
    fit,
    large,
    compiled,
    init,
    llama,
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
