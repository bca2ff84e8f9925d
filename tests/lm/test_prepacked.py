"""Layers laid out once: the products of the plain ones, no copy kept; FBGEMM's bits of a row are its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from preceptor.lm.local import LocalEngine
from preceptor.lm.prepacked import Blocked, Prepacked, blocked, has_amx, has_fbgemm, prepacked

pytestmark = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="torch has no FBGEMM for this processor"
)
needs_onednn = pytest.mark.skipif(
    not (cast("Any", torch.backends.mkldnn).is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="torch has no oneDNN for bfloat16 on this processor",
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def linear(rows: int, columns: int, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(columns, rows, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_the_products_are_those_of_the_plain_layer_with_its_weights_in_half_precision(bias: bool) -> None:
    plain = linear(50, 33, bias=bias)
    rows, layer = torch.randn(2, 7, 33), Prepacked(plain, keeps_weight=True)
    plain.weight.copy_(plain.weight.half().float())
    torch.testing.assert_close(layer(rows), plain(rows), rtol=1e-5, atol=1e-6)


def test_a_weight_is_rounded_to_eleven_bits_and_an_input_is_not() -> None:
    plain = torch.nn.Linear(1, 1, bias=False)
    plain.weight.fill_(1 + 2**-11 + 2**-20)
    layer = Prepacked(plain)
    assert layer(torch.tensor([[1.0], [1 + 2**-13]])).tolist() == [[1 + 2**-10], [(1 + 2**-10) * (1 + 2**-13)]]


def test_a_layer_of_known_weights_gives_what_is_computed_by_hand() -> None:
    plain = torch.nn.Linear(2, 3)
    plain.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    plain.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    assert Prepacked(plain)(torch.tensor([[10.0, 1.0]])).tolist() == [[12.5, 34.0, 55.5]]


@pytest.mark.parametrize(("rows", "columns"), [(1536, 576), (576, 1536), (192, 576)])
def test_a_row_has_the_same_bits_however_many_others_there_are(rows: int, columns: int) -> None:
    layer = Prepacked(linear(rows, columns, bias=False))
    inputs = torch.randn(400, columns)
    together = layer(inputs)
    assert all(torch.equal(layer(inputs[:count]), together[:count]) for count in (*range(1, 50), 97, 127, 384))


def test_the_plain_weights_are_let_go_but_of_the_output_layer(precise: LocalEngine) -> None:
    layers = [layer for layer in precise._model.modules() if isinstance(layer, torch.nn.Linear)]
    head = precise._model.get_output_embeddings()
    assert {type(layer) for layer in layers} == {Prepacked}
    assert head.weight is precise._model.get_input_embeddings().weight
    assert {layer.weight.numel() for layer in layers if layer is not head} == {0}


class Model(torch.nn.Module):
    """Embeddings, a layer, and an output layer whose weights are those of the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(8, 4)
        self.layer = linear(4, 4)
        self.head: torch.nn.Module = linear(8, 4, bias=False)
        self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> torch.nn.Module:
        """Return the output layer."""
        return self.head

    def set_output_embeddings(self, layer: torch.nn.Module) -> None:
        """Replace the output layer."""
        self.head = layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_stored_in_any_precision_becomes_the_float32_one_of_the_same_numbers(dtype: torch.dtype) -> None:
    stored = Model().to(dtype)
    plain = [stored.layer.weight.float(), stored.layer.bias.float(), stored.embed.weight.float()]
    model = prepacked(stored)
    rows = torch.randn(5, 4)
    assert (type(model.layer), type(model.head)) == (Prepacked, Prepacked)
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight, plain[2], rtol=0, atol=0)
    half = plain[0].half().float() if dtype == torch.float32 else plain[0]
    torch.testing.assert_close(model.layer(rows), rows @ half.T + plain[1], rtol=1e-3, atol=1e-5)


def test_weights_stay_as_they_are_where_a_rows_bits_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_fbgemm()
    products = Prepacked.forward
    monkeypatch.setattr(Prepacked, "forward", lambda self, rows: products(self, rows) + len(rows))
    assert not has_fbgemm()
    model = prepacked(Model().to(torch.bfloat16))
    assert (type(model.layer), type(model.head)) == (torch.nn.Linear, torch.nn.Linear)
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 400])
def test_the_products_of_a_layer_in_blocks_are_those_of_the_plain_one(rows: int, bias: bool) -> None:
    plain = linear(50, 33, bias=bias).to(torch.bfloat16)
    inputs = torch.randn(2, rows, 33).to(torch.bfloat16)
    torch.testing.assert_close(Blocked(plain)(inputs), plain(inputs), rtol=1e-2, atol=1e-2)


@needs_onednn
@pytest.mark.parametrize("is_there", [True, False])
def test_a_model_in_bfloat16_is_laid_out_in_blocks_where_there_is_amx(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: is_there)
    assert has_amx() is is_there
    model = blocked(Model().to(torch.bfloat16))
    kind = Blocked if is_there else torch.nn.Linear
    assert (type(model.layer), type(model.head)) == (kind, kind)
    assert model.head.weight is model.embed.weight
    assert model.layer.weight.numel() == (0 if is_there else 16)
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
