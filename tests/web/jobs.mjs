// Models on inputs, each run with an adapter or without: the same in Node and in a browser.

import { readAdapter, run } from "../../examples/web/adapters.mjs";

/**
 * Runs what a test asks for.
 *
 * @param ort onnxruntime-node or onnxruntime-web.
 * @param load gives the bytes of a file.
 * @param jobs of each: `model`, and `runs` of `inputs` (type, dims and data by name) and `adapter`.
 * @returns of each run, the outputs by name: dims, data, and whether that is bits; or the message
 *   of its error.
 */
export async function runAll(ort, load, jobs) {
  const found = [];
  for (const { model, runs } of jobs) {
    const options = { logSeverityLevel: 3 };
    const session = await ort.InferenceSession.create(new Uint8Array(await load(model)), options);
    for (const { inputs, adapter } of runs) {
      try {
        const feeds = Object.fromEntries(
          Object.entries(inputs).map(([name, value]) => [name, tensor(ort, value)]),
        );
        const given = adapter === null ? { feeds: {} } : readAdapter(ort, await load(adapter));
        found.push(plain(await run(session, feeds, given)));
      } catch (error) {
        found.push(error.message);
      }
    }
    await session.release();
  }
  return found;
}

function tensor(ort, { type, dims, data }) {
  const values = { int64: () => BigInt64Array.from(data, BigInt), float16: () => Uint16Array.from(data) };
  return new ort.Tensor(type, values[type]?.() ?? Float32Array.from(data), dims);
}

function plain(outputs) {
  return Object.fromEntries(
    Object.entries(outputs).map(([name, { dims, data }]) => {
      const areBits = data instanceof Uint16Array; // float16, where JavaScript has no such numbers
      return [name, [dims, Array.from(data, Number), areBits]];
    }),
  );
}
