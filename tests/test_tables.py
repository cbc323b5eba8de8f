"""Tables in the pages match the results that they are made from."""

import pytest
from duo_eval.show.tables import PAGES, render


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_committed_results(page):
    assert render(page.read_text()) == page.read_text()


def test_a_marker_without_a_table_raises():
    with pytest.raises(ValueError, match="no table has the name neddle"):
        render("<!-- neddle -->\n<!-- /neddle -->\n")
    with pytest.raises(ValueError, match="has no <!-- /needle -->"):
        render("<!-- needle -->\n")
