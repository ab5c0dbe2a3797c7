"""Every optimizer of optax with its state in eight bits, against float32."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from optax import contrib

import madax
from benchmarks.lib import records
from benchmarks.lib.style import Report, markdown
from madax.wrappers._state_roles import reasons_for_floats, state_leaves

STEPS, WIDTH, BATCH = 1000, 64, 32
_ADAM = functools.partial(optax.adam, 0.003)
# As they are by default, at a rate for the task.
SURVEY: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adabelief": lambda: optax.adabelief(0.003),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(0.003),
    "adafactor, factored, momentum": lambda: optax.adafactor(
        0.003, min_dim_size_to_factor=32, momentum=0.9
    ),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": _ADAM,
    "adamax": lambda: optax.adamax(0.003),
    "adamaxw": lambda: optax.adamaxw(0.003),
    "adamw": lambda: optax.adamw(0.003),
    "adan": lambda: optax.adan(0.003),
    "amsgrad": lambda: optax.amsgrad(0.003),
    "fromage": lambda: optax.fromage(0.01),
    "lamb": lambda: optax.lamb(0.003),
    "lars": lambda: optax.lars(0.1),
    "lbfgs": lambda: optax.lbfgs(),
    "lion": lambda: optax.lion(0.0003),
    "nadam": lambda: optax.nadam(0.003),
    "nadamw": lambda: optax.nadamw(0.003),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
    "novograd": lambda: optax.novograd(0.003),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.003),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "radam": lambda: optax.radam(0.003),
    "rmsprop": lambda: optax.rmsprop(0.003),
    "rmsprop, centered": lambda: optax.rmsprop(0.003, centered=True),
    "rprop": lambda: optax.rprop(0.003),
    "sgd": lambda: optax.sgd(0.1),
    "sgd, momentum": lambda: optax.sgd(0.03, momentum=0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(0.0003),
    "signum": lambda: optax.signum(0.0003),
    "sm3": lambda: optax.sm3(0.1),
    "yogi": lambda: optax.yogi(0.003),
    "contrib.acprop": lambda: contrib.acprop(0.003),
    "contrib.ademamix": lambda: contrib.ademamix(0.003),
    "contrib.adopt": lambda: contrib.adopt(0.003),
    "contrib.cocob": lambda: contrib.cocob(),
    "contrib.dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "contrib.dog": lambda: contrib.dog(),
    "contrib.dowg": lambda: contrib.dowg(),
    "contrib.galore": lambda: contrib.galore(0.003),
    "contrib.madgrad": lambda: contrib.madgrad(0.003),
    "contrib.mechanize(adam)": lambda: contrib.mechanize(_ADAM()),
    "contrib.momo": lambda: contrib.momo(),
    "contrib.momo_adam": lambda: contrib.momo_adam(),
    "contrib.muon": lambda: contrib.muon(0.01),
    "contrib.prodigy": lambda: contrib.prodigy(),
    "contrib.schedule_free(adam)": lambda: contrib.schedule_free(_ADAM(), 0.003),
    "contrib.schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.003),
    "contrib.schedule_free_sgd": lambda: contrib.schedule_free_sgd(0.1),
    "contrib.simplified_ademamix": lambda: contrib.simplified_ademamix(0.0003),
    "contrib.sophia": lambda: contrib.sophia(0.0003),
}


def survey(out: Path = Path("benchmarks/results/survey")) -> None:
    """Train with every optimizer of optax, its state in eight bits; takes minutes.

    A thousand steps of a small network, whose data are noisy, beside the same steps
    with a state in float32.

    Args:
        out: Folder for survey.md and survey.jsonl.
    """
    raw = records.file(out, "survey", fresh=True)
    for name, make in SURVEY.items():
        record = {"optimizer": name, **fields(make()), **against_floats(make())}
        records.append(raw, record)
    print(survey_report(out))


def network() -> tuple[optax.Params, jax.Array, jax.Array]:
    """Two matrices and a bias of a network to train; its inputs and noisy targets."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    scale = WIDTH**-0.5
    params = {
        "w": normal(WIDTH, WIDTH, scale=scale),
        "b": jnp.zeros(WIDTH),
        "head": normal(WIDTH, WIDTH, scale=scale),
    }
    x = 1 + normal(1024, WIDTH)
    teacher = normal(WIDTH, WIDTH, scale=scale), normal(WIDTH, WIDTH, scale=scale)
    return params, x, jnp.tanh(x @ teacher[0]) @ teacher[1] + 0.1 * normal(1024, WIDTH)


