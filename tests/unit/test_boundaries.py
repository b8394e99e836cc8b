"""Services never import one another, each heavy library has one home, and light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ROOT / "services"
MODULES = sorted(SERVICES.rglob("*.py"))
HEAVY = {
    "vllm": (
        "rollout/vllm_engine.py",
        "rollout/weights.py",
        "rollout/weight_control.py",
        "contracts/weights/nccl.py",
    ),
    "deepspeed": ("learner/deepspeed_engine.py",),
    "torch": ("learner/", "rollout/draw.py", "rollout/vllm_engine.py", "rollout/weights.py", "contracts/weights/"),
    "transformers": ("learner/", "rollout/vllm_engine.py"),
}
# Beyond `contracts` and itself: the grader ships its client; the command line runs evaluations in its own process, and
# grades without a server by running the grader's application in its own process. It asks rollout whether a user's
# environment can be had before anything starts, and reads the books that the learner keeps with its checkpoints.
ALSO = {
    "rollout": ("services.grader.client",),
    "cli": (
        "services.evaluation",
        "services.grader.client",
        "services.grader.app",
        "services.rollout.environment",
        "services.learner.algorithm",
        "services.learner.checkpoint",
    ),
}
LIGHT = [
    "services.grader.app",
    "services.grader.client",
    "services.grader.__main__",
    "services.contracts.weights.plan",
    "services.contracts.weights.protocol",
    "services.rollout.__main__",
    "services.learner.__main__",
    "services.evaluation.__main__",
    "services.cli.__main__",
    "services.console.app",
    "services.console.__main__",
]


def imports(source: str) -> set[str]:
    """Full names that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full, from services..."
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def trespasses(here: str, source: str) -> list[str]:
    """What a module at `here` (relative to services/) imports and may not."""
    service, found = here.split("/")[0], []
    for name in sorted(imports(source)):
        library, *rest = name.split(".")
        allowed = any(name == other or name.startswith(f"{other}.") for other in ALSO.get(service, ()))
        if library == "services" and rest and rest[0] not in (service, "contracts") and not allowed:
            found.append(f"{here} reaches into {name}")
        if library in HEAVY and not any(here.startswith(home) for home in HEAVY[library]):
            found.append(f"{here} imports {library}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SERVICES).as_posix())
def test_a_module_imports_only_what_it_may(path: Path) -> None:
    assert trespasses(path.relative_to(SERVICES).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("grader/app.py", "import services.rollout.reward"),
        ("contracts/ledger.py", "from services.learner import loop"),
        ("rollout/worker.py", "from services.grader.judge import Judge"),
        ("rollout/worker.py", "def f():\n    import torch"),
        ("rollout/worker.py", "from vllm.sampling_params import SamplingParams"),
        ("learner/loop.py", "import deepspeed"),
        ("cli/launcher.py", "from services.learner.loop import run"),
    ],
)
def test_the_wall_sees_a_trespass(here: str, source: str) -> None:
    assert trespasses(here, source)


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize(
    "modules",
    [
        [_dotted(path) for path in MODULES if "contracts" in path.parts and path.parent.name != "weights"],
        *([name] for name in LIGHT if (ROOT / (name.replace(".", "/") + ".py")).exists()),
    ],
    ids=lambda modules: modules[0],
)
def test_a_light_module_never_loads_a_heavy_library(modules: list[str]) -> None:
    code = f"import sys, {', '.join(modules)}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", ["services.grader.client", "services.rollout.runner", "services.cli.__main__"])
def test_what_speaks_to_the_grader_needs_nothing_that_the_grader_installs(module: str) -> None:
    of_the_grader = {"fastapi", "uvicorn", "sympy", "math_verify", "latex2sympy2_extended"}
    code = f"import sys, {module}; print(*sorted({of_the_grader!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
