// What is seen first: the verdict, the numbers of this moment, the charts and the flows of one table.
import { TimeChart } from "./charts.js";
import { byId, Facts, LiveTable, put } from "./dom.js";
import * as format from "./format.js";

const VERDICTS = {
  idle: "Idle",
  balanced: "Balanced",
  learners_wait: "Learners wait for batches",
  actors_wait: "Actors wait",
  store_full: "The store takes no episodes",
  "": "Not known yet",
};
const STATES = { restoring: "Restoring the store", draining: "Stopping" };
const UNCOUNTED = "This server keeps no metrics ([metrics] enabled = false), so only what it stores is shown.";
const SPANS = { fine: 300, coarse: 3600 };
const WINDOWS = { 60: "1 minute", 600: "10 minutes", 3600: "1 hour", 0: "since the start" };

const sum = (list, of) => list.reduce((total, one) => total + of(one), 0);
const perSecond = (flow, total) => (flow && flow.span_s > 0 ? total / flow.span_s : null);
const of = (flow, transport) => sum(flow.delivered.filter((one) => one.transport === transport), (one) => one.batches);
export const flowOf = (table, window) => table.flows.find((flow) => flow.window_s === window);

export function verdictOf(status, table) {
  const state = status.server.state;
  if (state !== "serving") return { name: STATES[state] ?? "Not known yet", kind: state === "restoring" ? "restoring" : "" };
  return { name: VERDICTS[table.verdict] ?? VERDICTS[""], kind: table.verdict };
}

export class Verdict {
  constructor() {
    this.facts = new Facts(byId("waits"));
  }

  show(status, table) {
    const waited = [["Learners waited", table.learners_waited_s, "learners_wait"], ["Actors waited", table.actors_waited_s, "actors_wait"]];
    for (const [name, seconds, verdict] of waited) this.facts.set(name, format.duration(seconds), { value: seconds, note: "in the last minute", warn: table.verdict === verdict });
    const { name, kind } = verdictOf(status, table);
    byId("verdict").dataset.verdict = kind;
    put(byId("verdict-name"), name);
    const store = table.durability;
    const restoring = status.server.state === "restoring" && store !== null && store.restore_rows > 0;
    const text = restoring ? `${format.whole(store.restored_rows)} of ${format.whole(store.restore_rows)} rows are read.` : table.verdict_text;
    put(byId("verdict-text"), text || (table.flows.length ? "" : UNCOUNTED));
    byId("restore").hidden = !restoring;
    if (restoring) byId("restore-bar").value = store.restored_rows / store.restore_rows;
  }
}

export class Tiles {
  constructor() {
    this.facts = new Facts(byId("tiles"));
  }

  show(table) {
    const minute = flowOf(table, 60) ?? { span_s: 0, delivered: [], rows_in: 0, episodes_in: 0, bytes_in: 0 };
    const rate = (total) => perSecond(minute, total);
    const rowsIn = rate(minute.rows_in);
    this.facts.set("In", `${format.compact(rowsIn)} rows/s`, {
      value: rowsIn, note: `${format.short(rate(minute.episodes_in))} episodes/s · ${format.bytes(rate(minute.bytes_in))}/s`,
    });
    const batches = rate(sum(minute.delivered, (one) => one.batches));
    const slices = rate(sum(minute.delivered, (one) => one.slices));
    this.facts.set("Out", `${format.compact(batches)} batches/s`, {
      value: batches, note: `${format.compact(slices)} slices/s · ${format.bytes(rate(sum(minute.delivered, (one) => one.bytes)))}/s`,
    });
    this.#ratio(table, minute);
    this.#fill(table);
    this.#age(table);
    this.#lag(table);
  }

