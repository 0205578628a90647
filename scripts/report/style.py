# SPDX-License-Identifier: Apache-2.0
"""How the page looks and what moves on it: its style sheet and its one script, which the page's policy names by hash.

Every colour is a variable, once for bright and once for dark screens; text on its background reaches 4.5 : 1 in both.
"""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1a1a1a; --quiet: #4d4d4d; --line: #b0b0b0;
  --head: #e8eff5; --warn: #fff3eb; --alarm: #9c3a00; --accent: #0063a0; --code: #f2f2f2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #ececec; --quiet: #b8bfc6; --line: #56606a;
  --head: #24303a; --warn: #33231a; --alarm: #ffab7a; --accent: #6cb8ee; --code: #20262c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1 { line-height: 1.2; margin: .5rem 0 1rem; } h2 { margin: 2.5rem 0 1rem; border-bottom: 2px solid var(--accent); }
figcaption, dt, summary, .failure, .lead { font-weight: 600; } .failure { color: var(--alarm); }
.warning { padding: .25rem 1rem; border-left: .4rem solid #d55e00; background: var(--warn); }
.warning h2 { margin: .5rem 0; border: 0; font-size: 1.1rem; } .warning ul { padding-left: 1.2rem; }
figure { margin: 0 0 2rem; } dd { margin: 0 0 .5rem; } small { display: block; font-weight: 400; color: var(--quiet); }
.scroll { overflow-x: auto; overflow-wrap: normal; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.grid img { width: 100%; max-width: 36rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--head); white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
th button { all: unset; } button, summary, input { cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent) !important; outline-offset: 2px; }
th button::after { content: " \\2195"; } [aria-sort=ascending] button::after { content: " \\2191"; }
[aria-sort=descending] button::after { content: " \\2193"; }
pre { padding: 1rem; background: var(--code); white-space: pre-wrap; }
.case { padding: .75rem 1rem; border: 1px solid var(--line); border-radius: .5rem; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: .5rem 0; }
.key svg { width: 2.5rem; height: .8rem; margin-right: .4rem; background: #333333; }
.plane { display: grid; gap: .5rem 1rem; padding: .75rem 0; border-top: 1px solid var(--line); align-items: start; }
.control { position: sticky; top: 0; z-index: 1; padding: .25rem 0; background: var(--paper); }
.control label { font-weight: 600; } .control input { display: block; width: 100%; height: 1.75rem; margin: 0;
  accent-color: var(--accent); } .control output { color: var(--quiet); }
.panels { display: flex; flex-wrap: wrap; gap: .5rem; } .panel { flex: 1 1 9rem; }
.panel b { font-weight: 600; margin-right: .5rem; } .panel small { display: inline; }
.frame { position: relative; overflow: hidden; background: #000000; }
.frame img { position: absolute; left: 0; top: 0; height: 100%; max-width: none;
  width: calc(var(--frames) * 100%); transform: translateX(calc(var(--at) / var(--frames) * -100%)); }
.frame i { position: absolute; padding: 0 .2rem; font: .7rem/1.3 system-ui, sans-serif; color: #ffffff;
  background: #000000; }
.frame i:nth-of-type(1) { left: .1rem; top: 46%; } .frame i:nth-of-type(2) { right: .1rem; top: 46%; }
.frame i:nth-of-type(3) { left: 48%; bottom: .1rem; } .frame i:nth-of-type(4) { left: 48%; top: .1rem; }
.case:has(.outlined:not(:checked)) .outline { visibility: hidden; }
@media (min-width: 50rem) { .plane { grid-template-columns: 13rem 1fr; } .control { position: static; } }
@media print { .control input, .key input { display: none; } .case { break-inside: avoid; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headers.forEach(other => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const numeric = header.classList.contains("number");
    const key = row => numeric ? row.cells[column].dataset.value : row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // undefined values stay at the end
      return sign * (numeric ? x - y : x.localeCompare(y, undefined, {numeric: true}));
    });
    table.tBodies[0].append(...rows);
  }));
}
for (const slider of document.querySelectorAll(".plane input")) {
  const plane = slider.closest(".plane"), places = plane.dataset.places.split(" ");
  const show = () => {
    const text = `slice ${places[slider.value]} of ${plane.dataset.slices}`;
    plane.style.setProperty("--at", slider.value);
    plane.querySelector("output").textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  slider.addEventListener("input", show);
  show();  // a browser may keep the slider's place when the page is loaded again
}
"""
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
