// The page: connects the stream of snapshots with what shows them.
import { Actors, Learners, Refusals } from "./callers.js";
import { byId, element, put } from "./dom.js";
import { Episodes } from "./episodes.js";
import * as format from "./format.js";
import { fetchJson, Live } from "./live.js";
import { Charts, Flows, Tiles, Verdict, verdictOf } from "./overview.js";
import { Process, Store } from "./process.js";
import { applyTheme, toggleTheme } from "./theme.js";

const STATES = { live: "Live", silent: "No updates", lost: "Disconnected, reconnecting" };

applyTheme();
const charts = new Charts(fetchJson);
const episodes = new Episodes(fetchJson);
const parts = { verdict: new Verdict(), tiles: new Tiles(), flows: new Flows(), actors: new Actors(), learners: new Learners(), refusals: new Refusals(), store: new Store(), process: new Process() };
let chosen = new URLSearchParams(location.search).get("table") ?? "";
let started = null;
let connected = false;

function showTables(status) {
  const names = status.tables.map((table) => table.table);
  const tabs = byId("tables");
  tabs.hidden = names.length < 2;
  if (tabs.dataset.names !== JSON.stringify(names)) {
    tabs.dataset.names = JSON.stringify(names);
    tabs.replaceChildren(...names.map((name) => {
      const button = element("button", { type: "button" }, element("span", { className: "dot", "aria-hidden": "true" }), format.tableName(name));
      button.dataset.table = name;
      button.addEventListener("click", () => choose(name, status));
      return button;
    }));
  }
  for (const button of tabs.children) {
    const table = status.tables.find((one) => one.table === button.dataset.table);
    button.dataset.verdict = verdictOf(status, table).kind;
    button.title = verdictOf(status, table).name;
    if (button.dataset.table === chosen) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
}

function choose(name) {
  chosen = name;
  const url = new URL(location.href);
  if (name) url.searchParams.set("table", name);
  else url.searchParams.delete("table");
  history.replaceState(null, "", url);
  if (latest) show(latest);
}

let latest = null;

function show(status) {
  latest = status;
  noteRestart(status);
  const table = status.tables.find((one) => one.table === chosen) ?? status.tables[0];
  if (!table) return;
  chosen = table.table;
  showTables(status);
  put(byId("version"), `version ${status.server.version}`);
  put(byId("uptime"), `up ${format.duration(status.server.uptime_s)}`, status.server.uptime_s);
  parts.verdict.show(status, table);
  parts.tiles.show(table);
  parts.flows.show(table);
  parts.actors.show(status, table);
  parts.learners.show(status, table);
  parts.refusals.show(status, table);
  parts.store.show(table);
  parts.process.show(status.server);
  episodes.show(table);
  charts.show(status, table).catch(() => {});
  document.title = `${verdictOf(status, table).name} · ${table.table ? `${table.table} · ` : ""}Touchline`;
}

/** Says that the server was restarted, by the time at which it started; then the history begins again. */
function noteRestart(status) {
  const start = status.time_unix_s - status.server.uptime_s;
  if (started !== null && start > started + 1) {
    const notice = byId("notice");
    notice.textContent = `The server was restarted at ${format.clock(start)}; totals since the start begin there.`;
    notice.hidden = false;
  }
  if (!connected || (started !== null && start > started + 1)) charts.load().catch(() => {});
  started = start;
  connected = true;
}

function showConnection(state, seconds) {
  if (state === "lost") connected = false;
  const pill = byId("connection");
  pill.dataset.state = state;
  const since = seconds === null || state === "live" ? "" : ` · last update ${format.ago(Math.round(seconds))}`;
  put(byId("connection-text"), STATES[state]);
  pill.title = `${STATES[state]}${since}`;
  document.body.classList.toggle("stale", state !== "live");
}

byId("theme").addEventListener("click", () => {
  toggleTheme();
  charts.restyle();
  episodes.detail.restyle();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { charts.restyle(); episodes.detail.restyle(); });
document.addEventListener("visibilitychange", () => charts.draw());
// The cookie of a login cannot be read here, so the server says whether there is one.
fetchJson("/api/session").then((session) => { byId("logout").hidden = !session.tokens; }, () => {});
new Live({ onStatus: show, onState: showConnection });
