"""Eviction algorithms as printed in their papers, for ``capacity`` pages of equal size.

They share no code with the package and never drop ghosts. Each function returns the evicted pages
in order.
"""

from __future__ import annotations


def fifo(requests: str, capacity: int, renews: bool = False) -> str:
    """Evict first in, first out. With ``renews``, a used page enters again."""
    pages: list[str] = []
    evicted = ""
    for page in requests:
        if page in pages:
            if not renews:
                continue
            pages.remove(page)
        elif len(pages) == capacity:
            evicted += pages.pop(0)
        pages.append(page)
    return evicted


def lru(requests: str, capacity: int) -> str:
    """Evict the least recently used page."""
    return fifo(requests, capacity, renews=True)


def clock(requests: str, capacity: int) -> str:
    """Use a ring of frames with one bit each and a hand (Corbató 1968)."""
    frames: list[str] = []
    bits: dict[str, bool] = {}
    hand, evicted = 0, ""
    for page in requests:
        if page in frames:
            bits[page] = True
            continue
        bits[page] = False
        if len(frames) < capacity:
            frames.append(page)
            continue
        while bits[frames[hand]]:
            bits[frames[hand]] = False
            hand = (hand + 1) % capacity
        evicted += frames[hand]
        frames[hand] = page
        hand = (hand + 1) % capacity
    return evicted


def sieve(requests: str, capacity: int) -> str:
    """Use algorithm 1 of the paper: the hand moves from the tail to the head, the newest page."""
    queue: list[str] = []  # tail first
    visited: dict[str, bool] = {}
    hand: str | None = None
    evicted = ""
    for page in requests:
        if page in queue:
            visited[page] = True
            continue
        if len(queue) == capacity:
            at = queue.index(hand) if hand is not None else 0
            while visited[queue[at]]:
                visited[queue[at]] = False
                at = (at + 1) % len(queue)
            hand = queue[at + 1] if at + 1 < len(queue) else None
            evicted += queue.pop(at)
        queue.append(page)
        visited[page] = False
    return evicted


def lfu_da(requests: str, capacity: int) -> str:
    """Evict the least frequency + age at the latest use. The age is the last victim's key (Arlitt
    et al. 2000)."""
    keys: dict[str, int] = {}
    frequency: dict[str, int] = {}
    age, evicted = 0, ""
    for page in requests:
        if page in keys:
            frequency[page] += 1
        else:
            if len(keys) == capacity:
                victim = min(keys, key=lambda each: keys[each])  # dicts keep the order of entry
                age = keys.pop(victim)
                evicted += victim
            frequency[page] = 1
        keys[page] = frequency[page] + age
    return evicted


def s3_fifo(requests: str, capacity: int) -> str:
    """Use algorithm 1 of the paper: S is a tenth of the cache, M the rest, and counters end at 3.
    Pages used more than once move from S to M."""
    small: list[str] = []
    main: list[str] = []
    ghosts: set[str] = set()
    count: dict[str, int] = {}
    evicted = ""

    def evict_small() -> str:
        while small:
            page = small.pop(0)
            if count[page] <= 1:
                ghosts.add(page)
                return page
            count[page] = 0
            main.append(page)
        return ""

    def evict_main() -> str:
        while True:
            page = main.pop(0)
            if not count[page]:
                return page
            count[page] -= 1
            main.append(page)

    for page in requests:
        if page in small or page in main:
            count[page] = min(count[page] + 1, 3)
            continue
        if len(small) + len(main) == capacity:
            victim = evict_small() if len(small) >= capacity / 10 else ""
            evicted += victim or evict_main()
        count[page] = 0
        if page in ghosts:
            ghosts.remove(page)
            main.append(page)
        else:
            small.append(page)
    return evicted


def arc(requests: str, capacity: int) -> str:
    """Apply cases I to III of the paper with REPLACE. Bounded counts replace the trimming of B1 and
    B2 in case IV."""
    t1: list[str] = []
    t2: list[str] = []
    b1: set[str] = set()
    b2: set[str] = set()
    target, evicted = 0.0, ""
    for page in requests:
        if page in t1 or page in t2:
            (t1 if page in t1 else t2).remove(page)
            t2.append(page)
            continue
        size1 = max(1, min(len(b1), len(t2)))
        size2 = max(1, min(len(b2), len(t1) + len(t2) - min(len(b1), len(t2))))
        was_frequent = page in b2
        if page in b1:
            target = min(target + max(1, size2 / size1), len(t1) + len(t2))
        elif was_frequent:
            target = max(target - max(1, size1 / size2), 0)
        if len(t1) + len(t2) == capacity:
            from_t1 = t1 and (len(t1) > target or (was_frequent and len(t1) == target) or not t2)
            if from_t1:
                b1.add(victim := t1.pop(0))
            else:
                b2.add(victim := t2.pop(0))
            evicted += victim
        if page in b1 or page in b2:
            b1.discard(page)
            b2.discard(page)
            t2.append(page)
        else:
            t1.append(page)
    return evicted


def w_tiny_lfu(requests: str, capacity: int) -> str:
    """Use exact counters that survive eviction, a window of one page and a segmented LRU (Einziger
    et al. 2017).

    After ten uses per page, the counters of the cached pages are halved. Until the cache is full
    for the first time, pages stay in the window, because its size is not known yet.
    """
    window: list[str] = []
    probation: list[str] = []
    protected: list[str] = []
    count: dict[str, int] = {}
    uses, evicted = 0, ""
    for page in requests:
        count[page] = count.get(page, -1) + 1
        held = [*window, *probation, *protected]
        if page in held:
            if page in window:
                window.remove(page)
                window.append(page)
            else:
                (probation if page in probation else protected).remove(page)
                protected.append(page)
            while len(protected) > 0.8 * (len(probation) + len(protected)) and len(protected) > 1:
                probation.append(protected.pop(0))
            uses += 1
            if uses > 10 * len(held):
                uses = 0
                count.update((each, count[each] // 2) for each in held)
            continue
        window.append(page)
        if len(window) + len(probation) + len(protected) <= capacity:
            continue
        while len(probation) + len(protected) < capacity - 1:
            probation.append(window.pop(0))
        newcomer, main = window.pop(0), probation or protected
        if not main or count[newcomer] <= count[main[0]]:
            evicted += newcomer
        else:
            evicted += main.pop(0)
            probation.append(newcomer)
    return evicted
