"""Timeline script: how the picture is drawn, moved, and searched in the browser.

Bars of a row follow one another, so that those in view are found by bisection; of those that share a pixel, the first is drawn.
"""

from cpcompile.inspect.report.elements import Markup

TIMELINE_STYLE = Markup("""
.tools { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 12px 0; }
.tools input { flex: 1 1 220px; }
button { font: inherit; padding: 7px 11px; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; cursor: pointer; }
.picture { position: relative; border: 1px solid var(--line); border-radius: 8px; background: var(--card); overflow: hidden; }
canvas { display: block; width: 100%; touch-action: pan-y; cursor: grab; }
canvas:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
#tip { position: absolute; max-width: min(360px, 92%); padding: 6px 9px; font-size: 13px; pointer-events: none;
  background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; box-shadow: 0 2px 8px rgb(0 0 0 / 25%); overflow-wrap: anywhere;
  white-space: pre-line; }
#picked { min-height: 1.5em; overflow-wrap: anywhere; }
main, header { max-width: 1600px; }
""")

SCRIPT = Markup("""
const data = JSON.parse(document.getElementById("data").textContent);
const byId = name => document.getElementById(name);
const canvas = byId("timeline"), tip = byId("tip"), picked = byId("picked"), field = byId("search"), told = byId("found");
const TITLE = 16, GAP = 6, AXIS = 22, INSIDE = "#14171b", HIT = "#e15759";
const LEAST = 0.01;  // microseconds that are shown at least
const tracks = data.tracks.map(track => ({ ...track, start: Float64Array.from(track.start),
  length: Float64Array.from(track.length) }));
const total = Math.max(data.end, LEAST);
const BAR = Math.max(6, Math.min(16, 12000 / tracks.length - TITLE));
let from = 0, to = total, wide = 300, hits = [], hit = -1, wanted = null, chosen = null, waiting = false;

let at = AXIS;
for (const track of tracks) {
  at += track.title === "" ? 1 : TITLE + GAP;
  track.top = at;
  at += BAR;
}
const tall = at + GAP;

const scaled = time => (time - from) / (to - from) * wide;
const timeAt = x => from + x / wide * (to - from);

function spoken(us) {
  const [size, unit] = us >= 1e6 ? [1e6, "s"] : us >= 1e3 ? [1e3, "ms"] : us >= 1 ? [1, "us"] : [1e-3, "ns"];
  return `${Number((us / size).toPrecision(4))} ${unit}`;
}

// The place of the first bar of a track that ends behind a time, among all or in a list of them.
function firstBehind(track, time, list = null) {
  let low = 0, high = list ? list.length : track.start.length;
  while (low < high) {
    const middle = (low + high) >> 1, i = list ? list[middle] : middle;
    if (track.start[i] + track.length[i] < time) low = middle + 1; else high = middle;
  }
  return low;
}

// Calls paint with each bar in view, where it begins and how wide it is; of those that share a pixel, with the first.
function paintBars(track, list, paint) {
  const count = list ? list.length : track.start.length;
  let place = firstBehind(track, from, list);
  while (place < count) {
    const i = list ? list[place] : place;
    if (track.start[i] > to) return;
    const left = Math.max(0, scaled(track.start[i])), right = Math.min(wide, scaled(track.start[i] + track.length[i]));
    const width = Math.max(right - left, 1);
    paint(i, left, width);
    place = width > 1 ? place + 1 : Math.max(place + 1, firstBehind(track, timeAt(left + 1), list));
  }
}

function draw() {
  waiting = false;
  const style = getComputedStyle(document.documentElement), color = name => style.getPropertyValue(name).trim();
  const ratio = window.devicePixelRatio || 1;
  wide = canvas.clientWidth || 300;
  canvas.style.height = `${tall}px`;
  canvas.width = Math.round(wide * ratio);
  canvas.height = Math.round(tall * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, wide, tall);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  drawAxis(pen, color("--muted"), color("--line"));
  for (const track of tracks) drawTrack(pen, track, color("--ink"), color("--muted"));
}

function drawAxis(pen, ink, line) {
  const rough = (to - from) / Math.max(2, wide / 110), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(x => x * power).find(x => x >= rough);
  for (let number = Math.ceil(from / step); number * step <= to; number++) {
    const x = scaled(number * step);
    pen.fillStyle = line;
    pen.fillRect(x, 0, 1, tall);
    pen.fillStyle = ink;
    pen.fillText(spoken(number * step), x + 3, 9);
  }
}

function drawTrack(pen, track, ink, muted) {
  if (track.title !== "") {
    pen.fillStyle = muted;
    pen.fillText(track.title, 4, track.top - TITLE / 2);
  }
  const box = (fill, text, opacity = 1) => (i, left, width) => {
    pen.globalAlpha = opacity;
    pen.fillStyle = fill ?? data.colors[data.texts[track.kind[i]]];
    pen.fillRect(left, track.top, width > 3 ? width - 0.5 : width, BAR);
    pen.globalAlpha = 1;
    if (width > 40 && BAR >= 11) drawName(pen, data.texts[track.name[i]], text, left, track.top, width);
  };
  paintBars(track, null, wanted === null ? box(null, INSIDE) : box(null, ink, 0.3));
  if (wanted !== null) paintBars(track, track.hits, box(HIT, INSIDE));
  if (chosen && chosen.track === track) {
    const { i } = chosen, left = scaled(track.start[i]), width = Math.max(scaled(track.start[i] + track.length[i]) - left, 1);
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.strokeRect(left - 1, track.top - 1, width + 2, BAR + 2);
  }
}

function drawName(pen, name, ink, left, top, width) {
  const fits = Math.floor((width - 6) / 6.2);
  pen.fillStyle = ink;
  pen.fillText(name.length > fits ? name.slice(0, Math.max(0, fits - 1)) + "\\u2026" : name, left + 3, top + BAR / 2 + 0.5);
}

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(draw);
}

function show(start, end) {
  const length = Math.min(total, Math.max(LEAST, end - start));
  from = Math.min(Math.max(0, start), total - length);
  to = from + length;
  redraw();
}

function zoom(factor, x = wide / 2) {
  const time = timeAt(x), length = Math.min(total, Math.max(LEAST, (to - from) * factor));
  show(time - x / wide * length, time + (1 - x / wide) * length);
}

function move(pixels) {
  const time = pixels / wide * (to - from);
  show(from + time, to + time);
}

// The bar at a place of the picture; bars that are narrow can be hit 3 pixels beside.
function barAt(x, y) {
  const track = tracks.find(each => y >= each.top && y < each.top + BAR);
  if (!track) return null;
  const near = 3 / wide * (to - from), time = timeAt(x);
  let best = null, least = near;
  for (let i = firstBehind(track, time - near); i < track.start.length && track.start[i] <= time + near; i++) {
    const off = Math.max(track.start[i] - time, time - track.start[i] - track.length[i], 0);
    if (off <= least) {
      best = { track, i };
      least = off;
      if (off === 0) break;
    }
  }
  return best;
}

function about({ track, i }) {
  const layer = data.texts[track.layer[i]], delay = track.delay[i];
  const lines = [data.texts[track.name[i]], `${spoken(track.length[i])}, from ${spoken(track.start[i])}`];
  if (layer !== "") lines.push(`in ${layer}`);
  if (delay !== null) lines.push(`started ${spoken(delay)} after its launch`);
  return lines;
}

function point(x, y) {
  const found = barAt(x, y);
  tip.hidden = !found;
  if (!found) return;
  tip.textContent = about(found).join("\\n");
  tip.style.left = `${Math.max(4, Math.min(x + 12, wide - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(0, Math.min(y + 16, tall - tip.offsetHeight - 4))}px`;
}

function choose(found) {
  chosen = found;
  picked.textContent = found ? about(found).join("; ") : "";
  redraw();
}

function search() {
  const text = field.value.trim().toLowerCase();
  wanted = text === "" ? null : data.texts.map(each => Number(each.toLowerCase().includes(text)));
  hits = [];
  hit = -1;
  if (wanted !== null) {
    for (const track of tracks) {
      track.hits = [];
      for (let i = 0; i < track.start.length; i++) if (wanted[track.name[i]] + wanted[track.layer[i]]) track.hits.push(i);
      for (const i of track.hits) hits.push({ track, i });
    }
    hits.sort((a, b) => a.track.start[a.i] - b.track.start[b.i]);
  }
  tell();
  redraw();
}

function tell() {
  told.textContent = wanted === null ? "" : hit < 0 ? `${hits.length} hit(s)` : `${hit + 1} of ${hits.length}`;
}

function goTo(step) {
  if (hits.length === 0) return;
  hit = hit < 0 && step < 0 ? hits.length - 1 : (hit + step + hits.length) % hits.length;
  const found = hits[hit], start = found.track.start[found.i], length = found.track.length[found.i];
  const range = Math.min(to - from, Math.max(length * 20, LEAST));
  show(start + length / 2 - range / 2, start + length / 2 + range / 2);
  choose(found);
  tell();
}

function clearSearch() {
  field.value = "";
  search();
  choose(null);
}

const pointers = new Map();
let moved = 0;
const placeOf = event => {
  const box = canvas.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
};
canvas.addEventListener("pointerdown", event => {
  pointers.set(event.pointerId, placeOf(event));
  canvas.setPointerCapture(event.pointerId);
  moved = 0;
});
canvas.addEventListener("pointermove", event => {
  const now = placeOf(event), before = pointers.get(event.pointerId);
  if (!before) return point(now.x, now.y);
  tip.hidden = true;
  const other = [...pointers.entries()].find(([id]) => id !== event.pointerId);
  if (other) {
    const apart = Math.abs(now.x - other[1].x), was = Math.abs(before.x - other[1].x);
    if (apart > 8 && was > 8) zoom(was / apart, (now.x + other[1].x) / 2);
  } else move(before.x - now.x);
  moved += Math.abs(now.x - before.x);
  pointers.set(event.pointerId, now);
});
canvas.addEventListener("pointerup", event => {
  const now = placeOf(event);
  if (pointers.size === 1 && moved < 4) {
    choose(barAt(now.x, now.y));
    point(now.x, now.y);
  }
  pointers.delete(event.pointerId);
});
canvas.addEventListener("pointercancel", event => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("dblclick", event => zoom(event.shiftKey ? 3 : 1 / 3, placeOf(event).x));
canvas.addEventListener("wheel", event => {
  if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY / 200), placeOf(event).x);
  else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) move(event.deltaX || event.deltaY);
  else return;
  event.preventDefault();
}, { passive: false });
const closer = () => zoom(1 / 1.5), further = () => zoom(1.5), all = () => show(0, total);
const KEYS = { ArrowLeft: () => move(-wide / 8), ArrowRight: () => move(wide / 8), ArrowUp: closer, ArrowDown: further,
  "+": closer, "=": closer, "-": further, 0: all, Home: all, Enter: () => goTo(1), Escape: clearSearch };
canvas.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  if (event.key === "Enter" && event.shiftKey) goTo(-1); else KEYS[event.key]();
  event.preventDefault();
});
field.addEventListener("input", search);
field.addEventListener("keydown", event => {
  if (event.key === "Enter") goTo(event.shiftKey ? -1 : 1);
  if (event.key === "Escape") clearSearch();
});
byId("zoom-in").addEventListener("click", () => zoom(0.5));
byId("zoom-out").addEventListener("click", () => zoom(2));
byId("zoom-all").addEventListener("click", () => show(0, total));
byId("zoom-back").addEventListener("click", () => goTo(-1));
byId("zoom-next").addEventListener("click", () => goTo(1));
window.addEventListener("resize", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
""")
