import json

import numpy as np
import pytest

from spatial_forcing.data import Dataset, DatasetInfo
from spatial_forcing.data.info import make_features
from spatial_forcing.errors import ConfigError, DataError


def edit_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("version", "remedy"), [("v2.1", "data convert lerobot-v2"), ("v4.0", "Update this package")]
)
def test_other_versions_are_refused_with_the_remedy(root, version, remedy):
    edit_info(root, codebase_version=version)
    with pytest.raises(DataError, match=remedy) as caught:
        Dataset.open(root)
    assert version in str(caught.value)


def test_a_folder_without_a_dataset_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"meta/info\.json does not exist"):
        Dataset.open(tmp_path)


def test_broken_json_is_named(root):
    (root / "meta/info.json").write_text("{")
    with pytest.raises(DataError, match=r"meta/info\.json .*line 1 column 2"):
        DatasetInfo.load(root)


def test_unknown_camera_lists_the_cameras_and_the_closest(dataset):
    with pytest.raises(DataError, match="Did you mean 'front'") as caught:
        dataset.image(0, "fron")
    assert "wrist" in str(caught.value)


def test_unknown_keys_of_other_writers_are_ignored(root):
    edit_info(root, total_videos=3)
    assert DatasetInfo.load(root).total_episodes == 3


def test_channels_first_shapes_of_other_writers_are_understood():
    features = make_features({"a": (4, 6)}, 1, 1)
    features["observation.images.a"].update(shape=[3, 4, 6], names=["channels", "height", "width"])
    assert DatasetInfo(fps=10, features=features).frame_size("a") == (4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": {}}, "at least one camera"),
        ({"cameras": {"front_depth": (4, 4)}}, "must not"),
        ({"cameras": {"front": (5, 4)}, "video": True}, "even heights"),
        ({"state_names": ["x"]}, "1 state names for 2 dimensions"),
        ({"intrinsics": {"back": np.eye(3)}}, "unknown cameras"),
        ({"intrinsics": {"front": np.eye(4)}}, r"\(4, 4\)"),
    ],
)
def test_features_that_cannot_work_are_refused(change, message):
    settings = {"cameras": {"front": (4, 4)}, **change}
    with pytest.raises(ConfigError, match=message):
        make_features(state_dim=2, action_dim=1, **settings)
