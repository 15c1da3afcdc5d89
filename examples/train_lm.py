"""Train a small Llama on the Python documentation, once on `torch.ops.tt.*` and once on plain PyTorch operators.

    python examples/train_lm.py                     # sizes by device: about a minute and a half on two CPU cores
    python examples/train_lm.py --preset medium     # what a data-centre GPU gets by itself
    TRITON_INTERPRET=1 python examples/train_lm.py  # the kernels themselves, on the CPU, a few small steps

The text is real English that every Python carries: `pydoc_data.topics`, the language's reference manual. Tokens are its
bytes. Both models have the same initial weights, see the same batches and are compiled with `fullgraph=True`; the loss
curves must agree, and tokens/s leave out the first, compiling step. Written to `--out`: loss.png, results.json and
sample.txt.

Exit code: 0; 1 if the two loss curves disagree; 2, with one sentence, for a wrong argument or something missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from llama import Llama, LlamaConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torch_triton_ops  # noqa: F401  (registers torch.ops.tt)

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.panel import Panel
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    package = (error.name or "rich and matplotlib").partition(".")[0]
    print(
        f'The demo needs {package}: python -m pip install "torch-triton-ops[tutorials]"'
        ' (".[tutorials]" in a checkout).',
        file=sys.stderr,
    )
    raise SystemExit(2) from None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = {"tt": "torch.ops.tt", "torch": "plain torch"}
COLOURS = {"tt": "#d1495b", "torch": "#2e4057"}
SAMPLE_BYTES = 300
VALIDATION_BATCHES = 4

# Largest difference of the two losses, in nats: at the first step, where the weights are still the same, and between the
# smoothed curves. Training amplifies rounding: plain torch against itself, with weights that differ by one rounding, drifts
# apart alike (in bfloat16, single steps by 0.08), so a bound on every step would measure that and no operator.
FIRST_STEP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.1}


class UserError(Exception):
    """Something the user can put right, said in one sentence."""


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and of its training run."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    batch: int
    steps: int
    learning_rate: float

    def config(self, dtype: torch.dtype) -> LlamaConfig:
        return LlamaConfig(self.layers, self.hidden, self.heads, self.kv_heads, self.ffn, self.context, dtype=dtype)


PRESETS = {
    "tiny": Preset(3, 128, 4, 2, 384, context=128, batch=8, steps=400, learning_rate=2e-3),
    "small": Preset(6, 512, 8, 2, 1408, context=512, batch=16, steps=300, learning_rate=1.5e-3),
    "medium": Preset(8, 1024, 16, 4, 2816, context=1024, batch=16, steps=300, learning_rate=8e-4),
}


@dataclass
class Run:
    """What one training run gave."""

    losses: list[float]
    validation_loss: float
    first_step_s: float
    train_s: float
    tokens_per_s: float
    graphs: int | None  # None: not compiled
    graph_breaks: int | None
    peak_memory_bytes: int | None  # None: not on a GPU


# --------------------------------------------------------------------------------------------------------------------
# Arguments and machine
# --------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One sentence for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def at_least(smallest: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {smallest}")
        return value

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--preset", choices=["auto", *PRESETS], default="auto", help="model and batch sizes (by device)"
    )
    parser.add_argument("--steps", type=at_least(2), help="training steps, at least 2 (by preset)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, batches and sampling (0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the activations; weights and optimiser stay float32 (bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "inductor", "aot_eager"],
        default="auto",
        help="of torch.compile (inductor, or aot_eager where inductor has no C++ compiler)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="directory for the results (demo_out)")
    parser.add_argument("--prompt", default="A class definition ", help="what the trained model continues")
    parser.add_argument("--no-compare", action="store_true", help="leave out the run on plain PyTorch operators")
    args = parser.parse_args(argv)
    if not args.prompt:
        raise UserError("argument --prompt: it is empty; the model needs at least one character to continue")
    return args


def choose_device(requested: str) -> torch.device:
    if INTERPRET:
        if requested == "cuda":
            raise UserError("argument --device: TRITON_INTERPRET=1 runs the kernels on the CPU; unset it to use cuda")
        return torch.device("cpu")
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("argument --device: this PyTorch sees no CUDA GPU; use --device cpu")
    return torch.device("cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu")


def choose_preset(requested: str, device: torch.device) -> tuple[str, Preset]:
    if requested != "auto":
        name = requested
    elif device.type == "cpu":
        name = "tiny"
    else:
        name = "medium" if torch.cuda.get_device_properties(device).total_memory > 30 * 2**30 else "small"
    preset = PRESETS[name]
    if INTERPRET:  # every program of a kernel's grid is a Python loop
        preset = dataclasses.replace(preset, layers=1, context=32, batch=1, steps=3)
    return name, preset


def inductor_problem(device: torch.device) -> str | None:
    """Why Inductor cannot compile here, with the remedy; None if it can."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return (
            f"no C++ compiler ({compiler}) for Inductor: install g++ (Debian, Ubuntu: apt-get install g++;"
            " Fedora: dnf install gcc-c++) or name one in CXX"
        )
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as problem:  # anything at all: a missing header, a broken compiler, no space for its cache
        lines = str(problem).splitlines() or [type(problem).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0]).strip()
        return f"Inductor cannot compile here ({reason}): check g++ and the Python headers (python3-dev)"
    finally:
        torch._dynamo.reset()
    return None


