"""Profiles: the sizes of workloads for a smoke test, a laptop and a GPU."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.lib.analysis import DEPTH
from benchmarks.lib.choices import check_choices
from benchmarks.lib.train import Budget
from benchmarks.workloads import Workload
from benchmarks.workloads.autoencoder import autoencoder
from benchmarks.workloads.coordinates import coordinates
from benchmarks.workloads.diffusion import diffusion
from benchmarks.workloads.gan import gan
from benchmarks.workloads.gru import gru
from benchmarks.workloads.images import mlp
from benchmarks.workloads.llama import llama
from benchmarks.workloads.pinn import pinn
from benchmarks.workloads.policy import policy
from benchmarks.workloads.resnet import resnet
from benchmarks.workloads.tabular import tabular
from benchmarks.workloads.transformer import transformer
from benchmarks.workloads.vae import vae
from benchmarks.workloads.vit import vit
from benchmarks.workloads.words import words

Profile = Literal["smoke", "quick", "full"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A workload at a size.

    Attributes:
      factory: makes the workload.
      model: its options, for the records, too.
      budget: length and number of runs.
      at_once: points to train side by side, as the memory allows.
    """

    factory: Callable[..., Workload]
    model: Mapping[str, Any]
    budget: Budget
    at_once: int = 32

    def make(self, folder: Path | None) -> Workload:
        """Returns the workload; ``folder`` is where its data is."""
        return self.factory(folder, **self.model)


def _smoke(batch_size: int, steps: int = 30) -> Budget:
    return Budget(steps, evaluations=2, batch_size=batch_size, seeds=2)


def _quick(batch_size: int, steps: int = 500) -> Budget:
    return Budget(steps, evaluations=2, batch_size=batch_size, seeds=3)


def _full(batch_size: int, steps: int) -> Budget:
    return Budget(steps, evaluations=10, batch_size=batch_size, seeds=3)


