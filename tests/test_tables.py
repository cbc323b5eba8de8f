"""Tables in the pages match the results that they are made from."""

import pytest
from duo_eval.aot.paper import POINTS, totals
from duo_eval.runner.record import read
from duo_eval.show import families
from duo_eval.show.paper import least
from duo_eval.show.tables import PAGES, RESULTS, render

from duo_jax.families.table import FAMILIES
from tests.shapes import GOLDEN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_committed_results(page):
    assert render(page.read_text()) == page.read_text()


def test_a_marker_without_a_table_raises():
    with pytest.raises(ValueError, match="no table has the name neddle"):
        render("<!-- neddle -->\n<!-- /neddle -->\n")
    with pytest.raises(ValueError, match="has no <!-- /needle -->"):
        render("<!-- needle -->\n")


def test_every_family_has_models_and_golden_errors():
    """Measured by `duo eval families --out eval/results/cpu/families.json`."""
    results = read(RESULTS / "cpu" / "families.json")[1]
    assert {result["checkpoint"] for result in results} == {path.parent.name for path in GOLDEN.glob("*/golden.npz")}
    assert {result["family"] for result in results} == set(FAMILIES) <= set(families.MODELS)
    assert max(max(result["full"], result["duo"]) for result in results) < 1e-4


def test_the_papers_points_are_compiled_and_no_time_of_it_is_below_what_its_gpu_can_do():
    compiled = totals(RESULTS / "aot" / "paper.json")
    assert tuple(compiled) == POINTS
    for point, nbytes in compiled.items():
        assert all(theirs > ours for theirs, ours in zip(point.seconds, least(point), strict=True)), point
        # Weights and cache of the paper's programs are ours: its memory differs by what its framework takes.
        assert nbytes[0] / 2**30 == pytest.approx(point.memory[0], rel=0.04), point
