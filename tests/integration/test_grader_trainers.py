"""The trainers' routes, with the requests that OpenRLHF, slime, PipelineRL and NeMo-Gym send."""

import json
from typing import Any

import httpx
import pytest

from services.contracts.settings import GraderSection
from services.grader.app import create_app
from services.grader.trainers import response_in

pytestmark = pytest.mark.integration

QWEN = (
    "<|im_start|>system\nPlease put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\nIs \\boxed{9} odd? What is 2+2?<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nAnswer like \\boxed{9}.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
DEEPSEEK = "<｜begin▁of▁sentence｜><｜User｜>Answer like \\boxed{9}.<｜Assistant｜>"  # noqa: RUF001
GEMMA = "<bos><start_of_turn>user\nAnswer like \\boxed{9}.<end_of_turn>\n<start_of_turn>model\n"
MISTRAL = "<s>[INST] Answer like \\boxed{9}. [/INST]"
ENDINGS = ["<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<eos>"]  # noqa: RUF001
BAD_TEXTS = ["", " ", "\x00", "\ud800", "\u202e\u200b", "\\boxed{", "{" * 5000, "9" * 20_000, "\\boxed{9^{9^{9^9}}}"]


def post(grader: httpx.Client, path: str, body: object) -> Any:
    """What a client that writes JSON as Python does (lone surrogates as escapes, NaN as NaN) gets."""
    reply = grader.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize(
    "prompt", [QWEN, LLAMA, DEEPSEEK, GEMMA, MISTRAL], ids=["qwen", "llama", "deepseek", "gemma", "mistral"]
)
def test_openrlhf_is_graded_on_the_response_and_never_on_its_prompt(grader_http: httpx.Client, prompt: str) -> None:
    responses = ["So it is \\boxed{4}.", "No idea.", "The answer is 4"]
    for ending in ENDINGS:
        queries = [prompt + response + ending for response in responses]
        body = {"query": queries, "prompts": [prompt] * 3, "labels": ["4", "9", "4"]}
        assert post(grader_http, "/get_reward", body)["rewards"] == [1.0, 0.0, 1.0]


def test_openrlhf_gets_scores_and_logs_that_are_numbers_per_query(grader_http: httpx.Client) -> None:
    body = {"query": ["2+2? \\boxed{4}", "2+2? dunno"], "prompts": ["2+2?"] * 2, "labels": ["4", "4"]}
    assert post(grader_http, "/get_reward", body) == {
        "rewards": [1.0, 0.0],
        "scores": [1.0, 0.0],
        "extra_logs": {"no_answer": [0.0, 1.0], "timeout": [0.0, 0.0], "unparsable_gold": [0.0, 0.0]},
    }


@pytest.mark.parametrize("prompts", [["<s>Say \\boxed{9}."], ["Say \\boxed{9}."], ["<s> Say \\boxed{9}. </s>"]])
def test_a_prompt_is_found_though_special_tokens_differ(prompts: list[str]) -> None:
    for query in (
        "Say \\boxed{9}. \\boxed{4}",
        "<s>Say \\boxed{9}. \\boxed{4}</s>",
        "<s><s> Say \\boxed{9}.\\boxed{4}",
    ):
        assert response_in(query, prompts[0]).strip() == "\\boxed{4}"


@pytest.mark.parametrize(
    "prompt", [QWEN, LLAMA, DEEPSEEK, GEMMA, MISTRAL], ids=["qwen", "llama", "deepseek", "gemma", "mistral"]
)
def test_without_its_prompt_a_query_is_cut_where_the_reply_begins(prompt: str) -> None:
    assert response_in(prompt + "I do not know", "").strip() == "I do not know"
    assert response_in(prompt + "I do not know", "another prompt").strip() == "I do not know"


@pytest.mark.parametrize(
    "more", [{}, {"prompts": ["a", "b"]}, {"labels": None}, {"labels": []}, {"labels": ["", None]}]
)
def test_old_openrlhf_without_labels_gets_a_reward_of_zero(grader_http: httpx.Client, more: dict[str, Any]) -> None:
    reply = post(grader_http, "/get_reward", {"query": ["\\boxed{4}", "\\boxed{5}"], **more})
    assert reply["rewards"] == [0.0, 0.0] and reply["extra_logs"]["unparsable_gold"] == [1.0, 1.0]


def test_openrlhf_s_other_servers_get_empty_lists_for_empty_lists(grader_http: httpx.Client) -> None:
    reply = post(grader_http, "/get_reward", {"query": [], "prompts": [], "labels": []})
    assert reply == {"rewards": [], "scores": [], "extra_logs": {}}


def test_lists_of_different_lengths_are_a_problem_rather_than_shifted_rewards(grader_http: httpx.Client) -> None:
    reply = grader_http.post("/get_reward", json={"query": ["a", "b"], "prompts": ["a", "b"], "labels": ["1"]})
    assert reply.status_code == 422 and "2, 2, 1" in reply.json()["detail"]


LABELS = [
    ("4", 1.0), (4, 1.0), (4.0, 1.0), (["5", 4.0], 1.0), ("$4$", 1.0), ("\\boxed{4}", 1.0), ("5", 0.0), (5e300, 0.0),
    ({"ground_truth": "4", "style": "rule"}, 1.0), ({"answer": 4}, 1.0), ([{"answer": "4"}], 1.0),
    (None, 0.0), ("", 0.0), ([], 0.0), ({}, 0.0), ([[["4"]]], 0.0), (float("nan"), 0.0), (float("inf"), 0.0),
    (10**4000, 0.0), (True, 0.0), ("\ud800", 0.0), ("\x00", 0.0), ([None, ""], 0.0), ({"a": {"b": [1, None]}}, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("label", "score"), LABELS, ids=lambda value: repr(value)[:30])
def test_any_label_is_graded(grader_http: httpx.Client, label: object, score: float) -> None:
    chat = [{"role": "user", "content": "Say \\boxed{5}. 2+2?"}]
    for prompt in (chat, "2+2?"):
        body = {"prompt": prompt, "response": "<think>\\boxed{5}</think>\\boxed{4}<|im_end|>", "label": label}
        assert post(grader_http, "/get_reward", body)["score"] == score
        assert post(grader_http, "/get_reward?bare=true", body) == score
    body = {"query": ["2+2? \\boxed{4}"], "prompts": ["2+2?"], "labels": [label]}
    assert post(grader_http, "/get_reward", body)["rewards"] == [score]
    body = {"prediction": "\\boxed{4}", "gold": label, "strict": True, "max_prediction_length": 1000}
    assert (post(grader_http, "/verify_answer", body)["answer_status"] == "correct") is (score == 1.0)


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda value: repr(value)[:20])
def test_text_that_cannot_be_graded_is_a_reward_of_zero_in_every_route(grader_http: httpx.Client, text: str) -> None:
    body: dict[str, Any] = {"query": [text, "\\boxed{4}"], "prompts": [text, ""], "labels": ["4", "4"]}
    assert post(grader_http, "/get_reward", body)["rewards"] == [0.0, 1.0]
    body = {"prompt": text, "response": text, "label": "4"}
    assert post(grader_http, "/get_reward", body)["score"] == 0.0
    body = {"prediction": text, "gold": "4", "strict": True, "max_prediction_length": 1000}
    assert post(grader_http, "/verify_answer", body)["answer_status"] != "correct"
    assert post(grader_http, "/verify", nemo_gym(text, "4"))["reward"] == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold", "status"),
    [
        ("so \\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "correct"),
        ("so \\boxed{3}", "\\boxed{0.5}", "wrong"),
        ("the answer is 3", "\\boxed{3}", "no_answer"),
        ("\\boxed{3}", "", "unparsable"),
        ("\\boxed{" + "3" * 60 + "}", "3" * 60, "unparsable"),
    ],
)
def test_pipelinerl_gets_its_status(grader_http: httpx.Client, prediction: str, gold: str, status: str) -> None:
    body = {"prediction": prediction, "gold": gold, "strict": True, "max_prediction_length": 50}
    assert post(grader_http, "/verify_answer", body) == {"answer_status": status}


def test_pipelinerl_s_health_check_is_answered(grader_http: httpx.Client) -> None:
    assert grader_http.get("/health").json() == {"status": "ok"}


def nemo_gym(text: str, expected: str) -> dict[str, Any]:
    """The request of NeMo-Gym's own example client."""
    content = [{"annotations": [], "text": text, "type": "output_text"}]
    message = {"id": "message_1", "content": content, "role": "assistant", "status": "completed", "type": "message"}
    return {
        "responses_create_params": {"input": [{"role": "user", "content": "What is 2 + 2?"}]},
        "response": {
            "id": "response_1", "created_at": 1.0, "model": "model_1", "object": "response",
            "output": [{"type": "reasoning", "summary": [], "content": None}, message],
            "parallel_tool_calls": False, "tool_choice": "none", "tools": [],
        },
        "question": "What is 2 + 2?",
        "expected_answer": expected,
    }  # fmt: skip


def test_nemo_gym_gets_its_request_back_with_the_reward(grader_http: httpx.Client) -> None:
    request = nemo_gym("It is \\boxed{4}.", "\\(4\\)")
    graded = {"reward": 1.0, "library_reward": 1.0, "extracted_answer": "4", "judge_evaluations": None}
    assert post(grader_http, "/verify", request) == request | graded
    assert post(grader_http, "/verify", nemo_gym("5", "4"))["reward"] == 0.0  # no box
    assert post(grader_http, "/verify", nemo_gym("\\boxed{5}", "4"))["extracted_answer"] == "5"


def test_nemo_gym_s_odd_json_is_given_back_as_every_reader_takes_it(grader_http: httpx.Client) -> None:
    request = nemo_gym("\\boxed{4}", "4") | {"metadata": {"\ud800": [float("nan"), "\udfff", 1e999]}}
    assert post(grader_http, "/verify", request)["metadata"] == {"?": [None, "?", None]}
    deep: Any = "bottom"
    for _ in range(100):
        deep = [deep]
    reply = grader_http.post("/verify", json=request | {"metadata": deep})
    assert reply.status_code == 422 and "levels deep" in reply.json()["detail"]


async def test_rewards_follow_the_settings_and_scores_stay_between_0_and_1() -> None:
    section = GraderSection(reward_correct=2.0, reward_incorrect=-1.0, reward_no_answer=-1.5, reward_ungraded=-0.25)
    app = create_app(section)
    body = {"query": ["\\boxed{4}", "\\boxed{5}", "dunno", "\\boxed{4}"], "labels": ["4", "4", "4", ""]}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://grader", timeout=60) as client,
    ):
        reply = (await client.post("/get_reward", json=body)).json()
        slime = await client.post("/get_reward?bare=1", json={"response": "\\boxed{5}", "label": "4"})
        verified = await client.post("/verify", json=nemo_gym("\\boxed{4}", "4"))
    assert reply["rewards"] == [2.0, -1.0, -1.5, -0.25]
    assert reply["scores"] == [1.0, 0.0, 0.0, 0.0]
    assert slime.json() == -1.0 and verified.json()["reward"] == 2.0
