"""optax's own tests of its contributed optimizers and of sharding, run on ours.

The modules are shipped in optax's wheel. Their tables of optimizers are replaced just
before their test classes are built, so what runs is upstream's code, unchanged.
"""

import ast
import collections
import pathlib
import re
import types
import unittest
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Madam as published: a weight keeps its sign and never leaves zero.
PAPER = {"learning_rate": 0.01}
# Additive up to the scale of a leaf at init, so a weight can cross zero. The bound
# and the scale of leaves that start at zero make room for upstream's largest target,
# 4. A constant rate ends in a jitter of its own size, well within upstream's 3e-2.
FLOORED = {"learning_rate": 1e-3, "floor": 1.0, "p_scale": 5.0, "zero_init_scale": 1.0}
FIRST_MOMENT = {**FLOORED, "b1": 0.9}
LOW_BIT_MOMENTS = {**FIRST_MOMENT, "moment_format": madax.MomentFormat(bits=8)}
# Muon's targets are vectors, which take Adam's steps.
MUON = {"learning_rate": 1e-2}

# The number of upstream's cases for each optimizer, by test, in optax 0.2.7 and 0.2.8.
CASES = {
    "test_optimizers_accept_extra_args": 2,
    "test_optimizers": 4,
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": 1,
    "test_preserve_dtype": 2,
    "test_gradient_accumulation": 2,
    "test_state_shape_dtype_shard_stability": 4,
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": 1,
}


def optax_version():
    return tuple(int(n) for n in re.findall(r"\d+", optax.__version__)[:3])


def load_upstream(path, patch, transform=lambda tree: tree):
    """Executes one of optax's test modules, patched just before its first class.

    Returns None where the installed optax does not ship that module.
    """
    file = pathlib.Path(optax.__file__).parent / path
    if not file.exists():
        return None
    tree = transform(ast.parse(file.read_text(), str(file)))
    module = types.ModuleType(__name__)
    patched = False
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not patched:
            patch(module)
            patched = True
        code = compile(ast.Module([node], type_ignores=[]), str(file), "exec")
        exec(code, vars(module))
    return module


def upstream_class(opt_kwargs, setup=lambda target: target, name="madam"):
    row = {
        "opt_name": name,
        "opt_kwargs": opt_kwargs,
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }

    def patch(module):
        assert callable(module._get_opt_factory)
        module._get_opt_factory = lambda name: getattr(madax, name)
        for table in ("_ALL_OPTIMIZERS_UNDER_TEST", "_MAIN_OPTIMIZERS_UNDER_TEST"):
            assert isinstance(getattr(module, table), tuple)
            setattr(module, table, (row,))
        for name in [name for name in vars(module) if name.startswith("_setup_")]:
            setattr(module, name, setup(getattr(module, name)))

    module = load_upstream("contrib/_common_test.py", patch)
    if module is None:
        return type("NotShipped", (unittest.TestCase,), {})

    class NoSkips(module.ContribTest):
        def skipTest(self, reason):  # noqa: N802
            if "pmap" in reason:  # chex's variants, in optax < 0.2.7
                super().skipTest(reason)
            self.fail(f"upstream skipped a case: {reason}")

    return NoSkips


def cases(test_class):
    return unittest.TestLoader().getTestCaseNames(test_class)


def converges(case):
    """Whether a case is one of upstream's four convergence targets."""
    return re.fullmatch(r"test_optimizers\d+", case) is not None


def only(test_class, keep):
    """``test_class`` with no cases but those that ``keep`` accepts."""
    dropped = {case: None for case in cases(test_class) if not keep(case)}
    return type(test_class)(test_class.__name__, (test_class,), dropped)


def same_signs(target):
    """A target whose start a multiplicative update can leave for its end.

    Magnitudes are upstream's and signs the end's: the parabola's start becomes
    (1, -10, 1). What starts at zero, in the other three, starts at half its end, and
    at 0.5 where the end is zero too, to be approached exponentially.
    """

    def start(initial, final):
        magnitude = jnp.where(
            initial != 0,
            jnp.abs(initial),
            jnp.where(final != 0, jnp.abs(final) / 2, 0.5),
        )
        return jnp.where(final < 0, -magnitude, magnitude).astype(initial.dtype)

    def setup(dtype):
        initial, final, objective = target(dtype)
        return jax.tree.map(start, initial, final), final, objective

    return setup


class TestMadam(only(upstream_class(PAPER), lambda case: not converges(case))):
    """All but the convergence targets, which start at zero or change signs."""


class TestMadamConvergesFromSameSigns(
    only(upstream_class(PAPER, same_signs), converges)
):
    """The convergence targets: upstream's length and tolerance, other starts."""


