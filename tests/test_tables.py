from eval.tables import ROOT, TABLES, render


def test_the_readme_shows_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in TABLES)
    assert render(text) == text, "run python -m eval.tables"
