"""Style of a report's page."""

CSS = """
:root { --ink: #1c2330; --soft: #5b6577; --line: #d9dee6; --page: #fff; --band: #eef2f7;
  --curve: #1f6fb2; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #39414f; --page: #161a21; --band: #222834;
    --curve: #6cb4ee; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1200px; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
a { color: var(--curve); }
.note, .soft { color: var(--soft); font-size: .875rem; margin: .3rem 0; }
.bad { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td { white-space: nowrap; }
td.text { white-space: normal; }
td.text:last-child { min-width: 14rem; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 1rem 0; }
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts dd { margin: 0; font-size: 1.05rem; }
.sides { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.sides > * { min-width: 0; max-width: 100%; }
.plot { position: relative; margin-left: 2rem; height: 200px; border: 1px solid var(--line); }
.plot svg, .image svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.ticks span { position: absolute; left: -1.8rem; transform: translateY(-50%); font-size: .75rem;
  color: var(--soft); }
.band { fill: var(--band); }
.level { stroke: var(--line); vector-effect: non-scaling-stroke; }
.curve { fill: none; stroke: var(--curve); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.names { display: flex; font-size: .75rem; color: var(--soft); }
.names.along { margin-left: 2rem; }
.names span { overflow: hidden; text-align: center; white-space: nowrap; text-overflow: ellipsis;
  flex: none; }
.square { width: 420px; max-width: 100%; }
.image { position: relative; aspect-ratio: 1; border: 1px solid var(--line); }
.image img { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; }
.border { stroke: #d6402b; vector-effect: non-scaling-stroke; }
.scale { display: flex; align-items: center; gap: .5rem; font-size: .75rem; margin-top: .3rem; }
.scale i { flex: 1; height: .7rem; background: linear-gradient(to right, rgb(0,78,40), #fff);
  border: 1px solid var(--line); }
ul.files { columns: 22rem; padding-left: 1.2rem; font-size: .875rem; }
summary { cursor: pointer; }
"""
