"""Benchmark: attention and a whole training step on 1, 2, 4 and 8 GPUs, beside the limit, peers and what the cost model predicts.

    python benchmarks/scaling.py --predict --ranks 1 2 4 8 --out benchmarks/results/scaling_predicted.json
    python benchmarks/scaling.py --out benchmarks/results/scaling.json
    python benchmarks/plot_scaling.py    # plots, and the tables of docs/scaling.md

Each number of ranks is a run of attention.py and one of train_step.py. Those that need few GPUs run side by side on GPUs of
their own. The plan is printed first; what does not fit into --budget is left out, the least important first, and named.
Every row is written when it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from attention_cases import case_of
from scaling_plan import (
    COMPILE,
    ESSENTIAL,
    EXTRA,
    Item,
    Job,
    Lane,
    Length,
    Row,
    Schedule,
    constants,
    items_of,
    pick_of,
    prediction,
    schedule,
    train_flops,
    train_pick,
    train_seconds,
)

HERE = Path(__file__).parent
GRACE = 20.0  # seconds that a run which ignores its budget lives on


def plan(options: argparse.Namespace, gpus: int) -> Schedule:
    """Return what to run."""
    jobs: dict[int, list[Job]] = {}
    for ranks in options.ranks:
        jobs[ranks] = []
        if "attention" in options.parts:
            jobs[ranks].append(Job("attention", ranks, items_of(ranks, options.device, not options.no_peers)))
        if "train" in options.parts:
            jobs[ranks].append(Job("train", ranks, lengths=lengths_of(ranks, options)))
    return schedule(jobs, gpus)


def lengths_of(ranks: int, options: argparse.Namespace) -> list[Length]:
    """Return the lengths to train on, with their importance: one GPU also tries those of more, to compare equal work."""
    longer = [options.train_tokens * more for more in options.ranks if 1 < more <= 4] if ranks == 1 else []
    return [Length(options.train_tokens * ranks, ESSENTIAL), *(Length(tokens, EXTRA) for tokens in longer)]


def describe(found: Schedule) -> str:
    """Return the plan as text."""
    lines = []
    for index, wave in enumerate(found.waves):
        for lane in wave:
            jobs = ", then ".join(
                f"{job.name} ({len(job.items) or len(job.lengths)} rows, {job.seconds:.0f} s)" for job in lane.jobs
            )
            lines.append(f"wave {index}, {lane.ranks} GPU(s): {jobs}")
    lines += [f"left out: {name}" for name in found.left_out]
    return "\n".join([*lines, f"estimated: {found.seconds:.0f} s"])


class Process:
    """One run of a benchmark, its log, and the rows that it has written."""

    def __init__(self, job: Job, gpus: range, folder: Path, budget: float, options: argparse.Namespace) -> None:
        self.job, self.begin, self.budget, self.position = job, time.monotonic(), budget, 0
        self.known: Row = {"rows": []}
        stem = folder / f"{job.kind}_{job.ranks}"
        self.out, self.log, order = stem.with_suffix(".json"), stem.with_suffix(".log"), stem.with_suffix(".plan")
        device = ["--device", options.device, "--ranks", str(job.ranks)]
        commands = []
        if job.kind == "attention":
            order.write_text(json.dumps([[item.case, item.key] for item in job.items]))
            more = ["--scale", options.scale, "--repeats", options.repeats, "--sets", options.sets]
            more += ["--patience", options.patience, "--budget", round(budget), "--plan", order, "--out", self.out]
            commands.append([HERE / "attention.py", *device, *more])
        for each in job.lengths:
            length = each.tokens // options.scale
            shape = ["--shape", "1b" if options.scale == 1 else "tiny", "--inner", options.inner]
            what = ["--single", "--strategy"] if job.ranks == 1 else ["--strategy", "auto"]
            commands.append([HERE / "train_step.py", *device, "--length", length, *shape, *what])
        # One length that does not fit into memory leaves the others alone.
        script = "; ".join(" ".join(map(str, [sys.executable, *command])) for command in commands)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if options.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", script], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def news(self) -> str:
        """Return what was logged since the last call."""
        text = self.log.read_text(errors="replace")[self.position :]
        self.position += len(text)
        return text

    def is_over(self) -> bool:
        """Tell whether it has ended; one that is past its budget is ended."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() - self.begin > self.budget + GRACE:
            print(f"{self.job.name}: past its budget of {self.budget:.0f} s, ended", flush=True)
            self.end()
            return True
        return False

    def end(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self) -> Row:
        """Return what it has measured so far."""
        found: Row = {"kind": self.job.kind, "ranks": self.job.ranks, "seconds": round(time.monotonic() - self.begin)}
        if self.job.kind == "attention":
            with contextlib.suppress(OSError, json.JSONDecodeError):  # not there yet, or being written
                self.known = json.loads(self.out.read_text())
            return found | {"result": self.known}
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith('{"strategy"')]
        return found | {"rows": [json.loads(line) for line in lines]}


