"""The base graph beside the fastest files of other exporters: optimum's, and genai's builder's.

Both are made by packages of their own (`make test-clients` installs them), in a process of theirs.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

import lora_fx
from benchmarks.files import Active, Arrays, adapter_for, agree, caller, session, write
from benchmarks.merge import SHAPE
from benchmarks.models import RANK, encoder
from benchmarks.timing import Run, Spread, columns, medians
from lora_fx.choices import Mode
from lora_fx.cli.commands import export_model
from lora_fx.demo.encoder import load_encoder, load_extra
from lora_fx.export import export_adapter, quantize_onnx
from lora_fx.export.onnx_model.model_file import load_proto, manifest_in
from lora_fx.export.runtime.active_adapter import ActiveAdapter, activated

Rows = dict[str, dict[str, float]]
CLIENTS = Path(__file__).parent.parent / ".venv" / "clients"
SIZES = ((1, 16), (1, 128), (8, 128))
STEPS = 128  # tokens of a prompt, and tokens decoded behind it
_HEAD_SIZE = 64  # in all decoders here
_SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
}
_SIZES = {"6 layers": _SMALL, "0.5B": {**SHAPE, "num_hidden_layers": 24}}

_OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTOptimizer
from optimum.onnxruntime.configuration import AutoOptimizationConfig
source, out = sys.argv[1:]
main_export(source, f"{out}/O0", task="feature-extraction", do_validation=False)
optimizer = ORTOptimizer.from_pretrained(ORTModelForFeatureExtraction.from_pretrained(f"{out}/O0"))
for level in ("O1", "O2", "O3"):
    config = getattr(AutoOptimizationConfig, level)()
    optimizer.optimize(save_dir=f"{out}/{level}", optimization_config=config, file_suffix="")
"""


