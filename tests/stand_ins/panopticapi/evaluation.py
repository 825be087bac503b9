"""Panoptic quality (arXiv 1801.00868, equation 1) from counts of matched and unmatched segments."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

VOID = 0
OFFSET = 256**3


@dataclass
class PQStatCat:
    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: PQStatCat) -> PQStatCat:
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn
        return self

    def __bool__(self) -> bool:
        return self.tp + self.fp + self.fn > 0

    def quality(self) -> dict[str, float]:
        if not self:
            return dict(pq=0.0, sq=0.0, rq=0.0)
        total = self.tp + (self.fp + self.fn) / 2
        return dict(pq=self.iou / total, sq=self.iou / max(self.tp, 1), rq=self.tp / total)


class PQStat:
    def __init__(self) -> None:
        self.pq_per_cat = defaultdict(PQStatCat)

    def __getitem__(self, category: int) -> PQStatCat:
        return self.pq_per_cat[category]

    def __iadd__(self, other: PQStat) -> PQStat:
        for category, counts in other.pq_per_cat.items():
            self.pq_per_cat[category] += counts
        return self

    def pq_average(self, categories: dict, isthing: bool | None) -> tuple[dict, dict]:
        """The mean over the categories that occur, of all or of things or stuff alone, and each category's own."""
        chosen = [key for key, value in categories.items() if isthing is None or bool(value['isthing']) == isthing]
        per_class = {category: self.pq_per_cat[category].quality() for category in chosen}
        seen = [per_class[category] for category in chosen if self.pq_per_cat[category]]
        means = {key: float(np.mean([one[key] for one in seen])) if seen else 0.0 for key in ('pq', 'sq', 'rq')}
        return {**means, 'n': len(seen)}, per_class
