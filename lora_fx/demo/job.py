"""The whole path on a real model: train, export three ways, swap, score, time.

The recipes are the best of several (at least nine for language and five for network) by their
scores on another split of the same modules' docstrings; the split that the table shows was scored
with them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_fx.demo.docstrings import SUBJECTS, load_subject
from lora_fx.demo.encoder import Batch, Tokenizer, eager, load_encoder, load_extra, load_tokenizer
from lora_fx.demo.exports import export_forms
from lora_fx.demo.forms import Form, Measured, Row
from lora_fx.demo.judge import Judge
from lora_fx.demo.timing import latencies
from lora_fx.demo.training import Recipe, Trainer, add_adapter, train
from lora_fx.errors import LoraFxError

Progress = Callable[[str], None]

RECIPES = {
    "language": Recipe(8, 16, ["query", "value", "dense"], [3, 4, 5], learning_rate=3e-3),
    "network": Recipe(16, 32, "all-linear", learning_rate=1.5e-3),
}
EPOCHS = 3
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
_TIMED_TEXTS = 8


@dataclass(frozen=True)
class Result:
    """What the demo measured.

    Attributes:
        rows: one a form.
        out: where the files are.
    """

    rows: list[Row]
    out: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        for plain, row in zip(values["rows"], self.rows, strict=True):
            plain["scores"] = {
                name: {"accuracy": score.accuracy, "error": score.error, "texts": score.total}
                for name, score in row.scores.items()
            }
        return values

    def row(self, form: str, weights: str) -> Row:
        """The row of one form and one set of weights."""
        return next(row for row in self.rows if (row.form, row.weights) == (form, weights))


def run(out: Path, progress: Callable[[str], None] = lambda stage: None) -> Result:
    """Runs the demo.

    Args:
        out: gets the adapters, the models and ``result.json``; earlier ones are replaced.
        progress: told the name of each stage.

    Raises:
        LoraFxError: a package of the ``demo`` extra is missing, or ``out`` cannot be written.
        VerificationError: an exported form and eager disagree.
    """
    encoder = load_extra()
    try:
        (out / "onnx").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoraFxError(f"{out}: cannot be created: {error.strerror}") from error
    progress("read docstrings")
    subjects = [load_subject(name, modules.split()) for name, modules in SUBJECTS.items()]
    tokenizer = load_tokenizer(encoder)
    judge = Judge.of(subjects, tokenizer)
    measured = _train(encoder, judge, tokenizer, out, progress)
    example = tokenizer.batch(subjects[0].train.texts[:2])
    adapters = [out / subject.name for subject in subjects]
    for form in export_forms(load_encoder(encoder), example, adapters, out, progress):
        progress(f"score {form.name}, {form.weights}")
        measured.append(judge.measure(form))
    progress("time")
    longest = tokenizer.batch(sorted(subjects[0].held_out.texts, key=len)[-_TIMED_TEXTS:])
    result = Result(_rows(measured, longest), str(out))
    (out / "result.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _train(
    encoder: Path, judge: Judge, tokenizer: Tokenizer, out: Path, progress: Progress
) -> list[Measured]:
    """The base and one adapted model for each subject in eager, each judged as a reference."""
    progress("score eager, base")
    base = Form("eager", "base", eager(load_encoder(encoder)), (encoder / WEIGHTS,))
    measured = [judge.refer(base)]
    trainers = {}
    for subject in (exam.subject for exam in judge.exams):
        recipe = RECIPES[subject.name]
        model = add_adapter(load_encoder(encoder), recipe)
        centres = judge.references["base", subject.name].centres
        trainer = Trainer(model, subject.train, recipe, centres, tokenizer, EPOCHS)
        trainers[subject.name] = trainer
    train(list(trainers.values()), progress)
    for name, trainer in trainers.items():
        progress(f"score eager, {name}")
        trainer.model.save_pretrained(out / name)
        form = Form("eager + PEFT", name, eager(trainer.model), (out / name / ADAPTER,))
        measured.append(judge.refer(form))
    return measured


def _rows(measured: Sequence[Measured], batch: Batch) -> list[Row]:
    forms = [one.form for one in measured]
    seconds = latencies(forms, batch)
    unit = seconds[[form.name for form in forms].index("merged")]
    return [
        Row(
            one.form.name,
            one.form.weights,
            one.scores,
            one.max_error,
            tuple(file.stat().st_size for file in one.form.files),
            taken / unit,
        )
        for one, taken in zip(measured, seconds, strict=True)
    ]
