// Jobs by onnxruntime-node: read from the standard input, their results printed.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { runAll } from "./jobs.mjs";

const require = createRequire(`${process.env.LORA_FX_WEB}/`);
const ort = require("onnxruntime-node");
const { jobs } = JSON.parse(readFileSync(0, "utf8"));
const load = async (path) => {
  const bytes = readFileSync(path);
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
};
console.log(JSON.stringify(await runAll(ort, load, jobs)));
