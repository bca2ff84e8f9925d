"""Weights laid out once as oneDNN reads them, instead of at every product.

`torch.nn.Linear` in float32 on a processor copies its weights into blocks each time it is called. For the few rows of
a decoding step that takes longer than the products. What oneDNN does with blocks made beforehand waits for
memory alone up to about eight rows, and a row comes out with the same bits however many others there are.
Only float32 is laid out so: bfloat16 is another kernel, not measured yet.
"""

from __future__ import annotations

from typing import Any, cast

import torch


class Prepacked(torch.nn.Linear):
    """A linear layer whose weights are in oneDNN's layout.

    Args:
        linear: The layer to take over, in float32 on a processor.
        keeps_weight: Whether the plain weights stay readable beside the blocks; else `weight` is empty.
    """

    def __init__(self, linear: torch.nn.Linear, *, keeps_weight: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._blocks: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = linear.weight if keeps_weight else torch.nn.Parameter(linear.weight.new_empty(0))
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the products of the rows of an input, shape (..., in_features), with the weights."""
        pointwise: Any = torch.ops.mkldnn._linear_pointwise
        return cast("torch.Tensor", pointwise(input, self._blocks, self.bias, "none", [], ""))


def has_onednn() -> bool:
    """Return True if this build of torch has oneDNN."""
    return bool(cast("Any", torch.backends.mkldnn).is_available())


def prepack(model: Any) -> None:
    """Lay out the linear layers of a model of `transformers` anew, one by one, if it is float32 on a processor.

    The output layer keeps its plain weights too: they may be those of the input embeddings.
    """
    if model.dtype != torch.float32 or model.device.type != "cpu" or not has_onednn():
        return
    head = model.get_output_embeddings()
    # without the layers themselves: held in this list, none would be freed before all are laid out
    parents = [module for module in model.modules() if type(module) is not torch.nn.Linear]
    for parent in parents:
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                setattr(parent, name, Prepacked(layer, keeps_weight=layer is head))
