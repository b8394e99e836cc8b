"""The Hugging Face folder in a checkpoint, opened by those it is for: transformers and bare vLLM, by its path alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contracts.config import load
from services.learner.arithmetic_model import build_model, build_tokenizer
from services.learner.export import HfExporter
from services.learner.models import Actor

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROMPT = "What is 2+3?"
NUM_TOKENS = 12

VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], max_model_len=64, max_num_seqs=4, enforce_eager=True, kv_cache_memory_bytes=64 << 20)
sampling = llm.get_default_sampling_params()
greedy = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
[answer] = llm.chat([{"role": "user", "content": sys.argv[2]}], greedy, use_tqdm=False)
said = {"prompt": list(answer.prompt_token_ids), "tokens": list(answer.outputs[0].token_ids)}
print("SAID " + json.dumps(said | {"temperature": sampling.temperature, "top_k": sampling.top_k}))
"""


def test_transformers_and_vllm_say_the_same_from_the_folder_alone(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(tokenizer, context=64)
    with torch.no_grad():
        for parameter in model.parameters():  # far from a tie between two tokens
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    tokenizer.save_pretrained(tmp_path / "start")
    config = load(None, ["--model.dtype=float32", "--sampling.temperature=0.7", "--run.name=exported"], env={})
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exporter = HfExporter(config, Actor(model, temperature=0.7), tmp_path / "start")
    exporter.write(tmp_path / "hf", weights, version=3, figures={"reward": 0.25})

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompt = AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt])
    for _ in range(NUM_TOKENS):
        ids = torch.cat([ids, loaded(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)

    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "GOMP_SPINCOUNT": "10000"}
    command = [sys.executable, "-c", VLLM, str(tmp_path / "hf"), PROMPT, str(NUM_TOKENS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    said = json.loads(line.removeprefix("SAID "))
    assert (said["prompt"], said["tokens"]) == (prompt, ids[0, len(prompt) :].tolist())
    assert (said["temperature"], said["top_k"]) == (0.7, 0)
