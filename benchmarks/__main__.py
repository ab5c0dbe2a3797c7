"""The command line: one subcommand a benchmark."""

from collections.abc import Sequence

from tyro.extras import SubcommandApp

from benchmarks.bits import bits
from benchmarks.demo import demo
from benchmarks.lns import lns
from benchmarks.stall import stall

app = SubcommandApp()
app.command(demo)
app.command(bits)
app.command(lns)
app.command(stall)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line, on ``sys.argv`` if ``args`` is None."""
    app.cli(
        prog="python -m benchmarks",
        description="Benchmarks of the Madam optimizer, against Adam and SGD.",
        args=args,
    )


if __name__ == "__main__":
    main()
