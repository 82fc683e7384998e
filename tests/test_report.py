"""The report: structure, escaping, numbers as text, charts against their data, the text table."""

import copy
import html.parser
import math
import re

import pytest

from fgrlhf.data.fields import UserError
from fgrlhf.reproduce.chart import Curve, grouped, line_chart, mean_curve, spread, strip, ticks
from fgrlhf.reproduce.excerpts import before_after, edits, heat_maps
from fgrlhf.reproduce.markup import tag
from fgrlhf.reproduce.report import page, write_report
from fgrlhf.reproduce.table import number, ratio, text_table

VOID = {"meta", "br", "hr", "img", "link", "input"}
NASTY = '<script>alert("1")</script> & \'it\''


def cell(*per_seed: float, half: float | None = 0.02) -> dict:
    mean = sum(per_seed) / len(per_seed)
    return {"mean": mean, "interval": half and [mean - half, mean + half],
            "per_seed": list(per_seed)}


def system(label: str, role: str, rate: float, **metrics) -> dict:
    return {"label": label, "role": role, "metrics": {
        "win_rate": cell(rate - 0.01, rate + 0.01), "win_rate_greedy": cell(rate + 0.02, half=None),
        "errors": cell(2 - 2 * rate)} | metrics}


def curve(key: str, label: str, seed: int, y: list[float], metric: str = "win_rate") -> dict:
    return {"system": key, "label": label, "seed": seed, "metric": metric, "y": y,
            "x_episodes": [128 * k for k in range(len(y))],
            "x_seconds": [1.5 * k for k in range(len(y))]}


@pytest.fixture
def results() -> dict:
    """Results like real ones, with all difficulties: missing metrics, NaN, markup in texts."""
    tokens = ["The", " cap", "ital", " of", " Toran", " is", " Vepolis", ".", "</s>"]
    wrong = [False] * 6 + [True] + [False] * 2
    return {
        "profile": "full", "command": "python -m fgrlhf.reproduce --profile full", "seeds": [0, 1],
        "machine": "2 cores, torch 2.13.0", "seconds": 1431.2,
        "notes": ["The world is built in.", NASTY],
        "reading": ["Fine-grained PPO wins 85.7%: -1.5 points.", NASTY],
        "systems": {
            "sft": system("SFT", "start", 0.497, seconds=cell(0.0)),
            "rlhf": system("PPO-RLHF: sequence RM on pairs, critic, GAE", "baseline", 0.655,
                           best_iteration=cell(61, 60), episodes=cell(5120), seconds=cell(74)),
            "fine": system("Fine-grained token-level PPO", "method", 0.857,
                           best_iteration=cell(24)),
            "long": system("A system whose name is much longer than any sensible label " + NASTY,
                           "control", 0.464, errors=cell(math.nan))},
        "reward_models": {
            "token": {"label": "Token-level on edits", "metrics": {
                "edit_accuracy": cell(0.977), "pair_accuracy": cell(0.847),
                "token_auc": cell(0.912)}},
            "sequence": {"label": "Sequence-level on pairs", "metrics": {
                "edit_accuracy": cell(0.884),
                "pair_accuracy": {"mean": math.nan, "interval": [math.nan] * 2}}}},
        "comparisons": [{"label": "Fine-grained PPO minus PPO-RLHF"} | cell(0.19, 0.214),
                        {"label": "likelihood minus sft"} | cell(-0.04, half=None)],
        "speed": [{"label": "To the best", "names": ["PPO-RLHF", "Fine <grained>"], "rows": [
            {"label": "episodes", "baseline": 3904, "method": 448, "ratio": cell(8.7, half=1.1)},
            {"label": "seconds", "baseline": math.inf, "method": 5.07, "ratio": None}]}],
        "paper": [{"label": "reward model accuracy", "value": "about 85.2%"}],
        "wordings": {"sft": {"label": "SFT", "metrics": {"editors_wording": cell(0.5)}}},
        "curves": [curve("rlhf", "PPO-RLHF", 0, [0.5, 0.55, 0.6, 0.62]),
                   curve("rlhf", "PPO-RLHF", 1, [0.5, 0.53, 0.58]),
                   curve("fine", "Fine <grained>", 0, [0.5, 0.7, 0.8, 0.84, 0.86]),
                   curve("fine", "Fine <grained>", 0, [0.1, math.nan, 0.4], metric="kl_k1")],
        "examples": {
            "heat_maps": [{"prompt": NASTY, "label": "SFT", "tokens": tokens, "errors": wrong,
                           "rewards": [0.25, 0.0, 0.1, -0.1, 0.5, 0.2, -2.0, 0.04, math.nan]}],
            "edits": [{"prompt": NASTY, "original_tokens": tokens, "original_changed": wrong,
                       "edited_tokens": tokens[:6] + [" Mi", "ton", ".", "</s>"],
                       "edited_changed": [False] * 6 + [True] * 2 + [False] * 2}],
            "before_after": [{"caption": NASTY, "labels": ["SFT", "Fine <grained>"], "rows": [
                {"prompt": NASTY, "before": "Wrong.", "before_errors": 2, "after": NASTY,
                 "after_errors": 1}]}]},
        "commands": ["python train_ppo.py --method fine-grained", NASTY]}


