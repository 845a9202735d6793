"""What the conversion of an adapter to plain LoRA gives, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lora_fx.adapters.adapter import Adapter


class Layered(NamedTuple):
    """What became of one layer.

    Attributes:
        kind: of the update that it had; ``"replaced"`` where the whole weight was.
        rank: of its LoRA, of each expert where there are several.
        error: the Frobenius norm of what the LoRA leaves of W' - W over that of W' - W, the
            rounding of its factors included; 0 where these are the adapter's own.
    """

    kind: str
    rank: int
    error: float

    @property
    def energy(self) -> float:
        """The fraction of the squared Frobenius norm of W' - W that is held."""
        return max(0.0, 1 - self.error**2)


class Converted(NamedTuple):
    """What `Adapter.to_lora` gives.

    Attributes:
        adapter: of plain LoRA.
        layers: path -> what became of the layer.
        stayed: what is in the adapter as it was, since it is no update of a matrix -> why.
    """

    adapter: Adapter
    layers: Mapping[str, Layered]
    stayed: Mapping[str, str]

    @property
    def errors(self) -> dict[str, float]:
        """Path -> the relative error of the layer."""
        return {path: layer.error for path, layer in self.layers.items()}

    def to_dict(self) -> dict[str, object]:
        """The report as JSON has it."""
        layers = {path: {**n._asdict(), "energy": n.energy} for path, n in self.layers.items()}
        return {"layers": layers, "stayed": dict(self.stayed)}

    def __str__(self) -> str:
        """One line a layer: path, what it was, rank, error, energy; then what stayed."""
        lines = [f"adapter {self.adapter.name} as LoRA: {len(self.layers)} layers"]
        for path, (kind, rank, error) in self.layers.items():
            energy = self.layers[path].energy
            lines += [f"  {path}  {kind} -> rank {rank}  error {error:.2e}  energy {energy:.6f}"]
        lines += [f"  {name}  as it was: {why}" for name, why in self.stayed.items()]
        return "\n".join(lines)
