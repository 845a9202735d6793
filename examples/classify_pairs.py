"""Does the second sentence contradict the first? A PEFT adapter and its head, as one ONNX file.

A small BERT with random weights learns pairs of sentences by LoRA and a new classifier; PEFT saves
both in a directory, and lora_fx makes one plain file of that directory and the base.

    python examples/classify_pairs.py        # needs lora-fx[hf]
"""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from transformers import BertConfig, BertForSequenceClassification

import lora_fx

SUBJECTS, VERBS = ["cat", "dog", "horse", "bird"], ["sleeps", "eats", "runs", "sings"]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "the", "not", *SUBJECTS, *VERBS]


def pairs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every pair of two statements of one subject and verb, and whether they contradict."""
    rows, labels = [], []
    for subject, verb in itertools.product(SUBJECTS, VERBS):
        for first, second in itertools.product((False, True), repeat=2):
            rows.append((sentence(subject, verb, first), sentence(subject, verb, second)))
            labels.append(int(first != second))
    return encoded(rows), torch.tensor(labels)


def sentence(subject: str, verb: str, negated: bool) -> list[str]:
    """The words of one statement."""
    return ["the", subject, *(["not"] if negated else []), verb]


def encoded(rows: list[tuple[list[str], list[str]]]) -> dict[str, torch.Tensor]:
    """What a tokenizer gives for pairs: ids, a mask, and which sentence a token is of."""
    ids, kinds = [], []
    for first, second in rows:
        ids.append([WORDS.index(w) for w in ["[CLS]", *first, "[SEP]", *second, "[SEP]"]])
        kinds.append([0] * (len(first) + 2) + [1] * (len(second) + 1))
    width = max(map(len, ids))
    fields = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    fields["token_type_ids"] = kinds
    return {
        name: torch.tensor([row + [0] * (width - len(row)) for row in values])
        for name, values in fields.items()
    }


def base() -> BertForSequenceClassification:
    """The model that everybody has: its weights never change."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=16, num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def train(directory: Path) -> None:
    """Learns the pairs with PEFT, and saves what was learned, as anybody does."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"]
    )
    model = peft.get_peft_model(base(), config).eval()
    inputs, labels = pairs()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


def main() -> None:
    """Trains, exports, and classifies in onnxruntime."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        train(directory / "contradicts")

        model = base()
        inputs, labels = pairs()
        adapter = lora_fx.load_adapter(directory / "contradicts", base=model)
        axes = {field: {0: "batch", 1: "sequence"} for field in inputs}
        gm = lora_fx.trace(model, (), inputs, dynamic_shapes=axes)
        report = lora_fx.to_onnx(
            lora_fx.fold(lora_fx.inject(gm, adapter)), directory / "model.onnx"
        )
        print(report)

        few = {field: value[:5] for field, value in inputs.items()}
        session = lora_fx.Session(directory / "model.onnx")
        answers = session.run(inputs)["logits"].argmax(-1)
        before = model(**inputs).logits.argmax(-1)
        few_answers = session.run(few)["logits"].argmax(-1)
    right, was = (float((a == labels.numpy()).mean()) for a in (answers, before.numpy()))
    print(f"{len(labels)} pairs: {was:.0%} right before, {right:.0%} in onnxruntime")
    assert report.mode == "merged"
    assert right == 1.0 > was
    assert (few_answers == answers[:5]).all(), "another batch, the same answers"


if __name__ == "__main__":
    main()
