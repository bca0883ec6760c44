// Sorting by a column and filters: the page is whole without them.
"use strict";
{
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const metric = () => all("input.metric").find((input) => input.checked)?.id.slice("metric-".length) ?? "last";
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset[metric()] ?? cell.dataset.value ?? cell.textContent.trim();
    const number = Number(text);
    return text === "" || Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) =>
    typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;

  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    const before = [...body.rows];
    all("thead tr:last-child th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const was = head.getAttribute("aria-sort");
        const first = head.dataset.first ?? "ascending";
        const second = first === "ascending" ? "descending" : "ascending";
        const now = was === null ? first : was === first ? second : null;
        all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        let rows = before;
        if (now !== null) {
          head.setAttribute("aria-sort", now);
          const sign = now === "ascending" ? 1 : -1;
          const known = (row) => value(row, column) !== "";
          rows = [...before].sort((a, b) =>
            known(a) !== known(b) ? (known(a) ? -1 : 1) : sign * compare(value(a, column), value(b, column)));
        }
        body.append(...rows);
      });
    });
  }

  const filters = all("form.filters select");
  const apply = () => {
    for (const filter of filters) {
      for (const element of all(`main [data-${filter.name}]`)) {
        const away = filter.value !== "" && element.dataset[filter.name] !== filter.value;
        element.classList.toggle(`away-${filter.name}`, away);
      }
    }
    for (const note of all("form.filters output")) {
      note.textContent = filters.some((filter) => filter.value !== "") ? "Filters hold for the whole page." : "";
    }
  };
  for (const form of all("form.filters")) {
    form.hidden = false;
    form.addEventListener("change", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    form.addEventListener("submit", (event) => event.preventDefault());
  }
}
