"""Words that a caller chooses among: each set is told once, here, as a type.

What is called in Python is annotated with them, the command line offers and completes the same
words, and `check_choice` refuses any other in one way.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Mode = Literal["merged", "unmerged", "swappable", "required"]
AdapterMode = Literal["constant", "input", "required"]  # `adapters=` of to_onnx
SlotMode = Literal["input", "required"]  # of what has slots in any case
SlotForm = Literal["factors", "vectors", "weight", "invocation"]
Target = Literal["constant", "input"]
Frontend = Literal["auto", "symbolic", "export"]
Combination = Literal["cat", "linear", "svd"]
Bits = Literal[4, 8, "nf4", "fp4"]
BitsOrFloat = Literal[Bits, "float"]
FloatType = Literal["float32", "float16"]  # that onnxruntime's CPU provider runs
SlotFormat = Literal["onnx_adapter", "safetensors"]
Format = Literal[
    "onnx_adapter", "diffusers", "mlx", "torchtune", "peft", "peft_file", "kohya", "loralib"
]
FormatOrAuto = Literal["auto", Format]
SavedFormat = Literal["onnx_adapter", "diffusers", "peft", "peft_file", "kohya", "loralib"]
WrittenFormat = Literal[SavedFormat, SlotFormat]  # `--to`
Shell = Literal["bash", "zsh", "fish"]
TaskName = Literal[
    "text2text-generation-with-past",
    "text2text-generation",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "text-generation-with-past",
    "text-generation",
    "automatic-speech-recognition-with-past",
    "automatic-speech-recognition",
    "image-classification",
    "semantic-segmentation",
    "object-detection",
    "zero-shot-image-classification",
    "audio-classification",
    "feature-extraction",
]


def words(choices: Any) -> tuple[str, ...]:
    """The words of a set, as they are typed on a command line."""
    return tuple(map(str, get_args(choices)))


def check_choice(said: str, value: object, choices: Any, error: type[Exception]) -> None:
    """Refuses what is none of a set.

    Args:
        said: what stands before the value in the message: ``"frontend "``, ``"adapters="``.
        value: what was given.
        choices: the type that tells the set.
        error: of which type to raise.

    Raises:
        Exception: of that type; lists the set.
    """
    known = get_args(choices)
    if not any(type(value) is type(one) and value == one for one in known):
        *most, last = map(repr, known)
        listed = f"{', '.join(most)} or {last}" if most else last
        raise error(f"{said}{value!r:.80}: expected {listed}")
