"""Trained rows of tables, beside an adapter's layers or alone, and of the heads tied to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.errors import AdapterError, within
from lora_fx.formats.peft.config import PeftConfig, Tensors
from lora_fx.kinds import KINDS
from lora_fx.layers.base_layers import BaseLayers

LEAF = "trainable_tokens_delta"


def read_tokens(rows: Tensors, config: PeftConfig, base: BaseLayers) -> dict[str, AnyUpdate]:
    """Reads the trained rows of every table of a file, and of the heads tied to them.

    Args:
        rows: path of a table -> its trained rows.
        config: which tokens they are.
        base: tells the heads: PEFT trains what ``tie_word_embeddings`` ties, and stores one.

    Raises:
        AdapterError: names the table, and what is wrong with it.
    """
    if config.trainable_token_indices is not None and not rows:
        raise AdapterError(f"trainable_token_indices is there, but no .{LEAF} is")
    updates: dict[str, AnyUpdate] = {}
    for path, own in rows.items():
        indices = _indices(path, config)
        for table in (path, *(tied for tied in base.tied_to(path) if tied not in rows)):
            with within(table):
                tied_to = {} if table == path else {"tied": path}
                updates[table] = read_rows(table, {LEAF: own}, indices, base, **tied_to)
    return updates


def read_rows(
    path: str, tensors: Tensors, indices: Sequence[int], base: BaseLayers, **settings: str
) -> AnyUpdate:
    """Reads the trained rows of one table, or of a head."""
    shape = base.shape_of(path)
    own = {"indices": list(indices), "head": _is_head(path, base)}
    return KINDS["tokens"].read(tensors, own | settings | ({"shape": shape} if shape else {}))


def _is_head(path: str, base: BaseLayers) -> bool:
    """Whether a layer with a row for each token is linear; without a base its name tells."""
    if base.shape_of(path):
        return base[path].is_linear
    return "head" in path.rpartition(".")[2]


def _indices(path: str, config: PeftConfig) -> Sequence[int]:
    tokens = config.trainable_token_indices
    if not isinstance(tokens, Mapping):
        return tokens or ()
    for name, indices in tokens.items():
        if path.endswith(name):
            return indices
    raise AdapterError(
        f"trainable_token_indices names {', '.join(tokens)}, not {path}, of which "
        "there are trained tokens"
    )
