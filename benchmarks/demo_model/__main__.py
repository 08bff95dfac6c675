"""`python -m benchmarks.demo_model train|export`: the demo model, from nothing to a checkpoint folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train one stage, several, or all")
    train.add_argument("--stage", default="all", help="vae, vision, ar, dit, several with commas, or all")
    train.add_argument("--out", type=Path, required=True, help="folder of the stages' weights, numbers and pictures")
    train.add_argument("--seconds", type=float, default=570.0, help="for everything this call does (default 570)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--posters", type=int, default=60_000, help="text-to-image cases to render")
    train.add_argument("--edits", type=int, default=16_000, help="edit cases to render")
    train.add_argument("--workers", type=int, help="rendering processes (default: all cores but one)")
    train.add_argument("--no-compile", action="store_true", help="run blocks as they are")
    train.add_argument("--micro", action="store_true", help="a model of toy size, a few steps: seconds on a CPU")
    export = commands.add_parser("export", help="write the official layout from trained stages")
    export.add_argument("source", type=Path, help="the folder that `train --out` filled")
    export.add_argument("target", type=Path, help="the checkpoint to write")
    args = parser.parse_args(arguments)

    if args.command == "export":
        from .store import export as write

        print(write(args.source, args.target))
        return 0

    from .train import STAGES, Settings, run

    stages = list(STAGES) if args.stage == "all" else args.stage.split(",")
    if stages != [stage for stage in STAGES if stage in stages]:
        parser.error(f"--stage takes {', '.join(STAGES)} in this order, or all")
    settings = Settings(
        folder=args.out,
        stages=stages,
        seconds=args.seconds,
        seed=args.seed,
        texts=args.posters,
        edits=args.edits,
        workers=args.workers,
        compiled=not args.no_compile and not args.micro,
        micro=args.micro,
    )
    run(settings, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
