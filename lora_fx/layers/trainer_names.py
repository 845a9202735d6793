"""What trainers call the layers of models that diffusers, or transformers, calls otherwise.

Where the end of a name is the model's own, nothing stands here: `lora_fx.layers.resolve` finds it.
A trainer's name is one as a whole: a name that shares only its end is of another model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product

from lora_fx.errors import AdapterError, shorten
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.meanings import Meaning

# Theirs = ours, or a name that is both; | before another name of either; under a common beginning,
# if indented. # is a number, @ any path, [one other] each of its words, all of a row's in step.
# What has + has the rows of all, one below the other. After ~ the halves are swapped, where there
# are two: diffusers has scale and shift of a last norm in the other order. After ~~ they are
# swapped whatever the layer reads: it is a gated one. What has ? before it is not meant, but has to
# be there: it tells a model from another of the same names.
# Sources: flux and flux2 of Black Forest Labs, x-flux of XLabs, sgm and sd3 of Stability, Wan2.1,
# Z-Image, HunyuanVideo, Lumina2, LTX, Chroma, AuraFlow, Cosmos (Anima), Mochi, Krea2, Ideogram4,
# flux3, VACE of Wan, Sana, ACE-Step, MiniMax-H3.
TABLE = """
double_blocks.# = transformer_blocks.#
  img_attn.qkv | processor.qkv_lora1 = attn.to_q + attn.to_k + attn.to_v
  txt_attn.qkv | processor.qkv_lora2 = attn.add_q_proj + attn.add_k_proj + attn.add_v_proj
  img_attn.proj | processor.proj_lora1 = attn.to_out.0
  txt_attn.proj | processor.proj_lora2 = attn.to_add_out
  img_attn.norm.[query_norm key_norm] = attn.[norm_q norm_k]
  txt_attn.norm.[query_norm key_norm] = attn.[norm_added_q norm_added_k]
  [img txt]_mlp.0 = [ff ff_context].net.0.proj | [ff ff_context].linear_in
  [img txt]_mlp.2 = [ff ff_context].net.2 | [ff ff_context].linear_out
  [img txt]_mlp.fc1 = [ff ff_context].net.0.proj
  [img txt]_mlp.fc2 = [ff ff_context].net.2
  [img txt]_mod.lin | [img txt]_mod.linear = [norm1 norm1_context].linear
single_blocks.# = single_transformer_blocks.#
  linear1 = attn.to_q + attn.to_k + attn.to_v + proj_mlp | attn.to_qkv_mlp_proj
  linear2 = proj_out | attn.to_out
  processor.qkv_lora = attn.to_q + attn.to_k + attn.to_v
  processor.proj_lora = proj_out
  norm.[query_norm key_norm] = attn.[norm_q norm_k]
  modulation.lin | modulation.linear = norm.linear
double_stream_modulation_[img txt].lin = double_stream_modulation_[img txt].linear
single_stream_modulation.lin = single_stream_modulation.linear
[img txt]_in = [x context]_embedder
time_in.[in out]_layer = @.timestep_embedder.linear_[1 2]
t_embedder.mlp.[0 2] = @.timestep_embedder.linear_[1 2]
guidance_in.[in out]_layer = @.guidance_embedder.linear_[1 2]
vector_in.[in out]_layer | y_embedder.mlp.[0 2] = @.text_embedder.linear_[1 2]
final_layer.linear = proj_out | all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 = ~norm_out.linear | all_final_layer.2-1.adaLN_modulation.1
joint_blocks.# = transformer_blocks.#
  x_block.[attn attn2].qkv = [attn attn2].to_q + [attn attn2].to_k + [attn attn2].to_v
  x_block.[attn attn2].proj = [attn attn2].to_out.0
  context_block.attn.qkv = attn.add_q_proj + attn.add_k_proj + attn.add_v_proj
  context_block.attn.proj = attn.to_add_out
  [x context]_block.mlp.fc1 = [ff ff_context].net.0.proj
  [x context]_block.mlp.fc2 = [ff ff_context].net.2
  x_block.adaLN_modulation.1 = norm1.linear
  context_block.adaLN_modulation.1 = ~norm1_context.linear
