"""Small random policies of LeRobot's families, stock and forced, and batches for them.

LeRobot fixes most sizes of its networks; the builders replace the constructors' configurations in memory.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class

from spatial_forcing.teachers import TEACHERS
from spatial_forcing.teachers.cards import TeacherCard
from tests.fakes import FakeTeacher

CAMERAS = ("front", "wrist")
STATE, ACTION = 5, 4
WIDTH, DEPTH, VOCAB = 64, 4, 300


def load_fake(*args: Any, **kwargs: Any) -> FakeTeacher:
    return FakeTeacher()


if "fake" not in TEACHERS:
    TEACHERS.add("fake", TeacherCard("fake", load_fake, "Apache-2.0", "for tests"))


def features(size: tuple[int, int], cameras=CAMERAS) -> dict[str, Any]:
    inputs = {f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, *size)) for c in cameras}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE,))
    return {
        "input_features": inputs,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        "device": "cpu",
        "push_to_hub": False,
    }


def random_batch(
    size: tuple[int, int] = (40, 40), B: int = 2, seed: int = 0, cameras=CAMERAS
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Any] = {
        f"observation.images.{c}": torch.rand(B, 3, *size, generator=generator) for c in cameras
    }
    batch["observation.state"] = torch.randn(B, STATE, generator=generator)
    batch["action"] = torch.randn(B, 6, ACTION, generator=generator)
    batch["action_is_pad"] = torch.zeros(B, 6, dtype=torch.bool)
    batch["observation.language.tokens"] = torch.randint(3, 200, (B, 7), generator=generator)
    batch["observation.language.attention_mask"] = torch.ones(B, 7, dtype=torch.bool)
    batch["task"] = ["touch the cube"] * B
    batch["index"] = torch.arange(B) + 100 * seed
    return batch


class Family:
    """How to build one family small; subclasses say what differs."""

    name = ""
    sizes: dict[str, Any] = {}
    size = (40, 40)
    token_image = 56
    """Pixels on a side of the image that is cut into tokens."""
    views = 2
    """How many views the tapped sequence holds."""
    bars = True
    """Whether images of another shape are padded."""
    chunk = {"chunk_size": 6, "n_action_steps": 6}
    trainable: dict[str, Any] = {}
    """Settings that unfreeze what lies below the tap."""

    @contextlib.contextmanager
    def small(self):
        yield

    def config(self, kind: str | None = None, **changes: Any) -> Any:
        settings = {**features(self.size), **self.chunk, **self.sizes, **self.trainable, **changes}
        return PreTrainedConfig.get_choice_class(kind or self.name)(**settings)

    def build(self, config: Any) -> Any:
        with self.small():
            return get_policy_class(config.type)(config)

    def stock(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        return self.build(self.config(**changes))

    def forced(self, forcing: dict[str, Any] | None = None, **changes: Any) -> Any:
        from lerobot_policy_spatial_forcing.settings import ForcingSettings

        settings = ForcingSettings(**{"teacher": "fake", "pairs": ((2, -1),), **(forcing or {})})
        torch.manual_seed(0)
        return self.build(self.config(f"{self.name}_sf", forcing=settings, **changes))

    def load(self, kind: str, folder: Any, config: Any = None) -> Any:
        with self.small():
            return get_policy_class(kind).from_pretrained(folder, **({"config": config} if config else {}))

    def batch(self, **changes: Any) -> dict[str, Any]:
        return self.finish(random_batch(**{"size": self.size, **changes}))

    def steady(self, policy: Any) -> None:
        """Weights with which a painted patch changes its own token most, where random ones need not."""

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the family's processor makes of the images, again after a test has changed them."""
        return batch


