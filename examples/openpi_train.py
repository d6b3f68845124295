"""Spatial Forcing on pi0 as openpi trains it in PyTorch; nothing on disk is patched.

    python examples/openpi_train.py                            # small random weights, a minute on a CPU
    python examples/openpi_train.py --openpi ../openpi         # openpi's own class, in its environment

Both take --checkpoint pi0_base/model.safetensors (openpi's PyTorch layout), --dataset, --chunk 50 and
--teacher facebook/VGGT-1B; the first also wants --tokenizer, PaliGemma's, from the hub or as a folder.

Without --openpi the weights go into this package's `pi0` student on stock transformers, and come back under
openpi's names. With it, openpi's own `PI0Pytorch` is trained. It needs the transformers release that openpi
pins, and its own versions of three model files, which its instructions copy over the installed ones. Here
they are found in the checkout first, in this process only. Into openpi's environment goes
`pip install --no-deps spatial-forcing`, since the two pin different transformers.

Either way the alignment follows block 12 of 18, as in the paper, and openpi or this package serve the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from toy_data import toy_dataset

from spatial_forcing import (
    ForcingConfig,
    SpatialForcing,
    Views,
    as_student,
    layout_from_offset,
    load_teacher,
)
from spatial_forcing.data import Dataset
from spatial_forcing.data.loader import BatchLoader

WIDTH, DEPTH, EXPERT, VISION = 64, 4, 32, 32
"""Of the small model."""
PADDED = 32
"""Dimensions of a state or action, filled up with zeros."""


class Setup(NamedTuple):
    """What the loop needs: a student, its depth, batches without end, and how to save the policy."""

    student: nn.Module
    depth: int
    batches: Iterable[Any]
    save: Callable[[nn.Module, Path], None]


def train(setup: Setup, arguments: argparse.Namespace) -> None:
    after = round(setup.depth * 2 / 3)
    forcing = SpatialForcing(
        setup.student, load_teacher(arguments.teacher), ForcingConfig(pairs=((after, -1),))
    )
    trainable = [p for p in forcing.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=1e-10)
    for step, batch in zip(range(arguments.steps), setup.batches, strict=False):
        loss, metrics = forcing(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shown = ", ".join(f"{name} {metrics[name].item():.4f}" for name in ("action_loss", "cosine"))
        print(f"step {step}: loss {loss.item():.4f}, {shown}")
    setup.save(forcing.export(), arguments.output / "policy")


# ---- openpi's weights in this package's student


def from_checkpoint(arguments: argparse.Namespace, dataset: Dataset) -> Setup:
    from spatial_forcing.students import Pi0, Pi0Config
    from spatial_forcing.students.pi0 import Pi0Size

    checkpoint, tokenizer, size = arguments.checkpoint, arguments.tokenizer, Pi0Size()
    if checkpoint is None:
        widths = {"width": WIDTH, "mlp": 128, "head_dim": 16, "expert_width": EXPERT, "expert_mlp": 64}
        vision = {"vision_width": VISION, "vision_depth": 2, "vision_heads": 4, "vision_mlp": 48}
        size = Pi0Size(**widths, **vision, depth=DEPTH, image_size=56, vocab=512)
        tokenizer = small_tokenizer(arguments.output / "tokenizer", dataset.tasks.values())
        random = Pi0(Pi0Config(cameras=("front",), tokenizer="hashed", size=size), seed=arguments.seed)
        random.save_pretrained(arguments.output / "base")
        checkpoint = arguments.output / "base" / "model.safetensors"
    config = Pi0Config(
        cameras=dataset.cameras,
        state_dim=dataset.state.shape[1],
        action_dim=dataset.action.shape[1],
        chunk=arguments.chunk,
        tokenizer=str(tokenizer),
        pretrained=str(checkpoint),
        size=size,
    )

    def save(policy: nn.Module, folder: Path) -> None:
        assert isinstance(policy, Pi0)
        policy.save_pretrained(folder)
        unchanged = keys(folder / "model.safetensors") == keys(checkpoint)
        print(f"exported weights in openpi's layout to {folder}, keys unchanged: {unchanged}")

    student = Pi0.create(config, dataset.statistics(), seed=arguments.seed)
    return Setup(student, size.depth, endless(loader(dataset, arguments)), save)


def small_tokenizer(folder: Path, tasks: list[str]) -> Path:
    """In the manner of PaliGemma's, which has to be downloaded: a start token, and the newline a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<unk>", "\n", *sorted({word for task in tasks for word in task.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    parts = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    special = {"bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


