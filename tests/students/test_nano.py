import numpy as np
import pytest
import torch

from spatial_forcing.alignment import FRAME_PREFIX, GEOMETRY_PREFIX, IMAGE_PREFIX, camera_images, identity_map
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.protocols import Student
from spatial_forcing.stem import PatchStem
from spatial_forcing.students import NanoConfig, NanoVLA
from tests.fakes import CAMERAS, fake_batch

FRONT, WRIST = (IMAGE_PREFIX + camera for camera in CAMERAS)
STATS = {
    "observation.state": {"mean": [0.1] * 4, "std": [1.0, 2.0, 0.5, 1.0]},
    "action": {"min": [-2.0, -3.0, -4.0], "max": [2.0, 4.0, 3.0]},
}


def decoded(nano, batch):
    return nano._decode(batch, camera_images(batch, nano.cameras))


def config(**changes):
    small = {"image_size": 24, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "action_dim": 3}
    return NanoConfig(**{"cameras": CAMERAS, "chunk": 2, "max_text": 6, "vocab": 64, **small, **changes})


def student(**changes):
    return NanoVLA.create(config(**changes), STATS)


def observation(seed, task="touch the cube", size=24):
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 255, (size, size, 3), dtype=np.uint8) for c in CAMERAS}
    return {"images": images, "state": rng.normal(size=4).astype(np.float32), "task": task}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def block_input(nano, batch):
    seen = []
    hook = nano.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    nano(batch)
    hook.remove()
    return seen[0]


heads = pytest.mark.parametrize("head", ["l1", "flow"])


@heads
def test_shapes_and_protocol(head):
    nano = student(head=head)
    assert isinstance(nano, Student)
    loss, metrics = nano(fake_batch())
    assert loss.ndim == 0
    assert metrics.keys() == {f"action_{head}"}
    loss.backward()
    assert all(p.grad is not None for p in nano.parameters())
    actions = nano.act([observation(0), observation(1)])
    assert actions.shape == (2, 2, 3)
    assert actions.dtype == torch.float32
    assert block_input(nano, fake_batch()).shape == (4, 6 + 2 * 9 + 1 + 2, 32)


@heads
def test_one_small_batch_is_learned(head):
    nano = student(head=head, chunk=2)
    batch = fake_batch(batch_size=4)
    optimizer = torch.optim.AdamW(nano.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(150 if head == "l1" else 300):
        loss, _ = nano(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.35 * np.mean(losses[:10])
    with torch.no_grad():
        hidden = decoded(nano, batch)
        predicted = nano.action_norm.denormalize(nano.head.sample(hidden, seeded()))
    assert (predicted - batch["action"]).abs().mean() < 0.75 * batch["action"].abs().mean()


@heads
def test_act_is_deterministic_and_each_row_stands_alone(head):
    nano = student(head=head)
    observations = [observation(i) for i in range(5)]
    together = nano.act(observations, seeded())
    assert torch.equal(together, nano.act(observations, seeded()))
    for count in (1, 2, 4):
        torch.testing.assert_close(
            nano.act(observations[:count], seeded()), together[:count], atol=4e-6, rtol=1e-6
        )
    mixed = nano.act([observations[0], observation(9), observations[2]], seeded())
    torch.testing.assert_close(mixed[[0, 2]], together[[0, 2]], atol=4e-6, rtol=1e-6)
    assert not torch.allclose(mixed[1], together[1])


def test_a_tap_sees_the_whole_sequence_of_a_policy_that_acts():
    nano, seen = student(), [observation(0)]
    alone = nano.act(seen)
    shapes = []
    handle = nano.final_norm.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[1]))
    torch.testing.assert_close(nano.act(seen), alone, atol=4e-6, rtol=1e-6)
    handle.remove()
    assert shapes == [nano.config.max_text + 2 * nano.config.grid**2 + 1 + nano.config.chunk]


def test_noise_bound_to_episodes_survives_another_order():
    nano = student(head="flow")
    observations = [observation(i) for i in range(3)]
    forward = nano.act(observations, [seeded(i) for i in range(3)])
    backward = nano.act(observations[::-1], [seeded(i) for i in (2, 1, 0)])
    torch.testing.assert_close(forward.flip(0), backward, atol=4e-6, rtol=1e-6)
    assert not torch.equal(nano.act(observations, seeded(0)), nano.act(observations, seeded(1)))


