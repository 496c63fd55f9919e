"""The interactive timeline: its data, and what its script draws, finds and tells."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cpcompile.cli import app
from cpcompile.errors import ConfigError
from cpcompile.inspect.timeline import DEPTH, read_tracks, to_data
from tests.graph.test_profile import event, kernel, write
from tests.graph.test_stream_times import LAYER, ONE_STEP

ODD = "a</script><b>&"
NODE = shutil.which("node")
# What a browser gives the script: elements that keep their handlers, and a pen that counts. A test looks at what is drawn then.
BROWSER = """
const fs = require("fs"), html = fs.readFileSync(process.argv[2], "utf8"), handlers = {}, elements = {};
const json = html.match(/<script type="application.json" id="data">([^]*?)<.script>/)[1];
const script = html.match(/<script>([^]*)<.script>/)[1];
const drawn = [], noted = (of, name) => (...given) => drawn.push([name, ...given, of.fillStyle]);
const pen = new Proxy({}, { get: (of, name) => of[name] ?? noted(of, name) });
for (const [, name] of html.matchAll(/ id="([a-z-]+)"/g)) elements[name] = { textContent: name === "data" ? json : "", value: "",
  style: {}, clientWidth: 800, getContext: () => pen, setPointerCapture() {}, getBoundingClientRect: () => ({ left: 0, top: 0 }),
  addEventListener(kind, f) { handlers[`${name} ${kind}`] = f; } };