def choose_backend(requested: str, device: torch.device) -> tuple[str, str | None]:
    """The backend ("eager" means: not compiled) and what to tell the user about it."""
    if INTERPRET:
        if requested != "auto":
            raise UserError("argument --backend: torch.compile does not work with interpreted kernels; leave it out")
        return "eager", (
            "TRITON_INTERPRET=1: Triton's interpreter runs the kernels on the CPU. torch.compile does not work with"
            " interpreted kernels, so both models run eagerly, with one layer, on short batches and for few steps."
        )
    if requested == "aot_eager":
        return requested, None
    problem = inductor_problem(device)
    if problem is None:
        return "inductor", None
    if requested == "inductor":
        raise UserError(f"argument --backend: {problem}; or use --backend aot_eager")
    sentence = f"{problem[0].upper()}{problem[1:]}."
    return "aot_eager", f"{sentence} Going on with the backend aot_eager, which generates no code."


def compile_mode(backend: str, device: torch.device) -> str | None:
    """CUDA graphs on a GPU: a step of a small model is some hundreds of short kernels, which Python starts too slowly."""
    return "reduce-overhead" if backend == "inductor" and device.type == "cuda" else None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads != 1 else ''})"


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def load_text() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "This Python came without pydoc_data.topics, the demo's text; use a Python with its whole standard library."
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


@dataclass(frozen=True)
class Data:
    """The text as tokens, and the batches that every run gets."""

    training: Tensor
    starts: Tensor  # (steps, batch): where each training sample begins
    validation: Tensor  # (batches, batch, context + 1)
    context: int

    @classmethod
    def prepare(cls, text: bytes, preset: Preset, steps: int, seed: int, device: torch.device) -> Data:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device, torch.int64)
        held_out = len(tokens) // 10  # the last tenth is never trained on
        training, validation = tokens[:-held_out], tokens[-held_out:]
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(preset.context + 1, device=device)
        starts = torch.randint(len(training) - preset.context, (steps, preset.batch), generator=generator)
        count = VALIDATION_BATCHES * preset.batch
        spread = torch.arange(count, device=device) * ((held_out - preset.context - 1) // count)
        return cls(
            training,
            starts.to(device),
            validation[spread[:, None] + window].view(VALIDATION_BATCHES, preset.batch, -1),
            preset.context,
        )

    def batch(self, step: int) -> Tensor:
        """(batch, context + 1): inputs and, shifted by one, targets."""
        window = torch.arange(self.context + 1, device=self.training.device)
        return self.training[self.starts[step][:, None] + window]


# --------------------------------------------------------------------------------------------------------------------
# Which operators run
# --------------------------------------------------------------------------------------------------------------------


class OpCounter(TorchDispatchMode):
    """Counts the calls of `torch.ops.tt.*` by (operator, implementation that the tensors' device selects)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "tt":
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            path = "kernel" if device.type == "cuda" else "interpreter" if INTERPRET else "reference"
            self.calls[func._schema.name.removeprefix("tt::"), path] += 1
        return func(*args, **(kwargs or {}))


def count_ops(config: LlamaConfig, data: Data, device: torch.device) -> collections.Counter[tuple[str, str]]:
    """The operators of one eager training step, forward and backward."""
    model = Llama(config).to(device)
    tokens = data.batch(0)
    with OpCounter() as counter:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    return counter.calls


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def learning_rate(step: int, steps: int) -> float:
    """Factor of the peak rate: linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def train(model: Llama, data: Data, rate: float, backend: str, label: str, progress: Progress) -> Run:
    """Train on every batch of `data`; times leave out the first step, which compiles."""
    device = data.training.device
    steps, tokens_per_step = len(data.starts), data.starts.shape[1] * data.context
    torch._dynamo.reset()
    gc.collect()  # optimiser and schedule refer to each other: without this a past run's tensors count as this run's peak
    torch._dynamo.utils.counters.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    mode = compile_mode(backend, device)
    compiled = model if backend == "eager" else torch.compile(model, fullgraph=True, backend=backend, mode=mode)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))

    losses = torch.zeros(steps, device=device)
    # reading the loss makes the host wait for the GPU, so do that rarely there
    every = min(10, steps - 1) if device.type == "cuda" else 1
    marks: list[tuple[int, float]] = []  # (steps done, seconds)
    first = "first step" if backend == "eager" else "compiling"
    task = progress.add_task(label, total=steps, status=first)
    synchronize(device)
    begin = time.perf_counter()
    for step in range(steps):
        tokens = data.batch(step)
        loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses[step] = loss.detach()
        if step % every == 0 or step == steps - 1:
            synchronize(device)
            marks.append((step + 1, time.perf_counter() - begin))
            speed = f"{throughput(marks, tokens_per_step):>9,.0f} tokens/s" if len(marks) > 1 else ""
            progress.update(task, completed=step + 1, status=f"loss {losses[step].item():.3f}  {speed}")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    counters = torch._dynamo.utils.counters
    return Run(
        losses=losses.tolist(),
        validation_loss=validate(model, data),
        first_step_s=marks[0][1],
        train_s=marks[-1][1] - marks[0][1],
        tokens_per_s=throughput(marks, tokens_per_step),
        graphs=None if backend == "eager" else counters["stats"]["unique_graphs"],
        graph_breaks=None if backend == "eager" else sum(counters["graph_break"].values()),
        peak_memory_bytes=peak,
    )


