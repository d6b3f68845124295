"""Spatial Forcing on a LeRobot policy: in Python, and as the `lerobot-train` command that does the same.

    python examples/lerobot_train.py            # in Python, a minute on a CPU; prints the command at the end
    python examples/lerobot_train.py --cli      # the command itself

Python 3.12, LeRobot 0.6 and the plugin (`pip install ./plugin`). The policy is an X-VLA of a few layers with
random weights on a drawn dataset, so nothing is downloaded: all of its sizes are settings. With
`pi05_sf` and `policy.pretrained_path=lerobot/pi05_base` the same lines fine-tune a real one; docs/lerobot.md
has the commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from toy_data import toy_dataset

KIND, SIZE, CHUNK, WIDTH, VOCAB = "xvla", 128, 8, 64, 300
VISION = {
    "model_type": "florence_vision",
    "depths": [1, 1, 1, 1],
    "embed_dim": [16, 16, 32, 32],
    "num_heads": [2, 2, 4, 4],
    "num_groups": [2, 2, 4, 4],
    "window_size": 4,
    "projection_dim": WIDTH,
    "max_position_embeddings": 20,
}
LANGUAGE = {
    "model_type": "bart",
    "d_model": WIDTH,
    "encoder_layers": 4,
    "encoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_layers": 1,
    "decoder_ffn_dim": 96,
    "decoder_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}


def policy_settings(tokenizer: Path) -> dict[str, Any]:
    """What differs from the stock configuration."""
    return {
        "florence_config": {"vision_config": VISION, "text_config": LANGUAGE},
        "tokenizer_name": str(tokenizer),
        "tokenizer_max_length": 8,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
        "num_domains": 2,
        "len_soft_prompts": 2,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "action_mode": "auto",
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK,
        "num_denoising_steps": 3,
        "optimizer_lr": 2e-3,
        "scheduler_warmup_steps": 1,
        "device": "cpu",
        "push_to_hub": False,
    }


def forcing_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What goes below `--policy.forcing.`"""
    return {"alpha": 0.5, "teacher": str(arguments.teacher), "teacher_dtype": "fp32"}


def train(arguments: argparse.Namespace, root: Path, tokenizer: Path) -> None:
    """A loop of one's own around the forced policy."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets import LeRobotDataset
    from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
    from lerobot_policy_spatial_forcing import ForcingSettings  # registers xvla_sf, pi05_sf, ...

    from spatial_forcing.commands.lerobot import ExportOptions, export

    forcing = ForcingSettings(**forcing_settings(arguments), schedule_steps=arguments.steps)
    settings = policy_settings(tokenizer)
    config = PreTrainedConfig.get_choice_class(f"{KIND}_sf")(**settings, forcing=forcing)
    times = {"action": [i / 10 for i in range(CHUNK)]}
    dataset = LeRobotDataset("toy/reach", root=root, delta_timestamps=times, video_backend="pyav")
    policy = make_policy(config, ds_meta=dataset.meta)
    prepare, finish = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)

    optimizer = torch.optim.AdamW(policy.get_optim_params().values(), lr=config.optimizer_lr)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True)
    policy.train()
    for step, batch in enumerate(islice(forever(loader), arguments.steps)):
        loss, metrics = policy(prepare(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        policy.update()  # moves the schedule of the weight on
        shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("action_loss", "cosine"))
        print(f"step {step}: loss {loss.item():.4f}, {shown}")

    # The forced checkpoint goes on training; the exported one is LeRobot's own, without plugin and teacher.
    forced = arguments.output / "forced"
    for part in (policy, prepare, finish):
        part.save_pretrained(forced)
    export(ExportOptions(forced, arguments.output / "policy"))
    stock = get_policy_class(KIND).from_pretrained(arguments.output / "policy")
    same = torch.equal(act(stock, prepare(batch)), act(policy, prepare(batch)))
    print(f"exported a stock {type(stock).__name__} to {arguments.output / 'policy'}, same actions: {same}")


def act(policy: Any, batch: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    policy.eval()
    return policy.predict_action_chunk(batch)


def forever(loader: Any) -> Any:
    while True:
        yield from loader


def command(arguments: argparse.Namespace, root: Path, tokenizer: Path) -> list[str]:
    """The same run for LeRobot's trainer."""
    options = {
        "dataset.repo_id": "toy/reach",
        "dataset.root": root,
        "dataset.video_backend": "pyav",
        "policy.type": f"{KIND}_sf",
        **{f"policy.{name}": value for name, value in policy_settings(tokenizer).items()},
        **{f"policy.forcing.{name}": value for name, value in forcing_settings(arguments).items()},
        "output_dir": arguments.output / "lerobot",
        "steps": arguments.steps,
        "save_freq": arguments.steps,
        "log_freq": 1,
        "batch_size": 8,
        "num_workers": 0,
        "env_eval_freq": 0,
    }
    return [f"--{name}={plain(value)}" for name, value in options.items()]


def plain(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def small_tokenizer(folder: Path) -> Path:
    """A few words in place of the policy's own tokenizer, which has to be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "reach", "the", "cube"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/lerobot"))
    parser.add_argument("--teacher", default="vggt-nano", help="registered name, hub id or local folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cli", action="store_true", help="run lerobot-train instead of the loop below")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    root = toy_dataset(arguments.output / "data", size=SIZE).resolve()
    tokenizer = small_tokenizer(arguments.output / "tokenizer").resolve()
    options = command(arguments, root, tokenizer)
    if arguments.cli:
        from lerobot.scripts.lerobot_train import main as lerobot_train

        sys.argv = ["lerobot-train", *options]
        lerobot_train()
    else:
        train(arguments, root, tokenizer)
        print("the same with LeRobot's trainer:\n  lerobot-train", shlex.join(options))


if __name__ == "__main__":
    main()
