"""The 50 tasks of Meta-World 3.1.1: an instruction for each, and which of them share objects.

Tables only: nothing here needs the simulator to be installed.
"""

from __future__ import annotations

from spatial_forcing.registry import unknown

INSTRUCTIONS: dict[str, str] = {
    "assembly-v3": "pick up the ring by its handle and put it over the peg",
    "basketball-v3": "pick up the ball and drop it through the hoop",
    "bin-picking-v3": "take the cube out of the red bin and put it into the blue bin",
    "box-close-v3": "pick up the lid and close the box with it",
    "button-press-topdown-v3": "press the red button down from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the red button down from above",
    "button-press-v3": "push the red button in from the front",
    "button-press-wall-v3": "get past the wall and push the red button in from the front",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine to the green marker",
    "coffee-push-v3": "push the mug under the coffee machine to the green marker",
    "dial-turn-v3": "turn the dial to the red marker",
    "disassemble-v3": "grasp the ring by its handle and lift it off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door by turning the lock",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door by turning the lock",
    "drawer-close-v3": "push the drawer shut",
    "drawer-open-v3": "pull the drawer open",
    "faucet-close-v3": "turn the faucet handle to close it",
    "faucet-open-v3": "turn the faucet handle to open it",
    "hammer-v3": "pick up the hammer and drive the nail in",
    "hand-insert-v3": "put the gripper and the cube into the hole in the table",
    "handle-press-side-v3": "press the handle at the side down",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle at the side up",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up to the red marker",
    "peg-insert-side-v3": "pick up the peg and insert it into the hole in the side of the box",
    "peg-unplug-side-v3": "pull the plug out of its socket sideways",
    "pick-out-of-hole-v3": "pick the red puck out of the hole and bring it to the blue marker",
    "pick-place-v3": "pick up the red puck and hold it at the blue marker",
    "pick-place-wall-v3": "pick up the red puck, lift it over the wall and hold it at the blue marker",
    "plate-slide-back-side-v3": "slide the plate sideways out of the goal to the red marker",
    "plate-slide-back-v3": "slide the plate back out of the goal to the red marker",
    "plate-slide-side-v3": "slide the plate sideways into the goal",
    "plate-slide-v3": "slide the plate forward into the goal",
    "push-back-v3": "pull the cube back to the green marker",
    "push-v3": "push the red puck to the green marker",
    "push-wall-v3": "push the red puck around the wall to the green marker",
    "reach-v3": "move the gripper to the red marker",
    "reach-wall-v3": "move the gripper past the wall to the red marker",
    "shelf-place-v3": "pick up the blue cube and place it on the shelf",
    "soccer-v3": "push the ball into the goal",
    "stick-pull-v3": "grasp the stick and pull the thermos with it to the green marker",
    "stick-push-v3": "grasp the stick and push the thermos with it to the green marker",
    "sweep-into-v3": "sweep the cube into the hole in the table",
    "sweep-v3": "sweep the cube off the table",
    "window-close-v3": "slide the window shut",
    "window-open-v3": "slide the window open",
}
"""Task name to instruction. A marker is the coloured ball that the simulator draws at the goal."""

OBJECT_FAMILIES: dict[str, tuple[str, ...]] = {
    "ring and peg": ("assembly-v3", "disassemble-v3"),
    "basketball": ("basketball-v3",),
    "bin": ("bin-picking-v3", "box-close-v3"),
    "button": (
        "button-press-topdown-v3",
        "button-press-topdown-wall-v3",
        "button-press-v3",
        "button-press-wall-v3",
    ),
    "coffee machine": ("coffee-button-v3", "coffee-pull-v3", "coffee-push-v3"),
    "block and puck": (
        "hand-insert-v3",
        "pick-out-of-hole-v3",
        "pick-place-v3",
        "pick-place-wall-v3",
        "push-back-v3",
        "push-v3",
        "push-wall-v3",
        "reach-v3",
        "reach-wall-v3",
        "sweep-into-v3",
        "sweep-v3",
    ),
    "dial": ("dial-turn-v3",),
    "door": ("door-close-v3", "door-lock-v3", "door-open-v3", "door-unlock-v3"),
    "drawer": ("drawer-close-v3", "drawer-open-v3"),
    "faucet": ("faucet-close-v3", "faucet-open-v3"),
    "hammer": ("hammer-v3",),
    "handle": ("handle-press-side-v3", "handle-press-v3", "handle-pull-side-v3", "handle-pull-v3"),
    "lever": ("lever-pull-v3",),
    "peg and box": ("peg-insert-side-v3",),
    "plug": ("peg-unplug-side-v3",),
    "plate": ("plate-slide-back-side-v3", "plate-slide-back-v3", "plate-slide-side-v3", "plate-slide-v3"),
    "shelf": ("shelf-place-v3",),
    "soccer ball": ("soccer-v3",),
    "stick and thermos": ("stick-pull-v3", "stick-push-v3"),
    "window": ("window-close-v3", "window-open-v3"),
}
"""Tasks that show a common mesh (robot and table aside), directly or through a third task. Covers all 50."""


def object_family(task: str) -> str:
    """The family of `task` in `OBJECT_FAMILIES`. Raises `ConfigError` for an unknown task."""
    for family, members in OBJECT_FAMILIES.items():
        if task in members:
            return family
    raise unknown("Meta-World task", task, INSTRUCTIONS)