def throughput(marks: list[tuple[int, float]], tokens_per_step: int) -> float:
    """Tokens/s by the median interval after the first step: other work on the machine disturbs some of them."""
    seconds = [(t1 - t0) / (n1 - n0) for (n0, t0), (n1, t1) in itertools.pairwise(marks)]
    return tokens_per_step / statistics.median(seconds)


@torch.no_grad()
def validate(model: Llama, data: Data) -> float:
    """Mean loss on the held-out text, without torch.compile."""
    return torch.stack([model(batch[:, :-1], batch[:, 1:]) for batch in data.validation]).mean().item()


def smooth(losses: list[float]) -> list[float]:
    """Exponential moving average over about a twelfth of the run, without the start's bias."""
    new = min(0.5, 12 / len(losses))
    average, weight, out = 0.0, 0.0, []
    for loss in losses:
        average, weight = (1 - new) * average + new * loss, (1 - new) * weight + new
        out.append(average / weight)
    return out


def largest_difference(a: list[float], b: list[float]) -> float:
    """Infinite if either holds a NaN or an infinity."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def compare(ours: Run, plain: Run, dtype: torch.dtype) -> dict[str, Any]:
    """How near the two runs' losses are, and the ratio of their speeds."""
    first = largest_difference(ours.losses[:1], plain.losses[:1])
    smoothed = largest_difference(smooth(ours.losses), smooth(plain.losses))
    return {
        "first_step_difference": first,
        "first_step_tolerance": FIRST_STEP_TOLERANCE[dtype],
        "smoothed_difference": smoothed,
        "smoothed_tolerance": TOLERANCE[dtype],
        "largest_difference": largest_difference(ours.losses, plain.losses),
        "agree": first <= FIRST_STEP_TOLERANCE[dtype] and smoothed <= TOLERANCE[dtype],
        "speed_ratio": ours.tokens_per_s / plain.tokens_per_s,
    }


