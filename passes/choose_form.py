"""Computes each branch in the form that costs least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_fx.branch_lowering import forms
from lora_fx.branch_lowering.emit_form import emit
from lora_fx.branch_lowering.selection import TOKENS, Form, choices
from lora_fx.choices import Target, check_choice
from lora_fx.errors import PassError
from lora_fx.graph.constants import Constants
from lora_fx.graph.editor import Editor
from lora_fx.graph.pass_base import Pass


@dataclass(frozen=True)
class ChooseForm(Pass):
    """``add(linear(x, W, b), matmul(matmul(x, A), B))  ->  linear(cat([x, x A]), [W; B], b)``.

    Or another form of `branch_lowering.forms`, whichever costs least: several branches of a layer
    as one, one shrink for all layers that read one x, the bias as a row of B that a column of ones
    meets, and for slots (``target="input"``) ``x (W + A B)`` where x has enough rows for sure.
    New weights are computed when they are read, the scale folded in.

    For inference: a parameter that is being trained is read as it is now. `UnfoldLora` gives back
    the graph as it was, and `FoldLora` folds every form; `StripLora` and `branches` know the
    factored form alone, so this is the last pass before an export, which applies it by itself.
    Leaves alone what is not a plain branch beside a linear layer, and a weight that others read.

    Attributes:
        target: ``"constant"``, or ``"input"`` where A and B are given at each call.
        tokens: what the rows of an activation are taken to be where they are not known.
        form: of all layers that can have it, whatever it costs; the cheapest by default.
        share: whether layers that read one x may share a shrink.
    """

    target: Target = "constant"
    tokens: int = TOKENS
    form: Form | None = None
    share: bool = True

    @torch.no_grad()
    def rewrite(self, editor: Editor) -> None:
        """Rewrites the layers of one x after those of another."""
        check_choice("target=", self.target, Target, PassError)
        if self.form is not None and self.form.kind not in forms.CONSTANT | forms.SLOTS:
            known = ", ".join(forms.CONSTANT | forms.SLOTS)
            raise PassError(f"form={self.form.kind!r}: expected one of {known}")
        constants = Constants(editor.gm)
        for group in choices(editor.gm, self.target, self.tokens, self.form, self.share):
            for member, new in emit(editor, constants, group):
                editor.remember(new, member.out)
                editor.replace(member.out, new)
                editor.record("choose", member.site.path, group.why(member))
