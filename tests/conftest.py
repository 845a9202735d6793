"""Models, and the one harness that every pass test goes through."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import fx, nn
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx import Adapter, Update, compare, text
from lora_fx.ops import op_name
from lora_fx.pass_base import PassResult
from lora_fx.passes import FoldLora

torch.set_num_threads(1)
# The same examples in every run: a change is judged by what it changed.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of any structure of outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def error(actual: Any, expected: Any) -> float:
    """The largest relative error over all outputs."""
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return max(compare(one, other).relative for one, other in pairs)


class Ragged(nn.Module):
    """3 -> 5 -> 7 with a bias and without, a layer called twice, and something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 5)
        self.again = nn.Linear(5, 5, bias=False)
        self.drop = nn.Dropout(0.5)
        self.narrow = nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.wide(x))
        x = torch.tanh(self.again(x))
        x = torch.sigmoid(self.again(x))
        return self.narrow(self.drop(x))


class Shared(nn.Module):
    """One module under two names, a function on another's weight, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 5)
        self.two = self.one
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = F.relu(self.one(x)) - F.relu(self.two(2 * x))
        return {"out": F.linear(hidden, self.weight), "tied": F.linear(x, self.one.weight)}


@pytest.fixture
def ragged() -> Ragged:
    torch.manual_seed(0)
    return Ragged().eval()


@pytest.fixture
def shared() -> Shared:
    torch.manual_seed(0)
    return Shared().eval()


@pytest.fixture
def x() -> torch.Tensor:
    """A batch (4, 7) of 3 features."""
    return torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))


def random_adapter(
    shapes: dict[str, tuple[int, int]], rank: int = 2, scale: float = 1.5, name: str = "french"
) -> Adapter:
    """An adapter with effect: (out, in) by path."""
    make = torch.Generator().manual_seed(rank)
    updates = {
        path: Update(
            torch.randn(rank, into, generator=make), torch.randn(out, rank, generator=make), scale
        )
        for path, (out, into) in shapes.items()
    }
    return Adapter(name, updates)


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    return random_adapter


@pytest.fixture
def relative() -> Callable[[Any, Any], float]:
    return error


def count_operators(gm: fx.GraphModule) -> Counter[str]:
    """How often a graph calls each operator."""
    return Counter(op_name(n) for n in gm.graph.nodes if n.op == "call_function")


@pytest.fixture
def operators() -> Callable[[fx.GraphModule], Counter[str]]:
    return count_operators


@pytest.fixture
def folds_to() -> Callable[[fx.GraphModule, fx.GraphModule], fx.GraphModule]:
    """Asserts that a graph folds to the base's operators, for good, and comes back."""

    def check(gm: fx.GraphModule, base: fx.GraphModule) -> fx.GraphModule:
        folded = lora_fx.fold(gm)
        found, wanted = count_operators(folded), count_operators(base)
        extra, lost = found - wanted, wanted - found
        assert (extra, lost) == (Counter(), Counter()), f"extra {dict(extra)}, lost {dict(lost)}"
        assert FoldLora()(folded).modified is False
        assert text(lora_fx.unfold(folded)) == text(gm)
        return folded

    return check


@dataclass
class Checked:
    """What `check_pass` saw, for further assertions."""

    result: PassResult
    before: str
    after: str
    gm: fx.GraphModule = field(init=False)

    def __post_init__(self) -> None:
        self.gm = self.result.graph_module


@pytest.fixture
def check_pass() -> Callable[..., Checked]:
    """Runs a pass and asserts what holds for every pass.

    The input graph and all its tensors stay bitwise as they were, `modified` says whether the
    text changed, `expected` agrees with the new graph's outputs by the tolerance table and
    `control`, which lacks what the pass is about, does not.
    """

    def check(
        step: Callable[[fx.GraphModule], PassResult],
        gm: fx.GraphModule,
        *inputs: Any,
        expected: Any = None,
        control: Any = None,
    ) -> Checked:
        before, values = text(gm), {k: v.clone() for k, v in gm.state_dict().items()}
        addresses = {k: v.data_ptr() for k, v in gm.state_dict().items()}
        result = step(gm)
        assert text(gm) == before
        now = gm.state_dict()
        assert all(torch.equal(now[k], value) for k, value in values.items())
        assert {k: v.data_ptr() for k, v in now.items()} == addresses
        after = text(result.graph_module)
        assert result.modified == (after != before)
        if expected is not None:
            outputs = result.graph_module(*inputs)
            assert error(outputs, expected) <= 1e-5
            assert control is None or error(outputs, control) > 1e-2
        return Checked(result, before, after)

    return check


# Real architectures with random weights.

_SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
_TEXT = {"vocab_size": 97, "max_position_embeddings": 32}
_WRITER = {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES: dict[str, dict[str, Any]] = {
    "bert": _SMALL | _TEXT,
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": 40, "n_positions": 32}
    | {"vocab_size": 97, **_WRITER},
    "llama": _SMALL | _GROUPED | _TEXT | _WRITER,
    "qwen2": _SMALL | _GROUPED | _TEXT | _WRITER,
    "t5": {"d_model": 24, "d_kv": 6, "num_heads": 4, "num_layers": 2, "d_ff": 40}
    | {"vocab_size": 97, "use_cache": False, "decoder_start_token_id": 0},
    "vit": _SMALL | {"image_size": 16, "patch_size": 4},
}


def tiny_model(architecture: str, **changes: Any) -> Any:
    """A model of transformers, by the name of its class, with random weights and small sizes."""
    import transformers

    cls = getattr(transformers, architecture)
    return cls(cls.config_class(**{**_SIZES[cls.config_class.model_type], **changes}))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    return tiny_model


@dataclass(frozen=True)
class Case:
    """A model with inputs of two shapes and the layers to adapt."""

    model: nn.Module
    inputs: dict[str, Any]
    others: dict[str, Any]
    dynamic: dict[str, Any]
    targets: list[str]
    head: str


def _text_case(model: nn.Module, targets: list[str], head: str, decoder: bool = False) -> Case:
    make = torch.Generator().manual_seed(5)
    ids, longer = (torch.randint(3, 97, s, generator=make) for s in ((2, 7), (3, 11)))
    axes = {0: "batch", 1: "sequence"}
    if decoder:
        inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        others = {"input_ids": longer, "decoder_input_ids": longer[:, :6]}
        dynamic = {"input_ids": axes, "decoder_input_ids": {0: "batch", 1: "target"}}
        return Case(model, inputs, others, dynamic, targets, head)
    masks = [torch.ones_like(ids), torch.ones_like(longer)]
    masks[1][0, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": masks[0]}
    others = {"input_ids": longer, "attention_mask": masks[1]}
    return Case(model, inputs, others, dict.fromkeys(inputs, axes), targets, head)


def _bert() -> Case:
    return _text_case(tiny_model("BertModel"), ["query", "value", "dense"], "pooler")


def _llama() -> Case:
    model = tiny_model("LlamaForCausalLM", attention_bias=True)
    return _text_case(model, ["q_proj", "k_proj", "down_proj"], "lm_head")


def _qwen2() -> Case:
    model = tiny_model("Qwen2ForCausalLM", tie_word_embeddings=True)
    return _text_case(model, ["q_proj", "v_proj", "up_proj"], "norm")


def _gpt2() -> Case:
    return _text_case(tiny_model("GPT2LMHeadModel"), ["c_attn", "c_fc", "mlp.c_proj"], "ln_f")


def _t5() -> Case:
    model = tiny_model("T5ForConditionalGeneration")
    return _text_case(model, ["q", "v", "wo"], "lm_head", decoder=True)


def _vit() -> Case:
    make = torch.Generator().manual_seed(5)
    one, other = (torch.randn(n, 3, 16, 16, generator=make) for n in (2, 3))
    targets = ["q_proj", "v_proj", "fc1", "fc2"]
    inputs, others, axes = {"pixel_values": one}, {"pixel_values": other}, {0: "batch"}
    return Case(tiny_model("ViTModel"), inputs, others, {"pixel_values": axes}, targets, "pooler")


def _mlp() -> Case:
    torch.manual_seed(0)
    make = torch.Generator().manual_seed(5)
    one, other = (torch.randn(*s, 3, generator=make) for s in ((4, 7), (2, 9)))
    axes = {"x": {0: "batch", 1: "length"}}
    return Case(Ragged(), {"x": one}, {"x": other}, axes, ["wide", "again", "narrow"], "narrow")


ZOO = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "mlp": _mlp,
    "qwen2": _qwen2,
    "t5": _t5,
    "vit": _vit,
}
_traced: dict[str, tuple[Case, fx.GraphModule]] = {}


def traced(name: str) -> tuple[Case, fx.GraphModule]:
    """A case and its graph, traced once for all tests; the model is a fresh copy."""
    if name not in _traced:
        torch.manual_seed(7)
        case = ZOO[name]()
        case.model.eval()
        gm = lora_fx.trace(case.model, (), case.inputs, dynamic_shapes=case.dynamic)
        _traced[name] = case, gm
    case, gm = _traced[name]
    fields = {**vars(case), "model": copy.deepcopy(case.model)}
    return Case(**fields), gm


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], tuple[Case, fx.GraphModule]]:
    return traced