def test_act_is_in_eval_mode_and_leaves_the_mode_alone():
    nano = student(dropout=0.5)
    nano.train()
    nano.patch_embed.eval()
    a = nano.act([observation(0)])
    assert nano.training
    assert not nano.patch_embed.training
    assert torch.equal(a, nano.eval().act([observation(0)]))
    assert not nano.training
    assert not a.requires_grad


def test_actions_and_loss_are_in_the_right_units():
    nano = student()
    batch = fake_batch()
    scale = (torch.tensor(STATS["action"]["max"]) - torch.tensor(STATS["action"]["min"])) / 2
    offset = (torch.tensor(STATS["action"]["max"]) + torch.tensor(STATS["action"]["min"])) / 2
    with torch.no_grad():
        predicted = nano.head.sample(decoded(nano, batch))
        expected = (predicted - (batch["action"] - offset) / scale).abs().mean()
        torch.testing.assert_close(nano(batch)[0], expected)
    seen = [observation(i) for i in range(2)]
    acted = nano.act(seen)
    torch.testing.assert_close(acted, nano.head.sample(decoded(nano, nano._collate(seen))) * scale + offset)


def test_text_padding_does_not_influence():
    """More room for text changes neither the real tokens nor the actions."""
    torch.manual_seed(0)
    short, long = student(max_text=3), student(max_text=6)
    weights = short.state_dict()
    weights["text_position"] = torch.cat([weights["text_position"], torch.randn(3, 32)])
    long.load_state_dict(weights)
    seen = [observation(0, "touch the cube")]
    torch.testing.assert_close(short.act(seen), long.act(seen), atol=4e-6, rtol=1e-6)
    with torch.no_grad():
        long.text_embed.weight[0] += 5
    torch.testing.assert_close(short.act(seen), long.act(seen), atol=4e-6, rtol=1e-6)
    assert not torch.allclose(short.act(seen), short.act([observation(0, "move the cube")]))


def test_an_absent_view_does_not_influence_and_has_no_valid_token():
    nano = student()
    batch = fake_batch()
    batch[WRIST + "_is_pad"] = torch.tensor([True, False, True, False])
    loss, _ = nano(batch)
    changed = dict(batch)
    changed[WRIST] = batch[WRIST].clone()
    changed[WRIST][0] = -1.0  # LeRobot's filler
    assert torch.equal(loss, nano(changed)[0])
    changed[WRIST][1] = 0.0
    assert not torch.equal(loss, nano(changed)[0])
    layout = nano.alignment(changed).layout
    assert layout.valid[:, 0].all()
    assert layout.valid[:, 1].flatten(1).all(1).tolist() == [False, True, False, True]
    assert not layout.valid[0, 1].any()


@pytest.mark.parametrize("view", [0, 1])
def test_layout_points_at_the_token_of_each_patch(view):
    nano = student()
    batch = fake_batch(batch_size=1)
    layout = nano.alignment(batch).layout
    assert layout.index.shape == (1, 2, 3, 3)
    before = block_input(nano, batch)
    for y in range(3):
        for x in range(3):
            painted = dict(batch)
            image = batch[(FRONT, WRIST)[view]].clone()
            image[..., y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] = 0
            painted[(FRONT, WRIST)[view]] = image
            change = (block_input(nano, painted) - before).norm(dim=-1)[0]
            assert change.nonzero().flatten().tolist() == [layout.index[0, view, y, x]]


@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
def test_the_stem_makes_one_token_a_patch(patch_size):
    stem = PatchStem(24, patch_size)
    images = torch.rand(2, 3, 2 * patch_size, 3 * patch_size)
    tokens = stem(images)
    assert tokens.shape == (2, 24, 2, 3)
    torch.testing.assert_close(stem(images[..., :patch_size, -patch_size:])[..., 0, 0], tokens[..., 0, 2])


def test_the_queries_know_instruction_and_state_before_any_attention():
    nano = student()
    batch = fake_batch()
    before = block_input(nano, batch)
    told = {**batch, "task": ["leave it"] * 4}
    moved = {**batch, "observation.state": batch["observation.state"] + 1}
    for changed in (told, moved):
        after = block_input(nano, changed)
        assert (after - before)[:, -2:].abs().amin(dim=(1, 2)).gt(0).all()
        assert torch.equal(after[:, 6:24], before[:, 6:24])  # the views' tokens know nothing of it


