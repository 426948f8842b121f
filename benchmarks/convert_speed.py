"""How fast MXFP4 becomes GGUF: ours, `cp` of the same bytes with one SHA-256 pass, and llama.cpp's own converter.

    python -P benchmarks/convert_speed.py [--layers N] [--dir FOLDER] [--rounds N] [--patience SECONDS] [--json]

A checkpoint of the release's shape (2880 wide, 32 experts, 201,088 rows of vocabulary) with N layers is made in FOLDER,
/dev/shm where there is one, so that no disk is measured. Every side is a whole command in a process of its own, from start
to exit, imports and tokenizer included; rounds take the sides in turn. Memory is the process's largest resident set, in
which pages of mapped files count. Every output is deleted at once, the checkpoint at the end.

What other processes took of the processors meanwhile is measured and printed. For SECONDS in all, a run waits until the
machine is quiet, and one that was disturbed all the same is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from peer import PACKAGE, our_command, peer_command, write_checkpoint
from support.checkpoints import RELEASE_20B, Model
from verify_speed import measure as verify_speed

DISTURBED = 0.05  # others' share of the processors above which a run is not taken
SHARD_BYTES = 4_800_000_000
COPY, PLAIN, PROVED, PEER = "cp + openssl sha256", "ours, --no-proof", "ours, with proof", "llama.cpp's converter"


@dataclass(frozen=True)
class Run:
    """One run of one side: seconds by the clock and of processor, bytes resident at most, others' share of the machine."""

    wall: float
    cpu: float
    memory: int
    others: float = 0.0


# A process starts with its parent's peak as its own: so one that has imported nothing starts each command.
LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
_, status, used = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
wall = time.perf_counter() - start
with open(int(sys.argv[1]), "w") as reply:
    json.dump([os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], reply)
"""


def run(*commands: list[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run commands one after the other; a failure's output is shown."""
    total = Run(0, 0, 0)
    for command in commands:
        with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as reply:
            launch = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(reply.fileno()), *command]
            subprocess.run(launch, stdout=log, stderr=log, env=environment, pass_fds=[reply.fileno()], check=True)
            reply.seek(0)
            code, wall, cpu, memory = json.load(reply)
            if code:
                log.seek(0)
                raise SystemExit(f"{command} failed\n{log.read().decode(errors='replace')}")
        total = Run(total.wall + wall, total.cpu + cpu, max(total.memory, memory))
    return total


def make_checkpoint(folder: Path, layers: int) -> Path:
    """The first layers of a model of the release's shape. All hold the same random numbers, which no side notices."""
    model = Model(replace(RELEASE_20B, layers=1))
    for name, tensor in list(model.tensors.items()):
        if name.startswith("block.0."):
            for layer in range(1, layers):
                model.tensors[name.replace("block.0.", f"block.{layer}.")] = tensor
    model.spec = replace(model.spec, layers=layers)
    source = folder / "gpt-oss-20b"
    write_checkpoint(model, source, shard_limit=SHARD_BYTES)
    return source


def sides(source: Path, work: Path) -> dict[str, Callable[[], Run]]:
    """The four sides by name."""
    weights = sorted(map(str, source.glob("*.safetensors")))
    copies = [str(work / Path(path).name) for path in weights]
    theirs, environment = peer_command(source, work / "theirs.gguf")
    ours = our_command(source, work / "ours.gguf")
    return {
        COPY: lambda: run(["cp", *weights, str(work)], ["openssl", "dgst", "-sha256", *copies]),
        PLAIN: lambda: run([*ours, "--no-proof"]),
        PROVED: lambda: run(ours),
        PEER: lambda: run(theirs, environment=environment),
    }


