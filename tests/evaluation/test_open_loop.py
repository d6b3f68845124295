import numpy as np
import pytest
import torch

from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.evaluation.open_loop import open_loop_errors
from tests.analysis.rooms import write_rooms

CAMERAS = ("front", "wrist")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms") / "data", episodes=3, frames=5, moving=True)


class Reader:
    """Knows the dataset by heart: it finds the frame by its image, and is off by `offset`."""

    def __init__(self, dataset, offset=0.0, chunk=4, noise=0.0):
        self.dataset, self.offset, self.chunk, self.noise = dataset, offset, chunk, noise
        self.frames = {dataset.image(i, "front").tobytes(): i for i in range(len(dataset))}
        self.asked = []

    def act(self, observations, generator=None):
        rows = [self.frames[seen["images"]["front"].tobytes()] for seen in observations]
        self.asked += rows
        drawn = [torch.randn(1, generator=g).item() for g in generator]
        padded = np.concatenate([self.dataset.action, np.full((self.chunk, 3), 99, np.float32)])
        chunks = np.stack([padded[i : i + self.chunk] for i in rows]) + np.float32(self.offset)
        return torch.from_numpy(chunks) + self.noise * torch.tensor(drawn)[:, None, None]


def errors(policy, rooms, episodes=(0, 2), **settings):
    return open_loop_errors(policy, rooms, list(episodes), cameras=CAMERAS, **settings)


def test_the_error_is_in_deviations_of_the_actions_that_vary(rooms):
    assert errors(Reader(rooms), rooms) == {("measure the room", 0): 0, ("measure the room", 2): 0}
    found = errors(Reader(rooms, offset=0.5), rooms, execute=3)
    expected = float(np.mean(0.5 / rooms.action.std(0)[:2]))  # the third number never moves
    assert list(found.values()) == pytest.approx([expected, expected], rel=1e-5)


def test_only_actions_of_the_episode_that_would_be_carried_out_count(rooms):
    class Late(Reader):
        """Right for two actions, wrong from the third on."""

        def act(self, observations, generator=None):
            chunk = super().act(observations, generator)
            chunk[:, 2:] += 7
            return chunk

    assert set(errors(Late(rooms), rooms, execute=2).values()) == {0.0}
    assert min(errors(Late(rooms), rooms, execute=3).values()) > 0


def test_frames_are_spread_over_the_episode_and_asked_once(rooms):
    policy = Reader(rooms)
    errors(policy, rooms, frames=3, batch_size=2)
    assert policy.asked == [0, 2, 4, 10, 12, 14]
    everything = Reader(rooms)
    errors(everything, rooms, frames=50)
    assert everything.asked == [*range(5), *range(10, 15)]


def test_a_policy_that_samples_meets_the_same_noise_in_any_batch(rooms):
    alone = errors(Reader(rooms, noise=1.0), rooms, batch_size=1)
    assert errors(Reader(rooms, noise=1.0), rooms, batch_size=8) == pytest.approx(alone)
    assert min(alone.values()) > 0


def test_what_cannot_be_measured_is_refused(rooms, tmp_path):
    with pytest.raises(ConfigError, match="over 0 episodes"):
        errors(Reader(rooms), rooms, episodes=())
    with pytest.raises(ConfigError, match="0 frames"):
        errors(Reader(rooms), rooms, frames=0)
    still = write_rooms(tmp_path / "still", episodes=1, frames=2)
    with pytest.raises(DataError, match=r"/still "):
        errors(Reader(still), still, episodes=(0,))

    class Narrow(Reader):
        def act(self, observations, generator=None):
            return super().act(observations, generator)[..., :2]

    with pytest.raises(DataError, match="actions of 2 numbers, the dataset holds 3"):
        errors(Narrow(rooms), rooms)