x_embedder.proj = pos_embed.proj
blocks.#.[self cross]_attn = blocks.#.[attn1 attn2]
  [q k v o] = [to_q to_k to_v to_out.0]
  norm_[q k]
blocks.#.cross_attn = blocks.#.attn2
  [k v]_img = add_[k v]_proj
  norm_k_img = norm_added_k
blocks.#.norm3 = blocks.#.norm2
blocks.#.ffn.[0 2] = blocks.#.ffn.net.[0.proj 2]
vace_blocks.#.[self cross]_attn = vace_blocks.#.[attn1 attn2]
  [q k v o] = [to_q to_k to_v to_out.0]
  norm_[q k]
vace_blocks.#
  norm3 = norm2
  ffn.[0 2] = ffn.net.[0.proj 2]
  [before after]_proj = proj_[in out]
time_embedding.[0 2] = condition_embedder.time_embedder.linear_[1 2]
time_projection.1 = condition_embedder.time_proj
text_embedding.[0 2] = condition_embedder.text_embedder.linear_[1 2]
img_emb.proj.[0 1 3 4] = condition_embedder.image_embedder.[norm1 ff.net.0.proj ff.net.2 norm2]
head.head = proj_out
@.attention.qkv = @.attention.to_q + @.attention.to_k + @.attention.to_v
@.attention.out | @.attention.o = @.attention.to_out.0
@.attention.[q k]_norm = @.attention.norm_[q k]
x_embedder = all_x_embedder.2-1
txt_in.individual_token_refiner.blocks.# = context_embedder.token_refiner.refiner_blocks.#
  self_attn_qkv = attn.to_q + attn.to_k + attn.to_v
  self_attn_proj = attn.to_out.0
  mlp.[fc1 fc2] = ff.net.[0.proj 2]
  adaLN_modulation.1 = norm_out.linear
txt_in = context_embedder
  input_embedder = proj_in
  t_embedder.mlp.[0 2] = time_text_embed.timestep_embedder.linear_[1 2]
  c_embedder.linear_[1 2] = time_text_embed.text_embedder.linear_[1 2]
img_in.proj = x_embedder.proj
time_in.mlp.[0 2] = time_text_embed.timestep_embedder.linear_[1 2]
guidance_in.mlp.[0 2] = time_text_embed.guidance_embedder.linear_[1 2]
vector_in.[in out]_layer = time_text_embed.text_embedder.linear_[1 2]
[layers noise_refiner context_refiner].#
  attention.qkv = attn.to_q + attn.to_k + attn.to_v
  attention.out = attn.to_out.0
  attention.[q k]_norm = attn.norm_[q k]
  feed_forward.w[1 2 3] = feed_forward.linear_[1 2 3]
[layers noise_refiner].#.adaLN_modulation.1 = [layers noise_refiner].#.norm1.linear
cap_embedder.1 = time_caption_embed.caption_embedder.1
final_layer.[linear adaLN_modulation.1] = norm_out.[linear_2 linear_1]
patchify_proj = proj_in
audio_patchify_proj = audio_proj_in
[adaln audio_adaln]_single = [time_embed audio_time_embed]
  linear
  emb.timestep_embedder.linear_[1 2]
[prompt audio_prompt]_adaln_single = [prompt audio_prompt]_adaln
  linear
  emb.timestep_embedder.linear_[1 2]
av_ca_[video audio]_scale_shift_adaln_single = av_cross_attn_[video audio]_scale_shift
  linear
  emb.timestep_embedder.linear_[1 2]
av_ca_[a2v v2a]_gate_adaln_single = av_cross_attn_[video_a2v audio_v2a]_gate
  linear
  emb.timestep_embedder.linear_[1 2]
aggregate_embed = text_proj_in
distilled_guidance_layer.layers.#
  [in out]_layer = linear_[1 2]