class Runs:
    """Runs a schedule and keeps the result file up to date."""

    def __init__(self, found: Schedule, options: argparse.Namespace, folder: Path) -> None:
        self.schedule, self.options, self.folder = found, options, folder
        self.begin = time.monotonic()
        self.finished: list[Row] = []
        self.active: list[Process] = []
        self.saved = ""

    def run(self) -> None:
        """Run all waves; what is running is ended when this is."""
        try:
            for index, wave in enumerate(self.schedule.waves):
                later = sum(max(lane.seconds for lane in other) for other in self.schedule.waves[index + 1 :])
                self.run_wave(wave, later)
        finally:
            for process in self.active:
                process.end()
            self.save()

    def run_wave(self, wave: list[Lane], later: float) -> None:
        """Run lanes side by side, each job after the one before it."""
        first, waiting, running = 0, [], {}
        for lane in wave:
            waiting.append((range(first, first + lane.ranks), list(lane.jobs)))
            first += lane.ranks
        while True:
            for gpus, jobs in waiting:
                if gpus.start not in running and jobs:
                    job = jobs.pop(0)
                    rest = later + sum(other.seconds for other in jobs)
                    budget = self.options.budget - (time.monotonic() - self.begin) - rest
                    if budget < COMPILE:
                        self.schedule.left_out.append(f"{job.name}: no time left")
                        continue
                    print(f"{job.name}: at most {budget:.0f} s", flush=True)
                    running[gpus.start] = Process(job, gpus, self.folder, budget, self.options)
                    self.active.append(running[gpus.start])
            for start, process in list(running.items()):
                is_over = process.is_over()
                for line in process.news().splitlines():
                    print(f"[{process.job.name}] {line}", flush=True)
                if is_over:
                    self.finished.append(process.result())
                    self.active.remove(process)
                    del running[start]
                    print(f"{process.job.name}: {self.finished[-1]['seconds']} s", flush=True)
            self.save()
            if not running and not any(jobs for _, jobs in waiting):
                return
            time.sleep(0.5)

    def save(self) -> None:
        """Write what is there."""
        result = merged([*self.finished, *(process.result() for process in self.active)], self.schedule, self.options)
        text = json.dumps(result, indent=1) + "\n"
        if text != self.saved:
            self.saved = text
            write(self.options.out, text)


def merged(parts: list[Row], planned: Schedule, options: argparse.Namespace) -> Row:
    """Return everything that was measured, each row with its limit and its prediction."""
    result: Row = {"kind": "measured", "left_out": planned.left_out, "estimated_seconds": round(planned.seconds)}
    result["command"] = " ".join(sys.argv)
    if options.device == "cuda":
        result |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    environments = [part["result"] for part in parts if part["kind"] == "attention"]
    for environment in sorted(environments, key=lambda part: part.get("ranks", 0)):
        names = (
            "device",
            "torch",
            "cuda",
            "cudnn",
            "nccl",
            "python",
            "peers",
            "heads",
            "kv_heads",
            "head_dim",
            "dtype",
        )
        result |= {name: environment[name] for name in names if name in environment}
    result |= {"commit": options.commit or commit(), "scale": options.scale, "constants": constants()}
    result["runs"] = [{key: part[key] for key in ("kind", "ranks", "seconds")} for part in parts]
    rows = [row for part in parts if part["kind"] == "attention" for row in attention_rows(part["result"]["rows"])]
    train = [row for part in parts if part["kind"] == "train" for row in part["rows"]]
    places = dict.fromkeys((row["ranks"], row["case"]) for row in rows if row["ranks"] > 1)
    autos = [auto_row(name, ranks, rows) for ranks, name in places]
    return result | {"auto": autos, "rows": rows, "train": train_rows(train, options)}


def attention_rows(rows: list[Row]) -> list[Row]:
    """Return the rows of one number of ranks, in percent of the limit; of a row measured again, the first that succeeded."""
    kept: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: "failure" in row):
        kept.setdefault((row["case"], row["key"]), dict(row))
    for row in kept.values():
        if row["system"] == "cpcompile":
            row |= prediction(row["case"], row["ranks"], row["key"])
        if "failure" in row:
            continue
        share = row["total_ms"] / (row["ranks"] if row["layout"] == "whole" else 1)
        if "limit_ms" in row:
            row["percent_of_limit"] = round(100 * row["limit_ms"] / share, 2)
        alone = [r for r in kept.values() if r["case"] == row["case"] and "total_ms" in r and r["layout"] == "whole"]
        same = [r["total_ms"] for r in alone if r["kernel"].split()[0] == row["kernel"]]
        if same:
            row["percent_of_own_kernel"] = round(100 * min(same) / row["ranks"] / share, 2)
        if "predicted_ms" in row:
            row["measured_over_predicted"] = round(row["total_ms"] / row["predicted_ms"], 4)
    return list(kept.values())


