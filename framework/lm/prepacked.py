"""Weights laid out once as a processor's matrix products read them; `torch.nn.Linear` does it in each call.

`Prepacked` has them in half precision as FBGEMM reads them, its activations and sums stay in float32. A decoding step
waits for memory, and float16 is half as much to read. Rounding a weight to float16 changes it by at most one part in
2,048, an eighth of what bfloat16 does. A row has the same bits however many others there are: with AVX2, FBGEMM sums in
another order where one or two rows are left over, so rows come in multiples of six.

`Blocked` has bfloat16 weights as oneDNN reads them with AMX.

Laying them out takes seconds when a model is loaded, and memory of the process's own: plain weights are those of the
file, which all processes share. How fast a model answers is printed by `preceptor bench engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, cast

import torch

ROWS: Final = 6
"""Rows of FBGEMM's largest kernel for processors with AVX2."""

_EXPECTED: Final = 384
"""Rows that oneDNN lays weights out for: those of a packed pass. Fewer are multiplied as fast."""


class Prepacked(torch.nn.Linear):
    """A linear layer whose weights are float16, in FBGEMM's layout.

    Args:
        linear: The layer to take over, in float32 on a processor.
        keeps_weight: Whether the plain weights stay readable beside the layout; else `weight` is empty.
    """

    def __init__(self, linear: torch.nn.Linear, *, keeps_weight: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = cast("torch.Tensor | None", linear.bias)  # torch says it is always there
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(linear.weight, bias)
        self.weight = linear.weight if keeps_weight else torch.nn.Parameter(linear.weight.new_empty(0))
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the products of the rows of an input, shape (..., in_features), with the weights, in float32."""
        multiply: Any = torch.ops.quantized.linear_dynamic_fp16
        rows = input.reshape(-1, self.in_features)
        missing = -len(rows) % ROWS
        filled = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        products: torch.Tensor = multiply(filled, self._packed)
        return products[: len(rows)].reshape(*input.shape[:-1], self.out_features)


class Blocked(torch.nn.Linear):
    """A linear layer whose bfloat16 weights are in oneDNN's layout.

    Args:
        linear: The layer to take over, in bfloat16 on a processor with AMX.
        keeps_weight: As of `Prepacked`.
    """

    def __init__(self, linear: torch.nn.Linear, *, keeps_weight: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        lay_out: Any = torch.ops.mkldnn._reorder_linear_weight
        self._packed: torch.Tensor = lay_out(linear.weight.detach(), _EXPECTED)
        self.weight = linear.weight if keeps_weight else torch.nn.Parameter(linear.weight.new_empty(0))
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the products of the rows of an input, shape (..., in_features), with the weights, in bfloat16."""
        multiply: Any = torch.ops.mkldnn._linear_pointwise
        products: torch.Tensor = multiply(input, self._packed, self.bias, "none", [], "")
        return products


def has_amx() -> bool:
    """Return True if this processor multiplies tiles of bfloat16 matrices, and torch has oneDNN to have it do so."""
    onednn: Any = torch.backends.mkldnn
    return torch.cpu._is_amx_tile_supported() and bool(onednn.is_available())


def has_fbgemm() -> bool:
    """Return True if torch has FBGEMM here and a row's products are the same, to the bit, beside any others."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    generator = torch.Generator().manual_seed(0)
    plain = torch.nn.Linear(192, 64, bias=False)
    plain.weight.data.normal_(generator=generator)
    layer, rows = Prepacked(plain), torch.randn(384, 192, generator=generator)
    together = layer(rows)
    return all(torch.equal(layer(rows[-count:]), together[-count:]) for count in (*range(1, 49), 96, 126, 200))


def prepacked(model: Any) -> Any:
    """Return a model of `transformers` on a processor in float32, its linear layers laid out anew if torch has FBGEMM.

    One layer after the other, so that a model stored in half precision is never held as a whole in float32. The
    output layer keeps its plain weights too: they may be those of the input embeddings.
    """
    if not has_fbgemm():
        return model.float()

    def whole(layer: torch.nn.Linear) -> torch.nn.Linear:
        return Prepacked(layer.float())

    _replace(model, whole, threads=torch.get_num_threads())  # FBGEMM lays out a layer on one thread
    model.float()
    head = model.get_output_embeddings()
    if _is_plain(head):
        model.set_output_embeddings(Prepacked(head, keeps_weight=True))
    return model


def blocked(model: Any) -> Any:
    """Return a model of `transformers` on a processor in bfloat16, its linear layers laid out anew if there is AMX.

    The output layer keeps its plain weights, as with `prepacked`.
    """
    if has_amx():
        _replace(model, Blocked, threads=1)
        head = model.get_output_embeddings()
        if _is_plain(head):
            model.set_output_embeddings(Blocked(head, keeps_weight=True))
    return model


def _replace(model: Any, make: Callable[[torch.nn.Linear], torch.nn.Linear], *, threads: int) -> None:
    """Put a layer that is made of it in the place of each plain one but the output layer."""
    head = model.get_output_embeddings()
    # by their names: layers held in a list would not be freed one by one
    names = [
        (parent, name) for parent in model.modules() for name, layer in parent.named_children() if _is_plain(layer)
    ]

    def replace(place: tuple[Any, str]) -> None:
        parent, name = place
        layer = getattr(parent, name)
        if layer is not head:
            setattr(parent, name, make(layer))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(replace, names))


def _is_plain(layer: object) -> bool:
    return type(layer) is torch.nn.Linear
