"""Madam on a mesh of eight devices: optax's sharding tests, and our own.

A process has as many CPU devices as it started with, so the cases run in a second
one, this file as a script, and are reported one by one in the first.
"""

import ast
import functools
import itertools
import json
import pathlib
import re
import sys
import unittest
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_optax_suite import load_upstream

import madax

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond p_scale")
VARIANTS = {
    "madam": madax.madam(0.01),
    "floored": madax.madam(
        optax.linear_schedule(0.05, 0.0, 20), b1=0.9, floor=1.0, p_scale=1.5
    ),
    "low_bit_moments": madax.madam(
        0.01, b1=0.9, moment_format=madax.MomentFormat(bits=8)
    ),
    "lns_madam": madax.lns_madam(),
}
NATIVE = madax.madam(0.01, moment_format=madax.MomentFormat(bits=8))
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
# Sharding in types, as upstream's own tests have it.
SKIPPABLE = jax.__version_info__ < (0, 7, 2)
NNX_SKIPPABLE = tuple(map(int, flax.__version__.split(".")[:2])) < (0, 12)


class _TrueVersions(ast.NodeTransformer):
    """Mends what in upstream's module would skip its cases, or touch our process."""

    def visit_Compare(self, node):
        # As strings, "0.10.2" < "0.7.2", so optax 0.2.8 skips itself on jax 0.10.
        if ast.unparse(node.left) == "jax.__version__":
            numbers = re.findall(r"\d+", ast.literal_eval(node.comparators[0]))
            version = tuple(int(n) for n in numbers)
            return ast.parse(f"jax.__version_info__ < {version}", mode="eval").body
        return node

    def visit_Assign(self, node):
        return None if ast.unparse(node.targets[0]).startswith("os.environ") else node


def _mend(tree):
    return ast.fix_missing_locations(_TrueVersions().visit(tree))


def _upstream(path, *tables):
    """Upstream's sharding tests of our optimizers, or None where not shipped."""

    def patch(module):
        for table in tables:
            assert isinstance(getattr(module, table), dict)
            setattr(module, table, VARIANTS)

    with warnings.catch_warnings():
        # From their own table, of optax.noisy_sgd.
        warnings.filterwarnings("ignore", "Specifying a key", UserWarning)
        module = load_upstream(path, patch, _mend)
    if module is None:
        return None
    (base,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    ]
    ours = {}
    for case in unittest.TestLoader().getTestCaseNames(base):
        if case.startswith("test_init_with_abstract_input"):
            ours[case] = _documented_error(getattr(base, case))
        elif "microbatch" in case:  # not about optimizers
            ours[case] = None
    return type(base)(base.__name__, (base,), ours)


def _documented_error(upstream_case):
    """Init reads the weights: from their shapes alone it raises, and says what to do.

    Upstream leaves its own value-dependent optimizers out of this test.
    """

    def case(self):
        with self.assertRaisesRegex(TypeError, r"jax\.eval_shape\(tx\.init, params\)"):
            upstream_case(self)

    return case


# Fully sharded (FSDP): every leaf is split along an axis that eight divides.
SPECS = {
    "bias": P("x"),
    "conv": P(None, None, None, "x"),
    "gate": P(),
    "kernel": P("x", None),
    "zero": P("x"),
}
SHAPES = {
    "bias": (8,),
    "conv": (3, 3, 4, 16),
    "gate": (),
    "kernel": (16, 24),
    "zero": (32,),
}


def random_params(gaussian=False):
    """Weights in steps of 1/8 of the largest, so that the sum of their squares,
    and with it the rms, is exact: it cannot depend on who adds up what."""
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in SHAPES.items():
        w = rng.normal(size=shape) if gaussian else rng.integers(-8, 9, shape) / 8
        params[name] = np.asarray(w / 4, np.float32)
        if not gaussian:
            params[name].flat[0] = 0.25
    params["zero"] = np.zeros(SHAPES["zero"], np.float32)
    return params


def random_grads():
    rng = np.random.default_rng(1)
    return [
        {name: np.float32(rng.normal(size=s)) for name, s in SHAPES.items()}
        for _ in range(20)
    ]


@jax.jit
def quantized(params):
    return madax.quantize_params(params, madax.LogFormat(bits=16, base_step=0.001))


def train(tx, params, grads, place):
    """Twenty steps from ``params``, in place, on gradients put where ``place`` says."""
    state = tx.init(params)

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for g in grads:
        params, state = step(params, state, jax.tree.map(place, g, SPECS))
    return params, state


def on_one_device(x, spec):
    del spec
    return jax.device_put(x, jax.devices()[0])


