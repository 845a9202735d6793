"""One decoder with its cache, two adapters: one counts up, the other down.

A small Llama with random weights learns both by LoRA, in PEFT. It is exported once, and each
adapter is a file of a few kilobytes that a run names.

    python examples/decoder_two_adapters.py        # needs lora-fx[hf]
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

NUMBERS = 16  # the vocabulary: a token is a number


def base() -> LlamaForCausalLM:
    """A decoder that has learned nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBERS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def train(step: int, directory: Path) -> peft.PeftModel:
    """Lets PEFT teach the base to count in steps of one, up or down, and saves the adapter."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(base(), config).eval()
    rows = [[(start + step * i) % NUMBERS for i in range(8)] for start in range(NUMBERS)]
    ids = torch.tensor(rows)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    return model


def main() -> None:
    """Trains two adapters, exports one file, and swaps."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        base().save_pretrained(directory / "llama")
        trained = {word: train(step, directory / word) for word, step in (("up", 1), ("down", -1))}

        (part,) = lora_fx.tasks.load(directory / "llama", "text-generation-with-past")
        report = lora_fx.to_onnx(part.traced(), directory / "model.onnx", adapters="input")
        print(f"{report.path}: {len(report.slots)} slots, verified {report.verified}")

        session = lora_fx.Session(directory / "model.onnx")
        prompt = torch.tensor([[2, 3], [9, 8]])
        said = {"nobody": session.generate(prompt, 8)}
        for word, model in trained.items():
            adapter = lora_fx.load_adapter(directory / word, base=part.model)
            file = directory / f"{word}.onnx_adapter"
            lora_fx.export_adapter(adapter, directory / "model.onnx", file)
            said[word] = session.generate(prompt, 8, adapter=file)
            expected = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
            assert (said[word] == expected.numpy()).all(), "PEFT says the same"
            print(f"{word:<6} {file.stat().st_size / 1e3:.0f} kB {said[word].tolist()}")
        again = session.generate(prompt, 8)
    print(f"nobody 0 kB {again.tolist()}")
    assert said["up"][0].tolist() == list(range(2, 12))
    assert said["down"][1].tolist() == [n % NUMBERS for n in range(9, -1, -1)]
    assert (again == said["nobody"]).all(), "without an adapter the file is the base again"


if __name__ == "__main__":
    main()
