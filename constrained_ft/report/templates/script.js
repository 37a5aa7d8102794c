"use strict";
// Clicks: a blurred text is shown, or blurred again; a heading sorts its column.
function reveal(veil, open) {
  veil.setAttribute("aria-expanded", String(open));
}
for (const veil of document.querySelectorAll(".veil")) {
  veil.addEventListener("click", () => reveal(veil, veil.getAttribute("aria-expanded") !== "true"));
}
for (const button of document.querySelectorAll(".unveil")) {
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(open));
    button.textContent = open ? "Blur them again" : "Show all texts";
    const table = button.parentElement.nextElementSibling;
    for (const veil of table.querySelectorAll(".veil")) reveal(veil, open);
  });
}
function value(row, column) {
  const cell = row.children[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const number = parseFloat(text.replace("−", "-"));
  return Number.isNaN(number) ? text : number;
}
function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1; // what has no number comes last
}
for (const table of document.querySelectorAll(".sortable")) {
  table.querySelectorAll("thead tr > *").forEach((head, column) => {
    head.querySelector(".sort").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      const sign = up ? 1 : -1;
      rows.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      table.tBodies[0].append(...rows);
    });
  });
}
