"""The passes: callables from a graph to a new graph and a report of edits.

Who writes one takes from here what it is made of:

- `Pass`, to derive from; `Pipeline` and `PassResult`
- `Editor`, which alone changes a graph, and `Edit`, what it has noted
- reading nodes: `op_name`, `call_argument`, `module_path`; `sites`, each a `Site`: the layers
"""

from lora_fx.choices import takes
from lora_fx.errors import PassError
from lora_fx.graph import ops
from lora_fx.graph.editor import Edit, Editor
from lora_fx.graph.pass_base import Pass, PassResult, Pipeline
from lora_fx.layers.sites import Site, sites
from lora_fx.passes.choose_form import ChooseForm
from lora_fx.passes.fold_lora import FoldLora
from lora_fx.passes.inject_lora import InjectLora
from lora_fx.passes.raise_lora import RaiseLora
from lora_fx.passes.strip_lora import StripLora
from lora_fx.passes.unfold_lora import UnfoldLora

# They are called for every node: only here do they say what was wrong with what they got.
call_argument = takes(PassError)(ops.call_argument)
module_path = takes(PassError)(ops.module_path)
op_name = takes(PassError)(ops.op_name)

__all__ = [
    "ChooseForm",
    "Edit",
    "Editor",
    "FoldLora",
    "InjectLora",
    "Pass",
    "PassResult",
    "Pipeline",
    "RaiseLora",
    "Site",
    "StripLora",
    "UnfoldLora",
    "call_argument",
    "module_path",
    "op_name",
    "sites",
]