def final_loss(run: Run) -> float:
    """Mean training loss of the last twentieth."""
    return statistics.fmean(run.losses[-max(1, len(run.losses) // 20) :])


# --------------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------------


def ops_table(calls: collections.Counter[tuple[str, str]]) -> Table:
    table = Table()
    table.add_column("operator")
    table.add_column("calls", justify="right")
    table.add_column("path")
    for (name, path), count in sorted(calls.items()):
        table.add_row(f"tt::{name}", str(count), path)
    return table


def results_table(runs: dict[str, Run]) -> Table:
    table = Table()
    table.add_column("")
    for name in runs:
        table.add_column(NAMES[name], justify="right")
    if len(runs) > 1:
        table.add_column("tt / torch", justify="right")

    def row(label: str, values: list[Any], form: str, ratio: bool = False) -> None:
        cells = ["not compiled" if value is None else format(value, form) for value in values]
        if len(runs) > 1:
            cells.append(f"{values[0] / values[1]:.3g}x" if ratio else "")
        table.add_row(label, *cells)

    every = list(runs.values())
    row("training loss (last 5% of steps)", [final_loss(r) for r in every], ".4f")
    row("validation loss (held-out text)", [r.validation_loss for r in every], ".4f")
    row("graph breaks", [r.graph_breaks for r in every], "d")
    row("graphs compiled", [r.graphs for r in every], "d")
    row(
        "first step (s)" if every[0].graphs is None else "first step, with compilation (s)",
        [r.first_step_s for r in every],
        ".1f",
    )
    row("all other steps (s)", [r.train_s for r in every], ".1f")
    if every[0].peak_memory_bytes is not None:
        row("peak memory (GiB)", [(r.peak_memory_bytes or 0) / 2**30 for r in every], ".2f", ratio=True)
    row("tokens/s (median)", [r.tokens_per_s for r in every], ",.0f", ratio=True)
    return table


def speed_remark(device: torch.device) -> str | None:
    """What the speed ratio does not say."""
    if INTERPRET:
        return "Speed here is the interpreter's and says nothing about the kernels."
    if device.type == "cpu":
        return (
            "On a CPU the tt operators run their plain PyTorch references: the speed ratio says nothing about the"
            " Triton kernels. Run this on a CUDA GPU to see them."
        )
    return None


def draw(runs: dict[str, Run], title: str, remark: str | None, path: Path) -> None:
    """The loss curves, their difference, and tokens/s."""
    figure = Figure(figsize=(11, 6.2), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    if len(runs) > 1:
        grid = figure.add_gridspec(2, 2, width_ratios=(3.4, 1), height_ratios=(2.6, 1))
        curve, difference = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
        speed = figure.add_subplot(grid[:, 1])
    else:
        grid = figure.add_gridspec(1, 2, width_ratios=(3.4, 1))
        curve, difference, speed = figure.add_subplot(grid[0, 0]), None, figure.add_subplot(grid[0, 1])

    for name, run in runs.items():
        steps = range(1, len(run.losses) + 1)
        style: dict[str, Any] = {"linewidth": 3.2} if name == "torch" else {"linewidth": 1.6, "zorder": 3}
        curve.plot(steps, run.losses, color=COLOURS[name], alpha=0.18, linewidth=0.8)
        curve.plot(steps, smooth(run.losses), color=COLOURS[name], label=f"{NAMES[name]}, smoothed", **style)
        curve.plot(
            len(run.losses),
            run.validation_loss,
            marker="D" if name == "tt" else "s",
            markersize=6 if name == "tt" else 9,
            color=COLOURS[name],
            linestyle="none",
            label=f"{NAMES[name]}, held-out text",
            zorder=4 if name == "tt" else 2,
        )
    curve.set_ylabel("cross entropy (nats per byte)")
    curve.legend(frameon=False)
    last = curve
    if difference is not None:
        a, b = runs["tt"].losses, runs["torch"].losses
        # an exact zero has no logarithm: show it at the floor
        gaps = [max(abs(x - y), 1e-8) for x, y in zip(a, b, strict=True)]
        difference.semilogy(range(1, len(gaps) + 1), gaps, color="#5f6b6d", linewidth=0.9)
        difference.set_ylabel("|difference|")
        last = difference
    last.set_xlabel("training step")

    bars = speed.bar(
        [NAMES[name] for name in runs],
        [run.tokens_per_s for run in runs.values()],
        color=[COLOURS[name] for name in runs],
        width=0.6,
    )
    speed.bar_label(bars, labels=[f"{run.tokens_per_s:,.0f}" for run in runs.values()], padding=3)
    speed.set_title("tokens/s", fontsize=10)
    speed.set_yticks([])
    speed.margins(x=0.2, y=0.12)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not speed:
            axes.grid(alpha=0.25)
    speed.spines["left"].set_visible(False)
    if remark:
        figure.supxlabel(remark, fontsize=8, color="#5f6b6d", x=0.01, ha="left")
    figure.savefig(path)


def save_results(path: Path, settings: dict[str, Any], calls: Any, runs: dict[str, Run], comparison: Any) -> None:
    results = {
        **settings,
        "ops": {name: {"calls": count, "path": route} for (name, route), count in sorted(calls.items())},
        "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
        "comparison": comparison,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------------------------
# The demo
# --------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = choose_device(args.device)
    preset_name, preset = choose_preset(args.preset, device)
    steps = args.steps or preset.steps
    dtype_name = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    config = preset.config(getattr(torch, dtype_name))
    text = load_text()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("loss.png", "results.json", "sample.txt"):  # none of an earlier run stays if this one fails
            (args.out / name).unlink(missing_ok=True)
    except OSError as problem:
        raise UserError(f"argument --out: cannot write to {args.out} ({problem.strerror})") from None

    console = Console(highlight=False)
    begin = time.perf_counter()
    with console.status("checking torch.compile"):
        backend, note = choose_backend(args.backend, device)
    mode = compile_mode(backend, device)
    data = Data.prepare(text, preset, steps, args.seed, device)
    parameters = sum(p.numel() for p in Llama(config).parameters())
    console.print(
        Panel(
            f"[bold]A Llama of {parameters / 1e6:.1f} M parameters[/] learns from {len(text):,} bytes of the Python"
            f" reference (pydoc_data.topics)\n"
            f"{preset.layers} layers, hidden {preset.hidden}, heads {preset.heads}/{preset.kv_heads} (GQA), context"
            f" {preset.context}, batch {preset.batch}, {steps} steps, {dtype_name}\n"
            f"{device_name(device)}; torch {torch.__version__}; backend {backend}"
            f"{'' if backend == 'eager' else ', fullgraph=True'}"
            f"{f', mode={mode}' if mode else ''}; preset {preset_name}",
            expand=False,
        )
    )
    if note:
        console.print(f"[yellow]Note:[/] {note}")

    torch.manual_seed(args.seed)
    calls = count_ops(config, data, device)
    console.print(
        "\n[bold]torch.ops.tt calls in one eager training step[/], forward and backward, counted by a TorchDispatchMode"
    )
    console.print(ops_table(calls))
    console.print("\n[bold]Training[/]")

    runs: dict[str, Run] = {}
    sample = ""
    with Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    ) as progress:
        for name in ["tt"] if args.no_compare else ["tt", "torch"]:
            torch.manual_seed(args.seed)  # both models start from the same weights
            model = Llama(config, name).to(device)
            runs[name] = train(model, data, preset.learning_rate, backend, f"{NAMES[name]:>12}", progress)
            if name == "tt":
                generator = torch.Generator(device).manual_seed(args.seed)
                prompt = torch.tensor([list(args.prompt.encode())], device=device)
                count = 4 if INTERPRET else SAMPLE_BYTES
                generated = model.generate(prompt, count, 0.7, generator)[0].tolist()
                sample = bytes(generated[prompt.shape[1] :]).decode(errors="replace")
            del model  # the other model's peak memory must not contain this one

    comparison = None
    if "torch" in runs:
        comparison = compare(runs["tt"], runs["torch"], config.dtype)
    remark = speed_remark(device)
    settings = {
        "device": device_name(device),
        "torch": torch.__version__,
        "preset": preset_name,
        "config": {**dataclasses.asdict(preset), "steps": steps},
        "parameters": parameters,
        "dtype": dtype_name,
        "backend": backend,
        "mode": mode,
        "seed": args.seed,
        "note": note,
        "remark": remark,
    }
    save_results(args.out / "results.json", settings, calls, runs, comparison)
    (args.out / "sample.txt").write_text(args.prompt + sample + "\n", encoding="utf-8")
    title = f"Llama of {parameters / 1e6:.1f} M parameters: {device_name(device)}, {dtype_name}, backend {backend}"
    draw(runs, title, remark, args.out / "loss.png")

    console.print("\n[bold]Side by side[/]" if comparison else "\n[bold]Result[/]")
    console.print(results_table(runs))
    if comparison:
        verdict = "[green]The loss curves agree[/]" if comparison["agree"] else "[red]The loss curves DISAGREE[/]"
        console.print(
            f"{verdict} (nats): {comparison['first_step_difference']:.2g} apart at the first step (tolerance"
            f" {comparison['first_step_tolerance']:g}), smoothed at most {comparison['smoothed_difference']:.2g} (tolerance"
            f" {comparison['smoothed_tolerance']:g}), at any single step {comparison['largest_difference']:.2g}."
        )
    if remark:
        console.print(f"[yellow]Note:[/] {remark}")
    console.print(
        Panel(
            Text.assemble((args.prompt, "bold"), sample),
            title=f"What {NAMES['tt']} learned to write, byte by byte (temperature 0.7)",
            title_align="left",
        )
    )
    written = ", ".join(str(args.out / name) for name in ("loss.png", "results.json", "sample.txt"))
    console.print(f"Written: {written}. Took {time.perf_counter() - begin:.0f} s.", soft_wrap=True)
    return 0 if comparison is None or comparison["agree"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"train_lm.py: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train_lm.py: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