globalThis.document = { getElementById: name => elements[name] };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "black" });
globalThis.window = { addEventListener() {}, matchMedia: () => ({ addEventListener() {} }) };
const frames = [];
globalThis.requestAnimationFrame = f => frames.push(f);
function settle() {
  drawn.length = 0;
  while (frames.length) frames.shift()();
  return drawn.filter(([name, , , , height]) => name === "fillRect" && height < 20);
}
const key = key => handlers["timeline keydown"]({ key, preventDefault() {} });
const search = text => { elements.search.value = text; handlers["search input"](); };
const at = (x, y) => ({ pointerId: 1, clientX: x, clientY: y });
(0, eval)(script);
"""


def page_of(tmp_path: Path, events: list[dict[str, Any]]) -> Path:
    out = tmp_path / "timeline.html"
    result = CliRunner().invoke(
        app, ["plot", "timeline", str(write(tmp_path / "a.json", events, 0)), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    return out


def in_browser(page: Path, step: str) -> Any:
    """Return what an expression is in the page, after it has drawn once."""
    program = page.with_suffix(".js")
    program.write_text(f"{BROWSER}const first = settle();\nconsole.log(JSON.stringify({step}));")
    assert NODE is not None
    done = subprocess.run([NODE, str(program), str(page)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(NODE is None, reason="runs the page's script with node")


def test_what_ran_is_in_rows(tmp_path: Path) -> None:
    nested = [event("cpu_op", f"aten::op{i}", 10 + i, 60 - 2 * i) for i in range(DEPTH + 2)]
    tracks = read_tracks([write(tmp_path / "a.json", [*ONE_STEP, *nested], 0)])
    titles = [track.title for track in tracks if track.title]
    streams = [f"rank 0, stream {number}" for number in (7, 9, 20)]
    assert titles == [*streams, "rank 0, layers as the host launches them", "rank 0, host"]
    assert len(tracks) == len(titles) + DEPTH - 1
    for track in tracks:
        assert all(a.end <= b.start for a, b in zip(track.bars, track.bars[1:], strict=False))
    first = tracks[0].bars[0]
    assert (first.name, first.kind, first.layer) == ("flash", "attention", "ring zig_zag model.layers.0.attn")
    assert first.delay == pytest.approx(5e-6)
    assert (tracks[0].bars[1].layer, tracks[0].bars[-1].layer) == ("model.layers.0", "model.layers.0 backward")
    assert tracks[2].bars[0].kind == "transfer"


def test_the_page_needs_nothing_else_and_holds_all_events(tmp_path: Path) -> None:
    page = page_of(tmp_path, [*ONE_STEP, *kernel(ODD, 8, 190, 5, 7, launched=189)])
    text = page.read_text()
    assert not re.findall(r"https?://|@import|url\(|<link|<img|src=", text)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text)[0])
    assert data["texts"] == to_data(read_tracks([tmp_path / "a.json"]))["texts"]
    assert ODD in data["texts"]
    seven = data["tracks"][0]
    assert seven["start"] == [10.0, 33.0, 80.0, 120.0, 160.0, 180.0]  # since the first range
    assert seven["length"] == [20.0, 17.0, 10.0, 20.0, 10.0, 5.0]


@needs_node
def test_bars_are_drawn_told_and_found(tmp_path: Path) -> None:
    page = page_of(tmp_path, ONE_STEP)
    num_bars = sum(len(track.bars) for track in read_tracks([tmp_path / "a.json"]))
    step = """(() => {
      const [, left, top] = first.find(bar => bar[5] === "#4e79a7");
      handlers["timeline pointermove"](at(left + 2, top + 2));
      const tip = elements.tip.textContent;
      search("SENDRECV");
      key("Enter");
      const hits = settle().filter(bar => bar[5] === "#e15759");
      const [found, picked] = [elements.found.textContent, elements.picked.textContent];
      return { count: first.length, tip, found, picked, hits: hits.length };
    })()"""
    told = in_browser(page, step)
    assert told["count"] == num_bars
    assert told["tip"] == "flash\n20 us, from 10 us\nin ring zig_zag model.layers.0.attn\nstarted 5 us after its launch"
    assert told["found"] == "1 of 1"
    assert told["picked"].startswith("ncclDevKernel_SendRecv; 18 us")
    assert told["hits"] == 1


@needs_node
def test_keys_mouse_and_fingers_zoom_and_move(tmp_path: Path) -> None:
    page = page_of(tmp_path, ONE_STEP)
    step = """(() => {
      const widest = () => Math.max(...settle().map(bar => bar[3])), all = Math.max(...first.map(bar => bar[3]));
      const found = {};
      key("+"); found.key = widest() / all;
      key("0"); found.whole = widest() / all;
      handlers["timeline wheel"]({ ctrlKey: true, deltaY: -100, ...at(400, 5), preventDefault() {} });
      found.wheel = widest() / all;
      key("0"); settle();
      for (const [id, x] of [[1, 300], [2, 500]]) handlers["timeline pointerdown"]({ ...at(x, 5), pointerId: id });
      handlers["timeline pointermove"]({ ...at(700, 5), pointerId: 2 }); found.fingers = widest() / all;
      key("ArrowRight");
      const left = settle().map(bar => bar[1]); key("ArrowLeft"); const back = settle().map(bar => bar[1]);
      found.moved = left.join() !== back.join();
      return found;
    })()"""
    told = in_browser(page, step)
    assert told["whole"] == 1
    assert min(told["key"], told["wheel"], told["fingers"]) > 1.1, told
    assert told["moved"]


@needs_node
def test_many_events_take_few_strokes(tmp_path: Path) -> None:
    """What shares a pixel is drawn once, so that a picture of 100 thousand events is one of its width."""
    events = [each for i in range(50_000) for each in kernel("gemm", i, 3 * i, 2, 7, launched=3 * i)]
    page = page_of(tmp_path, [*events, event("user_annotation", LAYER, 0, 10)])
    told = in_browser(page, "{ count: first.length, near: (key('+'), settle().length) }")
    assert 800 <= told["count"] <= 2 * 2 * 800
    assert told["near"] <= 2 * 2 * 800


@pytest.mark.parametrize(
    "broken",
    [
        '{"ph": "X", "name": "aten::mm", "cat": "cpu_op"}',
        '{"ph": "X", "name": "aten::mm", "cat": "cpu_op", "ts": "x"}',
        '{"ph": "X", "name": "aten::mm", "cat": "cpu_op", "ts": NaN}',
        '{"ph": "X", "cat": "cpu_op", "ts": 1}',
    ],
)
def test_an_event_without_name_or_time_is_refused(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "rank0.json"
    path.write_text(f'{{"traceEvents": [1, null, {broken}]}}')
    with pytest.raises(ConfigError, match="an event without a name, or without a time"):
        read_tracks([path])
