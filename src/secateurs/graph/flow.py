"""Who needs whom on a tape: what depends on a value, and what dies when a sum becomes its skip."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from secateurs.graph.labels import Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.zeroing import aliases

__all__ = ["Flow"]


class Flow:
    """Who needs whom on a tape."""

    def __init__(self, labels: Labels) -> None:
        self.labels, self.tape = labels, labels.tape
        self.reads = [
            tuple(dict.fromkeys(r.id for r in refs([r.args, r.kwargs]))) for r in self.tape.records
        ]
        self.users: dict[int, list[int]] = {}
        self.above: dict[int, int] = {}  # value -> bits of the values that it depends on
        self.made_by: dict[int, Record] = {}
        for number, record in enumerate(self.tape.records):
            bits = 0
            for ident in self.reads[number]:
                self.users.setdefault(ident, []).append(number)
                bits |= self.above.get(ident, 0) | (1 << ident)
            for out in record.outputs:
                self.above[out] = bits
                self.made_by[out] = record
        self.root = aliases(self.tape)
        self.writes = any(r.inplace for r in self.tape.records)
        values = self.tape.values
        self.layers = [
            n
            for n, reads in enumerate(self.reads)
            if any(values[labels.root(Ref(i)).id].source == "parameter" for i in reads)
        ]  # records that use parameters
        self.useless = self.dead(())

    def depends(self, value: int, on: int) -> bool:
        return bool(self.above.get(value, 0) >> on & 1)

    def dead(self, sums: Iterable[tuple[int, int]]) -> frozenset[int]:
        """Records that no output needs when these sums are replaced by their skips."""
        skips = dict(sums)
        rewritten = any(self.tape.records[n].inplace for n in skips)
        root = aliases(self.tape, skips) if rewritten else self.root
        values = set(self.tape.outputs)
        memory = {root.get(v, v) for v in values}
        live: set[int] = set()
        before = -1
        while before != len(live) and (before < 0 or self.writes):
            before = len(live)
            for number in range(len(self.tape.records) - 1, -1, -1):
                if number in live or not self._needed(number, values, memory, root):
                    continue
                live.add(number)
                reads = self.reads[number]
                if number in skips:
                    reads = (self.tape.records[number].args[skips[number]].id,)
                values |= set(reads)
                memory |= {root.get(i, i) for i in reads}
        return frozenset(range(len(self.tape.records))) - live

    def _needed(
        self, number: int, values: set[int], memory: set[int], root: Mapping[int, int]
    ) -> bool:
        """An output is read, or it writes to memory that is read or outlives the run."""
        record = self.tape.records[number]
        if not values.isdisjoint(record.outputs):
            return True
        target = next(refs(record.args), None) if record.inplace else None
        if target is None:
            return False
        base = root.get(target.id, target.id)
        return base in memory or self.tape.values[base].source != "op"

    def parameters(self, records: Iterable[int]) -> list[int]:
        """Parameters and buffers that these records read."""
        values = self.tape.values
        read = dict.fromkeys(i for n in records for i in self.reads[n])
        return [i for i in read if values[i].source in ("parameter", "buffer")]

    def only_in(self, value: int, dead: Collection[int]) -> bool:
        """Whether nothing but these records (and useless ones) reads a value."""
        return all(n in dead or n in self.useless for n in self.users.get(value, []))
