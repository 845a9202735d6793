// Adapters of one exported model, as `lora_fx.export_adapter(..., "NAME.safetensors")` writes them.

const KEY = "lora_fx.adapter";
const TYPES = {
  F64: ["float64", Float64Array],
  F32: ["float32", Float32Array],
  F16: ["float16", Uint16Array],
  I64: ["int64", BigInt64Array],
};

/**
 * Reads an adapter's file.
 *
 * @param ort onnxruntime-web or onnxruntime-node.
 * @param {ArrayBuffer} buffer the file.
 * @returns `name`, or null for no adapter; `base` and `model_version` of the model that it was made
 *   for; and `feeds`, what every run is fed beside the model's own inputs.
 */
export function readAdapter(ort, buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const text = new TextDecoder().decode(new Uint8Array(buffer, 8, size));
  const { __metadata__: texts, ...tensors } = JSON.parse(text);
  const said = JSON.parse(texts?.[KEY] ?? "null");
  if (said === null) throw new Error("no adapter for an exported model: make one with export_adapter");
  const feeds = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(tensors)) {
    if (!(dtype in TYPES)) throw new Error(`${name}: ${dtype}, which JavaScript has no numbers for`);
    const [type, Values] = TYPES[dtype];
    feeds[name] = new ort.Tensor(type, new Values(buffer.slice(8 + size + begin, 8 + size + end)), shape);
  }
  return { name: said.adapter, base: said.base, model_version: said.model_version, feeds };
}

/**
 * Refuses an adapter that was made for another model than the file of no adapter beside it.
 *
 * @param session of the model.
 * @param none the file of no adapter, which the model was delivered with.
 * @param adapter what is to be run.
 */
export function checkAdapter(session, none, adapter) {
  if (adapter.base !== none.base || adapter.model_version !== none.model_version) {
    throw new Error(`${adapter.name}: made for another model`);
  }
  const lost = Object.keys(adapter.feeds).filter((name) => !session.inputNames.includes(name));
  if (lost.length) throw new Error(`${adapter.name}: the model takes no ${lost.join(", ")}`);
}

/** Runs a model on its own inputs, with an adapter; to run the base, that of no adapter. */
export function run(session, inputs, adapter) {
  return session.run({ ...inputs, ...adapter.feeds });
}
