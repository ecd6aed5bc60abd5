"""Which images take part in the next network call: shortest remaining work first, with ageing.

A request is as late as the last of its images, so its images count together: with

    remaining work   the rows of the network that the images of a request still need,
    age              the network calls since it came,

the request with the smallest (remaining work - age) goes first. Shortest remaining work first makes
waiting as short as it can be on average; the age bounds it for the longest: a request of R rows is
before all that come more than R calls after it. Within a call a request and a client take at most
their share as long as others wait, so that nobody's thousand steps fill it alone; what the others
leave is theirs, too.

Nothing of this shows in the pixels (promise P3).
"""

import numpy as np

FIELDS = [
    ("in_hand", "?"),
    ("ticket", "i8"),
    ("request", "i8"),
    ("client", "i8"),
    ("came", "i8"),
    ("position", "i8"),
    ("length", "i8"),
    ("remaining", "i8"),
    ("rows", "i8"),
]
"""Of an image: the numbers of itself, of its request and of its client; the call before which it
came; at which row of its plan it is, of how many; the network rows that it still needs, and that
its next evaluation takes."""

Book = np.ndarray
"""(images,) of FIELDS."""


def new_book(capacity: int) -> Book:
    return np.zeros(capacity, dtype=FIELDS)


def choose(book: Book, rows: int, call: int, share: int) -> np.ndarray:
    """The places in the book of the images of the next call, by their tickets.

    Args:
        rows: of a call, at least 2.
        call: its number.
        share: the most rows of a request, and of a client, while others wait.
    """
    places = np.flatnonzero(book["in_hand"])
    if not len(places):
        return places
    need = book["rows"][places]
    if need.sum() > rows:
        images = book[places]
        _, request = np.unique(images["request"], return_inverse=True)
        work = np.bincount(request, weights=images["remaining"])
        lateness = work[request] - (call - images["came"])
        order = np.lexsort((images["ticket"], lateness))
        beyond = np.zeros(len(order), bool)
        for whose in ("request", "client"):
            beyond |= _running_sums(images[whose][order], need[order]) > share
        order = order[np.argsort(beyond, kind="stable")]
        chosen = order[_that_fit(need[order], rows)]
        places = places[chosen]
    return places[np.argsort(book["ticket"][places], kind="stable")]


def _running_sums(whose: np.ndarray, need: np.ndarray) -> np.ndarray:
    """The rows of each owner up to and with each image, in the order they stand in."""
    by_owner = np.argsort(whose, kind="stable")
    owners, need = whose[by_owner], need[by_owner]
    sums = np.cumsum(need)
    before = sums - need
    before[1:][owners[1:] == owners[:-1]] = 0
    result = np.empty_like(sums)
    result[by_owner] = sums - np.maximum.accumulate(before)
    return result


def _that_fit(need: np.ndarray, rows: int) -> np.ndarray:
    """The first that fit, of one row or two each; the last row goes to the next that takes one."""
    sums = np.cumsum(need)
    fits = sums <= rows
    if rows not in sums:
        fits[np.flatnonzero(~fits & (need == 1))[:1]] = True
    return np.flatnonzero(fits)
