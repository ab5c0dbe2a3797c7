"""Mistakes put into madax one at a time: make test must fail of each.

::

    python tests/lib/mutants.py           # all of them: an hour or two
    python tests/lib/mutants.py clip 12   # those of a file, or of a number

Each is tried on a copy: by the files most likely to find it, and what is then alive, at
the end, by all of ``make test``. It is an error if a text to change is not there.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]

# file of madax: (text that is there once, what it becomes, test files to try first)
MUTANTS = {
    "_checks": [
        ("and not jnp.issubdtype(value.dtype, np.unsignedinteger)", "", "bad_input"),
        (">= 2**31:", ">= 2**62:", "bad_input"),
        ("3.4e38 < abs", "1e308 < abs", "bad_input"),
        ("return (x >= 0) & (x < math.inf)", "return x > 0", "bad_input"),
        ("(x >= 0) & (x < 1), rule", "(x >= 0) & (x <= 1), rule", "bad_input"),
        ("return _or_nan(value, ok)", "return value", "faults"),
        ("lambda x: x > 0, f", "lambda x: x >= 0, f", "bad_input"),
        ("lowest * (1 - 1e-5)", "lowest * (1 - 0.5)", "bad_input_formats"),
        ("or np.shape(seed) != ()\n", "", "bad_input_formats"),
        ("if jnp.issubdtype(dtype, jnp.complexfloating):", "if False:", "bad_input"),
    ],
    "_format": [
        ("jnp.round(self.encode(x))", "jnp.floor(self.encode(x))", "quantized bbit"),
        ("jnp.int8 if self.bits <= 8", "jnp.int8 if self.bits < 8", "formats"),
        ("return jnp.dtype(jnp.int32)", "return jnp.dtype(jnp.int16)", "with fuzz"),
    ],
    "_formats": [
        ("jnp.clip(magnitude, 1, self.levels)\n\n", "magnitude\n\n", "formats"),
        ("(jnp.abs(c) - self.levels)", "(jnp.abs(c) - self.levels + 1)", "formats"),
        ("new_sign == sign", "new_sign != sign", "formats"),
        ("jnp.where(code == 0, self.levels", "jnp.where(code == 0, 0", "formats with"),
        (
            "jnp.clip(beyond, -self.levels, 1)",
            "jnp.clip(beyond, -self.levels, 0)",
            "formats",
        ),
        ("steps = levels_of(bits) - 1", "steps = levels_of(bits)", "formats"),
        ("cls(bits, math.log(2) / gamma)", "cls(bits, 1 / gamma)", "formats"),
        ("linear_range) / self.levels", "linear_range) / (self.levels + 1)", "formats"),
        ("ratio = u * slope * decay", "ratio = u * slope", "formats"),
        ("jnp.where(code < 0, -1, 1)", "jnp.where(code < 0, 1, 1)", "formats"),
        ("(c != 0) & jnp.isfinite(d)", "jnp.isfinite(d)", "formats"),
        ("return x / _root(x)", "return x", "weight_decay"),
    ],
    "_leaves": [
        ("largest - float(info.eps) * 2.0 ** (exponent - 1)", "largest", "faults"),
        ("vector.shape != entries(len(floats))", "False", "bad_input_formats"),
        ("(leaves,) if leaves else ()", "(leaves,)", "checkpoint"),
        ("== jnp.float64\n", "== jnp.int8\n", "dtypes"),
        ("bits > 0 if x", "bits > 1 if x", "compiled"),
    ],
    "_scales": [
        ("if not np.isfinite(value):", "if False:", "bad_input"),
        ("jnp.full_like(peak, 0.25)", "0 * peak", "quantized_array"),
        ("jnp.sum(digit.astype(jnp.uint32)", "jnp.sum(digit", "meshes many_weights"),
        ("jnp.where(peak > 1, 0.125, 1.0)", "jnp.ones_like(peak)", "faults"),
        ("2 * power <= largest", "False", "properties"),
    ],
    "_numerics": [
        (
            "moment - rounded(rate * moment) + rounded(rate * x)",
            "moment - rate * moment + rate * x",
            "same_bits meshes",
        ),
        ("jnp.clip(x, -87.0, 88.0)", "jnp.clip(x, -87.0, 89.0)", "numerics"),
        (
            "bits = jnp.minimum(bits, np.iinfo(bits_dtype).max - 1)",
            "",
            "same_bits meshes",
        ),
        ("exponent == 0, x, mantissa - 1", "exponent == 0, x, x", "numerics"),
        ("exponent == 0, x,", "exponent == 9, x,", "numerics formats"),
        ("jnp.where(scale > 1, 0.125, 1.0)", "jnp.ones_like(scale)", "faults with"),
        ("ans, value, stored: tangents[0]", "*_: 0 * tangents[0]", "derivatives"),
        ("lambda ans, x: 1 / (1 + x)", "lambda ans, x: 1 / x", "derivatives"),
        ("jnp.float32(1.5 * 2**23)", "jnp.float32(2**23)", "numerics"),
        ("0.6691226031125902", "0.6692", "numerics"),
        ("0.5 * (e + rounded(e * decay))", "0.5 * (e + e)", "numerics"),
        ("& (moved > 0) & (x != 0)", "& (x != 0)", "formats with"),
        ("& (moved > 0) & (x != 0)", "& (moved > 0)", "formats with"),
        ("0.5 * (ans / root)", "(ans / root)", "derivatives"),
    ],
    "_rounding": [
        ("* 2.0**-32", "* 2.0**-32 + 1e-4", "rounding"),
        ("+ column) * np.uint32(0x9E3779B9)", "+ column)", "rounding"),
        (", axis) * stride", ", axis)", "rounding"),
        ("for counter in (count, seed):", "for counter in (count, count):", "rounding"),
        ("blake2s(name.encode()", "blake2s(b''", "rounding"),
        ("keys if layer is None else", "keys if True else", "rounding"),
        ("where.where(there, _mix", "where.where(~there, _mix", "rounding"),
        ("x = (x ^ (x >> 14))", "x = (x ^ (x >> 31))", "rounding"),
    ],
    "_moments": [
        ("- _BIAS + 1) >> 1", "- _BIAS) >> 1", "moments"),
        ("(chance * smallest < x)", "(0.5 * smallest < x)", "moments"),
        ("pattern += octaves << _MANTISSA", "pass", "moments"),
        ("| (count % _INTERVAL == 0)", "", "moments"),
        ("rate > _FASTEST", "rate > 1", "moments"),
        ("jnp.where(fast, 0, octaves)", "octaves", "moments"),
        ("0.5 * 0.7213", "0.0 * 0.7213", "moments"),
        ("bits.astype(jnp.int32) & (", "0 & (", "moments"),
        ("_BELOW = 54", "_BELOW = 40", "moments"),
    ],
    "_second_moment": [
        (
            "ok = g * g < jnp.inf\n        v",
            "ok = jnp.isfinite(g)\n        v",
            "faults",
        ),
        ("correction = jnp.sqrt(bias)", "correction = bias", "oracle"),
        ("correction /= _bias_correction(b1, count)", "pass", "oracle"),
        ("ok & (v > 0)", "ok", "faults fuzz oracle"),
        ("jnp.clip(code, 0, self.format.highest_v)", "code", "moments"),
        ("fits & (stored <= self.highest)", "fits", "moments"),
        ("0 * correction)", "0)", "faults"),
        ("exp(-0.375 * noise)", "exp(-0.0 * noise)", "moments"),
        ("if made_for != wanted:", "if False:", "moments checkpoint"),
    ],
    "_sign_log": [
        ("jnp.where(x < 0, -d, d)", "d", "oracle"),
        ("skips else d, -_LARGEST, _LARGEST)", "skips else d, -1e3, 1e3)", "faults"),
        ("jnp.where(zero_init, 1.0, floor)", "floor", "oracle"),
        ("jnp.where(jnp.isfinite(d), d, 0) if skips else d", "d", "oracle faults"),
        ("stacklevel=3", "stacklevel=2", "bad_input"),
        ("jnp.finfo(rms0.dtype).max / 128", "jnp.inf", "faults"),
    ],
    "_clip": [
        (
            "return jnp.maximum(3 * rms0, peak0)",
            "return 3 * rms0",
            "pretrained",
        ),
        (
            "return within(u, -bound - x, bound - x)",
            "return 0.9 * within(u, -bound - x, bound - x)",
            "properties oracle",
        ),
        ("jnp.where(bound >= 0, u.astype(x.dtype), jnp.nan)", "u", "faults"),
        ("free = _are_vectors(paths, leaves)", "", "growth oracle"),
        ("jnp.where(state.peak0 > 0, bounds, jnp.inf)", "bounds", "growth oracle"),
    ],
    "_quantize_params": [
        ("jnp.maximum(3 * rms, peak) if", "3 * rms if", "quantize_defaults"),
        (
            "jnp.where(rms == 0, jnp.max(bound, initial=0), bound)",
            "bound",
            "quantize_d",
        ),
        ("if axis not in channels", "if axis in channels", "quantized_array"),
        ("np.ndim(leaf) >= 2", "np.ndim(leaf) >= 1", "quantized"),
        ("np.size(leaf) >= 16", "np.size(leaf) >= 15", "quantized"),
        (
            "if facts.lowest > 0 and facts.highest < np.inf:",
            "if True:",
            "bad_input_formats",
        ),
        ("format.nearest(x)", "format.nearest(0.9 * x)", "quantized"),
    ],
    "_quantized_array": [
        ("return codes == format.step_dtype", "return True", "wrappers_training"),
        ("codes == format.storage_dtype and", "True and", "wrappers_training"),
        ('f"codes:{self.format!r}"', '"codes"', "checkpoint quantized"),
        (
            "rounded(scale * self.format.decode(self.codes))",
            "scale * self.format.decode(self.codes)",
            "same_bits many_weights",
        ),
        ("if scales == size:", "if True:", "codes_as_weights"),
        ("jnp.result_type(i), bool)", "jnp.result_type(i), str)", "codes_as"),
        ("__array_priority__ = 100", "__array_priority__ = -100", "codes_as"),
        ("self._at(index).dequantize()", "self.dequantize()[index]", "codes_as"),
        ("if self.codes.dtype == self.format.step_dtype:", "if False:", "codes_as"),
        ("dtypes[0] == jax.dtypes.float0", "False", "grad"),
        ('if not hasattr(self.codes, "dtype"):', "if False:", "freezing"),
        ('if "flax.serialization" in sys.modules:', "if False:", "saving"),
        ("let_variables_decode()\n", "let_variables_decode\n", "array_functions"),
        ("self.scale > 0", "self.scale == self.scale", "trees_of_codes"),
        ("if codes is None and", "if False and", "trees_of_codes"),
        ("scale in (np.float32, float)", "True", "trees_of_codes"),
    ],
    "_error_feedback": [
        ("rises = (last > 0)", "rises = (last < 0)", "error"),
        ("(now * decay > last)", "(now > last)", "error"),
        ("jnp.where(now > 0, now, last)", "now", "error"),
        (
            "jnp.clip(rounded(widen(u)), -w.scale - value, w.scale - value)",
            "widen(u)",
            "error",
        ),
        ("(wanted - moved) * (1 - widen(decay))", "(wanted - moved)", "error"),
        ("(slope != 0) & jnp.isfinite(u) & jnp.isfinite(after)", "slope != 0", "error"),
    ],
    "_momentum": [
        ("return []", "return [value] * treedef.num_leaves", "error"),
        ("all(isinstance(m, kinds) for m in field[2])", "True", "error"),
    ],
    "_feedback_checks": [
        ("if tangent not in updates[i]:", "if False:", "error"),
        ("if any(j < len(places) for j in updates[i]):", "if False:", "error"),
        ("            if tangent in x:", "            if False:", "error"),
    ],
    "_tracing": [
        ("elementwise = eqn.primitive.name in", "elementwise = True or", "error"),
        ("found if elementwise and same", "found if elementwise", "error"),
    ],
    "_with_quantized_params": [
        ("jnp.sign(value)", "jnp.sign(w.codes)", "with"),
        ("steps = steps - rounded(bend", "steps = steps - 0 * rounded(bend", "error"),
        ("optax.safe_increment(state.count)", "state.count", "with"),
    ],
    "_lns_quantize": [
        ("jnp.where(jnp.isfinite(u), widen(u), 0)", "widen(u)", "with faults"),
        ("jnp.where(jnp.isfinite(steps), within", "jnp.where(True, within", "faults"),
        ("jnp.where(on_grid, step, moved - value)", "step", "bbit"),
        ("jnp.where(scale == 0, u", "jnp.where(False, u", "bbit faults"),
        ("jnp.where(jnp.isnan(u), u, to_target)", "to_target", "faults"),
        ("scale = jnp.minimum(scale, jnp.finfo(scale.dtype).max)", "", "faults"),
        ("if dtype.itemsize > 2:", "if True:", "rounding many_weights"),
        (
            "jnp.maximum(jnp.abs(x + u), finest)",
            "jnp.abs(x + u)",
            "many_weights faults",
        ),
        ("(254 << 23) - spacing", "(253 << 23) - spacing", "dtypes many_weights"),
        ("optax.safe_increment(state.count)", "state.count", "faults"),
    ],
    "_fake_quantize": [
        ("jnp.max(jnp.abs(wide), initial=0)", "jnp.max(wide, initial=0)", "fake"),
        ("if backward_format is None:", "if True:", "fake"),
        ("format.decode(code)).astype(x.dtype)", "format.decode(code))", "fake"),
    ],
    "_grad": [
        (
            "return without_probes(fun(*given, **kwargs), weights)",
            "return fun(*given, **kwargs)",
            "grad",
        ),
        ("if any(isinstance(w, ProbedArray) for w in weights):", "if False:", "grad"),
        ("[zeros_like(w, dtype) if", "[zeros_like(w) if", "grad"),
        ("return (grads, value[1]) if has_aux else grads", "return grads", "grad"),
        ("if not -len(args) <= i < len(args):", "if False:", "grad"),
    ],
    "_probes": [
        ("w.probe.astype(probe.dtype) + probe", "probe", "grad"),
        (", self.probe[index])", ", self.probe)", "grad"),
        ("straight_through(self.probe, super()", "(super()", "grad"),
        ("_shifted(self.probe, 1)", "self.probe", "trees_of_codes"),
        ("== jax.dtypes.float0:", "is None:", "trees_of_codes"),
    ],
    "_flax": [
        (
            "nnx.update(module, without_probes(nnx.state(module), weights))",
            "pass",
            "flax_codes",
        ),
        ("predicates[path[0]]", "predicates[0]", "flax_codes"),
        ("given[i], array, is_leaf=_is_leaf)", "given[i], array)", "flax_codes"),
    ],
    "_aliases": [
        ("optax.clip(g_bound),\n        *decay", "*decay", "oracle"),
        (
            "zero_init_scale=zero_init_scale),\n        lns_quantize(rounding=rounding",
            "),\n        lns_quantize(rounding=rounding",
            "oracle",
        ),
        ("rounding=rounding, seed=seed", "rounding=rounding", "native rounding"),
        (
            "moment_format=moment_format, seed=seed",
            "moment_format=moment_format",
            "moments",
        ),
        (
            "xp.abs(rate) / base_step), 1)",
            "xp.abs(rate) / base_step), 0)",
            "bbit",
        ),
        ("learning_rate(count) * math.log(2)", "learning_rate(count)", "bbit"),
        ("else learning_rate * math.log(2)", "else learning_rate", "bbit"),
    ],
    "_weight_decay": [
        (
            "jnp.where(jnp.abs(x) > floor, jnp.sign(x), in_floors)",
            "jnp.sign(x)",
            "weight",
        ),
        ("weight_decay * _relative_step(w, f)", "weight_decay * f", "weight_decay"),
    ],
    "_saving": [
        ('if f"{path}scale" not in arrays:', "if False:", "saving"),
        ("if parts.keys() != target.parts().keys():", "if False:", "saving"),
        ("codes.dtype != format.storage_dtype or", "", "saving"),
        ("| (codes < -format.levels)", "", "saving"),
        ("(scale > 0) & (scale < np.inf)", "scale > 0", "saving"),
        ("if above in leaves and", "if False and", "saving"),
        ("if name in scales:", "if False:", "saving"),
        ("if same else array", "", "saving"),
        ("if wanted.keys() != leaves.keys():", "if False:", "saving"),
        ("np.shape(leaf) != np.shape(wanted[name])", "False", "saving"),
        ("if full in flat:", "if False:", "saving"),
    ],
    "_layerwise": [
        ("before, layer=i)", "before, layer=0)", "layerwise"),
        (
            "fold_in(jax.random.fold_in(key, i), part)",
            "fold_in(key, part)",
            "layerwise",
        ),
        ("x / self.microbatches", "x", "layerwise"),
        ("jnp.add, g_ends", "lambda g, _: g, g_ends", "layerwise"),
        ("depth - 1 - t", "t", "layerwise"),
    ],
    "_stacks": [
        ("if left == shared:", "if True:", "layerwise"),
        ("if any(found[:", "if not any(found[:", "layerwise"),
        ("if after <= reached:", "if True:", "layerwise_leaves"),
        ("shapes.get(path) == x.shape", "True", "layerwise_leaves"),
        ("scalars - keys", "scalars", "layerwise_leaves"),
        ("_with_key_of, (0, 0)", "_with_key_of, (0, None)", "layerwise_leaves"),
    ],
    "_state_codes": [
        ("if bits is None else bits", "", "with_quantized_state"),
        ("jnp.where(fits, new.astype(jnp.float32), before)", "new", "with_q"),
        ("jnp.minimum(peak >> _MANTISSA, highest)", "peak >> _MANTISSA", "survey"),
        ("top + 2 - octaves", "top + 1 - octaves", "with_quantized_state"),
        ("jnp.where(window.signed, 0, 1)", "0", "with_quantized_state"),
        ("_LEAST_FACTOR, fraction, scale", "_LEAST_FACTOR, scale, scale", "with_q"),
    ],
    "_with_quantized_state": [
        ("leaf.size >= _LEAST_SIZE and", "", "with_quantized_state"),
        ('if ", ".join(made_for) != wanted:', "if False:", "with_quantized_state"),
        ("        if found:", "        if False:", "with_quantized_state"),
        ("fits[owner] & fit if owner in fits else fit", "fit", "state_survey"),
        ("after[i] = jnp.where(fit, after[i], leaves[i])", "pass", "state_survey"),
    ],
    "_state_roles": [
        ('endswith(f"/{name}")]', 'endswith("")]', "state_survey"),
        ("PARAMS in value.parts and", "False and", "state_survey"),
        ("if decay.get(i) == 1 and", "if False and", "state_survey"),
        ("if i not in used:", "if False:", "state_survey"),
    ],
    "_step_reader": [
        ("first and second and first != second", "False", "state_survey"),
        ("signed |= frozenset() if b.positive else a.parts", "", "state_survey"),
        ("multiple=a.multiple | b.multiple", "multiple=frozenset()", "state_survey"),
    ],
    "_leaf_kinds": [
        ("if layers and tops <=", "if False and tops <=", "leaf_kinds"),
        ("return _take_axis(group, 0) or", "return False or", "leaf_kinds"),
        ("if tables or (self.layered and not dense):", "if False:", "leaf_kinds"),
        ("sizes[:1] == bias", "False", "leaf_kinds"),
        ("leaf.layer = leaf.layer or prefix", "pass", "leaf_kinds"),
        ("if inputs == 1 and depthwise:", "if False:", "leaf_kinds"),
        ("return leaf.kind if feeds else", "return", "leaf_kinds"),
    ],
    "_orthogonal": [
        ("x = _A * x + (change", "x = _B * x + (change", "orthogonal"),
        ("jnp.where(jnp.isfinite(g), g, ms[i])", "g", "orthogonal"),
        ("ahead = moving_average(ms[i], g, rate)", "ahead = ms[i]", "orthogonal"),
        ("_A, _B, _C = 3.4445", "_A, _B, _C = 3.3", "orthogonal"),
    ],
    "_split_layers": [
        ("            if a != b:", "            if False:", "split_layers"),
        ("if jax.tree.leaves(others):", "if False:", "split_layers"),
        ("if other != name and", "if False and", "split_layers"),
        ("fold_in(key, i), x.shape", "fold_in(key, 0), x.shape", "split_layers"),
        ("if not isinstance(variable, free):", "if False:", "split_layers"),
    ],
    "_layerwise_checks": [
        ("is_inexact(u):", "False:", "layerwise_leaves"),
        ("if manual_axes() and not types_tell():", "if False:", "shard_map"),
    ],
    "_shards": [
        ("return reduce(x, axes) if axes else x", "return x", "shard_map"),
        ("and a not in varying(shared)", "", "shard_map"),
        ("tuple(sorted(axes - varying(x)))", "()", "shard_map"),
    ],
    "_skipped": [
        ("jnp.isfinite(jnp.square(g))", "jnp.isfinite(g)", "diagnostics"),
        ("skipped[path] |= beyond", "skipped[path] & beyond", "diagnostics"),
    ],
    "diagnostics": [
        ("zero = jnp.all(u == 0)", "zero = False", "diagnostics"),
        ("(1 - 2**-6) * bound", "1.0 * bound", "diagnostics"),
        ("if scale is not None", "if scale is None", "growth"),
        ("jnp.abs(w.codes) == w.format.levels", "w.codes == w.format.levels", "diagn"),
        ("jnp.sign(w) != jnp.sign(p)", "jnp.sign(w) == jnp.sign(p)", "diagnostics"),
        ("nonzero = (w != 0)", "nonzero = (w == w)", "diagnostics"),
        (".ravel() + w.format.levels", ".ravel()", "diagnostics"),
        ("jnp.nanmin(cosines)", "jnp.nanmax(cosines)", "diagnostics"),
        ("optax.apply_updates(w, u) - w", "optax.apply_updates(w, u)", "diagnostics"),
    ],
}


def source(file):
    return (ROOT / "madax" / f"{file}.py").read_text(encoding="utf-8")


def first_failure(file, old, new, *arguments):
    """What fails of a copy with the mistake in it, or None if all passes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "madax"
        ignored = shutil.ignore_patterns(".*", "build", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        text = source(file).replace(old, new)
        (copy / "madax" / f"{file}.py").write_text(text, encoding="utf-8")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *arguments],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "CI": "1"},
            capture_output=True,
            text=True,
        )
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    # As when madax cannot even be imported.
    return found[1] if found else run.stdout[-200:] + run.stderr[-200:]


def main(words):
    """Tries the mutants of those files or numbers, or all; 1 if one is alive."""
    every = [(file, *m) for file, mutants in MUTANTS.items() for m in mutants]
    stale = [(file, old) for file, old, *_ in every if source(file).count(old) != 1]
    if stale:
        sys.exit(f"not there, or more than once: {stale}")
    alive = []
    for number, (*mutant, likely) in enumerate(every):
        if words and not {mutant[0].strip("_"), str(number)} & set(words):
            continue
        files = [
            str(path.relative_to(ROOT))
            for word in likely.split()
            for path in sorted((ROOT / "tests").rglob(f"test_{word}*.py"))
        ]
        found = first_failure(*mutant, *files)
        print(number, mutant, f"killed by {found}" if found else "...")
        if not found:
            alive.append((number, mutant))
    for number, mutant in alive.copy():
        rest = ["-n", "auto", "--dist", "loadfile", "tests", "madax"]
        if found := first_failure(*mutant, *rest):
            alive.remove((number, mutant))
        print(number, mutant, f"killed by {found}" if found else "ALIVE")
    print(f"{len(alive)} are alive")
    return len(alive) > 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main(sys.argv[1:]))
