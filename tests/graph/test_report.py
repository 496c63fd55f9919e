"""The report of a plan: whole HTML, nothing from outside, every attention, and pictures whose areas are the work."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import cpcompile
from cpcompile import Explanation
from cpcompile.choose.machine import H100
from cpcompile.cli import app
from cpcompile.inspect.areas import by_own_rows, cells, matrices_of, matrix_of
from cpcompile.inspect.difference import without_type
from cpcompile.inspect.explanation import GatheredValue
from cpcompile.inspect.folded_graph import sections
from cpcompile.inspect.report.attention import names_of, site_groups
from cpcompile.inspect.report.elements import VOID, element, table
from cpcompile.inspect.report.graphs import stage, statements_of
from cpcompile.inspect.report.pictures import matrix_picture, memory_picture
from cpcompile.inspect.ring_step import ring_step
from cpcompile.memory.ledger import Ledger, Phase
from cpcompile.runtime.attention.workload import work_of
from cpcompile.runtime.schedule import Band, Visible
from tests.graph.small_models import TinyLM, batch
from tests.graph.test_memory import LAYERS, Stack, tokens

P, LENGTH = 4, 37
BANDS = [Band(None, 0), Band(-4, 0), Band(-3, 2), Band()]


class Page(HTMLParser):
    """Reads a page: which tags are open, and what its attributes and text are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def plan() -> Explanation:
    found = cpcompile.explain(Stack(), tokens(LENGTH), world_size=P, strategy="ring", balancer="zig_zag")
    phases = (
        Phase("forward", {"parameters": 7000, "saved": 3000}, "model.py:3"),
        Phase("optimizer", {"optimizer": 9000}, ""),
    )
    return replace(found, memory=Ledger(phases, host=500))


@pytest.fixture(scope="module")
def page(plan: Explanation) -> str:
    return plan.to_html("<script>alert('a & b')</script>")


def test_is_whole_html(page: str) -> None:
    read = Page(page)
    assert (read.open, read.seen.count("html"), read.seen.count("script")) == ([], 1, 1)
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value for name, value in read.attributes if name == "href"}
    parts = ("attention", "masks", "memory", "time", "messages", "tokens", "passes", "graphs")
    assert links == {f"#{part}" for part in parts}
    assert links <= {f"#{each}" for each in ids}


def test_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(|\ssrc=|<link", page)


def test_escapes_what_users_name(page: str) -> None:
    assert "<script>alert" not in page
    assert "alert('a & b')" in Page(page).text
    assert element("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'


def test_has_every_attention_once(plan: Explanation, page: str) -> None:
    text = Page(page).text
    ((path, group),) = site_groups(plan.sites)
    assert path == names_of(group) == f"blocks.{{0..{LAYERS - 1}}}"
    assert text.count(path) == 6  # the table, the pictures, the messages, and three graphs
    for site in plan.sites:
        assert site.line in text
    # An attention that differs is another line, and so are layers of another mask.
    other = replace(plan.sites[1], mask="causal, window 4")
    sites = [plan.sites[0], other, *plan.sites[2:]]
    assert [len(each) for _, each in site_groups(sites)] == [LAYERS - 1, 1]
    assert other.mask in Page(replace(plan, sites=tuple(sites)).to_html()).text


def test_has_all_that_the_text_has(plan: Explanation, page: str) -> None:
    text = Page(page).text
    gathered = GatheredValue("aten.x (x)", (2, 3), 24, "because of <it>", "model.py:7")
    assert "because of <it>" in Page(replace(plan, gathered=(gathered,)).to_html()).text
    for found in (*plan.inputs, *plan.outputs):
        assert found.value in text
    assert all(each.operator in text for each in plan.collectives)
    assert all(run.name in text for run in plan.passes)


def test_a_plan_without_memory_or_messages(plan: Explanation) -> None:
    site = replace(plan.sites[0], workload=None, strategy="whole on every rank", pairs=())
    bare = replace(plan, sites=(site,), memory=None, collectives=(), estimates={}, passes=(), before="", after="")
    read = Page(bare.to_html())
    assert read.open == []
    assert "Nothing is exchanged: whole on every rank." in read.text
    assert Page(replace(bare, sites=()).to_html()).open == []


def test_graphs_have_equal_layers_once(plan: Explanation) -> None:
    for listing in (plan.before, plan.analysed, plan.after):
        found = sections(listing)
        layers = [part for part in found if part.layers]
        assert [part.layers for part in layers] == [tuple(f"blocks.{i}" for i in range(LAYERS))]
        statements = sum(part.num_statements * max(1, len(part.layers)) for part in found)
        assert statements == sum(bool(line) and not line.startswith("#") for line in listing.split("\n"))


def test_graph_behind_each_pass() -> None:
    plan = cpcompile.explain(Stack(), tokens(LENGTH), world_size=P, strategy="ring", graphs=True)
    changed = [run.name for run in plan.passes if run.changes]
    assert list(plan.graphs) == [name for name in changed if name != "outline_layers"]
    stages = {"first": plan.before, **plan.graphs, "last": plan.after}
    for (_, old), (title, new) in itertools.pairwise(stages.items()):
        marked = re.findall(r'<code class="[^"]*new">([^<]*)', stage(title, new, statements_of(old)))
        assert all(without_type(unescape(line)) not in statements_of(old) for line in marked)
        assert bool(marked) == bool(statements_of(new) - statements_of(old))
    rewritten = stage("", plan.graphs["rewrite_attention"], statements_of(plan.graphs["place_tokens"]))
    assert rewritten.count('class="collective new">') == 1  # of equal layers, the first
    assert 'new"' not in stage("first", plan.before, set())
    text = Page(plan.to_html()).text
    codes = [plan.before, *plan.graphs.values()]
    assert "choose_strategies" in plan.graphs
    for (name, code), old in zip(plan.graphs.items(), codes, strict=False):
        assert (f"{name}: " in text) == (code != old)


def test_unequal_layers_are_apart() -> None:
    listing = "\n\n".join(
        f"# x + y    model.py:3, in blocks.{i}.mixer\nadd_{i}: f32[4] = aten.{'mul' if i == 1 else 'add'}(x, {i // 3})"
        for i in range(5)
    )
    assert [part.title for part in sections(listing)] == ["blocks.{0,2}", "blocks.1", "blocks.{3,4}"]


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag", "balanced"])
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("documents", [(), (0, 11, 12, 30)])
def test_areas_are_what_is_visible(layout: str, band: Band, documents: tuple[int, ...]) -> None:
    matrix = matrix_of(LENGTH, P, layout, Visible(band), documents=documents)
    holder = {p: rank for rank, spans in matrix.rows.items() for s in spans for p in range(s.position, s.end)}
    expected = [[0] * P for _ in range(LENGTH)]
    for q in range(LENGTH):
        for kv in range(LENGTH):
            in_band = (band.low is None or kv - q >= band.low) and (band.high is None or kv - q <= band.high)
            same = sum(start <= q for start in documents) == sum(start <= kv for start in documents)
            expected[q][holder[q]] += in_band and same
    assert list(matrix.work.values()) == [sum(row[rank] for row in expected) for rank in range(P)]
    for area in matrix.areas:
        assert area.size == pytest.approx(area.pairs, abs=0.5)  # 1/8 at each of at most four ends of bounds
    found = cells(matrix, LENGTH)
    assert [[sum(cell.get(rank, 0) for cell in row) for rank in range(P)] for row in found] == expected


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "usp", "gather"])
def test_the_picture_has_the_work_of_the_plan(strategy: str) -> None:
    inner = 2 if strategy == "usp" else 0
    found = cpcompile.explain(
        TinyLM(heads=P, width=16), batch(LENGTH), world_size=P, inner_size=inner, strategy=strategy
    )
    (site,) = found.sites
    assert site.workload is not None
    work = {rank: pairs for matrix in matrices_of(site.workload, strategy) for rank, pairs in matrix.work.items()}
    assert [work[rank] for rank in range(P)] == list(site.pairs)
    assert sum(by_own_rows(site.workload, "contiguous").work.values()) == sum(site.pairs)
    assert Page(found.to_html()).open == []


