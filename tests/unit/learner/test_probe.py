"""What `doctor --gpu` computes finds a machine that computes wrongly; on the CPU, where it must find nothing."""

import math

import torch

from services.learner.attention import attend
from services.learner.probe import _compared, attention_finding, product_finding

CPU = torch.device("cpu")


def test_a_sound_device_passes() -> None:
    assert product_finding(CPU)[1] and attention_finding(CPU)[1]


def test_dialogues_that_see_one_another_are_found() -> None:
    def leaky(module, query, key, value, mask, *, rows, scaling):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return attend(module, query, key, value, mask, scaling=scaling, dropout=0.0)

    name, good, result, _ = attention_finding(CPU, attention=leaky)
    assert (name, good) == ("cpu: attention", False) and "from fp32" in result


def test_a_kernel_that_is_missing_is_one_line() -> None:
    def missing(*_, **__):
        raise RuntimeError("no kernel image\nis available")

    assert attention_finding(CPU, attention=missing)[1:3] == (False, "no kernel image")


def test_nan_is_never_close() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    assert not _compared("x", [good, bad], [good, good])[1] and not _compared("x", [bad, good], [good, good])[1]
