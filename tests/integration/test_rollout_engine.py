"""What the engine wrapper asks of vLLM, with vLLM's own parameter classes and a recording in place of its engine."""

import pytest

from services.contracts.config import load
from services.contracts.wire import Sampling
from services.rollout.vllm_engine import VllmEngine

pytestmark = pytest.mark.integration


class RecordingLlm:
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple] = []

    def generate(self, prompt, parameters, request_id):
        self.requests.append((prompt, parameters, request_id))


@pytest.fixture
def engine(tmp_path) -> VllmEngine:
    engine = VllmEngine(load(None, ["--sampling.temperature=0.7"], env={}), tmp_path)
    engine.async_llm = RecordingLlm()
    return engine


def ask(engine: VllmEngine, **overrides: float):
    engine.generate([1, 2], max_tokens=5, seed=9, sampling=Sampling(**overrides), stop_ids=frozenset({7, 3}))
    return engine.async_llm.requests[-1]


def test_no_cached_prefix_outlives_its_weights(engine):
    salts = []
    for version in (3, 3, 4):
        engine.version = version
        salts.append(ask(engine)[0]["cache_salt"])
    assert salts[0] == salts[1] != salts[2]


def test_a_tasks_sampling_goes_over_the_runs(engine):
    assert ask(engine)[1].temperature == 0.7
    parameters = ask(engine, temperature=0.0)[1]
    assert (parameters.temperature, parameters.max_tokens, parameters.seed) == (0.0, 5, 9)
    assert sorted(parameters.stop_token_ids) == [3, 7]


def test_each_request_has_a_name_of_its_own(engine):
    assert ask(engine)[2] != ask(engine)[2]
