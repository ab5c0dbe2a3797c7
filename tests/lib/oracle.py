"""Madam and number formats in plain NumPy float64, written from the formulas.

Imports neither jax nor madax, so that a mistake cannot be made twice in the same way.
Each class is one transform: built from a leaf's first weights, called once per step.

    v = b2 v + (1-b2) g^2                  g_hat = g / sqrt(v / (1 - b2^t)),   0/0 = 0
    d = -lr (clip(g_hat, -g_bound, g_bound) + weight_decay w / max(|w|, floor rms0))
    u = w expm1(sign(w) d)   where |w| > floor rms0,   else   floor rms0 d
    |w + u| <= p_scale rms0,   or for None   max(3 rms0, max |w0|)   in matrices alone,
                                             unless they are all zeros at first

Formats are known by their fields. A code c, real-valued, of at most n = 2^(bits-1) - 1
in size, and its value relative to the scale:

    log      sign(c) exp(-base_step (n - |c|)),    1 <= |c| but for 0
    symlog   linear_range sinh(c asinh(1 / linear_range) / n)
    uniform  c / n

A moment's code c > 0 of M bits of mantissa and a lowest octave o stands for

    (1 + f / 2^M) 2^(o + e)   where   c - 1 = e 2^M + f
"""

import numpy as np


def first_rms(w0, zero_init_scale=0.1):
    """Return rms0 and whether the leaf is all zeros (rms0 is then the option)."""
    w0 = np.asarray(w0, np.float64)
    all_zero = not np.any(w0)
    if all_zero:
        return float(zero_init_scale), True
    return float(np.sqrt(np.mean(w0**2))), False


def bound(w0, p_scale=None, zero_init_scale=0.1):
    """Return what no weight may be beyond."""
    rms = first_rms(w0, zero_init_scale)[0]
    if p_scale is not None:
        return p_scale * rms
    if np.ndim(w0) < 2 or not np.any(w0):
        return np.inf
    return max(3 * rms, float(np.max(np.abs(np.float64(w0)))))


class SecondMoment:
    """g to g_hat; with b1, a bias-corrected first moment is the numerator."""

    def __init__(self, shape, b2=0.999, b1=None):
        self.b1, self.b2, self.t = b1, b2, 0
        self.v, self.m = np.zeros(shape), np.zeros(shape)

    def __call__(self, g):
        g = np.asarray(g, np.float64)
        ok = np.isfinite(g)
        g = np.where(ok, g, 0.0)
        self.t += 1
        self.v = np.where(ok, self.b2 * self.v + (1 - self.b2) * g**2, self.v)
        top = g
        if self.b1 is not None:
            self.m = np.where(ok, self.b1 * self.m + (1 - self.b1) * g, self.m)
            top = self.m / (1 - self.b1**self.t)
        v_hat = self.v / (1 - self.b2**self.t)
        moves = ok & (v_hat > 0)
        return np.where(moves, top / np.sqrt(np.where(moves, v_hat, 1.0)), 0.0)


class SignLog:
    """Log-step d to additive update u."""

    def __init__(self, w0, floor=0.0, zero_init_scale=0.1):
        rms, all_zero = first_rms(w0, zero_init_scale)
        self.floor_abs = rms * (1.0 if all_zero else floor)

    def __call__(self, d, w):
        d, w = np.asarray(d, np.float64), np.asarray(w, np.float64)
        far = np.abs(w) > self.floor_abs
        return np.where(far, w * np.expm1(np.sign(w) * d), self.floor_abs * d)


class ClipLogWeights:
    """Shorten u so that w + u stays within the bound."""

    def __init__(self, w0, p_scale=None, zero_init_scale=0.1):
        self.bound = bound(w0, p_scale, zero_init_scale)

    def __call__(self, u, w):
        new = np.asarray(w, np.float64) + np.asarray(u, np.float64)
        return np.clip(new, -self.bound, self.bound) - w


class Madam:
    """The whole chain; `step(g)` moves `self.w` and returns it."""

    def __init__(
        self,
        w0,
        learning_rate=0.01,
        b2=0.999,
        p_scale=None,
        g_bound=10.0,
        *,
        b1=None,
        floor=0.0,
        zero_init_scale=0.1,
        weight_decay=0.0,
    ):
        self.w = np.asarray(w0, np.float64)
        self.learning_rate, self.g_bound = learning_rate, g_bound
        self.weight_decay = weight_decay
        self.direction = SecondMoment(self.w.shape, b2, b1)
        self.sign_log = SignLog(self.w, floor, zero_init_scale)
        self.clip = ClipLogWeights(self.w, p_scale, zero_init_scale)

    def step(self, g):
        lr = self.learning_rate
        if callable(lr):  # optax schedules count from 0
            lr = float(lr(self.direction.t))
        g_hat = np.clip(self.direction(g), -self.g_bound, self.g_bound)
        size = np.maximum(np.abs(self.w), self.sign_log.floor_abs)
        decay = self.weight_decay * self.w / np.where(size > 0, size, 1)
        d = -lr * (g_hat + decay)
        self.w = self.w + self.clip(self.sign_log(d, self.w), self.w)
        return self.w


def levels(fmt):
    return 2 ** (fmt.bits - 1) - 1


def spacing(fmt):
    """The step between codes, in nats; None where there is no such."""
    if hasattr(fmt, "base_step") and not hasattr(fmt, "linear_range"):
        return fmt.base_step
    if hasattr(fmt, "linear_range"):
        return np.arcsinh(1 / fmt.linear_range) / levels(fmt)
    return None


def decode(fmt, code):
    c, n = np.asarray(code, np.float64), levels(fmt)
    if hasattr(fmt, "base_step") and not hasattr(fmt, "linear_range"):
        return np.sign(c) * np.exp(-fmt.base_step * (n - np.abs(c)))
    if hasattr(fmt, "linear_range"):
        return fmt.linear_range * np.sinh(c * spacing(fmt))
    return c / n


def encode(fmt, x):
    x, n = np.asarray(x, np.float64), levels(fmt)
    if hasattr(fmt, "base_step") and not hasattr(fmt, "linear_range"):
        with np.errstate(divide="ignore"):
            magnitude = n + np.log(np.abs(x)) / fmt.base_step
        return np.sign(x) * np.clip(magnitude, 1, n)
    if hasattr(fmt, "linear_range"):
        return np.clip(np.arcsinh(x / fmt.linear_range) / spacing(fmt), -n, n)
    return np.clip(x * n, -n, n)


def decode_moment(code, octave, mantissa):
    """The size of a stored moment; 0 for code 0."""
    octaves, rest = np.divmod(np.asarray(code, np.float64) - 1, 2.0**mantissa)
    size = 2.0 ** (octave + octaves) * (1 + rest / 2**mantissa)
    return np.where(octaves < 0, 0, size)


def octave_of_m(octave):
    """The first moment ends where the root of the second does, after 32 octaves."""
    return (octave + 65) // 2 - 32


def newton_schulz(x):
    """Return five steps of the quintic from one matrix, over its norm."""
    x = np.float64(x) / np.linalg.norm(np.float64(x))
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x
