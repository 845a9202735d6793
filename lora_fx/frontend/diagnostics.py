"""Says where in the user's model a tracer gave up, and what to try."""

from __future__ import annotations

import keyword
import linecache
import re
import traceback
from collections.abc import Iterable
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_fx.errors import TraceError, shorten

_TRY = {
    "symbolic": "pass example inputs, so that torch.export traces it (frontend='export')",
    "export": (
        "run the model on these inputs first; fix the axes that the message names in "
        "dynamic_shapes, or name them ('batch') instead of giving a Dim, and give every axis that "
        "may change a size of 2 or more in the example; or try "
        "frontend='symbolic'"
    ),
}


# torch.export, of a type that it meets among inputs or outputs.
_FOREIGN = re.compile(r"(?:Found|Unsupported input type) <class '[\w.<>]*?(?P<name>\w+)'>")
_DYNAMIC = re.compile(r"rope_type['\"]: ['\"]dynamic")
_INNER = torch.ops.export.access_subclass_inner_tensor.default
_PLAIN = "trace the model as it was before it was quantised, and give to_onnx quantize="
# What the code of every graph reads: an input of the same name would hide it.
_OF_FX = frozenset({"torch", "pytree", "fx_pytree"})


def explain_failure(model: nn.Module, frontend: str, error: Exception) -> str:
    """A message that names the module path, the source line, the reason and a way out."""
    reason = str(error).strip().split("\n")
    shown = "\n  ".join(line for line in reason[:6] if line.strip())
    known = _by_message(model, str(error)) or _by_model(model)
    return (
        f"{type(model).__name__} cannot be traced ({frontend}){_place(model, error)}:\n"
        f"  {type(error).__name__}: {shown}\nTry: {known or _TRY[frontend]}."
    )


def _by_message(model: nn.Module, reason: str) -> str | None:
    """What to do about a cause that the tracer's message tells."""
    foreign = _FOREIGN.search(reason)
    if foreign is not None and foreign["name"].endswith("Cache"):
        return (
            f"give use_cache=False among the inputs by name: a {foreign['name']} is no tensor, and "
            "no graph takes or returns it; a directory's decoder is traced with its cache, as "
            "tensors, by lora_fx.tasks.load and by the command line"
        )
    if foreign is not None:
        return (
            "wrap the model in a module that takes and returns tensors, or tuples, lists and "
            f"dictionaries of them, and no {foreign['name']}; a dataclass of tensors may be told "
            "to torch instead: torch.export.register_dataclass(its class)"
        )
    if "0/1 specialized" in reason:
        return (
            "give an example of size 2 or more along these axes, which dynamic_shapes leaves free: "
            "torch.export takes sizes 0 and 1 for constants; what is made of others runs with 1 too"
        )
    if isinstance(model, fx.GraphModule) and "specialized it to be a constant" in reason:
        return (
            "give dynamic_shapes to lora_fx.trace, of the model: this graph holds the sizes that "
            "it was traced with"
        )
    if "specialized it to be a constant" in reason:
        return (
            "leave these axes out of dynamic_shapes, and give an example of the size that is used: "
            "the model's code takes a step, or a way, for each size (a loop over tokens), "
            "and a graph has the steps of one. For a directory, module:function says both"
        )
    if "data-dependent" in reason:
        return (
            "let no `if` hang on what a tensor holds: a graph has one way, so take it before the "
            f"model is traced{_of_rope(model)}"
        )
    if "FakeTensor" in reason and any(isinstance(m, nn.RNNBase) for m in model.modules()):
        return (
            "give recurrent layers the padded tensor: no graph takes one that "
            "torch.nn.utils.rnn.pack_padded_sequence packed, whose steps hang on lengths"
        )
    if "'NoneType' object" in reason:
        return (
            "give the inputs that its code has None for, such as attention_mask and "
            "decoder_attention_mask: some models make them when they run, not while they are traced"
        )
    return None


