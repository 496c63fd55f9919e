"""Style: the look of the page in light and dark, and the script of its search."""

from cpcompile.inspect.report.elements import Markup

STYLE = Markup("""
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1d2129; --muted: #5d6673; --line: #dcdfe4;
  --accent: #2f5f9e; --empty: #eef0f2; --mark: #fff0b8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --card: #1c2026; --ink: #e4e7eb; --muted: #9aa4b1; --line: #343b45; --accent: #8ab4ec;
    --empty: #262b32; --mark: #5a4a12; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main, header { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 8px; }
h3 { font-size: 15px; margin: 24px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 80ch; }
p, figcaption, .legend { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 12px; }
a { color: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; padding: 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.cards dt { color: var(--muted); font-size: 13px; }
.cards dd { margin: 0; font-size: 18px; font-weight: 600; overflow-wrap: anywhere; }
.cards small { display: block; font-size: 13px; font-weight: 400; color: var(--muted); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 6px 9px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
td small { display: block; color: var(--muted); }
th { color: var(--muted); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; min-width: 0; max-width: 100%; padding: 12px;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-size: 13px; margin-top: 6px; }
figure.small figcaption { max-width: 326px; }
svg { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide svg { max-width: none; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .quiet { fill: var(--muted); }
svg .empty { fill: var(--empty); }
svg .inside { fill: #ffffff; paint-order: stroke; stroke: rgb(0 0 0 / 45%); stroke-width: 2px; }
svg .over { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg polygon { stroke-width: 0.5px; }
svg .edge { fill: none; stroke: var(--line); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 0; margin: 8px 0; font-size: 13px; }
.chip { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; vertical-align: -1px; }
input[type=search] { width: 100%; max-width: 480px; font: inherit; padding: 8px 10px; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
details { margin: 6px 0; }
details.stage { border: 1px solid var(--line); border-radius: 8px; background: var(--card); padding: 0 12px; }
summary { cursor: pointer; padding: 8px 0; overflow-wrap: anywhere; }
details.stage > summary { font-weight: 600; }
summary small { font-weight: 400; color: var(--muted); }
.code { overflow-x: auto; font: 12.5px/1.55 ui-monospace, monospace; padding: 2px 0 10px 8px; }
.code > div { width: max-content; min-width: 100%; }
.block { margin-top: 8px; }
.block code { display: block; white-space: pre; font: inherit; }
.block .source { color: var(--muted); }
.block .collective { color: var(--accent); font-weight: 600; }
.block .new { border-left: 3px solid var(--accent); padding-left: 5px; margin-left: -8px; }
.hit { background: var(--mark); }
[hidden] { display: none !important; }
footer { color: var(--muted); font-size: 13px; padding: 40px 0 24px; }
""")

SCRIPT = Markup("""
const field = document.getElementById("search"), told = document.getElementById("found");
const lines = [...document.querySelectorAll("#graph code")];
const folds = [...document.querySelectorAll("#graph details")];
field.addEventListener("input", () => {
  const wanted = field.value.trim().toLowerCase();
  let found = 0;
  for (const line of lines) {
    const hit = wanted !== "" && line.textContent.toLowerCase().includes(wanted);
    line.classList.toggle("hit", hit);
    found += hit;
  }
  for (const block of document.querySelectorAll("#graph .block")) block.hidden = wanted !== "" && !block.querySelector(".hit");
  for (const fold of folds) {
    fold.open = wanted !== "" && fold.querySelector(".hit") !== null;
    fold.hidden = wanted !== "" && !fold.open;
  }
  told.textContent = wanted === "" ? "" : `${found} line(s)`;
});
""")
