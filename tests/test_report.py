"""`duo report`: what a page shows of a folder of results, and its layout in a real browser if there is one."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from duo_eval.show.headline import columns_of
from duo_eval.show.registry import RESULT_TYPES, about, type_of
from duo_eval.show.tables import RESULTS

pytest.importorskip("matplotlib", reason="needs the eval extra")
MACHINE = {"processor": "a <processor>", "cores": 2, "python": "3.11", "versions": {"jax": "0.1"}, "commit": "abc1234"}
RUN = {"command": "duo eval something --out it", "date": "2026-01-02", "machine": MACHINE}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def ledger(path, about, records):
    head = {"about": about, "gates": {}, "runs": [RUN]}
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *records)))


def needle_records():
    for method, budget in (("full", 1.0), ("duo", 0.5)):
        for length in (1024, 2048):
            for depth in (0.0, 0.5, 1.0):
                job = {"method": method, "budget": budget, "length": length, "depth": depth, "sample": 0}
                score = 0.0 if (budget, length, depth) == (0.5, 2048, 0.5) else 1.0
                yield {"job": job, "score": score, "held_bytes": int(1000 * budget * length)}


def efficiency():
    point = {"model": "llama-3-8b", "layers": 2, "dtype": "bfloat16", "batch_size": 1, "chunk_size": None}
    results = []
    for engine, sparsity in (("transformers", None), ("duo", None), ("duo", 0.5)):
        for context in (4096, 65536):
            here = {"point": point | {"engine": engine, "sparsity": sparsity, "context": context}}
            if engine == "transformers" and context == 65536:
                results.append(here | {"cannot": "does not fit into memory"})
                continue
            part = 1.0 if sparsity is None else 0.6
            results.append(
                here
                | {
                    "prefill_seconds": 2.0 * part * context,
                    "prefill_floor_seconds": 1.0 * part * context,
                    "prefill_flops": int(1000 * part * context),
                    "decode_ms": 8.0 * part,
                    "decode_floor_ms": 2.0 * part,
                    "decode_bytes": int(1000 * part),
                    "kv_bytes": int(1e9 * part),
                    "compile_seconds": {"prefill": 1.0, "decode": 1.0} if engine == "duo" else {},
                    "peak_memory_bytes": 2 * 10**9,
                }
            )
    return RUN | {"device": "A large GPU", "results": results}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One result of most kinds, real ones and made-up ones, and files that cannot be shown."""
    folder = tmp_path_factory.mktemp("results")
    for path in (RESULTS / "cpu/recall.jsonl", RESULTS / "cpu/training.json", RESULTS / "aot/memory.json"):
        shutil.copy(path, folder)
    shutil.copytree(RESULTS / "cpu/patterns/kvzip", folder / "patterns" / "kvzip")
    about = {"task": "needle", "model": "models/<b>tiny", "style": "digits"}
    ledger(folder / "needle.jsonl", about, needle_records())
    ledger(
        folder / "ruler.jsonl", {"task": "ruler"}, ({**r, "job": {"task": "vt", **r["job"]}} for r in needle_records())
    )
    ledger(folder / "begun.jsonl", about | {"recent_size": 99, "question_later": True}, [])
    answers = [
        {"job": {"method": method, "item": f"a {item}"}, "answer": "A", "correct": correct}
        for method, right in (("full", (True, False)), ("0.5 32/128", (True, True)))
        for item, correct in enumerate(right)
    ]
    ledger(folder / "mmlu.jsonl", about | {"task": "mmlu"}, answers)
    (folder / "efficiency.json").write_text(json.dumps(efficiency()))
    (folder / "odd & new.json").write_text('{"hello": 1}')
    (folder / "needle.png").write_text("a figure of the results")
    return folder


@pytest.fixture(scope="module")
def page(results):
    from duo_eval.show.report.page import Page

    return Page.of(results).html()