def _by_model(model: nn.Module) -> str | None:
    """What to do about a cause that can be seen on the model."""
    packed = [path for path, module in model.named_modules() if _is_packed(module)]
    if packed:
        return (
            f"{_PLAIN}: the weights of {shorten(packed)} are packed for kernels of their own. A "
            "directory that bitsandbytes quantised is read without it by lora_fx.tasks.load"
        )
    empty = [name for name, p in model.named_parameters() if not p.numel()]
    if empty:
        return (
            f"gather the parameters: {shorten(empty, 3)} is empty, which is what DeepSpeed ZeRO-3 "
            "and FSDP leave of what is spread over processes"
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return (
            "take off the hooks of accelerate, which fetch weights at each call: "
            "accelerate.hooks.remove_hook_from_submodules(model)"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        return "make or load the model outside of torch.inference_mode(), and put in these weights"
    return None


def _of_rope(model: nn.Module) -> str:
    """What to do where transformers' code counts the frequencies of positions by their number."""
    if not any(_DYNAMIC.search(str(getattr(m, "config", ""))) for m in model.modules()):
        return ""
    return (
        ". transformers' rope_type 'dynamic' is 'default' in its config for sequences up to "
        "max_position_embeddings"
    )


def _is_packed(module: nn.Module) -> bool:
    own = (p for p in module.parameters(recurse=False) if not p.is_floating_point())
    return any(not p.is_complex() for p in own) or any(
        isinstance(value, torch.ScriptObject) for value in vars(module).values()
    )


def refuse_wrapped(model: nn.Module | torch.export.ExportedProgram) -> None:
    """Refuses weights that are no plain tensors, but made of several: torchao's in a few bits.

    Raises:
        TraceError: names the weights.
    """
    if isinstance(model, nn.Module):
        held: Iterable[tuple[str, Any]] = chain(model.named_parameters(), model.named_buffers())
        found = [name for name, tensor in held if is_traceable_wrapper_subclass(tensor)]
    else:
        nodes = model.graph.find_nodes(op="call_function", target=_INNER)
        inputs = dict.fromkeys(str(node.args[0]) for node in nodes)
        names = model.graph_signature.inputs_to_parameters | model.graph_signature.inputs_to_buffers
        found = [names.get(name, name) for name in inputs]
    if found:
        raise TraceError(
            f"{shorten(found)}: made of several tensors, and "
            f"no matrix that a graph multiplies with. {_PLAIN.capitalize()}, or put in the numbers "
            "that it stands for: module.weight = torch.nn.Parameter(module.weight.dequantize())"
        )


def refuse_scripted(model: nn.Module) -> None:
    """Refuses a model of TorchScript, or one that holds such a module: its code is not Python.

    Raises:
        TraceError: names the modules.
    """
    scripted = [p for p, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        where = "the model" if "" in scripted else shorten(scripted)
        raise TraceError(
            f"{where} is of TorchScript (torch.jit), which no tracer follows: trace the "
            "torch.nn.Module that it was made from"
        )


def refuse_uninitialised(model: nn.Module) -> None:
    """Refuses a model whose lazy modules have not been called: their weights have no shape yet.

    Raises:
        TraceError: names the weights.
    """
    held = chain(model.named_parameters(), model.named_buffers())
    empty = [name for name, tensor in held if is_lazy(tensor)]
    if empty:
        raise TraceError(
            f"{shorten(empty)}: of a lazy module that was never called, so without a shape: call "
            "the model once before it is traced"
        )


def refuse_inputs(names: Iterable[object]) -> None:
    """Refuses inputs by a name that the code of a graph cannot have: no word, or torch.fx's own.

    Raises:
        TraceError: names them.
    """
    odd = [n for n in names if not isinstance(n, str) or not _is_word(n) or n in _OF_FX]
    if odd:
        raise TraceError(
            f"inputs are called {shorten([repr(name) for name in odd])}, which no parameter of a "
            "traced graph can be called: wrap the model in a module whose forward takes them as a "
            "dictionary, or by other names"
        )


def refuse_attributes(targets: Iterable[str]) -> None:
    """Refuses modules and tensors by a name that torch.fx writes into code as it stands.

    Raises:
        TraceError: names them.
    """
    odd = [t for t in targets if any(not _is_attribute(part) for part in t.split("."))]
    if odd:
        raise TraceError(
            f"the model holds {shorten(odd)}: torch.fx cannot write a graph that reads an "
            "attribute called like a word of Python or with quotes in it; rename it in a copy of "
            "the model"
        )


def _is_word(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _is_attribute(name: str) -> bool:
    quoted = not name.isidentifier() and name.isprintable() and not set(name) & set('"\\')
    return _is_word(name) or quoted


def _place(model: nn.Module, error: Exception) -> str:
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = paths.get(id(_receiver(frame)))
        if path is not None and not _is_tracer(frame):
            source = linecache.getline(frame.f_code.co_filename, line).strip()
            where = path or "the model itself"
            found = f", at {where}, {frame.f_code.co_filename}:{line}: {source}"
    return found


def _receiver(frame: FrameType) -> object:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _is_tracer(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(("torch.", "lora_fx")) and not name.startswith("lora_fx.testing")
