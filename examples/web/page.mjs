// The page: texts that are near to one, by an encoder with the adapter that was clicked.

import * as ort from "onnxruntime-web";
import { checkAdapter, readAdapter, run } from "./adapters.mjs";
import { tokenizer } from "./wordpiece.mjs";

const MOST = 64; // tokens of a text
const shown = (id) => document.getElementById(id);

async function start() {
  const about = await (await fetched("page.json")).json();
  const [session, vocabulary, ...files] = await Promise.all([
    fetched("model.onnx").then((file) => file.arrayBuffer()).then(opened),
    fetched("vocab.txt").then((file) => file.text()),
    ...["no-adapter", ...about.adapters].map(async (name) => {
      return readAdapter(ort, await (await fetched(`${name}.safetensors`)).arrayBuffer());
    }),
  ]);
  files.forEach((adapter) => checkAdapter(session, files[0], adapter));
  const page = { session, tokenize: tokenizer(vocabulary, MOST), texts: about.texts };
  shown("query").value = about.query;
  const buttons = files.map((adapter) => button(page, adapter));
  shown("adapters").replaceChildren(...buttons);
  shown("query").addEventListener("change", () => {
    buttons.find((one) => one.ariaPressed === "true").click();
  });
  buttons[0].click();
}

function opened(model) {
  return ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
}

async function fetched(name) {
  const file = await fetch(name);
  if (!file.ok) throw new Error(`${name}: ${file.status} ${file.statusText}`);
  return file;
}

function button(page, adapter) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = adapter.name ?? "no adapter";
  made.ariaPressed = "false";
  made.addEventListener("click", () => {
    for (const other of shown("adapters").children) other.ariaPressed = String(other === made);
    told(rank(page, adapter));
  });
  return made;
}

let latest = Promise.resolve(); // a session runs once at a time

function rank(page, adapter) {
  latest = latest.catch(() => {}).then(async () => {
    const begin = performance.now();
    const every = [shown("query").value, ...page.texts.map(({ text }) => text)];
    const [query, ...others] = await embedded(page, every, adapter);
    const scores = others.map((other) => other.reduce((sum, value, i) => sum + value * query[i], 0));
    const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]);
    const spent = Math.round(performance.now() - begin);
    const name = adapter.name ?? "no adapter";
    shown("status").textContent = `${name}: ${every.length} texts in ${spent} ms`;
    shown("ranking").dataset.adapter = name;
    shown("ranking").replaceChildren(...order.map((i) => row(page.texts[i], scores[i])));
  });
  return latest;
}

/** Means over the tokens of each text, of length one. */
async function embedded({ session, tokenize }, texts, adapter) {
  const tokens = texts.map(tokenize);
  const length = Math.max(...tokens.map((ids) => ids.length));
  const dims = [tokens.length, length];
  const filled = (value) => {
    const flat = tokens.flatMap((ids) => Array.from({ length }, (_, i) => value(ids, i)));
    return new ort.Tensor("int64", BigInt64Array.from(flat, BigInt), dims);
  };
  const inputs = {
    input_ids: filled((ids, i) => ids[i] ?? 0),
    attention_mask: filled((ids, i) => Number(i < ids.length)),
  };
  if (session.inputNames.includes("token_type_ids")) inputs.token_type_ids = filled(() => 0);
  const { last_hidden_state: states } = await run(session, inputs, adapter);
  const width = states.dims[2];
  return tokens.map((ids, place) => {
    const sum = new Float64Array(width);
    for (let i = 0; i < ids.length; i += 1) {
      const start = (place * length + i) * width;
      for (let j = 0; j < width; j += 1) sum[j] += states.data[start + j];
    }
    const norm = Math.hypot(...sum);
    return sum.map((value) => value / norm);
  });
}

function row({ from, text }, score) {
  const made = document.createElement("li");
  made.dataset.score = score;
  made.dataset.text = text;
  const parts = ["b", "span", "output", "progress"].map((tag) => document.createElement(tag));
  parts[0].textContent = from;
  parts[1].textContent = text;
  parts[2].textContent = score.toFixed(3);
  Object.assign(parts[3], { max: 1, value: Math.max(0, score) });
  parts[3].ariaHidden = "true";
  made.append(...parts);
  return made;
}

async function told(work) {
  try {
    await work;
    shown("status").className = "";
  } catch (error) {
    shown("status").className = "failed";
    shown("status").textContent = error.message;
  }
}

told(start());