class Reader(html.parser.HTMLParser):
    """Checks the nesting of the tags; collects every tag and every text outside <style>."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, name: str, **wanted) -> list[dict]:
        return [a for n, a in self.tags if n == name and wanted.items() <= a.items()]

    @property
    def text(self) -> str:
        return "".join(self.texts)


# ----- the page ---------------------------------------------------------------------------------

def test_page_is_balanced_and_has_every_section(results):
    reader = Reader(page(results))
    assert len(reader.all("h1")) == 1
    for part in ("Systems", "Differences", "Reward models", "Speed", "What the paper reports",
                 "Training", "Learning curves", "Token rewards", "Minimal edits",
                 "Before and after", "The 2 commands of this run", "23 min 51 s", "seeds 0, 1",
                 "about 85.2%"):
        assert part in reader.text


def test_page_draws_win_rates_over_annotations():
    rows = [{"annotations": n, "systems": {"PPO-RLHF": cell(0.5 + n / 1e4)}} for n in (125, 1000)]
    reader = Reader(page({"by_annotations": rows}))
    assert "Number of annotations" in reader.text and "51.2 [49.2, 53.2]" in reader.text
    assert len(reader.all("polyline")) == 3                 # wide, narrow, legend


def test_page_needs_no_other_file_and_no_script(results):
    source = page(results)
    reader = Reader(source)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    assert not {"script", "link", "img", "iframe"} & {name for name, _ in reader.tags}
    assert not [(a, value) for _, attributes in reader.tags for a, value in attributes.items()
                if a == "src" or a.startswith("on") or a == "href" and value[0] != "#"]


def test_page_has_contents_that_lead_to_every_section(results):
    reader = Reader(page(results))
    names = [attributes["id"] for attributes in reader.all("section")]
    assert [a["href"] for a in reader.all("a")] == ["#" + name for name in names]
    assert len(set(names)) == len(names) > 8


def test_page_says_what_the_figures_mean_with_minus_signs_before_numbers_only(results):
    assert "Fine-grained PPO wins 85.7%: \N{MINUS SIGN}1.5 points." in Reader(page(results)).text


def test_page_names_each_number_for_a_phone(results):
    """The rows of a table are blocks there, without its header."""
    cells = [a for a in Reader(page(results)).all("td") if a.get("class") == "number"]
    assert cells and all(cell["data-label"] for cell in cells)


def test_page_shows_markup_in_texts_as_text(results):
    reader = Reader(page(results))
    assert reader.text.count(NASTY) >= 7               # note, label, three prompts, answer, command
    assert "Fine <grained>" in reader.text


@pytest.mark.parametrize("part", [
    "profile", "command", "seeds", "machine", "seconds", "systems", "paper", "reward_models",
    "comparisons", "speed", "curves", "examples", "notes", "commands"])
def test_page_and_text_table_work_without_any_part(results, part):
    without = {key: value for key, value in results.items() if key != part}
    empty = results | {part: None}
    assert Reader(page(without)).text == Reader(page(empty)).text
    assert text_table(without) == text_table(empty)


def test_page_of_nothing_is_a_page():
    assert len(Reader(page({})).all("h1")) == 1
    assert text_table({}) == ""


def test_page_shows_a_missing_value_or_nan_as_a_dash(results):
    source = page(results)
    text = Reader(source).text
    assert not re.search(r"\b(nan|inf|None)\b", text, re.IGNORECASE)
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', source)
    row = re.search(r"<tr><th scope=\"row\">Sequence-level on pairs.*?</tr>", source)[0]
    assert Reader(row).texts == ["Sequence-level on pairs", "88.4", " [86.4, 90.4]", "–", "–"]


def test_page_has_headers_in_every_table_and_a_text_for_every_picture(results):
    reader = Reader(page(results))
    assert len(reader.all("caption")) == len(reader.all("table")) == 8
    assert all(a.get("scope") in ("row", "col") for a in reader.all("th"))
    for svg in reader.all("svg"):
        if svg.get("aria-hidden") != "true":
            assert svg["role"] == "img" and "ends at" in svg["aria-label"]


def test_page_accepts_a_sweep_that_has_dev_win_rates_only():
    sweep = {"systems": {"rlhf-0.1": {"label": "rlhf-0.1", "role": "baseline", "metrics": {
        "best_dev_win_rate": cell(0.6)}}}}
    text = Reader(page(sweep)).text
    assert "Training" in text and "Systems" not in text and "60.0" in text
    assert text_table(sweep).splitlines()[2].split() == ["rlhf-0.1", "60.0"]


def test_page_does_not_change_the_results(results):
    before = copy.deepcopy(results)
    page(results)
    assert repr(results) == repr(before)


def test_write_report_writes_utf8_even_for_lone_surrogates(tmp_path):
    write_report(tmp_path / "new" / "report.html", {"notes": ["caf\u00e9 \ud800"]})
    assert "café ?" in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")


def test_write_report_refuses_a_folder(tmp_path):
    with pytest.raises(UserError, match="expected a file"):
        write_report(tmp_path, {})


# ----- charts -----------------------------------------------------------------------------------

def points(source: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of every polyline of a kind, in pixels, in the wide form of the first chart."""
    source = source.split("</svg>")[0] + "</svg></div>"
    return [[tuple(map(float, corner.split(","))) for corner in a["points"].split()]
            for a in Reader(source).all("polyline") if a["class"].split()[0] == kind]


