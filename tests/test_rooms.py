"""The rooms: who may import whom, what is installed, and what a bare import loads."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("lora_fx", "passes", "export")
# Room -> the rooms that it may import besides those of BASIC; those of a later line, never.
ALLOWED: dict[str, set[str]] = {
    "io": set(),
    "graph": set(),
    "algebra": set(),
    "layers": {"graph"},
    "frontend": {"graph", "layers"},
    "affine": {"graph", "algebra", "layers"},
    "adapters": {"graph", "algebra", "layers"},
    "kinds": {"algebra", "adapters"},
    "injection": {"graph", "algebra", "layers", "adapters"},
    "reference": {"graph", "algebra", "layers", "adapters", "injection"},
    "branch_lowering": {"graph", "layers", "injection"},
    "passes": {"graph", "layers", "affine", "algebra", "adapters", "injection", "branch_lowering"},
}
ALLOWED["formats"] = {"io", "graph", "algebra", "layers", "adapters", "kinds"}
ALLOWED["traced_adapters"] = ALLOWED["passes"] - {"branch_lowering"} | {"frontend", "formats"}
ALLOWED["tasks"] = {"io", "graph", "frontend", "formats"}
ALLOWED["report"] = {"io", *ALLOWED["passes"], "reference", "passes", "explanation"}
ALLOWED["export"] = {*ALLOWED, "frontend", "reference", "explanation"} - {
    "kinds",
    "formats",
    "traced_adapters",
    "tasks",
}
FREE = {"api", "cli", "demo", "explanation", "testing", "__init__", "__main__"}  # any room
BASIC = {"choices", "errors", "numerics", "tables"}  # what any room may import
LOOSE = {"__init__", "__main__", "api", "explanation", *BASIC}
ONNX = {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}
HEAVY = ONNX | {"transformers", "peft"}


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path, at_module_level: bool = False) -> tuple[ast.Import | ast.ImportFrom, ...]:
    tree = parsed(path)
    nodes = module_level(tree) if at_module_level else ast.walk(tree)
    return tuple(node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))


def imported(nodes: Iterable[ast.Import | ast.ImportFrom]) -> Iterator[str]:
    """Every module name that is imported, `from a import b` as both `a` and `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or "."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: not those in functions, nor under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(rooms: tuple[str, ...], banned: set[str], at_module_level: bool = False) -> list[str]:
    found = []
    for path in sources(*rooms):
        known = imported(imports(path, at_module_level))
        names = sorted({name for name in known if within(name, banned)})
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names]
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "lora_fx" else parts[1].removesuffix(".py")


def arrows(room: str) -> Iterator[tuple[str, str]]:
    """Each file of a room, and each room that it imports when it is imported itself."""
    rooms = {*ALLOWED, *FREE, *LOOSE}
    for path in sources(*ROOMS):
        if room_of(path) != room:
            continue
        for name in imported(imports(path, at_module_level=True)):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0] if top == "lora_fx" else ""
            if other in rooms - {room}:
                yield str(path.relative_to(ROOT)), other


def test_the_table_names_every_room() -> None:
    assert {room_of(path) for path in sources(*ROOMS)} == {*ALLOWED, *FREE, *LOOSE}
    assert {path.stem for path in (ROOT / "lora_fx").glob("*.py")} == LOOSE


def test_the_order_of_the_table_is_one() -> None:
    above: set[str] = set()
    for room, allowed in ALLOWED.items():
        assert allowed - FREE <= above, f"{room} may import what stands below it"
        above.add(room)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_those_that_the_table_says(room: str) -> None:
    known = ALLOWED[room] | BASIC
    assert [arrow for arrow in arrows(room) if arrow[1] not in known] == []


def test_what_any_room_may_import_imports_no_room() -> None:
    assert [arrow for name in BASIC for arrow in arrows(name) if arrow[1] not in BASIC] == []
    assert set(dict(arrows("kinds")).values()) >= {"adapters"}, "the control: arrows are seen"


def imports_of_files() -> dict[str, set[str]]:
    """Every file, and the files that it imports when it is imported itself."""
    names: dict[str, Path] = {}
    for path in sources(*ROOMS):
        inside = path.relative_to(ROOT).with_suffix("")
        parts = [part for part in inside.parts if part != "__init__"]
        names[".".join(parts if parts[0] == "lora_fx" else ["lora_fx", *parts])] = path
    return {
        name: {
            other
            for other in imported(imports(path, at_module_level=True))
            if other in names and other != name and not name.startswith(f"{other}.")
        }
        for name, path in names.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names in a circle, and what leads to one: what is left when all leaves are gone."""
    left = {name: set(others) for name, others in graph.items()}
    while leaves := {name for name, others in left.items() if not others}:
        left = {name: others - leaves for name, others in left.items() if name not in leaves}
    return sorted(left)


def test_no_files_form_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]
    graph = imports_of_files()
    assert "lora_fx.graph.ops" in graph["lora_fx.graph.editor"] | graph["lora_fx.layers.sites"]
    assert circle(graph) == []


def test_only_export_imports_onnx() -> None:
    assert offences(("lora_fx", "passes"), ONNX) == []
    assert offences(("export",), ONNX), "the control: export must be seen importing onnx"


def test_core_does_not_import_passes_or_export_at_module_level() -> None:
    assert offences(("lora_fx",), {"lora_fx.passes", "lora_fx.export"}, at_module_level=True) == []


def test_the_rooms_of_tasks_and_of_traced_adapters_alone_know_transformers_and_peft() -> None:
    apart = ("tasks", "traced_adapters", "passes", "export")
    rooms = [room for room in ALLOWED if room not in apart]
    rest = [f"lora_fx/{room}" for room in rooms] + ["lora_fx/cli", "passes", "export"]
    assert offences(tuple(rest), {"transformers", "peft", "diffusers"}) == []
    assert offences(("lora_fx/tasks",), {"transformers"}) != []
    assert offences(("lora_fx/tasks",), {"diffusers"}) != []
    assert offences(("lora_fx/tasks",), {"peft"}) == []
    assert offences(("lora_fx/traced_adapters",), {"peft"}) != []


def test_core_runs_without_transformers_and_peft_at_module_level() -> None:
    assert offences(ROOMS, {"transformers", "peft", "diffusers"}, at_module_level=True) == []


def test_passes_do_not_import_export() -> None:
    assert offences(("passes",), {"lora_fx.export"}) == []


def test_every_import_is_absolute_and_by_the_installed_name() -> None:
    assert offences(ROOMS, {"passes", "export"}) == []
    relative = [
        str(path)
        for path in sources(*ROOMS)
        for node in imports(path)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def direct_mutations(source: str) -> list[str]:
    """Calls and attributes by which code changes a graph or a tensor behind the editor's back."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in {"call_function", "data"}:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Name) and node.id == "setattr":
            found.append(node.id)
    return found


def test_passes_mutate_through_the_editor_only() -> None:
    assert direct_mutations("gm.graph.call_function(f)\nsetattr(gm, 'w', w)\nw.data += 1")
    assert {str(path): direct_mutations(path.read_text()) for path in sources("passes")} == {
        str(path): [] for path in sources("passes")
    }


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_lora_fx_loads_nothing_heavy() -> None:
    code = "import lora_fx, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run_python(code).split())
    assert "lora_fx" in loaded
    assert loaded & HEAVY == set()


def test_loading_the_command_line_loads_nothing_heavy() -> None:
    code = "import lora_fx.cli, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run_python(code).split())
    assert loaded & HEAVY == set()


def test_what_merges_and_runs_files_loads_nothing_that_traces() -> None:
    code = "from lora_fx.export import {}; import sys; print('torch._dynamo' in sys.modules)"
    assert run_python(code.format("merge_onnx, export_adapter, add_lora, Session")) == "False\n"
    assert run_python(code.format("to_onnx")) == "True\n", "the control: a tracer is seen"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree = tmp_path_factory.mktemp("tree")
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tree / "dist")]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tree)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_lora_fx_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not re.fullmatch(r"lora_fx-[\d.]+\.dist-info", top)} == {
        "lora_fx"
    }


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT)).replace(f"{room}/", f"{prefix}/", 1)
        for room, prefix in zip(ROOMS, ("lora_fx", "lora_fx/passes", "lora_fx/export"), strict=True)
        for path in sources(room)
    }
    assert expected | {"lora_fx/py.typed", "lora_fx/report/page.html"} <= set(wheel.namelist())


def test_no_file_names_a_path_of_one_machine() -> None:
    homes = "|".join(("home", "root", "work", "Users", "opt"))
    pattern = re.compile(rf"(?<![\w.}}/])/(?:{homes})/")
    assert pattern.search("see /" + "home/somebody")
    tops = [*ROOT.glob("*.*"), ROOT / "Makefile", ROOT / ".gitignore"]
    trees = [p for r in (*ROOMS, "tests", "benchmarks", ".ci") for p in (ROOT / r).rglob("*")]
    files = [p for p in (*tops, *trees) if p.is_file() and "__pycache__" not in p.parts]
    texts = {str(p.relative_to(ROOT)): p.read_text(errors="replace") for p in files}
    assert [name for name, text in texts.items() if pattern.search(text)] == []