double_layers.# = joint_transformer_blocks.#
  attn.w2[q k v o] = attn.[to_q to_k to_v to_out.0]
  attn.w1[q k v o] = attn.[add_q_proj add_k_proj add_v_proj to_add_out]
  mlpX.c_[fc1 fc2 proj] = ff.[linear_1 linear_2 out_projection]
  mlpC.c_[fc1 fc2 proj] = ff_context.[linear_1 linear_2 out_projection]
  [modX modC].1 = [norm1 norm1_context].linear
single_layers.# = single_transformer_blocks.#
  attn.w1[q k v o] = attn.[to_q to_k to_v to_out.0]
  mlp.c_[fc1 fc2 proj] = ff.[linear_1 linear_2 out_projection]
  modCX.1 = norm1.linear
init_x_linear = pos_embed.proj
cond_seq_linear = context_embedder
t_embedder.mlp.[0 2] = time_step_proj.linear_[1 2]
modF.1 = ~norm_out.linear
final_linear = proj_out
blocks.# = transformer_blocks.#
  adaln_modulation_self_attn.[1 2] = norm1.linear_[1 2]
  adaln_modulation_cross_attn.[1 2] = norm2.linear_[1 2]
  adaln_modulation_mlp.[1 2] = norm3.linear_[1 2]
  self_attn.[q_proj k_proj v_proj output_proj] = attn1.[to_q to_k to_v to_out.0]
  cross_attn.[q_proj k_proj v_proj output_proj] = attn2.[to_q to_k to_v to_out.0]
  self_attn.[q k]_norm = attn1.norm_[q k]
  cross_attn.[q k]_norm = attn2.norm_[q k]
  mlp.[layer1 layer2] = ff.net.[0.proj 2]
final_layer.adaln_modulation.[1 2] = norm_out.linear_[1 2]
t_embedder.1.linear_[1 2] = time_embed.t_embedder.linear_[1 2]
x_embedder.proj.1 = patch_embed.proj
blocks.# = transformer_blocks.#
  mod_x = norm1.linear
  mod_y = norm1_context.linear | norm1_context.linear_1
  attn.qkv_x = attn1.to_q + attn1.to_k + attn1.to_v
  attn.qkv_y = attn1.add_q_proj + attn1.add_k_proj + attn1.add_v_proj
  attn.proj_[x y] = attn1.[to_out.0 to_add_out]
  mlp_[x y].w1 = ~~[ff ff_context].net.0.proj
  mlp_[x y].w2 = [ff ff_context].net.2
x_embedder.proj = patch_embed.proj
t5_y_embedder.to_[kv q out] = time_embed.pooler.to_[kv q out]
t5_yproj = time_embed.caption_proj
final_layer.mod = ~norm_out.linear
blocks.# = transformer_blocks.#
  attn.[wq wk wv wo gate] = attn.[to_q to_k to_v to_out.0 to_gate]
  mlp.[gate up down] = ff.[gate up down]
txtfusion.[layerwise refiner]_blocks.# = text_fusion.[layerwise refiner]_blocks.#
  attn.[wq wk wv wo gate] = attn.[to_q to_k to_v to_out.0 to_gate]
  mlp.[gate up down] = ff.[gate up down]
txtfusion.projector = text_fusion.projector
first = img_in
last.linear = final_layer.linear
tmlp.[0 2] = time_embed.linear_[1 2]
tproj.1 = time_mod_proj
txtmlp.[1 3] = txt_in.linear_[1 2]
[content_mode_blocks.@ txt_mode_blocks].# = [mode_blocks.@ txt_mode_blocks].#
  [q_proj k_proj v_proj attn_out] = attn.[to_q to_k to_v to_out.0]
  norm.[query_norm key_norm] = attn.[norm_q norm_k]
  [mlp_in mlp_out] = ff.[linear_in linear_out]
single_blocks.# = single_transformer_blocks.#
  [q_proj k_proj v_proj attn_out] = attn.[to_q to_k to_v to_out.0]
  [mlp_in mlp_out] = ff.[linear_in linear_out]
