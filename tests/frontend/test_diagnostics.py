from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx.errors import TraceError
from lora_fx.frontend.diagnostics import explain_failure
from lora_fx.testing import Computes


class Inner(nn.Module):
    def forward(self, x: int) -> float:
        return 1 / x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: int) -> float:
        return self.inner(x)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_the_innermost_module_and_line_are_named(frontend: str) -> None:
    model = Outer()
    with pytest.raises(ZeroDivisionError) as caught:
        model(0)
    message = explain_failure(model, frontend, caught.value)
    assert "Outer cannot be traced" in message
    assert "at inner, " in message
    assert "return 1 / x" in message
    assert "ZeroDivisionError: division by zero" in message
    assert "Try: " in message


def test_an_error_from_nowhere_in_the_model_has_no_place() -> None:
    message = explain_failure(nn.Linear(3, 5), "export", ValueError("no"))
    assert message.startswith("Linear cannot be traced (export):\n")


class Keywords(nn.Module):
    """Takes inputs by any name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return sum(self.layer(value) for value in inputs.values())


@pytest.mark.parametrize("name", ["x.y", "my input", "a-b", "class", "None", "", "1"])
def test_an_input_that_no_code_can_name_is_refused(name: str) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(TraceError, match=re.escape(f"inputs are called {name!r}")):
        lora_fx.trace(Keywords(), (), {name: x, "plain": x})
    plain = lora_fx.trace(Keywords(), (), {"y": x, "plain": x})
    assert torch.equal(plain(y=x, plain=x), Keywords.forward(plain_model(plain), y=x, plain=x))


def plain_model(gm: fx.GraphModule) -> Any:
    """The module with the tensors of a graph."""
    model = Keywords()
    model.load_state_dict(gm.state_dict())
    return model


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", ["torch", "pytree", "fx_pytree"])
def test_an_input_that_hides_what_every_graph_reads_is_refused(name: str, frontend: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def forward(self, {name}): return self.layer({name})", space)
    model = type("Hides", (Keywords,), {"forward": space["forward"]})()
    with pytest.raises(TraceError, match=f"inputs are called '{name}'"):
        lora_fx.trace(model, (torch.ones(2, 3),), frontend=frontend)


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
@pytest.mark.parametrize("name", ["class", 'a"b', "is"])
def test_a_module_that_no_code_can_name_is_refused(name: str, frontend: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 5))
    with pytest.raises(TraceError, match=re.escape(f"the model holds {name}.weight")):
        lora_fx.trace(model, (torch.ones(2, 3),), frontend=frontend)
    odd = nn.Sequential()
    odd.add_module("a-b", nn.Linear(3, 5))
    gm = lora_fx.trace(odd, (torch.ones(2, 3),), frontend=frontend)
    assert torch.equal(gm(torch.ones(2, 3)), odd(torch.ones(2, 3)))


class Held:
    """What torch.export knows no tensors of."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Wrapping(nn.Module):
    def forward(self, x: torch.Tensor) -> Held:
        return Held(x + 1)


class Unwrapping(nn.Module):
    def forward(self, held: Held) -> torch.Tensor:
        return held.x + 1


@pytest.mark.parametrize("model", [Wrapping(), Unwrapping()])
def test_a_type_that_no_graph_takes_or_returns_is_named(model: nn.Module) -> None:
    x = torch.ones(2)
    inputs: Any = x if isinstance(model, Wrapping) else Held(x)
    with pytest.raises(TraceError, match=r"Try: wrap the model .* tensors.* and no Held"):
        lora_fx.trace(model, (inputs,))


@pytest.mark.parametrize("given", [{}, {"use_cache": True}, {"cache": True}])
def test_a_cache_in_the_outputs_or_inputs_names_use_cache(given: dict[str, Any]) -> None:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[1, 5, 3]])
    if "cache" in given:
        given = {"past_key_values": transformers.DynamicCache(config=config)}
    with pytest.raises(
        TraceError, match=r"Try: give use_cache=False .* a DynamicCache is no tensor"
    ):
        lora_fx.trace(model, (), {"input_ids": ids, **given})
    lora_fx.trace(model, (), {"input_ids": ids, "use_cache": False})  # the advice holds


