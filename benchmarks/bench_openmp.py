"""How long idle OpenMP threads should spin: the demo's training step under several settings, alone and beside a busy process.

python benchmarks/bench_openmp.py [--rounds 2]
"""

import argparse
import os
import statistics
import subprocess
import sys

SETTINGS = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}

STEP = """
import time, torch
from ddetr.demo import MODEL
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
torch.manual_seed(0)
model = DeformableDETR(num_classes=3, **MODEL)
model.backbone.to(memory_format=torch.channels_last)
criterion = build_criterion(model)
images = torch.rand(8, 3, 160, 160)
targets = [{"labels": torch.randint(0, 3, (4,)), "boxes": torch.rand(4, 4) * 0.2 + 0.3} for _ in range(8)]
times = []
for _ in range(15):
    start = time.perf_counter()
    criterion.total(criterion(model(images), targets)).backward()
    times.append(time.perf_counter() - start)
print(sorted(times[3:])[6])
"""


def seconds_a_step(environment: dict[str, str]) -> float:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=clean | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            times = {name: [] for name in SETTINGS}
            for _ in range(rounds):
                for name, environment in SETTINGS.items():
                    times[name].append(seconds_a_step(environment))
        finally:
            if other is not None:
                other.kill()
        medians = {name: statistics.median(values) for name, values in times.items()}
        print("beside a busy process" if busy else "alone")
        for name, value in medians.items():
            print(f"  {name:<26} {value * 1e3:6.0f} ms  {medians['default'] / value:.2f}x")


if __name__ == "__main__":
    main()
