// The stream of snapshots: opened again whenever it is lost, with its state for the reader.

const SILENCE_MS = 4_000;
const RETRY_MS = 1_500;

export async function fetchJson(path) {
  const answer = await fetch(path);
  if (answer.status === 401) location.assign("/login");
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

export class Live {
  /** `onStatus` gets every snapshot, `onState` "live", "lost" or "silent" and the seconds since the last one. */
  constructor({ onStatus, onState }) {
    Object.assign(this, { onStatus, onState, last: 0 });
    this.#open();
    setInterval(() => this.#look(), 1_000);
  }

  #open() {
    this.source?.close();
    this.source = new EventSource("/api/events");
    this.source.onmessage = (event) => {
      this.last = Date.now();
      this.onState("live", 0);
      this.onStatus(JSON.parse(event.data));
    };
    this.source.onerror = () => {
      this.#look("lost");
      // A browser gives up by itself only if the answer is not a stream: the token is refused, or too many pages are open.
      if (this.source.readyState === EventSource.CLOSED) {
        setTimeout(() => this.#open(), RETRY_MS);
        fetchJson("/api/history").catch(() => {});
      }
    };
  }

  #look(state = "silent") {
    const silent = Date.now() - this.last;
    if (state === "lost" || silent > SILENCE_MS) this.onState(this.source.readyState === EventSource.OPEN ? state : "lost", this.last ? silent / 1000 : null);
  }
}
