"""What the tests of lora_fx are made of, for those who test passes of their own too.

    from lora_fx.testing import Ragged, check_pass

    gm = lora_fx.trace(Ragged().eval(), (torch.randn(4, 7, 3),))
    seen = check_pass(MyPass(), gm)
    assert seen.after == "..."

- passes: `check_pass`, `folds_to`, `operators`
- the judge: `relative`, `distance`, `same_adapter`, `same_bits`, `same_tensors`, `tensors`
- adapters: `make_adapter` of any kind in `UPDATES`, `update_of` one layer; `fits`, `means`
- models: `Ragged`, `Shared`, `Two`, ...; of transformers `tiny` and, traced, `zoo`; of diffusers,
  `lora_fx.testing.pipelines`
- the analysis: `computes`, `reason`, and both from tables, `check_case`, `check_reason`
- other programs: `Lab`, `config_in`, `PEFT_CASES`, `PEFT_TYPES`, `by_peft`, `by_lycoris`
- files of ONNX: `Sample`, `Exported`; a base in a few bits: `save_bitsandbytes`

Plain asserts: ``pytest.register_assert_rewrite("lora_fx.testing")`` in a conftest.py, before it is
imported, makes them explain themselves. transformers, PEFT, LyCORIS and onnx are loaded by what
needs them, when it is called.
"""

from lora_fx.testing.adapters import fits, make_adapter, means, recorded_graph
from lora_fx.testing.affine import (
    INPUTS,
    Holds,
    analyse_function,
    check_case,
    check_reason,
    computes,
    reason,
)
from lora_fx.testing.bitsandbytes import save_bitsandbytes
from lora_fx.testing.exports import Exported, Sample, sample_of, traced
from lora_fx.testing.foreign import Foreign, by_lycoris, by_peft
from lora_fx.testing.judge import distance, relative, same_adapter, same_bits, same_tensors, tensors
from lora_fx.testing.models import (
    Attention,
    Between,
    Blocks,
    Computes,
    Experts,
    Notebook,
    Outputs,
    Ragged,
    Shared,
    Tied,
    Two,
)
from lora_fx.testing.passes import Checked, check_pass, folds_to, operators
from lora_fx.testing.peft_cases import PEFT_CASES, SavedCase, save_peft_case
from lora_fx.testing.peft_files import Lab, config_in
from lora_fx.testing.peft_types import PEFT_TYPES
from lora_fx.testing.updates import UPDATES, LayerShape, read_kind, update_of
from lora_fx.testing.zoo import ZOO, Case, tiny, zoo

__all__ = [
    "INPUTS",
    "PEFT_CASES",
    "PEFT_TYPES",
    "UPDATES",
    "ZOO",
    "Attention",
    "Between",
    "Blocks",
    "Case",
    "Checked",
    "Computes",
    "Experts",
    "Exported",
    "Foreign",
    "Holds",
    "Lab",
    "LayerShape",
    "Notebook",
    "Outputs",
    "Ragged",
    "Sample",
    "SavedCase",
    "Shared",
    "Tied",
    "Two",
    "analyse_function",
    "by_lycoris",
    "by_peft",
    "check_case",
    "check_pass",
    "check_reason",
    "computes",
    "config_in",
    "distance",
    "fits",
    "folds_to",
    "make_adapter",
    "means",
    "operators",
    "read_kind",
    "reason",
    "recorded_graph",
    "relative",
    "same_adapter",
    "same_bits",
    "same_tensors",
    "sample_of",
    "save_bitsandbytes",
    "save_peft_case",
    "tensors",
    "tiny",
    "traced",
    "update_of",
    "zoo",
]