def busy() -> float:
    """Seconds that all processors together have worked since the machine started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Quiet:
    """Runs actions while nobody else works, as far as patience goes."""

    def __init__(self, work: Path, patience: float) -> None:
        self.work, self.until = work, time.monotonic() + patience
        work.mkdir()

    def run(self, action: Callable[[], Run]) -> Run:
        """An action in an empty folder, emptied again afterwards; of several tries the least disturbed."""
        tries: list[Run] = []
        while not tries or (tries[-1].others > DISTURBED and time.monotonic() < self.until):
            self._wait()
            before = busy()
            try:
                run = action()
            finally:
                shutil.rmtree(self.work)
                self.work.mkdir()
            others = (busy() - before - run.cpu) / run.wall / (os.cpu_count() or 1)
            tries.append(replace(run, others=max(others, 0.0)))
        return min(tries, key=lambda run: run.others)

    def _wait(self) -> None:
        share = 1.0
        while share > DISTURBED and time.monotonic() < self.until:
            before = busy()
            time.sleep(2)
            share = (busy() - before) / 2 / (os.cpu_count() or 1)


def first_use(source: Path, work: Path) -> Run:
    """Our command with proof, every kernel compiled anew."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        return run(our_command(source, work / "ours.gguf"), environment=environment)


def measure(folder: Path, layers: int, rounds: int, patience: float) -> dict[str, Any]:
    """All figures."""
    source, work = make_checkpoint(folder, layers), folder / "work"
    quiet = Quiet(work, patience)
    actions = sides(source, work)
    for name in (PROVED, PEER):
        quiet.run(actions[name])  # compiles the kernels, fills caches
    runs: dict[str, list[Run]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            runs[name].append(quiet.run(action))
    cold = quiet.run(lambda: first_use(source, work))
    verified = verify_speed(source, rounds)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "layers": layers,
        "bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "rounds": rounds,
        "peer": PACKAGE,
        "sides": {name: summary(taken) for name, taken in runs.items()},
        "first_use": summary([cold]),
        "ratios": ratios(runs),
        "verify": verified,
    }


def summary(taken: list[Run]) -> dict[str, float]:
    """Fastest and median of some runs."""
    walls = [run.wall for run in taken]
    return {
        "wall_min": min(walls),
        "wall_median": statistics.median(walls),
        "cpu_median": statistics.median(run.cpu for run in taken),
        "memory": max(run.memory for run in taken),
        "others": max(run.others for run in taken),
    }


def ratios(runs: Mapping[str, list[Run]]) -> dict[str, float]:
    """Of medians."""
    wall = {name: statistics.median(run.wall for run in taken) for name, taken in runs.items()}
    cpu = {name: statistics.median(run.cpu for run in taken) for name, taken in runs.items()}
    return {
        "no proof / (cp + sha256), wall": wall[PLAIN] / wall[COPY],
        "with proof / (cp + sha256), wall": wall[PROVED] / wall[COPY],
        "theirs / ours without proof, wall": wall[PEER] / wall[PLAIN],
        "theirs / ours without proof, CPU": cpu[PEER] / cpu[PLAIN],
        "theirs / ours with proof, wall": wall[PEER] / wall[PROVED],
        "theirs / ours with proof, CPU": cpu[PEER] / cpu[PROVED],
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The figures as tables."""
    size = result["bytes"] / 1e9
    lines = [
        f"{result['layers']} layers, {size:.2f} GB of weights, {result['rounds']} rounds; {result['machine']}; "
        f"peer {result['peer']}",
        "",
        "| | wall min, s | wall median, s | GB/s | CPU, s | peak resident, MB | others' share of the machine |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in {**result["sides"], "ours, with proof, first use": result["first_use"]}.items():
        lines.append(
            f"| {name} | {row['wall_min']:.2f} | {row['wall_median']:.2f} | {size / row['wall_median']:.2f} "
            f"| {row['cpu_median']:.2f} | {row['memory'] / 1e6:.0f} | {row['others']:.0%} |"
        )
    lines += ["", "| ratio of medians | |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["ratios"].items()]
    lines += ["", "| hashing | GB/s | over openssl |", "| --- | ---: | ---: |"]
    lines += [f"| {r['side']} | {r['gb_per_s']:.2f} | {r['ratio']:.2f} |" for r in result["verify"]["rows"]]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    shared = Path("/dev/shm")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dir", type=Path, default=shared if shared.is_dir() else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait, in all, for a quiet machine")
    parser.add_argument("--json", action="store_true", help="one JSON document after the tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-speed-", dir=options.dir) as name:
        result = measure(Path(name), options.layers, options.rounds, options.patience)
    print(markdown(result))
    if options.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
