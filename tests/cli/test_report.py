"""`reparam report`: one page with the data of each tensor, safe against names from files, and `draw` as SVG."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import rewriter
from rewriter.cli._report import page
from rewriter.io import save_model

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>{{DATA}}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """The elements of a page, and the text of its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture
def rewritten(reparam, folder):
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt").code == 0
    return folder / "rewritten.pt"


def test_the_report_has_each_tensor_before_and_after(reparam, folder, rewritten):
    result = reparam("report", "model.pt", rewritten, "-o", "out.html", "--json")
    assert result.code == 0, result.err
    data = Page((folder / "out.html").read_text()).data
    assert {key: result.json[key] for key in data} == data
    rows = {row["names"][0]: row for row in data["tensors"]}
    assert list(rows) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    before = torch.load("model.pt", weights_only=False)[0].weight.detach().double()
    after = (before + before.mT) / 2
    row = rows["0.weight"]
    assert (row["rule"], row["chain"], row["reads"]) == ("even", ["symmetric"], 1)
    assert row["before"]["norm"] == pytest.approx(float(before.norm()))
    assert row["after"]["norm"] == pytest.approx(float(after.norm()))
    assert row["moved"] == pytest.approx(float((after - before).norm() / before.norm()))
    assert row["after"]["singular"] == pytest.approx(torch.linalg.svdvals(after).tolist(), rel=1e-3)
    assert rows["0.bias"]["moved"] == 0
    assert data["rules"] == [
        {"name": "even", "chains": ["symmetric"], "tensors": 2, "moved": data["rules"][0]["moved"]}
    ]
    assert data["totals"]["computed"] == 2
    assert [tag for tag, _ in Page((folder / "out.html").read_text()).tags if tag in ("h3", "svg")] == ["h3", "svg"] * 2


def test_the_model_before_can_be_bare_weights(reparam, folder, rewritten):
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "weights.pt")
    whole, weights = (
        reparam("report", before, rewritten, "-o", "out.html", "--json", "--force").json
        for before in ("model.pt", "weights.pt")
    )
    assert whole["tensors"] == weights["tensors"]


def test_one_model_is_compared_with_its_stored_tensors(reparam, folder, rewritten):
    data = reparam("report", rewritten, "-o", "out.html", "--json").json
    assert data["compared"] == "stored tensors"
    assert [row["before"] is not None for row in data["tensors"]] == [True] * 4
    again = reparam("report", rewritten, "-o", "out.html")
    assert again.code != 0
    assert "--force" in again.err


