"""Moments of an episode that are drawn later must look as they did."""

import numpy as np

from spatial_forcing.protocols import DeferredEnv


def check_drawn_later(env, steps=6):
    """Plays, draws all moments after the last, and compares bit for bit with what was seen on the way."""
    assert isinstance(env, DeferredEnv)
    observation, _ = env.reset(seed=3)
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(steps):
        seen = {camera: (observation["images"][camera].copy(), env.depth(camera)) for camera in env.cameras}
        kept.append((env.moment(), seen))
        observation = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))[0]
    assert not np.array_equal(kept[0][1][env.cameras[0]][0], kept[-1][1][env.cameras[0]][0])
    for moment, seen in reversed(kept):
        drawn = env.draw(moment)
        for camera, (image, depth) in seen.items():
            assert np.array_equal(drawn[camera][0], image)
            assert np.array_equal(drawn[camera][1], depth)
    last = {camera: observation["images"][camera] for camera in env.cameras}
    assert not np.array_equal(last[env.cameras[0]], kept[0][1][env.cameras[0]][0])
