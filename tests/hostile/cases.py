"""The corpus: one line a case. Its row is that of the list of refusals in SECURITY.md."""

from __future__ import annotations

import os
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from making import (
    CONFIG,
    CONFIG_FILE,
    KEY,
    WEIGHTS,
    Case,
    Make,
    Models,
    adapter,
    archive,
    entry,
    header,
    pickled,
    rewritten,
    sparse_file,
    tensors,
    with_fields,
    with_tensors,
)

A, B = KEY.format("A"), KEY.format("B")
MODEL, FILE, PICKLE = "model.onnx", "a.onnx_adapter", "adapter_model.bin"
NAN = float("nan")


def safetensors() -> Iterator[Case]:
    def case(row: int, name: str, make: Make, message: str) -> Case:
        return Case(row, name, "load", make, WEIGHTS, message)

    two = {**entry("a"), "b": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]}}
    yield case(1, "empty", adapter(weights=b""), "0 bytes, expected a safetensors file")
    yield case(2, "under 8 bytes", adapter(weights=b"\x02\0\0"), "3 bytes, expected")
    yield case(3, "header past the end", header({}, length=99), "header of 99 bytes, but only")
    yield case(4, "header of 17 MB", header(b"{" + b" " * (17 << 20)), "expected at most 16777216")
    yield case(4, "header of 2 ** 63", header({}, length=1 << 63), "expected at most 16777216")
    yield case(5, "header not UTF-8", header(b'{"\xff\xfe": 1}'), "header: .*UTF-8")
    yield case(5, "header not JSON", header(b"{a: 1}"), "header: .*JSON")
    yield case(5, "header a list", header(b"[]"), "expected an object")
    yield case(5, "header nested", header(b'{"a":' + b"[" * 50_000), "header: ")
    yield case(6, "header behind a space", header(b" {}", 0), "starts with b' ', expected an obj")
    yield case(
        7,
        "a name twice",
        header(b'{"a":1,"a":1}'),
        "header: not strict JSON: the key 'a' appears twice",
    )
    yield case(8, "dtype unknown", header(entry(dtype="F33")), "tensor 'a': dtype 'F33', expected")
    yield case(8, "dtype a list", header(entry(dtype=[])), "tensor 'a': dtype ")
    for size in (3.0, -3, True, "3", None):
        yield case(9, f"size {size!r}", header(entry(shape=[size])), "tensor 'a': shape .*expected")
    yield case(10, "product overflows", header(entry(shape=[1 << 40] * 4)), "offsets give 12")
    yield case(11, "zero beside huge", header(entry(shape=[0, 1 << 62])), "tensor 'a': shape")
    yield case(12, "nine axes", header(entry(shape=[1] * 8 + [3])), "expected at most 8 sizes")
    yield case(13, "overlap", header(two, 20), "tensor 'b' overlaps the one before")
    yield case(14, "hole", header(entry(data_offsets=[4, 16]), 16), "tensor 'a' leaves a hole")
    yield case(15, "bytes behind", header(entry(), 13), "trailing bytes: 13 bytes of data")
    yield case(16, "cut", header(entry(), 5), "truncated: 5 bytes of data, expected 12")
    for name in ("", "a\0b", "a\nb", "../../a", "/a", "a\\b", "n" * 513):
        yield case(17, f"name {name[:8]!r}", header(entry(name)), "tensor '.*: the name")
    yield case(18, "metadata a number", header({"__metadata__": {"a": 1}}, 0), "__metadata__ is")
    yield case(18, "metadata a list", header({"__metadata__": []}, 0), "__metadata__ is")
    bad = torch.full((2, 3), NAN)
    yield case(19, "not a number", with_tensors(A=bad), f"{A}' holds NaN or infinity")
    yield case(19, "infinite", with_tensors(B=torch.full((5, 2), -float("inf"))), f"{B}' holds NaN")
    yield case(20, "integers", with_tensors(A=torch.ones(2, 3).int()), f"{A}': dtype 'I32'")
    yield case(20, "flags", with_tensors(A=torch.ones(2, 3).bool()), f"{A}': dtype 'BOOL'")
    eight = torch.ones(2, 3).to(torch.float8_e8m0fnu)
    yield case(20, "eight bits", with_tensors(A=eight), f"{A}': dtype 'F8_E8M0'")
    many = {f"{n}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in range(100_001)}
    yield case(21, "100,001 tensors", header(many, 4), "100001 tensors, expected at most 100000")


def configs() -> Iterator[Case]:
    def case(row: int, name: str, make: Make, message: str, how: str = "load") -> Case:
        return Case(row, name, how, make, CONFIG_FILE, message)

    yield case(22, "config empty", adapter(b""), "JSON")
    yield case(22, "config a list", adapter(b"[]"), "expected a JSON object")
    yield case(22, "config behind a mark", adapter(b"\xef\xbb\xbf{}"), "byte order mark|BOM")
    yield case(22, "config nested", adapter(b'{"a":' * 50_000), "nested|JSON|deep")
    yield case(23, "field twice", adapter(b'{"r": 2, "r": 4}'), "the key 'r' appears twice")
    yield case(24, "alpha NaN", with_fields(lora_alpha=NAN), "NaN")
    yield case(24, "alpha Infinity", with_fields(lora_alpha=float("inf")), "Infinity")
    yield case(25, "no type", with_fields(peft_type=...), "peft_type")
    yield case(25, "unknown type", with_fields(peft_type="QORA"), "peft_type.*'QORA'")
    yield case(25, "a type of a list", with_fields(peft_type=["LORA"]), "peft_type")
    for rank in (True, 2.0, "2", 0, -2, None, [2]):
        yield case(26, f"rank {rank!r}", with_fields(r=rank), r"\br\b")
    yield Case(
        26, "rank 10 ** 30", "load", with_fields(r=10**30), WEIGHTS, "fc: .* should be of ra"
    )
    turned = {"peft_type": "OFT", "oft_block_size": 3, "num_cayley_neumann_terms": 1 << 40}
    turned |= {"target_modules": ["fc"], "peft_version": "0.21.2"}
    angles = {"base_model.model.fc.oft_R.weight": torch.ones(1, 3)}
    terms = adapter(turned, angles)
    yield Case(26, "2 ** 40 terms", "load", terms, WEIGHTS, "terms is 1099511627776, .* at most 1")
    yield case(27, "no alpha", with_fields(lora_alpha=...), "lora_alpha")
    for alpha in ("4", True, 10**400, [4]):
        yield case(28, f"alpha {str(alpha)[:5]!r}", with_fields(lora_alpha=alpha), "lora_alpha")
    none = with_fields(lora_alpha=0)
    yield Case(28, "alpha zero", "load", none, "", "has no effect", warns=True)
    yield case(29, "unknown field", with_fields(use_magic=True), "use_magic")
    yield case(29, "fan_in_fan_out a word", with_fields(use_dora="yes"), "use_dora")
    core = with_fields(megatron_config={"a": 1}, megatron_core="evil_module")
    yield Case(30, "megatron", "load", core, "", "", warns=True)
    yield Case(30, "its core alone", "load", with_fields(megatron_core="evil_module"), "", "", True)
    mapping = {"base_model_class": "Evil", "parent_library": "evil_module"}
    yield Case(30, "auto mapping", "load", with_fields(auto_mapping=mapping), "", "", warns=True)
    slow = ["(.*)*X", r"(a+\.?)+X", ".*.*.*.*.*.*.*.*.*X", "(?:.|.)" * 30 + "X", ".?" * 60 + "X"]
    for number, regex in enumerate(slow):
        # A path of 400 characters, which such a regex takes longer for than anybody waits.
        path = ".".join("a" * 200)
        long = {k.replace("fc", path): v for k, v in tensors().items()}
        made = adapter({**CONFIG, "target_modules": [path], "rank_pattern": {regex: 2}}, long)
        yield case(31, f"slow pattern {number}", made, "rank_pattern|match")
        targets = adapter({**CONFIG, "target_modules": regex}, long)
        yield Case(31, f"slow targets {number}", "fit", targets, "", "match nothing in the graph")
    yield case(31, "broken regex", with_fields(target_modules="(fc"), "target_modules")
    broken = with_fields(rank_pattern={"(fc": 2})
    yield case(31, "broken pattern", broken, "rank_pattern")
    large = ["(?:(?:(?:(?:a{99}){99}){99}){99}){99}", "(?:" * 60 + "a" + ")+" * 60 + "X"]
    for number, regex in enumerate(large):
        made = with_fields(rank_pattern={regex: 2})
        yield Case(31, f"large pattern {number}", "load", made, WEIGHTS, "fc: .* is not done with")
        targets = with_fields(target_modules=regex)
        yield Case(31, f"large targets {number}", "fit", targets, "", "target_modules", warns=True)
    count = with_fields(rank_pattern={"a{" + "1" * 5000 + "}": 2})
    yield case(31, "a count of 5,000 digits", count, "rank_pattern: .*not a regex")
    many = with_fields(rank_pattern={f"{n}.*": 2 for n in range(60_000)})
    yield case(31, "60,000 regexes", many, "rank_pattern: 60000 regexes")
    pattern = with_fields(rank_pattern={"nowhere": 2})
    yield case(33, "pattern of nothing", pattern, "rank_pattern.*match no.*nowhere")
    pattern = with_fields(alpha_pattern={"nowhere": 2})
    yield case(33, "alpha of nothing", pattern, "alpha_pattern.*match no.*nowhere")
    large = with_fields(note=["x" * 1000] * 1100)
    yield case(34, "config of 1.1 MB", large, "bytes, expected at most 1048576")
    ranks = with_fields(rank_pattern={"fc": 3})
    yield Case(35, "another rank", "load", ranks, "", "fc.*rank|rank.*fc|r is 3")
    for start in ("pissa", "olora", "corda", "loftq"):
        made = with_fields(init_lora_weights=start)
        yield case(36, f"started as {start}", made, "init_lora_weights")


def fits() -> Iterator[Case]:
    def case(row: int, name: str, make: Make, message: str, how: str = "fit") -> Case:
        return Case(row, name, how, make, "", message)

    other = {k.replace("fc", "elsewhere"): v for k, v in tensors().items()}
    named = {**CONFIG, "target_modules": ["elsewhere"]}
    yield case(32, "a target of nothing", adapter(named, other), "match nothing.*elsewhere")
    yield case(32, "targets of another model", adapter(named, tensors()), "targets elsewhere.*fc")
    yield case(37, "a layer that is not there", adapter(named, other), "elsewhere")
    yield Case(37, "a key of no layer", "load", adapter(CONFIG, tensors() | {"x": torch.ones(2)}),
               WEIGHTS, r"\bx\b")  # fmt: skip
    yield case(38, "A without B", with_tensors(B=None), "fc", "load")
    yield case(38, "B without A", with_tensors(A=None), "fc", "load")
    both = with_fields(target_modules=["fc", "last"])
    yield case(39, "a target without tensors", both, "last")
    wide = with_tensors(A=torch.ones(2, 4))
    yield case(40, "another width", wide, r"fc.*4.*3|fc.*3.*4")
    yield case(40, "another height", with_tensors(B=torch.ones(6, 2)), "fc.*6")
    yield case(41, "two ranks", with_tensors(B=torch.ones(5, 3)), "fc", "load")
    yield case(42, "turned around", with_tensors(A=torch.ones(3, 2), B=torch.ones(2, 5)), "fc")
    huge = with_tensors(A=torch.full((2, 3), 1e30), B=torch.full((5, 2), 1e30))
    yield case(44, "weights overflow", huge, "overflow|finite|infinity", "export")
    half = with_tensors(A=torch.full((2, 3), 300.0), B=torch.full((5, 2), 300.0))
    yield case(44, "weights overflow float16", half, "overflow|finite|infinity", "export_half")
    idle = with_tensors(B=torch.zeros(5, 2))
    yield Case(45, "B of zeros", "load", idle, "", "has no effect", warns=True)
    yield case(46, "two of one name", adapter(), "one name|already|twice|named", "twice")


def pickles() -> Iterator[Case]:
    def case(row: int, name: str, make: Make, message: str, how: str = "load_pickle") -> Case:
        return Case(row, name, how, make, PICKLE, message)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch stolen",)

    def of(**values: object) -> Make:
        return pickled(lambda: {**tensors(), **values})

    ones = torch.ones(9)
    yield case(47, "pickle not allowed", pickled(tensors), "allow_pickle", "load")
    yield case(47, "code", pickled(lambda: {"a": Evil()}), "expected")
    yield case(47, "a network", pickled(lambda: torch.nn.Linear(2, 3)), "expected")
    yield case(
        47, "not a zip", pickled({}, lambda f: f.write_bytes(b"\x80\x02}.")), "expected what"
    )
    yield case(48, "expanded", of(a=torch.ones(1).expand(9)), "'a' is expanded")
    yield case(48, "overlapping", of(a=ones.as_strided((4, 4), (1, 1))), "'a' is expanded")
    yield case(48, "sparse", of(a=torch.eye(3).to_sparse()), "expected dense|plain tensors")
    yield case(48, "without data", of(a=torch.ones(3, device="meta")), "expected dense|plain tens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantised tensors are to go
        small = torch.quantize_per_tensor(ones, 0.1, 0, torch.quint8)
    yield case(48, "quantised", of(a=small), "expected dense|plain tensors")
    shared = torch.ones(50_000)
    views = pickled(lambda: {f"v{n}": shared[n:] for n in range(2000)})
    yield case(48, "many views", views, "bytes in a file of")
    yield case(49, "member above", pickled({}, archive(("../x/data.pkl", b"."))), "leaves it")
    twice = archive(("x/data.pkl", b"."), ("x/data.pkl", b"."))
    yield case(49, "member twice", pickled({}, twice), "two members of one name")
    bomb = archive(("x/data.pkl", bytes(50 << 20)), compressed=True)
    yield case(49, "compressed", pickled({}, bomb), "is compressed")


def models(made: Models) -> Iterator[Case]:
    def case(row: int, name: str, make: Make, message: str) -> Case:
        return Case(row, name, "session", make, MODEL, message)

    for place in ("/etc/passwd", "../x", "a\\b", "c:x", "a\0b", ""):
        yield case(
            50, f"data at {place!r}", made.placed(location=place), "expected the name of a f"
        )

    def linked(file: Path) -> None:
        file.rename(file.with_name("real"))
        file.symlink_to("real")

    def hard(file: Path) -> None:
        os.link(file, file.with_name("other"))

    def fifo(file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    def folder(file: Path) -> None:
        file.unlink()
        file.mkdir()

    for change in (linked, hard, fifo, folder):
        yield case(51, f"data {change.__name__}", made.beside(change), "link or no plain file")
    yield case(52, "offset -1", made.placed(offset="-1"), "offset '-1'")
    yield case(52, "offset a word", made.placed(offset="x"), "offset 'x'")
    yield case(52, "offset past the end", made.placed(offset="99999999"), "truncated")
    yield case(52, "length of another shape", made.placed(length="4"), "4 bytes of external data")

    def overlapped(proto: onnx.ModelProto) -> None:
        held = [t for t in proto.graph.initializer if t.external_data]
        for one in held:
            next(e for e in one.external_data if e.key == "offset").value = "2"

    yield case(
        53,
        "misaligned or overlapping",
        made.model(overlapped, "beside"),
        "overlap|digest|trunc|bytes",
    )

    def flipped(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[1] ^= 64
        file.write_bytes(content)

    yield case(54, "data of another digest", made.beside(flipped), "changed|digest")
    yield case(55, "unknown key of data", made.placed(colour="blue"), "unknown or repeated: colour")

    def external(tensor: onnx.TensorProto) -> None:
        tensor.CopyFrom(onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=1))
        for key, value in (("location", "../secret"), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)

    def in_attribute(proto: onnx.ModelProto) -> None:
        node = proto.graph.node.add(op_type="Constant", output=["c"])
        external(node.attribute.add(name="value", type=4).t)

    def in_function(proto: onnx.ModelProto) -> None:
        function = proto.functions.add(name="f", domain="d")
        external(function.node.add(op_type="Constant").attribute.add(name="value", type=4).t)

    def in_branch(proto: onnx.ModelProto) -> None:
        node = proto.graph.node.add(op_type="If", output=["c"])
        external(node.attribute.add(name="then_branch", type=5).g.initializer.add())

    for place_of in (in_attribute, in_function, in_branch):
        yield case(
            56, f"data {place_of.__name__}", made.model(place_of), "expected the name of a f"
        )

    def opset(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = 10**6

    def ir_version(proto: onnx.ModelProto) -> None:
        proto.ir_version = 0

    def typed(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].data_type = 99

    def huge(home: Path) -> None:
        made.model()(home)
        sparse_file(home / MODEL, (1 << 31) + 1)

    yield case(57, "over 2 GB", huge, "bytes, expected at most")
    yield case(57, "opset of tomorrow", made.model(opset), "its graph was rewritten")
    yield case(57, "IR version 0", made.model(ir_version), "IR version 0, expected 3 or more")
    yield case(57, "data type 99", made.model(typed), "data type 99")


def onnx_adapters(made: Models) -> Iterator[Case]:
    def case(row: int, name: str, make: Make, message: str, how: str = "run") -> Case:
        return Case(row, name, how, make, FILE, message)

    def bytes_of(change: Callable[[bytearray], object]) -> Make:
        def apply(file: Path) -> None:
            content = bytearray(file.read_bytes())
            change(content)
            file.write_bytes(content)

        return made.for_model(apply)

    def put(at: int, value: bytes) -> Make:
        def change(content: bytearray) -> None:
            content[at : at + len(value)] = value

        return bytes_of(change)

    def doubled(file: Path) -> None:
        rewritten(lambda held: {**held, "fc.lora_~": held["fc.lora_B"] * 9})(file)
        file.write_bytes(file.read_bytes().replace(b"fc.lora_~", b"fc.lora_B"))

    def version(file: Path) -> None:
        import onnxruntime as ort

        read = ort.AdapterFormat.read_adapter(str(file))
        other = ort.AdapterFormat()
        other.set_adapter_version(1)
        other.set_model_version(0)
        other.set_parameters(read.get_parameters())
        other.export_adapter(str(file))

    def renamed(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name.replace("lora_A", "lora_C"): value for name, value in held.items()}

    def without(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value for name, value in held.items() if name != "fc.lora_A"}

    def whole(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value.astype(np.int64) for name, value in held.items()}

    yield case(58, "identifier", put(4, b"TROT"), "damaged|not an adapter|cannot be read|no adapt")
    yield case(
        58, "table past the end", put(0, struct.pack("<I", 1 << 30)), "damaged|cannot be rea"
    )
    yield case(58, "cut in half", bytes_of(lambda c: c.__delitem__(slice(len(c) // 2, None))), ".")
    yield case(58, "nothing", bytes_of(lambda c: c.clear()), ".")
    yield case(58, "of integers", made.for_model(rewritten(whole)), "expected tensor|int64|float")
    yield case(58, "a name twice", made.for_model(doubled), "names, expected a name for each")
    yield case(
        59,
        "a parameter of no slot",
        made.for_model(rewritten(renamed)),
        "without a slot: .*fc.lora_C",
    )
    yield case(
        59, "a slot without a value", made.for_model(rewritten(without)), "without a value: f"
    )
    yield case(60, "digest of none", made.for_model(version), "model version 0")
    yield case(43, "for another base", made.for_model(lambda file: None, "other"), "model version")
    yield Case(62, "an index of -1", "index", made.model(), MODEL, "unknown inputs: adapter_ids")


def commands(made: Models) -> Iterator[Case]:
    """Row 61; a full disk and a directory that may not be written are in test_faults.py."""

    def of(*words: str, link: str | None = None) -> Make:
        def make(home: Path) -> None:
            made.for_model(lambda file: None)(home)
            (home / "a").mkdir()
            adapter()(home / "a")
            if link is not None:
                (home / link).symlink_to(home / "a")
            (home / "command.txt").write_text("\n".join(words))

        return make

    def case(name: str, make: Make, file: str, message: str) -> Case:
        return Case(61, name, "command", make, file, message)

    start = ("adapter", "HOME/a", "--for", "HOME/model.onnx", "-o")
    to = ("adapter", "HOME/a", "--to")
    yield case("output exists", of(*start, "HOME/a.onnx_adapter"), FILE, "exists: pass --force")
    for number, place in enumerate(
        (f"a/{WEIGHTS}", f"./a/../a/{WEIGHTS}", "model.onnx", "a/b.onnx_adapter", "link/" + WEIGHTS)
    ):
        made_of = of(*start, f"HOME/{place}", "--force", link="link")
        yield case(f"output an input {number}", made_of, Path(place).name, "an input of this call")
    yield case("in place", of(*to, "peft", "-o", "HOME/a", "--force"), "a", "is an input")
    yield case("by a link", of(*to, "peft", "-o", "HOME/l", "--force", link="l"), "l", "is an inp")

    def beside(home: Path) -> None:
        of("inspect", "HOME/a")(home)
        sparse_file(home / "a" / "README.md", 40 << 30)

    yield case("holes beside an adapter", beside, "README.md", "nearly all are holes")
    loop = of(*to, "peft", "-o", "HOME/" + "x" * 300)
    yield case("a name too long", loop, "xxx", "File name too long")
    yield case("a link elsewhere", of("export", "HOME/a", "-o", "HOME/l", link="l"), "l", ".")


def foreign() -> Iterator[Case]:
    """Files of other tools, which nothing is known of but what they say."""

    def of(change: Callable[[onnx.GraphProto], object]) -> Make:
        def make(home: Path) -> None:
            weight = onnx.numpy_helper.from_array(np.ones((5, 40), np.float32), "fc.weight")
            takes, gives = (
                onnx.helper.make_tensor_value_info(name, 1, [2, size])
                for name, size in (("x", 40), ("y", 5))
            )
            node = onnx.helper.make_node("Gemm", ["x", "fc.weight"], ["y"], name="fc", transB=1)
            graph = onnx.helper.make_graph([node], "g", [takes], [gives], [weight])
            change(graph)
            imports = [onnx.helper.make_opsetid("", 21)]
            onnx.save(onnx.helper.make_model(graph, opset_imports=imports), home / MODEL)
            words = ("add-lora", f"HOME/{MODEL}", "-o", "HOME/o.onnx")
            (home / "command.txt").write_text("\n".join(words))

        return make

    def axis(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = -5

    changes: dict[str, Callable[[onnx.GraphProto], object]] = {
        "an operator of nobody": lambda g: g.node.add(op_type="Evil", domain="d", output=["z"]),
        "an operator without a name": lambda g: g.node.add(output=["z"]),
        "an input of nobody": lambda g: g.node.add(op_type="Relu", input=["no"], output=["y2"]),
        "a circle": lambda g: g.node[0].input.__setitem__(0, "y"),
        "an attribute of nobody": lambda g: g.node[0].attribute.add(name="axis", type=2, i=1),
        "an axis of -5": axis,
    }
    said = dict.fromkeys(changes, ("o.onnx", "the result is not valid ONNX: ."))
    said["an input of nobody"] = ("model.onnx", "reads no, which no node, input or initializer")
    said["a circle"] = ("model.onnx", "not a valid ONNX graph: .*cycle")
    for name, change in changes.items():
        yield Case(57, name, "command", of(change), *said[name])


def directories() -> Iterator[Case]:
    """Models of strangers, whose code lies beside them and is not run."""
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8}

    def of(**fields: object) -> Make:
        def make(home: Path) -> None:
            import json

            (home / "config.json").write_text(json.dumps({**config, **fields}))
            (home / "evil_module.py").write_text("open('stolen', 'w')\nclass Evil: pass\n")
            (home / "pytorch_model.bin").write_bytes(b"")

        return make

    def case(name: str, make: Make, message: str) -> Case:
        return Case(29, name, "directory", make, "", message)

    code = {"AutoConfig": "evil_module.Evil", "AutoModel": "evil_module.Evil"}
    yield case("code of a model", of(auto_map=code, model_type="evil"), "config.json|load")
    yield case("layers without end", of(num_hidden_layers=10**9), "num_hidden_layers is 1000000000")
    yield case("kernels of a hub", of(attn_implementation="evil/kernel"), "code of a hub")


def every_case(made: Models) -> list[Case]:
    """All of them, in the order of their rows."""
    found = [
        *safetensors(), *configs(), *fits(), *pickles(), *models(made), *onnx_adapters(made),
        *commands(made), *foreign(), *directories(),
    ]  # fmt: skip
    return sorted(found, key=lambda case: case.row)


def planted(home: Path) -> None:
    """A module that a case names: whoever imports it leaves a file."""
    (home / "evil_module.py").write_text("open('stolen', 'w')\n")


def write(cases: list[Case], home: Path) -> None:
    """Writes each case into a directory of its own."""
    for number, case in enumerate(cases):
        place = home / f"{number:03}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        case.make(place)
        planted(place)
