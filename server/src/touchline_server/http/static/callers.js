// Who is connected and what was refused: actors, learners, refusals.
import { byId, LiveTable, put } from "./dom.js";
import * as format from "./format.js";

const version = (text) => text.match(/touchline\/(\S+)/)?.[1] ?? (text || "unknown");
const number = (name, title, of, text = format.whole, extra = {}) => ({ name, title, of, text: (row) => text(of(row)), ...extra });

/** Returns the transport, and whether it is not the ring because the ring was refused. */
const ringText = (learner) => (learner.transport !== "stream" || !learner.ring_refused ? learner.transport : `${learner.transport} (no ring)`);

export class Actors {
  constructor() {
    this.table = new LiveTable(byId("actors"), {
      caption: "Actors of this table",
      key: (actor) => (actor.others ? "others" : `actor ${actor.name} ${actor.address}`),
      empty: "No actor has added an episode in the last hour.",
      sortBy: "name",
      last: (actor) => Number(actor.others > 0),
      columns: [
        { name: "name", title: "Actor", left: true, of: (actor) => actor.name, text: (actor) => (actor.others ? `${format.whole(actor.others)} others` : actor.name || "without a name") },
        { name: "address", title: "Address", left: true, of: (actor) => actor.address, text: (actor) => actor.address || format.NONE },
        { name: "client", title: "Client", left: true, of: (actor) => actor.client_version, text: (actor) => (actor.others ? format.NONE : version(actor.client_version)), hint: (actor) => actor.client_version },
        number("last", "Last episode", (actor) => (actor.last_episode_age_s < 0 ? null : actor.last_episode_age_s), format.ago),
        number("rows_per_s", "Rows", (actor) => actor.rows_per_s, format.compact, { unit: "/s" }),
        number("episodes", "Episodes", (actor) => actor.episodes),
        number("mean_rows", "Length", (actor) => (actor.episodes ? actor.mean_rows : null), format.short, { unit: "mean" }),
        number("mean_reward_sum", "Return", (actor) => actor.mean_reward_sum, format.short, { unit: "mean" }),
        number("policy_version", "Policy", (actor) => actor.policy_version),
        number("waited_s", "Waited", (actor) => actor.waited_s, format.duration, { unit: "/min" }),
        number("duplicates", "Duplicates", (actor) => actor.duplicates),
        number("refused", "Refused", (actor) => actor.refused),
        number("spool", "In spool", (actor) => actor.spool_episodes),
      ],
    });
  }

  show(status, table) {
    const actors = status.actors.filter((actor) => actor.table === table.table);
    this.table.show(actors);
    const count = actors.reduce((total, actor) => total + (actor.others || 1), 0);
    put(byId("actors-note"), count ? `${format.whole(count)} in the last hour` : "", count);
    const names = byId("actor-names");
    const wanted = actors.filter((actor) => !actor.others && actor.name).map((actor) => actor.name);
    if (names.dataset.names !== wanted.join("\n")) {
      names.dataset.names = wanted.join("\n");
      names.replaceChildren(...wanted.map((name) => new Option(name)));
    }
  }
}

export class Learners {
  constructor() {
    this.table = new LiveTable(byId("learners"), {
      caption: "Learners of this table",
      key: (learner) => (learner.others ? "others" : `${learner.learner_id} ${learner.address}`),
      empty: "No learner is connected.",
      sortBy: "address",
      last: (learner) => Number(learner.others > 0),
      columns: [
        { name: "address", title: "Learner", left: true, of: (learner) => learner.address, text: (learner) => (learner.others ? `${format.whole(learner.others)} others` : learner.address) },
        { name: "client", title: "Client", left: true, of: (learner) => learner.client_version, text: (learner) => (learner.others ? format.NONE : version(learner.client_version)), hint: (learner) => learner.client_version },
        { name: "transport", title: "Transport", left: true, of: (learner) => learner.transport, text: ringText, hint: (learner) => learner.ring_refused },
        number("batches_per_s", "Batches", (learner) => learner.batches_per_s, format.short, { unit: "/s" }),
        number("batches", "Batches", (learner) => learner.batches, format.whole, { unit: "total" }),
        { name: "shape", title: "Batch", of: (learner) => learner.batch_size, text: (learner) => (learner.batch_size ? `${learner.batch_size} × ${learner.horizon}` : format.NONE), help: "slices × horizon" },
        number("waits_share", "Waits", (learner) => learner.waits_share, format.percent),
        number("wait_p50", "Wait p50", (learner) => (learner.wait.count ? learner.wait.p50_s : null), format.duration),
        number("wait_p99", "Wait p99", (learner) => (learner.wait.count ? learner.wait.p99_s : null), format.duration),
        number("credits", "Credits", (learner) => learner.credits),
        number("pending_bytes", "Pending", (learner) => learner.pending_bytes, format.bytes),
        number("connected_s", "Connected", (learner) => learner.connected_s, format.duration),
      ],
    });
  }

  show(status, table) {
    const learners = status.learners.filter((learner) => learner.others || learner.tables.includes(table.table));
    this.table.show(learners);
    const refused = learners.find((learner) => learner.ring_refused);
    put(byId("learners-note"), refused ? `no ring for ${refused.address}: ${refused.ring_refused}` : "");
  }
}

export class Refusals {
  constructor() {
    this.table = new LiveTable(byId("refusals"), {
      caption: "Refused calls and episodes, by reason",
      key: (refusal) => `${refusal.reason} ${refusal.table}`,
      empty: "Nothing was refused.",
      sortBy: "last",
      descending: true,
      limit: 8,
      columns: [
        { name: "reason", title: "Reason", left: true, of: (refusal) => refusal.reason, text: (refusal) => refusal.reason.toLowerCase().replaceAll("_", " ") },
        number("count", "Count", (refusal) => refusal.count),
        { name: "last", title: "Last", of: (refusal) => refusal.last_unix_s, text: (refusal) => format.clock(refusal.last_unix_s) },
        { name: "who", title: "From", left: true, of: (refusal) => refusal.last_who, text: (refusal) => refusal.last_who || format.NONE },
        { name: "message", title: "Last message", left: true, text: (refusal) => refusal.last_message },
      ],
    });
  }

  show(status, table) {
    this.table.show(status.refusals.filter((refusal) => refusal.table === null || refusal.table === table.table));
  }
}