def on_mesh(mesh):
    return lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))


@functools.cache
def trained_on_one_device(name, gaussian=False):
    params = jax.tree.map(on_one_device, random_params(gaussian), SPECS)
    if name == "codes":
        return train(NATIVE, quantized(params), random_grads(), on_one_device)
    return train(VARIANTS[name], params, random_grads(), on_one_device)


def clip_state(trained):
    _, state = trained
    (found,) = [s for s in state if isinstance(s, madax.ClipLogWeightsState)]
    return found


def dense(n_in, n_out, rngs):
    kernel = nnx.initializers.lecun_normal()
    return nnx.Linear(
        n_in,
        n_out,
        kernel_init=nnx.with_partitioning(kernel, (None, "x")),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros, ("x",)),
        rngs=rngs,
    )


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = dense(16, 32, rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.last = dense(32, 8, rngs)
        self.gate = nnx.Param(jnp.zeros(()))

    def __call__(self, x):
        h = nnx.relu(self.norm(jax.sharding.reshard(self.first(x), P())))
        return self.last(h) * (1 + self.gate[...])


@nnx.jit
def nnx_step(model, optimizer, x, y):
    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def trained_nnx():
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, madax.madam(0.02), wrt=nnx.Param)
    losses = [float(nnx_step(model, optimizer, x, np.sin(x[:, :8]))) for _ in range(20)]
    return model, optimizer, losses


@functools.cache
def losses_on_one_device():
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))):
        return trained_nnx()[2]


def named(*values):
    """Names for absl's cases, from the product of lists of values."""
    return [("_" + "_".join(v), *v) for v in itertools.product(*values)]


