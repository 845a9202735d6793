"""Damage that knows the structure of a file: what a random number makes of good bytes."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

# What no field expects, or all but.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 1 << 31, 1 << 63, 10**30, -(1 << 40), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "../x", "a\0b", "\ud800", "r", "x" * 300, "(.*)*X",
    "all-linear", [], [None], [0], ["fc"], [[[]]], {}, {"a": 1}, {"": None}, "LORA", "F16", "F64",
    "I64", "BOOL",
)  # fmt: skip
NUMBERS = (
    b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0",
    b"\0\0\0\x80",
)  # fmt: skip


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Bytes that were changed, cut, doubled, or are not there, without a word of structure."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        if not made:
            break
        at = draw.randrange(len(made))
        kind = draw.randrange(6)
        if kind == 0:
            made[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            made[at] = draw.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del made[at:]
        elif kind == 3:
            del made[at : at + draw.randrange(1, 16)]
        elif kind == 4:
            made[at:at] = made[at : at + draw.randrange(1, 64)]
        else:
            made[at : at + 4] = struct.pack("<I", draw.choice((0, 1, 1 << 31, (1 << 32) - 1)))
    return bytes(made)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    found, left = [], [tree]
    while left:
        one = left.pop()
        keys = (
            list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        )
        found += [(one, key) for key in keys]
        left += [one[key] for key in keys]
    return found


def changed_tree(tree: Any, draw: random.Random) -> Any:
    """A tree of JSON with some values replaced, taken out, moved, added or nested."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        known = places(tree)
        if not known:
            return draw.choice(VALUES)
        holder, key = draw.choice(known)
        kind = draw.randrange(7)
        if kind <= 2:
            holder[key] = draw.choice(VALUES)
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[draw.choice(("x", "use_dora", "alpha", "", key + "_", "__metadata__"))] = holder[
                key
            ]
        elif kind == 5:
            other, place = draw.choice(known)
            if place in other if isinstance(other, dict) else place < len(other):
                # Copies: nothing may hold itself.
                one, two = copy.deepcopy(holder[key]), copy.deepcopy(other[place])
                holder[key], other[place] = two, one
        else:
            holder[key] = [holder[key]] * draw.randrange(3)
    return tree


def as_json(tree: Any, draw: random.Random) -> bytes:
    text = json.dumps(tree)
    if draw.random() < 0.1 and isinstance(tree, dict) and tree:
        key = draw.choice(list(tree))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(draw.choice(VALUES))}}}"
    return text.encode("utf-8", "surrogatepass")


def config(data: bytes, draw: random.Random) -> bytes:
    """A file of JSON, by its tree or by its bytes."""
    if draw.random() < 0.15:
        return flipped(data, draw)
    return as_json(changed_tree(json.loads(data), draw), draw)


def safetensors(data: bytes, draw: random.Random) -> bytes:
    """A file of tensors: its header, its lengths, its names, its numbers, its bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kind = draw.randrange(8)
    if kind == 0:
        return flipped(data, draw)
    if kind == 1 and len(body) >= 4:
        at = 4 * draw.randrange(len(body) // 4)
        body[at : at + 4] = draw.choice(NUMBERS)
    elif kind == 2:
        names = [name for name in header if name != "__metadata__"]
        header = renamed(header, names, draw)
    elif kind == 3:
        for entry in header.values():
            if "shape" in entry and draw.random() < 0.5:
                entry["shape"] = entry["shape"][::-1]
    elif kind == 4:
        body = bytearray(flipped(bytes(body), draw))
    else:
        header = changed_tree(header, draw)
    text = as_json(header, draw)
    length = len(text) if draw.random() < 0.9 else draw.choice((0, 7, len(text) + 1, 1 << 40))
    return struct.pack("<Q", length & (1 << 64) - 1) + text + bytes(body)


def renamed(header: dict[str, Any], names: list[str], draw: random.Random) -> dict[str, Any]:
    """Some tensor under another name: of another tensor, of another role, of none."""
    old = draw.choice(names)
    swaps = [("lora_A", "lora_B"), ("down", "up"), (".weight", ""), ("fc", "gone"), (".", "..")]
    a, b = draw.choice(swaps)
    new = draw.choice((old.replace(a, b), draw.choice(names), old + ".x", old[1:], "x"))
    return {new if name == old else name: entry for name, entry in header.items()}


def pickle(data: bytes, draw: random.Random) -> bytes:
    """PyTorch's archive: a member of it, or its bytes."""
    if draw.random() < 0.3:
        return flipped(data, draw)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there already
        members = [(item.filename, old.read(item)) for item in old.infolist()]
        at = draw.randrange(len(members))
        if draw.random() < 0.7:
            at = next(n for n, (name, _) in enumerate(members) if name.endswith("data.pkl"))
        name, content = members[at]
        change = draw.randrange(6)
        if change == 4:
            members.append((name, content))
        members[at] = (name + "x", content) if change == 5 else (name, flipped(content, draw))
        with zipfile.ZipFile(out, "w") as new:
            for name, content in members:
                new.writestr(name, content)
    return out.getvalue()


def model(data: bytes, draw: random.Random) -> bytes:
    """An ONNX model: a field of any message in it, its metadata, or its bytes."""
    import onnx

    if draw.random() < 0.25:
        return flipped(data, draw)
    proto = onnx.ModelProto.FromString(data)
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.3 and proto.metadata_props:
            entry = draw.choice(proto.metadata_props)
            try:
                entry.value = as_json(changed_tree(json.loads(entry.value), draw), draw).decode()
            except ValueError:
                entry.value = draw.choice(("", "{}", "[]", "x" * 70, entry.value[1:]))
        else:
            change_message(proto, draw)
    return proto.SerializeToString()


def change_message(message: Any, draw: random.Random) -> None:
    """Goes down to some field of some message, and puts another value there."""
    for _ in range(30):
        fields = message.ListFields()
        if not fields:
            return
        field, value = draw.choice(fields)
        repeated = hasattr(value, "append") or hasattr(value, "add")
        if field.message_type is not None:
            chosen = draw.choice(list(value)) if repeated else value
            if draw.random() < 0.12:
                if repeated and draw.random() < 0.5:
                    value.add().CopyFrom(chosen)
                elif repeated:
                    del value[draw.randrange(len(value))]
                else:
                    message.ClearField(field.name)
                return
            message = chosen
            continue
        other = odd(field, draw)
        try:
            if repeated:
                value[draw.randrange(len(value))] = other
            else:
                setattr(message, field.name, other)
        except (ValueError, TypeError):  # out of the range of its type
            pass
        return


def odd(field: Any, draw: random.Random) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        words = (
            "",
            "a",
            "x",
            "../x",
            "/etc/passwd",
            "a\0b",
            "-1",
            "9" * 40,
            "fc.weight",
            "fc.lora_A",
        )
        word = draw.choice(words)
        return word.encode() if field.type == field.TYPE_BYTES else word
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return draw.choice((0.0, -1.0, 1e30, float("nan")))
    return draw.choice((0, 1, 2, -1, 7, 99, (1 << 31) - 1, 1 << 62, -(1 << 31)))


MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": config, ".safetensors": safetensors, ".bin": pickle, ".pt": pickle, ".onnx": model,
    ".data": flipped, ".onnx_adapter": flipped,
}  # fmt: skip