def against_floats(
    tx: optax.GradientTransformation, steps: int = STEPS
) -> dict[str, float]:
    """Loss and updates with eight bits over those in float32, means of the last tenth.

    Args:
      tx: the optimizer.
      steps: how many.
    """
    exact, eight = (run(tx, steps) for tx in (tx, madax.with_quantized_state(tx)))
    last = slice(-max(steps // 10, 1), None)
    loss, update = (
        float(np.mean(a[last]) / np.mean(b[last]))
        for a, b in zip(eight, exact, strict=True)
    )
    return {"loss": loss, "update": update}


def run(tx: optax.GradientTransformation, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses of all data and root mean squares of updates, by step."""
    tx = optax.with_extra_args_support(tx)
    params, x, y = network()

    def loss(params, rows):
        h = jnp.tanh(x[rows] @ params["w"] + params["b"])
        return jnp.mean((h @ params["head"] - y[rows]) ** 2)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(x))

        def value_fn(params, obj_fn=None):
            del obj_fn
            return loss(params, rows)

        value, grads = jax.value_and_grad(value_fn)(params)
        extra = {"value": value, "grad": grads, "value_fn": value_fn}
        updates, state = tx.update(grads, state, params, **extra, obj_fn=value_fn)
        count = sum(u.size for u in jax.tree.leaves(updates))
        size = jnp.sqrt(optax.tree.vdot(updates, updates) / count)
        params = optax.apply_updates(params, updates)
        return (params, state), (loss(params, jnp.arange(len(x))), size)

    @jax.jit
    def train(params):
        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    losses, sizes = train(params)
    return np.asarray(losses, np.float64), np.asarray(sizes, np.float64)


def fields(tx: optax.GradientTransformation) -> dict[str, list[str]]:
    """Returns which fields of a state are stored, and why others are floats."""
    params, _, _ = network()
    inner = optax.with_extra_args_support(tx)
    leaves = state_leaves(inner, params)
    stored = jax.tree.leaves(
        jax.eval_shape(madax.with_quantized_state(tx).init, params).inner_state
    )
    reasons = reasons_for_floats(inner, params, leaves)

    def field(path):
        return re.sub(r"(\w+/)*(\w+)/(w|head)\b", r"`\2`", path)

    codes, floats = {}, {}
    for i, (path, owner) in enumerate(zip(leaves.paths, leaves.owners, strict=True)):
        if stored[i].dtype == jnp.uint8:
            codes[field(path)] = None
        elif owner is not None and stored[i].size == WIDTH**2:
            floats[field(path)] = field(reasons[i])
    return {
        "stored": list(codes),
        "floats": [f"{name}: {reason}" for name, reason in floats.items()],
    }


def survey_table(runs: pd.DataFrame) -> str:
    """Returns what is stored of each optimizer, and what it changes, Markdown.

    Args:
      runs: records, as read.
    """
    table = pd.DataFrame(
        {
            "optimizer": [f"`{name}`" for name in runs["optimizer"]],
            "stored": [", ".join(x) or "nothing" for x in runs["stored"]],
            "left as floats": [_by_reason(x) for x in runs["floats"]],
            "loss": [f"{x:.3f}" for x in runs["loss"]],
            "update": [f"{x:.3f}" for x in runs["update"]],
        }
    )
    return markdown(table)


def _by_reason(floats: list[str]) -> str:
    """``name: reason`` of several fields, with each reason once."""
    names: dict[str, list[str]] = {}
    for text in floats:
        name, reason = text.split(": ", 1)
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(of)}: {reason}" for reason, of in names.items())


survey_report = Report("survey", survey_table)
