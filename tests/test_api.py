"""What a user types: every public name, how it is called, and what it does at its simplest."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module, metadata
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.testing import make_adapter

SUBMODULES_FIRST = """
import lora_fx.layers.sites, lora_fx.frontend.trace, lora_fx.explanation, lora_fx
assert callable(lora_fx.trace) and callable(lora_fx.compare) and callable(lora_fx.text)
"""


def test_every_public_name_is_there() -> None:
    assert sorted(dir(lora_fx)) == sorted(lora_fx.__all__)
    assert all(getattr(lora_fx, name) is not None for name in lora_fx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        _ = lora_fx.merge


def test_a_function_is_never_hidden_by_the_module_it_lives_in() -> None:
    subprocess.run([sys.executable, "-c", SUBMODULES_FIRST], check=True)


def test_the_passes_as_functions(ragged: Any, x: Any) -> None:
    gm = lora_fx.trace(ragged, (x,))
    injected = lora_fx.inject(gm, make_adapter({"wide": (5, 3)}))
    folded = lora_fx.fold(injected)
    assert lora_fx.compare(folded(x), injected(x)).ok
    assert not lora_fx.compare(folded(x), gm(x)).ok
    assert torch.equal(lora_fx.unfold(folded)(x), injected(x))


def test_errors_have_one_base() -> None:
    names = ["AdapterError", "ExportError", "PassError", "TraceError", "VerificationError"]
    assert all(issubclass(getattr(lora_fx, name), lora_fx.LoraFxError) for name in names)


# Every public name; of what is called, or made, by a user, how. To change a line is to change what
# somebody has written: add what is optional, and let what goes warn for a version.
PUBLIC = {
    "lora_fx": """
Adapter(name, updates, replacements=<factory>, expects=None, moved=None)
AdapterError
AdapterReport
AdapterWarning
ExportError
ExportReport
LoraConfig(r=8, alpha=16, target_modules='all-linear', dropout=0.0, use_rslora=False,
    rank_pattern=<factory>, alpha_pattern=<factory>, exclude_modules=(), layers_to_transform=None,
    layers_pattern=(), name='default', seed=None, init='kaiming', kind='lora', lora_alpha=None,
    lora_dropout=None, init_lora_weights=None)
LoraFxError
PassError
Session(path, threads=None, providers=None, *, check=True)
TraceError
Update(down, up, scale, kind='lora', bias=None, magnitude=None, row=None, col=None, stored=None,
    invocation=())
VerificationError
__version__
adapter_from(gm, name=None)
combine(adapters, how='cat', rank=None, name=None)
compare(actual, expected, dtype=None)
explain(gm)
export
export_adapter(adapter, model_path, out_path, *, format=None, force=False, check=True)
extract(base, tuned, rank=None, energy=None, *, name='extracted')
fold(gm, *, chains=False)
inject(gm, adapter, *, strict=True)
load_adapter(path, *, name=None, format='auto', base=None, prefix=None, strict=True, **hints)
passes
report
save_adapter(adapter, path, *, format='peft', force=False, **hints)
tasks
testing
text(gm)
to_onnx(gm, path, *, adapters='constant', verify=True, args=None, kwargs=None, dynamic_shapes=None,
    input_names=None, output_names=None, slots=None, vectors=None, opset=None, quantize=None,
    portable=False, shared_cache=False, external_data_above=128000000, force=False, progress=None,
    report=None, measure=False)
trace(model, args=(), kwargs=None, *, dynamic_shapes=None, frontend='auto', check=True)
unfold(gm)
""",
    "lora_fx.passes": """
ChooseForm(target='constant', tokens=256, form=None, share=True)
Edit
Editor
FoldLora(chains=False)
InjectLora(adapter, strict=True)
Pass()
PassResult
Pipeline(passes)
RaiseLora(name='default')
Site
StripLora(name=None)
UnfoldLora()
call_argument(node, index, name, default=None)
module_path(node)
op_name(node)
sites(gm)
""",
    "lora_fx.export": """
AdapterReport
CalibrationReader(path, inputs, adapters)
ExportReport
Session(path, threads=None, providers=None, *, check=True)
add_lora(model_path, out_path, *, slots='all-linear', names=None, adapters='input', inputs=None,
    check=True, verify=True, external_data_above=128000000, force=False, progress=None)
export_adapter(adapter, model_path, out_path, *, format=None, force=False, check=True)
join_decoders(first_path, later_path, out_path, *, check=True, external_data_above=128000000,
    force=False, progress=None)
merge_onnx(model_path, adapter, out_path, *, inputs=None, allow_unmerged=False, check=True,
    verify=True, external_data_above=128000000, force=False, progress=None)
quantize_onnx(model_path, out_path, *, bits=4, block_size=None, accuracy_level=0, symmetric=False,
    layers=None, keep=(), tables=(), inputs=None, check=True, verify=True,
    external_data_above=128000000, force=False, progress=None)
slots_for(gm, adapters)
to_onnx(gm, path, *, adapters='constant', verify=True, args=None, kwargs=None, dynamic_shapes=None,
    input_names=None, output_names=None, slots=None, vectors=None, opset=None, quantize=None,
    portable=False, shared_cache=False, external_data_above=128000000, force=False, progress=None,
    report=None, measure=False)
