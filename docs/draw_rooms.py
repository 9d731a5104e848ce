"""Draw docs/rooms.png: the rooms of the package on their floors, each with the rooms that it imports from.

The imports are read from the source; what a room imports by way of another one, and the ground, are left out.

python docs/draw_rooms.py
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parent.parent
# from the ground up; on a floor a room may import from those to its left
FLOORS: list[tuple[str, dict[str, str]]] = [
    (
        "ground",
        {
            "redact": "secrets as ***",
            "errors": "what a user reads",
            "rng": "draws by seed and position",
            "files": "whole or not there",
            "interfaces": "shapes and protocols",
        },
    ),
    ("records", {"record": "the run directory's files"}),
    (
        "method",
        {
            "diffusion": "pure tensor mathematics",
            "data": "images to samples",
            "model": "networks, text, latents",
            "optimizer": "steps, rates, averages",
            "memory": "actions on a built model",
        },
    ),
    (
        "a run's parts",
        {
            "distributed": "strategies",
            "adapter": "what is trained",
            "engine": "the loop around it",
            "tracker": "where numbers go",
            "evals": "what is measured",
        },
    ),
    (
        "one run",
        {
            "task": "data, loss and delivery",
            "config": "yaml to checked objects",
            "profiler": "where time goes",
            "training": "from start to delivery",
        },
    ),
    (
        "tools",
        {
            "inspect": "before training",
            "compare": "sweep to answer",
            "plan": "memory and cost",
            "sample": "a finished run",
            "judge": "models to answer",
            "sweep": "arms to train",
            "docs": "option pages",
        },
    ),
]
COMMANDS = {
    "train": "one run, or a sweep",
    "evaluate": "measures finished runs",
    "precompute": "fills the cache",
    "export": "one .safetensors file",
    "sync": "sends to MLflow",
}
INK, GREY, PAPER = "#22303c", "#5d6b78", "#ffffff"
COLORS = ["#dfe3e8", "#e9dcc9", "#cfe3d4", "#cddff0", "#e6d5ea", "#f6dfd0", "#f4eec4"]
WIDTH, HEIGHT, FLOOR = 14.0, 1.0, 1.18  # of the picture, of a room, from floor to floor
GROUND = tuple(FLOORS[0][1])


def rooms() -> list[str]:
    """Every room, in the order in which they may import from each other."""
    return [room for _, floor in FLOORS for room in floor]


def imports() -> dict[str, set[str]]:
    """Room or entry point -> the rooms that its files name in import statements."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "nai_xl").rglob("*.py")):
        own = path.relative_to(ROOT / "nai_xl").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nai_xl":
                parts = [f"{node.module}.{alias.name}".split(".")[1] for alias in node.names]
                found.setdefault(own, set()).update(part for part in parts if part in rooms() and part != own)
    return found


def direct(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """`needs` without what another needed room brings along, and without the ground, which nearly all stand on."""

    def reached(room: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in needs.get(room, set())))

    shown = {room: others - set(GROUND) for room, others in needs.items()}
    return {room: {o for o in others if not any(o in reached(p) for p in others)} for room, others in shown.items()}


def draw(target: Path) -> None:
    needs = direct(imports())
    entry_points = {name: COMMANDS.get(name, "") for name in sorted({*imports()} - {*rooms(), "__init__"})}
    floors = [*FLOORS, ("commands", entry_points)]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.02 * len(floors)), dpi=110)
    for level, (name, floor) in enumerate(floors):
        axes.text(0.1, level * FLOOR + HEIGHT / 2, name, va="center", fontsize=11, color=INK, style="italic")
        for place, (room, words) in zip(_places(level, len(floor)), floor.items(), strict=True):
            _room(axes, *place, room, words, sorted(needs.get(room, ())), COLORS[level])
    axes.set(xlim=(0, WIDTH), ylim=(-0.1, FLOOR * len(floors)))
    axes.axis("off")
    figure.savefig(target, bbox_inches="tight", pad_inches=0.1, facecolor=PAPER, metadata={"Software": None})
    plt.close(figure)


def _places(level: int, count: int) -> list[tuple[float, float, float]]:
    """Left edge, bottom and width of each room of a floor."""
    left = 2.0
    each = (WIDTH - left) / count
    return [(left + i * each + 0.06, level * FLOOR, each - 0.12) for i in range(count)]


def _room(axes: Axes, x: float, y: float, width: float, name: str, words: str, needs: list[str], color: str) -> None:
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, HEIGHT, boxstyle=shape, fc=color, ec=INK, lw=0.9))
    middle = {"x": x + width / 2, "ha": "center", "va": "center"}
    uses = textwrap.fill(", ".join(needs), max(20, int(width * 12)))
    down = 0 if uses else HEIGHT * 0.13
    axes.text(y=y + HEIGHT * 0.79 - down, s=name, fontsize=11.5, weight="bold", color=INK, **middle)
    axes.text(y=y + HEIGHT * 0.53 - down, s=words, fontsize=8.5, color=INK, **middle)
    axes.text(y=y + HEIGHT * 0.22, s=uses, fontsize=7.2, color=GREY, linespacing=1.1, **middle)


if __name__ == "__main__":
    draw(ROOT / "docs" / "rooms.png")
