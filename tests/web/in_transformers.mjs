// Jobs by Transformers.js, on exported directories as they are: read from the standard input.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.LORA_FX_WEB}/`);
const library = await import(pathToFileURL(require.resolve("@huggingface/transformers")));
const { directory, kind, inputs, texts, tokens } = JSON.parse(readFileSync(0, "utf8"));
library.env.allowRemoteModels = false;
library.env.localModelPath = `${dirname(directory)}/`;
const options = { dtype: "fp32", subfolder: "", session_options: { logSeverityLevel: 3 } };
const name = basename(directory);

if (kind === "feature-extraction") {
  const embed = await library.pipeline(kind, name, options);
  const found = await embed(texts, { pooling: "mean", normalize: true });
  console.log(JSON.stringify(found.tolist()));
} else {
  const model = await library[kind].from_pretrained(name, options);
  const given = Object.entries(inputs).map(([key, { type, dims, data }]) => {
    const values = type === "int64" ? BigInt64Array.from(data, BigInt) : Float32Array.from(data);
    return [key, new library.Tensor(type, values, dims)];
  });
  const wanted = { max_new_tokens: tokens, do_sample: false };
  const found = await model.generate({ ...Object.fromEntries(given), ...wanted });
  console.log(JSON.stringify(found.tolist().map((row) => row.map(Number))));
}
