"""What trainers call the layers of diffusion models that diffusers calls otherwise.

Where the end of a name is the model's own, nothing stands here: `lora_fx.layers.resolve` finds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product

from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meaning

# Theirs = ours, | before another name of either; under a common beginning, if indented. # is a
# number, @ any path. What has + has the rows of all, one below the other. After ~ the halves are
# swapped, where there are two: diffusers has scale and shift of a last norm in the other order.
# Sources: flux and flux2 of Black Forest Labs, x-flux of XLabs, sgm and sd3 of Stability, Wan2.1,
# Z-Image.
_TABLE = """
double_blocks.# = transformer_blocks.#
  img_attn.qkv | processor.qkv_lora1 = attn.to_q + attn.to_k + attn.to_v
  txt_attn.qkv | processor.qkv_lora2 = attn.add_q_proj + attn.add_k_proj + attn.add_v_proj
  img_attn.proj | processor.proj_lora1 = attn.to_out.0
  txt_attn.proj | processor.proj_lora2 = attn.to_add_out
  img_attn.norm.query_norm = attn.norm_q
  img_attn.norm.key_norm = attn.norm_k
  txt_attn.norm.query_norm = attn.norm_added_q
  txt_attn.norm.key_norm = attn.norm_added_k
  img_mlp.0 = ff.net.0.proj | ff.linear_in
  img_mlp.2 = ff.net.2 | ff.linear_out
  txt_mlp.0 = ff_context.net.0.proj | ff_context.linear_in
  txt_mlp.2 = ff_context.net.2 | ff_context.linear_out
  img_mod.lin = norm1.linear
  txt_mod.lin = norm1_context.linear
single_blocks.# = single_transformer_blocks.#
  linear1 = attn.to_q + attn.to_k + attn.to_v + proj_mlp | attn.to_qkv_mlp_proj
  linear2 = proj_out | attn.to_out
  processor.qkv_lora = attn.to_q + attn.to_k + attn.to_v
  processor.proj_lora = proj_out
  norm.query_norm = attn.norm_q
  norm.key_norm = attn.norm_k
  modulation.lin = norm.linear
double_stream_modulation_img.lin = double_stream_modulation_img.linear
double_stream_modulation_txt.lin = double_stream_modulation_txt.linear
single_stream_modulation.lin = single_stream_modulation.linear
img_in = x_embedder
txt_in = context_embedder
time_in.in_layer | t_embedder.mlp.0 = @.timestep_embedder.linear_1
time_in.out_layer | t_embedder.mlp.2 = @.timestep_embedder.linear_2
guidance_in.in_layer = @.guidance_embedder.linear_1
guidance_in.out_layer = @.guidance_embedder.linear_2
vector_in.in_layer | y_embedder.mlp.0 = @.text_embedder.linear_1
vector_in.out_layer | y_embedder.mlp.2 = @.text_embedder.linear_2
final_layer.linear = proj_out | all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 = ~norm_out.linear | all_final_layer.2-1.adaLN_modulation.1
joint_blocks.# = transformer_blocks.#
  x_block.attn.qkv = attn.to_q + attn.to_k + attn.to_v
  x_block.attn2.qkv = attn2.to_q + attn2.to_k + attn2.to_v
  context_block.attn.qkv = attn.add_q_proj + attn.add_k_proj + attn.add_v_proj
  x_block.attn.proj = attn.to_out.0
  x_block.attn2.proj = attn2.to_out.0
  context_block.attn.proj = attn.to_add_out
  x_block.mlp.fc1 = ff.net.0.proj
  x_block.mlp.fc2 = ff.net.2
  context_block.mlp.fc1 = ff_context.net.0.proj
  context_block.mlp.fc2 = ff_context.net.2
  x_block.adaLN_modulation.1 = norm1.linear
  context_block.adaLN_modulation.1 = ~norm1_context.linear
x_embedder.proj = pos_embed.proj
blocks.#.self_attn = blocks.#.attn1
  q = to_q
  k = to_k
  v = to_v
  o = to_out.0
  norm_q = norm_q
  norm_k = norm_k
blocks.#.cross_attn = blocks.#.attn2
  q = to_q
  k = to_k
  v = to_v
  o = to_out.0
  k_img = add_k_proj
  v_img = add_v_proj
  norm_q = norm_q
  norm_k = norm_k
  norm_k_img = norm_added_k
