// The episode browser: the newest episodes, and one of them with its columns as plots and its images as a filmstrip.
import { RowChart } from "./charts.js";
import { byId, element, Facts, LiveTable, put } from "./dom.js";
import * as format from "./format.js";

const PAGE = 12;
const STRIP = 30;
const THUMB = 96;
const FRAME = 320;
const PLAY_MS = 66;
const COLOURS = ["blue", "orange", "teal", "violet", "red", "green", "pink", "muted"];

export class Episodes {
  constructor(fetchJson) {
    this.fetchJson = fetchJson;
    this.detail = new EpisodeDialog(fetchJson);
    this.older = [];
    this.actor = "";
    this.listed = new LiveTable(byId("episodes"), {
      caption: "Newest episodes of this table",
      key: (episode) => String(episode.episode_id),
      empty: "No episode is stored.",
      limit: 1000,
      columns: [
        { name: "id", title: "Episode", left: true, of: (episode) => episode.episode_id, cell: (cell, episode) => this.#link(cell, episode) },
        { name: "actor", title: "Actor", left: true, text: (episode) => episode.actor || "without a name" },
        { name: "rows", title: "Rows", of: (episode) => episode.rows, text: (episode) => format.whole(episode.rows) },
        { name: "reward_sum", title: "Return", of: (episode) => episode.reward_sum, text: (episode) => format.short(episode.reward_sum) },
        { name: "bytes", title: "Size", of: (episode) => episode.bytes, text: (episode) => format.bytes(episode.bytes) },
        { name: "policy_version", title: "Policy", of: (episode) => episode.policy_version, text: (episode) => format.whole(episode.policy_version) },
        { name: "age", title: "Added", text: (episode) => format.ago(episode.age_s) },
      ],
    });
    this.button = element("button", { type: "button", className: "quiet", hidden: true }, "Older episodes");
    byId("episodes").after(this.button);
    this.button.addEventListener("click", () => this.#loadOlder());
    byId("episode-filter").addEventListener("submit", (event) => event.preventDefault());
    byId("episode-actor").addEventListener("change", (event) => this.#filter(event.target.value.trim()));
  }

  show(table) {
    if (this.table?.table !== table.table) this.older = [];
    this.table = table;
    this.newest = table.newest.slice(0, PAGE);
    if (!this.actor) this.#draw();
  }

  #draw() {
    const below = this.newest?.at(-1)?.episode_id ?? Infinity;
    const rows = this.actor ? this.older : [...(this.newest ?? []), ...this.older.filter((episode) => episode.episode_id < below)];
    this.listed.show(rows);
    this.button.hidden = !rows.length || this.more === false;
  }

  #link(cell, episode) {
    const text = format.whole(episode.episode_id);
    if (!cell.firstChild) {
      const button = element("button", { type: "button", className: "link" });
      button.addEventListener("click", () => this.detail.open(this.table.table, episode.episode_id));
      cell.append(button);
    }
    put(cell.firstChild, text, episode.episode_id);
    cell.firstChild.setAttribute("aria-label", `Open episode ${text}`);
  }

  async #filter(actor) {
    this.actor = actor;
    this.older = [];
    this.more = undefined;
    if (actor) await this.#loadOlder();
    else this.#draw();
  }

  async #loadOlder() {
    const last = this.listed.rows.at(-1)?.episode_id;
    const query = new URLSearchParams({ table: this.table.table, limit: String(PAGE) });
    if (this.actor) query.set("actor", this.actor);
    if (last !== undefined && (!this.actor || this.older.length)) query.set("below", String(last));
    const answer = await this.fetchJson(`/api/episodes?${query}`);
    this.older.push(...answer.episodes);
    this.more = answer.more;
    this.#draw();
  }
}

