"""Graphs of sizes at which diffusers asks how many images there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch._subclasses.fake_tensor import FakeTensorMode

from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.graphs import Form, VaeDecoder
from magicface_rt.export.tracing import trace
from magicface_rt.export.upsampling import Upsampling, without_size_checks

CHECKED = 1 << 31
"""Elements from which on `Upsample2D` copies its input."""


def decoder_at(side: int) -> VaeDecoder:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(64, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4, **kinds)
    form = Form(height=side, width=side, vae_factor=2, dtype=torch.float32, text_width=32)
    return VaeDecoder(vae.eval().requires_grad_(False), form)


def test_a_decoder_is_traced_for_every_batch_where_its_size_would_ask_for_the_batch() -> None:
    side = 1088
    images = CHECKED / (2 * 64 * (side // 2) ** 2)
    assert 1 < images < 64, "no batch of this size would be asked about"
    assert images != int(images), "a whole bound is one that PyTorch can note"
    model = trace(decoder_at(side))
    assert list(model.graph.inputs[0].shape or ()) == ["B", 4, side // 2, side // 2]


@pytest.mark.parametrize("rows", [1, 3])
def test_upsampling_is_that_of_diffusers_and_keeps_the_weights_names(rows: int) -> None:
    torch.manual_seed(1)
    network = torch.nn.Sequential(Upsample2D(8, use_conv=True, out_channels=6), torch.nn.SiLU())
    x = torch.randn(rows, 8, 5, 7)
    with torch.no_grad():
        expected, names = network(x), list(network.state_dict())
        without_size_checks(network)
        assert isinstance(network[0], Upsampling)
        assert torch.equal(network(x), expected)
    assert list(network.state_dict()) == names


def test_other_kinds_of_upsampling_stay() -> None:
    network = torch.nn.Sequential(Upsample2D(8, use_conv_transpose=True), Upsample2D(8, use_conv=False))
    without_size_checks(network)
    assert [type(child) for child in network] == [Upsample2D, Upsample2D]


def test_ctrl_c_that_pytorch_takes_for_an_argument_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = FakeTensorMode.dispatch

    def interrupted(self: FakeTensorMode, func: Any, *arguments: Any, **named: Any) -> Any:
        if func is not torch.ops.aten.convolution.default:
            return real(self, func, *arguments, **named)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise TypeError("incompatible function arguments")  # noqa: B904 - as PyTorch raises it

    decoder = decoder_at(16)
    monkeypatch.setattr(FakeTensorMode, "dispatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace(decoder)
    assert [record.name for record in caplog.records if record.exc_info] == []


def test_no_graph_asks(tiny_checkpoint: Path) -> None:
    """The networks of Stable Diffusion have no other kind."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for network in (checkpoint.load_vae(torch.float32).decoder, checkpoint.load_unet(torch.float32)):
        without_size_checks(network)
        kinds = [type(child) for child in network.modules()]
        assert Upsampling in kinds
        assert Upsample2D not in kinds
