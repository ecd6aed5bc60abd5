"""Whose turn it is in a network call: against the rule said plainly, and what it is for."""

import heapq
import itertools
import random

import numpy as np
import pytest

from pipeline.serving.turns import Book, choose, new_book


def book_of(*images: dict[str, int]) -> Book:
    """Images in hand; tickets in their order, each a request of its own unless it says so."""
    book = new_book(len(images))
    for i, image in enumerate(images):
        entry = {"ticket": i, "request": i, "client": i, "rows": 1, "remaining": 10, **image}
        for name, value in entry.items():
            book[name][i] = value
        book["in_hand"][i] = True
    return book


def plainly(book: Book, rows: int, call: int, share: int) -> list[int]:
    """The rule, an image after the other."""
    there = [i for i in range(len(book)) if book["in_hand"][i]]
    work: dict[int, int] = {}
    for i in there:
        work[book["request"][i]] = work.get(book["request"][i], 0) + book["remaining"][i]
    if sum(book["rows"][i] for i in there) <= rows:
        return sorted(there, key=lambda i: book["ticket"][i])
    line = sorted(
        there,
        key=lambda i: (work[book["request"][i]] - (call - book["came"][i]), book["ticket"][i]),
    )
    within, beyond = [], []
    taken: dict[tuple[str, int], int] = {}
    for i in line:
        sums = []
        for whose in ("request", "client"):
            owner = (whose, int(book[whose][i]))
            taken[owner] = taken.get(owner, 0) + book["rows"][i]
            sums.append(taken[owner])
        (beyond if max(sums) > share else within).append(i)
    chosen, free, full = [], rows, False
    for i in within + beyond:
        if book["rows"][i] <= free and (not full or book["rows"][i] == 1):
            chosen.append(i)
            free -= book["rows"][i]
        elif not full:
            full = True  # only a row is left, for one that needs no more
    return sorted(chosen, key=lambda i: book["ticket"][i])


def test_it_is_the_rule_said_plainly() -> None:
    rng = random.Random(0)
    for _ in range(500):
        book = new_book(rng.randrange(1, 40))
        for place in range(len(book)):
            book[place] = (
                rng.random() < 0.8,
                rng.randrange(10**6) * 40 + place,
                rng.randrange(6),
                rng.randrange(3),
                rng.randrange(50),
                0,
                1,
                rng.randrange(1, 100),
                rng.randrange(1, 3),
            )
        rows = rng.randrange(2, 20)
        got = choose(book, rows, 50, rows // 2)
        assert got.tolist() == plainly(book, rows, 50, rows // 2)
        assert book["rows"][got].sum() <= rows


def test_all_that_fit_take_part_and_without_images_nobody_does() -> None:
    assert choose(new_book(0), 16, 0, 8).tolist() == []
    assert choose(new_book(4), 16, 0, 8).tolist() == []
    same = [{"request": 1, "client": 1, "rows": 2}] * 8
    assert choose(book_of(*same), 16, 0, 8).tolist() == list(range(8)), "no share if nobody waits"


def test_the_shortest_work_goes_first_and_a_request_counts_as_a_whole() -> None:
    long, short = {"remaining": 1000}, {"remaining": 20}
    assert choose(book_of(long, long, short, short), 2, 0, 2).tolist() == [2, 3]
    many = [{"remaining": 15, "request": 7}] * 3
    assert choose(book_of(*many, {"remaining": 20}), 2, 0, 1).tolist() == [0, 3]
    assert choose(book_of(*many, {"remaining": 46}), 2, 0, 2).tolist() == [0, 1]


def test_age_brings_the_longest_to_its_turn() -> None:
    crowd = [{"remaining": 20, "came": 1000}] * 4
    young = {"remaining": 1000, "came": 900}
    assert 0 not in choose(book_of(young, *crowd), 2, 1000, 2)
    older = {"remaining": 1000, "came": 10}
    assert 0 in choose(book_of(older, *crowd), 2, 1000, 2)


def test_a_request_and_a_client_leave_room_for_others() -> None:
    mine = [{"request": 1, "client": 1, "remaining": 1}] * 16
    others = [{"request": i, "client": 2, "remaining": 9} for i in range(2, 18)]
    taken = choose(book_of(*mine, *others), 16, 0, 8)
    assert (taken < 16).sum() == 8
    few = choose(book_of(*mine, {"remaining": 500}), 16, 0, 8)
    assert len(few) == 16, "what others leave is not lost"
    assert few[-1] == 16
    clients = [{"client": 1, "remaining": 1}] * 16  # requests of their own
    taken = choose(book_of(*clients, *others), 16, 0, 8)
    assert (taken < 16).sum() == 8


@pytest.mark.parametrize("rows", [2, 3, 16])
def test_a_call_is_full_while_there_is_enough_to_do(rows: int) -> None:
    guided, plain = {"rows": 2}, {"rows": 1, "remaining": 900}
    got = choose(book_of(*[guided] * 20, *[plain] * 3), rows, 0, rows // 2)
    book = book_of(*[guided] * 20, *[plain] * 3)
    assert book["rows"][got].sum() == rows


def simulate(rule: str, seed: int) -> tuple[float, float]:
    """Images of 10 to 1,000 evaluations at 0.9 of what 16 rows a call can do.

    Returns:
        the 99th percentile and the worst of the slowdown: from coming to leaving, by the time alone
    """
    rng = random.Random(seed)
    lengths = (10, 20, 50, 250, 1000)
    weights = [1 / n for n in lengths]  # as much work of each
    mean = len(lengths) / sum(weights)
    coming: list[tuple[float, int]] = []
    clock = 0.0
    for _ in range(1500):
        clock += rng.expovariate(0.9 * 16 / mean)
        coming.append((clock, rng.choices(lengths, weights)[0]))
    waiting = list(reversed(coming))
    book, call, slowdowns = new_book(0), 0, []
    tickets = itertools.count()
    while waiting or book["in_hand"].any():
        while waiting and waiting[-1][0] <= call:
            _, n = waiting.pop()
            ticket = next(tickets)
            entry = np.array([(True, ticket, ticket, ticket, call, 0, n, n, 1)], book.dtype)
            book = np.concatenate([book[book["in_hand"]], entry])
        if rule == "turns":
            got = choose(book, 16, call, 8)
        else:
            there = np.flatnonzero(book["in_hand"])
            oldest = heapq.nsmallest(16, there.tolist(), key=lambda i: book["ticket"][i])
            got = np.array(oldest, dtype=np.int64)
        book["position"][got] += 1
        book["remaining"][got] -= 1
        call += 1
        for i in got:
            if book["remaining"][i] == 0:
                book["in_hand"][i] = False
                slowdowns.append((call - book["came"][i]) / book["length"][i])
    return float(np.percentile(slowdowns, 99)), max(slowdowns)


def test_the_short_do_not_wait_for_the_long_as_they_would_in_line() -> None:
    for seed in range(3):
        (turns, worst), (line, _) = simulate("turns", seed), simulate("line", seed)
        assert turns < 1.5
        assert line > 2 * turns
        assert worst < 2, "nor does anyone starve"