def test_the_values_of_a_program_have_no_stored_tensor_to_compare_with(reparam, folder):
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (torch.ones(1, 4),))
    rule = {"name": "double", "select": "0.weight", "init": "raw", "chain": [{"scale": {"factor": 2.0}}]}
    save_model(rewriter.rewrite(program, {"reparam": 1, "rules": [rule]}), "new.pt2")
    weight, bias = reparam("report", "new.pt2", "-o", "out.html", "--trust", "--json").json["tensors"]
    assert (weight["before"], weight["moved"], bias["moved"]) == (None, None, 0)
    assert weight["after"]["norm"] == pytest.approx(2 * float(program.state_dict["0.weight"].detach().norm()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--capture", "module"), "not known: the model kept its class"), ((), None)],
    ids=["module", "graph"],
)
def test_evaluations_that_are_not_counted_have_a_reason(reparam, folder, options, reason):
    reparam("apply", "spec.yaml", "model.pt", "-o", "rewritten.pt", *options)
    totals = reparam("report", "rewritten.pt", "-o", "out.html", "--json").json["totals"]
    assert (totals["uncounted"] or "").startswith(reason or "")
    assert (totals["uncounted"] is None) == (totals["saved"] is not None) == (reason is None)
    assert reparam("report", "model.pt", "-o", "plain.html", "--json").json["totals"]["uncounted"] is None


def test_evaluations_saved_zeros_and_warnings(reparam, folder):
    cell = nn.Linear(4, 4)
    model = nn.Sequential(cell, nn.Tanh(), cell, cell, nn.Linear(4, 2))
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    rules = [{"name": "half", "select": "0.weight", "chain": [{"l1_unstructured": {"amount": 0.25}}]}]
    save_model(rewriter.rewrite(model, {"reparam": 1, "rules": rules}, without=["transpose"]), "new.pt")
    data = reparam("report", "new.pt", "-o", "out.html", "--json").json
    assert (data["totals"]["reads"], data["totals"]["saved"]) == (3, 2)
    assert data["tensors"][0]["after"]["zeros"] == 0.25
    assert data["warnings"] == [{"text": "NaN or infinite entries", "names": ["4.bias"]}]


def test_names_from_a_file_are_never_markup(reparam, folder):
    document = reparam("report", "model.pt", "-o", "out.html", "--json").json
    del document["output"]
    document["title"] = document["tensors"][0]["names"][0] = document["class"] = HOSTILE
    document["rules"] = [{"name": HOSTILE, "chains": [HOSTILE], "tensors": 1, "moved": 0.0}]
    document["warnings"] = [{"text": HOSTILE, "names": [HOSTILE]}]
    made = page(document, "<svg></svg>")
    plain = Page((folder / "out.html").read_text())
    hostile = Page(made)
    assert [tag for tag, _ in hostile.tags if tag in ("script", "img")] == ["script", "script"]
    assert hostile.data == document
    assert {tag for tag, _ in hostile.tags} <= {tag for tag, _ in plain.tags} | {"svg"}
    assert not [value for _, attributes in hostile.tags for value in attributes.values() if value and "http" in value]


def test_ten_thousand_tensors_are_data_and_not_rows():
    row = {"names": ["w"], "kind": "parameter", "shape": [2, 2], "dtype": "float32", "rule": None, "chain": None}
    row |= {"cache": None, "reads": None, "moved": None, "before": None, "after": None}
    totals = {"tensors": 10_000, "computed": 0, "reads": None, "saved": None, "stored_bytes": 1, "plain_bytes": 1}
    document = {"title": "m", "compared": "x", "class": "M", "tensors": [row] * 10_000, "rules": [], "warnings": []}
    made = Page(page({**document, "totals": totals}))
    assert len(made.data["tensors"]) == 10_000
    assert sum(tag == "tr" for tag, _ in made.tags) == 2


def large_page(script):
    """A report of 10,000 tensors, and a script that runs when the page has loaded."""
    rows = []
    for number in range(10_000):
        numbers = {"finite": True, "zeros": 0.5, "norm": 2.0, "singular": [2.0, 1.0] * 16}
        row = {"names": [f"{HOSTILE}.{number}"], "kind": "parameter", "shape": [64, 64], "dtype": "float32"}
        row |= {"rule": "r", "chain": ["orthogonal(map=cayley)"], "cache": "forward", "reads": 1}
        rows.append({**row, "moved": number % 97 / 100, "before": numbers, "after": numbers})
    totals = {"tensors": 10_000, "computed": 10_000, "reads": 10_000, "saved": 0, "stored_bytes": 1, "plain_bytes": 1}
    rules = [{"name": HOSTILE, "chains": ["a"], "tensors": 10_000, "moved": 0.96}]
    document = {"title": HOSTILE, "compared": "x", "class": "M", "tensors": rows, "rules": rules, "warnings": []}
    return page({**document, "totals": totals}).replace("</body>", f"<script>{script}</script></body>")


def browse(path, *options):
    """Open a page in Chromium; return its elements, and what its script left in the title as JSON."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    profile = f"--user-data-dir={path.parent}/profile"
    command = [CHROMIUM, *always, profile, *options, f"file://{path}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return Page(shown), json.loads(unescape(shown.partition("<title>")[2].partition("</title>")[0]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_ten_thousand_tensors_open_in_two_seconds_and_are_sorted_and_searched(tmp_path):
    script = """addEventListener("load", () => {
      const found = {ready: performance.now(), rows: document.querySelectorAll("#rows tr").length};
      const head = [...document.querySelectorAll("#heads button")].find((one) => one.textContent === "moved");
      head.focus();
      head.click(); head.click();
      found.sorted = document.querySelector("#rows td:nth-child(5)").textContent;
      dispatchEvent(new KeyboardEvent("keydown", {key: "/"}));
      const search = document.getElementById("search");
      search.value = "4321";
      search.dispatchEvent(new Event("input"));
      found.count = document.getElementById("count").textContent;
      const name = document.querySelector("#rows button");
      name.click();
      found.open = name.getAttribute("aria-expanded") === "true" && !!document.querySelector("#rows .more svg");
      document.title = JSON.stringify(found);
    });"""
    (tmp_path / "out.html").write_text(large_page(script))
    shown, found = browse(tmp_path / "out.html")
    assert found.pop("ready") < 2000
    assert 60 <= found.pop("rows") < 500
    assert found == {"sorted": "0.96", "count": "1 of 10000", "open": True}
    assert not [tag for tag, _ in shown.tags if tag == "img"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("scheme", "colour"), [("0", "rgb(20, 23, 28)"), ("1", "rgb(255, 255, 255)")])
def test_a_phone_shows_the_report_without_scrolling_sideways(tmp_path, scheme, colour):
    script = """addEventListener("load", () => {
      const style = (name) => getComputedStyle(document.querySelector(name));
      const width = document.documentElement.scrollWidth;
      parent.postMessage([width, style("thead").position, style("body").backgroundColor], "*");
    });"""
    (tmp_path / "out.html").write_text(large_page(script))
    listen = "<script>onmessage = (event) => { document.title = JSON.stringify(event.data); };</script>"
    phone = f'<title>[]</title>{listen}<iframe src="out.html" width="360" height="700" style="border: 0"></iframe>'
    (tmp_path / "phone.html").write_text(phone)
    settings = ("--hide-scrollbars", f"--blink-settings=preferredColorScheme={scheme}")
    assert browse(tmp_path / "phone.html", *settings, "--virtual-time-budget=5000")[1] == [360, "absolute", colour]


@pytest.mark.parametrize("capture", ["graph", "module"])
def test_draw_writes_a_graph_with_its_chains_as_svg(reparam, folder, capture):
    assert reparam("apply", "spec.yaml", "model.pt", "-o", "new.pt", "--capture", capture).code == 0
    assert reparam("draw", "new.pt", "-o", "graph.svg").code == 0
    image = ElementTree.parse("graph.svg").getroot()
    texts = [text.text for text in image.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == reparam("draw", "new.pt", "--json").json["graph"]
    assert sum(text.endswith("original >> symmetric") for text in texts) == 2
    assert len(list(image.iter("{http://www.w3.org/2000/svg}path"))) >= 2
    assert "name the file .svg" in reparam("draw", "new.pt", "-o", "graph.png").err