class EpisodeDialog {
  constructor(fetchJson) {
    this.fetchJson = fetchJson;
    this.dialog = byId("episode");
    this.facts = new Facts(byId("episode-summary"));
    this.charts = [];
    this.films = [];
    byId("episode-close").addEventListener("click", () => this.dialog.close());
    byId("episode-older").addEventListener("click", () => this.#step(-1));
    byId("episode-newer").addEventListener("click", () => this.#step(1));
    this.dialog.addEventListener("close", () => this.#clear());
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
  }

  async open(table, id) {
    this.table = table;
    this.id = id;
    if (!this.dialog.open) this.dialog.showModal();
    let episode;
    try {
      episode = await this.fetchJson(`/api/episodes/${id}?${new URLSearchParams({ table })}`);
    } catch (error) {
      this.#clear();
      byId("episode-error").hidden = false;
      byId("episode-error").textContent = error.message;
      put(byId("episode-title"), `Episode ${format.whole(id)}`, id);
      return;
    }
    if (this.id !== id) return;
    this.#clear();
    this.#draw(episode);
  }

  restyle() {
    for (const chart of this.charts) chart.restyle();
  }

  #step(by) {
    this.open(this.table, this.id + by);
  }

  #clear() {
    for (const chart of this.charts) chart.remove();
    for (const film of this.films) film.stop();
    this.charts = [];
    this.films = [];
    byId("episode-images").replaceChildren();
    byId("episode-error").hidden = true;
  }

  #draw(episode) {
    put(byId("episode-title"), `Episode ${format.whole(episode.episode_id)}`, episode.episode_id);
    this.facts.set("Return", format.short(episode.reward_sum), { value: episode.reward_sum });
    this.facts.set("Rows", format.whole(episode.rows), { value: episode.rows });
    this.facts.set("Actor", episode.actor || "without a name");
    this.facts.set("Policy version", format.whole(episode.policy_version), { value: episode.policy_version });
    this.facts.set("Size", format.bytes(episode.bytes), { value: episode.bytes });
    for (const column of episode.columns.filter((one) => one.kind === "image")) {
      this.films.push(new Filmstrip(byId("episode-images"), this.table, episode, column, (row) => this.#mark(row)));
    }
    const plots = episode.columns.filter((one) => one.kind === "plot");
    plots.sort((a, b) => Number(b.name === "reward") - Number(a.name === "reward"));
    for (const column of plots) this.#plot(column);
  }

  #plot(column) {
    const names = column.values.map((_, at) => (column.dims === 1 ? column.name : `[${column.first_dim + at}]`));
    const chart = new RowChart(byId("episode-plots"), {
      title: column.name,
      unit: `${column.dtype} ${column.shape.length ? `[${column.shape.join(", ")}]` : ""}`,
      text: format.short,
      series: names.map((name, at) => ({ name, colour: COLOURS[at], fill: column.dims === 1 })),
      onRow: (row) => { for (const film of this.films) film.show(row); },
    });
    chart.set([column.rows, ...column.values]);
    if (column.dims > column.values.length) chart.figure.append(this.#more(column));
    this.charts.push(chart);
  }

  /** A button for the next dimensions of a column that has more than one plot takes. */
  #more(column) {
    const next = column.first_dim + column.values.length;
    const from = next < column.dims ? next : 0;
    const shown = `${column.first_dim} to ${next - 1} of ${column.dims}`;
    const button = element("button", { type: "button", className: "quiet", "aria-label": `${column.name}: dimensions ${shown}; show others` }, `dimensions ${shown} ›`);
    button.addEventListener("click", async () => {
      const query = new URLSearchParams({ table: this.table, column: column.name, first_dim: String(from) });
      const { columns: [other] } = await this.fetchJson(`/api/episodes/${this.id}?${query}`);
      const at = this.charts.findIndex((one) => one.title === column.name);
      const before = this.charts[at].figure.nextSibling;
      this.charts[at].remove();
      this.charts.splice(at, 1);
      this.#plot(other);
      const made = this.charts.at(-1).figure;
      made.parentNode.insertBefore(made, before);
      made.querySelector("button")?.focus();
    });
    return button;
  }

  #mark(row) {
    for (const chart of this.charts) chart.mark(row);
  }
}

/** The images of a column: one large with a slider and a button that plays them, and a strip of small ones. */
class Filmstrip {
  constructor(parent, table, episode, column, onRow) {
    Object.assign(this, { table, episode, column, onRow, last: episode.rows - 1, timer: null });
    this.image = element("img", { className: "frame", width: FRAME, height: FRAME });
    this.slider = element("input", { type: "range", min: 0, max: this.last, value: 0, "aria-label": `Row of ${column.name}` });
    this.label = element("output", {});
    this.button = element("button", { type: "button", className: "quiet" }, "Play");
    const strip = element("div", { className: "strip", role: "group", "aria-label": `Frames of ${column.name}` });
    const rows = [...new Set(Array.from({ length: Math.min(STRIP, episode.rows) }, (_, at) => Math.round((at * this.last) / Math.max(1, Math.min(STRIP, episode.rows) - 1))))];
    this.thumbs = rows.map((row) => {
      const image = element("img", { src: this.#source(row, THUMB), alt: "", loading: "lazy", width: THUMB, height: THUMB });
      const button = element("button", { type: "button", "aria-label": `Row ${row}` }, image, element("span", {}, String(row)));
      button.addEventListener("click", () => { this.stop(); this.show(row); });
      strip.append(button);
      return { row, button };
    });
    this.slider.addEventListener("input", () => { this.stop(); this.show(Number(this.slider.value)); });
    this.button.addEventListener("click", () => (this.timer ? this.stop() : this.#play()));
    const caption = element("figcaption", {}, element("strong", {}, column.name), element("span", { className: "unit" }, ` ${column.dtype} [${column.shape.join(", ")}]`));
    parent.append(element("figure", { className: "card film" }, caption,
      element("div", { className: "stage" }, this.image, element("div", { className: "controls" }, this.button, this.slider, this.label)), strip));
    this.show(0);
  }

  show(row) {
    if (this.row === row) return;
    this.row = row;
    this.slider.value = row;
    put(this.label, `row ${format.whole(row)} of ${format.whole(this.last)}`, row);
    this.image.src = this.#source(row, FRAME);
    this.image.alt = `${this.column.name} in row ${row}`;
    const nearest = this.thumbs.reduce((best, one) => (Math.abs(one.row - row) < Math.abs(best.row - row) ? one : best));
    for (const { button } of this.thumbs) button.toggleAttribute("data-current", button === nearest.button);
    this.onRow(row);
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = null;
    put(this.button, "Play");
  }

  #play() {
    put(this.button, "Pause");
    if (this.row === this.last) this.show(0);
    const next = () => {
      if (this.row >= this.last) return this.stop();
      this.show(this.row + 1);
      // The next frame follows when this one is there, so a slow connection plays slower instead of asking for more at a time.
      const done = () => { if (this.timer) this.timer = setTimeout(next, PLAY_MS); };
      this.image.decode().then(done, done);
    };
    this.timer = setTimeout(next, PLAY_MS);
  }

  #source(row, side) {
    const query = new URLSearchParams({ table: this.table, column: this.column.name, row: String(row), side: String(side) });
    return `/api/episodes/${this.episode.episode_id}/frame?${query}`;
  }
}
