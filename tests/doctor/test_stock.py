"""Stock VLMs of transformers, small and random, beyond those of the guide."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlavaNextConfig, LlavaNextModel, MllamaConfig, MllamaModel

from spatial_forcing.doctor import DoctorOptions, Subject, examine
from tests.doctor.toys import Output
from tests.fakes import FakeTeacher

QUICK = DoctorOptions(teacher_dim=16)
IMAGE = 10
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
}


class VLA(nn.Module):
    def __init__(self, vlm):
        super().__init__()
        self.vlm, self.head = vlm, nn.Linear(32, 3)

    def forward(self, action, **inputs):
        return Output((self.head(self.vlm(**inputs).last_hidden_state[:, -1]) - action).abs().mean())


def ids(images):
    words = torch.randint(20, 90, (2, 5))
    return torch.cat([torch.tensor([1] + [IMAGE] * images).expand(2, -1), words], 1)


def llava_next():
    """A thumbnail of 4 x 4 tokens, then four tiles, their rows interleaved and ended by a learned token."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaNextConfig(
        vision_config={**vision, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[64, 64]],
        vision_feature_layer=-1,
    )
    batch = {
        "input_ids": ids(16 + 8 * 9),
        "pixel_values": torch.rand(2, 5, 3, 32, 32) * 2 - 1,
        "image_sizes": torch.tensor([[64, 64]] * 2),
        "action": torch.randn(2, 3),
    }
    return Subject(VLA(LlavaNextModel(config)), batch)


def mllama():
    torch.manual_seed(0)
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "attention_heads": 2,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 32,
            "patch_size": 16,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        text_config={**TEXT, "cross_attention_layers": [1, 3]},
        image_token_index=IMAGE,
    )
    words = ids(1)
    one = torch.ones(2, 1, dtype=torch.long)
    batch = {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "pixel_values": torch.rand(2, 1, 1, 3, 32, 32) * 2 - 1,
        "aspect_ratio_ids": one,
        "aspect_ratio_mask": one[:, None],
        "cross_attention_mask": torch.ones(2, words.shape[1], 1, 1, dtype=torch.long),
        "action": torch.randn(2, 3),
    }
    return Subject(VLA(MllamaModel(config)), batch)


def test_llava_next_has_interleaved_tiles():
    subject = llava_next()
    report = examine(subject, QUICK)
    assert report.ok, report.text()
    tiles = report.facts["positions"]
    assert [tile[0][0] for tile in tiles] == [1, 17, 21, 53, 57]
    assert tiles[4][3] == [84, 85, 86, 87]
    namespace = {"model": subject.model, "teacher": FakeTeacher()}
    exec(report.adapter, namespace)
    loss, metrics = namespace["forcing"](subject.batch)
    loss.backward()
    assert torch.isfinite(metrics["align_loss"])
    assert namespace["student"].alignment(subject.batch).layout.index[1].tolist() == tiles


def test_mllama_has_no_images_in_its_sequence():
    report = examine(mllama(), QUICK)
    check = report.checks[1]
    assert check.state == "FAIL"
    assert "do not enter the sequence of the decoder blocks vlm.language_model.layers" in check.remedy
    assert "cross-attention" in check.remedy
    named = examine(mllama(), DoctorOptions(blocks="vlm.language_model.layers", teacher_dim=16)).checks[1]
    assert "do not enter the sequence of the blocks vlm.language_model.layers" in named.remedy