def test_polygons_of_the_picture_cover_the_work(plan: Explanation) -> None:
    workload = plan.sites[0].workload
    assert workload is not None
    (matrix,) = matrices_of(workload, "ring")
    picture = ElementTree.fromstring(matrix_picture(matrix, P))
    covered: dict[str, float] = {}
    for polygon in picture.iter("polygon"):
        points = [tuple(map(float, point.split(","))) for point in polygon.attrib["points"].split()]
        area = abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))) / 2
        covered[polygon.attrib["fill"]] = covered.get(polygon.attrib["fill"], 0) + area
    scale = (300 / LENGTH) ** 2  # of the picture: square units for each pair
    for area, work in zip(covered.values(), matrix.work.values(), strict=True):
        assert area / scale == pytest.approx(work / matrix.heads, abs=1.0)  # two pieces with bounds


def test_memory_bars_are_as_long_as_the_ledger_says(plan: Explanation) -> None:
    assert plan.memory is not None
    picture = ElementTree.fromstring(memory_picture(plan.memory))
    bars = [float(bar.attrib["width"]) for bar in picture.iter("rect")]
    sizes = [size for phase in plan.memory.phases for size in phase.held.values()]
    assert len(bars) == len(sizes)
    assert len({round(bar / size, 6) for bar, size in zip(bars, sizes, strict=True)}) == 1


@pytest.mark.parametrize(("length", "waits"), [(1 << 16, False), (1 << 8, True)])
def test_a_ring_waits_for_what_it_computes_with(plan: Explanation, length: int, waits: bool) -> None:
    assert plan.sites[0].workload is not None
    workload = replace(plan.sites[0].workload, length=length)
    lanes = ring_step(workload, "ring", "cudnn", H100)
    assert [lane.ranks for lane in lanes] == [(rank,) for rank in range(P)]
    for lane in lanes:
        assert [found.source for found in lane.computes] == [(lane.place - step) % P for step in range(P)]
        assert sum(found.pairs for found in lane.computes) == work_of(workload, "ring", lane.place)
        for before, arrival, after in zip(lane.computes[:-1], lane.arrives, lane.computes[1:], strict=True):
            assert (arrival.source, arrival.nbytes > 0) == (after.source, True)
            assert arrival.start == before.start
            assert after.start == (arrival.end if waits else before.end) == max(arrival.end, before.end)


def test_numbers_are_on_the_right() -> None:
    found = table(("name", "bytes"), [("a", "3 KiB"), ("b", "")])
    assert found.count('class="number"') == found.count('class="text"') == 3


def test_command_writes_a_report(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, plan: Explanation) -> None:
    (tmp_path / "report_factory.py").write_text("import torch\n\n\ndef model():\n    return torch.nn.Identity(), {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpcompile, "explain", lambda *args, **options: plan, raising=False)
    result = CliRunner().invoke(app, ["explain", "report_factory:model", "--html", "report.html"])
    assert result.exit_code == 0, result.output
    assert Page((tmp_path / "report.html").read_text()).open == []
    for wrong, message in (("report.txt", "is one of .html"), ("no/report.html", "the folder no does not exist")):
        result = CliRunner().invoke(app, ["explain", "report_factory:model", "--html", wrong])
        assert (result.exit_code, message in result.stderr) == (2, True)
