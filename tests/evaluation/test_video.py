import av
import numpy as np
import pytest

from spatial_forcing.errors import DataError
from spatial_forcing.evaluation.video import last_frame, side_by_side, write_video


def moving_bar(count=12, height=33, width=50):
    frames = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        frames[i, :, 3 * i : 3 * i + 6] = (250, 20, 20)
    return list(frames)


@pytest.mark.parametrize(
    ("codec", "suffix", "name"), [("libx264", ".mp4", "h264"), ("libvpx-vp9", ".webm", "vp9")]
)
def test_video_plays_back_what_was_filmed(tmp_path, codec, suffix, name):
    path = write_video(moving_bar(), tmp_path / "sub" / "clip.mp4", fps=10, codec=codec)
    assert path == tmp_path / "sub" / f"clip{suffix}"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        assert stream.codec_context.name.endswith(name)
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(10)
    assert len(frames) == 12
    assert frames[0].shape == (32, 50, 3)
    red = frames[6][:, :, 0].mean(0)
    assert 17 <= int(red.argmax()) <= 24
    assert path.stat().st_size < 10_000


def test_frames_of_different_sizes_are_refused(tmp_path):
    with pytest.raises(DataError, match="one shape"):
        write_video(
            [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], tmp_path / "a.mp4", fps=5
        )
    with pytest.raises(DataError, match="one shape"):
        write_video([], tmp_path / "a.mp4", fps=5)
    assert list(tmp_path.iterdir()) == []


def test_cameras_stand_side_by_side():
    picture = side_by_side({"a": np.full((4, 6, 3), 9, np.uint8), "b": np.full((2, 2, 3), 7, np.uint8)})
    assert picture.shape == (4, 8, 3)
    assert (picture[:2, 6:] == 7).all()
    assert (picture[2:, 6:] == 0).all()


def test_the_last_picture_is_how_it_ended(tmp_path):
    frames = moving_bar()
    picture = last_frame(write_video(frames, tmp_path / "clip.mp4", fps=10))
    assert picture.shape == (32, 50, 3)
    assert int(picture[..., 0].mean(0).argmax()) in range(33, 39)  # the bar's last place
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"broken\.mp4"):
        last_frame(tmp_path / "broken.mp4")
