"""What is fed to models of transformers: derived from signatures and configs, and it runs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch

import lora_fx
from lora_fx.cli.model_source import find_model
from lora_fx.errors import LoraFxError
from lora_fx.tasks.example_inputs import example_inputs, with_parts
from lora_fx.testing import relative

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = SMALL | {"vocab_size": 60}
IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
PAIR = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "vocab_size": 60,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
WAVE = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH = {
    "text_config": TEXT | {"max_position_embeddings": 20} | SPECIAL,
    "vision_config": IMAGE,
    "projection_dim": 8,
}
WORDS, MASK, TYPES, BOXES = "input_ids", "attention_mask", "token_type_ids", "bbox"
ANSWER, PIXELS, SOUND, SPECTRUM = (
    "decoder_input_ids",
    "pixel_values",
    "input_values",
    "input_features",
)

# class: (fields of the config, what is fed: the shape of each)
FED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "BertModel": (TEXT, {WORDS: (2, 16), MASK: (2, 16), TYPES: (2, 16)}),
    "RobertaModel": (TEXT | {"type_vocab_size": 1}, {WORDS: (2, 16), MASK: (2, 16)}),
    "DistilBertModel": (
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 60},
        {WORDS: (2, 16), MASK: (2, 16)},
    ),
    "Glm4Model": (  # whose padding is a word behind all positions, not one that they begin at
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
        | {"num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 60}
        | {"max_position_embeddings": 40, "pad_token_id": 50},
        {WORDS: (2, 16), MASK: (2, 16)},
    ),
    "FNetModel": (TEXT, {WORDS: (2, 16), TYPES: (2, 16)}),
    "GPT2Model": (
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "n_positions": 20} | SPECIAL,
        {WORDS: (2, 9), MASK: (2, 9)},
    ),
    "BartModel": (PAIR, {WORDS: (2, 16), MASK: (2, 16), ANSWER: (2, 8)}),
    "BartForSequenceClassification": (PAIR, {WORDS: (2, 16), MASK: (2, 16)}),
    "T5EncoderModel": (
        {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 60},
        {WORDS: (2, 16), MASK: (2, 16)},
    ),
    "LayoutLMModel": (
        TEXT | {"max_2d_position_embeddings": 100},
        {WORDS: (2, 16), BOXES: (2, 16, 4), MASK: (2, 16), TYPES: (2, 16)},
    ),
    "CLIPModel": (BOTH, {WORDS: (2, 9), PIXELS: (2, 3, 16, 16), MASK: (2, 9)}),
    "ViTModel": (IMAGE, {PIXELS: (2, 3, 16, 16)}),
    "VideoMAEModel": (IMAGE | {"num_frames": 2}, {PIXELS: (2, 2, 3, 16, 16)}),
    "WhisperModel": (
        PAIR | SPECIAL | {"num_mel_bins": 8, "max_source_positions": 20},
        {SPECTRUM: (2, 8, 40), ANSWER: (2, 8)},
    ),
    "HubertModel": (SMALL | WAVE, {SOUND: (2, 480)}),
    "ASTModel": (
        SMALL | {"num_mel_bins": 16, "max_length": 32, "patch_size": 8},
        {SOUND: (2, 32, 16)},
    ),
    "MoonshineModel": (
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 2,
            "vocab_size": 60,
            "decoder_num_attention_heads": 2,
        },
        {SOUND: (2, 48 * 64 * 3 * 2), ANSWER: (2, 8)},  # the strides are the model's own
    ),
    "Speech2TextModel": (
        PAIR | {"input_feat_per_channel": 8, "conv_channels": 8},
        {SPECTRUM: (2, 48, 8), ANSWER: (2, 8)},
    ),
}


@functools.cache
def model_of(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**FED[name][0])).eval()
    model.config.use_cache = False
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)  # transformers' own are so small that nothing tells
    return model


@pytest.mark.parametrize("name", FED)
def test_a_model_is_fed_what_it_takes(name: str) -> None:
    model = model_of(name)
    inputs, axes = example_inputs(model)
    assert {key: tuple(value.shape) for key, value in inputs.items()} == FED[name][1]
    assert axes.keys() == inputs.keys()
    with torch.no_grad():
        assert model(**inputs)[0].isfinite().all()


@pytest.mark.parametrize("name", ["BertModel", "LayoutLMModel", "FNetModel", "RobertaModel"])
def test_every_input_tells(name: str) -> None:
    """A graph that left one out, or took its default, would be found out."""
    model = model_of(name)
    inputs, _ = example_inputs(model)
    optional = {key for key in inputs if key != model.main_input_name}
    with torch.no_grad():
        whole = model(**inputs)[0]
        for key in optional:
            less = model(**{k: value for k, value in inputs.items() if k != key})[0]
            assert (less - whole).norm() > 1e-3 * whole.norm(), key


def test_axes_have_names() -> None:
    text = {0: "batch", 1: "sequence"}
    assert example_inputs(model_of("BertModel"))[1] == dict.fromkeys((WORDS, MASK, TYPES), text)
    assert example_inputs(model_of("BartModel"))[1][ANSWER] == {
        0: "batch",
        1: "decoder_sequence",
    }
    assert example_inputs(model_of("CLIPModel"))[1][PIXELS] == {0: "image_batch"}
    assert example_inputs(model_of("ViTModel"))[1] == {PIXELS: {0: "batch"}}
    assert example_inputs(model_of("HubertModel"))[1] == {SOUND: {0: "batch", 1: "samples"}}


def test_text_ends_and_is_padded_and_holds_no_other_special_token() -> None:
    inputs, _ = example_inputs(model_of("GPT2Model"))
    ids, mask = inputs[WORDS], inputs[MASK]
    assert mask.sum(1).tolist() == [9, 6]
    assert ids[0, 8] == ids[1, 5] == SPECIAL["eos_token_id"]
    assert set(ids[1, 6:].tolist()) == {SPECIAL["pad_token_id"]}
    assert int(torch.cat([ids[0, :8], ids[1, :5]]).min()) > max(SPECIAL.values())


def test_what_the_tokenizer_names_is_fed_where_the_config_is_silent() -> None:
    import transformers

    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=60)
    model = transformers.XLNetModel(config)
    assert TYPES not in example_inputs(model)[0]
    assert TYPES in example_inputs(model, [TYPES, "no_input_of_the_model"])[0]


def test_an_image_takes_its_size_from_its_preparation() -> None:
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    model = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()
    for said in ({"crop_size": {"height": 32, "width": 48}}, {"size": [32, 48]}):
        assert example_inputs(model, (), said)[0][PIXELS].shape == (2, 3, 32, 48)
    assert example_inputs(model, (), {"size": {"shortest_edge": 40}})[0][PIXELS].shape[2:] == (
        40,
        40,
    )
    with pytest.raises(LoraFxError, match=r"made for a resnet: its pixel_values .*module:function"):
        example_inputs(model)


def test_what_cannot_be_made_is_refused_by_name() -> None:
    import transformers

    series = transformers.TimeSeriesTransformerConfig(prediction_length=4, d_model=8)
    with pytest.raises(LoraFxError, match=r"^no example inputs .* time_series_.*past_values"):
        example_inputs(transformers.TimeSeriesTransformerModel(series))
    letters = transformers.CanineConfig(**SMALL, num_hash_buckets=8, num_hash_functions=2)
    with pytest.raises(LoraFxError, match="made for a canine: its input_ids"):  # has no vocabulary
        example_inputs(transformers.CanineModel(letters))
    parts = {"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **IMAGE}
    both = transformers.LlavaConfig(text_config=parts[0], vision_config=parts[1], image_token_id=5)
    with pytest.raises(LoraFxError, match="made for a llava: its text is what its processor makes"):
        example_inputs(transformers.LlavaForConditionalGeneration(both))


def test_a_config_inside_a_config_inside_a_config_is_read() -> None:
    import transformers

    text = {"model_type": "gemma", **TEXT, "head_dim": 8, "num_key_value_heads": 2}
    vision = {"model_type": "siglip_vision_model", **IMAGE}
    both = {"model_type": "paligemma", "text_config": text, "vision_config": vision}
    config = transformers.ColPaliConfig(vlm_config=both | {"image_token_id": 5})
    assert any(part is config.vlm_config.text_config for part in with_parts(config))
    with pytest.raises(LoraFxError, match="made for a colpali: its text is what its processor"):
        example_inputs(transformers.ColPaliForRetrieval(config))
    config.vlm_config.parent = config  # none is read twice
    assert len(with_parts(config)) == 4


@pytest.mark.parametrize("name", ["BertModel", "CLIPModel", "HubertModel"])
def test_a_directory_becomes_a_verified_file(name: str, tmp_path: Path) -> None:
    """Run on inputs of other sizes too, beside the model itself."""
    model_of(name).save_pretrained(tmp_path / "model")
    source = find_model(str(tmp_path / "model"))
    gm = lora_fx.trace(source.model, (), source.kwargs, dynamic_shapes=source.dynamic_shapes)
    assert lora_fx.to_onnx(gm, tmp_path / "model.onnx").verified
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    assert [value.name for value in session.get_inputs()] == list(FED[name][1])
    feed = {key: torch.cat([value, value.flip(0)])[:3] for key, value in source.kwargs.items()}
    found = session.run(None, {key: value.numpy() for key, value in feed.items()})[0]
    with torch.no_grad():
        expected = model_of(name)(**feed)[0].numpy()
        for key in set(feed) & {TYPES}:
            without = model_of(name)(**{k: v for k, v in feed.items() if k != key})[0].numpy()
            assert relative(torch.tensor(without), torch.tensor(found)) > 1e-2
    assert relative(torch.tensor(found), torch.tensor(expected)) <= 1e-5
