"""One's own model as a teacher."""

import pytest
import torch
from torch import nn

from spatial_forcing.alignment import Views
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.protocols import Teacher
from spatial_forcing.teachers import as_teacher
from spatial_forcing.teachers.cache import CachedTeacher, build_cache
from tests.teachers.cache.cache_fakes import FakeSource


class Net(nn.Module):
    """A patch embedding; with `mix`, each view also gets the mean of all views."""

    def __init__(self, dim=8, patch=4):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images):
        return self.embed(images)


def make(seed=0, together=False, **options):
    torch.manual_seed(seed)
    net = Net()

    def alone(images):
        return net(images).permute(0, 2, 3, 1)

    def scene(images):
        each = alone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return each + each.mean(1, keepdim=True)

    defaults = {"dim": 8, "patch": 4, "resolution": 20, "licence": "MIT"}
    return net, as_teacher(net, scene if together else alone, together=together, **{**defaults, **options})


def images(B=3, V=2, size=(20, 20)):
    return torch.rand(B, V, 3, *size, generator=torch.Generator().manual_seed(1))


def test_features_are_the_modules():
    net, teacher = make()
    assert isinstance(teacher, Teacher)
    assert (teacher.name, teacher.licence, teacher.dim, teacher.depth) == ("Net", "MIT", 8, 1)
    pixels = images()
    (features,) = teacher.features(Views.create(pixels))
    with torch.no_grad():
        expected = net(pixels.flatten(0, 1)).permute(0, 2, 3, 1).unflatten(0, (3, 2))
    torch.testing.assert_close(features, expected)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("together", [False, True])
def test_absent_views_neither_influence_nor_appear(together):
    _, teacher = make(together=together)
    present = torch.tensor([[True, True], [True, False], [False, False]])
    pixels = images()
    (features,) = teacher.features(Views.create(pixels, present=present))
    assert (features[~present] == 0).all()
    pixels[~present] = -1
    assert torch.equal(teacher.features(Views.create(pixels, present=present))[0], features)
    (single,) = teacher.features(Views.create(pixels[1:2, :1]))
    torch.testing.assert_close(features[1:2, :1], single)


def test_views_together_see_each_other():
    (alone,), (together,) = (make(together=t)[1].features(Views.create(images())) for t in (False, True))
    torch.testing.assert_close(together, alone + alone.mean(1, keepdim=True))


def test_little_memory_gives_the_same_features():
    views = Views.create(images())
    torch.testing.assert_close(make(memory=1)[1].features(views)[0], make()[1].features(views)[0])


def test_several_layers_and_padding():
    net, _ = make()
    teacher = as_teacher(
        net, lambda x: (net(x).permute(0, 2, 3, 1), 2 * net(x).permute(0, 2, 3, 1)), depth=2,
        dim=8, patch=4, resolution=20, licence="MIT", framing="pad",
    )  # fmt: skip
    first, last = teacher.features(Views.create(images(size=(10, 20))), (0, -1))
    assert first.shape == (3, 2, 2, 5, 8)
    torch.testing.assert_close(last, 2 * first)


def test_it_can_be_cached_and_the_cache_is_bound_to_its_weights(tmp_path):
    _, teacher = make()
    source = FakeSource()
    build_cache(teacher, source, tmp_path, progress=False)
    cached = CachedTeacher(tmp_path, fingerprint=make()[1].fingerprint)
    frames = {c: source.images([0, 4], c) for c in source.cameras}
    pixels = torch.stack([torch.from_numpy(frames[c]).permute(0, 3, 1, 2) for c in source.cameras], 1) / 255
    views = Views.create(pixels, source.cameras, keys=torch.tensor([0, 4]))
    torch.testing.assert_close(cached.features(views)[0], teacher.features(views)[0], atol=0.02, rtol=0.02)
    others = [make(seed=1)[1], make(version="2")[1], make(resolution=40)[1], make(together=True)[1]]
    assert len({teacher.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_wrong_shapes_and_settings_are_named():
    with pytest.raises(DataError, match=r"\(6, 5, 5, 8\).*expected 1 of \(6, 5, 5, 16\)"):
        make(dim=16)[1].features(Views.create(images()))
    with pytest.raises(DataError, match="expected 2 of"):
        make(depth=2)[1].features(Views.create(images()))
    with pytest.raises(ConfigError, match="resolution 21"):
        make(resolution=21)
    with pytest.raises(ConfigError, match="dim is 0"):
        make(dim=0)
    with pytest.raises(ConfigError, match="Identity has no parameters"):
        as_teacher(nn.Identity(), lambda x: x, dim=3, patch=1, resolution=4, licence="MIT")
