"""Says where in the user's model a tracer gave up, and what to try."""

from __future__ import annotations

import linecache
import traceback
from types import FrameType

from torch import nn

_TRY = {
    "symbolic": "pass example inputs, so that torch.export traces it (frontend='export')",
    "export": (
        "run the model on these inputs first; fix the axes that the message names in "
        "dynamic_shapes, or name them ('batch') instead of giving a Dim, and give every axis that "
        "may change a size of 2 or more in the example; or try "
        "frontend='symbolic'"
    ),
}


def explain_failure(model: nn.Module, frontend: str, error: Exception) -> str:
    """A message that names the module path, the source line, the reason and a way out."""
    reason = str(error).strip().split("\n")
    shown = "\n  ".join(line for line in reason[:6] if line.strip())
    return (
        f"{type(model).__name__} cannot be traced ({frontend}){_place(model, error)}:\n"
        f"  {type(error).__name__}: {shown}\nTry: {_TRY[frontend]}."
    )


def _place(model: nn.Module, error: Exception) -> str:
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = paths.get(id(_receiver(frame)))
        if path is not None and not _inside_torch(frame):
            source = linecache.getline(frame.f_code.co_filename, line).strip()
            where = path or "the model itself"
            found = f", at {where}, {frame.f_code.co_filename}:{line}: {source}"
    return found


def _receiver(frame: FrameType) -> object:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _inside_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(("torch.", "lora_fx"))
