"""Train the built-in model from nothing, on data that this tool draws, synthesises and says itself.

    python tools/train_demo train [--steps 9000] [--out src/sensorium/demo] [--work build/demo]
    python tools/train_demo evaluate [--base-url http://127.0.0.1:8000] [--samples 500]

A stopped run goes on where it was when the same command is given again. Needs the development dependencies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="train_demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train, and write the checkpoint")
    train.add_argument("--steps", type=int, default=9000)
    train.add_argument("--decay", type=int, default=0, help="last steps, in which the rate falls to nothing")
    train.add_argument("--rate", type=float, default=2e-3)
    train.add_argument("--scale", type=float, default=1.0, help="dialogs in a step, as a factor on the usual numbers")
    train.add_argument("--sizes", default="", help="dialogs in a step by kind, such as tools=24,image=6,drawn=0")
    train.add_argument("--faster", default="", help="matrices whose names begin so have thrice the rate")
    train.add_argument("--decoder-only", action="store_true", help="leave the towers as they are")
    train.add_argument("--recordings", type=int, default=260, help="of every spoken word")
    train.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    train.add_argument("--seed", type=int, default=1)
    train.add_argument("--out", type=Path, default=ROOT / "src" / "sensorium" / "demo")
    train.add_argument("--from", type=Path, dest="begin_with", help="a checkpoint of this tool's to go on from")
    train.add_argument("--work", type=Path, default=ROOT / "build" / "demo", help="what a stopped run goes on from")
    evaluate = commands.add_parser("evaluate", help="held-out questions through a server's API")
    evaluate.add_argument("--base-url", default="http://127.0.0.1:8000")
    evaluate.add_argument("--samples", type=int, default=500, help="of every skill")
    evaluate.add_argument("--seed", type=int, default=20_000)
    evaluate.add_argument("--skills", default="", help="comma-separated; all by default")
    evaluate.add_argument("--into", type=Path, help="write the table into this file, between its marks")
    evaluate.add_argument("--show", type=int, default=0, help="print so many wrong answers of every skill")
    evaluate.add_argument("--work", type=Path, default=ROOT / "build" / "demo")
    given = parser.parse_args()
    if given.command == "train":
        from training import Plan
        from training import train as run

        sizes = {kind: max(1, round(size * given.scale)) for kind, size in Plan(given.steps).sizes.items()}
        sizes |= {kind: int(size) for kind, size in (one.split("=") for one in given.sizes.split(",") if one)}
        run(
            Plan(
                given.steps,
                decay=given.decay,
                rate=given.rate,
                recordings=given.recordings,
                seed=given.seed,
                workers=given.workers,
                sizes=sizes,
                dialogs_read=max(1, round(Plan(0).dialogs_read * given.scale)),
                decoder_only=given.decoder_only,
                faster=given.faster,
            ),
            given.out,
            given.work,
            given.begin_with,
        )
    else:
        from evaluation import evaluate as examine

        examine(
            given.base_url,
            given.samples,
            given.seed,
            [name for name in given.skills.split(",") if name],
            given.work,
            given.into,
            given.show,
        )


if __name__ == "__main__":
    main()