verify_onnx(gm, path, *, adapters=(), progress=None)
""",
    "lora_fx.report": """
Differences
Drawing
diff(first, second, *, base=None)
draw(gm, path)
write_page(report, path, *, force=False)
""",
    "lora_fx.tasks": """
ModelSource
TASKS
Task
load(directory, task=None, *, adapters=(), last_logits=False, component=None, dtype=None)
""",
    "lora_fx.testing": """
Attention(size, crossed=False, bias=True)
Between(layer)
Blocks()
Case
Checked
Computes(function, sizes=None, **attributes)
Experts()
Exported
Foreign
Holds(function)
INPUTS
Lab(root)
LayerShape(shape, groups=1, is_table=False, path='layer', make=None)
Notebook(into=6, out=10)
Outputs()
PEFT_CASES
PEFT_TYPES
Ragged()
Sample
SavedCase
Shared()
Tied()
Two(wide, narrow)
UPDATES
ZOO
analyse_function(function, name='batch', frontend='export', check=True)
by_lycoris(module, layer, *, dtype=torch.float64, **options)
by_peft(layer, config)
check_case(case, frontend, tolerance=1e-09)
check_pass(step, gm, *inputs, expected=None, control=None, dtype=None)
check_reason(case, frontend)
computes(function, x, frontend, tolerance=1e-09)
config_in(path)
distance(actual, expected)
fits(adapter, base, x, expected)
folds_to(gm, base)
make_adapter(shapes, rank=2, scale=1.5, name='french', kind='lora')
means(update, base, expected, *controls, within=1e-06)
operators(gm)
read_kind(kind, tensors, **settings)
reason(function, x, frontend)
recorded_graph(update)
relative(actual, expected)
same_adapter(found, expected)
same_bits(found, expected)
same_tensors(found, expected)
sample_of(name)
save_bitsandbytes(model, directory, kind='nf4', *, nested=True, storage=torch.uint8, block=64,
    shards=1)
save_peft_case(name, directory, seed=3)
tensors(outputs)
tiny(architecture, **changes)
traced(module, *args, dynamic_shapes=None)
update_of(kind, layer)
zoo(name)
""",
}
# Made by us, and read by a user.
GIVEN = {"Checked", "Edit", "Editor", "ExportReport", "Exported", "Foreign", "PassResult", "Site"}
GIVEN |= {
    "AdapterReport",
    "Case",
    "Differences",
    "Drawing",
    "ModelSource",
    "SavedCase",
    "Sample",
    "Task",
}
# What was promised first: later versions may only add what is optional.
CONTRACT = """
trace(model, args=(), kwargs=None, *, dynamic_shapes=None, frontend='auto')
load_adapter(path, *, name=None, format='auto', base=None, **hints)
save_adapter(adapter, path, *, format='peft')
LoraConfig(r=8, alpha=16, target_modules='all-linear', dropout=0.0, use_rslora=False)
inject(gm, adapter, *, strict=True)
fold(gm, *, chains=False)
unfold(gm)
to_onnx(gm, path, *, adapters='constant', verify=True)
export_adapter(adapter, model_path, out_path)
Session(path, threads=None, providers=None)
adapter_from(gm, name=None)
"""


def parameters_of(value: Any) -> list[inspect.Parameter]:
    every = inspect.signature(value).parameters.values()
    return [parameter.replace(annotation=inspect.Parameter.empty) for parameter in every]


def shown(module: str) -> list[str]:
    lines = []
    for name in sorted(import_module(module).__all__):
        value = getattr(import_module(module), name)
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        is_called = callable(value) and not is_error and name not in GIVEN
        lines.append(name + (str(inspect.Signature(parameters_of(value))) if is_called else ""))
    return lines


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_and_how_they_are_called(module: str) -> None:
    assert shown(module) == PUBLIC[module].replace("\n    ", " ").split("\n")[1:-1]


@pytest.mark.parametrize("line", CONTRACT.split("\n")[1:-1])
def test_what_was_promised_is_kept(line: str) -> None:
    names: dict[str, Any] = {}
    exec(f"def {line}: ...", names)
    name = line.partition("(")[0]
    promised, found = parameters_of(names[name]), parameters_of(getattr(lora_fx, name))
    known = {parameter.name: parameter for parameter in found}
    assert [known.pop(parameter.name) for parameter in promised] == promised
    assert [p.name for p in promised if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD
    ][: sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in promised)]
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    assert all(p.default is not p.empty or p.kind in optional for p in known.values())


ROOMS_BY_NAME = """
import lora_fx, sys
assert not {"onnx", "onnxruntime", "onnx_ir", "lora_fx.export", "lora_fx.passes"} & set(sys.modules)
assert "lora_fx.testing" not in sys.modules
for name in ("cli", "demo", "no_such_room", "__path"):
    assert not hasattr(lora_fx, name), name
assert lora_fx.passes.Editor.__name__ == "Editor"
assert lora_fx.export.verify_onnx.__name__ == "verify_onnx"
assert lora_fx.testing.check_pass.__name__ == "check_pass"
print(lora_fx.__version__)
"""


def test_import_lora_fx_reaches_its_rooms_when_they_are_read() -> None:
    command = [sys.executable, "-c", ROOMS_BY_NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{metadata.version('lora-fx')}\n"