DIGITS = {"source": "digits", "held_out": 200}
FASHION = {"source": "fashion-mnist", "shrink": 2, "held_out": 2000}
PHOTO = {"picture": "china.jpg", "shrink": 4}
BURGERS = {"viscosity": 0.01}
ROD = {"diffusivity": 0.1}
LONG = "transformer, long"
TEXT = {"source": "stdlib", "name": LONG}
GAINS = "transformer, LayerScale"
SCALED = {"name": GAINS, "layer_scale": 1e-6}
TASKS: dict[Profile, dict[str, Task]] = {
    # Only data that is embedded in packages.
    "smoke": {
        "mlp": Task(mlp, DIGITS | {"width": 16}, _smoke(32)),
        "resnet": Task(
            resnet, DIGITS | {"width": 4, "blocks": (1, 1), "stem": 2}, _smoke(16)
        ),
        "vit": Task(
            vit, DIGITS | {"patch": 4, "width": 8, "layers": 1, "heads": 2}, _smoke(16)
        ),
        "transformer": Task(
            transformer,
            {"context": 8, "width": 8, "layers": 1, "heads": 2, "held_out": 32},
            _smoke(8),
        ),
        "gru": Task(gru, {"context": 8, "width": 8, "held_out": 32}, _smoke(8)),
        "coordinates": Task(
            coordinates, {"depth": 3, "width": 16, "size": 16, "shrink": 4}, _smoke(1)
        ),
        "autoencoder": Task(autoencoder, DIGITS | {"widths": (16, 4)}, _smoke(32)),
        "gan": Task(gan, DIGITS | {"width": 16}, _smoke(32)),
        "diffusion": Task(diffusion, DIGITS | {"widths": (64,)}, _smoke(32)),
        "words": Task(
            words, {"vocabulary": 2000, "width": 8, "held_out": 200}, _smoke(32)
        ),
        "pinn": Task(
            pinn, BURGERS | {"points": 32, "widths": (16, 16), "grid": 16}, _smoke(1)
        ),
        "tabular": Task(
            tabular,
            {"embed": 2, "widths": (16,), "rows": 2000, "held_out": 400},
            _smoke(32),
        ),
        "vae": Task(vae, DIGITS | {"widths": (32,), "code": 4}, _smoke(32)),
        "policy": Task(
            policy, {"widths": (16,), "horizon": 40, "held_out": 32}, _smoke(16)
        ),
        LONG: Task(
            transformer,
            TEXT | {"context": 16, "width": 8, "layers": 1, "heads": 2, "held_out": 32},
            _smoke(8, 60),
        ),
        GAINS: Task(
            transformer,
            # Gains of 1e-6 have no time to grow here.
            SCALED
            | {"context": 8, "width": 8, "layers": 1, "heads": 2, "held_out": 32}
            | {"layer_scale": 0.1},
            _smoke(8),
        ),
        "pinn, heat": Task(
            pinn, ROD | {"points": 32, "widths": (16, 16), "grid": 16}, _smoke(1)
        ),
        "llama": Task(
            llama,
            {"context": 8, "width": 16, "layers": 1, "heads": 2, "held_out": 32},
            _smoke(8),
        ),
    },
    "quick": {
        "mlp": Task(mlp, FASHION | {"width": 64}, _quick(64, 1000)),
        "resnet": Task(
            resnet, FASHION | {"width": 8, "blocks": (1, 1), "stem": 2}, _quick(16, 400)
        ),
        "vit": Task(
            vit,
            FASHION | {"patch": 7, "width": 32, "layers": 1, "heads": 2},
            _quick(32),
        ),
        "transformer": Task(
            transformer,
            {"context": 32, "width": 32, "layers": 2, "heads": 2, "held_out": 128},
            _quick(4),
        ),
        "gru": Task(gru, {"context": 32, "width": 32, "held_out": 128}, _quick(8)),
        "coordinates": Task(
            coordinates, PHOTO | {"depth": 5, "width": 64, "size": 32}, _quick(1, 400)
        ),
        "autoencoder": Task(
            autoencoder, FASHION | {"widths": (64, 32, 8)}, _quick(64, 1000)
        ),
        "gan": Task(gan, FASHION | {"width": 64}, _quick(64, 600)),
        "diffusion": Task(
            diffusion, FASHION | {"shrink": 4, "widths": (128, 128)}, _quick(64, 1000)
        ),
        "words": Task(
            words, {"vocabulary": 2000, "width": 24, "held_out": 2000}, _quick(32)
        ),
        "pinn": Task(
            pinn,
            BURGERS | {"points": 128, "widths": (24, 24, 24), "grid": 50},
            _quick(1, 1200),
        ),
        "tabular": Task(
            tabular,
            {"embed": 4, "widths": (64, 64), "rows": 20_000, "held_out": 4000},
            _quick(64, 1000),
        ),
        "vae": Task(vae, FASHION | {"widths": (64,), "code": 8}, _quick(64, 1000)),
        "policy": Task(
            policy,
            {"widths": (32, 32), "horizon": 100, "held_out": 64},
            _quick(32, 200),
        ),
        LONG: Task(
            transformer,
            TEXT
            | {"context": 64, "width": 32, "layers": 2, "heads": 2, "held_out": 256},
            _quick(2, 3000),
        ),
        GAINS: Task(
            transformer,
            SCALED
            | {"context": 32, "width": 32, "layers": 3, "heads": 2, "held_out": 128},
            _quick(4, 1500),
        ),
        "pinn, heat": Task(
            pinn,
            ROD | {"points": 128, "widths": (24, 24, 24), "grid": 50},
            _quick(1, 1200),
        ),
        "llama": Task(
            llama,
            {"context": 32, "width": 32, "layers": 2, "heads": 2, "held_out": 128},
            _quick(4),
        ),
    },
    "full": {
        "mlp": Task(mlp, {"source": "fashion-mnist", "width": 256}, _full(128, 3000)),
        "resnet": Task(resnet, {"source": "cifar-10"}, _full(128, 400), at_once=6),
        "vit": Task(
            vit,
            {"source": "cifar-10", "patch": 4, "width": 128, "layers": 4, "heads": 4},
            _full(128, 1000),
            at_once=9,
        ),
        "transformer": Task(
            transformer,
            {
                "source": "wikitext-2",
                "context": 35,
                "width": 200,
                "layers": 2,
                "heads": 2,
                "held_out": 2000,
            },
            _full(20, 1000),
            at_once=9,
        ),
        "gru": Task(
            gru, {"context": 64, "width": 256, "held_out": 500}, _full(32, 1000)
        ),
        "coordinates": Task(
            coordinates, PHOTO | {"depth": 5, "width": 256, "size": 64}, _full(1, 2000)
        ),
        "autoencoder": Task(
            autoencoder,
            {"source": "fashion-mnist", "widths": (512, 256, 128, 32)},
            _full(128, 3000),
        ),
        "gan": Task(gan, {"source": "fashion-mnist", "width": 256}, _full(128, 3000)),
        "diffusion": Task(
            diffusion,
            {"source": "fashion-mnist", "widths": (1024, 1024)},
            _full(128, 5000),
        ),
        "words": Task(
            words,
            {"source": "stdlib", "vocabulary": 8000, "width": 64, "held_out": 5000},
            _full(128, 3000),
            at_once=9,
        ),
        "pinn": Task(
            pinn,
            BURGERS | {"points": 512, "widths": (64, 64, 64, 64), "grid": 100},
            _full(1, 10_000),
        ),
        "tabular": Task(
            tabular,
            {"embed": 8, "widths": (256, 256), "rows": 250_000, "held_out": 50_000},
            _full(256, 5000),
        ),
        "vae": Task(
            vae,
            {"source": "fashion-mnist", "widths": (512, 256), "code": 32},
            _full(128, 3000),
        ),
        "policy": Task(
            policy,
            {"widths": (64, 64), "horizon": 200, "held_out": 256},
            _full(64, 1000),
        ),
        LONG: Task(
            transformer,
            TEXT
            | {"context": 128, "width": 200, "layers": 4, "heads": 4, "held_out": 500},
            _full(32, 10_000),
            at_once=9,
        ),
        GAINS: Task(
            transformer,
            SCALED
            | {"context": 64, "width": 200, "layers": 8, "heads": 4, "held_out": 500},
            _full(32, 5000),
            at_once=9,
        ),
        "pinn, heat": Task(
            pinn,
            ROD | {"points": 512, "widths": (64, 64, 64, 64), "grid": 100},
            _full(1, 10_000),
        ),
        "llama": Task(
            llama,
            {"context": 128, "width": 256, "layers": 4, "heads": 8, "held_out": 500},
            _full(32, 5000),
            at_once=9,
        ),
    },
}
SMOKE = ("mlp", "gru")  # Compiling takes time, too.
# The first ones, on which tables of settings and rates are recorded.
EIGHT = (
    "mlp",
    "resnet",
    "vit",
    "transformer",
    "gru",
    "coordinates",
    "autoencoder",
    "gan",
)
# The coordinate MLP at other depths, and the size of its picture.
DEPTHS: dict[Profile, tuple[int, ...]] = {
    "smoke": (3, 5),
    "quick": (5, 20, 75),
    "full": (5, 10, 20, 40, 75),
}
PIXELS: dict[Profile, int] = {"smoke": 16, "quick": 24, "full": 64}  # On a side.


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments that all benchmarks take.

    Attributes:
      profile: smoke takes seconds and shows only that it works; quick takes some
        minutes on two CPU cores; full is for a GPU.
      out: Folder for the records, runs.jsonl, and what is drawn from them; by default
        benchmarks/results/ and the profile.
      data: Folder of data sets, or of one: the IDX files of Fashion-MNIST, the binary
        version of CIFAR-10; by default Debian's files if installed, else Hugging Face.
      workloads: Names of workloads; by default those of the command's table, but for
        smoke, which takes two.
    """

    profile: Profile = "quick"
    out: Path | None = None
    data: Path | None = None
    workloads: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder to write into, made if missing."""
        folder = self.out or Path("benchmarks/results") / self.profile
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def raw(self) -> Path:
        """The file of records."""
        return self.folder / "runs.jsonl"

    def tasks(self, *, every: bool = False) -> list[Task]:
        """Returns the workloads to run.

        Args:
          every: whether to run all of the profile, not the first eight, where the user
            names none.
        """
        tasks = TASKS[self.profile]
        check_choices("workloads", self.workloads, tasks)
        if self.profile == "smoke" and not self.workloads:
            return [tasks[name] for name in SMOKE]
        return [tasks[name] for name in self.workloads or (tasks if every else EIGHT)]

    def depths(self) -> list[Task]:
        """Returns the coordinate MLP at every depth of the profile."""
        task = TASKS[self.profile]["coordinates"]
        model = {**task.model, "size": PIXELS[self.profile]}
        return [
            dataclasses.replace(
                task, model=model | {"depth": depth, "name": f"{DEPTH}{depth}"}
            )
            for depth in DEPTHS[self.profile]
        ]


Flags = Annotated[Options, tyro.conf.arg(name="")]  # As a command takes them.
