"""Which comparisons a rater sees, in which order, and which image stands on which side.

Sides are balanced exactly, not tossed: among the comparisons of one rater each system stands on the left as often as on
the right, to within one, and so it does within each two systems. Raters 2k and 2k + 1 see the same comparisons with
sides exchanged. All follows from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

PAIR, REPEAT, SENTINEL = "pair", "repeat", "sentinel"
DEGRADED = -1  # in place of a system: the degraded twin of a sentinel


@dataclass(frozen=True, slots=True)
class Item:
    """One comparison as one rater sees it.

    token: its name in the page. left, right: systems by their places, or DEGRADED. of: of a repeat, the token of the
    comparison that it repeats with sides exchanged; otherwise None.
    """

    token: str
    kind: str
    prompt: int
    left: int
    right: int
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Design:
    """What a study consists of: S systems, P prompts, the names of the raters, a seed, and the shares of repeats and
    sentinels, each relative to the comparisons proper."""

    systems: int
    prompts: int
    raters: Sequence[str]
    seed: int
    repeats: float = 0.05
    sentinels: float = 0.05

    def extra(self, share: float) -> int:
        """Returns how many items a share means: at least one where it is not zero."""
        count = round(share * self.prompts * self.systems * (self.systems - 1) / 2)
        return max(count, 1) if share > 0 else 0


def plan(design: Design) -> dict[str, list[Item]]:
    """Returns the items of each rater in the order in which they are shown: P * S * (S - 1) / 2 comparisons, repeats
    of some of them, and sentinels, which are the same for all raters but for their sides."""
    draws = Random(f"{design.seed}/sentinels")
    shown = [*draws.sample(range(design.prompts), design.prompts)] * (1 + design.extra(design.sentinels))
    sentinels = [(shown[n], n % design.systems) for n in range(design.extra(design.sentinels))]
    return {rater: _items(design, place, sentinels) for place, rater in enumerate(design.raters)}


def _items(design: Design, place: int, sentinels: list[tuple[int, int]]) -> list[Item]:
    draws = Random(f"{design.seed}/rater/{place}")
    tokens = iter([f"{draws.getrandbits(48):012x}" for _ in range(3 * design.prompts * design.systems**2 + 3)])
    left_first = halves(len(sentinels), draws)
    pairs = [Item(next(tokens), PAIR, *sides) for sides in _sides(design, place)]
    controls = [
        Item(next(tokens), SENTINEL, prompt, *((system, DEGRADED) if intact_left else (DEGRADED, system)))
        for (prompt, system), intact_left in zip(sentinels, left_first, strict=True)
    ]
    order = pairs + controls
    draws.shuffle(order)
    places = {item.token: float(number) for number, item in enumerate(order)}
    for item in _repeated(pairs, places, design, draws):
        again = Item(next(tokens), REPEAT, item.prompt, item.right, item.left, of=item.token)
        places[again.token] = draws.uniform(places[item.token] + len(order) / 4, len(order))
        order.append(again)
    return sorted(order, key=lambda item: places[item.token])


def _sides(design: Design, place: int) -> list[tuple[int, int, int]]:
    """Returns (prompt, left, right) of the comparisons of the rater at `place`.

    Half of the prompts of each two systems have the first on the left. Where P is odd, the prompt that is over goes
    round the systems: i has it from the (S - 1) / 2 systems after it, so that its surpluses cancel.
    """
    draws = Random(f"{design.seed}/sides/{place // 2}")
    exchanged = place % 2 == 1
    turn = draws.random() < 0.5
    sides = []
    for first, second in combinations(range(design.systems), 2):
        over = (second - first <= design.systems // 2) != turn
        first_left = [True, False] * (design.prompts // 2) + [over] * (design.prompts % 2)
        draws.shuffle(first_left)
        for prompt, left in enumerate(first_left):
            sides.append((prompt, first, second) if left != exchanged else (prompt, second, first))
    return sides


def _repeated(pairs: list[Item], places: dict[str, float], design: Design, draws: Random) -> list[Item]:
    """Returns the comparisons to be repeated: from the first half, so that time passes, and such that sides stay even.

    A repeat has its sides exchanged; the next one taken is that which leaves the smallest surplus of left sides.
    """
    surplus = [sum((item.left == s) - (item.right == s) for item in pairs) for s in range(design.systems)]
    candidates = [item for item in pairs if places[item.token] <= len(places) / 2]
    draws.shuffle(candidates)
    taken = []
    for _ in range(min(design.extra(design.repeats), len(candidates))):
        best = min(candidates, key=lambda item: abs(surplus[item.right] + 1) + abs(surplus[item.left] - 1))
        candidates.remove(best)
        surplus[best.right] += 1
        surplus[best.left] -= 1
        taken.append(best)
    return taken


def halves(count: int, draws: Random) -> list[bool]:
    """Returns `count` truth values in random order, half of them true, to within one."""
    values = [True, False] * (count // 2) + [draws.random() < 0.5] * (count % 2)
    draws.shuffle(values)
    return values
