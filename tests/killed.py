"""Kill the main job at random moments, and compare its results with an uninterrupted run, bit for bit.

    python tests/killed.py FOLDER [kills]           # 50 kills: about half an hour on 2 cores

All four stages of `python finetune.py` run twice below FOLDER, which is created: undisturbed in `whole/`; in
`killed/`, ended by SIGKILL at random moments and restarted until they finish. Checkpoints are written
every 25 steps, which changes no weight. At the end the main job must find every stage finished.
"""
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "out/tiny-base-vae": ["train_vae.py", "tiny-base"],
    "out/tiny-vae": ["train_vae.py", "tiny"],
    "out/tiny-base": ["finetune.py", "tiny-base"],
    "out/tiny": ["finetune.py", "tiny"],
}


def start(folder, script, *flags):
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Wait for a process, which must succeed."""
    _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"ended with status {process.returncode}:\n{err[-2000:]}")


def run_to_the_end_with_kills(folder, kills, longest, *command):
    """Start the command and kill it within `longest` seconds, `kills` times; then let it finish."""
    for n in range(kills):
        process = start(folder, *command)
        moment = random.uniform(0, longest)
        try:
            process.communicate(timeout=moment)
            print(f"  kill {n + 1}: it had ended before {moment:.1f} s")
            return n
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            steps = sorted(path.name for path in Path(folder).glob("out/*/step_*"))
            print(f"  kill {n + 1}: after {moment:.1f} s, {len(steps)} step folders", flush=True)
    finish(start(folder, *command))
    return kills


def main(folder, kills=50):
    random.seed(0)
    whole = Path(folder) / "whole"
    killed = Path(folder) / "killed"
    seconds = []
    done = 0
    for path in (whole, killed):
        path.mkdir(parents=True)
    for k, command in enumerate(STAGES.values()):
        command = [*command, "--save_every=25"]
        since = time.time()
        finish(start(whole, *command))
        seconds.append(time.time() - since)
        print(f"{' '.join(command)}: {seconds[-1]:.0f} s undisturbed", flush=True)
        wanted = (kills - done) // (len(STAGES) - k)               # of the remaining kills
        done += run_to_the_end_with_kills(killed, wanted, 20, *command)

    for run in STAGES:
        a, b = (sorted((path / run).glob("step_*"))[-1] for path in (whole, killed))
        for file in sorted(a.glob("*.safetensors")):
            same = file.read_bytes() == (b / file.name).read_bytes()
            print(f"{run}/{a.name}/{file.name}: {'equal' if same else 'DIFFERENT'}")
            if not same or a.name != b.name:
                raise SystemExit(f"{run}: {done} kills changed it")
    finish(start(killed, "finetune.py"))                           # every stage exists and is the preset's
    print(f"{done} kills, all stages equal bit for bit")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