def test_line_chart_has_a_point_for_each_value_at_its_place():
    chart = line_chart([Curve("a", 0, [0, 50, 100], [0.0, 100.0, 25.0])], "A", "episodes")
    (line,) = points(chart, "mean")
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1) and x0 < x1
    assert (y0 - y2) / (y0 - y1) == pytest.approx(0.25, abs=0.01) and y1 < y0  # pixels run down


def test_line_chart_draws_seeds_thin_and_their_mean_up_to_the_shortest():
    curves = [Curve("a", 1, [0, 1, 2], [0.0, 2.0, 4.0]), Curve("a", 1, [0, 1], [2.0, 4.0])]
    chart = line_chart(curves, "A", "episodes")
    assert [len(line) for line in points(chart, "seed")] == [3, 2]
    assert [len(line) for line in points(chart, "mean")] == [2]
    assert mean_curve(curves) == Curve("a", 1, [0.0, 1.0], [1.0, 3.0])


def test_line_chart_leaves_out_points_that_are_not_finite():
    ragged = [Curve("a", 0, [0, 1, 2, 3], [1.0, math.nan, None, 2.0]),
              Curve("gone", 1, [0], [math.inf])]
    chart = line_chart(ragged, "A", "episodes")
    assert [len(line) for line in points(chart, "mean")] == [2] and "gone" not in chart


