"""MaxText: its function that makes the state, patched for a while."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import optax

from madax._core.checks import check_transformation
from madax.formats._base import Format
from madax.trainers._shared import coder, imported

_MOVES = "MaxText moves them by shardings, which codes do not have"
_OF_MAXTEXT = "only optimizers of MaxText do that, and tx takes their place"
# Settings that would be ignored, or that would make floats of codes.
_REFUSED = {
    "enable_diloco": "MaxText averages the weights of workers, which codes do not take",
    "load_full_state_path": "its state of an optimizer would be lost: load weights by "
    "load_parameters_path",
    "optimizer_memory_host_offload": _MOVES,
    "parameter_memory_host_offload": _MOVES,
    "shard_optimizer_over_data": "MaxText shards only optimizers of its own",
    "skip_step_on_spikes": _OF_MAXTEXT,
    "trainable_parameters_mask": f"{_OF_MAXTEXT}: freeze weights in tx",
    "use_qk_clip": "MaxText scales weights after a step, which makes floats of codes",
}


@contextlib.contextmanager
def maxtext(
    tx: optax.GradientTransformation, format: Format, **options: Any
) -> Generator[None, None, None]:
    """Lets MaxText's loop train codes, in a ``with`` statement.

    MaxText makes its optimizer in ``train_utils.setup_train_loop``, and gives the step
    shardings of the state, but JAX takes no shardings of codes. Inside of the statement
    that function returns a state of codes with the optimizer ``tx``, and no shardings;
    weights stay on the devices where they lie. Afterwards the function is as it was.

    The learning rate is the one of ``tx``, whatever the configuration says, and MaxText
    reports infinity. Checkpoints hold the codes, but a run is not resumed, because
    MaxText restores it before codes are made.

    Args:
      tx: an optimizer of lifted codes, ``madax.hijax.optimizer(...)``.
      format: the number format of the codes.
      options: other arguments of :func:`madax.quantize_params`, such as
        ``channel_axis=-1``.

    Returns:
      A context manager.

    Raises:
      ImportError: if MaxText is not installed, or JAX is older than 0.10.2.
      TypeError: if ``tx`` is no optimizer, ``format`` no format, or an option none of
        ``quantize_params``.
      ValueError: when MaxText makes the state, if its configuration scans layers,
        accumulates gradients, shards weights, or has another setting that codes or
        ``tx`` would not follow, or the run has a checkpoint.

    Example:
      .. code-block:: python

          tx = madax.hijax.optimizer(madax.muon(0.02))
          with madax.trainers.maxtext(tx, madax.SymlogFormat(bits=8)):
              train.main(argv)  # of maxtext.trainers.pre_train
    """
    check_transformation("tx", tx)
    train_utils: Any = imported("maxtext.utils.train_utils", "maxtext")
    made = coder(format, options)
    original = train_utils.setup_train_loop

    def setup_train_loop(config, recorder, devices=None):
        _check(config, train_utils.maxtext_utils.get_mesh_from_config(config, devices))
        _check_fresh(config)
        from flax import nnx

        *rest, state = original(config, recorder, devices)
        model = made(state.model)
        optimizer = nnx.Optimizer(model, tx, wrt=state.optimizer.wrt)
        state = type(state)(model, optimizer)
        # The loop keeps the model, which would be one of floats, and reports the rate.
        rest[3], rest[5] = model, lambda step: float("inf")
        rest[2] = jax.tree.map(lambda _: None, nnx.state(state))  # the shardings
        return *rest, state

    train_utils.setup_train_loop = setup_train_loop
    try:
        yield
    finally:
        train_utils.setup_train_loop = original


def _check(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises if MaxText would scan layers, or use shardings, which codes lack."""
    if config.scan_layers:
        raise ValueError(
            "scan_layers is True, but layers of codes cannot be scanned in MaxText, as "
            "one scale is for all layers; pass scan_layers=false."
        )
    if config.gradient_accumulation_steps > 1:
        steps = config.gradient_accumulation_steps
        raise ValueError(
            f"gradient_accumulation_steps is {steps}, but MaxText accumulates by "
            "shardings of the weights, which codes do not have; pass "
            f"gradient_accumulation_steps=1, and optax.MultiSteps(tx, {steps})"
            ".gradient_transformation() for tx."
        )
    for name, why in _REFUSED.items():
        if value := getattr(config, name):
            off = repr(type(value)()).lower()
            raise ValueError(f"{name} is {value}, but {why}; pass {name}={off}.")
    for axis, size in mesh.shape.items():
        if axis != "data" and size > 1:
            of_axis = f"{'pipeline' if axis == 'stage' else axis}_parallelism"
            within = "dcn" if getattr(config, f"ici_{of_axis}") == 1 else "ici"
            setting = f"{within}_{of_axis}"
            raise ValueError(
                f"{setting} is {getattr(config, setting)}, which shards weights over "
                f"{size} devices, but MaxText compiles its step ahead of time, where "
                "JAX would shard their scales, too; pass "
                f"{setting}=1 and {within}_data_parallelism=-1."
            )


def _check_fresh(config: Any) -> None:
    """Raises if MaxText would resume a run."""
    from etils import epath
    from orbax.checkpoint.utils import checkpoint_steps

    if not config.enable_checkpointing:
        return
    folder = epath.Path(config.checkpoint_dir)
    if folder.exists() and (steps := checkpoint_steps(folder)):
        raise ValueError(
            f"{folder} has a checkpoint of step {max(steps)}, but MaxText would "
            "restore it before codes are made; pass another run_name."
        )
