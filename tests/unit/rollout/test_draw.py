"""Tokens are drawn from the softmax of their logits, each row by its own generator."""

import pytest
import torch

from services.rollout.draw import GROUP, draw

NUM_DRAWS = 40_000


def generators(num_rows: int) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(row) for row in range(num_rows)}


@pytest.mark.parametrize("num_tokens", [3, GROUP, 2 * GROUP + 5])
def test_each_token_comes_as_often_as_its_probability(num_tokens: int) -> None:
    torch.manual_seed(1)
    logits = 2 * torch.randn(num_tokens)
    tokens, _ = draw(logits.repeat(NUM_DRAWS, 1), {})
    expected = NUM_DRAWS * logits.double().softmax(-1)
    counts = torch.bincount(tokens, minlength=num_tokens)
    surprise = ((counts - expected) ** 2 / expected).sum()  # chi-square: as many as its degrees of freedom, on average
    freedom = num_tokens - 1
    assert surprise < freedom + 5 * (2 * freedom) ** 0.5


def test_draws_that_follow_one_another_are_independent() -> None:
    generator, logits = torch.Generator().manual_seed(3), torch.zeros(1, 2 * GROUP)
    tokens = torch.cat([draw(logits.clone(), {0: generator})[0] for _ in range(2000)])
    for parts in (tokens // GROUP, tokens % 2):
        agreeing = (parts[1:] == parts[:-1]).double().mean()
        assert abs(agreeing - 0.5) < 0.05


def test_log_probabilities_are_those_of_all_tokens() -> None:
    torch.manual_seed(2)
    logits = 5 * torch.randn(4, GROUP + 1)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(draw(logits, {})[1].double(), expected, rtol=0, atol=1e-5)


def test_what_is_impossible_is_never_drawn_though_it_be_a_whole_group() -> None:
    logits = torch.full((500, 4 * GROUP), float("-inf"))
    logits[:, [7, GROUP + 1]] = torch.tensor([-200.0, -200.0])
    tokens, logprobs = draw(logits, {})
    assert set(tokens.tolist()) == {7, GROUP + 1}
    assert torch.isneginf(logprobs[:, 2 * GROUP :]).all()


def test_a_row_is_drawn_by_its_logits_and_its_generator_whatever_is_beside_it() -> None:
    torch.manual_seed(4)
    logits = torch.randn(8, 3 * GROUP)
    together, _ = draw(logits.clone(), generators(8))
    alone = [draw(logits[row : row + 1].clone(), {0: generators(8)[row]})[0].item() for row in range(8)]
    assert together.tolist() == alone


def test_rows_without_a_generator_do_not_move_those_of_others() -> None:
    logits = torch.randn(2, GROUP)
    seeded, mixed = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    alone, _ = draw(logits[1:].clone(), {0: seeded})
    beside, _ = draw(logits.clone(), {1: mixed})
    assert beside[1] == alone[0]
    assert torch.equal(seeded.get_state(), mixed.get_state())