[early single]_stream_modulations.@.lin = [early single]_stream_modulations.@.linear
emb_in.@ = x_embedders.@
[time ref_time]_in.in_layer = [timestep target_timestep]_embedder.linear_1
[time ref_time]_in.out_layer = [timestep target_timestep]_embedder.linear_2
final_layer.image.linear = proj_out
final_layer.image.adaLN_modulation.1 = ~norm_out.linear
blocks.# = transformer_blocks.#
  attn.qkv = attn1.to_q + attn1.to_k + attn1.to_v
  attn.proj = attn1.to_out.0
  cross_attn.[q_linear proj] = attn2.[to_q to_out.0]
  cross_attn.kv_linear = attn2.to_k + attn2.to_v
  mlp.[inverted depth point]_conv.conv = ff.conv_[inverted depth point]
t_block.1 = time_embed.linear
y_embedder.y_proj.[fc1 fc2] = caption_projection.linear_[1 2]
blocks.# = transformer_blocks.#
  attn.qkv_proj = attn.to_q + attn.to_k + attn.to_v + ?adaln_proj.linear
  attn.out_proj = attn.to_out.0 + ?adaln_proj.linear
  attn.[q k]_norm = attn.norm_[q k] + ?adaln_proj.linear
  mlp.fc1 = ~~ff.net.0.proj + ?adaln_proj.linear
  mlp.fc2 = ff.net.2 + ?adaln_proj.linear
token_refiner.blocks.# = token_refiner.refiner_blocks.#
  attn.qkv_proj = attn.to_q + attn.to_k + attn.to_v
  attn.out_proj = attn.to_out.0
  attn.[q k]_norm = attn.norm_[q k]
  mlp.fc1 = ~~ff.net.0.proj
  mlp.fc2 = ff.net.2
[video audio]_patch_proj = [proj_in audio_proj_in]
condition_proj = context_embedder
time_embedder.proj_[in out] = time_embedder.linear_[1 2]
final_layer.adaln_proj.linear = norm_out.linear + ?audio_proj_out
final_layer.[video audio]_out = [proj_out audio_proj_out]
layers.#.[self cross]_attn = layers.#.[self cross]_attn
  [q_proj k_proj v_proj o_proj] = [to_q to_k to_v to_out.0]
time_embed.[0 2] = time_embedding.linear_[1 2]
label_emb.0.[0 2] = add_embedding.linear_[1 2]
input_blocks.0.0 = conv_in
out.[0 2] = conv_[norm_out out]
"""
# Of llama.cpp and torchtune, for the decoders of transformers.
_DECODERS = """
blk.# = layers.#
  attn_[q k v] = self_attn.[q_proj k_proj v_proj]
  attn_qkv = self_attn.qkv_proj
  attn_output = self_attn.o_proj | self_attn.dense | self_attn.out_proj
  ffn_gate = mlp.gate_proj | feed_forward.w1
  ffn_up = mlp.up_proj | mlp.gate_up_proj | mlp.fc1 | mlp.c_fc | feed_forward.w3
  ffn_down = mlp.down_proj | mlp.fc2 | mlp.c_proj | feed_forward.w2
  ffn_[gate up down]_shexp = mlp.shared_expert.[gate_proj up_proj down_proj]
layers.#
  attn.[q_proj k_proj v_proj output_proj] = self_attn.[q_proj k_proj v_proj o_proj]
  mlp.w[1 2 3] = mlp.[gate_proj down_proj up_proj]