class Pi(Family):
    sizes = {"image_resolution": (56, 56), "max_state_dim": 8, "max_action_dim": 8, "num_inference_steps": 3}

    def __init__(self, name: str, vocab: int = VOCAB) -> None:
        self.name, self.vocab = name, vocab

    @contextlib.contextmanager
    def small(self):
        import importlib

        module = importlib.import_module(f"lerobot.policies.{self.name}.modeling_{self.name}")
        vlm, expert = (
            module.PaliGemmaForConditionalGenerationWithPiGemma,
            getattr(module, "PiGemmaForCausalLM", None),
        )

        def small_vlm(config):
            config.text_config.vocab_size = self.vocab
            config._vocab_size = self.vocab
            config.image_token_index = config.image_token_id = self.vocab
            config.projection_dim = WIDTH
            vision = config.vision_config
            vision.projection_dim, vision.hidden_size, vision.intermediate_size = WIDTH, 32, 48
            vision.num_hidden_layers, vision.num_attention_heads = 2, 4
            vision.image_size = self.sizes["image_resolution"][0]
            return vlm(config=config)

        def small_expert(config):
            config.vocab_size = self.vocab
            return expert(config=config)

        def gemma(variant):
            width = WIDTH if variant == "gemma_2b" else 32
            return SimpleNamespace(
                width=width, depth=DEPTH, mlp_dim=2 * width, num_heads=8, num_kv_heads=1, head_dim=16
            )

        with contextlib.ExitStack() as stack:
            for name, value in (
                ("PaliGemmaForConditionalGenerationWithPiGemma", small_vlm),
                ("PiGemmaForCausalLM", small_expert),
                ("get_gemma_config", gemma),
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
            yield


class Pi0Fast(Pi):
    sizes = {"image_resolution": (56, 56), "max_action_tokens": 9}

    def __init__(self) -> None:
        super().__init__("pi0_fast")

    @contextlib.contextmanager
    def small(self):
        from lerobot.policies.pi0_fast import modeling_pi0_fast as module

        tokenizer = SimpleNamespace(bos_token_id=2, convert_tokens_to_ids=lambda token: 5)
        loader = SimpleNamespace(from_pretrained=lambda *a, **k: tokenizer)
        with (
            super().small(),
            mock.patch.object(module, "AutoProcessor", loader),
            mock.patch.object(module, "AutoTokenizer", loader),
        ):
            yield

    def batch(self, **changes: Any) -> dict[str, Any]:
        batch = super().batch(**changes)
        B = len(batch["action"])
        generator = torch.Generator().manual_seed(5)
        batch["action.tokens"] = torch.randint(3, 200, (B, 9), generator=generator)
        batch["action.token_mask"] = torch.ones(B, 9, dtype=torch.bool)
        return batch


class SmolVLA(Family):
    name = "smolvla"
    token_image = 64
    sizes = {
        "resize_imgs_with_padding": (64, 64),
        "num_vlm_layers": DEPTH,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "num_steps": 3,
    }
    trainable = {"train_expert_only": False, "freeze_vision_encoder": False}

    @contextlib.contextmanager
    def small(self):
        from lerobot.policies.smolvla import smolvlm_with_expert as module
        from transformers import SmolVLMConfig

        config = SmolVLMConfig(
            text_config={
                "model_type": "llama",
                "hidden_size": WIDTH,
                "intermediate_size": 96,
                "num_hidden_layers": DEPTH,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": VOCAB,
                "pad_token_id": 0,
            },
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
            },
            scale_factor=2,
            image_token_id=VOCAB - 1,
            pad_token_id=0,
        )
        ids = SimpleNamespace(fake_image_token_id=7, global_image_token_id=8)
        with (
            mock.patch.object(module.AutoConfig, "from_pretrained", return_value=config),
            mock.patch.object(
                module.AutoProcessor, "from_pretrained", return_value=SimpleNamespace(tokenizer=ids)
            ),
        ):
            yield


def imagenet(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its images normalised by ImageNet's statistics."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return {
        key: (value - mean) / std if key.startswith("observation.images.") else value
        for key, value in batch.items()
    }


