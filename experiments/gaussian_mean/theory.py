"""How much of the mean is lost, on canvases of 64 to 1024 pixels: theory, and what trained models do.

python experiments/gaussian_mean/theory.py           # writes theory.csv and figure.png, with measured.csv in it
python experiments/gaussian_mean/theory.py outputs   # first reads the runs of the experiment into measured.csv
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt

from nai_xl.diffusion.ideal import flow, power_spectrum, sampled, unknown
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.record.arm import read_arm
from nai_xl.record.items import read_items
from nai_xl.record.journal import metrics_of

HERE = Path(__file__).parent
CANVASES, POWERS, STEPS = (64, 128, 256, 512, 1024), (1.0, 2.0, 3.0), 28
Row = dict[str, object]


def theory() -> list[Row]:
    """One row for each power and canvas, of scaled_linear and of ztsnr."""
    end = scaled_linear().at(torch.tensor([999]))
    alpha, sigma = float(end.alpha), float(end.sigma)
    rows: list[Row] = []
    for power in POWERS:
        for edge in CANVASES:
            n, spectrum = (edge // 8) ** 2, power_spectrum(edge // 8, edge // 8, power)
            of_mean = float(spectrum[0, 0]) / n
            exact, row = flow(spectrum, alpha, sigma), {"power": power, "canvas": edge}
            row |= {"n": n, "n_snr": n * (alpha / sigma) ** 2, "variance_of_mean": of_mean}
            row |= {"q": of_mean * n * (alpha / sigma) ** 2}
            row |= {"unknown": float(unknown(spectrum, alpha, sigma)[0, 0]) / float(spectrum[0, 0])}
            row |= {"mean_flow": float(exact.mean_kept), "variance_flow": float(exact.variance_kept[0, 0])}
            for name, schedule in (("linear", scaled_linear()), ("ztsnr", ztsnr(scaled_linear()))):
                for method in ("ddim", "dpmpp_2m"):
                    run = sampled(spectrum, schedule, steps=STEPS, method=method)
                    row |= {
                        f"{name}_{method}_mean": float(run.mean_kept),
                        f"{name}_{method}_variance": float(run.variance_kept[0, 0]),
                        f"{name}_{method}_distance": run.distance(0.5),
                    }
            rows.append(row)
    return rows


def measured(outputs: Path) -> list[Row]:
    """Every evaluation of every run of the experiment, with standard errors over its samples."""
    rows: list[Row] = []
    for home in sorted(home for home in outputs.iterdir() if home.is_dir()):
        arm = read_arm(home)
        if arm is None or "gaussian_mean" not in arm.sweeps or arm.status != "FINISHED":
            continue
        for found in metrics_of(home).rows():
            if "mean_kept/caption" in found:
                rows.append({"arm": arm.label, "seed": arm.seed, "step": found["step"]} | values(home, found))
    return sorted(rows, key=lambda row: (row["caption_ideal"], row["step"]))


def values(home: Path, found: dict[str, float]) -> Row:
    row: Row = {}
    for metric in ("caption", "variance"):
        items = torch.tensor(list(read_items(home, f"mean_kept/{metric}")[int(found["step"])].values()))
        row |= {metric: found[f"mean_kept/{metric}"], f"{metric}_error": float(items.std() / len(items) ** 0.5)}
        row |= {f"{metric}_ideal": found[f"mean_kept/{metric}_ideal"]}
    excess = ("excess_terminal", "excess_logsnr_-5_-2", "excess_logsnr_-2_1", "excess_logsnr_1_4", "relative")
    return row | {name: found.get(f"optimality/{name}", "") for name in excess}


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(rows: Sequence[Row], found: Sequence[dict[str, str]]) -> None:
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    q = torch.logspace(-2.5, 2.5, 200)
    panels[0].plot(q, 1 - (q / (1 + q)).sqrt(), color="black", label="caption's mean")
    panels[0].plot(q, 1 / (1 + q), color="black", linestyle=":", label="variance of the mean")
    for power, marker in zip(POWERS, "^os", strict=True):
        some = [row for row in rows if row["power"] == power]
        panels[0].plot([r["q"] for r in some], [r["mean_flow"] for r in some], marker, label=f"p = {power:g}")
    for edge, row in zip(CANVASES, [r for r in rows if r["power"] == 2], strict=True):
        panels[0].annotate(
            f"{edge}", (row["q"], row["mean_flow"]), (-6, -12), textcoords="offset points", fontsize=8, ha="right"
        )
    panels[0].set(xscale="log", xlabel="q = n α²/σ² · variance of the mean", ylabel="share kept, exact flow")
    panels[0].set_title("SDXL's schedule on 64 to 1024 px", fontsize=10)
    arms = {arm: (f"C{number}", "osD^vP"[number]) for number, arm in enumerate(dict.fromkeys(r["arm"] for r in found))}
    for panel, what in zip(panels[1:], ("caption", "variance"), strict=True):
        panel.axline((0, 0), slope=1, color="0.7")
        for row in (row for row in found if row["step"] in ("400", "1200")):
            ideal, mine, error = (float(row[f"{what}{end}"]) for end in ("_ideal", "", "_error"))
            (colour, marker), longer = arms[row["arm"]], int(row["step"]) > 400
            label = f"{short(row['arm'])}{', ' + row['step'] + ' steps' if longer else ''}"
            style = {"color": colour, "mfc": "white" if longer else colour, "capsize": 3, "label": label}
            panel.errorbar(ideal + 0.02 * longer, mine, 2 * error, fmt=marker, **style)
        panel.set(
            xlabel="kept by the ideal denoiser", ylabel="kept by the trained model", xlim=(0, 1.06), ylim=(-0.06, 1.12)
        )
    panels[1].set_title("64 px, 28 DDIM steps: caption's mean", fontsize=10)
    panels[2].set_title("64 px, 28 DDIM steps: variance of the mean", fontsize=10)
    panels[1].legend(frameon=False, fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "figure.png", dpi=130)


def short(arm: str) -> str:
    """'shifted 512' of 'schedule=shifted,schedule.resolution=512'."""
    values = [part.split("=")[1] for part in arm.split(",")]
    return " ".join(values)


def main() -> None:
    rows = theory()
    write(rows, HERE / "theory.csv")
    if sys.argv[1:]:
        write(measured(Path(sys.argv[1])), HERE / "measured.csv")
    draw(rows, read(HERE / "measured.csv"))
    for row in rows:
        print(
            "  ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