class Outline(HTMLParser):
    """Headings, tags with their attributes, and ids of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def test_the_page_shows_every_result_and_names_the_rest(page):
    outline = Outline(page)
    text = " ".join(" ".join(outline.text).split())
    for heading in ("Needle", "RULER", "Recall of passkeys", "Time and memory", "Training step", "Memory", "Gates"):
        assert re.search(rf"<h3[^>]*>{heading}</h3>", page), heading
    assert "Not shown" in text and "odd & new.json" in text and "needle.png" not in text
    assert "No job is finished yet." in text
    # Provenance.
    assert text.count("abc1234") >= 4 and "a <processor>, 2 cores" in text and "A large GPU" in text
    # Numbers: nothing is scaled or lost.
    assert "llama-3-8b, 2 of 32 layers" in text and "does not fit into memory" in text
    row = re.search(
        r"<tr>\s*<td[^>]*>llama-3-8b, 2 of 32 layers</td>(?:(?!</tr>).)*50% stream.*?</tr>", page, re.DOTALL
    )
    cells = re.findall(r">([^<]*)</td>", row.group())
    assert cells[5:11] == ["4915.20", "2.0", "1.00", "4.8", "4.0", "1.00"]
    assert "66.7 (20.8 to 93.9)" in text  # two of three needles


def test_the_page_opens_with_model_device_date_one_table_and_one_figure(page):
    head = page[page.index('<header id="summary">') : page.index("</header>")]
    text = " ".join(" ".join(Outline(head).text).split())
    assert re.search(
        r"model <b>tiny device CPU, a <processor>, 2 cores date measured 2026-01-02, page written \d", text
    )
    assert head.count("<table>") == head.count("<img") == 1
    rows = [re.findall(r">([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", head, re.DOTALL)]
    assert [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in rows] == [
        ["score, %", "Needle, 50% KV, n = 6", "RULER, 50% KV, n = 6", "MMLU, n = 2"],
        ["full", "100.0 (61 to 100)", "100.0 (61 to 100)", "50.0 (9 to 91)"],
        ["duo", "83.3 (44 to 97)", "83.3 (44 to 97)", ""],
        ["duo 50% stream, 32/128", "", "", "100.0 (34 to 100)"],
    ]


def test_a_headline_compares_methods_over_the_same_questions():
    def record(method, budget, sample, score):
        return {"job": {"method": method, "budget": budget, "sample": sample}, "score": score}

    records = [record("full", 1.0, sample, 1.0) for sample in range(3)]
    records += [record("duo", budget, sample, 0.0) for budget in (0.25, 0.5) for sample in range(3)]
    # h2o was not asked question 0, and could not hold question 1 at the smaller budget.
    records += [record("h2o", 0.5, sample, 1.0) for sample in (1, 2)]
    records += [record("h2o", 0.25, 1, None), record("h2o", 0.25, 2, 1.0)]
    columns = list(columns_of("Task", records))
    assert [(column.budget, column.questions, list(column.scores)) for column in columns] == [
        (0.25, 1, ["full", "duo", "h2o"]),
        (0.5, 2, ["full", "duo", "h2o"]),
    ]
    assert not list(columns_of("Task", [{"job": {"method": "distill", "sparsity": 0.5}, "tokens": [1]}]))


def test_navigation_is_grouped_and_side_experiments_are_folded(page):
    nav = page[page.index("<nav") : page.index("</nav>")]
    links = re.findall(r'<a href="#([^"]*)">([^<]*)</a>', nav)
    assert all(f'id="{target}"' in page for target, _ in links)
    assert [name for target, name in links if target.startswith(("summary", "group"))] == [
        "Summary",
        "Accuracy",
        "Speed and memory",
        "Compiled, not run",
        "Head patterns",
    ]
    assert [name for target, name in links if target.startswith("section-1-")] == [
        "Needle",
        "RULER",
        "MMLU",
        "Recall of passkeys",
    ]
    side = re.findall(r'<details class="side">\s*<summary>([^<]*)<span class="quiet">([^<]*)</span>', page)
    assert side == [("Side experiment: recent size 99, question later ", "begun.jsonl")]


def test_a_new_file_of_measurements_is_of_its_kind(tmp_path):
    """Version 0.1 stored a run's fields in place of a head."""
    old = efficiency()
    new = {"about": {"task": "bench"}, "gates": {}, "runs": [{**RUN, "device": "A GPU"}], "results": old["results"]}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(new))
    assert type_of(path).title == "Time and memory" and about(path)["device"] == "A GPU"