@pytest.mark.filterwarnings("ignore:.*not clear which axes")
class TestMuon(upstream_class(MUON, name="muon")):
    """Everything, unchanged."""


@pytest.mark.nightly
class TestFlooredMadam(upstream_class(FLOORED)):
    """Everything, unchanged."""


@pytest.mark.nightly
class TestMadamWithFirstMoment(upstream_class(FIRST_MOMENT)):
    """Everything, unchanged."""


@pytest.mark.nightly
class TestMadamWithLowBitMoments(upstream_class(LOW_BIT_MOMENTS)):
    """Everything, unchanged."""


def count(*test_classes):
    """How many cases of each of upstream's tests the classes hold."""
    names = [case for test_class in test_classes for case in cases(test_class)]
    return collections.Counter(
        max((test for test in CASES if name.startswith(test)), key=len, default=name)
        for name in names
    )


def test_every_case_of_upstream_is_run():
    whole = count(upstream_class(PAPER))
    if not whole:
        pytest.skip(f"optax {optax.__version__} does not ship its common tests")
    if (0, 2, 7) <= optax_version() <= (0, 2, 8):
        assert whole == CASES
        assert whole.total() == 16
    assert whole >= collections.Counter(CASES)
    assert count(TestMadam, TestMadamConvergesFromSameSigns) == whole
    targets = {"test_optimizers": whole["test_optimizers"]}
    assert count(TestMadamConvergesFromSameSigns) == targets
    assert count(TestMuon) == whole
    assert count(TestFlooredMadam) == whole
    assert count(TestMadamWithFirstMoment) == whole
    assert count(TestMadamWithLowBitMoments) == whole


def test_upstream_skips_none_of_its_cases():
    """Nor the one that is for a rate whose annotation says that it may be a schedule.

    The other cases fail where they would be skipped.
    """
    result = unittest.TestResult()
    for case in cases(TestMadam):
        if "schedule_if_type_annotated" in case:
            TestMadam(case).run(result)
    assert (len(result.failures), len(result.errors), len(result.skipped)) == (0, 0, 0)
    assert result.testsRun == bool(cases(TestMadam))


# --- sharding -------------------------------------------------------------------------

SHARDED = {
    "low_bit_moments": madax.madam(
        0.01, b1=0.9, moment_format=madax.MomentFormat(bits=8)
    ),
    "lns_madam": madax.papers.lns_madam(),
    "muon": madax.muon(
        moment_format=madax.MomentFormat(bits=8),
        # Upstream's stack has no name that tells its axes.
        matrices=lambda path, leaf: madax.transforms.MatrixDimensionNumbers(1, 2),
    ),
}


class TrueVersions(ast.NodeTransformer):
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


def upstream_sharding(path, *tables):
    """Upstream's sharding tests of our optimizers; none where they are not shipped."""

    def patch(module):
        for table in tables:
            assert isinstance(getattr(module, table), dict)
            setattr(module, table, SHARDED)

    def mend(tree):
        return ast.fix_missing_locations(TrueVersions().visit(tree))

    with warnings.catch_warnings():
        # From their own table, of optax.noisy_sgd.
        warnings.filterwarnings("ignore", "Specifying a key", UserWarning)
        module = load_upstream(path, patch, mend)
    if module is None:
        return unittest.TestCase
    (base,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    ]
    ours = {}
    for case in cases(base):
        abstract = case.startswith("test_init_with_abstract_input")
        if abstract and not case.endswith("_muon"):
            ours[case] = documented_error(getattr(base, case))
        elif "microbatch" in case:  # not about optimizers
            ours[case] = None
    return type(base)(base.__name__, (base,), ours)


def documented_error(upstream_case):
    """Init reads the weights: from their shapes alone it raises, and says what to do.

    Upstream leaves its own value-dependent optimizers out of this test.
    """

    def case(self):
        with self.assertRaisesRegex(TypeError, r"jax\.eval_shape\(tx\.init, params\)"):
            upstream_case(self)

    return case


class TestSharding(upstream_sharding("_src/sharding_test.py", "OPTIMIZERS")):
    """Everything, unchanged."""


class TestContribSharding(
    upstream_sharding(
        "contrib/_sharding_test.py", "ABSTRACT_INIT_OPTIMIZERS", "SHARDING_OPTIMIZERS"
    )
):
    """Everything, unchanged."""


def test_every_sharding_case_of_upstream_is_run():
    if not cases(TestSharding):
        pytest.skip(f"optax {optax.__version__} does not ship its sharding tests")
    for test in (
        "test_init_with_abstract_input",
        "test_state_sharding_type_init_match_update",
        "test_state_sharding_type_preserved_with_jit",
    ):
        found = [name for name in cases(TestSharding) if name.startswith(test)]
        assert len(found) == len(SHARDED)
