"""The tasks, by optimum's names: which class of transformers each needs, and what calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_fx.errors import LoraFxError
from lora_fx.tasks.calls import Call, Prepared, as_it_is, of_each_choice
from lora_fx.tasks.generation import with_past
from lora_fx.tasks.seq2seq import in_three


@dataclass(frozen=True)
class Task:
    """What a model is exported for.

    Attributes:
        name: as optimum has it.
        autos: the classes of transformers that find the model's class.
        peft: PEFT's ``task_type``, or None.
        call: what is exported of a model, a file each, and its example inputs.
        generates: whether any model that generates is of it, whatever the auto class says.
    """

    name: str
    autos: tuple[str, ...]
    peft: str | None = None
    call: Callable[[Any, Prepared], tuple[Call, ...]] = as_it_is
    generates: bool = False

    def classes(self, config: Any) -> tuple[type, ...]:
        """The classes of transformers that do it for models of a config."""
        import transformers

        mappings = [getattr(transformers, auto)._model_mapping for auto in self.autos]
        found = [m[type(config)] for m in mappings if type(config) in m]
        return tuple(k for one in found for k in (one if isinstance(one, tuple) else (one,)))

    def is_done_by(self, kind: type, config: Any) -> bool:
        """Whether a class of transformers does it."""
        import transformers

        generates = self.generates and issubclass(kind, transformers.GenerationMixin)
        return generates or kind in self.classes(config)


# A model's own task is the first that its class does.
TASKS = {
    task.name: task
    for task in (
        Task(
            "text2text-generation-with-past",
            ("AutoModelForSeq2SeqLM",),
            "SEQ_2_SEQ_LM",
            in_three,
            True,
        ),
        Task("text2text-generation", ("AutoModelForSeq2SeqLM",), generates=True),
        Task("fill-mask", ("AutoModelForMaskedLM",)),
        Task("text-classification", ("AutoModelForSequenceClassification",), "SEQ_CLS"),
        Task("token-classification", ("AutoModelForTokenClassification",), "TOKEN_CLS"),
        Task("question-answering", ("AutoModelForQuestionAnswering",), "QUESTION_ANS"),
        Task("multiple-choice", ("AutoModelForMultipleChoice",), call=of_each_choice),
        Task("text-generation-with-past", ("AutoModelForCausalLM",), "CAUSAL_LM", with_past, True),
        Task("text-generation", ("AutoModelForCausalLM",), generates=True),
        Task(
            "automatic-speech-recognition-with-past", ("AutoModelForSpeechSeq2Seq",), call=in_three
        ),
        Task("automatic-speech-recognition", ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC")),
        Task("image-classification", ("AutoModelForImageClassification",)),
        Task("semantic-segmentation", ("AutoModelForSemanticSegmentation",)),
        Task("object-detection", ("AutoModelForObjectDetection",)),
        Task("zero-shot-image-classification", ("AutoModelForZeroShotImageClassification",)),
        Task("audio-classification", ("AutoModelForAudioClassification",)),
        Task("feature-extraction", ("AutoModel",), "FEATURE_EXTRACTION"),
    )
}


def task_named(name: str) -> Task:
    """The task of a name.

    Raises:
        LoraFxError: there is none; names those that there are.
    """
    if name not in TASKS:
        raise LoraFxError(f"--task {name!r:.80}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def task_of_adapters(name: str | None) -> Task | None:
    """The task that PEFT's ``task_type`` means, if it is one of ours."""
    return next((task for task in TASKS.values() if name and task.peft == name), None)


def task_of(kind: type, config: Any) -> Task | None:
    """The task that a class is made for; None if it is of no task here, and called as it is."""
    return next((task for task in TASKS.values() if kind in task.classes(config)), None)