def test_parameters_that_are_spread_over_processes_are_named() -> None:
    """DeepSpeed ZeRO-3 leaves each process parameters of shape [0]."""
    model = nn.Sequential(nn.Linear(3, 5))
    model[0].weight.data = torch.empty(0)
    with pytest.raises(TraceError, match=r"Try: gather the parameters: 0\.weight is empty.*ZeRO-3"):
        lora_fx.trace(model, (torch.ones(2, 3),))


def test_weights_that_hooks_fetch_are_named() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(3, 5)), execution_device="cpu")
    with pytest.raises(TraceError, match=r"hooks of accelerate.*remove_hook_from_submodules"):
        lora_fx.trace(model, (torch.randn(2, 3),))
    accelerate.hooks.remove_hook_from_submodules(model)
    lora_fx.trace(model, (torch.randn(2, 3),))


def test_weights_of_inference_mode_are_named() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(TraceError, match=r"outside of torch\.inference_mode"):
        lora_fx.trace(model, (torch.randn(2, 3),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")  # a FutureWarning since torch 2.14
def test_a_module_of_torchscript_is_named() -> None:
    scripted = torch.jit.trace(nn.Linear(3, 5), torch.randn(2, 3))
    for model, name in ((scripted, "the model"), (nn.Sequential(nn.ReLU(), scripted), "1")):
        with pytest.raises(TraceError, match=f"^{name} is of TorchScript"):
            lora_fx.trace(model, (torch.randn(2, 3),))


class Hangs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.max() > 2 else x


def test_a_choice_by_what_a_tensor_holds_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    said = (
        r"test_diagnostics\.py:\d+: return x \+ 1 if(.|\n)*Try: let no `if` hang on what a tensor"
    )
    with pytest.raises(TraceError, match=said) as refused:
        lora_fx.trace(Hangs(), (torch.randn(3, 2),))
    assert "rope_type" not in str(refused.value)
    assert "def forward" not in capfd.readouterr().err, "torch.export prints the graph so far"


def test_positions_that_are_counted_anew_are_named() -> None:
    model: Any = Hangs()
    model.config = {"rope_parameters": {"rope_type": "dynamic"}}
    with pytest.raises(TraceError, match="rope_type 'dynamic' is 'default' in its config"):
        lora_fx.trace(model, (torch.randn(3, 2),))


class Packs(nn.Module):
    """As Tacotron 2."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        y: torch.Tensor = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]
        return y


def test_a_packed_sequence_is_named() -> None:
    with pytest.raises(TraceError, match="Try: give recurrent layers the padded tensor"):
        lora_fx.trace(Packs().eval(), (torch.randn(2, 4, 3), torch.tensor([4, 2])))


@dataclass
class Scored:
    hidden: torch.Tensor
    score: torch.Tensor


class Scores(nn.Module):
    def forward(self, x: torch.Tensor) -> Scored:
        return Scored(x + 1, x.sum(-1))


def test_a_dataclass_that_torch_was_told_of_is_returned() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(
        TraceError, match=r"may be told to torch .*torch\.export\.register_dataclass"
    ):
        lora_fx.trace(Scores(), (x,))
    torch.export.register_dataclass(Scored)
    found = lora_fx.trace(Scores(), (x,), dynamic_shapes=({0: "batch"},))(x[:1])
    assert isinstance(found, Scored)
    assert torch.equal(found.score, x[:1].sum(-1))


class InBytes(nn.Module):
    """As bitsandbytes keeps a weight: with more to it than a traced tensor has."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.tensor([[3, 1, 2]], dtype=torch.uint8)
        self.weight: Any = nn.Parameter(whole, requires_grad=False)
        self.weight.state = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x @ (self.weight.T * self.weight.state)
        return y


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_is_named() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 5)), {nn.Linear})
    for quantised, where in ((model, r"0\._packed_params"), (nn.Sequential(InBytes()), "0")):
        said = f"before it was quantised.*quantize=: the weights of {where} are packed"
        with pytest.raises(TraceError, match=said):
            lora_fx.trace(quantised, (torch.randn(2, 3),))


