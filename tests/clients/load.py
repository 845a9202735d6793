"""What clients make of a directory, as they are used; run by `conftest.client`."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch


def causal_lm(directory: str, ids: list[list[int]], mask: list[list[int]], count: int) -> Any:
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(directory, use_cache=True)
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    given |= {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    return model.generate(**given).tolist()


def seq2seq(directory: str, ids: list[list[int]], count: int) -> Any:
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    model = ORTModelForSeq2SeqLM.from_pretrained(directory, use_cache=True)
    model.generation_config.eos_token_id = None
    return model.generate(torch.tensor(ids), max_new_tokens=count, do_sample=False).tolist()


def genai(directory: str, ids: list[int], length: int, adapters: list[str]) -> Any:
    import onnxruntime_genai as og

    model = og.Model(directory)
    loaded = og.Adapters(model)
    found = []
    for name in [None, *adapters]:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        if name is not None:
            loaded.load(f"{directory}/{name}.onnx_adapter", name)
            generator.set_active_adapter(loaded, name)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(token) for token in generator.get_sequence(0)])
    return found


def sentences(directory: str, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(directory, backend="onnx")
    return [_plain(model.tokenize(texts)), model.encode(texts).tolist()]


def classes(directory: str, texts: list[str]) -> Any:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    model = ORTModelForSequenceClassification.from_pretrained(directory)
    tokens = AutoTokenizer.from_pretrained(directory)(texts, return_tensors="pt", padding=True)
    return [_plain(tokens), model(**tokens).logits.tolist(), model.config.num_labels]


def answers(directory: str, question: str, context: str) -> Any:
    from optimum.onnxruntime import ORTModelForQuestionAnswering
    from transformers import AutoTokenizer

    model = ORTModelForQuestionAnswering.from_pretrained(directory)
    tokens = AutoTokenizer.from_pretrained(directory)(question, context, return_tensors="pt")
    found = model(**tokens)
    return [_plain(tokens), found.start_logits.tolist(), found.end_logits.tolist()]


def diffusion(base: str, cases: list[list[str | None]], prompt: str) -> Any:
    """Pictures of exported pipelines, each beside diffusers' own with an adapter by its loader."""
    from diffusers import StableDiffusionPipeline
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    found = []
    for directory, adapter in cases:
        eager = StableDiffusionPipeline.from_pretrained(base)
        if adapter is not None:
            eager.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
        for pipe in (ORTStableDiffusionPipeline.from_pretrained(directory), eager):
            latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
            given = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
            found.append(pipe(prompt, latents=latents, guidance_scale=3.0, **given).images.tolist())
    return found


def _plain(tokens: Any) -> dict[str, Any]:
    return {name: value.tolist() for name, value in tokens.items()}


if __name__ == "__main__":
    name, *arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[name](*arguments)))