def test_the_mean_over_seeds_leaves_out_a_point_that_one_seed_lacks():
    seeds = [Curve("a", 0, [0, 1, 2, 3], [1.0, None, 3.0, 4.0]),
             Curve("a", 0, [0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])]
    assert mean_curve(grouped(seeds)["a"]) == Curve("a", 0, [0, 2, 3], [1.0, 3.0, 4.0])


def test_page_draws_each_curve_with_all_its_points_and_the_method_first(results):
    source = page(results)
    lines = [(a["class"], len(a["points"].split())) for a in Reader(source).all("polyline")]
    win_rate = [("seed s1", 4), ("seed s1", 3), ("mean s0", 5), ("mean s1", 3)]
    legend = [("mean s0", 2), ("mean s1", 2)]               # the samples of the narrow form
    charts = [*win_rate, *win_rate, *legend]                # wide, narrow, legend
    assert lines == [*charts, *charts, ("mean s0", 2), ("mean s0", 2), legend[0]]
    assert "over episodes" in source and "over seconds" in source


def test_strip_places_mean_and_interval_on_the_shared_scale():
    drawn = Reader(strip(75, [50, 100], [60, 90], [0, 25, 50, 75, 100], 50))
    (disc,), (whisker,) = drawn.all("circle"), drawn.all("line", **{"class": "whisker"})
    low, high = float(whisker["x1"]), float(whisker["x2"])
    assert float(disc["cx"]) == pytest.approx((low + high) / 2, abs=0.1)
    assert low == float(drawn.all("line", **{"class": "reference"})[0]["x1"])
    assert len(drawn.all("line", **{"class": "tick"})) == 2


@pytest.mark.parametrize("values, expected", [
    ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]), ([46.4, 93.1, 50], [40, 50, 60, 70, 80, 90, 100]),
    ([-5.1, 21.8, 0], [-10, 0, 10, 20, 30]), ([3.0], [3, 3.2, 3.4, 3.6, 3.8, 4]),
    ([None, math.nan], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ([1 - 2 ** -53, 1.0], [1, 1.2, 1.4, 1.6, 1.8, 2]),            # differ by rounding only
    ([1e17], [1e17 + k * 2e10 for k in range(6)])])
def test_ticks_are_round_and_enclose_the_values(values, expected):
    assert ticks(values) == pytest.approx(expected)


def test_spread_separates_close_positions_and_keeps_the_order():
    assert spread([10, 12, 50], gap=15, high=100) == [10, 25, 50]
    assert spread([99, 98], gap=15, high=100) == [100, 85]
    assert spread([], gap=15, high=100) == []


# ----- texts ------------------------------------------------------------------------------------

def test_heat_maps_have_a_number_for_each_token_and_mark_errors(results):
    reader = Reader(heat_maps(results["examples"]["heat_maps"]))
    numbers = [text for text in reader.texts if re.fullmatch(r"[+−]\d\.\d|–", text)]
    assert numbers == ["+0.2", "+0.0", "+0.1", "−0.1", "+0.5", "+0.2", "−2.0", "+0.0", "–"]
    assert len(reader.all("u", **{"class": "error"})) == 2               # the legend and one token
    assert [a["style"] for a in reader.all("span") if a.get("class", "")[:5] == "token"][6:] == [
        "--strength:1.00", "--strength:0.02", "--strength:0.00"]
    assert [a["style"] for a in reader.all("span") if a.get("class", "").endswith("bad")] == [
        "--strength:0.00", "--strength:0.05", "--strength:1.00", "--strength:0.00"]


def test_heat_maps_refuse_lists_of_different_lengths():
    with pytest.raises(ValueError):
        heat_maps([{"prompt": "p", "tokens": ["a", "b"], "rewards": [1.0]}])


