"""The starting model is made once, found again, and never left half-made."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contracts.config import ConfigError, RunConfig
from services.contracts.settings import DataSection, ModelSection, RunSection
from services.learner import prepare as preparing
from services.learner.arithmetic_model import build_model, build_tokenizer
from services.learner.prepare import prepare


def config(tmp_path, **model):
    settings = {"source": "arithmetic", "warmup_steps": 2, "warmup_batch": 8, "dtype": "float32", **model}
    return RunConfig(
        run=RunSection(dir=tmp_path / "runs"),
        model=ModelSection(cache_dir=tmp_path / "cache", **settings),
        data=DataSection(digits=1, heldout_size=10),
    )


def test_the_tokenizer_reads_back_what_it_wrote_for_any_text(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    build_model(build_tokenizer(), context=64).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n23+48 = ½ \\boxed{71}<|im_end|>\n"
    assert loaded.encode(text) == build_tokenizer().encode(text)
    assert loaded.decode(loaded.encode(text)) == text


def test_the_same_settings_find_the_cached_model(tmp_path, capsys):
    folder = prepare(config(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() < 1_000_000
    assert prepare(config(tmp_path)) == folder
    assert "(cached)" in capsys.readouterr().out


def test_other_settings_make_another_model(tmp_path):
    assert prepare(config(tmp_path)) != prepare(config(tmp_path, warmup_steps=3))


def test_a_failure_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(preparing, "_make", fail)
    with pytest.raises(RuntimeError):
        prepare(config(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_runs_that_make_the_same_model_at_once_both_get_it(tmp_path, monkeypatch):
    make = preparing._make

    def make_while_another_finishes_first(run, problems, folder):
        monkeypatch.setattr(preparing, "_make", make)
        prepare(run)
        make(run, problems, folder)

    monkeypatch.setattr(preparing, "_make", make_while_another_finishes_first)
    folder = prepare(config(tmp_path))
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize(("path", "message"), [("", "model.path: empty"), ("/nowhere/model", "no config.json there")])
def test_a_missing_model_is_a_configuration_error(tmp_path, path, message):
    with pytest.raises(ConfigError, match=message):
        prepare(config(tmp_path, source="pretrained", path=path, warmup_steps=0))


def test_a_local_folder_is_used_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert prepare(config(tmp_path, source="pretrained", path=str(tmp_path), warmup_steps=0)) == tmp_path.resolve()
