"use strict";
// A click on a heading sorts its table; the box above the first table hides rows of all tables. The page is whole
// without this script, and it asks nothing of a network.
function value(cell) {
  const text = (cell.dataset.value ?? cell.textContent).trim();
  const number = text === "" ? NaN : Number(text);
  return Number.isNaN(number) ? text : number;
}

function compare(a, b, sign) {
  const empty = [a, b].map((v) => ["", "–", "-", "void"].includes(v));
  if (empty[0] || empty[1]) return empty[0] - empty[1]; // what was not measured is last in both directions
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

for (const table of document.querySelectorAll("table.sorts")) {
  const [head, body] = [table.tHead.rows[0], table.tBodies[0]];
  if (body.rows.length < 2) continue;
  table.classList.add("sorting");
  [...head.cells].forEach((cell, column) => {
    if (!cell.textContent.trim() || cell.classList.contains("bar")) return;
    const button = document.createElement("button");
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const falls = cell.getAttribute("aria-sort") === "descending";
      const first = cell.classList.contains("n") ? "descending" : "ascending"; // of numbers the largest first
      const order = cell.hasAttribute("aria-sort") ? (falls ? "ascending" : "descending") : first;
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [value(row.cells[column]), row]);
      rows.sort((a, b) => compare(a[0], b[0], sign));
      body.append(...rows.map((one) => one[1]));
    });
  });
}

for (const part of document.querySelectorAll("section")) {
  const rows = part.querySelectorAll("tr[data-row]");
  const names = [...new Set([...rows].map((row) => row.dataset.row))];
  const place = part.querySelector(".filter");
  if (names.length < 8 || !place) continue;
  const box = Object.assign(document.createElement("input"), { type: "search", placeholder: "words of a name" });
  const label = document.createElement("label");
  const count = document.createElement("span");
  count.setAttribute("aria-live", "polite");
  label.append("show rows with ", box);
  place.append(label, count);
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (name) => words.every((word) => name.toLowerCase().includes(word));
    for (const row of rows) row.hidden = !fits(row.dataset.row);
    const shown = names.filter(fits).length;
    count.textContent = words.length ? `${shown} of ${names.length} rows in all tables; figures show every row` : "";
  });
}