# ---- openpi's own class


def from_openpi(arguments: argparse.Namespace, dataset: Dataset) -> Setup:
    model = openpi_model(arguments)
    names = list(model.state_dict())
    model._preprocess_observation = already_prepared
    grid = (16, 16)

    def views(batch: dict[str, Any]) -> Views:
        seen = batch["observation"]
        images = torch.stack([image / 2 + 0.5 for image in seen.images.values()], 1)
        present = torch.stack(list(seen.image_masks.values()), 1)
        return Views.create(images, list(seen.images), present=present)

    student = as_student(
        model,
        blocks=model.paligemma_with_expert.paligemma.language_model.layers,
        # Image tokens come first, view after view.
        layout=lambda batch: layout_from_offset(
            len(batch["actions"]), 3, grid, start=0, valid=views(batch).present
        ),
        views=views,
        loss=lambda model, batch: model(batch["observation"], batch["actions"]).mean(),
    )

    def save(policy: nn.Module, folder: Path) -> None:
        del policy._preprocess_observation
        folder.mkdir(parents=True, exist_ok=True)
        save_model(policy, str(folder / "model.safetensors"))  # as openpi does
        unchanged = list(policy.state_dict()) == names
        print(f"exported openpi's {type(policy).__name__} to {folder}, keys unchanged: {unchanged}")

    return Setup(student, len(student.blocks), openpi_batches(arguments, dataset), save)


def openpi_model(arguments: argparse.Namespace) -> Any:
    """`PI0Pytorch` with the checkpoint's weights, or small and random without one."""
    sys.path.insert(0, str(arguments.openpi / "src"))
    patched = arguments.openpi / "src/openpi/models_pytorch/transformers_replace/models"
    for folder in sorted(patched.iterdir()):
        # openpi's version of a model file is found before the installed one, in this process.
        import_module(f"transformers.models.{folder.name}").__path__.insert(0, str(folder))
    from openpi.models.pi0_config import Pi0Config
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    config = Pi0Config(dtype="float32", action_horizon=arguments.chunk, pytorch_compile_mode=None)
    if arguments.checkpoint is None:
        with small_openpi():
            return PI0Pytorch(config)
    model = PI0Pytorch(config)
    load_model(model, str(arguments.checkpoint))
    return model


@contextmanager
def small_openpi() -> Iterator[None]:
    """Openpi fixes most sizes of the network; this replaces them while a small one is built."""
    from openpi.models import gemma
    from openpi.models_pytorch import gemma_pytorch

    stock = gemma_pytorch.PaliGemmaForConditionalGeneration

    def small_paligemma(config: Any) -> Any:
        config.text_config.vocab_size = config._vocab_size = config.image_token_index = 512
        config.projection_dim = config.vision_config.projection_dim = WIDTH
        config.vision_config.hidden_size, config.vision_config.intermediate_size = VISION, 48
        config.vision_config.num_hidden_layers, config.vision_config.num_attention_heads = 2, 4
        return stock(config=config)

    def small_gemma(variant: str) -> Any:
        width = WIDTH if variant == "gemma_2b" else EXPERT
        heads = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 16}
        return gemma.Config(width=width, depth=DEPTH, mlp_dim=2 * width, **heads)

    with (
        mock.patch.object(gemma_pytorch, "PaliGemmaForConditionalGeneration", small_paligemma),
        mock.patch.object(gemma, "get_config", small_gemma),
    ):
        yield


def already_prepared(observation: Any, *, train: bool = True) -> tuple[Any, ...]:
    """In place of the model's own preparation, which draws a crop and a rotation that nobody else sees.

    `openpi_batches` draws them beforehand, so that the teacher gets the very images that the student gets.
    """
    return (
        list(observation.images.values()),
        list(observation.image_masks.values()),
        observation.tokenized_prompt,
        observation.tokenized_prompt_mask,
        observation.state,
    )