  #ratio(table, minute) {
    const start = flowOf(table, 0);
    if (table.rate && table.rate.samples_per_insert > 0) {
      this.facts.set("Slices per row added", format.short(table.rate.recent_ratio), {
        value: table.rate.recent_ratio,
        note: `target ${format.short(table.rate.samples_per_insert)} · ${format.short(table.rate.ratio)} since the start`,
      });
      this.facts.hide("Replay ratio");
      return;
    }
    this.facts.set("Replay ratio", format.short(minute.replay_ratio), {
      value: minute.replay_ratio, note: `rows sampled per row added · ${format.short(start?.replay_ratio)} since the start`,
    });
    this.facts.hide("Slices per row added");
  }

  #fill(table) {
    const stored = table.counts.steps_stored;
    const share = table.capacity ? stored / table.capacity : 0;
    const full = table.seconds_until_full;
    const when = full === 0 ? "the oldest are evicted" : full > 0 ? `full in ${format.duration(full)}` : `${format.whole(table.counts.episodes_stored)} episodes`;
    this.facts.set("Fill", format.percent(share), {
      value: stored, note: `${format.compact(stored)} of ${format.compact(table.capacity)} rows · ${when}`, bar: share,
    });
  }

  #age(table) {
    const sampled = table.mean_sampled_s >= 0 ? table.mean_sampled_s : null;
    this.facts.set("Age of the data", format.duration(sampled ?? table.median_stored_s), {
      value: sampled ?? table.median_stored_s,
      note: `${sampled === null ? "median, stored" : "mean, as sampled"} · oldest ${format.duration(table.oldest_stored_s)}`,
    });
  }

  /** How many versions the data is behind the newest policy that has played. */
  #lag(table) {
    const newest = table.newest_policy_version;
    const lag = (mean) => (newest === null || mean === null ? null : newest - mean);
    const [stored, sampled] = [lag(table.mean_stored_policy_version), lag(table.mean_sampled_policy_version)];
    this.facts.set("Policy lag", `${format.short(sampled ?? stored)} versions`, {
      value: sampled ?? stored, note: `${sampled === null ? "mean, stored" : `mean, as sampled · ${format.short(stored)} stored`} · newest ${format.whole(newest)}`,
    });
  }
}

const CHARTS = [
  { title: "Rows", unit: "per second", series: [["added", "rows_in", "blue", true], ["evicted", "rows_evicted", "orange"]] },
  { title: "Batches", unit: "per second", series: [["ring", "batches_ring", "blue", true], ["stream", "batches_stream", "teal"], ["unary", "batches_unary", "violet"], ["device", "batches_device", "orange"]] },
  { title: "Waiting callers", unit: "on average", series: [["learners", "learners_waiting", "orange", true], ["actors", "actors_waiting", "violet"]] },
  { title: "Slices per row added", unit: "", series: [["now", "slices_per_row", "blue", true], ["target", "target", "muted", false, [4, 4]]] },
  { title: "Rows stored", unit: "", series: [["stored", "rows_stored", "teal", true]] },
  { title: "Age of the data", unit: "", text: format.duration, axisText: format.span, series: [["stored, median", "stored_age_s", "teal"], ["sampled, mean", "sampled_age_s", "orange"]] },
];

