"""Figures: text is legible, and the figures of the page of ideas are true."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import ideas
from benchmarks.lib.style import WIDTH, check_legible


@pytest.mark.parametrize(
    ("points", "width", "legible"),
    [(8, WIDTH, True), (7, WIDTH, False), (10, 14, False), (10, 9, True)],
)
def test_small_text_is_refused(points, width, legible):
    fig = Figure(figsize=(width, 2))
    fig.text(0.5, 0.5, "text", fontsize=points)
    if legible:
        check_legible(fig)
    else:
        with pytest.raises(ValueError, match=f"text of {points} points too small"):
            check_legible(fig)


def test_a_log_step_adds_the_codes_that_the_formulas_say():
    steps = {name: ideas.step_of(format, 0.6) for name, format in ideas.GRIDS.items()}
    log, symlog, uniform = (added for _, added in steps.values())
    assert log == pytest.approx(ideas.STEP * 14 / np.log(100), rel=1e-5)
    assert symlog == pytest.approx(ideas.STEP * 15 / np.arcsinh(3), rel=1e-5)
    assert uniform == pytest.approx(9 * np.expm1(ideas.STEP), rel=1e-5)


def test_the_figures_of_ideas_are_drawn_and_legible(tmp_path):
    ideas.ideas(tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["bytes.png", "grids.png", "steps.png"]
    for draw in (ideas.steps_figure, ideas.grids_figure, ideas.bytes_figure):
        check_legible(draw())
