import numpy as np
import pytest
import torch

from spatial_forcing.alignment import IMAGE_PREFIX, views_from_batch
from spatial_forcing.data.augment import Augment
from spatial_forcing.data.geometry import letterbox_map, warp
from spatial_forcing.data.loader import BatchLoader
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.teachers.cache.encode import read_views
from spatial_forcing.teachers.cache.source import dataset_source

STRONG = Augment(crop_area=(0.5, 0.9), rotation=10, brightness=0.3, contrast=0.4, saturation=0.5)


def loader_of(dataset, **options) -> BatchLoader:
    settings = {"cameras": ("front", "wrist"), "chunk": 3, "batch_size": 4, "seed": 1, "progress": False}
    return BatchLoader(dataset, **{**settings, **options})


def assert_same(left: dict, right: dict):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if torch.is_tensor(value) else value == right[key], key


def test_keys_shapes_and_values(dataset):
    batch = loader_of(dataset).batch(0)
    assert batch["observation.images.front"].shape == (4, 3, 24, 32)
    assert batch["observation.images.front"].dtype == torch.uint8
    assert batch["observation.state"].shape == (4, 4)
    assert batch["action"].shape == (4, 3, 2)
    assert batch["index"].dtype == batch["episode_index"].dtype == torch.long
    for row, index in enumerate(batch["index"].tolist()):
        image = batch["observation.images.wrist"][row].permute(1, 2, 0).numpy()
        assert np.array_equal(image, dataset.image(index, "wrist"))
        assert np.array_equal(batch["observation.state"][row], dataset.state[index])
        assert batch["task"][row] == dataset.tasks[dataset.task_index[index]]


def test_chunks_are_padded_at_the_end_of_their_episode(dataset):
    loader = loader_of(dataset, chunk=4, batch_size=19)
    batch = loader.batch(0)
    row = batch["index"].tolist().index(4)  # episode 0 has frames 0 to 5
    assert batch["action"][row, :, 0].tolist() == [4, 5, 5, 5]
    assert batch["action_is_pad"][row].tolist() == [False, False, True, True]
    assert batch["action_is_pad"].sum().item() == 3 * (1 + 2 + 3)


def test_every_epoch_is_a_new_permutation_of_all_frames(dataset):
    loader = loader_of(dataset, batch_size=1)
    epochs = [[int(loader.indices(step)[0]) for step in range(e * 19, e * 19 + 19)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(19))
    assert epochs[0] != epochs[1]


def test_ranks_share_the_batch_of_one_process(dataset):
    options = {"augment": STRONG, "image_size": 16, "keep_frames": True}
    whole = loader_of(dataset, **options).batch(7)
    parts = [loader_of(dataset, **options, rank=r, world_size=2).batch(7) for r in range(2)]
    for key, value in whole.items():
        if torch.is_tensor(value):
            # Floating point may round differently in another batch size.
            assert torch.allclose(torch.cat([p[key] for p in parts]).double(), value.double(), atol=1e-5), key
        else:
            assert parts[0][key] + parts[1][key] == value


def test_a_batch_depends_on_seed_and_step_alone(dataset):
    one, two = (loader_of(dataset, augment=STRONG) for _ in range(2))
    one.batch(3)
    assert_same(one.batch(12), two.batch(12))
    assert not torch.equal(one.batch(12)["index"], loader_of(dataset, seed=2).batch(12)["index"])


def test_draws_differ_between_steps_samples_and_cameras_but_not_with_the_set_of_cameras(dataset):
    options = {"augment": STRONG, "keep_frames": True, "image_size": 16}
    both = loader_of(dataset, **options)
    first, second = both.batch(0), both.batch(1)
    maps = first["geometry.front"]
    assert len({tuple(m.flatten().tolist()) for m in [*maps, *second["geometry.front"]]}) == 8
    assert not torch.equal(maps, first["geometry.wrist"])
    assert torch.equal(maps, loader_of(dataset, **options, cameras=("front",)).batch(0)["geometry.front"])


def test_without_augmentation_frames_are_the_images_and_the_map_is_the_identity(dataset):
    batch = loader_of(dataset, keep_frames=True).batch(0)
    assert torch.equal(batch["frame.front"], batch["observation.images.front"])
    assert torch.allclose(batch["geometry.front"], torch.eye(2, 3).expand(4, 2, 3), atol=1e-6)
    assert views_from_batch(batch, ("front",)).student_to_view.shape == (4, 1, 2, 3)


def test_other_sizes_are_letterboxed_and_reported(dataset):
    batch = loader_of(dataset, image_size=32, keep_frames=True).batch(0)
    image = batch["observation.images.front"]  # 24 x 32 frames: bars above and below
    assert image.shape == (4, 3, 32, 32)
    assert torch.equal(image[:, :, 4:28], batch["frame.front"])
    assert image[:, :, :4].max() == 0
    assert torch.allclose(batch["geometry.front"][0], letterbox_map((24, 32), (32, 32)))


def test_photometric_augmentation_gives_floats(dataset):
    image = loader_of(dataset, augment=STRONG).batch(0)["observation.images.front"]
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_decoding_on_the_fly_gives_the_same(dataset):
    streamed = loader_of(dataset, decoded=False)
    assert not (dataset.root / ".decoded").exists()
    assert_same(streamed.batch(5), loader_of(dataset, decoded=True).batch(5))


def test_a_subset_of_episodes(dataset):
    loader = loader_of(dataset, episodes=[0, 2], batch_size=10)
    assert loader.num_samples == 10
    assert sorted(loader.indices(0)) == [*range(6), *range(15, 19)]
    with pytest.raises(DataError, match=r"\[9\] are not in"):
        loader_of(dataset, episodes=[9])


def test_iterating_equals_asking(dataset):
    loader = loader_of(dataset)
    for step, batch in zip(range(5, 9), loader.iterate(5, 9), strict=True):
        assert_same(batch, loader.batch(step))


def test_iterating_can_be_left_early(dataset):
    import threading

    iterator = loader_of(dataset).iterate(0, 1000)
    next(iterator)
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name == "batch-loader"]


