"""The warm start of one agent as a process of its own, so that two use two cores."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from hacrl_agents.demo.models import DESIGNS
from hacrl_agents.demo.warm_start import warm_start


def main() -> None:
    """Trains the named agent; the last line of standard output is its progress as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[design.name for design in DESIGNS])
    parser.add_argument("directory", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    design = next(design for design in DESIGNS if design.name == chosen.name)

    def report(iteration: int, loss: float) -> None:
        print(json.dumps({"iteration": iteration, "of": design.iterations, "loss": loss}), flush=True)

    warm_start(design, chosen.directory, on_progress=report)


if __name__ == "__main__":
    main()