def _clients(packages: Path, *command: str) -> None:
    """Runs Python with packages of others in front of ours."""
    env = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def encoders(directory: Path, rounds: int) -> Rows:
    """MiniLM with an adapter of rank 8 on all linear layers, over optimum's file with W'."""
    gm = encoder()
    adapter = adapter_for(gm, RANK)
    for form in ("merged", "swappable"):
        write(gm, adapter, form, directory / f"{form}.onnx")
    _save_merged(load_encoder(load_extra()), adapter, directory / "merged")
    _clients(CLIENTS, "-c", _OPTIMUM, str(directory / "merged"), str(directory))
    paths = {form: directory / f"{form}.onnx" for form in ("merged", "swappable")}
    paths |= {level: directory / level / "model.onnx" for level in ("O0", "O1", "O2", "O3")}
    active = Active(adapter, paths["swappable"], directory / "a.onnx_adapter")
    rows = {}
    for batch, length in SIZES:
        ids = np.random.default_rng(0).integers(1000, 4000, (batch, length))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds["token_type_ids"] = np.zeros_like(ids)
        opened = partial(_encoders, paths, feeds, active)
        runs = opened()
        agree({name: lambda run=runs[name]: run()[:1] for name in ("merged", "swappable", "O0")})  # type: ignore[misc]
        calls = max(1, 256 // (batch * length))
        rows[f"MiniLM, {batch} x {length}"] = _over_the_fastest(opened, rounds // 2, calls)
    return rows


def _encoders(paths: dict[str, Path], feeds: Arrays, active: Active) -> dict[str, Run]:
    """A call of each file, opened anew."""
    runs = {}
    for name, path in paths.items():
        opened = session(path)
        taken = {value.name: feeds[value.name] for value in opened.get_inputs()}
        runs[name] = caller(opened, taken, active if name == "swappable" else None)
    return runs


def _over_the_fastest(
    opened: Callable[[], dict[str, Run]], rounds: int, calls: int
) -> dict[str, float]:
    """Ours over the level that wins here, all opened anew in each round.

    Where its weights come to lie makes one session of a file up to 10 % slower than another.
    """
    times = [medians(opened(), 3, calls) for _ in range(rounds)]
    levels = [name for name in times[0] if name.startswith("O")]
    fastest = min(levels, key=lambda level: statistics.median(each[level] for each in times))
    found = {
        name: Spread.of([each[name] / each[fastest] for each in times])
        for name in ("merged", "swappable")
    }
    return {"level": float(fastest[1:])} | columns(found)


def _save_merged(model: Any, adapter: lora_fx.Adapter, directory: Path) -> None:
    from transformers import AutoTokenizer

    for path, update in adapter.updates.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.add_(update.scale * (update.up @ update.down))  # type: ignore[union-attr]
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(load_extra()).save_pretrained(directory)


def decoders(directory: Path, rounds: int) -> Rows:
    """A prompt, and tokens decoded behind it, over genai's file with its shared buffer."""
    source = directory / "decoder"
    _save_decoder(source, _SMALL)
    theirs = _built(source, directory, "fp32")
    rows = {}
    for shared, how in ((True, "in place"), (False, "copied")):
        out = _exported(source, (), directory / how, shared)
        both = {"ours": partial(_opened, out, shared), "genai": partial(_opened, theirs)}
        agree({name: lambda each=each: [each().run()] for name, each in both.items()}, "ours")  # type: ignore[misc]
        rows[f"decoder, cache {how}"] = _over_genai(both, rounds)
    return rows


def _exported(source: Path, adapters: tuple[Path, ...], out: Path, shared: bool) -> Path:
    mode: Mode = "swappable" if adapters else "merged"
    report: Any = export_model(
        str(source), adapters, mode, out, False, lambda stage: None,
        task="text-generation-with-past", shared_cache=shared,
    )  # fmt: skip
    assert report.verified
    return out / "model.onnx"


def packed_decoders(directory: Path, rounds: int) -> Rows:
    """All in 4 bits, ours swappable, over genai's files: with the adapter of both, and without."""
    rows = {}
    for size, shape in _SIZES.items():
        with tempfile.TemporaryDirectory(dir=directory) as room:
            rows |= _packed(size, shape, Path(room), rounds)
    return rows


def _packed(size: str, shape: dict[str, Any], directory: Path, rounds: int) -> Rows:
    source = directory / "decoder"
    model = _save_decoder(source, shape)
    make = torch.Generator().manual_seed(0)
    updates = {
        path: lora_fx.Update(
            torch.randn(RANK, layer.in_features, generator=make) / layer.in_features,
            torch.randn(layer.out_features, RANK, generator=make),
            0.25,
        )
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and path != "lm_head"
    }
    adapter = lora_fx.Adapter("bench", updates)
    lora_fx.save_adapter(adapter, source / "adapter")
    packed = directory / "packed.onnx"
    plain = _exported(source, (source / "adapter",), directory / "ours", shared=True)
    assert quantize_onnx(plain, packed, accuracy_level=4, symmetric=True, layers=("*",)).verified
    export_adapter(adapter, packed, directory / "a.onnx_adapter")
    file = directory / "a.onnx_adapter"
    tuned = f"adapter_path={source / 'adapter'}"  # its factors are weights of 4 bits there
    ours = {
        "no adapter": partial(_opened, packed),
        "an adapter": partial(_opened, packed, adapter=file),
    }
    assert not np.allclose(*(each().run()[0] for each in ours.values()), rtol=0.1)
    theirs = {
        "no adapter": _built(source, directory, "int4", out="genai"),
        "an adapter": _built(source, directory, "int4", tuned, out="tuned"),
    }
    return {
        f"4 bits, {size}, {name}": _over_genai(
            {"ours": each, "genai": partial(_opened, theirs[name])}, rounds
        )
        for name, each in ours.items()
    }


def _built(
    source: Path, directory: Path, precision: str, *options: str, out: str = "genai"
) -> Path:
    """What genai's builder makes of a decoder: the builder alone, which wants our transformers."""
    packages = directory / "packages"
    packages.mkdir(exist_ok=True)
    link = packages / "onnxruntime_genai"
    if not link.exists():
        link.symlink_to(CLIENTS.resolve() / "onnxruntime_genai")
    builder = ("-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu")
    places = ("-i", str(source), "-o", str(directory / out), "-c", str(directory / "cache"))
    extra = ("--extra_options", *options) if options else ()
    _clients(packages, *builder, *places, *extra)
    return directory / out / "model.onnx"


def _opened(path: Path, shared: bool = True, adapter: Path | None = None) -> Decoder:
    opened, manifest = session(path), manifest_in(load_proto(path), path)
    active = adapter and activated(opened, path, manifest, adapter, bound=True)
    return Decoder(opened, shared, active)


def _over_genai(openers: dict[str, Callable[[], Decoder]], rounds: int) -> dict[str, float]:
    """Times of ours over theirs, round by round, each opened first in half of them.

    Of two equal files the one that is opened first decodes up to 8 % slower.
    """
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    for order in ([*openers], [*openers][::-1]):
        both = {name: openers[name]() for name in order}
        for _ in range(-(-rounds // 2)):
            taken = {}
            for name, each in both.items():
                each.run()
                taken[name] = each.seconds
            for stage, values in found.items():
                values.append(taken["ours"][stage] / taken["genai"][stage])
    spreads = {stage: Spread.of(values) for stage, values in found.items()}
    return columns(spreads)


class Decoder:
    """Greedy decoding behind a prompt, from one session.

    Args:
        opened: the session.
        shared: whether its cache is written in place.
        active: the adapter to run with, whose values are bound: onnxruntime overlooks those of a
            run's options where memory is bound.

    Attributes:
        seconds: of the last run, processor time of the prompt, and of all tokens behind it.
    """

    def __init__(
        self, opened: Any, shared: bool = False, active: ActiveAdapter | None = None
    ) -> None:
        self._session, self._active = opened, active
        self._shared = shared
        self._reads = {value.name: value.shape for value in opened.get_inputs()}
        self._past = [name for name in self._reads if name.startswith("past_key_values.")]
        self.seconds: dict[str, float] = {}

    def run(self) -> np.ndarray[Any, Any]:
        """The logits of each token."""
        length = 2 * STEPS if self._shared else 0
        past = {}
        for name in self._past:
            empty = np.zeros((1, self._reads[name][1], length, _HEAD_SIZE), np.float32)
            past[name] = ort.OrtValue.ortvalue_from_numpy(empty)
        binding = self._session.io_binding()
        for name, value in self._active.feeds.items() if self._active else ():
            binding.bind_ortvalue_input(name, value)
        self._bind(binding, past)
        ids = np.random.default_rng(0).integers(0, 4000, (1, STEPS))
        logits = []
        start = time.thread_time()
        for place in range(STEPS, 2 * STEPS):
            positions = np.arange(place - ids.shape[1], place)[None]
            feeds = {"input_ids": ids, "attention_mask": np.ones((1, place), np.int64)}
            for name, array in (feeds | {"position_ids": positions}).items():
                if name in self._reads:
                    binding.bind_cpu_input(name, array)
            binding.bind_output("logits", "cpu")
            self._session.run_with_iobinding(binding)
            *present, found = binding.get_outputs()
            if not self._shared:
                self._bind(binding, dict(zip(self._past, present, strict=True)))
            logits.append(found.numpy()[0, -1])
            ids = logits[-1].argmax().reshape(1, 1)
            if place == STEPS:
                between = time.thread_time()
        self.seconds = {"prefill": between - start, "decode": time.thread_time() - between}
        return np.stack(logits)

    def _bind(self, binding: Any, past: dict[str, Any]) -> None:
        """Gives what came before, and says where what there is afterwards goes."""
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            if self._shared:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")


def _save_decoder(directory: Path, shape: dict[str, Any]) -> nn.Module:
    """A decoder of Llama's architecture, and a tokenizer, which the builder wants."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, max_position_embeddings=1024)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)  # type: ignore[operator]
    words = tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return model


PARTS: dict[str, Callable[[Path, int], Rows]] = {
    "encoder": encoders,
    "decoder": decoders,
    "packed": packed_decoders,
}


def run(part: str, rounds: int = 21) -> Rows:
    """One part, if the other exporters are here."""
    if not CLIENTS.is_dir():
        return {"not measured: make test-clients installs the other exporters": {"files": 0.0}}
    with tempfile.TemporaryDirectory() as directory:
        return PARTS[part](Path(directory), rounds)
