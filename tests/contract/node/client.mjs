// A client that knows nothing of Touchline but its .proto. Adds an episode, asks whether it can sample, samples a batch, takes two from a
// stream, reads its episode back, and prints what it was answered as one line of JSON.
//
//     node client.mjs ADDRESS PROTO_FOLDER EPISODE_JSON SEED
//
// EPISODE_JSON: {"obs": [[...]], "action": [[...]], "reward": [...]}, rows first.

import assert from "node:assert/strict";
import { endianness } from "node:os";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const DEADLINE_MS = 30_000;

const ELEMENTS = {
  DTYPE_FLOAT32: { size: 4, read: (view, at) => view.getFloat32(at, true) },
  DTYPE_FLOAT64: { size: 8, read: (view, at) => view.getFloat64(at, true) },
  DTYPE_INT64: { size: 8, read: (view, at) => Number(view.getBigInt64(at, true)) },
};

/** Packs rows of numbers as a float32 Tensor. */
function tensorOf(rows) {
  assert.equal(endianness(), "LE"); // a Float32Array has the machine's byte order, the wire has little-endian
  const values = Float32Array.from(rows.flat());
  const shape = Array.isArray(rows[0]) ? [rows.length, rows[0].length] : [rows.length];
  return { dtype: "DTYPE_FLOAT32", shape, data: Buffer.from(values.buffer) };
}

/** Unpacks a Tensor as its shape and a flat array of numbers. */
function valuesOf(tensor) {
  const { size, read } = ELEMENTS[tensor.dtype];
  const view = new DataView(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength);
  const values = Array.from({ length: tensor.data.byteLength / size }, (_, index) => read(view, index * size));
  return { dtype: tensor.dtype, shape: tensor.shape.map(Number), values };
}

function batchOf(batch) {
  return {
    columns: Object.fromEntries(batch.columns.map(({ name, tensor }) => [name, valuesOf(tensor)])),
    provenance: Object.fromEntries(
      Object.entries(batch.provenance).filter(([, tensor]) => tensor !== null).map(([name, tensor]) => [name, valuesOf(tensor)]),
    ),
    actors: Object.fromEntries(batch.actors.map(({ index, name }) => [index, name])),
  };
}

function call(client, method, request) {
  return new Promise((resolve, reject) => {
    const deadline = Date.now() + DEADLINE_MS;
    client[method](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

/** Takes so many batches from a sampling stream. */
function takeFromStream(client, sample, count) {
  return new Promise((resolve, reject) => {
    const batches = [];
    const stream = client.SampleStream({ deadline: Date.now() + DEADLINE_MS });
    stream.on("data", (frame) => batches.push(...frame.group.batches.map(batchOf)));
    stream.on("error", reject);
    stream.on("end", () => resolve(batches));
    stream.write({ open: { sample, credits: 1 } });
    stream.write({ credit: { batches: count - 1 } });
    stream.end();
  });
}

/** Reads the episodes that a request selects; small ones, which come whole. */
function readEpisodes(client, request) {
  return new Promise((resolve, reject) => {
    const read = { episodes: [] };
    const stream = client.GetEpisodes(request, { deadline: Date.now() + DEADLINE_MS });
    stream.on("error", reject);
    stream.on("end", () => resolve(read));
    stream.on("data", ({ part, selection, group }) => {
      if (part === "selection") read.selection = selection;
      else for (const { episode_id, episode } of group.episodes) read.episodes.push(storedOf(episode_id, episode));
    });
  });
}

function storedOf(id, { key, actor, policy_version, columns }) {
  const tensors = Object.fromEntries(columns.map(({ name, tensor }) => [name, valuesOf(tensor)]));
  return { id, key, actor, policy_version, columns: tensors };
}

const [address, protoFolder, episodeJson, seed] = process.argv.slice(2);
const definition = protoLoader.loadSync("touchline/v1/replay.proto", {
  includeDirs: [protoFolder],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
  defaults: true,
});
const { Replay } = grpc.loadPackageDefinition(definition).touchline.v1;
const client = new Replay(address, grpc.credentials.createInsecure(), { "grpc.enable_http_proxy": 0 });

const columns = Object.entries(JSON.parse(episodeJson)).map(([name, rows]) => ({ name, tensor: tensorOf(rows) }));
const key = { client_id: "node", incarnation: "9007199254740993", sequence: 0 };
const episode = { key, actor: "Pelé", policy_version: 12, columns };

const added = await call(client, "AddEpisode", { episode });
const again = await call(client, "AddEpisode", { episode });
const refused = await call(client, "AddEpisode", { episode: { columns: columns.slice(1) } }).catch((error) => ({
  code: error.code,
  details: error.details,
  reason: error.metadata.get("touchline-reason"),
}));
const ready = await call(client, "Ready", { min_steps: 5 });
const sample = await call(client, "Sample", { batch_size: 6, seed });
const streamed = await takeFromStream(client, { batch_size: 6, seed }, 2);
const read = await readEpisodes(client, { newest: 1, columns: ["reward", "obs"] });
client.close();
console.log(JSON.stringify({ added, again, refused, ready, batch: batchOf(sample.batch), streamed, read }));
