"""What trainers leave beside an adapter's tensors: its name, and weights of the base."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.formats.peft.keys import as_saved, unwrapped
from lora_fx.layers.base_layers import layers_of
from lora_fx.numerics import compare


def small_net() -> nn.Module:
    layers = OrderedDict(emb=nn.Embedding(11, 3), fc=nn.Linear(3, 5), norm=nn.LayerNorm(5))
    return nn.Sequential(OrderedDict(**layers, head=nn.Linear(5, 2))).eval()


IDS = torch.tensor([[1, 4, 7, 10], [0, 2, 9, 3]])
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["fc"]}
CONFIGS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(**LORA),
    "rsLoRA": peft.LoraConfig(**LORA, use_rslora=True),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "lora_bias": peft.LoraConfig(**LORA, lora_bias=True),
    "biases": peft.LoraConfig(**LORA, bias="all"),
    "a head": peft.LoraConfig(**LORA, modules_to_save=["head"]),
    "an embedding": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["emb", "fc"]),
    "tokens": peft.LoraConfig(**LORA, trainable_token_indices={"emb": [2, 7]}),
    "AdaLoRA": peft.AdaLoraConfig(init_r=2, target_r=2, target_modules=["fc"], total_step=9),
    "LoHa": peft.LoHaConfig(r=2, alpha=3, target_modules=["fc"]),
    "IA3": peft.IA3Config(target_modules=["fc"], feedforward_modules=[]),
    "VeRA": peft.VeraConfig(r=2, target_modules=["fc"]),
    "FourierFT": peft.FourierFTConfig(n_frequency=4, target_modules=["fc"]),
}


def trained(config: peft.PeftConfig, net: nn.Module, name: str = "default") -> Any:
    tuned = peft.get_peft_model(copy.deepcopy(net), config, adapter_name=name).eval()
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in (p for p in tuned.parameters() if p.requires_grad):
            value += 0.3 * torch.randn(value.shape, generator=gen)
    return tuned


def held(tuned: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone().contiguous() for k, v in tuned.state_dict().items()}


@functools.cache
def base() -> tuple[nn.Module, fx.GraphModule]:
    """A net and its graph: only read."""
    torch.manual_seed(0)
    net = small_net()
    return net, lora_fx.trace(net, (IDS,))


def output(adapter: lora_fx.Adapter) -> torch.Tensor:
    found: torch.Tensor = lora_fx.inject(base()[1], adapter)(IDS)
    return found


@pytest.mark.parametrize("name", ["default", "french"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_whole_state_dict_is_the_adapter_in_it(kind: str, name: str, tmp_path: Path) -> None:
    net, gm = base()
    torch.manual_seed(0)
    tuned = trained(CONFIGS[kind], net, name)
    want = tuned(IDS).detach()
    tuned.save_pretrained(str(tmp_path))
    directory = tmp_path if name == "default" else tmp_path / name
    expected = lora_fx.load_adapter(directory, base=net)
    state = held(tuned)
    state.pop(f"base_model.model.fc.ranknum.{name}", None)  # a count that AdaLoRA keeps in training
    save_file(state, directory / "adapter_model.safetensors")

    found = lora_fx.load_adapter(directory, base=net)

    assert compare(output(found), want).ok
    assert not compare(gm(IDS), want).ok  # the control
    assert found.updates.keys() == expected.updates.keys()
    assert found.replacements.keys() <= {*expected.replacements, "emb.weight"}


def test_a_state_dict_alone_needs_but_alpha_and_the_base(reads: Any) -> None:
    net = base()[0]
    tuned = trained(peft.LoraConfig(**LORA, use_dora=True, modules_to_save=["head"]), net)
    adapter = reads(held(tuned), base=net, alpha=3)
    assert set(adapter.replacements) == {"head.weight", "head.bias"}
    assert compare(output(adapter), tuned(IDS).detach()).ok
    with pytest.raises(AdapterError, match=r"no known use: .*emb\.weight.*with base= given"):
        reads(held(tuned), alpha=3)


def test_weights_that_training_changed_are_the_adapter_s_too(reads: Any) -> None:
    """PEFT loads whatever the base has a place for; here a norm that somebody thawed."""
    net = base()[0]
    tuned = trained(peft.LoraConfig(**LORA), net)
    with torch.no_grad():
        tuned.base_model.model.norm.weight += 1
    adapter = reads(held(tuned), base=net, alpha=3)
    assert set(adapter.replacements) == {"norm.weight"}
    assert compare(output(adapter), tuned(IDS).detach()).ok


KEYS = ("fc.lora_A.weight", "fc.lora_B.weight")


def known(key: str) -> bool:
    return key in KEYS


def tensors(*keys: str) -> Mapping[str, torch.Tensor]:
    return {key: torch.ones(1) for key in keys}


def test_what_is_named_as_peft_saves_it_is_left_alone() -> None:
    for keys in (KEYS, (*KEYS, "fc.lora_A.default.weight"), ("norm.weight",)):
        assert tuple(as_saved(tensors(*keys), known)) == keys


def test_several_adapters_are_refused_by_their_names() -> None:
    both = tensors("fc.lora_A.french.weight", "fc.lora_B.dutch.weight")
    with pytest.raises(AdapterError, match="the adapters dutch, french, expected one"):
        as_saved(both, known)


def small(kind: str, tied: bool) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 12, "pad_token_id": 0, "tie_word_embeddings": tied}
    if kind == "Phi":  # its head has a bias
        return transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, **more)).eval()
    config = transformers.LlamaConfig(**sizes, **more, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config).eval()


@functools.cache
def grown(kind: str, tied: bool) -> Any:
    """A model before and after tokens were added to its vocabulary, and the graphs: only read."""
    before, ids = small(kind, tied), torch.tensor([[1, 41, 43, 7, 2]])
    after = copy.deepcopy(before)
    after.resize_token_embeddings(44, mean_resizing=False)
    graphs = [
        lora_fx.trace(model, (), {"input_ids": ids.clamp(max=largest), "use_cache": False})
        for model, largest in ((before, 39), (after, 43))
    ]
    return before, after, *graphs, ids


TARGETS = (["q_proj"], ["q_proj", "lm_head"], ["q_proj", "embed_tokens"])


@pytest.mark.filterwarnings("ignore")  # PEFT, of tied weights and embeddings that are targeted
@pytest.mark.parametrize("targets", TARGETS, ids=lambda names: names[-1])
@pytest.mark.parametrize(("kind", "tied"), [("Llama", False), ("Llama", True), ("Phi", False)])
def test_embeddings_of_a_grown_vocabulary_are_the_adapter_s(
    kind: str, tied: bool, targets: list[str], tmp_path: Path
) -> None:
    before, after, low, gm, ids = grown(kind, tied)
    tuned = trained(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets), after)
    with torch.no_grad():  # the rows of the new tokens are only in the adapter's file
        inner = tuned.get_base_model()
        for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()):
            weight = getattr(layer, "base_layer", layer).weight
            weight[40:] = torch.linspace(-1, 1, 4 * 8).reshape(4, 8)
    tuned.save_pretrained(str(tmp_path), save_embedding_layers=True)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(after), str(tmp_path)).eval()
    want = again(input_ids=ids, use_cache=False).logits.detach()

    for given in (after, gm):
        adapter = lora_fx.load_adapter(tmp_path, base=given)
        got = lora_fx.inject(gm, adapter)(input_ids=ids, use_cache=False).logits
        assert compare(got, want).ok
    without = lora_fx.Adapter("b", adapter.updates)
    assert not compare(lora_fx.inject(gm, without)(input_ids=ids, use_cache=False).logits, want).ok

    with pytest.raises(AdapterError, match=r"44.*40.*vocabulary.*resize_token_embeddings\(44\)"):
        lora_fx.inject(low, lora_fx.load_adapter(tmp_path, base=before))


WRAPPED: dict[str, Callable[[str], str]] = {
    "in parallel": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "sharded": lambda key: f"_fsdp_wrapped_module.{key}".replace(
        ".fc.", "._checkpoint_wrapped_module.fc."
    ),
    "in a trainer's module": lambda key: f"net.{key}",
    "by names of the model": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("names", WRAPPED)
def test_what_held_the_model_is_no_part_of_a_name(names: str, tmp_path: Path) -> None:
    net, gm = base()
    tuned = trained(peft.LoraConfig(**LORA, modules_to_save=["head"]), net)
    tuned.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({WRAPPED[names](key): t for key, t in load_file(file).items()}, file)
    for known in (None, net):
        adapter = lora_fx.load_adapter(tmp_path, base=known)
        assert set(adapter.updates) == {"fc"}
        assert set(adapter.replacements) == {"head.weight", "head.bias"}
    assert compare(output(adapter), tuned(IDS).detach()).ok
    assert not compare(gm(IDS), tuned(IDS).detach()).ok  # the control


def test_a_module_that_the_base_is_stays_in_the_names(reads: Any) -> None:
    """Two encoders, one of them wrapped: its own path tells which."""
    torch.manual_seed(0)
    both = nn.ModuleDict({"left": small_net(), "right": small_net()})
    tuned = trained(peft.LoraConfig(**LORA), both["right"])
    lora = {f"right.{key}": tensor for key, tensor in held(tuned).items() if "lora_" in key}
    assert set(reads(lora, base=both, alpha=3).updates) == {"right.fc"}


def test_two_names_of_one_tensor_are_refused() -> None:
    tensors = {f"{start}base_model.model.fc.w": torch.ones(1) for start in ("", "module.")}
    with pytest.raises(AdapterError, match=r"two tensors are base_model\.model\.fc\.w"):
        unwrapped(tensors, layers_of(None))


def test_a_trainer_s_checkpoint_has_one_state_dict(tmp_path: Path) -> None:
    net, path = base()[0], tmp_path / "last.ckpt"
    tuned = trained(peft.LoraConfig(**LORA), net)
    state = {f"model.{key}": tensor for key, tensor in held(tuned).items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}]}, path)
    adapter = lora_fx.load_adapter(path, base=net, alpha=3, allow_pickle=True)
    assert compare(output(adapter), tuned(IDS).detach()).ok


def test_adapters_below_a_directory_are_named(tmp_path: Path) -> None:
    tuned = trained(peft.LoraConfig(**LORA), base()[0], "french")
    tuned.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="as these in it do: french; give one of them"):
        lora_fx.load_adapter(tmp_path)