class EightDevices(parameterized.TestCase):
    __test__ = False  # pytest runs it through test_on_eight_devices

    def enter(self, axis_type):
        if SKIPPABLE:
            self.skipTest("needs jax 0.7.2, as upstream's sharding tests do")
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AXIS_TYPES[axis_type],))
        context = jax.set_mesh(mesh)
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return mesh

    def test_there_are_eight_devices(self):
        self.assertLen(jax.devices(), 8)

    @parameterized.named_parameters(*named(VARIANTS, AXIS_TYPES))
    def test_steps_are_those_of_one_device_bit_for_bit(self, name, axis_type):
        start = random_params()
        expected = trained_on_one_device(name)
        for leaf in ("kernel", "conv", "bias", "zero"):
            self.assertGreater(np.mean(expected[0][leaf] != start[leaf]), 0.8)
        place = on_mesh(self.enter(axis_type))
        actual = train(
            VARIANTS[name], jax.tree.map(place, start, SPECS), random_grads(), place
        )
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    @parameterized.named_parameters(*named(AXIS_TYPES))
    def test_steps_of_codes_are_those_of_one_device_bit_for_bit(self, axis_type):
        start = quantized(random_params())
        expected = trained_on_one_device("codes")
        for leaf in ("kernel", "conv"):
            self.assertIsInstance(expected[0][leaf], madax.QuantizedArray)
            changed = expected[0][leaf].codes != start[leaf].codes
            self.assertGreater(np.mean(changed), 0.9)
        place = on_mesh(self.enter(axis_type))
        params = jax.tree.map(place, random_params(), SPECS)
        actual = train(NATIVE, quantized(params), random_grads(), place)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        codes = actual[0]["kernel"].codes
        self.assertEqual(codes.sharding.shard_shape(codes.shape), (2, 24))

    @parameterized.named_parameters(*named(["floored"], AXIS_TYPES))
    def test_any_weights(self, name, axis_type):
        # Here the rms at init depends on the order of a sum, by a rounding.
        expected = trained_on_one_device(name, gaussian=True)
        place = on_mesh(self.enter(axis_type))
        params = jax.tree.map(place, random_params(gaussian=True), SPECS)
        actual = train(VARIANTS[name], params, random_grads(), place)
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7),
            actual,
            expected,
        )
        np.testing.assert_allclose(
            clip_state(actual).rms0, clip_state(expected).rms0, rtol=2**-22
        )

    # Not init under jit with Auto axes: zeros depend on no input, so a compiler that
    # chooses the shardings is free to replicate them, and does, optax.adam's too.
    @parameterized.named_parameters(
        *named(VARIANTS, ["auto"], ["eager"]),
        *named(VARIANTS, ["explicit"], ["eager", "jit"]),
    )
    def test_moments_are_placed_like_the_params(self, name, axis_type, how):
        mesh = self.enter(axis_type)
        params = jax.tree.map(on_mesh(mesh), random_params(), SPECS)
        init = VARIANTS[name].init
        state = (jax.jit(init) if how == "jit" else init)(params)[0]
        for moment in (state.v, state.m):
            for leaf, values in (moment or {}).items():
                expected = params[leaf].sharding
                self.assertTrue(
                    values.sharding.is_equivalent_to(expected, values.ndim),
                    f"{leaf}: {values.sharding}, not {expected}",
                )

    @parameterized.named_parameters(*named(VARIANTS, ["eager", "jit"]))
    def test_zero_params_and_gradients_stay_finite(self, name, how):
        # Upstream's own cases have zeros throughout and compare types only.
        mesh = self.enter("explicit")
        maybe_jit = jax.jit if how == "jit" else lambda fn: fn
        tx = VARIANTS[name]
        sharding = NamedSharding(mesh, P(None, "x"))
        zeros = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=sharding)
        state = maybe_jit(tx.init)(zeros)
        updates, state = maybe_jit(tx.update)(zeros, state, zeros)
        for leaf in jax.tree.leaves((updates, state)):
            self.assertTrue(np.all(np.isfinite(np.asarray(leaf))))
        np.testing.assert_array_equal(updates, zeros)

    @parameterized.named_parameters(*named(VARIANTS))
    def test_shapes_of_the_state_come_from_eval_shape(self, name):
        shapes = {"w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)}
        values = {"w": jnp.ones((16, 8), jnp.bfloat16)}
        expected = jax.tree.map(jnp.shape, VARIANTS[name].init(values))
        actual = jax.eval_shape(VARIANTS[name].init, shapes)
        self.assertEqual(jax.tree.map(jnp.shape, actual), expected)

    @parameterized.named_parameters(*named(AXIS_TYPES))
    def test_nnx_model_and_optimizer(self, axis_type):
        self.enter(axis_type)
        if NNX_SKIPPABLE:
            self.skipTest("needs flax 0.12, which shards parameters as they are made")
        model, optimizer, losses = trained_nnx()
        np.testing.assert_allclose(losses, losses_on_one_device(), rtol=1e-3)
        self.assertLess(losses[-1], 0.7 * losses[0])
        kernel = model.first.kernel[...]
        self.assertEqual(kernel.sharding.shard_shape(kernel.shape), (16, 4))
        v = optimizer.opt_state[0].v["first"]["kernel"][...]
        self.assertTrue(v.sharding.is_equivalent_to(kernel.sharding, 2))


SUITES = {
    "upstream": _upstream("_src/sharding_test.py", "OPTIMIZERS"),
    "upstream_contrib": _upstream(
        "contrib/_sharding_test.py", "ABSTRACT_INIT_OPTIMIZERS", "SHARDING_OPTIMIZERS"
    ),
    "own": EightDevices,
}
CASES = [
    (suite, case)
    for suite, test_class in SUITES.items()
    if test_class is not None
    for case in unittest.TestLoader().getTestCaseNames(test_class)
]


def run_here():
    """Runs every case; its outcome, and what to say about it, by name."""
    outcomes = {}
    for suite, case in CASES:
        result = unittest.TestResult()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SUITES[suite](case).run(result)
        bad = [text for _, text in result.errors + result.failures]
        if bad:
            outcome = ["failed", "\n".join(bad)]
        elif result.skipped:
            outcome = ["skipped", result.skipped[0][1]]
        else:
            outcome = ["passed", ""]
        outcomes[f"{suite}.{case}"] = outcome
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    def make(path):
        processes.finish(processes.start(__file__, path, devices=8))

    path = processes.once(tmp_path_factory, "optax_sharding.json", make)
    return json.loads(path.read_text())


@pytest.mark.parametrize(("suite", "case"), CASES)
def test_on_eight_devices(outcomes, suite, case):
    outcome, text = outcomes[f"{suite}.{case}"]
    if outcome == "skipped" and (SKIPPABLE or (NNX_SKIPPABLE and "nnx" in case)):
        pytest.skip(text)
    assert outcome == "passed", text


def test_every_case_is_run(outcomes):
    assert list(outcomes) == [f"{suite}.{case}" for suite, case in CASES]
    if SUITES["upstream"] is None:
        pytest.skip(f"optax {optax.__version__} does not ship its sharding tests")
    for test in (
        "test_init_with_abstract_input",
        "test_state_sharding_type_init_match_update",
        "test_state_sharding_type_preserved_with_jit",
    ):
        run = [
            name
            for name, (outcome, _) in outcomes.items()
            if name.startswith(f"upstream.{test}") and outcome != "skipped"
        ]
        assert len(run) == len(VARIANTS) or SKIPPABLE


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(json.dumps(run_here()))