def auto_row(name: str, ranks: int, rows: list[Row]) -> Row:
    """Return what `auto` picks on ranks that are no grid, beside the best row, of grids too."""
    pick = "/".join(pick_of(case_of(name, ranks), ranks))
    own = [r for r in rows if (r["case"], r["ranks"], r["system"]) == (name, ranks, "cpcompile") and "failure" not in r]
    times = {f"{row['strategy']}/{row['layout']}": row["total_ms"] for row in own}
    row: Row = {"case": name, "ranks": ranks, "pick": pick}
    if pick in times:
        best = min(times, key=times.__getitem__)
        row |= {"ms": times[pick], "best": best, "best_ms": times[best]}
        row["is_within_5_percent"] = times[pick] <= 1.05 * times[best]
    return row


def train_rows(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """Return training steps with their efficiency.

    `efficiency`: model FLOP/s of a GPU over those of one GPU on its share of tokens, that is weak scaling where a sequence that
    is P times as long has P times the attention per GPU. `efficiency_of_equal_work`: one GPU on the same sequence, over P.
    """
    single = {row["length"]: row["ms"] for row in rows if row["ranks"] == 1}
    one = options.train_tokens // options.scale
    for row in rows:
        length, ranks = row["length"], row["ranks"]
        row["tflops_per_gpu"] = round(train_flops(length) / ranks / row["ms"] / 1e9, 2)
        if one in single:
            ideal = train_flops(length) / train_flops(one) * single[one] / ranks
            row["efficiency"] = round(ideal / row["ms"], 4)
        if length in single:
            row["efficiency_of_equal_work"] = round(single[length] / ranks / row["ms"], 4)
        row |= train_prediction(ranks, length * options.scale)
        row["measured_over_predicted"] = round(row["ms"] / row["predicted_ms"], 4)
    return rows


def train_prediction(ranks: int, tokens: int) -> Row:
    """Return what is predicted of a training step."""
    pick = "/".join(train_pick(ranks, tokens)) if ranks > 1 else "one device"
    return {"pick": pick, "predicted_ms": round(train_seconds(ranks, tokens) * 1e3, 2)}


def predictions(options: argparse.Namespace) -> Row:
    """Return what the cost model says of all rows, on H100."""
    rows, autos, train = [], [], []
    for ranks in options.ranks:
        own: list[Item] = [x for x in items_of(ranks, "cuda", peers=False) if x.key.startswith("cpcompile/")]
        for item in own:
            _, strategy, layout, _ = item.key.split("/", 3)
            head = {"case": item.case, "key": item.key, "ranks": ranks, "system": "cpcompile"}
            head |= {"strategy": strategy, "layout": layout, "length": case_of(item.case, ranks).length}
            rows.append(head | prediction(item.case, ranks, item.key))
        for name in dict.fromkeys(item.case for item in own if ranks > 1):
            autos.append({"case": name, "ranks": ranks, "pick": "/".join(pick_of(case_of(name, ranks), ranks))})
        tokens = options.train_tokens * ranks
        flops = train_flops(tokens) / ranks / train_seconds(ranks, tokens)
        alone = train_flops(options.train_tokens) / train_seconds(1, options.train_tokens)
        row = {"ranks": ranks, "length": tokens, **train_prediction(ranks, tokens)}
        train.append(row | {"predicted_efficiency": round(flops / alone, 4)})
    head = {"kind": "predicted", "commit": options.commit or commit(), "command": " ".join(sys.argv)}
    return {**head, "constants": constants(), "auto": autos, "rows": rows, "train": train}


def commit() -> str:
    """Return the commit of this checkout."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return str(found.stdout.strip())


def write(path: Path, text: str) -> None:
    """Write a file at once, so that whoever ends this process leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", help="by default 1, 2, 4 and 8, up to the GPUs there are")
    parser.add_argument(
        "--predict", action="store_true", help="only write what the cost model says, which needs no GPU"
    )
    parser.add_argument("--show", action="store_true", help="only print the plan")
    parser.add_argument("--parts", nargs="+", choices=("attention", "train"), default=["attention", "train"])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--train-tokens", type=int, default=8192, help="of each GPU")
    parser.add_argument("--inner", default="inductor", help="what compiles the training step")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds without a row before ranks are replaced")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=0, help="to use; 0: all")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by this, to try the benchmark out")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    gpus = options.gpus or (torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1)
    options.ranks = options.ranks or [ranks for ranks in (1, 2, 4, 8) if ranks <= gpus]
    if options.predict:
        write(options.out, json.dumps(predictions(options), indent=1) + "\n")
        return
    found = plan(options, max(gpus, *options.ranks))
    found.fit(options.budget)
    print(describe(found), flush=True)
    if options.show:
        return
    print(
        f"{socket.gethostname()}, {platform.platform()}, torch {torch.__version__}, {gpus} x {options.device}",
        flush=True,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder:
        Runs(found, options, Path(folder)).run()


if __name__ == "__main__":
    main()
