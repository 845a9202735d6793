"""Pipelines of diffusers: a file a component, adapters shared out, what stands beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fx import Session, load_adapter, save_adapter
from lora_fx.cli.commands import export_model, verify_model
from lora_fx.cli.parts import Parts
from lora_fx.errors import AdapterError, LoraFxError
from lora_fx.testing import relative
from lora_fx.testing.pipelines import save_diffusers_adapter, tiny_pipeline, tiny_unet

COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
IDS = torch.tensor([[0, 5, 9, 1], [0, 7, 1, 1]])
MOMENT = {
    "sample": torch.randn(2, 4, 10, 6, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor(611.0),
    "encoder_hidden_states": torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2)),
}


def export(spec: Path, adapters: list[Path], out: Path, mode: str = "merged", **more: Any) -> Any:
    report = export_model(str(spec), adapters, mode, out, False, lambda _: None, **more)
    assert report.verified
    return report


@pytest.fixture(scope="module")
def home(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and two adapters of diffusers', one of the UNet alone."""
    home = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(home / "base")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(home / "base")
    both = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    save_diffusers_adapter(home / "french", **both)
    save_diffusers_adapter(home / "legal", seed=1, unet=pipe.unet)
    return home


@pytest.fixture(scope="module")
def swappable(home: Path) -> Path:
    adapters = [home / "french", home / "legal"]
    report = export(home / "base", adapters, home / "swappable", "swappable")
    assert isinstance(report, Parts)
    return home / "swappable"


def loaded_by_diffusers(home: Path, adapter: str) -> Any:
    unet = diffusers.UNet2DConditionModel.from_pretrained(home / "base" / "unet").eval()
    weights = home / adapter / "pytorch_lora_weights.safetensors"
    unet.load_lora_adapter(load_file(weights), prefix="unet", **metadata_of(weights))
    return unet


def metadata_of(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
    return {"metadata": {k: v for k, v in fields.items() if k.startswith("unet.")}}


def test_the_files_are_those_that_optimum_loads(swappable: Path) -> None:
    wanted = {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
    }
    for component in COMPONENTS:
        session = Session(swappable / component / "model.onnx", threads=1)
        assert (session.inputs, session.outputs) == wanted[component], component
    told = json.loads((swappable / "report.json").read_text())
    assert [part["task"] for part in told["parts"]] == list(COMPONENTS)
    modes = {part["task"]: part["mode"] for part in told["parts"]}
    assert modes == dict(
        zip(COMPONENTS, ("swappable", "swappable", "merged", "merged"), strict=True)
    )


def test_all_else_is_copied_as_it_is(home: Path, swappable: Path) -> None:
    kept = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    kept += ["text_encoder/config.json", *(f"tokenizer/{n}" for n in ("vocab.json", "merges.txt"))]
    for name in kept:
        assert (swappable / name).read_bytes() == (home / "base" / name).read_bytes(), name
    for half in ("vae_encoder", "vae_decoder"):
        config = swappable / half / "config.json"
        assert config.read_bytes() == (home / "base" / "vae" / "config.json").read_bytes()
    assert not list(swappable.rglob("*.safetensors"))
    assert not (swappable / "vae").exists()


@pytest.mark.parametrize("adapter", [None, "french", "legal"])
def test_an_adapter_is_what_diffusers_loader_makes_of_it(
    home: Path, swappable: Path, adapter: str | None
) -> None:
    base = diffusers.UNet2DConditionModel.from_pretrained(home / "base" / "unet").eval()
    model = base if adapter is None else loaded_by_diffusers(home, adapter)
    file = None if adapter is None else swappable / f"{adapter}.unet.onnx_adapter"
    found = Session(swappable / "unet" / "model.onnx", threads=1).run(MOMENT, file)["out_sample"]
    with torch.no_grad():
        assert relative(torch.tensor(found), model(**MOMENT).sample) <= 1e-5
        if adapter is not None:
            assert relative(torch.tensor(found), base(**MOMENT).sample) > 1e-2


def test_an_adapter_is_shared_out_among_the_components(home: Path, swappable: Path) -> None:
    assert not (swappable / "legal.text_encoder.onnx_adapter").exists()  # it has nothing for it
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(home / "base")
    text = pipe.text_encoder.eval()
    tuned = save_diffusers_adapter(
        home / "again", unet=pipe.unet, text_encoder=text
    )["text_encoder"]  # fmt: skip
    session = Session(swappable / "text_encoder" / "model.onnx", threads=1)
    for model, file in ((text, None), (tuned, swappable / "french.text_encoder.onnx_adapter")):
        found = session.run({"input_ids": IDS}, file)
        with torch.no_grad():
            wanted = model(IDS)
        assert relative(torch.tensor(found["pooler_output"]), wanted.pooler_output) <= 1e-5
    assert relative(torch.tensor(found["pooler_output"]), text(IDS).pooler_output.detach()) > 1e-2


def test_one_component_of_a_pipeline_is_as_its_directory_alone(home: Path, tmp_path: Path) -> None:
    """By kohya's names, which want the whole pipeline, and by diffusers'."""
    base, french = home / "base", load_adapter(home / "french")
    kohya, flat = tmp_path / "kohya.safetensors", tmp_path / "flat.safetensors"
    save_adapter(french, kohya, format="kohya")
    unwrapped = {path.replace("text_model.", ""): u for path, u in french.updates.items()}
    assert unwrapped != dict(french.updates)  # as diffusers writes it since transformers 5
    save_adapter(type(french)("flat", unwrapped), flat, format="diffusers")
    part = export(base, [kohya], tmp_path / "a", given=given(component="unet"))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "model.onnx", "report.json", "config.json"
    }  # fmt: skip
    assert part.coverage[0].layers == sum(path.startswith("unet.") for path in french.updates)
    alone = export(base / "unet", [home / "legal"], tmp_path / "b", given=given(component="unet"))
    assert (alone.task, alone.inputs) == (part.task, part.inputs) == ("unet", list(MOMENT))
    for out, adapter in ((tmp_path / "a", "french"), (tmp_path / "b", "legal")):
        found = Session(out / "model.onnx", threads=1).run(MOMENT)["out_sample"]
        with torch.no_grad():
            wanted = loaded_by_diffusers(home, adapter)(**MOMENT).sample
        assert relative(torch.tensor(found), wanted) <= 1e-5
    (base / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "unet")
    text = [  # of the others it reads what their layers are called, and no values
        export(base, [file], tmp_path / file.stem, given=given(component="text_encoder"))
        for file in (kohya, flat)
    ]
    assert text[0].coverage[0].used == text[0].coverage[0].tensors > 0
    assert text[0].coverage[0].off == pytest.approx(text[1].coverage[0].off, rel=1e-6)
    decoder = export(base, [], tmp_path / "d", given=given(component="vae_decoder"))
    assert (decoder.task, decoder.inputs) == ("vae_decoder", ["latent_sample"])
    file = tmp_path / kohya.stem / "model.onnx"
    assert verify_model(file, str(base), [kohya], lambda _: None).verified  # it notes which it is
    (tmp_path / "unet").rename(base / "unet" / "diffusion_pytorch_model.safetensors")