def test_errors_of_the_thread_arrive_in_their_place(dataset):
    index = int(loader_of(dataset).indices(2)[0])
    dataset.action[index] = np.nan
    seen = []
    with pytest.raises(DataError, match=r"action .* frames \[15\]"):
        seen.extend(batch["index"] for batch in loader_of(dataset, chunk=1).iterate(0, 4))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "world_size": 2}, "multiple of 2"),
        ({"chunk": 0}, "chunk is 0"),
        ({"cameras": ()}, "at least one"),
        ({"rank": 1}, "rank 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        loader_of(dataset, **options)


@pytest.mark.parametrize("augmented", [False, True])
def test_frames_of_cameras_of_several_sizes_are_kept_as_a_cache_holds_them(dataset, augmented):
    """The map and the frame together show what the student sees, and a cache is made of the same frames."""
    augment = Augment(crop_area=(0.6, 0.9), rotation=8) if augmented else None
    loader = BatchLoader(
        dataset, cameras=("front", "wrist"), chunk=1, batch_size=4, seed=0, image_size=64,
        augment=augment, keep_frames=True, progress=False,
    )  # fmt: skip
    batch = loader.batch(0)
    cached, _ = read_views(dataset_source(dataset), batch["index"].numpy(), ("front", "wrist"))
    views = views_from_batch(batch, ("front", "wrist"))
    assert views.images.shape[-2:] == (24, 32)  # the smallest frame that holds both
    assert torch.equal(views.images, cached.images)
    assert torch.equal(views.valid, cached.valid)
    assert views.valid[:, 0].all()
    assert (~views.valid[0, 1]).float().mean() == pytest.approx(1 - 24 * 24 / (24 * 32), abs=0.03)
    for number, camera in enumerate(("front", "wrist")):
        seen = warp(views.images[:, number], views.student_to_view[:, number], (64, 64))
        picture = warp(
            views.valid[:, number : number + 1].float(), views.student_to_view[:, number], (64, 64)
        )
        inside = (picture > 0.999).expand_as(seen)
        shown = batch[IMAGE_PREFIX + camera].float() / 255
        assert inside.float().mean() > 0.3
        assert (seen - shown)[inside].abs().mean() < 0.02