token_embd | tok_embeddings = embed_tokens
output = lm_head
"""
# Models of transformers, and behind : llama.cpp's architecture if that has another name: first
# those of which its converter turns the rows of heads as Meta has them, then those whose matrices
# it leaves as they are. Source: ``conversion/`` of llama.cpp, which was run on each.
_TURNED, _KEPT = (
    {word.partition(":")[0]: word.rpartition(":")[2] for word in words.split()}
    for words in (
        "llama mistral:llama mixtral:llama granite granitemoe olmo smollm3 arcee",
        """qwen2 qwen3 qwen2_moe:qwen2moe qwen3_moe:qwen3moe gemma gemma2 gemma3_text:gemma3 phi3
        phi:phi2 olmo2 olmo3:olmo2 olmoe starcoder2 stablelm cohere:command-r cohere2 glm4 nemotron
        glm:chatglm exaone4 ernie4_5 hunyuan_v1_dense:hunyuan-dense seed_oss apertus lfm2""",
    )
)
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
_WORDS = re.compile(r"\[([^]]+)\]")


def names_of(base: BaseLayers) -> dict[str, Meaning]:
    """The names that trainers have for the layers of a base, if it is a model of diffusers."""
    return _named(TABLE, base, dict(_of_unet(base)))


def names_in_decoder(base: BaseLayers) -> dict[str, Meaning]:
    """The names that llama.cpp and torchtune have for them, if it is a decoder of transformers."""
    return _named(_DECODERS, base, {})


def is_turned(base: BaseLayers, architecture: str | None) -> bool:
    """Whether llama.cpp has the rows of a base's heads in another order.

    Raises:
        AdapterError: the base is no model that llama.cpp calls so, or none that is known.
    """
    kind = getattr(base.config, "model_type", None)
    known = _TURNED | _KEPT
    if kind is None:
        raise AdapterError(
            "has llama.cpp's names, and rows in its order; pass base=, the model of transformers "
            "that it is for"
        )
    if kind not in known or known[kind] != architecture:
        raise AdapterError(
            f"is of llama.cpp's architecture {architecture!r}, the base is a {kind!r}: how they "
            f"belong together is known of {shorten(sorted(known), 40)}; give the PEFT directory "
            "that it was made of, or pass base=, a model of transformers"
        )
    return kind in _TURNED


def _named(table: str, base: BaseLayers, found: dict[str, Meaning]) -> dict[str, Meaning]:
    for theirs, several in _lines(table):
        for name, meaning in _of_line(theirs, several, base):
            found.setdefault(name, meaning)
    return found


def _lines(table: str) -> Iterator[tuple[str, list[str]]]:
    """Each line with its beginning: theirs, and ours, whose rows follow each other."""
    for block in re.split(r"\n(?! )", table.strip()):
        head, *rows = block.splitlines()
        starts = [(f"{one}.", f"{other}.") for one, other in _in_step(head)] if rows else [("", "")]
        for (left, right), row in product(starts, rows or [head]):
            for theirs, ours in _in_step(row.strip()):
                for name, alternative in product(theirs.split(" | "), ours.split(" | ")):
                    mark, several = "~" * alternative.count("~"), alternative.lstrip("~")
                    paths = (path.rpartition("?")[1:] for path in several.split(" + "))
                    yield left + name, [mark + needed + right + path for needed, path in paths]


def _in_step(row: str) -> Iterator[tuple[str, str]]:
    """Theirs and ours of a row, once for each of the words in its brackets."""
    lists = [words.split() for words in _WORDS.findall(row)] or [[""]]
    for words in zip(*lists, strict=True):
        theirs, _, ours = _WORDS.sub("{}", row).format(*words).partition(" = ")
        yield theirs, ours or theirs


def _of_line(theirs: str, several: list[str], base: BaseLayers) -> Iterator[tuple[str, Meaning]]:
    swapped = several[0].count("~")
    ours = [path.lstrip("~?") for path in several]
    meant = len([path for path in several if "?" not in path])
    first = re.compile(rf"(?:^|(?<=\.)){_regex(ours[0])}$")
    least = len(theirs.removeprefix("@.").split("."))
    found: dict[str, list[Meaning]] = defaultdict(list)
    for path in base:
        match = first.search(path)
        if match is None:
            continue
        start, values = path[: match.start()], match.groups()
        paths = tuple(start + _filled(pattern, values) for pattern in ours)
        if all(other in base for other in paths):
            shape = base[path].own_shape
            swaps = swapped == 2 or (swapped == 1 and shape[0] == 2 * shape[1])
            own = Meaning(paths[:meant], halves_swapped=swaps, least=least)
            found[start + _filled(theirs, values)].append(own)
    for name, every in found.items():
        if len(every) == 1:  # what @ left out of the name may tell two layers apart
            yield name, every[0]


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