class XVLA(Family):
    name = "xvla"
    token_image = 128
    views, bars = 1, False
    size = (128, 128)
    sizes = {
        "florence_config": {
            "vision_config": {
                "model_type": "florence_vision",
                "depths": [1, 1, 1, 1],
                "embed_dim": [16, 16, 32, 32],
                "num_heads": [2, 2, 4, 4],
                "num_groups": [2, 2, 4, 4],
                "window_size": 4,
                "projection_dim": WIDTH,
                "max_position_embeddings": 20,
            },
            "text_config": {
                "model_type": "bart",
                "d_model": WIDTH,
                "encoder_layers": DEPTH,
                "encoder_ffn_dim": 96,
                "encoder_attention_heads": 4,
                "decoder_layers": 1,
                "decoder_ffn_dim": 96,
                "decoder_attention_heads": 4,
                "vocab_size": VOCAB,
                "max_position_embeddings": 128,
            },
        },
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
        "num_domains": 2,
        "len_soft_prompts": 2,
        "max_state_dim": 8,
        "action_mode": "auto",
        "max_action_dim": 8,
        "num_denoising_steps": 3,
    }

    def batch(self, **changes: Any) -> dict[str, Any]:
        return imagenet(super().batch(**changes))


class ACT(Family):
    name = "act"
    token_image = 256
    bars = False
    size = (128, 128)
    sizes = {
        "dim_model": WIDTH,
        "n_heads": 4,
        "dim_feedforward": 96,
        "n_encoder_layers": DEPTH,
        "n_vae_encoder_layers": 1,
        "latent_dim": 8,
        "pretrained_backbone_weights": None,
    }

    def batch(self, **changes: Any) -> dict[str, Any]:
        return imagenet(super().batch(**changes))

    @torch.no_grad()
    def steady(self, policy: Any) -> None:
        """Means instead of random convolutions: every cell sees its surroundings, and its centre most."""
        for weight in policy.model.backbone.parameters():
            if weight.ndim == 4:
                weight.abs_().div_(weight.flatten(1).sum(1)[:, None, None, None])


class EO1(Family):
    name = "eo1"
    token_image = 112
    bars = False
    size = (112, 112)
    image_token, state_token, action_token = 290, 291, 292

    @property
    def sizes(self) -> dict[str, Any]:
        from transformers import Qwen2_5_VLConfig

        text = {
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            "pad_token_id": 0,
        }
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "fullatt_block_indexes": [1],
        }
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=self.image_token)
        return {
            "vlm_config": config.to_dict(),
            "dtype": "float32",
            "max_state_dim": 8,
            "max_action_dim": 8,
            "num_denoise_steps": 3,
        }

    @contextlib.contextmanager
    def small(self):
        from lerobot.policies.eo1 import modeling_eo1 as module

        stock = module.Qwen2_5_VLForConditionalGeneration

        def build(*args, **kwargs):
            from transformers import Qwen2_5_VLConfig

            return stock._from_config(Qwen2_5_VLConfig(**self.sizes["vlm_config"]), dtype=torch.float32)

        with mock.patch.object(stock, "from_pretrained", build):
            yield

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        keys = [key for key in batch if key.startswith("observation.images.")]
        B = len(batch["action"])
        images = [(batch[key][i] * 255).round().to(torch.uint8) for i in range(B) for key in keys]
        processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=10**6, merge_size=2, patch_size=14)
        made = processor(images=images, return_tensors="pt")
        counts = (made["image_grid_thw"].prod(-1) // 4).view(B, len(keys)).tolist()
        rows = [
            [3, *(token for n in row for token in [4, *[self.image_token] * n, 5]), self.state_token, 6]
            + [self.action_token] * 6
            + [7]
            for row in counts
        ]
        ids = torch.tensor(rows)
        return {
            **batch,
            "pixel_values": made["pixel_values"],
            "image_grid_thw": made["image_grid_thw"],
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.image_token).int(),
            "state_token_id": self.state_token,
            "action_token_id": self.action_token,
        }


def parameters_of(policy: Any) -> list[Any]:
    """What LeRobot's optimizer trains."""
    found = policy.get_optim_params()
    listed = list(found.values() if isinstance(found, dict) else found)
    if listed and isinstance(listed[0], dict):
        listed = [p for group in listed for p in group["params"]]
    return [p for p in listed if p.requires_grad]


FAMILIES: dict[str, Family] = {
    family.name: family for family in (Pi("pi0"), Pi("pi05"), Pi0Fast(), SmolVLA(), XVLA(), EO1(), ACT())
}