class Scaled(torch.Tensor):
    """As torchao keeps a weight: whole numbers and a scale for each row."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor, scale: torch.Tensor) -> Any:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole: torch.Tensor, scale: torch.Tensor) -> None:
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self) -> Any:
        return ["whole", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, _: Any, size: Any, stride: Any) -> Any:
        return cls(inner["whole"], inner["scale"])

    def dequantize(self) -> torch.Tensor:
        return self.whole * self.scale

    @classmethod
    def __torch_function__(cls, f: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if f is torch.nn.functional.linear:
            return f(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(f, _, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, f: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(*(f(inner) for inner in (args[0].whole, args[0].scale)))


def test_a_weight_of_several_tensors_is_named() -> None:
    x, whole = torch.randn(2, 3), torch.tensor([[3, -1, 2], [5, 0, 1]], dtype=torch.int8)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4)).eval()
    layer: Any = model[0]
    layer.weight = nn.Parameter(Scaled(whole, torch.tensor([[0.5], [0.25]])), requires_grad=False)
    expected = model(x)
    said = r"^0\.weight: made of several tensors.*before it was quantised.*weight\.dequantize"
    program = torch.export.export(model, (x,))
    for quantised, given in ((model, (x,)), (program, ())):
        with pytest.raises(TraceError, match=said):
            lora_fx.trace(quantised, given)
    with pytest.raises(TraceError, match=said):
        lora_fx.trace(model, frontend="symbolic")
    layer.weight = nn.Parameter(layer.weight.dequantize())  # as is advised
    assert torch.equal(lora_fx.trace(model, (x,))(x), expected)


class Made(nn.Module):
    """Makes its mask when it is run, and none while it is traced."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones(2, 3)
        return x * mask[:, :1]


def test_an_input_that_is_made_when_the_model_runs_is_asked_for() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TraceError, match="give the inputs that its code has None for"):
        lora_fx.trace(Made(), (x,))
    lora_fx.trace(Made(), (x, torch.ones(2, 3)))


def test_a_lazy_module_that_was_never_called_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.LazyLinear(2)), torch.randn(4, 3)
    with pytest.raises(TraceError, match=r"^1\.weight, 1\.bias: of a lazy module.*call the model"):
        lora_fx.trace(model, (x,))
    model(x)
    lora_fx.trace(model, (x,))


def test_a_sparse_input_is_traced() -> None:
    x = torch.randn(4, 3).relu().to_sparse()
    model = Computes(lambda m, x: m.fc(x.to_dense()), fc=nn.Linear(3, 5))
    assert torch.equal(lora_fx.trace(model, (x,))(x), model(x))


def test_a_free_axis_of_size_one_is_told_as_what_it_is() -> None:
    with pytest.raises(TraceError, match=r"Try: give an example of size 2 or more"):
        lora_fx.trace(nn.Linear(3, 5), (torch.randn(1, 3),), dynamic_shapes=({0: "batch"},))


def test_a_free_axis_that_the_code_loops_over_is_told_as_what_it_is() -> None:
    model = Computes(lambda m, x: sum(m.fc(x[:, i]) for i in range(x.shape[1])), fc=nn.Linear(3, 5))
    x = torch.randn(2, 4, 3)
    with pytest.raises(TraceError, match=r"Try: leave these axes out of dynamic_shapes.*one\. For"):
        lora_fx.trace(model, (x,), dynamic_shapes={"x": {0: "batch", 1: "sequence"}})
    gm = lora_fx.trace(model, (x,), dynamic_shapes={"x": {0: "batch"}})  # as is advised
    assert torch.equal(gm(x[:1]), model(x[:1]))


def test_a_graph_that_holds_the_sizes_of_its_trace_says_so() -> None:
    x = torch.randn(4, 3)
    gm = lora_fx.trace(Computes(lambda self, x: x.reshape(len(x), -1)), (x,))
    with pytest.raises(TraceError, match=r"give dynamic_shapes to lora_fx\.trace, of the model"):
        lora_fx.trace(gm, (x,), dynamic_shapes=({0: "batch"},))


def test_torch_logs_nothing_beside_the_refusal() -> None:
    heard: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(listener)
    try:
        with pytest.raises(TraceError, match="must have same reduction dim"):
            lora_fx.trace(nn.Sequential(nn.Linear(6, 5)), (torch.randn(3, 7),))
        assert heard == []
        logger.error("afterwards")
    finally:
        logger.removeHandler(listener)
    assert heard == ["afterwards"]
