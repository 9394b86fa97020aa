// Elements that are made once and changed only where their text changes, so that focus and selection stay.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Shows a text; `value` is the number behind it. */
export function put(target, text, value) {
  if (target.textContent !== text) target.textContent = text;
  if (value !== undefined && target.dataset.value !== String(value)) target.dataset.value = String(value);
}

/**
 * A table whose rows are kept by key.
 *
 * Each column is {name, title, unit, of(row), text(row), help, left, sort}; a column with `cell(td, row)` draws its cell itself.
 * Rows beyond `limit` are shown on demand.
 */
export class LiveTable {
  constructor(table, { caption, columns, key, empty, limit = 12, sortBy = null, descending = false, last = () => false }) {
    Object.assign(this, { table, columns, key, empty, limit, sortBy, descending, last, all: false, rows: [], kept: new Map() });
    const head = element("tr");
    this.headers = columns.map((column) => this.#header(column));
    head.append(...this.headers);
    this.body = element("tbody");
    this.more = element("button", { type: "button", className: "quiet" });
    this.more.addEventListener("click", () => { this.all = !this.all; this.draw(); });
    this.foot = element("tfoot", { hidden: true }, element("tr", {}, element("td", { colSpan: columns.length, className: "left" }, this.more)));
    table.append(element("caption", { className: "hidden" }, caption), element("thead", {}, head), this.body, this.foot);
  }

  #header(column) {
    const cell = element("th", { scope: "col", className: column.left ? "left" : "" });
    const label = [column.title, ...(column.unit ? [element("span", { className: "unit" }, ` ${column.unit}`)] : [])];
    if (column.help) cell.title = column.help;
    if (!column.of || this.sortBy === null) {
      cell.append(...label);
      return cell;
    }
    const button = element("button", { type: "button" }, ...label, element("span", { className: "arrow", "aria-hidden": "true" }));
    button.addEventListener("click", () => {
      this.descending = this.sortBy === column.name ? !this.descending : !column.left;
      this.sortBy = column.name;
      this.draw();
    });
    cell.append(button);
    return cell;
  }

  show(rows) {
    this.rows = rows;
    this.draw();
  }

  draw() {
    const ordered = this.#sorted();
    const shown = this.all ? ordered : ordered.slice(0, this.limit);
    this.#mark();
    const wanted = shown.map((row) => this.#row(row));
    if (!shown.length) wanted.push(this.#emptyRow());
    wanted.forEach((made, at) => { if (this.body.children[at] !== made) this.body.insertBefore(made, this.body.children[at] ?? null); });
    while (this.body.children.length > wanted.length) this.body.lastChild.remove();
    const keys = new Set(shown.map(this.key));
    for (const key of this.kept.keys()) if (!keys.has(key)) this.kept.delete(key);
    this.foot.hidden = ordered.length <= this.limit;
    put(this.more, this.all ? `Show the first ${this.limit}` : `Show all ${ordered.length}`);
  }

  #sorted() {
    const column = this.columns.find((one) => one.name === this.sortBy);
    if (!column) return this.rows;
    const sign = this.descending ? -1 : 1;
    const compare = (a, b) => {
      const [x, y] = [column.of(a), column.of(b)];
      if (typeof x === "string") return sign * x.localeCompare(y, "en", { numeric: true });
      // What is not known stands last, whichever way the others are sorted.
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x - y);
    };
    return [...this.rows].sort((a, b) => this.last(a) - this.last(b) || compare(a, b));
  }

  #mark() {
    this.columns.forEach((column, at) => {
      if (column.name === this.sortBy) this.headers[at].setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else this.headers[at].removeAttribute("aria-sort");
    });
  }

  #row(row) {
    const key = this.key(row);
    let made = this.kept.get(key);
    if (!made) {
      made = element("tr");
      made.append(...this.columns.map((column, at) => element(at ? "td" : "th", at ? {} : { scope: "row" })));
      this.columns.forEach((column, at) => { made.children[at].className = column.left ? "left" : ""; made.children[at].dataset.column = column.name; });
      made.dataset.key = key;
      this.kept.set(key, made);
    }
    this.columns.forEach((column, at) => {
      const cell = made.children[at];
      if (column.cell) column.cell(cell, row);
      else put(cell, column.text(row), column.of?.(row) ?? undefined);
      if (column.hint) cell.title = column.hint(row);
    });
    return made;
  }

  #emptyRow() {
    this.nothing ??= element("tr", { className: "empty" }, element("td", { colSpan: this.columns.length, className: "left" }, this.empty));
    return this.nothing;
  }
}

/** A list of names and values (dl) whose entries are made on first use. */
export class Facts {
  constructor(list) {
    this.list = list;
    this.kept = new Map();
  }

  set(name, text, { value, note = "", bar = null, warn = false } = {}) {
    let entry = this.kept.get(name);
    if (!entry) {
      entry = { main: element("span", { className: "main" }), note: element("span", { className: "note" }) };
      entry.text = element("dd", {}, entry.main, entry.note);
      entry.box = element("div", {}, element("dt", {}, name), entry.text);
      this.list.append(entry.box);
      this.kept.set(name, entry);
    }
    put(entry.main, text, value);
    put(entry.note, note);
    entry.box.classList.toggle("warn", warn);
    if (bar !== null) {
      entry.bar ??= entry.text.appendChild(element("progress", { max: 1, "aria-label": name }));
      entry.bar.value = bar;
    }
    entry.box.hidden = false;
  }

  hide(name) {
    const entry = this.kept.get(name);
    if (entry) entry.box.hidden = true;
  }
}