blocks.#.norm3 = blocks.#.norm2
blocks.#.ffn.0 = blocks.#.ffn.net.0.proj
blocks.#.ffn.2 = blocks.#.ffn.net.2
time_embedding.0 = condition_embedder.time_embedder.linear_1
time_embedding.2 = condition_embedder.time_embedder.linear_2
time_projection.1 = condition_embedder.time_proj
text_embedding.0 = condition_embedder.text_embedder.linear_1
text_embedding.2 = condition_embedder.text_embedder.linear_2
img_emb = condition_embedder.image_embedder
  proj.0 = norm1
  proj.1 = ff.net.0.proj
  proj.3 = ff.net.2
  proj.4 = norm2
head.head = proj_out
@.attention.qkv = @.attention.to_q + @.attention.to_k + @.attention.to_v
@.attention.out = @.attention.to_out.0
@.attention.q_norm = @.attention.norm_q
@.attention.k_norm = @.attention.norm_k
x_embedder = all_x_embedder.2-1
time_embed.0 = time_embedding.linear_1
time_embed.2 = time_embedding.linear_2
label_emb.0.0 = add_embedding.linear_1
label_emb.0.2 = add_embedding.linear_2
input_blocks.0.0 = conv_in
out.0 = conv_norm_out
out.2 = conv_out
"""
# Of the UNet that Stability's sgm has: diffusers' names of a resnet's layers.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(.*?)(down|up|mid)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)$")
_FIRST = "down", "0", "resnets"
Line = tuple[str, list[str]]


def names_of(base: BaseLayers) -> dict[str, Meaning]:
    """The names that trainers have for the layers of a base, if it is a model of diffusers."""
    found = dict(_of_unet(base))
    for theirs, several in _lines():
        for name, meaning in _of_line(theirs, several, base):
            found.setdefault(name, meaning)
    return found


def _lines() -> Iterator[Line]:
    """Each line with its beginning: theirs, and ours, whose rows follow each other."""
    rows = _TABLE.strip().splitlines()
    left = right = ""
    for row, following in zip(rows, [*rows[1:], ""], strict=True):
        theirs, ours = row.strip().split(" = ")
        if not row.startswith(" "):
            left = right = ""
        if following.startswith(" ") and not row.startswith(" "):
            left, right = f"{theirs}.", f"{ours}."
            continue
        for name, alternative in product(theirs.split(" | "), ours.split(" | ")):
            mark = "~" * alternative.startswith("~")
            several = alternative.removeprefix("~").split(" + ")
            yield left + name, [mark + right + path for path in several]


def _of_line(theirs: str, several: list[str], base: BaseLayers) -> Iterator[tuple[str, Meaning]]:
    swapped = several[0].startswith("~")
    ours = [path.removeprefix("~") for path in several]
    first = re.compile(rf"(?:^|(?<=\.)){_regex(ours[0])}$")
    for path in base:
        match = first.search(path)
        if match is None:
            continue
        start, values = path[: match.start()], match.groups()
        paths = tuple(start + _filled(pattern, values) for pattern in ours)
        if all(other in base for other in paths):
            shape = base[path].own_shape
            swaps = swapped and shape[0] == 2 * shape[1]
            yield start + _filled(theirs, values), Meaning(paths, halves_swapped=swaps)


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\#", r"(\d+)").replace("@", "(.+)")


def _filled(pattern: str, values: Sequence[str]) -> str:
    left = iter(values)
    return re.sub("[#@]", lambda _: next(left), pattern)


def _of_unet(base: BaseLayers) -> Iterator[tuple[str, Meaning]]:
    """The blocks of a UNet, which sgm counts through: resnets with attention, and samplers."""
    blocks = {path: match.groups() for path in base if (match := _BLOCK.match(path))}
    each = len({at for _, side, i, what, at, _ in blocks.values() if (side, i, what) == _FIRST})
    attended = {(side, i) for _, side, i, what, *_ in blocks.values() if what == "attentions"}
    for path, (start, side, block, what, at, rest) in blocks.items():
        first = int(block or 0) * (each + 1)
        last = f"{2 if (side, block) in attended else 1}.conv"
        name = {
            ("down", "resnets"): f"input_blocks.{first + int(at) + 1}.0.{_RESNET.get(rest)}",
            ("down", "attentions"): f"input_blocks.{first + int(at) + 1}.1.{rest}",
            ("down", "downsamplers"): f"input_blocks.{first + each + 1}.0.op",
            ("mid", "resnets"): f"middle_block.{2 * int(at)}.{_RESNET.get(rest)}",
            ("mid", "attentions"): f"middle_block.{2 * int(at) + 1}.{rest}",
            ("up", "resnets"): f"output_blocks.{first + int(at)}.0.{_RESNET.get(rest)}",
            ("up", "attentions"): f"output_blocks.{first + int(at)}.1.{rest}",
            ("up", "upsamplers"): f"output_blocks.{first + each}.{last}",
        }.get((side, what))
        if name is not None and each:
            yield start + name, Meaning((path,))
