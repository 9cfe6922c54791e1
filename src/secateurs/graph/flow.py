"""Who needs whom on a tape: what depends on a value, and what dies when a sum becomes its skip."""

from __future__ import annotations

from collections import Counter
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
        self.maker = {out: n for n, r in enumerate(self.tape.records) for out in r.outputs}
        self.useless = self._dead({})
        needed = (i for n, reads in enumerate(self.reads) if n not in self.useless for i in reads)
        self.uses = Counter([*needed, *set(self.tape.outputs)])

    def depends(self, value: int, on: int) -> bool:
        return bool(self.above.get(value, 0) >> on & 1)

    def dead(self, sums: Iterable[tuple[int, int]]) -> frozenset[int]:
        """Records that no output needs when these sums are replaced by their skips."""
        skips = dict(sums)
        return self._dead(skips) if self.writes else self._dead_by_count(skips)

    def _dead_by_count(self, skips: Mapping[int, int]) -> frozenset[int]:
        """The same where nothing is overwritten: what loses its last reader is dead."""
        gone = set(self.useless)
        lost: Counter[int] = Counter()
        todo = [
            ident
            for number, position in skips.items()
            for ident in self.reads[number]
            if ident != self.tape.records[number].args[position].id
        ]
        while todo:
            ident = todo.pop()
            lost[ident] += 1
            number = self.maker.get(ident, -1)
            if number < 0 or number in gone:
                continue
            outs = self.tape.records[number].outputs
            if all(self.uses[out] <= lost[out] for out in outs):
                gone.add(number)
                todo += self.reads[number]
        return frozenset(gone)

    def _dead(self, skips: Mapping[int, int]) -> frozenset[int]:
        """The same for any tape, pass by pass."""
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
