"""Which sigma_max does a canvas need? By theory, with infinitely many steps and with 28.

python experiments/gaussian_sigma/theory.py           # needed.csv, steps.csv, best.csv, figure.png beside this file
python experiments/gaussian_sigma/theory.py outputs   # reads the runs of experiment=gaussian_sigma into measured.csv
"""

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt

from nai_xl.diffusion.ideal import power_spectrum, sampled, sigma_max
from nai_xl.diffusion.sampling import Method, path
from nai_xl.diffusion.schedule import cosine, high_sigma, scaled_linear, ztsnr
from nai_xl.interfaces import Schedule
from nai_xl.record.arm import read_arm
from nai_xl.record.items import read_items
from nai_xl.record.journal import metrics_of

HERE = Path(__file__).parent
CANVASES, POWERS, KEPT = (64, 128, 256, 512, 1024, 2048), (1.0, 1.5, 2.0, 2.5, 3.0, 4.0), 0.9
ZERO = ztsnr(scaled_linear())
METHODS: tuple[Method, ...] = ("ddim", "dpmpp_2m")
ENDS = np.geomspace(14.62, 20000, 80)  # the paper stands in 20000 for infinity
Row = dict[str, object]


def needed() -> list[Row]:
    """The sigma_max that keeps 90 % of the mean's variance with exact steps, and its growth from the canvas before."""
    rows: list[Row] = []
    for power in POWERS:
        before = math.nan
        for edge in CANVASES:
            s = sigma_max(float(power_spectrum(edge // 8, edge // 8, power)[0, 0]), KEPT)
            rows.append({"power": power, "canvas": edge, "sigma_max": s, "growth": s / before})
            before = s
    return rows


def steps() -> list[Row]:
    """128 x 128 latents, p = 2: what is kept by 28 and by 1000 steps."""
    rows: list[Row] = []
    spectrum = power_spectrum(128, 128, 2.0)
    schedules = {f"{end:g}": ending(end) for end in (14.6, 29.0, 56.0, 200.0, 1000.0, 20000.0)} | {"ztsnr": ZERO}
    schedules |= {f"ztsnr on {end:g}": ztsnr(ending(end)) for end in (200.0, 1000.0)} | {"cosine": cosine()}
    for end, schedule in schedules.items():
        for count in (28, 1000):
            row: Row = {"schedule": end, "steps": count, "second_level": second(schedule, count)}
            for method in METHODS:
                run = sampled(spectrum, schedule, steps=count, method=method)
                row |= {f"{method}_variance": float(run.variance_kept[0, 0]), f"{method}_mean": float(run.mean_kept)}
                row |= {f"{method}_distance": run.distance(), f"{method}_distance_with_mean": run.distance(0.5)}
            rows.append(row)
    return rows


def best() -> list[Row]:
    """The sigma_max, of high_sigma, whose 28 steps come nearest to the data, for each canvas and power."""
    rows: list[Row] = []
    for power in (1.0, 2.0, 3.0):
        for edge in CANVASES[:-1]:
            spectrum = power_spectrum(edge // 8, edge // 8, power)
            for method in METHODS:
                for mean in (0.0, 0.5):
                    found = [sampled(spectrum, ending(s), steps=28, method=method).distance(mean) for s in ENDS]
                    zero = sampled(spectrum, ZERO, steps=28, method=method).distance(mean)
                    place = int(np.argmin(found))
                    row: Row = {"power": power, "canvas": edge, "method": method, "mean": mean}
                    row |= {"best_sigma_max": float(ENDS[place]), "distance": found[place], "ztsnr_distance": zero}
                    rows.append(row | {"sdxl_distance": found[0]})
    return rows


def ending(s: float) -> Schedule:
    """SDXL's schedule, continued to sigma / alpha = s; its own end is 14.6."""
    return scaled_linear() if s < 14.62 else high_sigma(scaled_linear(), sigma_max=s)


def second(schedule: Schedule, count: int) -> float:
    """sigma / alpha of the second of `count` levels."""
    level = path(schedule, count)[1]
    return float(level.sigma / level.alpha)


def measured(outputs: Path) -> list[Row]:
    """The last evaluation of every run of the experiment, with standard errors over its samples."""
    rows: list[Row] = []
    for home in sorted(home for home in outputs.iterdir() if home.is_dir()):
        arm = read_arm(home)
        if arm is None or "gaussian_sigma" not in arm.sweeps or arm.status != "FINISHED":
            continue
        last = [row for row in metrics_of(home).rows() if "mean_kept/caption" in row][-1]
        row: Row = {"arm": arm.label, "seed": arm.seed}
        for metric in ("caption", "variance"):
            values = torch.tensor(list(read_items(home, f"mean_kept/{metric}")[last["step"]].values()))
            row |= {metric: last[f"mean_kept/{metric}"], f"{metric}_error": float(values.std() / len(values) ** 0.5)}
            row |= {f"{metric}_ideal": last[f"mean_kept/{metric}_ideal"]}
        rows.append(row | {"excess_terminal": last["optimality/excess_terminal"]})
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def draw(rows: Sequence[Row]) -> None:
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for power in (1.0, 2.0, 3.0, 4.0):
        some = [row for row in rows if row["power"] == power]
        panels[0].plot(CANVASES, [r["sigma_max"] for r in some], "o-", markersize=4, label=f"p = {power:g}")
    panels[0].plot(CANVASES, [0.2 * edge for edge in CANVASES], "--", color="0.6", label="∝ length")
    panels[0].axhline(14.6, color="0.8", zorder=0)
    panels[0].annotate("SDXL's 14.6", (2048, 14.6), (0, -11), textcoords="offset points", ha="right", fontsize=8)
    panels[0].set(
        xscale="log", yscale="log", xlabel="canvas, px", ylabel="sigma_max", xticks=CANVASES, xticklabels=CANVASES
    )
    panels[0].set_title("needed to keep 90 % of the mean's variance", fontsize=10)
    panels[0].minorticks_off()
    panels[0].legend(frameon=False, fontsize=8)
    spectrum = power_spectrum(128, 128, 2.0)
    both = ztsnr(ending(1000.0))
    for method, colour in zip(METHODS, ("C0", "C1"), strict=True):
        for count, line in ((28, "-"), (1000, ":")):
            ends = ENDS if count == 28 else ENDS[::6]
            runs = [sampled(spectrum, ending(s), steps=count, method=method) for s in ends]
            kept = [float(run.variance_kept[0, 0]) for run in runs]
            panels[1].plot(ends, kept, line, color=colour, label=f"{method}, {count} steps")
            if count == 28:
                panels[2].plot(ends, [run.distance() for run in runs], line, color=colour, label=f"{method}, mean 0")
                panels[2].plot(
                    ends, [run.distance(0.5) for run in runs], "--", color=colour, label=f"{method}, mean 0.5"
                )
        zero = sampled(spectrum, ZERO, steps=28, method=method)
        stretched = sampled(spectrum, both, steps=28, method=method)
        for run, marker in ((zero, "*"), (stretched, "D")):
            style = {"color": colour, "markersize": 11 if marker == "*" else 7, "clip_on": False}
            panels[1].plot(60000, float(run.variance_kept[0, 0]), marker, **style)
            panels[2].plot(60000, run.distance(), marker, **style)
    panels[1].set(
        ylabel="variance of the mean kept", title="1024 px, p = 2; at ∞, 28 steps:\n★ ztsnr, ◆ ztsnr on high_sigma 1000"
    )
    panels[2].set(
        ylabel="squared distance to the data, per value",
        yscale="log",
        title="1024 px, p = 2, 28 steps; at ∞:\n★ ztsnr, ◆ ztsnr on high_sigma 1000",
    )
    for panel in panels[1:]:
        panel.set(xscale="log", xlabel="sigma_max", xticks=[15, 29, 56, 200, 1000, 5000, 20000, 60000])
        panel.set_xticklabels(["15", "29", "56", "200", "1k", "5k", "20k", "∞"])
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize=8)
        panel.title.set_fontsize(10)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(HERE / "figure.png", dpi=130)


def main() -> None:
    tables = {"needed": needed(), "steps": steps(), "best": best()}
    if sys.argv[1:]:
        tables["measured"] = measured(Path(sys.argv[1]))
    for name, rows in tables.items():
        write(rows, HERE / f"{name}.csv")
        for row in rows:
            print(name, "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    draw(tables["needed"])


if __name__ == "__main__":
    main()