@pytest.mark.parametrize("blank", [" ", "\u2581"])
def test_edits_mark_each_run_of_changed_tokens_once(blank):
    shown = edits([{"prompt": "p",
                    "original_tokens": [f"{blank}It", f"{blank}is", f"{blank}n", "ot", "."],
                    "original_changed": [False, False, True, True, False],
                    "edited_tokens": [f"{blank}It", f"{blank}is", "."],
                    "edited_changed": [False] * 3}])
    assert "</b>It is <del>not</del>.</p>" in shown and "</b>It is.</p>" in shown


def test_before_after_counts_errors_in_words():
    row = {"prompt": "p", "before": "b", "before_errors": 2, "after": "a", "after_errors": 1}
    group = {"caption": "The first.", "labels": ["SFT", "ours"], "rows": [row]}
    text = Reader(before_after([group])).text
    assert "SFT: 2 errors" in text and "ours: 1 error" in text and "1 errors" not in text
    assert "The first." in text


def test_tag_escapes_texts_and_attributes_but_not_tags():
    assert tag("p", "<", tag("b", "&"), None, ["'", 1], class_='"', aria_label="<") == (
        '<p class="&quot;" aria-label="&lt;">&lt;<b>&amp;</b>&#x27;1</p>')


# ----- the text table ---------------------------------------------------------------------------

def test_text_table_is_this_text():
    one_seed = lambda value: cell(value, half=None)
    table = text_table({
        "systems": {"a": {"label": "PPO-RLHF", "metrics": {
                        "win_rate": cell(0.655), "errors": one_seed(0.92)}},
                    "b": {"label": "Fine-grained", "metrics": {
                        "win_rate": one_seed(1.0), "errors": one_seed(0.374),
                        "best_iteration": cell(24)}}},
        "comparisons": [{"label": "b minus a"} | cell(0.2021, half=0.0533)],
        "speed": [{"rows": [
            {"label": "episodes", "baseline": 3904, "method": 448.0, "ratio": 8.714}]}]})
    assert table.splitlines() == [
        "system                win rate %  errors  best it.",
        "--------------------------------------------------",
        "PPO-RLHF       65.5 [63.5, 67.5]    0.92         -",
        "Fine-grained  100.0                 0.37        24",
        "",
        "difference of win rates                points",
        "---------------------------------------------",
        "b minus a                +20.2 [+14.9, +25.5]",
        "",
        "speed     baseline  method  ratio",
        "---------------------------------",
        "episodes     3,904     448   8.7x"]


def test_text_table_keeps_its_width_and_aligns_its_columns(results):
    lines = text_table(results).splitlines()
    assert max(map(len, lines)) <= 108
    rows = [line for line in lines if re.search(r"\[\d\d\.\d, \d\d\.\d\]  +\d\d\.\d  ", line)]
    assert len(rows) == 4 and len({line.index("[") for line in rows}) == 1
    assert any("much longer" in line and "..." in line for line in lines)


@pytest.mark.parametrize("value, options, expected", [
    (0.8571, {"scale": 100, "digits": 1}, "85.7"), (-0.2, {"scale": 100, "digits": 1}, "-20.0"),
    (-0.0004, {"scale": 100, "digits": 1, "sign": "+"}, "+0.0"), (None, {}, "-"),
    (math.nan, {}, "-"), (math.inf, {}, "-"), ("never", {}, "never"), (0, {}, "0"),
    (1920, {}, "1,920"), (5.07, {}, "5.1"), (123.4, {}, "123")])
def test_number_as_text(value, options, expected):
    assert number(value, **options) == expected


@pytest.mark.parametrize("value, expected", [
    (8.714, "8.7x"), (cell(8.7, half=1.1), "8.7x [7.6, 9.8]"), (None, "-"), (math.nan, "-"),
    ("never", "never")])
def test_ratio_as_text(value, expected):
    assert ratio(value) == expected
