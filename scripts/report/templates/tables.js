// SPDX-License-Identifier: Apache-2.0
// Sort the tables of class "sortable" by a press on a column's name.
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