def test_images_matter_and_blank_images_do_not():
    a, b = observation(0), observation(0)
    b["images"] = observation(1)["images"]
    nano, blind = student(), student(blank_images=True)
    assert not torch.allclose(nano.act([a]), nano.act([b]), atol=1e-4)
    assert torch.equal(blind.act([a]), blind.act([b]))
    b["state"] = b["state"] + 1
    assert not torch.equal(blind.act([a]), blind.act([b]))
    assert blind.alignment(fake_batch()).views.images.std() > 0.1  # the teacher is not blinded


def test_uint8_and_float_and_other_sizes_agree():
    nano = student()
    batch = fake_batch()
    pixels = {key: (batch[key] * 255).round().byte() for key in (FRONT, WRIST)}
    as_bytes, as_floats = (
        {**batch, **pixels},
        {**batch, **{key: p.float() / 255 for key, p in pixels.items()}},
    )
    assert nano.act([observation(0)]).shape == nano.act([observation(0, size=50)]).shape
    torch.testing.assert_close(nano(as_bytes)[0], nano(as_floats)[0], atol=4e-6, rtol=1e-6)
    assert all(torch.equal(as_floats[key], p.float() / 255) for key, p in pixels.items())
    resized = nano._resize(torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8))
    assert (resized.dtype, resized.shape) == (torch.uint8, (2, 3, 24, 24))
    smooth = torch.linspace(0, 1, 24).expand(4, 3, 24, 24)
    larger = torch.linspace(0, 1, 72).expand(4, 3, 48, 72)
    a, b = (block_input(nano, {**batch, FRONT: image}) for image in (smooth, larger))
    torch.testing.assert_close(a, b, atol=0.1, rtol=0)
    assert (a - b).abs().mean() < 0.005


def test_stored_frames_of_a_cached_teacher_are_not_the_students_images():
    nano = student()
    batch = fake_batch()
    loss, _ = nano(batch)
    for camera in CAMERAS:
        batch[FRAME_PREFIX + camera] = torch.rand(4, 3, 40, 40)
        batch[GEOMETRY_PREFIX + camera] = 0.5 * identity_map(4)
    assert torch.equal(nano(batch)[0], loss)
    assert nano.alignment(batch).views.images.shape[-1] == 40
    assert nano.alignment(batch).layout.index.shape == (4, 2, 3, 3)


def test_weights_depend_on_the_seed_alone_and_leave_the_stream():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a = NanoVLA(config(), seed=1)
    assert torch.equal(torch.rand(1), expected)
    b, c = NanoVLA(config(), seed=1), NanoVLA(config(), seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.view_position, c.view_position)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": ()}, "cameras"),
        ({"cameras": ("a", "a")}, "distinct"),
        ({"image_size": 30}, "image_size 30 .* patch_size 8"),
        ({"heads": 3}, r"width 32 .* heads \(3\)"),
        ({"head": "diffusion"}, "'diffusion'"),
        ({"chunk": 0}, "chunk is 0"),
        ({"vocab": 1}, "vocab 1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"action_norm": "median"}, "'median'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        NanoVLA(config(**changes))


def test_wrong_batches_are_refused():
    nano, batch = student(), fake_batch()
    with pytest.raises(DataError, match="camera 'wrist' is not in the batch"):
        nano({k: v for k, v in batch.items() if k != WRIST})
    with pytest.raises(DataError, match="'action' is not in the batch"):
        nano({k: v for k, v in batch.items() if k != "action"})
    with pytest.raises(DataError, match=r"'observation.state' is \(4, 39\); this student takes \(4, 4\)"):
        nano({**batch, "observation.state": torch.zeros(4, 39)})
    with pytest.raises(DataError, match="task"):
        nano({**batch, "task": ["one"]})
    with pytest.raises(DataError, match=r"lies in \[0, 255\]"):
        nano(
            {**batch, FRONT: (batch[FRONT] * 255).round().clamp(max=254).where(batch[FRONT] < 0.9, 255) // 1}
        )
    seen = observation(0)
    del seen["images"]["wrist"]
    with pytest.raises(DataError, match="lacks camera 'wrist'"):
        nano.act([seen])
    with pytest.raises(DataError, match=r"act .* one"):
        nano.act([])
    mixed = [observation(0), observation(1)]
    mixed[1]["images"]["wrist"] = mixed[1]["images"]["wrist"].astype(np.float32) / 255
    with pytest.raises(DataError, match="camera 'wrist' differ in type"):
        nano.act(mixed)