def test_the_page_needs_nothing_from_elsewhere(page):
    outline = Outline(page)
    links = [
        value for _, attributes in outline.tags for name, value in attributes.items() if name.endswith(("href", "src"))
    ]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not outline.all("script", "iframe", "object", "svg")
    text = re.sub(r"data:image/svg\+xml;base64,[\w+/=]+", "", page)
    assert "@import" not in text and "url(" not in text and "http" not in text


def test_the_page_can_be_read_without_seeing_it(page):
    outline = Outline(page)
    images = outline.all("img")
    assert len(images) == len(outline.all("figure")) >= 10 and all(image["alt"] for image in images)
    assert all(b64decode(image["src"].partition(",")[2]).startswith(b"<?xml") for image in images)
    alts = " ".join(image["alt"] for image in images)
    assert "duo at 0.5: mean score 0.83" in alts and "at 2,048 tokens and a depth of 50%" in alts
    assert outline.all("th") and all(th["scope"] == "col" for th in outline.all("th"))
    headings = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert outline.all("html")[0]["lang"] == "en" and "width=device-width" in page
    assert "<b>tiny" not in page


def test_a_broken_file_is_on_the_page_and_an_error(duo, results, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(results / "needle.jsonl", folder)
    cut = json.loads((results / "efficiency.json").read_text())
    del cut["results"][2]["kv_bytes"]
    (folder / "cut.json").write_text(json.dumps(cut))
    (folder / "torn.jsonl").write_text('{"about": {"task": "needle"}, "runs": []}\n{"job"\n{}\n')
    (folder / "noise.json").write_bytes(b"\xff\xfe")
    out = tmp_path / "report.html"
    done = duo("report", "--results", folder, "--out", out)
    assert done.code == 2 and "Traceback" not in done.err
    for name, why in (("torn.jsonl", "2 is not JSON"), ("noise.json", "is not JSON"), ("cut.json", "kv_bytes")):
        assert name in done.err and why in done.err
    text = out.read_text()
    assert "Could not be shown" in text and "torn.jsonl" in text and ">Needle</h3>" in text
    for path in folder.iterdir():
        path.unlink()
    before = out.read_text()
    (folder / "notes.txt").write_text("no result")
    refused = duo("report", "--results", folder, "--out", out)
    assert refused.code == 2 and "has no results, only 1 other files: --results names a folder" in refused.err
    assert out.read_text() == before
    refused = duo("report", "--results", tmp_path / "none", "--out", out)
    assert refused.code == 2 and "no folder" in refused.err


def test_every_committed_result_is_of_a_known_kind():
    for path in RESULTS.rglob("*.json*"):
        if "patterns" not in path.parts:
            assert type_of(path) in RESULT_TYPES, path


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 500, 1280])
def test_the_page_fits_a_browser(page, width, tmp_path):
    # A window has a least width, a frame has not.
    measure = """<script>
    addEventListener("load", () => {
    const all = [...document.querySelectorAll("body *")], box = x => x.getBoundingClientRect();
    const inside = x => x.closest(".wide") === null;
    parent.document.title = JSON.stringify({
      width: innerWidth, needed: document.documentElement.scrollWidth,
      beyond: all.filter(x => inside(x) && box(x).right > innerWidth + 1).map(x => x.tagName),
      figures: [...document.querySelectorAll("img")].map(x => [box(x).width, box(x).height]),
      letters: parseFloat(getComputedStyle(document.querySelector("td")).fontSize),
      text: document.body.innerText,
    });});
    </script></body>"""
    framed = escape(page.replace("</body>", measure))
    wrapper = tmp_path / "page.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><iframe style="width:{width}px;height:900px;border:0" srcdoc="{framed}">'
    )
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    command = [CHROMIUM, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([*command, wrapper.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    found = json.loads(unescape(title.group(1)))
    assert width - 20 <= found["width"] <= width
    assert found["needed"] <= found["width"] and not found["beyond"]
    assert all(150 < wide <= found["width"] and high > 60 for wide, high in found["figures"])
    assert found["letters"] >= 12
    assert "Side experiment" in found["text"]


def chart_of(*panels, **settings):
    from duo_eval.show.curves import Chart, Panel

    named = [Panel(str(index), f"panel {index}", lines) for index, lines in enumerate(panels)]
    return Chart("a", "a title", named, "bytes", "score, %", **settings)


def test_points_keep_their_values_and_stand_side_by_side_with_their_intervals():
    from duo_eval.show.curves import Line
    from matplotlib.collections import LineCollection

    lines = [Line(name, [25.0, 50.0], [40.0, 80.0], [20.0, 60.0], [50.0, 95.0]) for name in ("full", "duo", "h2o")]
    lines.append(Line("tova", [90.0], [30.0], [10.0], [40.0]))
    figure = chart_of(lines, [lines[0]], is_percent=True).whole().figure
    figure.draw_without_rendering()
    axes, other = figure.axes
    assert (axes.get_xlim(), axes.get_ylim()) == (other.get_xlim(), other.get_ylim())
    assert [line.get_ydata().tolist() for line in axes.lines] == [list(line.y) for line in lines]
    x = [line.get_xdata().tolist() for line in axes.lines]
    assert x[1] == pytest.approx([25, 50]) and x[3] == [90] and other.lines[0].get_xdata().tolist() == [25, 50]
    pixels = [axes.transData.transform((place, 0))[0] for place, _ in x[:3]]
    least = axes.lines[0].get_markersize() * figure.dpi / 72 * 0.8
    assert all(left + least < right for left, right in pairwise(pixels))
    bars = [bar.get_segments() for bar in axes.collections if isinstance(bar, LineCollection)]
    assert [[segment[:, 0].tolist() for segment in bar] for bar in bars] == [[[p, p] for p in places] for places in x]
    assert [[segment[:, 1].tolist() for segment in bar] for bar in bars] == [[[20, 50], [60, 95]]] * 3 + [[[10, 40]]]
    (legend,) = figure.legends
    assert "side by side" in legend.get_title().get_text()
    assert [text.get_text() for text in legend.get_texts()] == ["full", "duo", "h2o", "tova"]


def test_every_length_is_a_panel_with_its_number_of_questions(tmp_path):
    from duo_eval.show.curves import score_curves

    ledger(tmp_path / "it.jsonl", {"task": "needle", "model": "a/m", "style": "digits"}, needle_records())
    (chart,) = score_curves(tmp_path / "it.jsonl")
    assert [panel.title for panel in chart.panels] == ["1,024 tokens, n = 3", "2,048 tokens, n = 3"]
    assert [panel.level.y for panel in chart.panels] == [[100], [100]]
    assert [drawn.name for drawn in chart.each()] == ["score-1024", "score-2048"]
    whole = chart.whole()
    assert whole.name == "score" and "2,048 tokens, n = 3: full attention 100; duo 66.7 at 50" in whole.alt
    assert [axes.get_title() for axes in whole.figure.axes] == [panel.title for panel in chart.panels]


def test_full_attention_on_its_own_is_drawn(tmp_path):
    from duo_eval.show.curves import score_curves

    full = [record for record in needle_records() if record["job"]["method"] == "full"]
    ledger(tmp_path / "it.jsonl", {"task": "needle", "model": "a/m", "style": "digits"}, full)
    (chart,) = score_curves(tmp_path / "it.jsonl")
    assert chart.whole().alt.endswith("2,048 tokens, n = 3: full attention 100.")
    assert len(chart.whole().figure.axes) == 2


def test_a_level_that_no_line_reaches_is_inside_its_axes():
    from duo_eval.show.curves import Line

    chart = chart_of([Line("loss", [25.0, 50.0], [0.4, 0.2])])
    panel = replace(chart.panels[0], level=Line("allowed", [0.0], [1.0]))
    (axes,) = replace(chart, panels=[panel]).whole().figure.axes
    assert axes.get_ylim()[1] > 1 and axes.get_xlim()[0] > 0


def test_a_method_looks_the_same_in_every_figure():
    from duo_eval.methods.registry import METHODS
    from duo_eval.show.curves import Line
    from duo_eval.show.style import label, style_of, styles_of
    from duo_train.recipes import RECIPES

    names = {*METHODS, *RECIPES, "transformers"}
    assert len({(style_of(name).colour, style_of(name).marker) for name in names}) == len(names)
    same = (
        ("full", "full attention"),
        ("kvzip", "duo=a/kvzip/"),
        ("snapkv", "snapkv:window=64"),
    )
    same += (("random-heads", "random"), ("random-heads", "random-heads=1"), ("duo=a/mine", "duo=b/mine:sparsity=0.5"))
    assert all(style_of(one) == style_of(other) for one, other in same)
    assert style_of("a new method") == style_of("a new method:size=3")
    assert style_of("0.5 32/128") == style_of("duo") and label("0.5 32/128") == "duo 50% stream, 32/128"
    assert label("duo=a/mine:sparsity=0.5") == "mine 50% stream" and label("duo+quest=a/mine") == "duo+quest=mine"
    first, second = styles_of(["duo", "duo:sparsity=0.5"])
    assert (first.colour, first.marker) == (second.colour, second.marker) and first.pattern != second.pattern
    for names in (("full", "duo", "tova"), ("tova", "full")):
        lines = [Line(name, [1.0], [2.0]) for name in names]
        drawn = chart_of(lines).whole().figure.axes[0].lines
        assert [(line.get_color(), line.get_marker()) for line in drawn] == [
            (style_of(name).colour, style_of(name).marker) for name in names
        ]


def test_means_of_maps_are_over_cells_that_full_attention_has_too(tmp_path):
    from duo_eval.show.heatmaps import needle_poster

    records = [
        record | {"job": record["job"] | {"budget": budget}}
        for record in needle_records()
        for budget in ((1.0,) if record["job"]["method"] == "full" else (0.25, 0.5))
        # Full attention fails at 1024 tokens, and at a budget of 0.25 only 2048 are asked.
        if budget != 0.25 or record["job"]["length"] == 2048
    ]
    records += [
        record | {"job": record["job"] | {"method": "h2o"}} for record in records if record["job"]["budget"] == 0.5
    ]
    for record in records:
        if record["job"]["method"] == "full" and record["job"]["length"] == 1024:
            record["score"] = 0.0
    ledger(tmp_path / "it.jsonl", {"task": "needle", "model": "m", "style": "digits"}, records)
    figure = needle_poster(tmp_path / "it.jsonl")
    figure.draw_without_rendering()
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == [
        "full\n0.50, 6 cells",
        "duo at 0.25\n0.67 (full 1.00), 3 cells",
        "duo at 0.5\n0.83 (full 0.50), 6 cells",
        "h2o at 0.5\n0.83 (full 0.50), 6 cells",
    ]
    # The first row is full, and a budget has its column.
    tops, lefts = ([round(getattr(axes.get_position(), side), 3) for axes in maps] for side in ("y1", "x0"))
    assert tops[0] == tops[1] == tops[2] > tops[3] and lefts[0] < lefts[1] < lefts[2] == lefts[3]