def openpi_batches(arguments: argparse.Namespace, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Batches of openpi's loader, prepared as its model does.

    For the toy task they are made here. Where a robot's openpi config has transforms of its own (other
    frames, relative actions), put openpi's loader in the place of `observations_of`:
    `create_data_loader(config, framework="pytorch")` yields the same pairs.
    """
    from openpi.models_pytorch.preprocessing_pytorch import preprocess_observation_pytorch

    for observation, actions in observations_of(arguments, dataset):
        seen = preprocess_observation_pytorch(observation, train=True)
        yield {"observation": seen, "actions": actions}


def observations_of(arguments: argparse.Namespace, dataset: Dataset) -> Iterator[tuple[Any, torch.Tensor]]:
    """(Observation, actions): openpi's three cameras as far as there are so many, padded numbers, prompts."""
    from openpi.models.model import Observation
    from openpi.models_pytorch.preprocessing_pytorch import IMAGE_KEYS
    from openpi.shared.image_tools import resize_with_pad_torch

    statistics = dataset.statistics()

    def numbers(batch: Any, key: str) -> torch.Tensor:
        stats = statistics[key]
        values = (batch[key] - torch.tensor(stats["mean"])) / (torch.tensor(stats["std"]) + 1e-6)
        return nn.functional.pad(values.float(), (0, PADDED - values.shape[-1]))

    if len(dataset.cameras) > len(IMAGE_KEYS):
        raise SystemExit(f"openpi's pi0 has {len(IMAGE_KEYS)} views; {dataset.root} has {dataset.cameras}.")
    for batch in endless(loader(dataset, arguments)):
        B = len(batch["action"])
        images = {key: torch.full((B, 3, 224, 224), -1.0) for key in IMAGE_KEYS}
        for key, camera in zip(IMAGE_KEYS, dataset.cameras, strict=False):
            pixels = batch[f"observation.images.{camera}"].permute(0, 2, 3, 1) / 127.5 - 1
            resized = resize_with_pad_torch(pixels, 224, 224).view(B, 224, 224, 3)  # a batch of one is lost
            images[key] = resized.permute(0, 3, 1, 2)
        words, real = prompts(batch["task"], arguments)
        there = len(dataset.cameras)
        masks = {key: torch.full((B,), i < there) for i, key in enumerate(IMAGE_KEYS)}
        yield (
            Observation(
                images=images,
                image_masks=masks,
                state=numbers(batch, "observation.state"),
                tokenized_prompt=words,
                tokenized_prompt_mask=real,
            ),
            numbers(batch, "action"),
        )


def prompts(texts: list[str], arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are real: of openpi's tokenizer, which it downloads, or of a stand-in."""
    if arguments.checkpoint is None:
        ids = torch.tensor([[2, 5, 6, 7, 108]]).expand(len(texts), 5)
        return ids, torch.ones_like(ids, dtype=torch.bool)
    ids, real = zip(*(openpi_tokenizer().tokenize(text) for text in texts), strict=True)
    return torch.from_numpy(np.stack(ids)).long(), torch.from_numpy(np.stack(real))


@lru_cache
def openpi_tokenizer() -> Any:
    from openpi.models.tokenizer import PaligemmaTokenizer

    return PaligemmaTokenizer(48)


# ---- both


def loader(dataset: Dataset, arguments: argparse.Namespace) -> BatchLoader:
    settings = {"chunk": arguments.chunk, "batch_size": arguments.batch_size, "seed": arguments.seed}
    return BatchLoader(dataset, cameras=dataset.cameras, progress=False, **settings)


def endless(batches: BatchLoader) -> Iterator[Any]:
    return (batches.batch(step) for step in count())


def keys(path: Path) -> set[str]:
    with safe_open(path, "pt") as weights:
        return set(weights.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openpi", type=Path, help="a checkout of openpi: train its own class")
    parser.add_argument("--checkpoint", type=Path, help="model.safetensors in openpi's PyTorch layout")
    parser.add_argument(
        "--tokenizer", default="google/paligemma-3b-pt-224", help="hub id or folder, without --openpi"
    )
    parser.add_argument("--dataset", type=Path, help="a LeRobot v3.0 dataset; default: drawn")
    parser.add_argument("--teacher", default="vggt-nano", help="registered name, hub id or local folder")
    parser.add_argument("--output", type=Path, default=Path("runs/openpi"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, help="default: 2.5e-5 with a checkpoint, else 2e-3")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=10, help="actions a prediction; 50 for pi0_base")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.lr = arguments.lr or (2e-3 if arguments.checkpoint is None else 2.5e-5)
    torch.manual_seed(arguments.seed)
    dataset = Dataset.open(arguments.dataset or toy_dataset(arguments.output / "data"))
    setup = (from_openpi if arguments.openpi else from_checkpoint)(arguments, dataset)
    train(setup, arguments)


if __name__ == "__main__":
    main()