/** The charts: 5 minutes by the second, which every snapshot extends, or an hour by 10 seconds, which is fetched again. */
export class Charts {
  constructor(fetchJson) {
    this.fetchJson = fetchJson;
    this.window = "fine";
    this.histories = { fine: null, coarse: null };
    this.charts = CHARTS.map((chart) => ({
      names: chart.series.map(([, name]) => name),
      chart: new TimeChart(byId("charts"), {
        ...chart,
        span: () => SPANS[this.window],
        series: chart.series.map(([name, , colour, fill, dash]) => ({ name, colour, fill, dash })),
      }),
    }));
    for (const window of ["fine", "coarse"]) byId(`window-${window}`).addEventListener("click", () => this.#choose(window));
  }

  /** Fetches both histories: at the start, and when the stream of snapshots was interrupted. */
  async load() {
    for (const [window, resolution] of [["fine", 1], ["coarse", 10]]) this.histories[window] = await this.fetchJson(`/api/history?resolution_s=${resolution}`);
    this.draw();
  }

  async show(status, table) {
    this.table = table;
    const { fine, coarse } = this.histories;
    if (fine && status.time_unix_s > (fine.time_unix_s.at(-1) ?? 0)) this.#append(fine, status);
    this.draw();
    if (this.window === "coarse" && coarse && status.time_unix_s > (coarse.time_unix_s.at(-1) ?? 0) + 11) {
      this.histories.coarse = await this.fetchJson("/api/history?resolution_s=10");
    }
  }

  draw() {
    const history = this.histories[this.window];
    if (!history || !this.table || document.hidden) return;
    const series = history.tables[this.table.table] ?? {};
    const target = this.table.rate?.samples_per_insert || null;
    const none = history.time_unix_s.map(() => null);
    for (const { chart, names } of this.charts) {
      chart.set([history.time_unix_s, ...names.map((name) => (name === "target" ? history.time_unix_s.map(() => target) : series[name] ?? none))]);
    }
  }

  restyle() {
    for (const { chart } of this.charts) chart.restyle();
  }

  #append(history, status) {
    const known = history.time_unix_s.length;
    history.time_unix_s.push(status.time_unix_s);
    for (const [table, point] of Object.entries(status.points)) {
      history.tables[table] ??= Object.fromEntries(Object.keys(point).map((name) => [name, Array(known).fill(null)]));
      for (const [name, value] of Object.entries(point)) history.tables[table][name].push(value);
    }
    for (const [table, series] of Object.entries(history.tables)) if (!(table in status.points)) for (const values of Object.values(series)) values.push(null);
    if (known > SPANS.fine) for (const values of [history.time_unix_s, ...Object.values(history.tables).flatMap(Object.values)]) values.shift();
  }

  #choose(window) {
    this.window = window;
    for (const name of ["fine", "coarse"]) byId(`window-${name}`).setAttribute("aria-pressed", String(name === window));
    this.draw();
  }
}

const rateColumn = (name, title, unit, total, text = format.short) => ({
  name, title, unit, of: (flow) => perSecond(flow, total(flow)), text: (flow) => text(perSecond(flow, total(flow))),
});

export class Flows {
  constructor() {
    this.table = new LiveTable(byId("flows"), {
      caption: "Flows in and out, by window",
      key: (flow) => String(flow.window_s),
      empty: "Nothing has been counted yet.",
      columns: [
        { name: "window", title: "Window", left: true, text: (flow) => WINDOWS[flow.window_s] ?? format.duration(flow.window_s) },
        rateColumn("episodes_in", "Episodes in", "/s", (flow) => flow.episodes_in),
        rateColumn("rows_in", "Rows in", "/s", (flow) => flow.rows_in, format.compact),
        rateColumn("bytes_in", "Bytes in", "/s", (flow) => flow.bytes_in, format.bytes),
        rateColumn("ring", "Ring batches", "/s", (flow) => of(flow, "ring")),
        rateColumn("stream", "Stream batches", "/s", (flow) => of(flow, "stream")),
        rateColumn("unary", "Unary batches", "/s", (flow) => of(flow, "unary")),
        rateColumn("device", "Device batches", "/s", (flow) => of(flow, "device")),
        rateColumn("slices", "Slices out", "/s", (flow) => sum(flow.delivered, (one) => one.slices), format.compact),
        rateColumn("bytes_out", "Bytes out", "/s", (flow) => sum(flow.delivered, (one) => one.bytes), format.bytes),
        rateColumn("rows_evicted", "Rows evicted", "/s", (flow) => flow.rows_evicted, format.compact),
        { name: "ratio", title: "Replay ratio", of: (flow) => flow.replay_ratio, text: (flow) => format.short(flow.replay_ratio) },
      ],
    });
  }

  show(table) {
    this.table.show(table.flows);
  }
}
