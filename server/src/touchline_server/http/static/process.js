// The store of a table, and the process of the server: durability, memory, threads, bytes in transit.
import { byId, Facts, LiveTable } from "./dom.js";
import * as format from "./format.js";

const MODES = { sync: "each episode is synced", batch: "synced in batches", memory: "written later" };

export class Store {
  constructor() {
    this.facts = new Facts(byId("store"));
  }

  show(table) {
    const { facts } = this;
    const { counts } = table;
    facts.set("Columns", format.bytes(table.size_bytes), { value: table.size_bytes, note: table.device ? `allocated, ${table.device}` : "nothing allocated yet" });
    facts.set("Episodes stored", format.whole(counts.episodes_stored), {
      value: counts.episodes_stored, note: `${format.whole(table.episodes_eligible)} can be sampled, ${format.whole(table.episodes_not_sampled)} too short`, warn: false,
    });
    facts.set("Ever added", format.whole(counts.episodes_added), {
      value: counts.episodes_added, note: `${format.whole(counts.episodes_evicted)} evicted · ${format.whole(counts.episodes_duplicate)} duplicates · ${format.whole(counts.episodes_refused)} refused`,
    });
    const store = table.durability;
    if (store === null) {
      facts.set("Durability", "in memory only", { note: "a restart loses the episodes (storage.data_dir is not set)" });
      for (const name of ["Not synced yet", "fsync", "File", "Last snapshot", "Restored"]) facts.hide(name);
      return;
    }
    const bad = store.state === "full" || store.state === "failed";
    facts.set("Durability", bad ? `${store.mode}: ${store.state}` : store.mode, { note: bad ? store.reason : MODES[store.mode] ?? "", warn: bad });
    facts.set("Not synced yet", `${format.whole(store.pending_episodes)} episodes`, {
      value: store.pending_episodes, note: `${format.bytes(store.pending_bytes)}${store.unsynced_s ? ` · oldest ${format.duration(store.unsynced_s)}` : ""}`,
    });
    facts.set("fsync", store.sync.count ? format.duration(store.sync.p50_s) : format.NONE, { value: store.sync.p50_s, note: store.sync.count ? `median · p99 ${format.duration(store.sync.p99_s)} · ${format.whole(store.sync.count)} in all` : "" });
    facts.set("File", format.bytes(store.file_bytes), { value: store.file_bytes, note: `${format.bytes(store.disk_free_bytes)} free on its disk`, warn: store.disk_free_bytes < store.file_bytes / 10 });
    facts.set("Last snapshot", store.last_snapshot_unix_s ? new Date(store.last_snapshot_unix_s * 1000).toLocaleString() : "none", {});
    if (store.restore_rows) facts.set("Restored", `${format.whole(store.restored_rows)} rows`, { value: store.restored_rows, note: store.restored ? "at the start" : `of ${format.whole(store.restore_rows)}`, bar: store.restored_rows / store.restore_rows });
    else facts.hide("Restored");
  }
}

export class Process {
  constructor() {
    this.facts = new Facts(byId("process"));
    this.pools = new LiveTable(byId("pools"), {
      caption: "Threads of the server",
      key: (pool) => pool.name,
      empty: "No threads are known.",
      columns: [
        { name: "name", title: "Pool", left: true, text: (pool) => pool.name },
        { name: "threads", title: "Threads", of: (pool) => pool.threads, text: (pool) => format.whole(pool.threads) },
        { name: "busy", title: "Busy", of: (pool) => pool.busy, text: (pool) => format.whole(pool.busy) },
        { name: "queued", title: "Queued", of: (pool) => pool.queued, text: (pool) => format.whole(pool.queued) },
        { name: "cpu", title: "CPU", unit: "cores", of: (pool) => pool.cpu_share, text: (pool) => format.fixed(pool.cpu_share, 2) },
      ],
    });
  }

  show(server) {
    const { facts } = this;
    facts.set("Memory", format.bytes(server.memory_bytes), { value: server.memory_bytes, note: `${format.bytes(server.ring_bytes)} of rings${server.device_bytes ? ` · ${format.bytes(server.device_bytes)} on the device` : ""}` });
    facts.set("CPU", `${format.fixed(server.cpu_share, 2)} cores`, { value: server.cpu_share, note: "last minute" });
    facts.set("Event loop delay", format.duration(server.loop_delay.p50_s), { value: server.loop_delay.p50_s, note: `median · p99 ${format.duration(server.loop_delay.p99_s)}` });
    facts.set("Connections", format.whole(server.connections), { value: server.connections, note: `${format.whole(server.calls)} calls, ${format.whole(server.streams)} of them streams` });
    const used = (now, limit) => ({ value: now, note: `of ${format.bytes(limit)}`, bar: limit ? now / limit : 0 });
    facts.set("Being received", format.bytes(server.receive_bytes), used(server.receive_bytes, server.receive_limit_bytes));
    facts.set("Being sent", format.bytes(server.send_bytes), used(server.send_bytes, server.send_limit_bytes));
    this.pools.show(server.pools);
  }
}
