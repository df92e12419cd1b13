"use strict";

// A page on the file system may not fetch others, so the search there lists titles without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// The search finds a loss however it is written: with any hyphen, a space, or in one word, such as "mvsoftmax".
window.splitQuery = (query) =>
  query
    .replace(/[\u00AD\u200B-\u200D\u2060\uFEFF]/g, "") // hyphens and joints that can't be seen
    .split(/[^\p{Letter}\p{Number}_]+/u)
    .flatMap((word) => /^(mv|sv|hm|f|a)?(am|arc|a)?(softmax)([fa])?$/i.exec(word)?.slice(1) ?? [word])
    .filter(Boolean);

// A name or a number breaks at no hyphen of it.
window.addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll(".table-wrapper td")) cell.classList.toggle("short", cell.textContent.trim().length <= 18);
});

// What scrolls sideways in its box can be reached, and so scrolled, with the keyboard.
function reachScrollers() {
  for (const box of document.querySelectorAll(".table-wrapper, .math-wrapper, .cell_output, figure, pre")) {
    const scrolls = box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX === "auto";
    if (scrolls) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise; // formulas get their width from it
  reachScrollers();
  window.addEventListener("resize", reachScrollers);
});

// The theme's navigation calls its captions headings without saying of which level.
window.addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll(".caption[role=heading]")) caption.ariaLevel = "2";
});
