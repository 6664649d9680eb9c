"""Drafts by prompt lookup."""

from server.core.engine.lookup import MAX_MATCH, MIN_MATCH, PromptLookup


def test_a_draft_is_what_followed_the_most_recent_occurrence_of_the_last_tokens() -> None:
    lookup = PromptLookup([1, 2, 3, 70, 71, 1, 2, 3, 80, 81, 82, 83, 1, 2, 3])
    assert lookup.draft(3) == [80, 81, 82]
    assert lookup.draft(1) == [80]


def test_a_draft_ends_with_the_sequence() -> None:
    assert PromptLookup([1, 2, 3, 9, 1, 2, 3]).draft(8) == [9, 1, 2, 3]
    # Occurrences may overlap.
    assert PromptLookup([5, 5, 5, 5, 5]).draft(3) == [5]


def test_there_is_no_draft_if_the_last_tokens_never_occurred() -> None:
    assert PromptLookup([1, 2, 3, 4, 5, 6]).draft(3) == []
    assert PromptLookup([1, 2, 3]).draft(3) == []
    assert PromptLookup([1]).draft(3) == []


def test_appended_tokens_are_looked_up_and_found() -> None:
    lookup = PromptLookup([1, 2, 3, 200_000])
    for token_id in (1, 2, 3):
        lookup.append(token_id)
    assert lookup.draft(1) == [200_000]


def test_a_match_does_not_begin_within_an_id() -> None:
    # The same bytes as those of 1, 2, 3, but moved by one.
    moved = [1 << 8, 2 << 8, 3 << 8, 0]
    assert PromptLookup([*moved, 9, 1, 2, 3]).draft(2) == []
    assert PromptLookup([1, 2, 3, 7, *moved, 9, 1, 2, 3]).draft(1) == [7]


def test_wrong_drafts_require_longer_matches_until_one_is_right() -> None:
    lookup = PromptLookup([4, 1, 2, 3, 9, 5, 1, 2, 3])
    assert lookup.draft(1) == [9]
    lookup.learn(was_right=False)
    assert lookup.draft(1) == []
    lookup.learn(was_right=True)
    assert lookup.draft(1) == [9]


def test_however_many_drafts_were_wrong_a_long_match_is_enough() -> None:
    ids = list(range(10, 10 + MAX_MATCH))
    lookup = PromptLookup([*ids, 9, *ids])
    for _ in range(MIN_MATCH * MAX_MATCH):
        lookup.learn(was_right=False)
    assert lookup.draft(1) == [9]
