"""A small Depth Anything 3 in each of its two kinds."""

from spatial_forcing.teachers.da3 import DA3, DA3Config, DA3HeadConfig
from spatial_forcing.teachers.frozen import random_stream

HEAD = DA3HeadConfig((1, 3, 4, 5), features=16, out_channels=(8, 8, 16, 16))
ANY_VIEW = DA3Config(embed_dim=32, depth=6, num_heads=2, start=2, img_size=70, head=HEAD, encoder_heads=2)
ONE_VIEW = DA3Config(embed_dim=32, depth=6, num_heads=2, start=None, img_size=70, head=HEAD)


def small(config=ANY_VIEW, heads=True, seed=0):
    """A model whose every parameter is random, LayerScale and norms included."""
    with random_stream(seed):
        model = DA3(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * parameter.data.new_empty(parameter.shape).normal_()
    if heads:
        return model.eval()
    bare = DA3(config, heads=False)
    bare.backbone.load_state_dict(model.backbone.state_dict())
    return bare.eval()
