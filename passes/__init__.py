"""The passes: callables from a graph to a new graph and a report of edits."""

from lora_fx.graph.pass_base import Pass, PassResult, Pipeline
from lora_fx.passes.choose_form import ChooseForm
from lora_fx.passes.fold_lora import FoldLora
from lora_fx.passes.inject_lora import InjectLora
from lora_fx.passes.raise_lora import RaiseLora
from lora_fx.passes.strip_lora import StripLora
from lora_fx.passes.unfold_lora import UnfoldLora

__all__ = [
    "ChooseForm",
    "FoldLora",
    "InjectLora",
    "Pass",
    "PassResult",
    "Pipeline",
    "RaiseLora",
    "StripLora",
    "UnfoldLora",
]
