"""Eviction algorithms as their papers print them: pages of one size, a cache of ``capacity`` pages,
ghosts never forgotten.

Plain on purpose and sharing no code with ours: each function returns who was evicted, in order.
"""

from __future__ import annotations


def fifo(asked: str, capacity: int) -> str:
    """First in, first out."""
    pages: list[str] = []
    gone = ""
    for page in asked:
        if page in pages:
            continue
        if len(pages) == capacity:
            gone += pages.pop(0)
        pages.append(page)
    return gone


def lru(asked: str, capacity: int) -> str:
    """Least recently used."""
    pages: list[str] = []
    gone = ""
    for page in asked:
        if page in pages:
            pages.remove(page)
        elif len(pages) == capacity:
            gone += pages.pop(0)
        pages.append(page)
    return gone


def clock(asked: str, capacity: int) -> str:
    """Frames in a ring, a bit each, a hand (Corbató 1968)."""
    frames: list[str] = []
    bits: dict[str, bool] = {}
    hand, gone = 0, ""
    for page in asked:
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
        gone += frames[hand]
        frames[hand] = page
        hand = (hand + 1) % capacity
    return gone


def sieve(asked: str, capacity: int) -> str:
    """Algorithm 1 of the paper: the head is the newest, the hand walks from the tail to the
    head."""
    queue: list[str] = []  # tail first
    visited: dict[str, bool] = {}
    hand: str | None = None
    gone = ""
    for page in asked:
        if page in queue:
            visited[page] = True
            continue
        if len(queue) == capacity:
            at = queue.index(hand) if hand is not None else 0
            while visited[queue[at]]:
                visited[queue[at]] = False
                at = (at + 1) % len(queue)
            hand = queue[at + 1] if at + 1 < len(queue) else None
            gone += queue.pop(at)
        queue.append(page)
        visited[page] = False
    return gone


def lfu_da(asked: str, capacity: int) -> str:
    """Key = frequency + age at the latest use; the age is the last victim's key (Arlitt et al.
    2000)."""
    keys: dict[str, int] = {}
    frequency: dict[str, int] = {}
    age, gone = 0, ""
    for page in asked:
        if page in keys:
            frequency[page] += 1
        else:
            if len(keys) == capacity:
                victim = min(keys, key=lambda each: keys[each])  # dicts keep the order of entry
                age = keys.pop(victim)
                gone += victim
            frequency[page] = 1
        keys[page] = frequency[page] + age
    return gone


def two_queue(asked: str, capacity: int) -> str:
    """The full version: A1in a quarter of the cache, A1out the ghosts, Am an LRU (Johnson and
    Shasha 1994)."""
    a1_in: list[str] = []
    am: list[str] = []
    a1_out: set[str] = set()
    gone = ""
    for page in asked:
        if page in am:
            am.remove(page)
            am.append(page)
            continue
        if page in a1_in:
            continue
        if len(a1_in) + len(am) == capacity:
            if len(a1_in) > capacity / 4 or not am:
                a1_out.add(victim := a1_in.pop(0))
            else:
                victim = am.pop(0)
            gone += victim
        if page in a1_out:
            a1_out.remove(page)
            am.append(page)
        else:
            a1_in.append(page)
    return gone


def slru(asked: str, capacity: int, protected_share: float = 0.8) -> str:
    """Probation, and a protected segment of four fifths of what is held; its overflow goes back on
    probation."""
    probation: list[str] = []
    protected: list[str] = []
    gone = ""
    for page in asked:
        if page in probation or page in protected:
            (probation if page in probation else protected).remove(page)
            protected.append(page)
            held = len(probation) + len(protected)
            while len(protected) > protected_share * held and len(protected) > 1:
                probation.append(protected.pop(0))
            continue
        if len(probation) + len(protected) == capacity:
            gone += (probation or protected).pop(0)
        probation.append(page)
    return gone


def s3_fifo(asked: str, capacity: int) -> str:
    """Algorithm 1 of the paper: S a tenth of the cache, M the rest, counters to 3, used more than
    once passes from S to M."""
    small: list[str] = []
    main: list[str] = []
    ghosts: set[str] = set()
    count: dict[str, int] = {}
    gone = ""

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

    for page in asked:
        if page in small or page in main:
            count[page] = min(count[page] + 1, 3)
            continue
        if len(small) + len(main) == capacity:
            victim = evict_small() if len(small) >= capacity / 10 else ""
            gone += victim or evict_main()
        count[page] = 0
        if page in ghosts:
            ghosts.remove(page)
            main.append(page)
        else:
            small.append(page)
    return gone


def arc(asked: str, capacity: int) -> str:
    """The paper's cases I to III with REPLACE; case IV's trimming of B1 and B2 bounds their counts
    instead."""
    t1: list[str] = []
    t2: list[str] = []
    b1: set[str] = set()
    b2: set[str] = set()
    target, gone = 0.0, ""
    for page in asked:
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
            gone += victim
        if page in b1 or page in b2:
            b1.discard(page)
            b2.discard(page)
            t2.append(page)
        else:
            t1.append(page)
    return gone


def w_tiny_lfu(asked: str, capacity: int) -> str:
    """Exact counters that outlive eviction; a window of one page; main a segmented LRU (Einziger et
    al. 2017).

    After ten uses a page the counters of what is held are halved. Until the cache is full for the
    first time pages wait in the window, for nobody has said yet how much a hundredth of it is.
    """
    window: list[str] = []
    probation: list[str] = []
    protected: list[str] = []
    count: dict[str, int] = {}
    uses, gone = 0, ""
    for page in asked:
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
            gone += newcomer
        else:
            gone += main.pop(0)
            probation.append(newcomer)
    return gone
