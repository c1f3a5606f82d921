"""The network: it starts as the linear stage, has the published sizes, and every part of it learns."""

from __future__ import annotations

import pytest
import torch

from opustomo.model.decoder import Decoder, LastDoubling
from opustomo.model.encoder import Encoder
from opustomo.model.vae import Vae
from opustomo.physics.volume import spherical_mask

CROP = 10


def vae(zdim: int = 3, templateres: int = 16, width: float = 0.1, crop: int = CROP) -> Vae:
    mask = spherical_mask(crop, 0.3 * crop, 2.0)
    mean, components = torch.randn(crop, crop, crop), torch.randn(zdim, crop, crop, crop)
    return Vae(
        mask, mean * mask, components * mask, mask, templateres=templateres, width=width, encoderres=6
    )  # fmt: skip


def linear_posterior(batch: int, zdim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres and standard deviations (b, K)."""
    return torch.randn(batch, zdim), 0.2 + torch.rand(batch, zdim)


@pytest.mark.parametrize("zdim", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_untrained_network_is_the_linear_stage(zdim: int, batch: int) -> None:
    model = vae(zdim)
    mean, spread = linear_posterior(batch, zdim)
    for correction in model.encode(torch.randn(batch, CROP, CROP, CROP), mean, spread):
        assert torch.equal(correction, torch.zeros(batch, zdim))
    assert torch.equal(model.nonlinear(mean), torch.zeros(batch, CROP, CROP, CROP))
    expected = model.mean + sum(mean[:, k, None, None, None] * model.components[k] for k in range(zdim))
    assert torch.allclose(model.linear(mean), expected, atol=1e-5)


def test_every_parameter_learns_after_the_first_step() -> None:
    """The last layers start at zero, so the first step moves only them; from the second on everything moves."""
    model = vae()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    density, target = torch.randn(4, CROP, CROP, CROP), torch.randn(4, CROP, CROP, CROP)
    mean, spread = linear_posterior(4, 3)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        shift, log_scale = model.encode(density, mean, spread)
        sample = mean + shift + spread * log_scale.exp()
        loss = (model.linear(sample) + model.nonlinear(sample) - target).square().mean()
        loss.backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0.0]
    assert still == []


def test_nonlinear_part_stays_inside_the_mask() -> None:
    model = vae()
    torch.nn.init.normal_(model.decoder.rise[-1].weight)  # type: ignore[arg-type]
    volume = model.nonlinear(torch.randn(2, 3)).detach()
    assert float(volume.abs().max()) > 0
    assert float(volume[:, model.mask == 0].abs().max()) == 0.0


def test_posterior_width_cannot_run_away() -> None:
    """Whatever a bad batch does to the encoder, a standard deviation changes by at most e^3 either way."""
    model = vae()
    assert model.encoder is not None
    for sign in (1, -1):
        torch.nn.init.constant_(model.encoder.head.bias, sign * 1e4)
        _, log_scale = model.encode(torch.randn(2, CROP, CROP, CROP), *linear_posterior(2, 3))
        assert log_scale.detach().numpy() == pytest.approx(sign * 3.0, rel=1e-4)


@pytest.mark.parametrize("width", [0.05, 0.25])
@pytest.mark.parametrize("templateres", [16, 32, 48, 64, 128, 160])
def test_decoder_makes_any_template_size(templateres: int, width: float) -> None:
    with torch.device("meta"):
        decoder = Decoder(2, templateres, width)
        assert decoder(torch.zeros(3, 2)).shape == (3, templateres, templateres, templateres)


def test_sizes_at_width_one_are_the_published_ones() -> None:
    with torch.device("meta"):
        decoder, encoder = Decoder(12, 192, 1.0), Encoder(12, 1.0, 12)
    layers = [*decoder.trunk, *decoder.rise]
    assert [decoder.first.out_features, decoder.second.out_features] == [512, 2048]
    assert [layer.weight.shape[0] for layer in layers] == [2048, 1024, 512, 256, 128, 64, 32, 16]
    assert layers[-1].weight.shape[1] == 1
    assert decoder.resized == 192 // 16
    convolutions = [*encoder.stem, *encoder.body]
    assert [layer.weight.shape[0] for layer in convolutions] == [32, 64, 128, 256, 512, 512]
    assert encoder.head.out_features == 24


def test_first_doubling_is_that_of_the_published_layer() -> None:
    """From one voxel a kernel of 4 (stride 2, padding 1) shows only its inner 2^3: a kernel of 2 is the same layer."""
    decoder = Decoder(2, 128, 0.05)
    first, second = decoder.trunk[:2]
    assert isinstance(first, torch.nn.ConvTranspose3d) and isinstance(second, torch.nn.ConvTranspose3d)
    assert first.kernel_size == (2, 2, 2) and second.kernel_size == (4, 4, 4)
    published = torch.nn.ConvTranspose3d(first.in_channels, first.out_channels, 4, 2, 1)
    with torch.no_grad():
        published.weight[:, :, 1:3, 1:3, 1:3] = first.weight
        published.bias.copy_(first.bias)
        voxel = torch.randn(3, first.in_channels, 1, 1, 1)
        assert published(voxel).shape == (3, first.out_channels, 2, 2, 2)
        assert torch.allclose(published(voxel), first(voxel), atol=1e-6)
    assert all(layer.kernel_size == (4, 4, 4) for layer in Decoder(2, 64, 0.05).trunk)  # begins with 2^3 voxels


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_last_doubling_is_a_transposed_convolution(kind: torch.dtype) -> None:
    """Values and all gradients; also in the precision of a GPU."""
    own = LastDoubling(3, 1, 4, 2, 1)
    plain = torch.nn.ConvTranspose3d(3, 1, 4, 2, 1)
    plain.load_state_dict(own.state_dict())
    values = torch.randn(2, 3, 5, 5, 5)
    found = []
    for layer, given in ((own, values.to(kind)), (plain, values.to(kind).float())):
        given.requires_grad_()
        made = layer(given)
        made.float().pow(3).sum().backward()
        assert layer.bias is not None
        found.append(
            [t.detach().float() for t in (made, given.grad, layer.weight.grad, layer.bias.grad) if t is not None]
        )
    assert len(found[0]) == 4
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) < (1e-4 if kind == torch.float32 else 0.05) * float(b.abs().max())


@pytest.mark.parametrize("crop", [8, 12, 22])
def test_any_crop_can_be_encoded_and_decoded(crop: int) -> None:
    """8 is the smallest working box; the crop need not divide the template."""
    model = vae(zdim=1, crop=crop)
    code, _ = model.encode(torch.randn(1, crop, crop, crop), *linear_posterior(1, 1))
    assert model.nonlinear(code).shape == (1, crop, crop, crop)


def test_decoded_density_follows_the_datas_units() -> None:
    """A map in units a thousand times larger gets a correction a thousand times larger from the same weights."""
    small = vae()
    torch.nn.init.normal_(small.decoder.rise[-1].weight)  # type: ignore[arg-type]
    large = Vae(
        small.mask,
        1e3 * small.mean,
        1e3 * small.components,
        small.mask,
        templateres=16,
        width=0.1,
        encoderres=6,
    )
    large.decoder.load_state_dict(small.decoder.state_dict())
    code = torch.randn(1, 3)
    assert torch.allclose(large.nonlinear(code), 1e3 * small.nonlinear(code), rtol=1e-4)


def test_decoder_speaks_only_where_there_is_change() -> None:
    small = vae()
    reach = small.mask * (torch.arange(CROP) < CROP // 2)
    model = Vae(small.mask, small.mean, small.components, reach, templateres=16, width=0.1, encoderres=6)
    torch.nn.init.normal_(model.decoder.rise[-1].weight)  # type: ignore[arg-type]
    volume = model.nonlinear(torch.randn(2, 3))
    assert volume[..., : CROP // 2].abs().max() > 0 and not volume[..., CROP // 2 :].any()


def test_empty_volumes_make_no_nan() -> None:
    """A particle whose residual is zero, components that are zero, a mean that is zero."""
    model = vae()
    for name in ("components", "mean"):
        getattr(model, name).zero_()
        model = Vae(
            model.mask, model.mean, model.components, model.mask,
            templateres=16, width=0.1, encoderres=6,
        )  # fmt: skip
        assert model.encoder is not None
        torch.nn.init.normal_(model.encoder.head.weight)
        torch.nn.init.normal_(model.decoder.rise[-1].weight)  # type: ignore[arg-type]
        code, width = linear_posterior(2, 3)
        found = (
            *model.encode(torch.zeros(2, CROP, CROP, CROP), code, width),
            model.linear(code),
            model.nonlinear(code),
        )
        assert all(torch.isfinite(part).all() for part in found)