def given(**fields: Any) -> Any:
    from lora_fx.cli.adapter_options import AdapterOptions

    return AdapterOptions(**fields)


def test_a_file_is_verified_without_tracing_the_others(home: Path, swappable: Path) -> None:
    told: list[str] = []
    file = swappable / "text_encoder" / "model.onnx"
    report = verify_model(file, str(home / "base"), [home / "french"], told.append)
    assert report.verified
    assert told.count("trace") == 1
    with pytest.raises(LoraFxError, match=r"has inputs input_ids; the model .* has latent_sample"):
        verify_model(file, str(home / "base"), [], told.append, given(component="vae_decoder"))


def test_what_is_of_no_component_is_refused(home: Path, tmp_path: Path) -> None:
    french = load_adapter(home / "french")
    updates = {path.partition(".")[2]: u for path, u in french.updates.items() if "unet" in path}
    save_adapter(type(french)("bare", updates), tmp_path / "bare")
    odd = next(iter(updates.values()))
    save_adapter(type(french)("odd", {"nowhere.fc": odd}), tmp_path / "odd")
    base = str(home / "base")

    def refused(adapter: Path, **more: Any) -> None:
        export_model(base, [adapter], "merged", tmp_path / "o", False, lambda _: None, **more)

    with pytest.raises(AdapterError, match=r"\(nowhere\.fc\) are of no component .*--component"):
        refused(tmp_path / "odd")
    with pytest.raises(AdapterError, match="legal: has nothing for text_encoder, which alone"):
        refused(home / "legal", given=given(component="text_encoder"))
    with pytest.raises(LoraFxError, match=r"has no scheduler to export; .*: text_encoder, unet"):
        refused(home / "legal", given=given(component="scheduler"))
    with pytest.raises(
        LoraFxError, match="--task and --last-logits are for models of transformers"
    ):
        refused(home / "legal", task="text-generation")
    assert not (tmp_path / "o").exists()
    plan = export_model(
        base, [tmp_path / "bare"], "merged", tmp_path / "o", False, lambda _: None, dry_run=True
    ).to_dict()
    taken = {part["task"]: len(part["adapters"].get("bare", [])) for part in plan["parts"]}
    assert taken == {"text_encoder": 0, "unet": len(updates), "vae_encoder": 0, "vae_decoder": 0}


def test_a_directory_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    file, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name != "conv_in.weight"}, file)

    def refused(message: str) -> None:
        with pytest.raises(LoraFxError, match=message):
            export_model(str(tmp_path), [], "merged", tmp_path / "o", False, lambda _: None)

    refused(r"holds no weights.* for unet\.conv_in\.weight")
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"_class_name": "UNetOfNobody"}))
    refused("the class 'UNetOfNobody', which is no model of diffusers")
    config.write_text(json.dumps(fields | {"addition_embed_type": "image"}))
    refused("diffusers cannot load it|added_cond_kwargs for addition_embed_type 'image'")
